"""What full fine-tuning leaves on disk: the tuned backbone, and states too large for one rank."""

from pathlib import Path

from mera_ds.config import Dtype, ExecutionConfig
from mera_ds.distributed import World, main_rank_first
from mera_ds.files import write_json
from mera_ds.merge.export import carry_over
from mera_ds.merge.safetensors_io import INDEX
from mera_ds.model.backbone import DTYPES
from mera_ds.train.engine import Engine
from mera_ds.train.shares import shared_folder, size_of, write_shares
from mera_ds.train.state import STATE, Progress, remove_outdated, state_facts, step_folder


def write_backbone(engine: Engine, source: Path, final: Path, dtype: Dtype, world: World) -> None:
    """Write the trained backbone as an HF folder; every rank must call it.

    Args:
        engine: holds the backbone, in whatever parts.
        source: the HF folder that was trained from: configuration and tokenizer are taken over.
        final: the folder to write.
        dtype: of the weights on disk; the fp32 masters are rounded to it once.
        world: this process among the ranks.

    Raises:
        DataError: if a weight is not finite.
        ResourceError: if the disk is full.
    """
    tensors = engine.shared_backbone()
    size = size_of(tensors, dtype)
    with shared_folder(final, size, world) as folder:
        files = write_shares(folder, "model", tensors, dtype, world)
        with main_rank_first(world) as mine:
            if mine:
                carry_over(source, folder, DTYPES[dtype], size)
                places = {name: file for file, (_, names) in files.items() for name in names}
                weights = {"weight_map": dict(sorted(places.items()))}
                write_json(folder / INDEX, {"metadata": {"total_size": size}, **weights})


def save_shared_checkpoint(
    engine: Engine,
    folder: Path,
    key: str,
    progress: Progress,
    execution: ExecutionConfig,
    world: World,
) -> None:
    """Write `step-000400/` as `save_checkpoint` does, each rank its share of the tensors.

    Raises:
        ResourceError: if the disk is full; earlier checkpoints stay.
    """
    with engine.shared_state() as tensors:
        size = size_of(tensors, "fp32")
        with shared_folder(step_folder(folder, progress), size, world) as target:
            files = write_shares(target, "state", tensors, "fp32", world)
            scalars = engine.scalars()
            with main_rank_first(world) as mine:
                if mine:
                    shares = {file: sha256 for file, (sha256, _) in files.items()}
                    facts = state_facts(key, progress, scalars)
                    write_json(target / STATE, {**facts, "shares": shares})
    if world.is_main:
        remove_outdated(folder, execution.keep_checkpoints, execution.keep_every)
