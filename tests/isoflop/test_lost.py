"""A run is lost when its training loss rises far above what it had been."""

import math

import numpy as np
import pytest

from mixture_of_depths.isoflop.lost import LOST_RISE, loss_rise, lost


def falling(steps: int = 1000) -> np.ndarray:
    """A loss that falls, with batches that scatter."""
    return 2 + 3 * np.exp(-np.arange(steps) / 100) + np.random.default_rng(0).normal(0, 0.1, steps)


def test_a_loss_that_falls_with_scattering_batches_does_not_rise() -> None:
    assert 0 <= loss_rise(falling().tolist()) < LOST_RISE / 3


@pytest.mark.parametrize("height", [0.5, 2.0])
def test_the_rise_is_told_whether_the_run_recovers_or_not(height: float) -> None:
    bump = np.zeros(1000)
    bump[600:700] = height
    step = np.zeros(1000)
    step[600:] = height
    assert loss_rise((falling() + bump).tolist()) == pytest.approx(height, abs=0.1)
    assert loss_rise((falling() + step).tolist()) == pytest.approx(height, abs=0.1)


def test_a_single_bad_batch_is_no_rise_and_neither_is_one_in_the_warm_up() -> None:
    losses = falling()
    losses[500] += 2
    losses[25:45] += 5
    assert loss_rise(losses.tolist()) < LOST_RISE


@pytest.mark.parametrize("steps", [0, 1, 4, 19, 20, 60])
def test_a_short_run_has_a_rise_as_well(steps: int) -> None:
    rise = loss_rise([float(step) for step in range(steps)])
    assert math.isfinite(rise)
    assert rise == max(0, 5 * (steps // 5 - 4))


def test_lost_runs_are_named() -> None:
    records = [{"name": "b", "loss_rise": LOST_RISE}, {"name": "a", "loss_rise": 1.0}, {"name": "c", "loss_rise": 0.1}]
    assert lost([*records, {"name": "old"}]) == ["a", "b"]
    assert lost(records[2:]) == []
