"""Learn one modality: align its connector, then tune connector and LoRA.

deepspeed launch/stage.py --modality audio
torchrun --nproc-per-node 2 launch/stage.py --modality audio
python launch/stage.py --modality audio
"""

import sys

from mera_ds.cli.launch import train_stage

if __name__ == "__main__":
    sys.exit(train_stage(("align", "tune")))
