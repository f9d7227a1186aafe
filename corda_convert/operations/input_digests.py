"""The SHA-256 of those inputs that the receipt always has, and that the engine does not read front to back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corda_convert import engine
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.output.digests import SequentialDigest
from corda_convert.output.read_ahead import BESIDE_BYTES, ReadAhead

if TYPE_CHECKING:
    from corda_convert.checkpoint.tensors import TensorFile
    from corda_convert.operations.production import Input
    from corda_convert.plan.model import Plan

Digests = Mapping[Path, SequentialDigest]


def is_always_hashed(source: Input, file: TensorFile) -> bool:
    """Whether the receipt has the file's digest even where that takes a reading of its own."""
    return source.digest_always or isinstance(file, PickleFile)


def hashing_bytes(inputs: Sequence[Input]) -> int:
    """What `hashed_beside` holds in memory."""
    is_any = any(is_always_hashed(source, file) for source in inputs for file in source.files)
    return BESIDE_BYTES if is_any else 0


@contextlib.contextmanager
def hashed_beside(
    inputs: Sequence[Input], plan: Plan, begun: Digests, known: Mapping[str, str]
) -> Iterator[tuple[ReadAhead, Digests]]:
    """Hashes beside the engine what is always hashed and not in the order of the plan's reading.

    Goes on with the `begun` digests; files in `known` have theirs. Yields the thread, and the digests that are left to the
    engine.
    """
    in_order = engine.inputs_read_through(plan)
    paths = [
        file.path
        for source in inputs
        for file in source.files
        if is_always_hashed(source, file) and file.path not in in_order and str(file.path) not in known
    ]
    left = {path: digest for path, digest in begun.items() if path not in paths}
    for path in paths:
        left[path] = SequentialDigest(0)
        left[path].is_broken = True  # so that the engine does not hash it, too
    with ReadAhead(paths, most_bytes=sys.maxsize, begun=begun, piece_bytes=BESIDE_BYTES) as beside:
        yield beside, left
