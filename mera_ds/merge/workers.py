"""Threads that merge the blocks of a plan's files, and files that are finished one by one."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from mera_ds.files import failpoint, full_disk_is_an_error
from mera_ds.merge.digest import block_ranges, tensor_digest
from mera_ds.merge.partial import PartialFolder, TensorRecord
from mera_ds.merge.plan import MergedTensor, MergePlan, Shard
from mera_ds.merge.safetensors_io import Bytes, MappedFiles, TensorPlace, item_size
from mera_ds.merge.stream import BlockMerger, BlockResult, Squares

Progress = Callable[[int], None]
"""Is told how many bytes of the output were written since the last call."""

Job = tuple["_OpenShard", MergedTensor, Sequence[tuple[int, int]]]
"""Blocks of a tensor that one thread merges."""


def write_shards(
    plan: MergePlan,
    partial: PartialFolder,
    shards: Sequence[Shard],
    workers: int,
    progress: Progress,
) -> None:
    """Write some of a plan's files; each is recorded as soon as it is on disk.

    Args:
        plan: the merge.
        partial: where the files go.
        shards: those that are missing.
        workers: number of threads.
        progress: called by all threads.

    Raises:
        DataError: if a merged element is not finite.
        ResourceError: if the disk is full.
    """
    jobs = _Jobs(plan, partial, shards, progress)
    try:
        with ThreadPoolExecutor(workers) as threads:
            futures = [threads.submit(jobs.work) for _ in range(workers)]
            try:
                for future in futures:
                    future.result()
            finally:
                jobs.stop.set()
    finally:
        jobs.close()


class _Jobs:
    """The blocks of all files in order; every thread takes the next one."""

    def __init__(
        self,
        plan: MergePlan,
        partial: PartialFolder,
        shards: Sequence[Shard],
        progress: Progress,
    ) -> None:
        self.stop = Event()
        self._files = MappedFiles(place.file for places in plan.inputs for place in places.values())
        self._rule = plan.rule
        self._partial = partial
        self._progress = progress
        self._lock = Lock()
        self._open: list[_OpenShard] = []
        self._next = self._all(shards)

    def _all(self, shards: Sequence[Shard]) -> Iterator[Job]:
        for shard in shards:
            opened = _OpenShard(shard, self._partial.folder)
            self._open.append(opened)
            for tensor in shard.tensors:
                blocks = block_ranges(tensor.old.elements)
                if tensor.base is not None:  # what is computed for all of it serves all blocks
                    yield opened, tensor, blocks
                else:
                    yield from ((opened, tensor, [block]) for block in blocks)

    def work(self) -> None:
        """Merge blocks until there are none, another thread failed, or it is time to stop."""
        merger = BlockMerger(self._files, self._rule)
        try:
            while not self.stop.is_set():
                with self._lock:
                    job = next(self._next, None)
                if job is None:
                    return
                self._do(merger, job)
        except BaseException:
            self.stop.set()
            raise

    def _do(self, merger: BlockMerger, job: Job) -> None:
        opened, tensor, blocks = job
        complete = False
        for begin, end in blocks:
            with full_disk_is_an_error(opened.path):
                result = merger.merge(tensor, begin, end, opened.writer(tensor))
            failpoint("merge.after_block")
            with self._lock:
                complete = opened.add(tensor, begin, result)
            self._progress((end - begin) * item_size(tensor.dtype))
        if complete:
            with full_disk_is_an_error(opened.path):
                opened.finish()
                failpoint("merge.before_record")
                with self._lock:
                    self._partial.record(opened.shard, opened.records())

    def close(self) -> None:
        """Close the files that were not finished."""
        for opened in self._open:
            opened.close()


class _OpenShard:
    """A file that is being written."""

    def __init__(self, shard: Shard, folder: Path) -> None:
        self.shard = shard
        self.path = folder / shard.file
        self._places: Mapping[str, TensorPlace] = shard.places(folder)
        self._results: dict[str, dict[int, BlockResult]] = {t.name: {} for t in shard.tensors}
        self._left = sum(len(block_ranges(t.old.elements)) for t in shard.tensors)
        with full_disk_is_an_error(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            os.ftruncate(self._descriptor, shard.size)
            os.pwrite(self._descriptor, shard.header, 0)

    def writer(self, tensor: MergedTensor) -> Callable[[Bytes, int], None]:
        """Return a function that writes bytes of a tensor at an offset in it."""
        start = self._places[tensor.name].offset

        def write(content: Bytes, offset: int) -> None:
            view = content.data
            position = start + offset
            while len(view):
                written = os.pwrite(self._descriptor, view, position)
                view, position = view[written:], position + written

        return write

    def add(self, tensor: MergedTensor, begin: int, result: BlockResult) -> bool:
        """Keep what is known about a block; return whether it was the file's last one."""
        self._results[tensor.name][begin] = result
        self._left -= 1
        return self._left == 0

    def finish(self) -> None:
        """Bring the file to disk."""
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def records(self) -> dict[str, TensorRecord]:
        """Return what was found out about the file's tensors."""
        return {tensor.name: self._record(tensor) for tensor in self.shard.tensors}

    def _record(self, tensor: MergedTensor) -> TensorRecord:
        found = self._results[tensor.name]
        blocks = [found[begin] for begin in sorted(found)]
        squares = Squares()
        for block in blocks:
            squares.add(block.squares)
        tuned = tensor.new.dtype if isinstance(tensor.new, TensorPlace) else tensor.old.dtype
        digests = [
            tensor_digest(dtype, tensor.old.shape, (block.digests[n] for block in blocks))
            for n, dtype in enumerate((tensor.old.dtype, tuned, tensor.dtype))
        ]
        return TensorRecord(
            changed=any(block.changed for block in blocks),
            squares=squares,
            previous=digests[0],
            tuned=digests[1],
            merged=digests[2],
        )
