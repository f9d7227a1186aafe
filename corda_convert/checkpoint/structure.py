"""What the model's own class says of a checkpoint: module types, run-time names, ties.

Built on the meta device from `config.json` alone: no weight is read, no remote code runs. Since transformers 5 the
names at run time (which adapters carry) can differ from those on disk; the class's own conversion mapping tells.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from corda_convert.checkpoint.layout import DiskLayout, whole

LayerKind = Literal["linear", "conv1d", "embedding", "other"]
"""`linear` stores its weight as (d_out, d_in), `conv1d` (transformers' `Conv1D`) as (d_in, d_out)."""


CLASSIFIER_HEADS = ("score", "classifier", "qa_outputs")
"""Heads of transformers' classification models, which PEFT trains whole and leaves out of "all-linear", too."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter at run time."""

    shape: tuple[int, ...]
    kind: LayerKind
    is_transposed: bool = False


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

    def rename(self, name: str) -> str:
        return name

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


def read_structure(folder: Path, config: dict[str, Any] | None, disk_names: Iterable[str]) -> ModelStructure | None:
    """Builds the model's class without weights and maps the checkpoint's names to its own.

    Returns None where no class can be built: no config, an architecture that transformers does not know, or one that
    needs remote code. The caller then has only names and shapes to go by.
    """
    if config is None or "model_type" not in config:
        return None
    with _quiet():
        model = _build_on_meta(folder, config)
        return None if model is None else _describe(model, disk_names)


def _build_on_meta(folder: Path, config: dict[str, Any]) -> Any:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    try:
        model_config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        architectures = config.get("architectures") or []
        model_class = getattr(transformers, str(architectures[0]), None) if architectures else None
        with torch.device("meta"):
            if model_class is not None and hasattr(model_class, "_from_config"):
                return model_class(model_config)
            auto = AutoModelForCausalLM if type(model_config) in AutoModelForCausalLM._model_mapping else AutoModel
            return auto.from_config(model_config, trust_remote_code=False)
    except Exception:  # any model class may raise anything; without a structure the stricter fallback applies
        logging.getLogger(__name__).debug("no model class for %s", folder, exc_info=True)
        return None


def _describe(model: Any, disk_names: Iterable[str]) -> ModelStructure:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    def kind_of(module: nn.Module) -> LayerKind:
        if isinstance(module, nn.Linear):
            return "linear"
        if isinstance(module, Conv1D):
            return "conv1d"
        return "embedding" if isinstance(module, nn.Embedding) else "other"

    layers = {name: kind_of(module) for name, module in model.named_modules() if "weight" in dict(_direct(module))}
    head = model.get_output_embeddings()
    known = model.state_dict()
    run_time_names, converted = _map_names(model, disk_names)
    return ModelStructure(
        class_name=type(model).__name__,
        layers=layers,
        run_time_names=run_time_names,
        converted=frozenset(converted),
        output_embedding=next((name for name, module in model.named_modules() if module is head), None),
        ties={str(name): str(target) for name, target in (getattr(model, "all_tied_weights_keys", None) or {}).items()},
        base_prefix=str(model.base_model_prefix or ""),
        parameters={
            name: Parameter(tuple(p.shape), layers.get(name.rpartition(".")[0], "other"))
            for name, p in model.named_parameters()
        },
        layouts={disk: whole(name, disk_names[disk].shape) for disk, name in run_time_names.items()},
    )


def _direct(module: Any) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(recurse=False)


def _map_names(model: Any, disk_names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known = model.state_dict()
    names: dict[str, str] = {}
    converted: list[str] = []
    for name in sorted(disk_names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = name, None
        if renamed in known and pattern is not None:
            converted.append(name)
        elif renamed in known:
            names[name] = str(renamed)
    return names, converted


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
