"""The scored samples of a run that take part: those of the reference, and those of a policy it trained."""

from __future__ import annotations

from pathlib import Path

from pipeline.contracts.artifacts import read_manifest
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SCORES
from pipeline.run import Run
from pipeline.sample_quality import apply_length_rule
from pipeline.scores import ScoredRows, read_scores


def reference_scores(run: Run, split: str) -> ScoredRows:
    """The reference's scored samples of a split."""
    return policy_scores(run, samples=run.folder / "samples", scores=run.folder / "scores", split=split)


def policy_scores(run: Run, *, samples: Path, scores: Path, split: str) -> ScoredRows:
    """The scored samples of a split of some policy, without those that ``solve.on_length`` drops.

    Args:
        run: the run.
        samples: folder of the samples table.
        scores: holds a folder with a score table for each scorer.
        split: of the prompts.

    Raises:
        CorruptArtifactError: a table is damaged, or scores and samples do not belong together.
    """
    rows, _ = all_scores(run, samples=samples, scores=scores, split=split)
    return apply_length_rule(rows, run.config.solve.on_length)


def all_scores(run: Run, *, samples: Path, scores: Path, split: str) -> tuple[ScoredRows, int]:
    """All scored samples of a split, and how many have no score; arguments as of :func:`policy_scores`."""
    names = (run.config.reward, *run.config.constraints)
    return read_scores(
        run.samples_table(samples),
        {name: ShardedTable(folder=scores / name, schema=SCORES, metadata={}) for name in names},
        reward=run.config.reward,
        constraints=list(run.config.constraints),
        split=split,
        max_unscored=sum(read_manifest(scores / name).counts["failed"] for name in names),
    )
