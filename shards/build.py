"""Builds the shard sets of a recipe: `python shards/build.py NAME --source DIR --out DIR`.

The same as `mera-ds shards build`. A rerun continues where a killed build stopped.
"""

import argparse
import sys
from pathlib import Path

from mera_ds.errors import MeraError
from mera_ds.log import logger, set_up_console
from mera_ds.recipes import RECIPES, build


def main() -> int:
    """Build, and return the exit status."""
    parser = argparse.ArgumentParser(description="Build the shard sets of a recipe.")
    parser.add_argument("name", help=f"recipe: {', '.join(RECIPES)}")
    parser.add_argument("--source", type=Path, help="folder with the recipe's source files")
    parser.add_argument("--out", type=Path, required=True, help="folder for <dataset>/<split>")
    options = parser.parse_args()
    set_up_console()
    try:
        build(options.name, options.source, options.out, logger.info)
    except MeraError as error:
        logger.error("error: %s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
