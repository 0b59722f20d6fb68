"""Where a step lies in a run of several stages, and the learning rate there."""

from __future__ import annotations

import math

import pytest

from hardmix.train.schedule import Place, Schedule, Stage, lr_factor


def test_lr_factor_warms_up_and_ends_near_zero() -> None:
    factors = [lr_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors[10] == pytest.approx(1.0)
    assert factors == [*factors[:10], *sorted(factors[10:], reverse=True)]
    assert 0.0 < factors[-1] < 1e-3
    assert lr_factor(0, 1, 0) == 1.0


def test_stages_follow_one_another_and_each_has_its_own_samples() -> None:
    schedule = Schedule([Stage(2, 50, 1.0), Stage(3, 25, 0.1)], batch_size=10, warmup_epochs=0.0)
    assert schedule.steps_per_epoch == [5, 2]
    assert (schedule.steps, schedule.epochs) == (16, 5)
    assert schedule.ends == {10, 16}
    places = [schedule.place(step) for step in range(schedule.steps)]
    assert places[0] == Place(0, 0, 0)
    assert places[9] == Place(0, 1, 4)
    assert places[10] == Place(1, 2, 0)
    assert places[15] == Place(1, 4, 1)
    ends = [step for step in range(1, 17) if schedule.epochs_done(step).is_integer()]
    assert ends == [5, 10, 12, 14, 16]
    assert schedule.epochs_done(16) == 5.0


def test_every_stage_warms_up_and_falls_by_itself() -> None:
    schedule = Schedule([Stage(2, 50, 1.0), Stage(3, 25, 0.1)], batch_size=10, warmup_epochs=1.0)
    rates = [schedule.lr(step) for step in range(schedule.steps)]
    assert rates[:10] == [lr_factor(step, 10, 5) for step in range(10)]
    assert rates[10:] == [0.1 * lr_factor(step, 6, 2) for step in range(6)]


def test_a_batch_is_no_larger_than_the_smallest_stage() -> None:
    schedule = Schedule([Stage(1, 50, 1.0), Stage(1, 7, 1.0)], batch_size=10, warmup_epochs=0.0)
    assert schedule.batch_size == 7
    assert schedule.steps_per_epoch == [7, 1]


def test_seven_sixteenths_of_a_cosine_end_at_a_fifth() -> None:
    schedule = Schedule([Stage(4, 100, 0.5)], 10, 1.0, "cosine-7/16")
    assert schedule.lr(4) == pytest.approx(0.25)  # half-way through the warm-up
    assert schedule.lr(10) == pytest.approx(0.5)
    for step in (15, 25, 39):
        assert schedule.lr(step) == pytest.approx(0.5 * math.cos(7 * math.pi * (step - 10) / 30 / 16))
    assert lr_factor(100, 100, 0, "cosine-7/16") == pytest.approx(0.19509, abs=1e-5)
    assert lr_factor(100, 100, 0) == pytest.approx(0.0)
