"""The structure of the commonest dense language models, told from the checkpoint alone.

Importing transformers to build a Llama on the meta device takes longer than folding an adapter into a gigabyte of it. In these
families every matrix but the embedding is a Linear, and the names on disk are those at run time. The tests compare
what is told here with what transformers' own classes say, family by family.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from corda_convert.checkpoint.layout import whole
from corda_convert.checkpoint.structure import LayerKind, ModelStructure, Parameter

DENSE_FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "cohere": "CohereForCausalLM",
}
"""`model_type` and the one class of it that is meant."""

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_NAME = re.compile(r"(model\.embed_tokens|model\.norm|lm_head|model\.layers\.\d+\.\w+(\.\w+)?)\.(weight|bias)")


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def dense_structure(
    config: Mapping[str, Any], specs: Mapping[str, _Shaped], wanted: Collection[str]
) -> ModelStructure | None:
    """The structure, where it follows from names and shapes and the wanted parameters are all there.

    None for every other family, class or name, for quantized models, and where the embedding or the head is wanted: whether
    those are tied, only the class knows.
    """
    architectures = [DENSE_FAMILIES.get(str(config.get("model_type")))]
    if config.get("architectures") != architectures or config.get("quantization_config"):
        return None
    if not all(_NAME.fullmatch(name) and len(ref.shape) <= 2 for name, ref in specs.items()):
        return None
    if not all(name in specs and name.rpartition(".")[0] not in (_EMBEDDING, _HEAD) for name in wanted):
        return None
    layers = {name.rpartition(".")[0]: _kind(name, ref) for name, ref in specs.items() if name.endswith(".weight")}
    return ModelStructure(
        class_name=str(architectures[0]),
        layers=layers,
        run_time_names={name: name for name in specs},
        converted=frozenset(),
        output_embedding=_HEAD,
        base_prefix="model",
        parameters={
            name: Parameter(ref.shape, layers.get(name.rpartition(".")[0], "other")) for name, ref in specs.items()
        },
        layouts={name: whole(name, ref.shape) for name, ref in specs.items()},
    )


def _kind(name: str, ref: _Shaped) -> LayerKind:
    if name == f"{_EMBEDDING}.weight":
        return "embedding"
    return "linear" if len(ref.shape) == 2 else "other"
