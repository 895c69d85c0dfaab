"""Merge a tuned backbone with the previous stage's, on a CPU.

python launch/merge.py --modality audio                          in a run: exact, by lineage
python launch/merge.py --previous A --tuned B --stage 3 --out C  any two HF checkpoint folders, or
                                                                 a folder and a LoRA adapter on it
"""

from mera_ds.cli.launch import leave, merge

if __name__ == "__main__":
    leave(merge())
