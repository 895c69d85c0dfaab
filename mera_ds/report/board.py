"""The gains by stage as TensorBoard shows them: a curve for each method and order."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from mera_ds.log import EventFile
from mera_ds.report.summary import GAINS, GainRow, Section


def write_board(folder: Path, sections: Sequence[Section]) -> None:
    """Write the gains of all sections to `folder`, in place of what it held."""
    shutil.rmtree(folder, ignore_errors=True)
    for section in sections:
        for gain in GAINS if section.experts else ():
            for row in section.gains(gain):
                _write(folder / _name(section, row), gain, row)


def _name(section: Section, row: GainRow) -> str:
    order = "mean" if row.order is None else f"order {section.orders.index(row.order) + 1}"
    return re.sub(r"[^\w%()+=., #-]", "_", f"{section.profile}, {row.label}, {order}")


def _write(folder: Path, gain: str, row: GainRow) -> None:
    events = EventFile(folder)
    try:
        for stage, mean in enumerate(row.progress.stages, start=1):
            if mean.value is not None:
                events.add(f"{gain}_relative_gain", stage, {"percent": mean.value})
    finally:
        events.close()
