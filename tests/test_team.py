"""Threads that share the panels of a matrix: the one that asks works along."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from corda_convert.linalg.threads import Team, take_threads


@pytest.fixture(params=[1, 2, 3])
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    try:
        with Team(torch.device("cpu")) as team:
            yield team
    finally:
        torch.set_num_threads(before)


def test_every_item_is_taken_once(team: Team) -> None:
    taken: list[int] = []
    team.all(taken.append, range(100))
    assert sorted(taken) == list(range(100))


def test_slices_cover_what_they_are_asked_to(team: Team) -> None:
    rows = torch.zeros(1000)
    team.each(lambda part: rows[part].add_(1.0), 1000, 64)
    assert torch.equal(rows, torch.ones(1000))


def test_nothing_to_do_is_no_fault(team: Team) -> None:
    team.all(lambda item: pytest.fail("was called"), [])


@pytest.mark.parametrize("bad", range(6))
def test_the_error_of_an_item_is_raised_whichever_thread_took_it(team: Team, bad: int) -> None:
    class Refused(Exception):
        pass

    def refuse(item: int) -> None:
        if item == bad:
            raise Refused

    for _ in range(20):
        with pytest.raises(Refused):
            team.all(refuse, range(6))
    done: list[int] = []
    team.all(done.append, range(6))
    assert sorted(done) == list(range(6))


def test_nobody_works_on_after_an_error_was_raised(team: Team) -> None:
    ended = threading.Event()
    late: list[int] = []

    def slow(item: int) -> None:
        if item == 0:
            raise ValueError("the first")
        time.sleep(0.05)
        if ended.is_set():
            late.append(item)

    with pytest.raises(ValueError, match="the first"):
        team.all(slow, range(8))
    ended.set()
    time.sleep(0.1)
    assert not late


def test_inside_torch_takes_one_thread_and_outside_as_many_as_before() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    with Team(torch.device("cpu")) as team:
        team.all(lambda _: seen.append(torch.get_num_threads()), range(50))
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_a_thread_keeps_its_number_whatever_another_one_sets_before_it_computes() -> None:
    before = torch.get_num_threads()
    taken, may_go_on = threading.Event(), threading.Event()
    seen: list[int] = []

    def compute() -> None:
        take_threads(2)
        taken.set()
        may_go_on.wait(60)
        torch.ones(300_000).exp()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    taken.wait(60)
    torch.set_num_threads(3)
    may_go_on.set()
    thread.join()
    torch.set_num_threads(before)
    assert seen == [2]
