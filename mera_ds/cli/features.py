"""The command `mera-ds shards features`: compute encoder features before anything is trained."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mera_ds.cli.launch import DEFAULT_RUN
from mera_ds.config import RunConfig, cache_folder, load_config, load_profile
from mera_ds.errors import InputError
from mera_ds.files import require_space
from mera_ds.log import set_up_console
from mera_ds.registry import load_plugins
from mera_ds.settings import require_known

if TYPE_CHECKING:  # it needs torch
    from mera_ds.distributed import World

FP16_ERROR = "every value is within 1/2048 of itself, or within 3e-8 below 6e-5"


def add_command(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to `mera-ds shards`."""
    features = kinds.add_parser(
        "features",
        help="run the encoders once per medium, for execution.features=cached",
        epilog="KEY=VALUE anywhere overrides a setting of the profile (of a run: execution.KEY).",
    )
    features.add_argument("--run", "--run-folder", type=Path, help="for the media of this run")
    features.add_argument("--profile", help="for those of a profile that is no run yet")
    features.add_argument("--modality", help="only this one; default: all")
    features.add_argument("--dry-run", action="store_true", help="only say how large they will be")
    features.set_defaults(command=compute, overrides=())


def compute(arguments: argparse.Namespace) -> None:
    """Compute the features of a run's or a profile's media, on any number of ranks.

    Raises:
        InputError: there is no such run, profile or modality.
        ResourceError: the disk is too small for them.
    """
    from mera_ds.distributed import ensure_launcher_variables, process_group

    world = ensure_launcher_variables()
    set_up_console(world.rank)
    config, run = _configured(arguments)
    chosen = list(config.modalities)
    if arguments.modality is not None:
        require_known(arguments.modality, config.modalities, "modality")
        chosen = [arguments.modality]
    with process_group(world, config.execution.timeout_seconds):
        _compute(config, run, chosen, world, arguments.dry_run)


def _configured(arguments: argparse.Namespace) -> tuple[RunConfig, Path]:
    if arguments.run is not None and arguments.profile is not None:
        raise InputError("give --run or --profile, not both")
    run: Path = arguments.run or Path(DEFAULT_RUN)
    if arguments.profile is not None:
        config = load_profile(arguments.profile, arguments.overrides)
    else:
        config = load_config(run, arguments.overrides)
    load_plugins(config, run)
    return config, run


def _compute(
    config: RunConfig, run: Path, modalities: list[str], world: "World", dry_run: bool
) -> None:
    from mera_ds.data.dataset import TEST, TRAIN
    from mera_ds.distributed import main_rank_first
    from mera_ds.features import FeatureStore, open_shards
    from mera_ds.model.build import build_encoders

    encoders = build_encoders(config, run, modalities)
    stores = {
        (modality, split): FeatureStore(
            open_shards(config, run, modality, split), encoders[modality]
        )
        for modality in modalities
        for split in (TRAIN, TEST)
    }
    say = print if world.is_main else lambda line: None
    total = 0
    for (modality, split), store in stores.items():
        missing = f"{store.missing_media()} of {store.media} media to encode"
        say(f"{modality} {split}: {missing}, at most {_size(store.most_bytes())}")
        total += store.most_bytes()
    say(f"in {cache_folder() / 'features'}, at most {_size(total)} more")
    if dry_run:
        return
    with main_rank_first(world) as mine:
        if mine:
            require_space(cache_folder(), total)
    for (modality, split), store in stores.items():
        store.compute_missing(world)
        dtype = config.modalities[modality].feature_dtype
        size = f"{_size(store.stored_bytes())} in {dtype}"
        rounded = f"; {FP16_ERROR}" if dtype == "fp16" else ""
        say(f"{modality} {split}: {store.media} media, {size}{rounded}")


def _size(count: int) -> str:
    """Return a number of bytes in a unit that fits it."""
    unit, name = next(
        ((unit, name) for unit, name in ((10**9, "GB"), (10**6, "MB")) if count >= unit),
        (1000, "kB"),
    )
    return f"{count / unit:.1f} {name}"
