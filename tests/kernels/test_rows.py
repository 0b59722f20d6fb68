"""Loops over rows: the cycles of a pairing, their division among threads, and the threads."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hardmix.kernels import rows as loops


@given(st.permutations(list(range(8))))
def test_cycles_of_a_permutation(partner: list[int]) -> None:
    cycles = loops.cycles_of(partner)
    assert cycles is not None
    assert sorted(i for cycle in cycles for i in cycle) == list(range(8))
    for cycle in cycles:
        assert [partner[i] for i in cycle] == [*cycle[1:], cycle[0]]


@pytest.mark.parametrize("partner", [[0, 0], [1, 1], [1, 2, 1], [2, 2, 0, 0]])
def test_rows_that_repeat_have_no_cycles(partner: list[int]) -> None:
    assert loops.cycles_of(partner) is None


@given(
    partner=st.integers(0, 9).flatmap(lambda n: st.permutations(list(range(n)))),
    parts=st.integers(1, 4),
    turns=st.randoms(use_true_random=False),
)
def test_each_row_meets_its_partner_as_it_was_whatever_thread_is_ahead(partner, parts, turns) -> None:
    cycles = loops.cycles_of(partner)
    rows = [[i] for i in range(len(partner))]
    waiting = loops.along_cycles(rows, cycles, list.copy, parts)
    assert len(waiting) <= parts
    seen = []
    while waiting:
        walk = turns.choice(waiting)
        step = next(walk, None)
        if step is None:
            waiting.remove(walk)
            continue
        i, other = step
        seen.append(i)
        assert other == [partner[i]]
        rows[i][:] = ["written"]
    assert sorted(seen) == list(range(len(partner)))


def test_a_divided_cycle_is_shared_evenly() -> None:
    cycles = loops.cycles_of([*range(1, 10), 0])
    assert cycles is not None
    walks = loops.along_cycles([[i] for i in range(10)], cycles, list.copy, 4)
    assert [len(list(walk)) for walk in walks] == [3, 3, 3, 1]


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (7, 3), (8, 4), (128, 3)])
def test_spans_cover_each_row_once(rows: int, parts: int) -> None:
    spans = loops.spans(rows, parts)
    assert len(spans) == parts
    assert [i for span in spans for i in range(rows)[span]] == list(range(rows))
    lengths = [len(range(rows)[span]) for span in spans]
    assert max(lengths) - min(lengths) <= 1


def test_small_batches_and_single_rows_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert loops.parts_of(torch.empty(128, 3, 32, 32)) == 1
    assert loops.parts_of(torch.empty(128, 3, 224, 224)) == 4
    assert loops.parts_of(torch.empty(2, 3, 2000, 2000)) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert loops.parts_of(torch.empty(128, 3, 224, 224)) == 1


def test_parts_run_side_by_side_and_record_no_gradients() -> None:
    meeting = threading.Barrier(3, timeout=30)
    recording = {}

    def work(part: int) -> None:
        meeting.wait()
        recording[part] = torch.is_grad_enabled()

    with torch.no_grad():
        loops.run_parts(work, [0, 1, 2])
    assert recording == {0: False, 1: False, 2: False}


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_of_a_part_is_raised_once_all_have_ended(failing: int) -> None:
    ended = []

    def work(part: int) -> None:
        if part == failing:
            raise ValueError(f"part {part}")
        ended.append(part)

    with pytest.raises(ValueError, match=f"part {failing}"):
        loops.run_parts(work, [0, 1, 2])
    assert sorted([*ended, failing]) == [0, 1, 2]
