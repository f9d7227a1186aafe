"""What `collect` ends with: headers that tell what was found, and the receipt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from corda_convert.checkpoint.tensors import TensorSpec
from corda_convert.errors import some
from corda_convert.operations.collect_job import CollectJob
from corda_convert.operations.collect_receipt import model_input, text_inputs, usage
from corda_convert.operations.collect_work import Finished, Placed, Work
from corda_convert.operations.collect_writing import Draft, Sealing, metadata_of, seal_drafts
from corda_convert.operations.experts_targets import OUTWARD
from corda_convert.output.licence import licence_of
from corda_convert.output.receipt import tool
from corda_convert.plan.packing import encode_header
from corda_convert.streaming.blocks import find_blocks


def seal(job: CollectJob, work: Work, parts: Sequence[Finished], begun: float) -> dict[str, Any]:
    """Makes the drafts the output. Returns the receipt. `begun` is of `time.perf_counter`."""
    work.wait()
    drafts = []
    for file, specs in _files(parts).items():
        header, sha256 = work.hashed(file)
        drafts.append(Draft(work.draft(file), tuple(specs), len(header), header, sha256))
    aliases, tokens = _aliases(parts), _tokens(parts)
    starved = [name for name, count in tokens.items() if count == 0]
    warnings = [f"No token reached {some(starved)}."] if starved else []
    facts = {
        **job.receipt(),
        "warnings": [*job.warnings(), *warnings, *_unreached_experts(job, tokens)],
        "inputs": [model_input(job.checkpoint), *text_inputs(job.options.corpus)],
        "aliases": aliases,
    }
    licence = licence_of(job.checkpoint.root)
    sealing = Sealing(facts, "collected", tokens, lambda: usage(begun, job.device, job.run.ranks.place.size), licence)
    return seal_drafts(job.output, drafts, _metadata(job, parts), sealing, work=work.folder)


def expected_headers(job: CollectJob, number: int, first: Finished) -> dict[int, bytes]:
    """The headers of the output's files, if all other blocks are like the one whose part this is; else nothing.

    So a file can be hashed from its beginning on while it is written. `number` is that of the part.
    """
    if job.options.whole_model:
        return {}
    blocks = find_blocks(job.architecture.model)
    names = [blocks.name(index) for index in range(len(blocks.modules))]
    if not 0 < number <= len(names):  # what stands before the blocks, or after them
        return {}
    mine, earlier = names[number - 1], names[: number - 1]
    if job.wanted.stacks or job.wanted.outside(blocks) or any(job.wanted.within(name) for name in earlier):
        return {}
    room = job.room()
    parts, last = [first], first.tensors[-1]
    for name in names[number:]:
        like = _of_block(first, mine, name)
        wanted = job.wanted.within(name).widths
        if not wanted:
            continue
        if wanted.keys() != like.tokens.keys() | like.aliases.keys():
            return {}
        tensors = room.placed([tensor.spec for tensor in like.tensors], last)
        parts.append(replace(like, tensors=tensors))
        last = tensors[-1]
    metadata = _metadata(job, parts)
    return {file: encode_header(specs, metadata, least=room.header) for file, specs in _files(parts).items()}


def _of_block(part: Finished, block: str, other: str) -> Finished:
    """What it would be of another block."""

    def renamed(name: str) -> str:
        return f"{other}{name.removeprefix(block)}"

    return Finished(
        tuple(Placed(replace(one.spec, name=renamed(one.spec.name)), one.file, one.begin) for one in part.tensors),
        {renamed(name): renamed(target) for name, target in part.aliases.items()},
        {renamed(name): count for name, count in part.tokens.items()},
    )


def _files(parts: Sequence[Finished]) -> dict[int, list[TensorSpec]]:
    """The tensors of each file."""
    files: dict[int, list[TensorSpec]] = {}
    for part in parts:
        for tensor in part.tensors:
            files.setdefault(tensor.file, []).append(tensor.spec)
    return files


def _aliases(parts: Sequence[Finished]) -> dict[str, str]:
    return {name: target for part in parts for name, target in part.aliases.items()}


def _tokens(parts: Sequence[Finished]) -> dict[str, int]:
    return {name: count for part in parts for name, count in part.tokens.items()}


def _metadata(job: CollectJob, parts: Sequence[Finished]) -> dict[str, str]:
    partial = {name: count for name, count in _tokens(parts).items() if count != job.corpus.tokens}
    return metadata_of(
        _aliases(parts),
        {
            "samples": job.samples,
            "tokens": job.corpus.tokens,
            "normalization": job.options.normalization,
            "model": job.checkpoint.name,
            "data": job.corpus.description,
            "tool": f"corda-convert {tool()['version']}",
            "dtype": str(job.architecture.dtype).removeprefix("torch."),
            "module_tokens": json.dumps(partial) if partial else None,
        },
    )


def _unreached_experts(job: CollectJob, tokens: Mapping[str, int]) -> list[str]:
    """What to tell of experts that no token reached, where each has a covariance of its own."""
    if job.options.experts != "each":
        return []
    lacking: dict[str, set[int]] = {}
    for stack, module in job.wanted.stacks.items():
        owner, _, parameter = stack.rpartition(".")
        end = f".{parameter}" if parameter in OUTWARD else ""
        for expert in range(module._parameters[parameter].shape[0]):
            if not tokens.get(f"{owner}.{expert}{end}"):
                lacking.setdefault(owner, set()).add(expert)
    if not lacking:
        return []
    named = "; ".join(f"{owner} ({', '.join(map(str, sorted(each)))})" for owner, each in lacking.items())
    return [f"No token reached {sum(map(len, lacking.values()))} experts: {named}. They have no covariance."]
