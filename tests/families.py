"""Tiny random models of the architectures whose checkpoints differ: names, fused experts, transposed and split tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 48}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, tie_word_embeddings=False))


def _llama_tied() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, tie_word_embeddings=True))


def _gpt2() -> PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "vocab_size": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def _qwen3_moe() -> PreTrainedModel:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**DECODER, **EXPERTS, head_dim=8))


def _mixtral() -> PreTrainedModel:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, **LOCAL_EXPERTS))


def _deepseek_v3() -> PreTrainedModel:
    attention = {"q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    sizes = {**DECODER, "num_key_value_heads": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes, **attention, **experts))


def _gpt_oss() -> PreTrainedModel:
    # d_in and d_out of gate_up_proj differ, those of down_proj are equal.
    sizes = {**DECODER, "intermediate_size": 32, "head_dim": 8}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, **LOCAL_EXPERTS))


def _llama4_sizes() -> dict[str, Any]:
    return {
        **DECODER,
        "intermediate_size_mlp": 40,
        "head_dim": 8,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 1,
    }


def _llama4_text() -> PreTrainedModel:
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**_llama4_sizes()))


def _llama4() -> PreTrainedModel:
    vision = {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    config = transformers.Llama4Config(text_config=_llama4_sizes(), vision_config=vision)
    return transformers.Llama4ForConditionalGeneration(config)


def _gemma3() -> PreTrainedModel:
    text = {**DECODER, "head_dim": 8}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=60, boi_token_index=61,
        eoi_token_index=62,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def _llava() -> PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**DECODER),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=60,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _qwen2_5_vl() -> PreTrainedModel:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**DECODER, "rope_parameters": MROPE}, vision_config=QWEN_VISION, image_token_id=60,
        video_token_id=61, vision_start_token_id=62, vision_end_token_id=63, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl_moe() -> PreTrainedModel:
    vision = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**DECODER, **EXPERTS, "head_dim": 8, "rope_parameters": MROPE}, vision_config=vision,
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def _olmoe() -> PreTrainedModel:
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2))


def _granitemoe() -> PreTrainedModel:
    return transformers.GraniteMoeForCausalLM(transformers.GraniteMoeConfig(**DECODER, **LOCAL_EXPERTS))


def _bert() -> PreTrainedModel:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**COMMON, intermediate_size=48))


def _bert_masked() -> PreTrainedModel:
    return transformers.BertForMaskedLM(transformers.BertConfig(**COMMON, intermediate_size=48))


def _t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def _whisper() -> PreTrainedModel:
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(
        **sizes, **sides, **tokens, max_source_positions=16, max_target_positions=16, begin_suppress_tokens=None
    )
    return transformers.WhisperForConditionalGeneration(config)


def _dinov2() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=2, use_swiglu_ffn=True))


def _olmo_hybrid() -> PreTrainedModel:
    layers = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
    }
    config = transformers.OlmoHybridConfig(**DECODER, **layers, linear_num_value_heads=2, linear_value_head_dim=16)
    return transformers.OlmoHybridForCausalLM(config)


def _molmo2_text() -> PreTrainedModel:
    return transformers.Molmo2TextModel(transformers.Molmo2TextConfig(**DECODER, head_dim=8, additional_vocab_size=4))


def _nomic_bert() -> PreTrainedModel:
    return transformers.NomicBertForMaskedLM(transformers.NomicBertConfig(**COMMON, intermediate_size=48))


def _hrm_text() -> PreTrainedModel:
    return transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**COMMON, intermediate_size=48, head_dim=8))


def _ernie4_5_vl_moe() -> PreTrainedModel:
    experts = {"moe_intermediate_size": [24, 16], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    text = {**DECODER, **experts, "rope_parameters": MROPE, "mlp_layer_types": ["dense", "sparse"]}
    sizes = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size")
    vision = {name: QWEN_VISION[name] for name in sizes}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config)


def _aria() -> PreTrainedModel:
    text = {**DECODER, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    vision = {**VISION, "model_type": "idefics3_vision"}
    config = transformers.AriaConfig(text_config=text, vision_config=vision, projector_patch_to_query_dict={4: 4})
    return transformers.AriaForConditionalGeneration(config)


def _inkling2() -> PreTrainedModel:
    return transformers.Inkling2ForCausalLM(transformers.Inkling2TextConfig(**DECODER))


_BUILDERS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama_tied": _llama_tied,
    "gpt2": _gpt2,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4_text,
    "llama4": _llama4,
    "gemma3": _gemma3,
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "olmoe": _olmoe,
    "granitemoe": _granitemoe,
    "bert": _bert,
    "bert_masked": _bert_masked,
    "t5": _t5,
    "whisper": _whisper,
    "dinov2": _dinov2,
}

_RARE_BUILDERS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "olmo_hybrid": _olmo_hybrid,
    "molmo2_text": _molmo2_text,
    "nomic_bert": _nomic_bert,
    "hrm_text": _hrm_text,
    "ernie4_5_vl_moe": _ernie4_5_vl_moe,
    "aria": _aria,
    "inkling2": _inkling2,
}

FAMILIES: tuple[str, ...] = tuple(_BUILDERS)
RARE_FAMILIES: tuple[str, ...] = tuple(_RARE_BUILDERS)
"""Further ones for a conversion that no other has; that of inkling2 is none of whole rows."""


def tiny(family: str) -> PreTrainedModel:
    """A random float32 model in evaluation mode; the same for each call."""
    torch.manual_seed(0)
    return {**_BUILDERS, **_RARE_BUILDERS}[family]().eval()
