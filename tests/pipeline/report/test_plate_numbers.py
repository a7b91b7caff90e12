from __future__ import annotations

import csv
import io

import numpy as np

from pipeline.report.figures import (
    Bound,
    Comparison,
    DualCurve,
    FrontierCurve,
    GoldComparison,
    LadderCurve,
    Measured,
    Outcome,
    ScoreDistribution,
    TrainingCurve,
)
from pipeline.report.plate_numbers import (
    comparison_numbers,
    distribution_numbers,
    dual_numbers,
    frontier_numbers,
    gold_numbers,
    ladder_numbers,
    sample_size_numbers,
    training_numbers,
)

LINE = np.array([0.0, 1.0, 2.0])


def test_a_table_has_all_digits_and_no_word_for_what_is_missing() -> None:
    found = ladder_numbers(
        LadderCurve("harmless", np.array([64.0, 32.0]), np.array([1 / 3, np.nan]), Measured(1 / 3), 0.25)
    )
    assert list(csv.reader(io.StringIO(found.csv()))) == [
        ["responses", "multiplier"],
        ["64.0", repr(1 / 3)],
        ["32.0", ""],
        ["corrected", "0.25"],
    ]
    assert found.words == "lambda* is 0.333 from 64, nan from 32 responses; corrected 0.250."


def test_each_figure_says_its_values() -> None:
    star, realised = Measured(1.0, (0.8, 1.25)), Measured(0.9, (0.85, 0.95))
    said = [
        dual_numbers(DualCurve("harmless", LINE, LINE**2, LINE - 1, star)).words,
        frontier_numbers(
            FrontierCurve(
                Bound("harmless", ">=", 0.8),
                True,
                "helpful",
                LINE,
                -LINE,
                LINE,
                Outcome(Measured(0.0), Measured(0.0)),
                Outcome(Measured(0.8), Measured(0.5)),
                realised=Outcome(realised, Measured(0.4)),
            )
        ).words,
        sample_size_numbers(np.array([0.01, 0.5, 0.75]), n_responses=64.0).words,
        training_numbers(TrainingCurve(LINE, LINE, LINE, 2 - LINE / 2, 2, LINE / 4)).words,
        comparison_numbers(
            [Comparison("harmless", Bound("harmless", ">=", 1.5), Measured(-0.0001), Measured(1.6), realised)]
        ).words,
        gold_numbers([GoldComparison("helpful", (0.0, 1.0), (0.25, 0.5))]).words,
    ]
    assert said == [
        "lambda* is 1.000 [0.800, 1.250]; D is 1 and the slack 0.000 there.",
        (
            "harmless must be >= 0.800: reference 0.000 at a gain of 0.000; predicted 0.800 at a gain of 0.500; "
            "realised 0.900 [0.850, 0.950] at a gain of 0.400."
        ),
        "The median prompt uses 50% of its 64 responses; 33.3% of the prompts lean on fewer than two.",
        (
            "The checkpoint of step 2 was kept: the gap on held-out prompts is 1.000 nats there, the closed fraction "
            "0.50, from 2.000 at step 0."
        ),
        "harmless: reference 0.000, predicted 1.600, realised 0.900 [0.850, 0.950], >= 1.500 demanded.",
        "helpful: by the score model 0.000 to 1.000, by the ground truth 0.250 to 0.500.",
    ]


def test_a_distribution_is_said_by_its_middle() -> None:
    share_kb = np.array([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]])
    found = distribution_numbers(
        [ScoreDistribution("helpful", np.linspace(0.0, 4.0, 5), share_kb, ("reference", "tilted"))]
    )
    assert found.words == "helpful, median and middle 80%: reference 2.00 (0.40 to 3.60), tilted 3.50 (3.10 to 3.90)."
    assert len(found.rows) == 8
    assert found.rows[-1] == ("helpful", "tilted", 3.0, 4.0, 1.0)
