"""Realign all connectors so far with the merged backbone, on replay data.

deepspeed launch/realign.py --modality audio
torchrun --nproc-per-node 2 launch/realign.py --modality audio
"""

import sys

from mera_ds.cli.launch import train_stage

if __name__ == "__main__":
    sys.exit(train_stage(("realign",)))
