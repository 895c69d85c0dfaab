"""Generate and score on the test sets: the newest finished stage, or the one that is named.

python launch/score.py
python launch/score.py --modality audio
"""

from mera_ds.cli.launch import leave, score

if __name__ == "__main__":
    leave(score())
