"""Modules that share one stored covariance: it is read, damped and rooted once, and the bytes are those of separate ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    COVARIANCES,
    HIDDEN,
    INNER,
    LAYERS,
    LINEARS,
    MODEL,
    covariance,
    random,
    read_json,
    weight_files,
    write_checkpoint,
    write_covariances,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from corda_convert import DecomposeOptions, RunOptions, decompose
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.linalg import covariance as covariance_algebra
from corda_convert.linalg import weighting
from corda_convert.operations import contexts
from corda_convert.operations.contexts import ContextMethod, SharedContexts

METHODS = ("corda", "svd-llm", "asvd")
ALIASES = {
    f"model.layers.{layer}.{name}": f"model.layers.{layer}.{first}"
    for layer in range(LAYERS)
    for name, first in (("self_attn.q_proj", "self_attn.k_proj"), ("self_attn.v_proj", "self_attn.k_proj"),
                        ("mlp.up_proj", "mlp.gate_proj"))
}  # fmt: skip
STORED = {module: d_in for module, (_, d_in) in LINEARS.items() if module not in ALIASES}


def options(method: Any = "corda", **changes: Any) -> DecomposeOptions:
    return DecomposeOptions(**{"mode": "kpm", "rank": 4, "method": method, **changes})


def write_both(tmp_path: Path) -> tuple[Path, Path]:
    """The same covariances and mean absolute inputs, with aliases and with one of each for every module."""
    tensors = {module: covariance(d_in, seed=700 + i) for i, (module, d_in) in enumerate(STORED.items())}
    tensors |= {f"{m}.mean_abs": random(d_in, seed=800 + i).abs() + 0.1 for i, (m, d_in) in enumerate(STORED.items())}
    apart = {
        name.replace(first, module): tensor.clone()
        for module, first in ALIASES.items()
        for name, tensor in tensors.items()
        if name.removesuffix(".mean_abs") == first
    }
    aliased = write_covariances(tmp_path / "aliased.safetensors", tensors, {"aliases": json.dumps(ALIASES)})
    return aliased, write_covariances(tmp_path / "apart.safetensors", tensors | apart)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", [{}, {"residual": False}])
def test_the_bytes_are_those_of_separate_covariances(tmp_path: Path, method: str, more: dict[str, Any]) -> None:
    model = write_checkpoint(tmp_path / "model", shards=3)
    outcomes = [
        decompose(model, output=tmp_path / path.stem, options=options(method, **more), covariances=path)
        for path in write_both(tmp_path)
    ]
    aliased, apart = (weight_files(outcome.output) for outcome in outcomes)
    assert aliased == apart
    entries = [
        {e["name"]: {k: v for k, v in e.items() if k != "seconds"} for e in o.receipt["tensors"]} for o in outcomes
    ]
    assert entries[0] == entries[1]
    assert sum("certificate" in entry for entry in entries[0].values()) == len(LINEARS)
    scale = 4 * (LAYERS * 3 * HIDDEN)
    saved = scale * (1 if method == "asvd" else HIDDEN)
    assert outcomes[1].receipt["plan"]["read_bytes"] - outcomes[0].receipt["plan"]["read_bytes"] == saved


def test_the_fixtures_aliases_are_read_once(tmp_path: Path) -> None:
    """Against the same file written out with a matrix for each module."""
    with safe_open(COVARIANCES, framework="pt") as stored:
        metadata = dict(stored.metadata())
    aliases = json.loads(metadata.pop("aliases"))
    tensors = load_file(COVARIANCES)
    assert len(aliases) == 18
    assert len(aliases.keys() | {name for name in tensors if not name.endswith("mean_abs")}) == 42
    full = tmp_path / "full.safetensors"
    save_file(tensors | {module: tensors[first].clone() for module, first in aliases.items()}, full, metadata)
    outcomes = [
        decompose(MODEL, output=tmp_path / path.stem, options=options(rank=8), covariances=path)
        for path in (COVARIANCES, full)
    ]
    read = [outcome.receipt["plan"]["read_bytes"] for outcome in outcomes]
    targets = [entry["module"] for entry in outcomes[0].receipt["tensors"] if "module" in entry]
    assert read[1] - read[0] == sum(tensors[aliases[module]].nbytes for module in targets if module in aliases) > 0
    assert weight_files(tmp_path / COVARIANCES.stem) == weight_files(tmp_path / "full")


@pytest.mark.parametrize(("method", "function"), [("corda", "relative_damping"), ("svd-llm", "root_weighting")])
def test_what_is_made_of_a_covariance_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, function: str
) -> None:
    model = write_checkpoint(tmp_path / "model")
    module = covariance_algebra if method == "corda" else weighting
    made = 0
    original = getattr(module, function)

    def count(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        return original(*arguments)

    monkeypatch.setattr(module, function, count)
    aliased, apart = write_both(tmp_path)
    for path, expected in ((aliased, len(STORED)), (apart, len(LINEARS))):
        made = 0
        decompose(model, output=tmp_path / path.stem, options=options(method), covariances=path)
        assert made == expected


def test_a_run_that_lacks_the_first_of_a_group_reads_for_itself(tmp_path: Path) -> None:
    """As one does that goes on with an interrupted one, or that shares the work with others."""
    model = write_checkpoint(tmp_path / "model")
    aliased, _ = write_both(tmp_path)
    whole = decompose(model, output=tmp_path / "whole", options=options(), covariances=aliased)
    original = SharedContexts.take
    try:
        SharedContexts.take = lambda self, ref: None  # type: ignore[method-assign]
        alone = decompose(model, output=tmp_path / "alone", options=options(), covariances=aliased)
    finally:
        SharedContexts.take = original  # type: ignore[method-assign]
    assert weight_files(alone.output) == weight_files(whole.output)


# What is held


def refs(tmp_path: Path, sides: dict[str, int]) -> dict[str, TensorRef]:
    path = tmp_path / "held.safetensors"
    save_file({name: torch.eye(side) for name, side in sides.items()}, path)
    file = SafetensorsFile(path)
    return {name: TensorRef(file, file.specs[name]) for name in sides}


@pytest.mark.parametrize(("method", "bytes_each"), [("corda", 4), ("svd-llm", 8)])
def test_contexts_in_turn_are_held_as_long_as_they_are_wanted(tmp_path: Path, method: Any, bytes_each: int) -> None:
    by_name = refs(tmp_path, {"x": 3, "y": 5, "z": 7, "once": 9})
    shared = SharedContexts(
        [(f"{i}.{name}", by_name[name]) for i, name in enumerate(["x", "y", "x", "once", "y", "z", "x", "z", "y"])],
        ContextMethod(method, 0.01, 0.5, None),
    )
    # x and y in turn are read once; z puts out x, the older, which is read again
    assert shared.reads == {"0.x", "1.y", "3.once", "5.z", "6.x"}
    assert shared.held_bytes == bytes_each * (5**2 + 7**2)


def test_what_is_held_counts_in_the_plan(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    plans = [
        decompose(
            model, output=tmp_path / path.stem, options=options(), covariances=path, run=RunOptions(dry_run=True)
        ).plan
        for path in write_both(tmp_path)
    ]
    # two that are held, and room to read one, should it not be
    assert plans[0].workspace_bytes - plans[1].workspace_bytes == 3 * 4 * HIDDEN**2
    assert plans[0].worst_job == plans[1].worst_job


# Large covariances


@pytest.mark.parametrize(
    ("tokens", "samples", "singular"),
    [(None, 8, True), (None, 64, False), (8, 8, True), (47, 64, False), (48, 8, None), (10**6, 8, None)],
)
def test_whether_a_large_covariance_is_singular_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int | None, samples: int, singular: bool | None
) -> None:
    monkeypatch.setattr(contexts, "FULL_SIDE", 16)
    model = write_checkpoint(tmp_path / "model")
    name = "model.layers.0.mlp.down_proj"
    inputs = random(samples, INNER)
    metadata = {} if tokens is None else {"tokens": str(tokens)}
    path = write_covariances(tmp_path / "c.safetensors", {name: inputs.T @ inputs}, metadata)
    outcome = decompose(model, output=tmp_path / "out", options=options(targets=(name,)), covariances=path)
    receipt = read_json(outcome.output / "corda_convert.json")
    (facts,) = (entry["covariance"] for entry in receipt["tensors"] if "covariance" in entry)
    assert (facts["rank"], facts["condition"], facts["singular"]) == (None, None, singular)
    told = [warning for warning in receipt["warnings"] if "rank-deficient" in warning]
    assert bool(told) == (singular is True)
    if told and tokens is None:
        assert (
            f"the worst is that of {name}, of an unknown rank below its 24 inputs. In the other directions" in told[0]
        )
