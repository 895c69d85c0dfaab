"""Carry out the plans of one or more runs; the same as `mera-ds run`.

python launch/sequence.py runs/experts runs/mera
"""

import sys

from mera_ds.cli import main
from mera_ds.cli.launch import leave

if __name__ == "__main__":
    leave(main(["run", *sys.argv[1:]]))
