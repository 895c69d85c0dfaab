"""Realign all connectors so far with the merged backbone, on replay data.

deepspeed launch/realign.py --modality audio
torchrun --nproc-per-node 2 launch/realign.py --modality audio
"""

from mera_ds.cli.launch import leave, train_stage

if __name__ == "__main__":
    leave(train_stage(("realign",)))
