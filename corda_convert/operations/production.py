"""From a command's plan to a sealed output folder, the same way for every command."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert import engine, hub, hub_reading
from corda_convert.checkpoint.dequantized import DequantizedFile, stored_as, written_dtype
from corda_convert.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.remote_file import file_bytes
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorFile
from corda_convert.distributed import Place, threads_of_this_process
from corda_convert.hub_streaming import room_needed
from corda_convert.operations import process_memory
from corda_convert.operations.certificates import certificate_warnings
from corda_convert.operations.covariance_warnings import covariance_warnings
from corda_convert.operations.dequantize import DequantizeTransform
from corda_convert.operations.input_digests import hashed_beside, hashing_bytes, is_always_hashed
from corda_convert.operations.options import Outcome, RunOptions
from corda_convert.operations.push import destination_of, publish
from corda_convert.operations.remote_inputs import check_stated, described, stated_sha256
from corda_convert.operations.resuming import check_unchanged, identify, plan_digest, take_over
from corda_convert.operations.rounding import rounding_warnings
from corda_convert.operations.sharing import check_agreement, run_shared
from corda_convert.operations.streaming import check_streaming, idle_stream, streamed, streamed_paths
from corda_convert.operations.transforms import CastTransform
from corda_convert.operations.uploading import Uploading, begin_upload, going_on_later, room_for_output
from corda_convert.operations.verbatim import VerbatimTransform
from corda_convert.output import staging
from corda_convert.output.digests import SequentialDigest, file_sha256
from corda_convert.output.model_card import Card, render_card
from corda_convert.output.read_ahead import ReadAhead
from corda_convert.output.receipt import RECEIPT_FORMAT, RECEIPT_FORMAT_VERSION, tool, write_receipt
from corda_convert.output.side_files import SideFile, json_file
from corda_convert.plan.model import ComputeJob, Copied, Facts, InSteps, OutputFileSpec, Plan, Produced
from corda_convert.plan.packing import pack

if TYPE_CHECKING:
    import torch


MAX_WORKERS = 16
"""More cores than this do not help: reading, hashing and writing are the bound by then."""


@dataclass(frozen=True, slots=True)
class Input:
    """A folder or file that a command reads, and its part in it. `digest_always` for small ones, read out of order."""

    role: str
    path: Path
    files: tuple[TensorFile, ...]
    digest_always: bool = False


@dataclass(frozen=True, slots=True)
class Production:
    """Everything that is known of an output before any weight is read.

    Attributes:
        command: the command's name.
        options: what the user chose, for the receipt; no absolute paths, no secrets.
        output: the output folder.
        inputs: what is read.
        files: the safetensors files to write.
        side_files: everything else but index, card and receipt.
        index_metadata: the index's metadata, where the output has an index.
        card: for the model card.
        left_behind: files of the source that are not carried over.
        facts: further facts for the receipt, known beforehand.
        warnings: for the user.
    """

    command: str
    options: Mapping[str, Any]
    output: Path
    inputs: tuple[Input, ...]
    files: tuple[OutputFileSpec, ...]
    side_files: tuple[SideFile, ...]
    card: Card
    index_metadata: Mapping[str, Any] | None = None
    left_behind: tuple[str, ...] = ()
    facts: Facts = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def checkpoint_files(
    checkpoint: Checkpoint, touched: Mapping[str, Sequence[Produced]], dtype: str | None
) -> tuple[OutputFileSpec, ...]:
    """The checkpoint's own shards again: for a touched tensor what takes its place, the others copied or cast."""
    files = []
    for shard, file_name in zip(checkpoint.shards, _shard_names(checkpoint), strict=True):
        tensors: list[Produced | Copied] = []
        for name, spec in shard.specs.items():
            if name in checkpoint.aliases:
                continue
            ref = checkpoint.tensors[name]
            target = output_dtype(written_dtype(ref), dtype)
            if name in touched:
                tensors += touched[name]
            elif stored_as(ref) is not None:
                tensors.append(Produced(spec.with_dtype(target), DequantizeTransform(ref, target)))
            elif target != spec.dtype:
                tensors.append(Produced(spec.with_dtype(target), CastTransform(checkpoint.tensors[name], target)))
            elif shard.extent(name) is None:
                tensors.append(Produced(spec, VerbatimTransform(checkpoint.tensors[name])))
            else:
                tensors.append(Copied(spec, shard, name))
        if not tensors and isinstance(shard, DequantizedFile):
            continue  # it held scales only
        metadata = {"format": "pt"} if isinstance(shard, PickleFile) else shard.metadata
        files.append(OutputFileSpec(file_name, tuple(tensors), metadata))
    return tuple(files)


def as_one_archive(files: Iterable[OutputFileSpec], name: str) -> tuple[OutputFileSpec, ...]:
    """The tensors of all files in one of torch's own format, `name` ending in `.pth`: what RWKV's tools load."""
    return (OutputFileSpec(name, tuple(tensor for file in files for tensor in file.tensors), {}),)


def _shard_names(checkpoint: Checkpoint) -> list[str]:
    """The output's file names: the shards' own, and for pickled ones those that `save_pretrained` would give."""
    if not checkpoint.is_folder:
        return [SINGLE_FILE]
    if not checkpoint.is_pickled:
        return [shard.path.name for shard in checkpoint.shards]
    stems = [shard.path.stem for shard in checkpoint.shards]
    renamed = [
        f"model{stem.removeprefix('pytorch_model')}" if stem.startswith("pytorch_model") else stem for stem in stems
    ]
    return [f"{stem}.safetensors" for stem in (renamed if len(set(renamed)) == len(stems) else stems)]


def output_dtype(stored: str, wanted: str | None) -> str:
    """A tensor's dtype in the output: its own, or the wanted one for plain floating-point numbers."""
    return wanted if wanted is not None and stored in COMPUTABLE_DTYPES else stored


@contextlib.contextmanager
def read_ahead(files: Iterable[TensorFile], run: RunOptions) -> Iterator[ReadAhead | None]:
    """Hashes the files, small ones first by their order here, until the engine starts or the command is refused.

    Not where several processes share the work: each would read them all.
    """
    if run.dry_run or run.ranks.place.size > 1:
        yield None
        return
    with ReadAhead([file.path for file in files]) as ahead:
        yield ahead


def produce(production: Production, run: RunOptions, ahead: ReadAhead | None = None) -> Outcome:
    """Plans, checks, and unless it is a dry run: writes, seals and publishes.

    `ahead` is stopped before the plan is made, so that its memory is free; the engine goes on with its digests. What an
    interrupted run of the same command has finished is taken over. Raises one of our errors; then the output is as it was
    before.
    """
    ranks = run.ranks
    check_streaming(run)
    notes = idle_stream(run, production.inputs)
    is_first = ranks.place.rank == 0
    if is_first:
        staging.check_output(production.output, [source.path for source in production.inputs], overwrite=run.overwrite)
        if (destination := destination_of(run)) is not None:
            hub.check_access(destination)
    device = run.torch_device()
    _limit_threads(ranks.place)
    digests = {} if ahead is None else ahead.stop()
    baseline = process_memory.resident_bytes() + _reading_bytes(production) + hashing_bytes(production.inputs)
    plan = pack(
        production.files, workers=worker_count(device), max_memory_bytes=run.max_memory_bytes, held_bytes=baseline
    )
    engine.allow_open_files(plan)
    if is_first:
        side_bytes = sum(file.nbytes for file in production.side_files)
        streamed_bytes = room_needed(streamed_paths(production.inputs)) if run.stream else 0
        written_bytes = room_for_output(plan) if run.stream and destination is not None else plan.write_bytes
        needed = written_bytes + side_bytes + streamed_bytes
        staging.check_space(production.output, needed - staging.held_bytes(production.output))
    receipt = _planned_receipt(production, plan, baseline)
    check_agreement(ranks, plan_digest(production, plan), device)
    if run.dry_run:
        return Outcome(production.output, plan, {**receipt, "dry_run": True}, warnings=(*production.warnings, *notes))
    later = streamed_paths(production.inputs) if run.stream else []
    hub_reading.fetch([path for path in input_paths(production) if path not in later], progress=run.progress)
    if not is_first:
        with ranks.leaving():
            run_shared(plan, ranks, device, show_progress=False, digests=digests)
        ranks.exchange(None)
        return Outcome(production.output, plan, receipt, warnings=production.warnings)
    identity = identify(production, plan, device)
    publication = None
    with (
        staging.staging_folder(production.output, identity, overwrite=run.overwrite) as folder,
        ranks.leaving(),
        going_on_later() if run.stream else contextlib.nullcontext(),
    ):
        side_files = [file.name for file in _side_files(production, plan)]
        upload = begin_upload(destination if run.stream else None, production.command, plan, folder, side_files)
        receipt = _fill(production, plan, folder, device, run, receipt, digests, upload)
        check_unchanged(production, identity["side files"])
        if upload is not None:
            publication = upload.commit(receipt)
    ranks.exchange(None)
    if destination is not None and publication is None:
        publication = publish(production.output, receipt, destination)
    return Outcome(production.output, plan, receipt, publication, (*receipt["warnings"], *notes))


def input_paths(production: Production) -> list[Path]:
    """The files of tensors that are read."""
    return list(dict.fromkeys(file.path for source in production.inputs for file in source.files))


def _limit_threads(place: Place) -> None:
    """Gives each of several processes on a machine its part of the threads."""
    import torch

    if place.local_size > 1:
        torch.set_num_threads(threads_of_this_process(place, torch.get_num_threads()))


def _reading_bytes(production: Production) -> int:
    """What files that decode what they hold need beside the engine's buffers."""
    files = [file for source in production.inputs for file in source.files]
    return max((file.reading_bytes for file in files if isinstance(file, DequantizedFile)), default=0)


def _fill(
    production: Production,
    plan: Plan,
    folder: Path,
    device: torch.device,
    run: RunOptions,
    receipt: dict[str, Any],
    digests: Mapping[Path, SequentialDigest],
    upload: Uploading | None,
) -> dict[str, Any]:
    begun = time.perf_counter()
    before = take_over(plan, folder, None if upload is None else upload.before)
    with (
        streamed(production.inputs if run.stream else (), plan, before.rest(), folder.parent) as downloads,
        contextlib.nullcontext(downloads) if upload is None else upload.running(before, downloads) as watch,
        hashed_beside(production.inputs, plan, digests, before.inputs) as (beside, left),
    ):
        done = run_shared(
            plan, run.ranks, device, show_progress=run.progress, digests=left, folder=folder, before=before, watch=watch
        )
        input_digests = {**beside.finish(), **done.inputs}
    for side_file in _side_files(production, plan):
        side_file.write(folder)
    tensors = _tensor_facts(plan, {**before.facts, **done.facts})
    summary = summarize(tensors)
    found = (
        *rounding_warnings(tensors),
        *covariance_warnings(tensors, receipt.get("covariances")),
        *certificate_warnings(tensors),
    )
    receipt = {**receipt, "warnings": [*receipt["warnings"], *found]}
    inputs = _inputs(production, input_digests)
    facts = {**receipt, "inputs": inputs, "tensors": tensors, "summary": summary}
    card = render_card(production.card, facts, repo_id=run.push_to, folder_name=production.output.name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    facts["files"] = [_file_entry(folder, path, done.files) for path in sorted(_all_files(folder))]
    if upload is not None:
        facts |= upload.facts()
        gone = [{"name": name, "bytes": size, "sha256": done.files[name]} for name, size in upload.sizes().items()]
        facts["files"] = sorted([*facts["files"], *gone], key=lambda entry: str(entry["name"]))
    facts["run"] = {
        "device": str(device),
        "seconds": round(time.perf_counter() - begun, 3),
        "busy_seconds": {stage: round(done.busy_seconds(stage), 3) for stage in ("read", "compute", "write", "hash")},
        "peak_memory_bytes": done.peak_bytes,
        "peak_device_memory_bytes": done.peak_device_bytes,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({"ranks": run.ranks.place.size} if run.ranks.place.size > 1 else {}),
    } | before.receipt()
    write_receipt(folder, facts)
    return facts


def _planned_receipt(production: Production, plan: Plan, baseline: int) -> dict[str, Any]:
    return {
        "format": RECEIPT_FORMAT,
        "format_version": RECEIPT_FORMAT_VERSION,
        "tool": tool(),
        "command": production.command,
        "options": dict(production.options),
        **production.facts,
        "warnings": list(production.warnings),
        "not_carried_over": list(production.left_behind),
        "plan": {
            "read_bytes": plan.read_bytes,
            "write_bytes": plan.write_bytes,
            "memory_bytes": baseline + plan.memory_bytes,
            "buffer_bytes": plan.memory_bytes,
            "slots": plan.slots,
            "workers": plan.workers,
            "worst_step": plan.worst_job,
            "tensors": _actions(plan),
        },
    }


def _actions(plan: Plan) -> dict[str, int]:
    actions: dict[str, int] = {}
    for job in plan.jobs:
        if isinstance(job, ComputeJob):
            count = job.transform.described if isinstance(job.transform, InSteps) else 1
            actions[job.transform.action] = actions.get(job.transform.action, 0) + count
        else:
            actions["copied"] = actions.get("copied", 0) + len(job.names)
    return actions


def _tensor_facts(plan: Plan, facts: Mapping[str, Facts]) -> list[dict[str, Any]]:
    """One entry for each output tensor. A job's facts stand at its first output; its others refer to that one.

    A job in steps has facts by output.
    """
    owners = {
        write.tensor: job.name
        for job in plan.jobs
        if isinstance(job, ComputeJob)
        for chunk in job.chunks
        for write in chunk.writes
    }
    entries = []
    for file in plan.files:
        for spec in file.specs:
            entry: dict[str, Any] = {
                "name": spec.name,
                "file": file.name,
                "dtype": spec.dtype,
                "shape": list(spec.shape),
            }
            owner = owners.get(spec.name)
            if owner is None:
                entry["action"] = "copied"
            elif "outputs" in facts.get(owner, {}):
                entry |= {"action": facts[owner]["action"], **facts[owner]["outputs"][spec.name]}
            elif owner == spec.name:
                entry |= facts.get(owner, {})
            else:
                entry |= {"action": facts.get(owner, {}).get("action"), "with": owner}
            entries.append(entry)
    return entries


def summarize(tensors: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts by action, and the totals of the norms that the tensors' facts give."""
    listed = list(tensors)
    actions: dict[str, int] = {}
    for entry in listed:
        if "with" not in entry:
            actions[str(entry["action"])] = actions.get(str(entry["action"]), 0) + 1
    totals = {
        name: sum(float(entry[name]) ** 2 for entry in listed if name in entry) ** 0.5
        for name in ("weight_norm", "delta_norm", "rounding_norm")
        if any(name in entry for entry in listed)
    }
    return {"tensors": actions, **totals}


def _inputs(production: Production, digests: Mapping[Path, str]) -> list[dict[str, Any]]:
    """Names, sizes and digests. A large file that was not read front to back has its header's digest, or is read again."""
    entries = []
    for source in production.inputs:
        files = []
        for file in source.files:
            digest = digests.get(file.path)
            if digest is None and is_always_hashed(source, file):
                digest = file_sha256(file.path)
            check_stated(file.path, digest)
            digest = digest or stated_sha256(file.path)
            entry: dict[str, Any] = {"name": file.path.name, "bytes": file_bytes(file.path), "sha256": digest}
            if isinstance(file, SafetensorsFile):
                entry["header_sha256"] = file.header_sha256()
            if isinstance(file, PickleFile) and file.aliases:
                entry["shared"] = file.aliases
            files.append(entry)
            file.close()
        entries.append({"role": source.role, **described(source.path), "files": files})
    return entries


def _side_files(production: Production, plan: Plan) -> tuple[SideFile, ...]:
    if production.index_metadata is None:
        return production.side_files
    weights = [file for file in plan.files if "/" not in file.name]
    index = {
        "metadata": {
            **production.index_metadata,
            "total_size": sum(spec.nbytes for file in weights for spec in file.specs),
        },
        "weight_map": dict(sorted((spec.name, file.name) for file in weights for spec in file.specs)),
    }
    return (*production.side_files, json_file(INDEX_FILE, index))


def _file_entry(folder: Path, path: Path, digests: Mapping[str, str]) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    return {"name": name, "bytes": path.stat().st_size, "sha256": digests.get(name) or file_sha256(path)}


def _all_files(folder: Path) -> Iterable[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def worker_count(device: torch.device) -> int:
    """Threads that compute: one for each of torch's on a CPU, one for another device, which does its own scheduling."""
    import torch

    return min(torch.get_num_threads(), MAX_WORKERS) if device.type == "cpu" else 1
