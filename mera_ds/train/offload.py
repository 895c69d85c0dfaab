"""Offloading to a local disk (NVMe): what DeepSpeed is told, and what can't be trained so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mera_ds.config import Dtype
from mera_ds.errors import InputError

OPTIMIZER, PARAMETERS = "offload_optimizer", "offload_param"
_INSTEAD = "offload to host memory instead: execution.ds_config=ds_configs/zero3-offload.json"


def on_disk(settings: Mapping[str, Any]) -> list[str]:
    """Return which sections of DeepSpeed's settings offload to NVMe."""
    zero = settings.get("zero_optimization", {})
    return [name for name in (OPTIMIZER, PARAMETERS) if zero.get(name, {}).get("device") == "nvme"]


def with_folder(settings: dict[str, Any], folder: str | None, path: Path) -> dict[str, Any]:
    """Return DeepSpeed's settings with the folder that is offloaded to.

    Args:
        settings: the content of `path`.
        folder: `execution.nvme_folder`.
        path: what messages call the settings.

    Raises:
        InputError: if there is a folder but nothing for it, or nothing can be written there.
    """
    sections = on_disk(settings)
    if not sections and folder is not None:
        raise InputError(
            f"execution.nvme_folder is {folder}, but {path} offloads nothing to NVMe; add "
            "execution.ds_config=ds_configs/zero3-nvme.json"
        )
    if not sections:
        return settings
    if folder is None:
        raise InputError(
            f"{path} offloads to NVMe; add execution.nvme_folder=FOLDER, on such a disk"
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"execution.nvme_folder={folder} can't be made ({error})") from None
    zero = settings["zero_optimization"]
    placed = {name: {**zero[name], "nvme_path": folder} for name in sections}
    return {**settings, "zero_optimization": {**zero, **placed}}


def require_disk_support(
    settings: Mapping[str, Any], dtype: Dtype, other_state: str | None, async_io: bool
) -> None:
    """Refuse what can't be offloaded to NVMe, or not on this machine.

    Args:
        settings: DeepSpeed's.
        dtype: of the backbone.
        other_state: the setting by which the optimizer keeps more than Adam's fp32 moments.
        async_io: whether DeepSpeed's `async_io` can be built here.

    Raises:
        InputError: if it is so.
    """
    sections = on_disk(settings)
    if PARAMETERS in sections and dtype == "fp32":
        raise InputError(
            "DeepSpeed offloads parameters to NVMe in half precision only, but backbone.dtype is "
            f"fp32; {_INSTEAD}"
        )
    if OPTIMIZER in sections and other_state is not None:
        raise InputError(f"what {other_state} keeps can't be offloaded to NVMe; {_INSTEAD}")
    if not async_io:
        raise InputError(
            "offloading to NVMe needs libaio with its headers (package libaio-dev or libaio-devel) "
            f"and a C++ compiler; install them, or {_INSTEAD}"
        )
