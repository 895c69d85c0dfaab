"""Ranks: which process this is, how the launcher said so, and how processes agree.

The same script runs under `torchrun`, `deepspeed` and plain `python`; the last is a world of one.
"""

import itertools
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from mera_ds.errors import MeraError, RankError


@dataclass(frozen=True)
class World:
    """This process among all processes of a training step."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes shared files."""
        return self.rank == 0

    @property
    def device(self) -> str:
        """The device this rank computes on."""
        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"


def ensure_launcher_variables() -> World:
    """Set the variables that torchrun and deepspeed set, if plain python started us."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
        )
    return World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def process_group(world: World, timeout_seconds: int) -> Iterator[None]:
    """Hold a process group: nccl where there is CUDA, gloo otherwise."""
    if torch.distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def share(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Return every rank's value, in rank order, on every rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def require_equal(value: Any, what: str) -> None:
    """Raise `RankError` on every rank unless all ranks hold the same value."""
    values = gather(value)
    if any(other != values[0] for other in values):
        listed = "; ".join(f"rank {rank}: {entry}" for rank, entry in enumerate(values))
        raise RankError(f"the ranks disagree on {what}: {listed}")


@contextmanager
def together() -> Iterator[None]:
    """Run a block on every rank and pass the first error on to all, so that no rank waits for ever.

    The block holds no collective: the ranks meet at its end.
    """
    error: MeraError | None = None
    try:
        yield
    except MeraError as caught:
        error = caught
    first = next((entry for entry in gather(error) if entry is not None), None)
    if first is not None:
        raise first


@contextmanager
def main_rank_first(world: World) -> Iterator[bool]:
    """Run a block's work on rank 0 and pass its error on to all, so that no rank waits for ever.

    The block receives whether this rank is to do the work.
    """
    with together():
        yield world.is_main


_alone = itertools.count()


@contextmanager
def main_rank_alone(world: World) -> Iterator[bool]:
    """As `main_rank_first`, for work that may take longer than the group's timeout.

    The others wait at the group's store, as long as rank 0 lives.

    Raises:
        RankError: on the others, if rank 0 ends within the block.
    """
    with together():
        number = next(_alone)  # the same on all ranks: each passes all of these blocks
        if not torch.distributed.is_initialized() or world.size == 1:
            yield world.is_main
            return
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        key = f"mera-ds/alone/{number}"
        if world.is_main:
            try:
                yield True
            finally:
                store.set(key, "done")
        else:
            yield False
            _wait_for(store, key)


def _wait_for(store: Any, key: str) -> None:
    try:
        while not store.check([key]):
            time.sleep(0.1)
    except RuntimeError as error:
        raise RankError(f"rank 0 ended while the others waited for it ({error})") from None
