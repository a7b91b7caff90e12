"""What a trained policy came to, read from its run: every score of the recipe, proxy and gold, on the test prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.contracts.artifacts import read_json
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.solution import Solution
from pipeline.contracts.tables import SCORES
from pipeline.evaluation import mean_interval
from pipeline.run.run import Run


@dataclass(frozen=True)
class ScoreOutcome:
    """One score of a policy beside that of the reference, on the test prompts.

    Attributes:
        reference: mean under the reference, score units.
        improvement: mean of the policy over it.
        ci95: interval of the improvement, paired by prompt.
        sd: standard deviation of the score over all of the reference's test responses.
    """

    reference: float
    improvement: float
    ci95: tuple[float, float]
    sd: float


@dataclass(frozen=True)
class Outcome:
    """One policy.

    Attributes:
        run: that trained it.
        base: the run whose samples it was trained on.
        solution: of its dual.
        dual: content of its ``dual.json``.
        evaluation: content of its ``evaluation.json``.
    """

    run: Run
    base: Run
    solution: Solution
    dual: Mapping[str, Any]
    evaluation: Mapping[str, Any]

    def score(self, name: str) -> ScoreOutcome:
        """The outcome of one scorer of the recipe."""
        reference = _test_scores(self.base.folder / "scores" / name)
        policy = _test_scores(self.run.folder / "evaluation" / "scores" / name)
        before, after = _prompt_means(reference), _prompt_means(policy)
        difference = np.array([after[prompt] - before[prompt] for prompt in sorted(before.keys() & after.keys())])
        low, high = mean_interval(difference)
        return ScoreOutcome(
            reference=float(np.mean(list(before.values()))),
            improvement=float(difference.mean()),
            ci95=(low, high),
            sd=float(reference["value"].to_numpy().std(ddof=1)),
        )

    def understated(self, name: str) -> float:
        """How far finitely many responses understate what the policy of lambda* has of a constraint's statistic.

        In the units of the statistic; to be added to its prediction on the test prompts, which has as many. 0 where
        the dual makes no correction.
        """
        solved = next(one for one in self.dual["constraints"] if one["name"] == name)
        corrected = solved["predicted_corrected"]
        return 0.0 if corrected is None else float(corrected - solved["predicted"])

    @property
    def multipliers(self) -> dict[str, float]:
        """Lambda by constraint."""
        return {one.name: one.multiplier for one in self.solution.constraints}


def read_outcome(base: Run, run: Run) -> Outcome:
    """The outcome of a finished run."""
    path = run.folder / "dual" / "dual.json"
    dual = read_json(path)
    return Outcome(
        run=run,
        base=base,
        solution=Solution.from_document(dual, source=path),
        dual=dual,
        evaluation=read_json(run.folder / "evaluation" / "evaluation.json"),
    )


def _test_scores(folder: Any) -> pa.Table:
    return ShardedTable(folder=folder, schema=SCORES, metadata={}).read("test", columns=["prompt_id", "value"])


def _prompt_means(scores: pa.Table) -> dict[str, float]:
    means = scores.group_by("prompt_id").aggregate([("value", "mean")])
    return dict(zip(means["prompt_id"].to_pylist(), means["value_mean"].to_pylist(), strict=True))
