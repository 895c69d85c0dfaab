"""Builds the shard sets of a recipe: `python shards/build.py NAME --source DIR --out DIR`.

The same as `mera-ds shards build`. A rerun continues where a killed build stopped.
"""

import sys

from mera_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", "build", *sys.argv[1:]]))
