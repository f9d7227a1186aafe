"""Ranks from a budget: against every possible choice in small cases, and end to end beside PEFT and a float64 SVD."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from corda_convert.linalg.allocation import Components, allocate, uniform_rank

# The choice by itself

SHARES = st.lists(st.integers(0, 1000), min_size=1, max_size=4)


@st.composite
def layers(draw: st.DrawFn, *, largest_first: bool) -> list[Components]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        shares = sorted(draw(SHARES), reverse=largest_first)
        least = draw(st.integers(0, min(2, len(shares))))
        found.append(Components([share / 1024 for share in shares], cost=draw(st.integers(1, 9)), least=least))
    return found


def every_choice(spectra: Sequence[Components]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(each.least, len(each.shares) + 1) for each in spectra))


def spent(spectra: Sequence[Components], counts: Sequence[int]) -> int:
    return sum(each.cost * count for each, count in zip(spectra, counts, strict=True))


def taken(spectra: Sequence[Components], counts: Sequence[int]) -> float:
    """The sum of shares, exact for multiples of 1/1024."""
    return sum(sum(each.shares[:count]) for each, count in zip(spectra, counts, strict=True))


def next_cost(spectra: Sequence[Components], counts: Sequence[int]) -> list[int]:
    """What one more component of each layer costs that has one."""
    return [each.cost for each, count in zip(spectra, counts, strict=True) if count < len(each.shares)]


@given(layers(largest_first=True), st.integers(0, 60))
def test_the_largest_are_the_best_choice_up_to_one_component(spectra: list[Components], more: int) -> None:
    budget = spent(spectra, [each.least for each in spectra]) + more
    counts = allocate(spectra, budget, end="top")
    best = max(taken(spectra, choice) for choice in every_choice(spectra) if spent(spectra, choice) <= budget)
    missed = [each.shares[count] for each, count in zip(spectra, counts, strict=True) if count < len(each.shares)]
    largest = max((each.shares[each.least] for each in spectra if each.least < len(each.shares)), default=0.0)
    assert all(each.least <= count <= len(each.shares) for each, count in zip(spectra, counts, strict=True))
    assert best - (largest if missed else 0.0) <= taken(spectra, counts) <= best
    assert spent(spectra, counts) <= budget
    assert all(cost > budget - spent(spectra, counts) for cost in next_cost(spectra, counts))


@given(layers(largest_first=True), st.integers(0, 60))
def test_no_other_choice_of_as_many_parameters_takes_more(spectra: list[Components], more: int) -> None:
    """Where all components cost the same there is no last one that does not fit."""
    alike = [Components(each.shares, 5, each.least) for each in spectra]
    budget = spent(alike, [each.least for each in alike]) + more
    counts = allocate(alike, budget, end="top")
    choices = [choice for choice in every_choice(alike) if spent(alike, choice) <= budget]
    assert taken(alike, counts) == max(taken(alike, choice) for choice in choices)
    assert spent(alike, counts) == max(spent(alike, choice) for choice in choices)


@given(layers(largest_first=False), st.integers(0, 60))
def test_the_smallest_take_as_little_as_can_be_for_what_is_spent(spectra: list[Components], more: int) -> None:
    alike = [Components(each.shares, 5, each.least) for each in spectra]
    budget = spent(alike, [each.least for each in alike]) + more
    counts = allocate(alike, budget, end="bottom")
    choices = [choice for choice in every_choice(alike) if spent(alike, choice) <= budget]
    assert spent(alike, counts) == max(spent(alike, choice) for choice in choices)
    same = [choice for choice in choices if spent(alike, choice) == spent(alike, counts)]
    assert taken(alike, counts) == min(taken(alike, choice) for choice in same)


def test_what_counts_is_the_share_of_each_parameter() -> None:
    """A component of 0.3 for 3 parameters comes after one of 0.2 for 1, and before one of 0.05 for 1."""
    dear, cheap = Components([0.3, 0.1], 3), Components([0.2, 0.05, 0.04], 1)
    assert [allocate([dear, cheap], budget, end="top") for budget in (1, 4, 5)] == [[0, 1], [1, 1], [1, 2]]
    dear, cheap = Components([0.1, 0.3], 3), Components([0.04, 0.05, 0.2], 1)
    assert [allocate([dear, cheap], budget, end="bottom") for budget in (3, 5, 8)] == [[1, 0], [1, 2], [2, 2]]


def test_what_is_too_dear_leaves_the_rest_to_others() -> None:
    assert allocate([Components([0.9, 0.8], 10), Components([0.01] * 9, 2)], 15, end="top") == [1, 2]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 500))
def test_the_uniform_rank_is_the_largest_that_is_paid(shapes: list[tuple[int, int]], budget: int) -> None:
    def cost(rank: int) -> int:
        return sum(min(rank, d_out, d_in) * (d_out + d_in) for d_out, d_in in shapes)

    rank = uniform_rank(shapes, budget)
    assert cost(rank) <= budget
    assert cost(rank + 1) > budget or rank == max(min(shape) for shape in shapes)
