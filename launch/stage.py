"""Learn one modality: align its connector, then tune connector and LoRA.

deepspeed launch/stage.py --modality audio
torchrun --nproc-per-node 2 launch/stage.py --modality audio
python launch/stage.py --modality audio
"""

from mera_ds.cli.launch import leave, train_stage

if __name__ == "__main__":
    leave(train_stage(("align", "tune")))
