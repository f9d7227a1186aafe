"""Tensors that are computed when they are read: a checkpoint as a command would leave it, without writing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from corda_convert.checkpoint.byte_file import Extent, ExtentFile
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.tensors import TensorRef, torch_dtype
from corda_convert.plan.model import ComputeJob, OutputFileSpec, Produced, Read
from corda_convert.plan.packing import pack

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor


class ComputedFile:
    """A shard of which some tensors are what transforms make of them. Implements `ExtentFile`.

    A tensor is computed when it is first read, and held until another one is, or its last byte has been read.
    """

    def __init__(self, stored: ExtentFile, produced: Mapping[str, Produced], device: torch.device) -> None:
        """`produced` are the tensors of this shard that are computed, by name."""
        self._stored = stored
        self._produced = produced
        self._device = device
        self._held: tuple[str, Tensor] | None = None
        self.specs = {name: produced[name].spec if name in produced else spec for name, spec in stored.specs.items()}

    @property
    def path(self) -> Path:
        return self._stored.path

    @property
    def metadata(self) -> dict[str, str]:
        return self._stored.metadata

    @property
    def descriptor(self) -> int:
        return self._stored.descriptor

    def extent(self, name: str) -> Extent | None:
        return None if name in self._produced else self._stored.extent(name)

    def read_bytes_into(self, offset: int, view: memoryview) -> None:
        self._stored.read_bytes_into(offset, view)

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        """As `TensorFile` says."""
        if name not in self._produced:
            self._stored.read_into(name, begin, view)
            return
        if self._held is None or self._held[0] != name:
            self._held = None
            self._held = (name, compute(self._produced[name], self._device))
        content = self._held[1]
        view[:] = content[begin : begin + len(view)].numpy().data.cast("B")
        if begin + len(view) == len(content):
            self._held = None

    def close(self) -> None:
        self._stored.close()


def with_computed(checkpoint: Checkpoint, produced: Mapping[str, Produced], device: torch.device) -> Checkpoint:
    """The same checkpoint with these tensors computed on reading, by name."""
    shards = tuple(
        ComputedFile(shard, {name: produced[name] for name in shard.specs if name in produced}, device)
        for shard in checkpoint.shards
    )
    tensors = {
        spec.name: TensorRef(shard, spec)
        for shard in shards
        for spec in shard.specs.values()
        if spec.name in checkpoint.tensors
    }
    return replace(checkpoint, shards=shards, tensors=tensors)


def compute(produced: Produced, device: torch.device) -> Tensor:
    """The bytes of a tensor that a transform yields, (nbytes,) uint8, by the same steps as the engine's."""
    import torch

    plan = pack([OutputFileSpec(produced.spec.name, (produced,), {})])
    (file,) = plan.files
    content = torch.empty(file.nbytes, dtype=torch.uint8)
    for job in plan.jobs:
        assert isinstance(job, ComputeJob)  # noqa: S101 - there is no copy in the plan
        first = job.chunks[0]
        session = job.transform.begin(device)
        session.prepare({read.operand: _operand(read) for read in first.whole})
        for chunk in job.chunks:
            outputs = {
                write.tensor: content[write.offset : write.offset + write.nbytes]
                .view(torch_dtype(write.dtype))
                .view(write.shape)
                for write in chunk.writes
            }
            session.step(chunk.first_row, {read.operand: _operand(read) for read in chunk.reads}, outputs)
    return content[file.nbytes - produced.spec.nbytes :]


def _operand(read: Read) -> Tensor:
    import torch

    content = bytearray(read.nbytes)
    read.file.read_into(read.tensor, read.begin, memoryview(content))
    if not content:
        return torch.empty(read.shape, dtype=torch_dtype(read.dtype))
    return torch.frombuffer(content, dtype=torch_dtype(read.dtype)).view(read.shape)
