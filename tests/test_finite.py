"""Whether a tensor holds neither NaN nor Inf."""

import pytest
import torch

from corda_convert.linalg.finite import is_finite

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 300), (3, 5, 11)])
def test_finite_numbers_up_to_the_largest_are_finite(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(-tensor)
    assert is_finite(tensor.T if tensor.ndim == 2 else tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_is_seen_wherever_it_stands(dtype: torch.dtype, bad: float) -> None:
    for place in range(0, 1000, 37):
        tensor = torch.randn(1000, generator=torch.Generator().manual_seed(place)).to(dtype)
        tensor[place] = bad
        assert not is_finite(tensor)
        assert not is_finite(tensor.view(10, 100).T)
        assert not is_finite(tensor[place : place + 1])


def test_nothing_and_whole_numbers_are_finite() -> None:
    assert is_finite(torch.empty(0, 4))
    assert is_finite(torch.tensor([True, False]))
    assert is_finite(torch.arange(5))
