"""What `inspect` tells of an adapter, and of what it would change in a model. Headers and configs only."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from corda_convert.adapters import read_adapter
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.lora import read_scaling
from corda_convert.adapters.rwkv import RwkvTraining, read_rwkv, read_rwkv_initial
from corda_convert.adapters.tokens import TokenRows
from corda_convert.checkpoint.folder import Checkpoint, model_name
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.remote_file import file_bytes
from corda_convert.checkpoint.tensors import TensorSpec
from corda_convert.errors import CordaConvertError
from corda_convert.operations.adapter_facts import AdapterFacts
from corda_convert.operations.bases import read_base
from corda_convert.operations.belonging import structure_for
from corda_convert.operations.edits import Applied, collect_edits, fit_changes
from corda_convert.operations.evidence import initial_adapter_of
from corda_convert.operations.initial_config import plain
from corda_convert.operations.options import RunOptions
from corda_convert.operations.server_rules import Server
from corda_convert.operations.servers import base_in_commands, check, flags
from corda_convert.output.module_groups import group_modules

_NAMES = {"lora": "LoRA", "miss": "MiSS", "bone": "Bone", "disha": "DiSHA", "trained_tokens": "trained tokens"}


def read_any_adapter(path: Path, *, is_initial: bool = False) -> Adapter:
    """An adapter folder of PEFT, or a file of RWKV-PEFT, whose scaling is then not known. Raises one of our errors."""
    if path.is_dir():
        return read_adapter(path)
    return read_rwkv_initial(path) if is_initial else read_rwkv(path, RwkvTraining(alpha=1.0))


def describe_adapter(adapter: Adapter, facts: AdapterFacts, path: Path) -> dict[str, Any]:
    """What an adapter is, for the JSON object."""
    config, source = adapter.source.config, adapter.source
    corda = config.get("corda_config")
    is_file = source.is_file
    scaling = None if is_file or adapter.kind != "lora" else read_scaling(config)
    trained = {change.module_name: change for change in adapter.modules}
    return {
        "kind": "adapter",
        "what": _what(facts, is_initial=is_initial(path)),
        "type": adapter.kind,
        "mode": facts.mode or None,
        "is_initial": is_initial(path),
        "trained_beside_residual": facts.residual or None,
        "init": None if is_file else facts.init,
        "corda_method": corda.get("corda_method") if isinstance(corda, dict) else None,
        "rank": facts.rank or max(facts.ranks.values(), default=None),
        "alpha": None if is_file or facts.alpha is None else plain(facts.alpha),
        "use_rslora": facts.use_rslora,
        "use_dora": bool(facts.dora),
        "ranks": _counted(facts.ranks),
        "scalings": {} if is_file else _counted(facts.scalings),
        "rank_pattern": {} if scaling is None else dict(scaling.rank_pattern),
        "alpha_pattern": {} if scaling is None else dict(scaling.alpha_pattern),
        "modules": len(trained),
        "targets": [group.facts() for group in group_modules(trained)],
        "experts": len(facts.experts),
        "embeddings": list(facts.embeddings),
        "trained_tokens": {c.module_name: len(c.indices) for c in adapter.modules if isinstance(c, TokenRows)},
        "lora_biases": len(facts.lora_biases),
        "biases": list(facts.biases),
        "saved": list(facts.saved),
        "modules_to_save": config.get("modules_to_save") or [],
        **sizes(source.file.specs, (source.file.path,)),
        "base_model": source.base_name or None,
        "base_is_residual": _is_residual(source.base_name),
        "peft_version": config.get("peft_version"),
        "task_type": config.get("task_type"),
    }


def sizes(specs: Mapping[str, TensorSpec], files: Iterable[Path]) -> dict[str, Any]:
    """Tensors, parameters, dtypes by the parameters that have them, files and bytes."""
    paths = list(files)
    dtypes: Counter[str] = Counter()
    for spec in specs.values():
        dtypes[spec.dtype] += spec.elements
    return {
        "tensors": len(specs),
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes.most_common()),
        "files": len(paths),
        "bytes": sum(map(file_bytes, paths)),
    }


def is_initial(path: Path) -> bool:
    """Whether it is the initial adapter in a residual's folder, as `decompose` and PEFT's examples lay it out."""
    resolved = path.resolve()
    return path.is_dir() and initial_adapter_of(resolved.parent) == resolved


def _is_residual(name: str) -> bool | None:
    """Whether the base is a residual; None where it is no folder here."""
    try:
        return initial_adapter_of(Path(name)) is not None if name and Path(name).is_dir() else None
    except (OSError, ValueError):
        return None


def _what(facts: AdapterFacts, *, is_initial: bool) -> str:
    name = _NAMES.get(facts.kind, facts.kind)
    if facts.kind == "lora":
        name = ("rs" if facts.use_rslora else "") + name if not facts.dora else "DoRA" + " (rs)" * facts.use_rslora
    text = f"{name} adapter" + (f" ({facts.mode})" if facts.mode else "")
    if not facts.is_folder:
        text += " of RWKV-PEFT"
    if is_initial:
        return f"initial {text}: what a training beside the residual begins with"
    return f"{text}, trained beside a residual" if facts.residual else text


def _counted(values: Mapping[str, float]) -> dict[str, int]:
    """How many modules have each value, the commonest first."""
    return {f"{value:g}": count for value, count in Counter(values.values()).most_common()}


def describe_base(adapter: Adapter, facts: AdapterFacts, path: Path) -> dict[str, Any]:
    """What the adapter would change in a model, and what does not fit, as `merge` says it; no weight is judged."""
    name = model_name(path) if path.is_dir() else path.stem
    try:
        base = read_base(path, RunOptions())
        touched, warnings = _touched(adapter, base.readable)
    except CordaConvertError as problem:
        problems = [describe_problem(each) for each in getattr(problem, "problems", (problem,))]
        return {"name": name, "fits": False, "problems": problems, "notes": []}
    notes = [*base.warnings(), *warnings, *_notes(adapter, facts, base.stored)]
    base.stored.close()
    return {"name": name, "fits": True, "problems": [], "notes": notes, **touched}


def _touched(adapter: Adapter, checkpoint: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tensors that change, and warnings of the merge. Raises every problem together."""
    names = NameMap(checkpoint, structure_for(checkpoint, [adapter]))
    edits = collect_edits([Applied(adapter)], [fit_changes(adapter, names)], names)
    changed = list(edits.tensors)
    sources = {edit.source for edit in edits.tensors.values()}
    touched = {
        "tensors": len(changed),
        "of_tensors": len(checkpoint.tensors),
        "bytes": sum(checkpoint.spec(name).nbytes for name in sources),
        "first": changed[:3],
        "replaced": [name for name, edit in edits.tensors.items() if edit.replacement is not None],
        "untied": [list(each.members) for each in edits.untied],
    }
    return touched, edits.warnings


def _notes(adapter: Adapter, facts: AdapterFacts, model: Checkpoint) -> Iterable[str]:
    """What the names and the residual's folder tell of whether the two belong together."""
    is_residual = initial_adapter_of(model.root) is not None
    if is_residual:
        yield f"{model.name} is a residual; merge judges by the numbers whether the adapter was trained beside it."
    elif facts.residual:
        yield f"It was trained beside a residual: merge wants --init to put it into {model.name}."
    named = adapter.source.base_name
    if named and not (is_residual or facts.residual) and model.name not in (named, Path(named).name):
        yield f'It names "{named}" as its base.'


def describe_problem(problem: CordaConvertError) -> dict[str, Any]:
    """An error as JSON."""
    return {"what": str(problem.what), "why": problem.why, "next_step": problem.next_step}


def base_of(adapter: Adapter, facts: AdapterFacts, path: Path, asked: Path | None) -> str:
    """The base model as the commands name it: the one that was asked about, else the adapter's own; else `BASE`."""
    if asked is not None:
        return "BASE" if initial_adapter_of(asked) is not None else str(asked)
    return "BASE" if facts.residual or is_initial(path) else base_in_commands(adapter.source.base_name)


def describe_server(adapter: Adapter, facts: AdapterFacts, server: Server, path: Path, base: str) -> dict[str, Any]:
    """What stands against serving the adapter as it is, what mends it, and how the server then takes it."""
    findings = check(facts, server)
    obstacles = [finding for finding in findings if finding.is_obstacle]
    is_mended = all(finding.fix is not None for finding in obstacles)
    served = shlex.quote(str(path)) if not obstacles else "OUT"
    return {
        "name": server,
        "takes_it": not obstacles,
        "findings": [
            {
                "rule": finding.rule,
                "severity": finding.severity,
                "what": finding.what,
                "why": finding.why,
                "fix": finding.fix,
                "how": finding.how,
            }
            for finding in findings
        ],
        "mending": _mending(adapter, facts, server, path, base, is_mended=is_mended) if obstacles else [],
        "commands": list(flags(facts, server, served, base)) if is_mended else [],
    }


def _mending(
    adapter: Adapter, facts: AdapterFacts, server: Server, path: Path, base: str, *, is_mended: bool
) -> list[str]:
    """The command that makes what the server takes: a LoRA, or else a merged model."""
    offered = adapter_commands(adapter, facts, path, base)
    if not is_mended:
        return [command for command in offered if command.startswith(f"corda-convert merge {shlex.quote(base)} ")][:1]
    conversion = next(command for command in offered if command.startswith("corda-convert to-lora"))
    asked = conversion if facts.mode else conversion.replace(" --rank RANK", "")
    return [asked.replace(" -o OUT", f" --for {server} -o OUT")]


def adapter_commands(adapter: Adapter, facts: AdapterFacts, path: Path, base: str = "BASE") -> list[str]:
    """What can be done next with an adapter."""
    own, model = shlex.quote(str(path)), shlex.quote(base)
    if is_initial(path):
        residual = shlex.quote(str(path.parent))
        return [
            f"corda-convert merge {residual} --adapter TRAINED -o OUT",
            f"corda-convert merge {model} --adapter TRAINED --init {own} -o OUT",
            f"corda-convert to-lora TRAINED --init {own} -o OUT",
            f"corda-convert merge {model} --subtract {own} -o RESIDUAL",
        ]
    if not facts.is_folder:
        alpha = " --alpha ALPHA" if facts.kind == "lora" else ""
        file = "BASE.pth" if base == "BASE" else model
        return [f"corda-convert merge {file} --adapter {own}{alpha} -o OUT"]
    if facts.residual:
        named = adapter.source.base_name
        found = initial_adapter_of(Path(named)) if _is_residual(named) else None
        residual, init = ("RESIDUAL", "INIT") if found is None else (shlex.quote(named), shlex.quote(str(found)))
        return [
            f"corda-convert merge {residual} --adapter {own} -o OUT",
            f"corda-convert merge {model} --adapter {own} --init {init} -o OUT",
            f"corda-convert to-lora {own} --init {init} -o OUT",
        ]
    merging = f"corda-convert merge {model} --adapter {own} -o OUT"
    if facts.mode:
        rank = " --rank RANK" if facts.mode == "bat" else ""
        return [merging, f"corda-convert to-lora {own} --base {model}{rank} -o OUT"]
    if facts.kind != "lora" or facts.dora:
        return [merging]
    return [merging, f"corda-convert to-lora {own} --rank RANK -o OUT"]
