"""A small process beside each rank that kills it when it has stopped answering.

A rank that was stopped, or that hangs where Python can't run, can't end itself, and a launcher on
its node may not know that the others are gone. Run as a script, with the standard library alone:

    python guardian.py RANK SECONDS FILE

RANK's process is our parent. It writes to our standard input every second; we end when it does.
"""

import json
import os
import select
import signal
import sys
from pathlib import Path

_TICK = 1.0


def main(rank: str, seconds: float, file: str) -> None:
    """Wait for signs of life; kill the parent if there are none for so many seconds."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank
    parent, silent = os.getppid(), 0.0
    while silent < seconds:
        ready, _, _ = select.select([sys.stdin.fileno()], [], [], _TICK)
        if os.getppid() != parent:
            return
        silent = 0.0 if ready else silent + _TICK
        if ready and not os.read(sys.stdin.fileno(), 4096):
            return
    try:
        place = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        place = {}
    where = f"{place.get('work')} at step {place.get('step')}"
    samples = ", ".join(place.get("samples", ()))
    os.kill(parent, signal.SIGKILL)
    sys.stderr.write(
        f"error: rank {rank} did not answer for {seconds:g} s and was killed: {where} with "
        f"{samples}. Run the same command to continue\n"
    )


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
