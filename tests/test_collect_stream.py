"""The layer stream against the whole model, as transformers loads and runs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.errors import NotFinite, UnsupportedInput
from corda_convert.streaming.architecture import build_architecture
from corda_convert.streaming.stream import LayerStream, make_batches

pytestmark = pytest.mark.filterwarnings("ignore")

DECODER = families.DECODER


def _gemma3_text() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {**DECODER, "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 5, "layer_types": kinds}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))


def _opt() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4, "vocab_size": 64}
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=16)
    )


def _of(class_name: str, config_name: str, **sizes: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        return getattr(transformers, class_name)(getattr(transformers, config_name)(**sizes))

    return build


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _of("LlamaForCausalLM", "LlamaConfig", **DECODER, tie_word_embeddings=True),
    "qwen3": _of("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=8),
    "mistral": _of("MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=5),
    "gemma3": _gemma3_text,
    "gpt2": families._gpt2,
    "qwen3_moe": families._qwen3_moe,
    "opt": _opt,
    "bert": _of("BertForMaskedLM", "BertConfig", **families.COMMON, intermediate_size=48),
    "bloom": _of("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    "llava": families._llava,
}


def _saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


def _samples(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 55, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_stream_gives_the_bits_of_the_whole_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = _saved(name, tmp_path, dtype)
    whole = type(MODELS[name]()).from_pretrained(folder, dtype=dtype).eval()
    batches = make_batches(_samples(12, 12, 9, 12, 12, 12), 24)
    assert [batch.numbers for batch in batches] == [(0, 1), (3, 4), (5,), (2,)]
    offload = tmp_path / "states" if name == "llama" else None
    stream = LayerStream(
        build_architecture(read_checkpoint(folder)), batches, device=torch.device("cpu"), offload=offload
    )
    stream.embed()
    for index in range(len(stream.blocks.modules)):
        stream.run_block(index)
    for place, batch in enumerate(batches):
        with torch.no_grad():
            expected = whole(input_ids=batch.input_ids).logits
        assert torch.equal(stream.logits(place), expected)
    assert not stream._is_embedding_needed
    stream.close()


def test_only_one_block_is_loaded_at_a_time(tmp_path: Path) -> None:
    folder = _saved("llama", tmp_path)
    architecture = build_architecture(read_checkpoint(folder))
    stream = LayerStream(architecture, make_batches(_samples(8), 8), device=torch.device("cpu"))
    loaded: list[set[str]] = []

    def note(_place: int, _states: torch.Tensor) -> None:
        loaded.append({name for name, parameter in architecture.model.named_parameters() if not parameter.is_meta})

    stream.embed()
    for index in range(2):
        stream.run_block(index, note)
    for index, names in enumerate(loaded):
        assert {name.split(".")[2] for name in names if "layers" in name} == {str(index)}
        assert sum(architecture.model.get_parameter(name).shape[0] > 1 for name in names if "layers" not in name) == 0


def test_nan_is_refused_with_its_block_and_sample(tmp_path: Path) -> None:
    folder = _saved("llama", tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stream = LayerStream(
        build_architecture(read_checkpoint(folder)), make_batches(_samples(8, 8), 8), device=torch.device("cpu")
    )
    stream.embed()
    stream.run_block(0)
    with pytest.raises(NotFinite, match=r"model\.layers\.1 gives NaN or Inf for sample 0"):
        stream.run_block(1)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedInput, match="an encoder and a decoder"):
        LayerStream(build_architecture(read_checkpoint(tmp_path)), [], device=torch.device("cpu"))


def test_a_lost_tensor_of_a_block_is_named_before_anything_runs(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = _saved("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        LayerStream(build_architecture(read_checkpoint(folder)), [], device=torch.device("cpu"))
