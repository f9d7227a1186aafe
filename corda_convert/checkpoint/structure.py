"""What the model's own class says of a checkpoint: parameters, module types, names at run time and on disk, ties.

Built on the meta device from `config.json` alone: no weight is read, no remote code runs. Since transformers 5 the
names at run time (which adapters carry) can differ from those on disk, and tensors are stacked, joined or transposed on
loading; the class's own conversion mapping tells.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from corda_convert.checkpoint.conversions import NotFollowed, follow, stack_layout
from corda_convert.checkpoint.layout import DiskLayout, whole
from corda_convert.checkpoint.naming import Naming

LayerKind = Literal["linear", "conv1d", "embedding", "conv", "attention", "parameter", "other"]
"""The type of the module that owns a parameter.

`linear` stores its weight as (d_out, d_in), `conv1d` (transformers' `Conv1D`) as (d_in, d_out), `conv` (torch's Conv1d,
Conv2d, Conv3d) as (d_out, d_in / groups, *kernel); `attention` is torch's `MultiheadAttention`, which owns
`in_proj_weight` (its `out_proj` is a Linear). In all other modules a matrix or a stack of matrices (fused experts, routers)
is a `parameter`, the rest (norms, buffers) is `other`.
"""

CLASSIFIER_HEADS = ("score", "classifier", "qa_outputs")
"""Heads of transformers' classification models, which PEFT trains whole and leaves out of "all-linear", too."""

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
"""The transformers classes under which an adapter may have been trained, besides the one that the config names."""


class Shaped(Protocol):
    """What is needed to know of a tensor on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter, or a buffer that checkpoints hold, at run time.

    Attributes:
        shape: its shape in the model.
        kind: the type of its module.
        is_transposed: whether its module says that it stores its stack of matrices as (experts, d_in, d_out).
    """

    shape: tuple[int, ...]
    kind: LayerKind
    is_transposed: bool = False

    @property
    def is_stack(self) -> bool:
        """Whether it holds one matrix for each expert: (E, d1, d2)."""
        return self.kind == "parameter" and len(self.shape) == 3


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """The module tree behind a checkpoint.

    Attributes:
        class_name: the transformers class that was built.
        layers: each module path at run time that owns a `weight`, and its kind.
        run_time_names: disk tensor name → run-time parameter name, for tensors that the class knows and takes as is.
        converted: disk tensor names that the class fuses or reshapes on loading (MoE experts and the like).
        output_embedding: module path of the language-model head, where there is one.
        ties: run-time parameter name → the parameter that it is tied to.
        base_prefix: the attribute under which the headless model stands (`model`, `transformer`).
        parameters: run-time name → parameter, in the order of the model.
        layouts: disk tensor name → the parameters that it is made of, for every tensor that the class knows.
        unsupported: tensors that are in no layout since their conversion cannot be followed → the reason.
        naming: the model's renamings.
        ties_are_forced: whether the class ties its head whatever `tie_word_embeddings` says (T5 and its like, which read
            something else from it). A head of its own on disk is then still loaded as such.
    """

    class_name: str
    layers: dict[str, LayerKind]
    run_time_names: dict[str, str]
    converted: frozenset[str]
    output_embedding: str | None
    ties: dict[str, str] = field(default_factory=dict)
    base_prefix: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    layouts: dict[str, DiskLayout] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    naming: Naming | None = None
    ties_are_forced: bool = False

    def linear_modules(self) -> tuple[str, ...]:
        """Every Linear and Conv1D whose weight lies on disk as it is, but the model's head, in module order."""
        on_disk = set(self.run_time_names.values())
        return tuple(
            module
            for module, kind in self.layers.items()
            if kind in ("linear", "conv1d")
            and module not in (self.output_embedding, *CLASSIFIER_HEADS)
            and f"{module}.weight" in on_disk
        )

    def expert_stacks(self) -> tuple[str, ...]:
        """The parameters that hold a matrix for each of several experts, in the order of their registration."""
        return tuple(name for name, found in self.parameters.items() if found.is_stack and min(found.shape) > 1)

    def rename(self, name: str) -> str:
        """A parameter's older or disk name as the model renames it on loading; nothing is fused or split.

        The name itself where no renaming applies.
        """
        return name if self.naming is None else self.naming.rename(name)

    def disk_name(self, run_time_name: str) -> str | None:
        """The disk name under which a parameter that is not on disk, as a tied head, would be saved.

        None if no name is known that loads as this parameter.
        """
        return None if self.naming is None else self.naming.disk_name(run_time_name)


def read_structure(
    folder: Path, config: dict[str, Any] | None, specs: Mapping[str, Shaped], wanted: Collection[str] = ()
) -> ModelStructure | None:
    """Builds the model's class without weights and maps the checkpoint's names to its own.

    Args:
        folder: the checkpoint's folder.
        config: its `config.json`.
        specs: its tensors by name, for their shapes.
        wanted: module paths or parameter names that an adapter has. Where the class that the config names lacks some,
            the class of `AUTO_CLASSES` that has the most is taken.

    Returns None where no class can be built: no config, an architecture that transformers does not know, or one that
    needs remote code. The caller then has only names and shapes to go by.
    """
    if config is None or "model_type" not in config:
        return None
    with _quiet(), _no_garbage_collection():
        model = _choose(folder, config, specs, wanted)
        return None if model is None else _describe(model, specs)


def structure_of(model: Any, specs: Mapping[str, Shaped]) -> ModelStructure:
    """The structure of a model that is built already."""
    with _quiet(), _no_garbage_collection():
        return _describe(model, specs)


def _choose(folder: Path, config: dict[str, Any], specs: Mapping[str, Shaped], wanted: Collection[str]) -> Any:
    """The model of the class that has the most of the wanted names, the first of equals."""
    best, most = None, -1
    try:
        for build in _candidates(folder, config):
            model = build()
            resolved = _count_resolved(wanted, model, specs) if wanted else 0
            if resolved > most:
                best, most = model, resolved
            if most == len(wanted):
                break
    except Exception:  # any model class may raise anything; without a structure the stricter fallback applies
        logging.getLogger(__name__).debug("no model class for %s", folder, exc_info=True)
    return best


def _candidates(folder: Path, config: dict[str, Any]) -> Iterator[Callable[[], Any]]:
    """The classes that may stand behind the config, the likeliest first, ready to be built without weights."""
    import torch
    import transformers

    def build(model_class: Any) -> Any:
        with torch.device("meta"):
            return model_class(model_config)

    model_config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    architectures = config.get("architectures") or []
    named = getattr(transformers, str(architectures[0]), None) if architectures else None
    if named is not None and hasattr(named, "_from_config"):
        yield partial(build, named)
    seen = {named}
    for auto_name in AUTO_CLASSES:
        mapping = getattr(getattr(transformers, auto_name, None), "_model_mapping", {})
        found = mapping.get(type(model_config), ())
        for model_class in found if isinstance(found, (list, tuple)) else (found,):
            if model_class not in seen:
                seen.add(model_class)
                yield partial(build, model_class)


def _count_resolved(wanted: Collection[str], model: Any, specs: Mapping[str, Shaped]) -> int:
    naming = Naming(model, specs)
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}

    def is_known(name: str) -> bool:
        if name in modules or name in naming.known:
            return True
        candidates = (name, f"{name}.weight")
        return any(candidate in specs or naming.rename(candidate) in naming.known for candidate in candidates)

    return sum(is_known(name) for name in wanted)


def _describe(model: Any, specs: Mapping[str, Shaped]) -> ModelStructure:
    naming = Naming(model, specs)
    parameters = _parameters(model)
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    layouts, unsupported = _layouts(naming, parameters, specs)
    return ModelStructure(
        class_name=type(model).__name__,
        layers={name: _kind_of(module) for name, module in modules.items() if "weight" in dict(_direct(module))},
        run_time_names=naming.run_time_names,
        converted=frozenset(name for conversion in naming.conversions for name in conversion.disk_names),
        output_embedding=next((name for name, module in modules.items() if module is head), None),
        ties={str(name): str(target) for name, target in (getattr(model, "all_tied_weights_keys", None) or {}).items()},
        base_prefix=str(model.base_model_prefix or ""),
        parameters=parameters,
        layouts=layouts,
        unsupported=unsupported,
        naming=naming,
        ties_are_forced=_ties_are_forced(model),
    )


def _ties_are_forced(model: Any) -> bool:
    untied = type(model.config).from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    return bool(getattr(untied, "tie_word_embeddings", False))


def _direct(module: Any) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(recurse=False)


def _kind_of(module: Any) -> LayerKind:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    types: tuple[tuple[Any, LayerKind], ...] = (
        (nn.Linear, "linear"),
        (Conv1D, "conv1d"),
        (nn.Embedding, "embedding"),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
        (nn.MultiheadAttention, "attention"),
    )
    return next((kind for module_type, kind in types if isinstance(module, module_type)), "other")


def _parameters(model: Any) -> dict[str, Parameter]:
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Parameter] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        module = modules[name.rpartition(".")[0]]
        kind = _kind_of(module)
        if kind == "other" and tensor.ndim >= 2 and tensor.requires_grad:
            kind = "parameter"
        found[name] = Parameter(tuple(tensor.shape), kind, bool(getattr(module, "is_transposed", False)))
    return found


def _layouts(
    naming: Naming, parameters: Mapping[str, Parameter], specs: Mapping[str, Shaped]
) -> tuple[dict[str, DiskLayout], dict[str, str]]:
    """The layouts of all tensors that the model knows, and the tensors that have none with the reason."""
    layouts: dict[str, DiskLayout] = {}
    for name, run_time_name in naming.run_time_names.items():
        shape = specs[name].shape
        is_stack = parameters[run_time_name].is_stack and len(shape) == 3
        layouts[name] = stack_layout(run_time_name, shape) if is_stack else whole(run_time_name, shape)
    unsupported: dict[str, str] = {}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    stacks = frozenset(name for name, parameter in parameters.items() if parameter.is_stack)
    for conversion in naming.conversions:
        sources = {name: specs[name].shape for name in conversion.disk_names}
        try:
            layouts |= follow(conversion, sources, shapes, stacks)
        except NotFollowed as error:
            operations = ", ".join(type(operation).__name__ for operation in conversion.converter.operations)
            reason = f"transformers loads it into {conversion.parameter} with {operations}: {error}"
            unsupported |= dict.fromkeys(sources, reason)
    return layouts, unsupported


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' advice (about generation, attention, missing extras) off the user's screen."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pauses it: to look again and again through a large model's many small objects takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
