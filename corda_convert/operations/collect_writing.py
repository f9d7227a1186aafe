"""A covariance file, or a folder of them with an index: from tensors in other files, or from drafts that want a header."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.covariances import FORMAT_NAME, FORMAT_VERSION, read_covariances
from corda_convert.checkpoint.folder import INDEX_FILE
from corda_convert.checkpoint.tensors import TensorRef, TensorSpec
from corda_convert.errors import CordaConvertError, OutputRefused
from corda_convert.operations.collect_card import covariance_card
from corda_convert.operations.collect_receipt import tensor_entries
from corda_convert.output.digests import WrittenDigest, file_sha256
from corda_convert.output.licence import CARD_FILE, Licence
from corda_convert.output.receipt import write_receipt
from corda_convert.output.shard_writer import ShardWriter
from corda_convert.output.staging import check_space, put_in_place
from corda_convert.plan.packing import encode_header

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: its name, and where its bytes are."""

    name: str
    source: TensorRef

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.source.spec.dtype, self.source.shape)


def metadata_of(aliases: Mapping[str, str], facts: Mapping[str, str | int | None]) -> dict[str, str]:
    """What a covariance file says of itself; facts that are None are not known."""
    known = {key: str(value) for key, value in facts.items() if value is not None}
    own = {"format": FORMAT_NAME, "format_version": str(FORMAT_VERSION)}
    return {**own, "aliases": json.dumps(dict(sorted(aliases.items()))), **known}


def is_one_file(output: Path) -> bool:
    """Whether the output is one file by its name, rather than a folder."""
    return output.suffix == ".safetensors"


def check_covariance_output(output: Path, *, overwrite: bool) -> None:
    """Refuses an output that is there, unless it holds covariances of this format and `overwrite` is on."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise OutputRefused(
            f"The output {output} exists already.", next_step="Choose another -o, or replace it with --overwrite."
        )
    try:
        found = read_covariances(output)
        is_ours = found.metadata.get("format") == FORMAT_NAME
        found.close()
    except CordaConvertError:
        is_ours = False
    if not is_ours or output.is_dir() == is_one_file(output):
        raise OutputRefused(
            f"The output {output} was not made by corda-convert collect; --overwrite leaves it alone.",
            next_step="Remove it yourself, or choose another -o.",
        )


@dataclass(frozen=True, slots=True)
class Sealing:
    """What the receipt of an output is made of, beside its files.

    Attributes:
        facts: the receipt's other keys.
        action: what was done to the tensors.
        tokens: how many went into each matrix, where that is known.
        run: time and memory, asked for when all else is written.
        licence: of the model, for the card.
    """

    facts: Mapping[str, Any]
    action: str
    tokens: Mapping[str, int]
    run: Callable[[], dict[str, Any]]
    licence: Licence = Licence()  # noqa: RUF009 - it has no state


@dataclass(frozen=True, slots=True)
class Draft:
    """A file of the output whose tensors stand one after the other behind `room` bytes for its header.

    Attributes:
        header: what stands there.
        sha256: of the whole file as it is.
    """

    path: Path
    specs: tuple[TensorSpec, ...]
    room: int
    header: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class _Written:
    """A whole safetensors file, whatever it is called."""

    path: Path
    specs: Sequence[TensorSpec]
    nbytes: int
    sha256: str


def write_covariances(
    output: Path,
    tensors: Sequence[OutputTensor],
    metadata: dict[str, str],
    sealing: Sealing,
    *,
    work: Path,
    max_shard_bytes: int,
) -> dict[str, Any]:
    """Writes the output beside its place, in `work`, and moves it there.

    Returns the receipt, which a folder holds, with a card.
    """
    check_space(output, sum(tensor.spec.nbytes for tensor in tensors))
    cut = [list(tensors)] if is_one_file(output) else _in_shards(tensors, max_shard_bytes)
    files = [_write_file(work / f"file-{number:05}", shard, metadata) for number, shard in enumerate(cut, 1)]
    return _put_in_place(output, files, metadata, sealing, work)


def seal_drafts(
    output: Path, drafts: Sequence[Draft], metadata: dict[str, str], sealing: Sealing, *, work: Path
) -> dict[str, Any]:
    """Gives each of the drafts, which lie in `work`, its header, and moves the output to its place.

    Returns the receipt, which a folder holds, with a card.
    """
    for draft in drafts:  # a run with other shards may have left more
        os.truncate(draft.path, draft.room + sum(spec.nbytes for spec in draft.specs))
    headers = [encode_header(draft.specs, metadata, least=draft.room) for draft in drafts]
    hashed = [
        _hashed(draft, header) for draft, header in zip(drafts, headers, strict=True)
    ]  # all before any is changed
    files = [_sealed(*each) for each in zip(drafts, headers, hashed, strict=True)]
    return _put_in_place(output, files, metadata, sealing, work)


def _put_in_place(
    output: Path, files: Sequence[_Written], metadata: dict[str, str], sealing: Sealing, work: Path
) -> dict[str, Any]:
    if is_one_file(output):
        (file,) = files
        receipt = _receipt(sealing, {output.name: file})
        file.path.replace(output)
        return receipt
    folder = work / "output"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shards = {f"model-{number:05}-of-{len(files):05}.safetensors": file for number, file in enumerate(files, 1)}
    weight_map = {spec.name: name for name, file in shards.items() for spec in file.specs}
    total = sum(spec.nbytes for file in files for spec in file.specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    receipt = _receipt(sealing, shards)
    texts = {
        INDEX_FILE: json.dumps(index, indent=1) + "\n",
        CARD_FILE: covariance_card(receipt, metadata, sealing.licence, folder_name=output.name),
    }
    for name, text in texts.items():
        path = folder / name
        path.write_text(text, "utf-8")
        receipt["files"].append({"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
    write_receipt(folder, receipt)
    for name, file in shards.items():
        file.path.replace(folder / name)
    put_in_place(folder, output)
    return receipt


def _receipt(sealing: Sealing, shards: Mapping[str, _Written]) -> dict[str, Any]:
    entries = tensor_entries({name: file.specs for name, file in shards.items()}, sealing.action, sealing.tokens)
    summary = {"tensors": {sealing.action: sum("with" not in entry for entry in entries)}}
    files = [{"name": name, "bytes": file.nbytes, "sha256": file.sha256} for name, file in shards.items()]
    return {**sealing.facts, "tensors": entries, "summary": summary, "files": files, "run": sealing.run()}


def _in_shards(tensors: Sequence[OutputTensor], most: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    nbytes = 0
    for tensor in tensors:
        if shards[-1] and nbytes + tensor.spec.nbytes > most:
            shards.append([])
            nbytes = 0
        shards[-1].append(tensor)
        nbytes += tensor.spec.nbytes
    return shards


def _write_file(path: Path, tensors: Sequence[OutputTensor], metadata: dict[str, str]) -> _Written:
    specs = [tensor.spec for tensor in tensors]
    header = encode_header(specs, metadata)
    with ShardWriter(path, header, len(header) + sum(spec.nbytes for spec in specs)) as writer:
        place = len(header)
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        for tensor in tensors:
            done = 0
            while done < tensor.spec.nbytes:
                piece = buffer[: tensor.spec.nbytes - done]
                tensor.source.file.read_into(tensor.source.name, tensor.source.begin + done, piece)
                writer.write(place + done, piece)
                writer.digest(place + done, piece)
                done += len(piece)
            place += done
        return _Written(path, specs, *writer.finish())


def _hashed(draft: Draft, header: bytes) -> str | None:
    """The SHA-256 of the draft with this header; None where that has no room."""
    if header == draft.header:
        return draft.sha256
    return file_sha256(draft.path, head=header) if len(header) == draft.room else None


def _sealed(draft: Draft, header: bytes, sha256: str | None) -> _Written:
    """Writes the header into its room, unless it stands there; where that is too small, to a new file, before a copy."""
    total = sum(spec.nbytes for spec in draft.specs)
    if sha256 is not None:
        if header != draft.header:
            with ShardWriter(draft.path, b"", draft.room + total, begun=WrittenDigest(0)) as writer:
                writer.write(0, memoryview(header))
        return _Written(draft.path, draft.specs, draft.room + total, sha256)
    path = draft.path.with_suffix(".whole")
    with (
        draft.path.open("rb") as source,
        ShardWriter(path, header, len(header) + total) as writer,
    ):
        for done in range(0, total, _CHUNK_BYTES):
            nbytes = min(_CHUNK_BYTES, total - done)
            writer.copy(len(header) + done, source.fileno(), draft.room + done, nbytes)
            writer.digest_copied(len(header) + done, nbytes)
        written = _Written(path, draft.specs, *writer.finish())
    draft.path.unlink()
    return written
