"""Tensors to raw files and back, planned by torch's distributed checkpoint (DCP), with no pickle on disk.

DCP's planners decide which rank writes which piece, and which pieces a rank must read to fill its shards; `Writer` and `Reader` are their
storage. A rank writes one file, `data-<rank>.bin`, in which each piece begins at a multiple of 64 bytes. Plain values travel as JSON to the
coordinator, who hands the finished `Manifest` to `commit`. Everything that may fail runs inside DCP's phases, so that a failure on one
rank is known on all.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from quintet.checkpoint.durable import FileWriter, failure, hash_file, open_regular
from quintet.checkpoint.manifest import File, Manifest, Piece, Tensor, check_value
from quintet.checkpoint.pieces import Pieces
from quintet.errors import CheckpointError

_ALIGNMENT = 64


class SaveValues(DefaultSavePlanner):
    """DCP's planner over a flat state, with plain values as JSON instead of pickles."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor or value to write."""
        found = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index) if isinstance(found, Pieces) else super().lookup_object(index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """A tensor as it is, anything else as JSON bytes; raises CheckpointError for what JSON cannot hold."""
        if write_item.type != WriteItemType.BYTE_IO:
            return object
        check_value(object, name=write_item.index.fqn)
        return io.BytesIO(json.dumps(object, allow_nan=False).encode())


class LoadTensors(DefaultLoadPlanner):
    """DCP's planner over a flat state."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Take the state as it is: torch's own would put None in the place of Pieces, in its search for tensors on the meta device."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The tensor to fill."""
        found = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index) if isinstance(found, Pieces) else super().lookup_tensor(index)


class Writer(StorageWriter):
    """Writes this rank's pieces; on the coordinator, `begin` makes the directory and `commit` finishes it."""

    def __init__(self, *, step: int, begin: Callable[[], Path], commit: Callable[[Manifest], None]) -> None:
        self._step, self._begin, self._commit = step, begin, commit
        self._rank = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one save to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn this rank's number, which names its file."""
        self._rank = int(kwargs.get("rank", 0))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the directory and tell every rank its name."""
        directory = str(self._begin())
        return [dataclasses.replace(plan, storage_data=directory) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors into its file; the results carry a Piece, a value's JSON, or (the last one) the File."""
        results: list[WriteResult] = []
        with FileWriter(Path(plan.storage_data) / f"data-{self._rank:05d}.bin") as writer:
            for item in plan.items:
                data = planner.resolve_data(item)
                record = data.getvalue() if isinstance(data, io.BytesIO) else _write_piece(writer, item, data)
                results.append(WriteResult(index=item.index, size_in_bytes=0, storage_data=record))
        if results:
            results.append(WriteResult(index=results[0].index, size_in_bytes=0, storage_data=writer.file))
        else:
            writer.path.unlink()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Put all ranks' records together and commit."""
        files: list[File] = []
        pieces: dict[str, list[Piece]] = {}
        values: dict[str, Any] = {}
        for result in (result for rank in results for result in rank):
            match result.storage_data:
                case File() as file:
                    files.append(file)
                case Piece() as piece if math.prod(piece.sizes):
                    pieces.setdefault(result.index.fqn, []).append(piece)
                case bytes() as value:
                    values[result.index.fqn] = json.loads(value)
        tensors = {
            name: Tensor(dtype=dtype_name(known.properties.dtype), shape=tuple(known.size), pieces=tuple(pieces.get(name, ())))
            for name, known in metadata.state_dict_metadata.items()
            if isinstance(known, TensorStorageMetadata)
        }
        self._commit(Manifest(step=self._step, files=tuple(files), tensors=tensors, values=values))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """DCP's automatic choice of a storage does not choose this one."""
        return False


class Reader(StorageReader):
    """Fills this rank's tensors, after the hash of every file that it needs has been verified."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory, self._manifest = directory, manifest
        self._pieces = {(name, piece.offsets): piece for name, tensor in manifest.tensors.items() for piece in tensor.pieces}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one load to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """DCP's view of the manifest."""
        return Metadata(state_dict_metadata={name: _metadata(tensor) for name, tensor in self._manifest.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Verify the files that this rank will read; no rank fills a tensor before all have done so."""
        needed = {self._piece(item).file for item in plan.items}
        for file in self._manifest.files:
            if file.path in needed:
                verify_file(self._directory, file)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to coordinate."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors, file by file in the order of their bytes."""
        fds = {path: open_regular(self._directory / path) for path in {self._piece(item).file for item in plan.items}}
        try:
            for item in sorted(plan.items, key=lambda item: (self._piece(item).file, self._piece(item).offset)):
                target = planner.resolve_tensor(item).detach()
                assert dtype_name(target.dtype) == self._manifest.tensors[item.storage_index.fqn].dtype
                _read_box(fds[self._piece(item).file], self._piece(item), item, target)
                planner.commit_tensor(item, target)
        finally:
            for fd in fds.values():
                os.close(fd)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _piece(self, item: ReadItem) -> Piece:
        return self._pieces[item.storage_index.fqn, tuple(item.storage_index.offset or ())]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """DCP's automatic choice of a storage does not choose this one."""
        return False


def verify_file(directory: Path, file: File) -> None:
    """Raise CheckpointError unless the file's content has the hash that the manifest says."""
    if hash_file(directory / file.path) != file.blake3:
        raise CheckpointError(
            f"{directory / file.path} is damaged: its content does not have the hash that the manifest says; use another checkpoint"
        )


@contextmanager
def phases(doing: str) -> Iterator[None]:
    """Run a DCP call: no warning about a missing process group, and failures of its phases as the errors that they are.

    Raises CheckpointError for a refusing file system, and otherwise the first rank's own exception.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items(), key=lambda failure: failure[0])
        on_rank = f" on rank {rank}" if torch.distributed.is_initialized() else ""
        raise failure(error, doing=doing + on_rank) if isinstance(error, OSError) else error from None


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor row by row, as bytes: its own memory where that is contiguous on the host, else a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _write_piece(writer: FileWriter, item: WriteItem, tensor: torch.Tensor) -> Piece:
    writer.pad(_ALIGNMENT)
    begin = writer.size
    writer.write(bytes_of(tensor))
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return Piece(offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes), file=writer.path.name, offset=begin, length=writer.size - begin)


def _read_box(fd: int, piece: Piece, item: ReadItem, target: torch.Tensor) -> None:
    """Fill `target` with the box of a piece that `item` asks for: its rows along the first dim are read, other dims cut in memory."""
    sizes, first = list(piece.sizes), 0
    row = piece.length
    if sizes:
        row //= sizes[0]
        first, sizes[0] = item.storage_offsets[0], item.lengths[0]
    offset = piece.offset + first * row
    if target.is_cpu and target.is_contiguous() and not target.is_conj() and not target.is_neg() and list(item.lengths) == sizes:
        _read_exactly(fd, bytes_of(target), offset)
        return
    rows = torch.empty(sizes, dtype=target.dtype)
    _read_exactly(fd, bytes_of(rows), offset)
    for dim in range(1, len(sizes)):
        rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
    target.copy_(rows)


def _read_exactly(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise CheckpointError("a checkpoint's file became shorter while it was read; use another checkpoint")
        view, offset = view[count:], offset + count


def _metadata(tensor: Tensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_dtype(tensor.dtype)),
        size=torch.Size(tensor.shape),
        chunks=[ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=torch.Size(piece.sizes)) for piece in tensor.pieces],
    )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
