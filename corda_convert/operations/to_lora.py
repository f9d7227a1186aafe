"""`to-lora`: whatever is of low rank, or nearly so, as an ordinary LoRA for the unmodified base model.

Every source gives, module by module, factors to be added up (`lora_adapters`), or a dense change (`lora_checkpoints`).
Here their ranks are chosen and the result is planned: factors put together as they are, or the best of a lower rank.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.adapters.lora import read_scaling
from corda_convert.adapters.source import CONFIG_FILE, WEIGHTS_FILE
from corda_convert.checkpoint.covariances import Covariances, at_run_time, read_covariances
from corda_convert.checkpoint.folder import Checkpoint, read_checkpoint, read_json
from corda_convert.checkpoint.hub_id import parse_hub_id
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import CordaConvertError, CovarianceMismatch, UnsupportedInput, raise_problems, some
from corda_convert.hub_reading import located
from corda_convert.operations.adapter_facts import AdapterFacts
from corda_convert.operations.lora_adapters import Given, from_adapters
from corda_convert.operations.lora_checkpoints import from_checkpoints
from corda_convert.operations.lora_config import baked_config, doubled_config
from corda_convert.operations.lora_modules import LoraSource
from corda_convert.operations.lora_ranks import Ranks, chosen_rank, stored_ranks
from corda_convert.operations.lora_serving import Wishes, facts_of_result, listed_targets, mend
from corda_convert.operations.lora_writing import operand_dtypes, planned_tensors
from corda_convert.operations.options import Outcome, Paths, RunOptions, paths_of
from corda_convert.operations.production import Input, Production, produce
from corda_convert.operations.server_rules import SERVERS, Server
from corda_convert.operations.servers import base_in_commands
from corda_convert.output.licence import Licence, licence_of
from corda_convert.output.model_card import Card
from corda_convert.output.read_ahead import ReadAhead
from corda_convert.output.side_files import json_file, override
from corda_convert.plan.model import OutputFileSpec


@dataclass(frozen=True, slots=True)
class ToLoraOptions:
    """What `to-lora` alone takes.

    Attributes:
        base: the base model: its name for the new config, and where it is a local folder, the model itself, for the sources
            that need it and for the check that the rest belongs to it.
        residual: the model that the one adapter was trained beside, where its initial adapter is lost; needs `base`.
        from_checkpoints: a model and a fine-tune of it, in place of adapters; needs `rank` or `energy`.
        scales: how many times each adapter is taken, negative ones included; once, where none are given.
        rank: the largest rank of a module.
        energy: the share of `‖ΔW‖²` that each module keeps, with as small a rank as that takes.
        weight_by: covariances of the layers' inputs: the error of their outputs counts instead, `‖(ΔW − BA) C^½‖`.
        uniform: one rank for all modules, without patterns, with zeros where a module has less.
        server: vllm, sglang, llama.cpp or peft: what it does not take is mended, or refused.
        as_is: trust the user that everything given belongs together.
    """

    base: str | None = None
    residual: Path | str | None = None
    from_checkpoints: tuple[Path | str, Path | str] | None = None
    scales: Sequence[float] = ()
    rank: int | None = None
    energy: float | None = None
    weight_by: Path | str | None = None
    uniform: bool = False
    server: Server | None = None
    as_is: bool = False

    @property
    def is_reduced(self) -> bool:
        """Whether a rank is chosen."""
        return self.rank is not None or self.energy is not None


def to_lora(
    adapter: Paths = (),
    *,
    output: Path | str,
    init: Paths | None = None,
    options: ToLoraOptions = ToLoraOptions(),
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
) -> Outcome:
    """Writes one LoRA for the base: of adapters trained beside a residual, of blocks, of several adapters, of a fine-tune.

    Without `rank` and `energy` nothing is lost but by the dtype: `s·(BA − B₀A₀)` becomes `[A; A₀]`, `[B | −B₀]` of twice the
    rank. A scaling that PEFT's config cannot give is baked into lora_B. Raises a `CordaConvertError`; then nothing was
    written.
    """
    _check_options(options, paths_of(adapter), paths_of(init))
    adapters = tuple(located(path, "adapter") for path in paths_of(adapter))
    initials = tuple(located(path, "initial adapter") for path in paths_of(init))
    with _read_ahead([*initials, *adapters], run) as ahead:
        base = _readable_base(options, adapters)
        if options.from_checkpoints is not None:
            before, after = (located(path, "model") for path in options.from_checkpoints)
            source = from_checkpoints(before, after, run)
        else:
            residual = None if options.residual is None else located(options.residual, "residual")
            source = from_adapters(Given(adapters, initials, options.scales, base, residual, options.as_is, run))
        _check_needed(source, options, run)
        return produce(_production(source, options, run, Path(output)), run, ahead)


@contextlib.contextmanager
def _read_ahead(paths: Sequence[Path], run: RunOptions) -> Iterator[ReadAhead | None]:
    """Hashes the adapters' weights, from before torch is imported, until the engine starts or the command is refused.

    Best the initial ones first: the result has the order of the trained ones, so the engine can hash those as it reads.
    """
    files = [file for path in paths if (file := path / WEIGHTS_FILE).is_file()]
    if run.dry_run or run.ranks.place.size > 1 or not files:
        yield None
        return
    with ReadAhead(files) as ahead:
        yield ahead


def _check_options(options: ToLoraOptions, adapters: Sequence[Path], initials: Sequence[Path]) -> None:
    """Refuses options that are out of range or contradict each other, all together."""
    problems: list[CordaConvertError] = []
    if options.rank is not None and options.rank < 1:
        problems.append(UnsupportedInput(f"The rank is {options.rank}, at least 1 was expected."))
    if options.energy is not None and not 0 < options.energy <= 1:
        problems.append(
            UnsupportedInput(
                f"--energy is {options.energy:g}, a share above 0 and up to 1 was expected, such as 0.999."
            )
        )
    if options.server not in (None, *SERVERS):
        problems.append(
            UnsupportedInput(f"Unknown server {options.server!r}.", next_step=f"Choose one of {', '.join(SERVERS)}.")
        )
    if options.weight_by is not None and not options.is_reduced:
        problems.append(
            UnsupportedInput(
                "--weight-by says what a lower rank must keep, and no rank is chosen.",
                next_step="Give --rank or --energy, too, or leave it out.",
            )
        )
    if options.from_checkpoints is not None:
        if adapters or initials or options.residual is not None or options.scales:
            problems.append(
                UnsupportedInput(
                    "--from-checkpoints goes with no adapter, --init, --residual or --scale.",
                    next_step="To combine its result with adapters, convert it first.",
                )
            )
        if not options.is_reduced:
            problems.append(
                UnsupportedInput(
                    "The difference of two checkpoints has full rank.", next_step="Choose one with --rank or --energy."
                )
            )
    elif not adapters:
        problems.append(UnsupportedInput("There is nothing to convert.", next_step="Give an adapter."))
    raise_problems(problems)


def _readable_base(options: ToLoraOptions, adapters: Sequence[Path]) -> Checkpoint | None:
    """The base model: a folder that is here, or a model on the Hub, where the adapters' kinds or `--residual` need one.

    Without `--base` the one that a block adapter names, which needs it.
    """
    if options.from_checkpoints is not None:
        return None
    named = [read_json(path / CONFIG_FILE) for path in adapters if (path / CONFIG_FILE).is_file()]
    blocks = [config for config in named if str(config.get("peft_type")).upper() != "LORA"]
    if options.base is not None:
        needs_it = options.residual is not None or bool(blocks)
        path = located(options.base, "model") if needs_it else Path(options.base)
        return read_checkpoint(path) if needs_it or path.exists() else None
    for config in blocks:
        own = str(config.get("base_model_name_or_path") or "")
        if own and Path(own).is_dir():
            return read_checkpoint(Path(own))
    return None


def _check_needed(source: LoraSource, options: ToLoraOptions, run: RunOptions) -> None:
    """Refuses what would change nothing, and dense changes without a rank. Raises `UnsupportedInput`."""
    dense = [module.key for module in source.modules if module.dense is not None and not module.summands]
    if dense and not options.is_reduced:
        raise UnsupportedInput(
            f"The change of {some(dense)} depends on the weight (bat) and has full rank.",
            next_step="Choose a rank with --rank or --energy.",
        )
    is_one = all(len(module.summands) == 1 and module.dense is None for module in source.modules)
    is_lora = str(source.config.get("peft_type")).upper() == "LORA"
    asked = options.is_reduced or options.uniform or options.server is not None or run.dtype is not None
    asked = asked or any(scale != 1 for scale in options.scales)
    if is_one and is_lora and not asked and len(source.options.get("adapters", ())) == 1:
        raise UnsupportedInput(
            f"{source.options['adapters'][0]} is an ordinary LoRA already.",
            why="Neither --init nor a rank is given, so there is nothing to convert.",
            next_step="Give its initial adapter with --init if it was trained beside a residual; --rank, --energy, --uniform, "
            "--scale, --for or --dtype to change it.",
        )


@dataclass(frozen=True, slots=True)
class _Result:
    """Ranks by the modules' keys, and the config that goes with them."""

    ranks: Mapping[str, Ranks]
    config: Mapping[str, Any]
    is_baked: bool


def _result(
    source: LoraSource, options: ToLoraOptions, chosen: Mapping[str, int], wishes: Wishes, base: str | None
) -> _Result:
    """What the result is with the ranks that were chosen, module by module."""
    given = options.rank if options.energy is None else None
    ranks = stored_ranks(source.modules, chosen, wishes, given)
    keeps_scaling = source.keeps_scaling and not wishes.plain_scaling
    is_baked = not keeps_scaling or not all(
        ranks[module.key].stored == module.rank == 2 * module.summands[0].rank and module.dense is None
        for module in source.modules
    )
    if is_baked:
        patterned = {module.pattern_name: ranks[module.key].stored for module in source.modules}
        config = baked_config(source.config, patterned, base)
    else:
        config = doubled_config(source.config, read_scaling(dict(source.config)), base)
    unnamed = [module.key for module in source.modules if not module.is_named]
    if is_baked and config["rank_pattern"] and unnamed:
        raise UnsupportedInput(
            f"The result has ranks by patterns, and only the model tells which parameter {some(unnamed)} is for.",
            next_step="Give the base model's folder with --base, or --uniform.",
        )
    if wishes.list_targets and isinstance(config.get("target_modules"), str):
        config |= {"target_modules": listed_targets(source)}
    return _Result(ranks, config, is_baked)


def _production(source: LoraSource, options: ToLoraOptions, run: RunOptions, output: Path) -> Production:
    matrices = None if options.weight_by is None else read_covariances(located(options.weight_by, "covariance file"))
    weights = _covariances(source, matrices)
    device = run.torch_device()
    base = source.base if options.base is None else _name_of_base(options.base)
    chosen = {
        module.key: chosen_rank(module, options.rank, options.energy, weights.get(module.key), device)
        for module in source.modules
    }
    wishes, served = Wishes(uniform=options.uniform), None
    if options.server is not None:

        def facts_for(wishes: Wishes) -> AdapterFacts:
            result = _result(source, options, chosen, wishes, base)
            return facts_of_result(source, {key: each.stored for key, each in result.ranks.items()}, result.config)

        shown = "BASE" if base and Path(base).is_absolute() else base_in_commands(base)
        wishes, served = mend(options.server, wishes, facts_for, base=shown)
    result = _result(source, options, chosen, wishes, base)
    inputs = source.inputs
    if matrices is not None:
        inputs = (*inputs, Input("covariances", matrices.path, matrices.files))
    tensors = planned_tensors(source, result.ranks, weights, run.output_dtype, is_baked=result.is_baked)
    return Production(
        command="to-lora",
        options=_options(source, options, run),
        output=output,
        inputs=inputs,
        files=(OutputFileSpec(WEIGHTS_FILE, tensors, {"format": "pt"}),),
        side_files=override((json_file(CONFIG_FILE, result.config),), source.side_files),
        facts={
            "scaling_baked_in": result.is_baked,
            "rank": result.config["r"],
            "alpha": result.config["lora_alpha"],
            "ranks": sorted({each.stored for each in result.ranks.values()}),
            **source.facts,
            **({} if served is None else {"served": served.facts()}),
        },
        card=_card(source, base),
        warnings=(*_warnings(source, base, run), *source.warnings),
    )


def _name_of_base(base: str) -> str:
    """As the new adapter's config and card name it: on the Hub without the revision."""
    asked = None if Path(base).exists() else parse_hub_id(base)
    return base if asked is None else asked.name


def _options(source: LoraSource, options: ToLoraOptions, run: RunOptions) -> dict[str, Any]:
    base = options.base
    return {
        **source.options,
        "base": Path(base).name if base and Path(base).is_absolute() else base,  # a receipt holds no absolute path
        "rank": options.rank,
        "energy": options.energy,
        "weight_by": None if options.weight_by is None else Path(options.weight_by).name,
        "uniform": options.uniform,
        "for": options.server,
        "as_is": options.as_is,
        "dtype": run.dtype,
    }


def _covariances(source: LoraSource, matrices: Covariances | None) -> Mapping[str, TensorRef]:
    """The covariance of each module's inputs, by the module's key. Raises every problem together."""
    if matrices is None:
        return {}
    if parameters := [module.pattern_name for module in source.modules if module.is_parameter]:
        raise UnsupportedInput(
            f"--weight-by is for layers, and {some(parameters)} are stacks of experts or other parameters.",
            next_step="Leave it out: then the error of the weights counts.",
        )
    matrices = matrices if source.names is None else at_run_time(matrices, source.names)
    found = {module.key: matrices.find(module.pattern_name) for module in source.modules}
    missing = [key for key, ref in found.items() if ref is None]
    problems: list[CordaConvertError] = []
    if missing:
        problems.append(
            CovarianceMismatch(
                f"No covariance for {len(missing)} of {len(found)} modules: {some(missing)}.",
                why="The covariances are of another model, or were collected for other targets.",
                next_step="Collect them too, or leave out --weight-by.",
            )
        )
    for module in source.modules:
        ref, d_in = found[module.key], module.shape[1]
        if ref is not None and ref.shape != (d_in, d_in):
            problems.append(
                CovarianceMismatch(
                    f"The covariance of {module.key} is {ref.shape}; the layer has {d_in} inputs.",
                    why="The covariances are of another model.",
                )
            )
    raise_problems(problems)
    return {key: ref for key, ref in found.items() if ref is not None}


def _warnings(source: LoraSource, base: str | None, run: RunOptions) -> tuple[str, ...]:
    warnings = []
    if not base:
        warnings.append("The new adapter names no base model. Give its name with --base, for tools that look it up.")
    joined = [module for module in source.modules if any(summand.factor < 0 for summand in module.summands)]
    wide = {dtype for module in joined for dtype in operand_dtypes(module)} & {"F32", "F64"}
    if run.output_dtype in ("BF16", "F16") and wide:
        warnings.append(
            f"The factors are rounded to {run.dtype}. B·A and B₀·A₀ nearly cancel, so their difference, all that was "
            "learned, loses more than that dtype's own precision. Without --dtype nothing is lost."
        )
    return tuple(warnings)


def _card(source: LoraSource, base: str | None) -> Card:
    named = Path(base).name if base and Path(base).is_absolute() else base
    quoted = json.dumps(named or "BASE_MODEL", ensure_ascii=False)
    folder = Path(base) if base and Path(base).is_dir() else None
    return Card(
        what=source.what,
        base_model="" if folder is not None else named or "",
        relation="adapter",
        library_name="peft",
        tags=source.tags,
        licence=Licence() if folder is None else licence_of(folder).seen_from(None),
        snippet=(
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained({quoted})\nmodel = PeftModel.from_pretrained(base, "{{repo}}")'
        ),
    )
