"""`decompose`: a checkpoint and covariances → a residual checkpoint and the initial adapter that PEFT trains beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from corda_convert.adapters.factors import Layout, dimensions
from corda_convert.adapters.source import CONFIG_FILE, PEFT_PREFIX, WEIGHTS_FILE
from corda_convert.checkpoint.covariances import Covariances, read_covariances
from corda_convert.checkpoint.folder import INITIAL_ADAPTER_FOLDER, Checkpoint, read_checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import read_structure
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef, TensorSpec
from corda_convert.errors import (
    AdapterMismatch,
    CordaConvertError,
    CovarianceMismatch,
    InputNotFound,
    UnsupportedInput,
    raise_problems,
    some,
)
from corda_convert.operations.decomposition import DecomposeTransform, Method, Mode
from corda_convert.operations.evidence import initial_adapter_of
from corda_convert.operations.model_side import model_side_files, transformers_card, with_snippet
from corda_convert.operations.options import Outcome, RunOptions
from corda_convert.operations.production import Input, Production, checkpoint_files, output_dtype, produce
from corda_convert.output.side_files import json_file, override
from corda_convert.plan.model import Copied, OutputFileSpec, Produced

INITIAL_ADAPTER_WEIGHTS = f"{INITIAL_ADAPTER_FOLDER}/{WEIGHTS_FILE}"


@dataclass(frozen=True, slots=True)
class DecomposeOptions:
    """What `decompose` alone takes.

    Attributes:
        mode: `ipm` takes the largest singular values, `kpm` the smallest.
        rank: rank of the adapter, at most min(d_out, d_in) of every target.
        alpha: `lora_alpha`; None for the rank, a scaling of 1.
        method: `corda`, or `svd` (PiSSA with ipm), which takes no covariances.
        damp: damping of the covariance relative to its mean diagonal, or `peft` for the reference's doubling rule.
        targets: module names, their ends, or regular expressions; none for every Linear but the head.
    """

    mode: Mode
    rank: int
    alpha: float | None = None
    method: Method = "corda"
    damp: float | Literal["peft"] = 0.01
    targets: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass(frozen=True, slots=True)
class Target:
    """A module to decompose, its weight and its covariance."""

    module_name: str
    weight: TensorRef
    layout: Layout
    covariance: TensorRef | None


def decompose(
    model: Path | str,
    *,
    output: Path | str,
    options: DecomposeOptions,
    covariances: Path | str | None = None,
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
) -> Outcome:
    """Writes `W − s·B·A` for every target, and A, B as a PEFT adapter in `output/corda_init`.

    `s·B·A = U Uᵀ W`, with U the `rank` left singular vectors of `W (C + λI)` at the end that the mode says (CorDA, §3).
    Raises a `CordaConvertError`; then nothing was written.
    """
    from corda_convert.linalg.subspace import load_solvers

    checkpoint = read_checkpoint(Path(model))
    _check_options(options, checkpoint, covariances)
    matrices = None if covariances is None or options.method == "svd" else read_covariances(Path(covariances))
    names = NameMap(checkpoint, read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors))
    targets = choose_targets(names, options, matrices)
    transforms = {target.weight.name: _transform(target, options) for target in targets}
    files = (
        *checkpoint_files(checkpoint, _residual(checkpoint, transforms, run.output_dtype), run.output_dtype),
        _adapter_file(checkpoint, transforms),
    )
    config = adapter_config(names, targets, options, run.push_to or str(output))
    side_files, left = model_side_files(checkpoint, run)
    side_files = override(side_files, (json_file(f"{INITIAL_ADAPTER_FOLDER}/{CONFIG_FILE}", config),))
    production = Production(
        command="decompose",
        options={
            "model": checkpoint.name,
            "covariances": None if matrices is None else matrices.path.name,
            "mode": options.mode,
            "method": options.method,
            "rank": options.rank,
            "alpha": config["lora_alpha"],
            "damp": None if matrices is None else options.damp,
            "targets": list(options.targets),
            "dtype": run.dtype,
        },
        output=Path(output),
        inputs=_inputs(checkpoint, matrices),
        files=files,
        side_files=side_files,
        index_metadata=checkpoint.index_metadata,
        left_behind=left,
        facts={"covariances": None if matrices is None else _describe(matrices)},
        card=with_snippet(
            transformers_card(
                checkpoint,
                f"The residual of `{checkpoint.name}` and, in `{INITIAL_ADAPTER_FOLDER}/`, the adapter to train beside it "
                f"({options.method}, {options.mode}, rank {options.rank}). The two together equal the base model; the "
                "residual alone does not, so train and load them together.",
                relation="finetune",
                tags=("corda" if options.method == "corda" else "pissa", "residual"),
            ),
            RESIDUAL_SNIPPET,
        ),
    )
    load_solvers()
    return produce(production, run)


RESIDUAL_SNIPPET = """from peft import PeftModel
from transformers import AutoModelForCausalLM

residual = AutoModelForCausalLM.from_pretrained("{repo}")
model = PeftModel.from_pretrained(residual, "{repo}", subfolder="corda_init", is_trainable=True)"""


def _residual(
    checkpoint: Checkpoint, transforms: Mapping[str, DecomposeTransform], dtype: str | None
) -> dict[str, tuple[Produced, ...]]:
    """Each weight's residual in its place."""
    specs = {name: checkpoint.spec(name) for name in transforms}
    return {
        name: (Produced(spec.with_dtype(output_dtype(spec.dtype, dtype)), transforms[name]),)
        for name, spec in specs.items()
    }


def _check_options(options: DecomposeOptions, checkpoint: Checkpoint, covariances: Path | str | None) -> None:
    if options.method == "corda" and covariances is None:
        raise InputNotFound(
            "Method corda needs covariances.",
            next_step="Give them with --cov FILE, or take the plain SVD of the weights with --method svd.",
        )
    if options.rank < 1:
        raise UnsupportedInput(f"The rank is {options.rank}, at least 1 was expected.")
    if options.alpha is not None and not 0 < options.alpha < float("inf"):
        raise UnsupportedInput(f"Alpha is {options.alpha}, a positive number was expected.")
    if options.damp != "peft" and not 0 <= options.damp < float("inf"):
        raise UnsupportedInput(f"The damping is {options.damp}, a number from 0 on was expected.")
    if initial_adapter_of(checkpoint.root) is not None:
        raise AdapterMismatch(
            f"{checkpoint.name} is a residual already: it has its initial adapter with it.",
            next_step="Decompose the base model.",
        )


def choose_targets(names: NameMap, options: DecomposeOptions, matrices: Covariances | None) -> list[Target]:
    """The modules to decompose, in the order of their weights on disk. Raises every problem together."""
    candidates = _candidates(names)
    chosen = _matching(candidates, options.targets) if options.targets else list(candidates)
    if not chosen:
        raise UnsupportedInput(f"{names.checkpoint.name} has no Linear layer to decompose.")
    problems: list[CordaConvertError] = []
    targets = []
    for module in chosen:
        weight, layout = candidates[module]
        found = matrices.find(module) if matrices is not None else None
        targets.append(Target(module, weight, layout, found))
        problems += _target_problems(targets[-1], options)
    missing = [target.module_name for target in targets if target.covariance is None]
    if matrices is not None and missing:
        problems.append(
            CovarianceMismatch(
                f"No covariance for {len(missing)} of {len(targets)} modules: {some(missing, 12)}.",
                why="The covariances are of another model, or were collected for other targets."
                if len(missing) == len(targets)
                else None,
                next_step="Collect them too, or choose the modules that have one with --target.",
            )
        )
    raise_problems(problems)
    order = {name: place for place, name in enumerate(names.checkpoint.tensors)}
    return sorted(targets, key=lambda target: order[target.weight.name])


def _candidates(names: NameMap) -> dict[str, tuple[TensorRef, Layout]]:
    """Every Linear and Conv1D but the head, by module path at run time."""
    if names.structure is None:
        raise UnsupportedInput(
            f"The architecture of {names.checkpoint.name} is not known to transformers, so its Linear layers cannot be told.",
            next_step="Put its config.json beside the weights; models that need remote code are not supported yet.",
        )
    found: dict[str, tuple[TensorRef, Layout]] = {}
    for module in names.structure.linear_modules():
        tensor_name = names.parameter(f"{module}.weight")
        if tensor_name is not None and not names.is_tied(tensor_name):
            layout: Layout = "in_out" if names.structure.layers[module] == "conv1d" else "out_in"
            found[module] = (names.checkpoint.tensors[tensor_name], layout)
    return found


def _matching(candidates: Iterable[str], targets: tuple[str, ...]) -> list[str]:
    """Modules whose path is a target, ends in `.target`, or matches it as a regular expression, as PEFT does."""
    modules = list(candidates)
    chosen: dict[str, None] = {}
    for target in targets:
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise UnsupportedInput(f"--target {target!r} is no name and no regular expression: {error}.") from None
        matched = [
            module
            for module in modules
            if module == target or module.endswith(f".{target}") or pattern.fullmatch(module)
        ]
        if not matched:
            ends = sorted({module.rpartition(".")[2] for module in modules})
            raise UnsupportedInput(
                f"--target {target!r} matches no Linear layer.", next_step=f"The layers end in: {', '.join(ends)}."
            )
        chosen |= dict.fromkeys(matched)
    return [module for module in modules if module in chosen]


def _target_problems(target: Target, options: DecomposeOptions) -> list[CordaConvertError]:
    problems: list[CordaConvertError] = []
    if target.weight.spec.dtype not in COMPUTABLE_DTYPES:
        problems.append(
            UnsupportedInput(
                f"{target.weight.name} is stored as {target.weight.spec.dtype}: the model is quantized.",
                next_step="Decompose the unquantized model.",
            )
        )
    d_out, d_in = dimensions(target.weight.spec, target.layout)
    if options.rank > min(d_out, d_in):
        problems.append(
            UnsupportedInput(
                f"Rank {options.rank} is above what {target.module_name} has: its weight is ({d_out}, {d_in}), "
                f"rank {min(d_out, d_in)} at most.",
                next_step="Choose a smaller --rank, or leave the module out with --target.",
            )
        )
    if target.covariance is not None and target.covariance.shape != (d_in, d_in):
        problems.append(
            CovarianceMismatch(
                f"The covariance of {target.module_name} is {target.covariance.shape}; its weight is ({d_out}, {d_in}), so "
                f"({d_in}, {d_in}) was expected.",
                why="The covariances are of another model.",
                next_step="Collect covariances with this model.",
            )
        )
    return problems


def _transform(target: Target, options: DecomposeOptions) -> DecomposeTransform:
    prefix = f"{PEFT_PREFIX}{target.module_name}"
    return DecomposeTransform(
        module_name=target.module_name,
        weight=target.weight,
        covariance=target.covariance,
        layout=target.layout,
        mode=options.mode,
        rank=options.rank,
        scaling=options.scaling,
        damp=options.damp,
        names=(target.weight.name, f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"),
    )


def _adapter_file(checkpoint: Checkpoint, transforms: Mapping[str, DecomposeTransform]) -> OutputFileSpec:
    tensors: list[Produced | Copied] = []
    for name in checkpoint.tensors:
        transform = transforms.get(name)
        if transform is not None:
            d_out, d_in = dimensions(transform.weight.spec, transform.layout)
            _, lora_A, lora_B = transform.names
            tensors.append(Produced(TensorSpec(lora_A, "F32", (transform.rank, d_in)), transform))
            tensors.append(Produced(TensorSpec(lora_B, "F32", (d_out, transform.rank)), transform))
    return OutputFileSpec(INITIAL_ADAPTER_WEIGHTS, tuple(tensors), {"format": "pt"})


def adapter_config(
    names: NameMap, targets: list[Target], options: DecomposeOptions, residual_name: str
) -> dict[str, Any]:
    """The `adapter_config.json` of the initial adapter.

    `init_lora_weights` is true, so that PEFT takes the factors as they are. `corda_config` has no effect then; it stays
    through training and says that the adapter belongs beside a residual, as does the residual's name.
    """
    alpha = options.rank if options.alpha is None else options.alpha
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": residual_name,
        "bias": "none",
        "corda_config": {"corda_method": options.mode},
        "fan_in_fan_out": any(target.layout == "in_out" for target in targets),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": options.rank,
        "rank_pattern": {},
        "target_modules": _target_modules(names, targets),
        "task_type": _task_type(names.checkpoint),
        "use_dora": False,
        "use_rslora": False,
    }


def _target_modules(names: NameMap, targets: list[Target]) -> list[str]:
    """The last parts of the targets' paths where they select exactly the targets, else whole paths."""
    chosen = {target.module_name for target in targets}
    ends = sorted({module.rpartition(".")[2] for module in chosen})
    layers = names.structure.layers if names.structure is not None else {}
    selected = {module for module in layers if module in ends or module.endswith(tuple(f".{end}" for end in ends))}
    return ends if selected == chosen else sorted(chosen)


def _task_type(checkpoint: Checkpoint) -> str | None:
    """None for classifiers: with their task types PEFT trains the head and demands it in every adapter it loads."""
    architecture = str(((checkpoint.config or {}).get("architectures") or [""])[0])
    kinds = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
    }
    return next((kind for end, kind in kinds.items() if architecture.endswith(end)), None)


def _inputs(checkpoint: Checkpoint, matrices: Covariances | None) -> tuple[Input, ...]:
    model = Input("model", checkpoint.root, checkpoint.shards)
    return (model,) if matrices is None else (model, Input("covariances", matrices.path, matrices.files))


def _describe(matrices: Covariances) -> dict[str, Any]:
    known = {key: matrices.metadata.get(key) for key in ("samples", "tokens", "normalization", "model", "data")}
    for key in ("model", "data"):  # a receipt holds no absolute path
        value = known[key]
        known[key] = Path(value).name if value is not None and Path(value).is_absolute() else value
    return {"matrices": len(matrices.matrices), **known}
