"""What `inspect` found, in a screen for a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from corda_convert.output.module_groups import describe_groups
from corda_convert.output.summary import size

_MOST_PROBLEMS = 5


def describe(facts: Mapping[str, Any]) -> str:
    """The JSON object of one path as lines."""
    lines = [f"{facts['path']}: {facts['what']}"]
    parts = {"adapter": _adapter, "checkpoint": _checkpoint, "covariances": _covariances, "cache": _cache}
    if facts["kind"] in parts:
        lines += parts[facts["kind"]](facts)
    if facts["receipt"]:
        lines += _receipt(facts["receipt"])
    if facts["base"]:
        lines += _base(facts["base"])
    if facts["server"]:
        lines += _server(facts["server"])
    lines += _several("next", facts["next"])
    return "\n".join(lines)


def _line(label: str, text: str) -> str:
    return f"  {label:<8} {text}"


def _several(label: str, texts: Iterable[str]) -> list[str]:
    """Several lines under one label."""
    return [_line(label if place == 0 else "", text) for place, text in enumerate(texts)]


def _adapter(facts: Mapping[str, Any]) -> list[str]:
    lines = _several("rank", _ranks(facts))
    lines += _patterns(facts)
    lines.append(_line("targets", f"{describe_groups(facts['targets'])} ({_count(facts['modules'], 'module')})"))
    lines += _several("besides", _besides(facts))
    lines.append(_line("size", _size(facts)))
    if facts["init"] not in (None, "true") or facts["corda_method"]:
        corda = f", corda_config {facts['corda_method']}" if facts["corda_method"] else ""
        lines.append(_line("init", f"{facts['init']}{corda}"))
    if facts["trained_beside_residual"]:
        lines.append(_line("residual", facts["trained_beside_residual"]))
    if facts["base_model"]:
        note = " (a residual)" if facts["base_is_residual"] else ""
        lines.append(_line("base", f"{facts['base_model']}{note}"))
    return lines


def _ranks(facts: Mapping[str, Any]) -> list[str]:
    if facts["rank"] is None:
        return []
    if len(facts["ranks"]) == 1:
        text = next(iter(facts["ranks"]))
    else:
        text = ", ".join(f"{rank} × {count}" for rank, count in facts["ranks"].items()) + " modules"
    if facts["alpha"] is not None:
        text += f", alpha {facts['alpha']:g}" + (" by default" if facts["alpha_pattern"] else "")
    if len(facts["scalings"]) == 1:
        text += f", scaling {next(iter(facts['scalings']))}"
    elif facts["scalings"]:
        text += ", scaling " + ", ".join(f"{value} × {count}" for value, count in facts["scalings"].items())
    elif facts["type"] == "lora":
        text += "; the file does not tell the scaling"
    return [text]


def _patterns(facts: Mapping[str, Any]) -> list[str]:
    return [
        _line("patterns", f"{name} " + _cut([f"{key} → {value:g}" for key, value in facts[f"{name}_pattern"].items()]))
        for name in ("rank", "alpha")
        if facts[f"{name}_pattern"]
    ]


def _besides(facts: Mapping[str, Any]) -> Iterable[str]:
    """What an adapter changes otherwise than by factors."""
    if facts["saved"]:
        yield f"whole weights: {_cut(facts['saved'])}"
    if facts["biases"]:
        yield f"trained biases: {_cut(facts['biases'])}"
    if facts["lora_biases"]:
        yield f"a bias of lora_B in {_count(facts['lora_biases'], 'module')}"
    for module, count in facts["trained_tokens"].items():
        yield f"{count} trained tokens of {module}"
    if facts["experts"]:
        yield f"{facts['experts']} stacks of experts or other parameters (target_parameters)"


def _checkpoint(facts: Mapping[str, Any]) -> list[str]:
    told = [facts["architecture"] or facts["model_type"]]
    told += [f"{facts[key]} {label}" for key, label in (("layers", "layers"), ("hidden_size", "wide")) if facts[key]]
    told += [f"vocabulary {facts['vocabulary']}"] if facts["vocabulary"] else []
    told += ["head tied to the embedding"] if facts["ties_embeddings"] else []
    lines = [_line("model", ", ".join(text for text in told if text))] if any(told) else []
    lines.append(_line("size", f"{_size(facts)}, {facts['tensors']} tensors in {_count(facts['files'], 'file')}"))
    if facts["quantization"]:
        readable = "can be merged into" if facts["quantization"]["is_readable"] else "cannot be read"
        lines.append(_line("quant", f"{facts['quantization']['method']}, {readable}"))
    if facts["decomposed"]:
        ranks = ", ".join(facts["decomposed"]["ranks"])
        lines.append(_line("adapter", f"in {facts['decomposed']['modules']} layers, rank {ranks}"))
    if facts["initial_adapter"]:
        initial = facts["initial_adapter"]
        lines.append(_line("adapter", f"{initial['path']}: rank {_ranks(initial)[0]}"))
        lines.append(_line("", f"{describe_groups(initial['targets'])} ({_count(initial['modules'], 'module')})"))
    return lines


def _covariances(facts: Mapping[str, Any]) -> list[str]:
    held = [_count(facts["matrices"], "matrix", "matrices")] if facts["matrices"] else []
    held += [_count(facts["mean_abs"], "vector") + " of mean absolute inputs"] if facts["mean_abs"] else []
    held += [_count(facts["aliases"], "alias", "aliases")] if facts["aliases"] else []
    lines = [
        _line("modules", f"{describe_groups(facts['targets'])} ({_count(facts['modules'], 'module')})"),
        _line("holds", ", ".join(held)),
        _line("inputs", ", ".join(f"{width} × {count}" for width, count in facts["inputs"].items())),
    ]
    counts = [f"{facts[key]:,} {key}" for key in ("samples", "tokens") if facts[key] is not None]
    counts += [f"normalization {facts['normalization']}"] if facts["normalization"] else []
    if counts:
        few = "; few: ten or more for each input are wanted" if facts["has_few_tokens"] else ""
        lines.append(_line("from", ", ".join(counts) + few))
    if facts["model"] or facts["data"]:
        lines.append(_line("of", ", ".join(str(facts[key]) for key in ("model", "data") if facts[key])))
    lines.append(_line("size", f"{_dtypes(facts)}, {size(facts['bytes'])}"))
    return lines


def _cache(facts: Mapping[str, Any]) -> list[str]:
    return [
        _line("modules", f"{describe_groups(facts['targets'])} ({_count(facts['modules'], 'module')})"),
        _line("rank", ", ".join(f"{rank} × {count}" for rank, count in facts["ranks"].items())),
        _line("size", f"{_dtypes(facts)}, {size(facts['bytes'])}"),
    ]


def _receipt(receipt: Mapping[str, Any]) -> list[str]:
    counted = ", ".join(f"{count} {action}" for action, count in receipt["tensors"].items())
    lines = [
        _line("made by", f"{receipt['tool']}: {receipt['command']} of {_cut(receipt['inputs'])}; tensors: {counted}"),
    ]
    given = [f"{key}={value}" for key, value in receipt["options"].items() if value not in (None, False, [], {})]
    if given:
        lines.append(_line("options", _cut(given, 8)))
    if receipt["missing_or_changed"]:
        lines.append(_line("damaged", f"not as the receipt says: {_cut(receipt['missing_or_changed'])}"))
    else:
        lines.append(_line("files", f"{receipt['files']}, {size(receipt['bytes'])}, all here in their sizes"))
    return lines


def _base(base: Mapping[str, Any]) -> list[str]:
    if not base["fits"]:
        shown = base["problems"][:_MOST_PROBLEMS]
        more = len(base["problems"]) - len(shown)
        lines = [_line("in base", f"{base['name']}: it does not fit")]
        lines += [_line("", " ".join(filter(None, (each["what"], each["why"], each["next_step"])))) for each in shown]
        return lines + ([_line("", f"and {more} more problems")] if more else [])
    rest = base["tensors"] - len(base["first"])
    named = ", ".join(base["first"]) + (f" and {rest} more" if rest > 0 else "")
    lines = [
        _line("in base", f"{base['name']}: {base['tensors']} of {base['of_tensors']} tensors, {size(base['bytes'])}")
    ]
    lines.append(_line("", named))
    if base["replaced"]:
        lines.append(_line("", f"replaced: {_cut(base['replaced'])}"))
    lines += [_line("", f"no longer tied: {', '.join(members)}") for members in base["untied"]]
    return lines + [_line("note", note) for note in base["notes"]]


def _server(server: Mapping[str, Any]) -> list[str]:
    verdict = "takes it as it is" if server["takes_it"] else "does not serve it as it is"
    lines = [_line("server", f"{server['name']} {verdict}")]
    lines += [
        _line("", f"{found['severity']}: {found['what']}. {found['why']} → {found['how']}")
        for found in server["findings"]
    ]
    lines += _several("mend", server["mending"])
    return lines + _several("start" if server["takes_it"] else "then", server["commands"])


def _size(facts: Mapping[str, Any]) -> str:
    known = "" if facts["parameters"] is None else f"{facts['parameters']:,} parameters in "
    return f"{known}{_dtypes(facts)}, {size(facts['bytes'])}"


def _dtypes(facts: Mapping[str, Any]) -> str:
    return ", ".join(facts["dtypes"])


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def _cut(values: Sequence[Any], most: int = 4) -> str:
    text = ", ".join(map(str, values[:most]))
    return text + (f" and {len(values) - most} more" if len(values) > most else "")
