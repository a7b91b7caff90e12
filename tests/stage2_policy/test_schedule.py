from __future__ import annotations

import pytest

from pipeline.contracts.errors import InputError
from stage2_policy.objectives import OBJECTIVES
from stage2_policy.schedule import Phase, Schedule

PHASES = (Phase("tilted_nll", 1e-3, share=3), Phase("tilted_kl", 2e-4, share=1))


def test_phases_take_their_shares_of_the_steps() -> None:
    schedule = Schedule(PHASES, steps=40, warmup_ratio=0.1)

    assert schedule.starts == (0, 30)
    assert schedule.objective(29) is OBJECTIVES["tilted_nll"]
    assert schedule.objective(30) is OBJECTIVES["tilted_kl"]
    assert schedule.peak_rate == 1e-3
    assert schedule.uses_reference


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1])
def test_each_phase_warms_up_to_its_rate_and_falls_to_nothing(warmup_ratio: float) -> None:
    schedule = Schedule(PHASES, steps=400, warmup_ratio=warmup_ratio)
    for (start, end), phase in zip(((0, 300), (300, 400)), PHASES, strict=True):
        rates = [schedule.rate(step) for step in range(start, end)]
        top = round(warmup_ratio * len(rates))
        assert rates[top] == max(rates) == phase.learning_rate
        assert rates[:top] == sorted(rates[:top])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert 0 < rates[-1] < 0.001 * phase.learning_rate
        assert rates[0] > 0


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_every_phase_has_a_step_however_small_its_share(steps: int) -> None:
    schedule = Schedule((Phase("dpo", 1.0, share=1e-6), Phase("tilted_kl", 2.0)), steps=steps, warmup_ratio=0.05)

    assert schedule.starts == (0, 1)
    assert [schedule.objective(step) is OBJECTIVES["dpo"] for step in range(steps)] == [True] + [False] * (steps - 1)


def test_more_phases_than_steps_are_refused() -> None:
    with pytest.raises(InputError, match="the run has 1 steps and 2 phases; each phase needs at least one step"):
        Schedule(PHASES, steps=1, warmup_ratio=0.0)
