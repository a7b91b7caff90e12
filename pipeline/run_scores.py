"""The scored samples of a run that take part: those of the reference, and those of a policy it trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SCORES
from pipeline.run import Run
from pipeline.sample_quality import apply_length_rule
from pipeline.scores import ScoredRows, read_scores
from pipeline.solving import build_problem
from stage1_dual.dual import DualProblem


def reference_problem(run: Run, split: str) -> DualProblem:
    """The dual problem of the reference's scored samples of a split, under the run's demands."""
    return build_problem(
        reference_scores(run, split), constraints=run.config.demanded_constraints(), beta=run.config.beta
    )


def reference_scores(run: Run, split: str, *, names: Sequence[str] | None = None) -> ScoredRows:
    """The reference's scored samples of a split; ``names`` as of :func:`policy_scores`."""
    samples, scores = run.folder / "samples", run.folder / "scores"
    return policy_scores(run, samples=samples, scores=scores, split=split, names=names)


def policy_scores(
    run: Run, *, samples: Path, scores: Path, split: str, names: Sequence[str] | None = None
) -> ScoredRows:
    """The scored samples of a split of some policy, without those that ``solve.on_length`` drops.

    Args:
        run: the run.
        samples: folder of the samples table.
        scores: holds a folder with a score table for each scorer.
        split: of the prompts.
        names: scorers that stand for the reward, first, and the constraints; those of the recipe where not given.

    Raises:
        CorruptArtifactError: a table is damaged, or scores and samples do not belong together.
    """
    rows, _ = all_scores(run, samples=samples, scores=scores, split=split, names=names)
    return apply_length_rule(rows, run.config.solve.on_length)


def all_scores(
    run: Run, *, samples: Path, scores: Path, split: str, names: Sequence[str] | None = None
) -> tuple[ScoredRows, int]:
    """All scored samples of a split, and how many have no score; arguments as of :func:`policy_scores`."""
    reward, *constraints = names if names is not None else (run.config.reward, *run.config.constraints)
    named = (reward, *constraints)
    return read_scores(
        run.samples_table(samples),
        {name: ShardedTable(folder=scores / name, schema=SCORES, metadata={}) for name in named},
        reward=reward,
        constraints=constraints,
        split=split,
        max_unscored=sum(read_manifest(scores / name).counts["failed"] for name in named),
    )
