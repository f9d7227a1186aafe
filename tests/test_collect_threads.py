"""What is summed by `collect` has the same bits whatever the number of threads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from building import FIXTURES, MODEL

from corda_convert.corpus import CorpusOptions
from corda_convert.linalg.gram import Spare
from corda_convert.linalg.threads import Team
from corda_convert.operations.collect import collect
from corda_convert.operations.collect_options import CollectOptions
from corda_convert.operations.collect_statistics import InputStatistics, Precision
from corda_convert.operations.options import RunOptions

pytestmark = pytest.mark.filterwarnings("ignore")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def summed(
    inputs: torch.Tensor, precision: Precision, *, groups: int = 1, is_told: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """In groups of so many samples; `is_told` says which is the last one of each."""
    with Team(CPU) as team:
        sums = InputStatistics("layer", inputs.shape[-1], CPU, "peft", precision, team, Spare())
        for place, sample in enumerate(inputs.split(1), 1):
            is_last = place % groups == 0 or place == len(inputs)
            sums.add(sample, (0,), ends_group=is_told and is_last)
            if is_last:
                sums.end_group()
        return sums.covariance(len(inputs)), sums.mean_abs()


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_it_does_not_matter_when_a_group_is_added(groups: int, dtype: torch.dtype, precision: Precision) -> None:
    inputs = torch.randn(5, 300, 700, generator=torch.Generator().manual_seed(groups)).to(dtype)
    later, now = (summed(inputs, precision, groups=groups, is_told=is_told) for is_told in (False, True))
    assert torch.equal(later[0], now[0])
    assert torch.equal(later[1], now[1])


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [40, 1000])
def test_sums_of_wide_inputs_do_not_depend_on_threads(tokens: int, dtype: torch.dtype, precision: Precision) -> None:
    inputs = torch.randn(3, tokens, 1100, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    exact = inputs.double() / inputs.double().amax(dim=(1, 2), keepdim=True)
    expected = torch.einsum("stc,std->cd", exact, exact) / 3
    torch.set_num_threads(1)
    first = summed(inputs, precision)
    assert (first[0] - expected).abs().max() < 1e-6 * expected.abs().max()
    assert torch.allclose(first[1].double(), inputs.double().abs().mean(dim=(0, 1)), rtol=1e-6)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        again = summed(inputs, precision)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


def test_a_file_has_the_same_bytes_for_one_and_two_threads(tmp_path: Path) -> None:
    """Of a layer before which torch multiplies no matrices: its own products may depend on its threads."""
    text = CorpusOptions(files=(FIXTURES / "data" / "task.jsonl",), field=("question",), samples=12, seq_len=160)
    options = CollectOptions(text, targets=("layers.0.self_attn.q_proj",))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        collect(MODEL, output=tmp_path / f"{threads}.safetensors", options=options, run=RunOptions(device="cpu"))
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
