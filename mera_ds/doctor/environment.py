"""Facts on the machine and the installed software, without importing any of it."""

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from mera_ds.config import RunConfig, cache_folder
from mera_ds.machine import gpu_names

PACKAGES = ("torch", "transformers", "peft", "deepspeed")


@dataclass(frozen=True)
class Fact:
    """One line on the environment."""

    name: str
    value: str
    fine: bool = True
    """False: something that the configuration needs is not there."""


def environment(config: RunConfig | None, folder: Path) -> list[Fact]:
    """Return what is known of the environment.

    Args:
        config: the configuration that it is for; None: only say what is there.
        folder: where the run is or will be, for the disk's free space.
    """
    return [
        Fact("python", f"{platform.python_version()} on {platform.machine()}"),
        *(_package(name) for name in PACKAGES),
        _gpu(config),
        _attention(config),
        Fact("memory", f"{psutil.virtual_memory().total / 1e9:.0f} GB, {os.cpu_count()} cores"),
        _space("disk of the run", folder),
        _space("disk of the cache", cache_folder()),
        _java(),
        _key(config),
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Fact:
    version = _version(name)
    if version is None:
        return Fact(name, "not installed: pip install -c constraints.txt -e .", fine=False)
    cpu = name == "torch" and version.endswith("+cpu")
    return Fact(name, f"{version} (built for the CPU only)" if cpu else version)


def _gpu(config: RunConfig | None) -> Fact:
    names = gpu_names()
    if names:
        return Fact("GPU", "; ".join(names))
    if config is not None and config.backbone.dtype != "fp32":
        dtype = config.backbone.dtype
        return Fact("GPU", f"none: {config.profile} computes in {dtype}, slow on a CPU")
    return Fact("GPU", "none: everything runs on the CPU (gloo)")


def _attention(config: RunConfig | None) -> Fact:
    if importlib.util.find_spec("flash_attn") is None:
        if config is not None and config.backbone.attention == "flash_attention_2":
            remedy = "install flash-attn, or take backbone.attention=auto"
            return Fact(
                "attention", f"backbone.attention asks for flash-attn: {remedy}", fine=False
            )
        return Fact("attention", "SDPA (flash-attn is not installed, and not needed)")
    return Fact("attention", f"flash-attn {_version('flash-attn')} on a GPU in half precision")


def _space(name: str, folder: Path) -> Fact:
    there = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )
    return Fact(name, f"{shutil.disk_usage(there).free / 1e9:.0f} GB free at {there}")


def _java() -> Fact:
    if shutil.which("java") is None:
        return Fact("java", "none: CIDEr's tokenizer is the equal one in Python")
    return Fact("java", "there: CIDEr uses the Stanford tokenizer")


def _key(config: RunConfig | None) -> Fact:
    there = bool(os.environ.get("OPENAI_API_KEY"))
    if config is None or config.evaluate.judge != "openai":
        return Fact("OPENAI_API_KEY", "set" if there else "not set, and not needed")
    if there:
        return Fact("OPENAI_API_KEY", "set")
    remedy = "not set: export it for the judge, or init with evaluate.judge=offline-containment"
    return Fact("OPENAI_API_KEY", remedy, fine=False)
