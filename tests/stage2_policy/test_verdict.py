"""Whether training paid, from curves by hand and from a run that cannot pay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.contracts.training_verdict import TrainingVerdict
from stage2_policy.settings import TrainSettings
from stage2_policy.trainer import train_policy
from stage2_policy.verdict import judge_training

SETTINGS = TrainSettings(learning_rate=3e-4, epochs=2)


def judge(
    *fractions: float, error: float | None = 0.02, n_prompts: int = 40, kl: float = 0.1, gap: float = 0.5
) -> TrainingVerdict:
    """A run of ten steps a checkpoint, whose gaps are those of its closed fractions."""
    curve: list[dict[str, Any]] = [
        {"step": 0, "eval_loss": gap, "eval_kl": 0.0, "eval_closed_fraction": 0.0, "eval_closed_fraction_error": 0.0}
    ]
    for place, fraction in enumerate(fractions, start=1):
        entry = {
            "step": 10 * place,
            "eval_loss": gap * (1 - fraction),
            "eval_kl": kl,
            "eval_closed_fraction": fraction,
        }
        curve += [
            {"step": 10 * place, "loss": 1.0},
            entry | ({} if error is None else {"eval_closed_fraction_error": error}),
        ]
    curve.append({"step": 10 * len(fractions), "train_loss": 1.0})
    return judge_training(
        curve,
        best_step=10 * (1 + fractions.index(max(fractions))),
        settings=SETTINGS,
        n_train_prompts=160,
        n_responses=2560,
        n_held_out_prompts=n_prompts,
    )


def test_a_clear_gain_paid() -> None:
    found = judge(0.4, 0.7, 0.6)
    assert (found.verdict, found.closed_fraction, found.advice) == ("paid", 0.7, ())
    (reason,) = found.reasons
    assert reason == (
        "the kept checkpoint (step 20) closed 0.700 [0.650, 0.750] of the way to the tilted optimum on 40 held-out "
        "prompts"
    )


def test_the_interval_is_for_all_checkpoints_at_once() -> None:
    def half(*fractions: float) -> float:
        ends = judge(*fractions).closed_fraction_ci95
        assert ends is not None
        return (ends[1] - ends[0]) / 2 / 0.02

    # Student's t with 39 degrees of freedom at 0.975, and at 1 - 0.025 / 4.
    assert half(0.7) == pytest.approx(2.0227, abs=1e-4)
    assert half(0.4, 0.7, 0.6, 0.5) == pytest.approx(2.6187, abs=1e-3)


def test_the_best_of_many_that_chance_explains_is_undecided() -> None:
    single = judge(0.045)
    assert single.verdict == "paid"
    found = judge(-0.02, 0.045, 0.01, -0.03)
    assert found.verdict == "undecided"
    # (half the width / the estimate)^2 times as many prompts.
    assert found.advice[-1].startswith("to decide, hold out about 55 prompts instead of 40")


@pytest.mark.parametrize("fractions", [(-0.1, -0.2), (-0.001, -0.3), (0.0,)])
def test_no_checkpoint_above_the_reference_did_not_pay(fractions: tuple[float, ...]) -> None:
    found = judge(*fractions)
    assert found.verdict == "did not pay"
    assert found.reasons[0].startswith("no checkpoint beat the reference on 40 held-out prompts: closed fraction ")
    assert found.reasons[-1] == (
        f"Tried: tilted_pairwise at a learning_rate of 0.0003, all weights, {10 * len(fractions)} steps of 2 epochs, "
        "160 prompts with 16 responses each"
    )
    assert found.sentence.startswith("training DID NOT PAY: no checkpoint beat the reference")


def test_the_advice_follows_the_curve() -> None:
    moved = judge(-0.1, -0.2)
    assert "where held-out prompts gain nothing" in moved.reasons[1]
    # 0.05 nats gained for 0.1 of KL at the first: a quarter of the way gains 0.0125 and costs 0.00625, of 0.5 to gain.
    assert moved.advice[:2] == (
        "lower learning_rate from 0.0003 to about 7.5e-05: on its way, 0.25 of it would have closed 0.013",
        "or train on about 640 prompts instead of 160",
    )
    aside = judge(-0.3, -0.4)  # nothing was gained on any part of the way
    assert aside.advice[0] == "lower learning_rate from 0.0003 to 0.0001"
    still = judge(-0.0001, -0.0002, kl=1e-4)
    assert "hardly moved (a KL of 0.0001 nats where 0.5 could be gained)" in still.reasons[1]
    assert still.advice[:2] == ("raise learning_rate from 0.0003 to 0.0009", "or epochs from 2 to 6")
    falling = judge(-0.01, 0.01, 0.02)
    assert "still falling" in falling.reasons[1]
    assert falling.advice[0] == "raise epochs from 2 to 4"


def test_without_an_interval_nothing_is_certain() -> None:
    assert judge(0.7, error=None, n_prompts=1).verdict == "undecided"
    assert judge(0.7, error=None, n_prompts=1).advice[-1].startswith("hold out more prompts than 1")
    assert judge(-0.1, error=None, n_prompts=1).verdict == "did not pay"


def test_a_run_that_cannot_move_did_not_pay(stage_one: Any, tmp_path: Path) -> None:
    result = train_policy(
        **vars(stage_one),
        output=tmp_path,
        settings=TrainSettings(
            learning_rate=1e-12,
            tokens_per_step=300,
            tokens_per_microbatch=120,
            held_out_fraction=0.4,
            evaluations=3,
        ),
        seed=0,
        show_progress=False,
    )
    found = result.verdict
    assert found.closed_fraction == result.held_out.closed_fraction
    assert (found.n_prompts, found.n_checkpoints) == (result.n_held_out_prompts, 3)
    assert found.verdict != "paid"
    assert "hardly moved" in found.reasons[1]
    assert f"> **Before use:** {found.sentence}" in (tmp_path / "README.md").read_text()
