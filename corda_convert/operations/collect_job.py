"""A planned run of `collect`: what it is made of, and what of it is known before it runs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.byte_file import PAGE_BYTES
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.corpus import Corpus
from corda_convert.errors import some
from corda_convert.operations.collect_options import CollectOptions
from corda_convert.operations.collect_receipt import receipt_head
from corda_convert.operations.collect_targets import Wanted
from corda_convert.operations.collect_work import Room
from corda_convert.operations.collect_writing import is_one_file
from corda_convert.operations.covariance_warnings import TOKENS_PER_INPUT
from corda_convert.operations.options import RunOptions
from corda_convert.operations.remote_inputs import stamp
from corda_convert.output.receipt import tool
from corda_convert.streaming.architecture import Architecture
from corda_convert.streaming.blocks import find_blocks
from corda_convert.streaming.stream import Batch
from corda_convert.streaming.threads import batches_at_once

if TYPE_CHECKING:
    import torch

GROUPS = 8
"""Samples are summed in so many groups at least, if there are so many batches: the sums of a group are float32."""

GROUP_TOKENS = 16_384
"""The most tokens of a group, unless one batch has more."""

BYTES_OF_ENTRIES, BYTES_OF_METADATA = 320, 2048
"""What a header tells of a matrix and of its mean absolute inputs beside their names, and of the file, at most."""

MOST_HEADER = 64 << 20
"""safetensors reads headers of up to 100 MB. A larger one is written with a copy of the tensors."""


@dataclass(frozen=True, slots=True)
class CollectJob:
    """What is to be done, all of it checked."""

    checkpoint: Checkpoint
    architecture: Architecture
    corpus: Corpus
    batches: tuple[Batch, ...]
    wanted: Wanted
    output: Path
    options: CollectOptions
    run: RunOptions
    device: torch.device

    @property
    def samples(self) -> int:
        return len(self.corpus.samples)

    @property
    def at_once(self) -> int:
        """How many batches run at once: torch's threads are divided among them. Experts' products are seen one at a time."""
        return batches_at_once(self.device, 1 if self.wanted.stacks else len(self.batches))

    def groups(self) -> list[list[int]]:
        """Places of batches that are summed together, the same for any number of processes."""
        most = min(GROUP_TOKENS, max(self.corpus.tokens // GROUPS, 1))
        groups: list[list[int]] = []
        tokens = 0
        for place, batch in enumerate(self.batches):
            if not groups or tokens + batch.tokens > most:
                groups.append([])
                tokens = 0
            groups[-1].append(place)
            tokens += batch.tokens
        return groups

    def room(self) -> Room:
        """How the output is laid out before it is known which inputs are the same: with room for as many tensors as can be."""
        names = [*self.wanted.widths]
        for stack, module in self.wanted.stacks.items():
            owner, _, parameter = stack.rpartition(".")
            each = self.options.experts == "each"
            count = module._parameters[parameter].shape[0]
            names += [f"{owner}.{expert}.{parameter}" for expert in range(count)] if each else [stack]
        told = len(json.dumps([self.checkpoint.name, self.corpus.description]))
        needed = 2 * told + sum(5 * len(json.dumps(name)) + BYTES_OF_ENTRIES for name in names)
        header = -(-(BYTES_OF_METADATA + needed) // PAGE_BYTES) * PAGE_BYTES
        return Room(min(header, MOST_HEADER), None if is_one_file(self.output) else self.options.max_shard_bytes)

    def least_bytes(self) -> int:
        """Bytes of the output, if in each block all inputs of a width are the same."""
        if self.options.whole_model or self.wanted.stacks:
            return 0
        blocks = find_blocks(self.architecture.model)
        widths = [set(self.wanted.within(blocks.name(index)).widths.values()) for index in range(len(blocks.modules))]
        return sum(4 * (width + 1) * width for each in widths for width in each)

    def identity(self) -> dict[str, str]:
        """Digests of all that the bytes depend on, by what they are of."""
        files = [(shard.path.name, *stamp(shard.path)) for shard in self.checkpoint.shards]
        parts: dict[str, Any] = {
            "program": {name: value for name, value in tool().items() if name != "threads"},
            "model": [files, self.checkpoint.config, str(self.architecture.dtype)],
            "device": self.device.type,
            "options": self.options.described(),
            "data": self.corpus.samples,
        }
        return {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in parts.items()}

    def receipt(self) -> dict[str, Any]:
        options = {
            "model": self.checkpoint.name,
            **self.options.described(),
            "dtype": str(self.architecture.dtype).removeprefix("torch."),
            "device": self.device.type,
        }
        return {
            **receipt_head(options),
            "data": {
                "description": self.corpus.description,
                "samples": self.samples,
                "tokens": self.corpus.tokens,
            },
        }

    def warnings(self) -> tuple[str, ...]:
        warnings = list(self.corpus.warnings)
        widest = max(self.wanted.widths, key=lambda name: self.wanted.widths[name], default=None)
        if widest is not None and self.corpus.tokens < TOKENS_PER_INPUT * self.wanted.widths[widest]:
            width, tokens = self.wanted.widths[widest], self.corpus.tokens
            consequence = (
                "its covariance is rank-deficient" if tokens < width else "the smallest directions are mostly chance"
            )
            warnings.append(
                f"There are {tokens:,} tokens, {tokens / width:.1f} for each of the {width:,} inputs of {widest}: "
                f"{consequence}. Collect {TOKENS_PER_INPUT * width:,} or more, with --samples or --seq-len."
            )
        if self.wanted.left_out:
            warnings.append(
                f"{len(self.wanted.left_out)} Linear layers cannot be decomposed and were left out: "
                f"{some(self.wanted.left_out)}."
            )
        return tuple(warnings)

    def plan(self) -> dict[str, Any]:
        """Bytes on the device, in host memory and on disk, known from headers: bounds, since shared inputs show later."""
        model, itemsize = self.architecture.model, self.architecture.dtype.itemsize
        hidden = model.config.get_text_config().hidden_size
        tokens = max(batch.tokens for batch in self.batches) * (1 if self.options.whole_model else self.at_once)
        widths = self.wanted.widths
        matrices = sum(4 * (width + 1) * width for width in widths.values())
        if self.options.whole_model:
            parts, weights = [widths], _weight_bytes(model, itemsize)
        else:
            blocks = find_blocks(model)
            names = [blocks.name(index) for index in range(len(blocks.modules))]
            parts = [self.wanted.within(name).widths for name in names]
            embedding = _weight_bytes(model.get_input_embeddings(), itemsize)
            weights = max(embedding, *(_weight_bytes(block, itemsize) for block in blocks.modules))
        sums = sums_at_most([part.values() for part in parts], are_kept=self.device.type == "cpu")
        activations = tokens * (4 * hidden + 3 * max(widths.values(), default=hidden)) * (itemsize + 4)
        states = 0 if self.options.whole_model else self.corpus.tokens * hidden * itemsize
        room = self.room()
        is_offloaded = self.options.offload is not None
        return {
            "modules": len(widths) + len(self.wanted.stacks),
            "device_bytes": {"weights": weights, "sums_at_most": sums, "activations_about": activations},
            "host_bytes": {"hidden_states": 0 if is_offloaded else states, "being_written_at_most": sums // 3},
            "disk_bytes": {
                "output_at_most": matrices + room.header * (1 if room.most is None else 1 + matrices // room.most),
                "offload": states if is_offloaded else 0,
            },
        }


def sums_at_most(parts: Sequence[Iterable[int]], *, are_kept: bool) -> int:
    """Bytes of the sums that are in memory at once, by the widths of each part's inputs: in float64, and of a group in float32.

    `are_kept`: those of one part wait for the next one to use them.
    """
    counted = [Counter(widths) for widths in parts]
    held = [one | other for one, other in pairwise([Counter(), *counted])] if are_kept else counted
    return max(sum(12 * width * width * count for width, count in each.items()) for each in held)


def _weight_bytes(module: Any, itemsize: int) -> int:
    return sum(itemsize * parameter.numel() for parameter in module.parameters())
