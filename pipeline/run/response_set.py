"""Sets of responses: what every run samples, the pairs of a data set that some train on, what is drawn to judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.contracts.tables import SPLITS


@dataclass(frozen=True)
class ResponseSet:
    """Responses to prompts, and the folders of what the steps make of them.

    Attributes:
        root: folder that holds its tables.
        prompts: folder of the table with its prompts.
        splits: of the prompts, those that have responses in it.
        prefix: what the names of its artifacts begin with, in manifests and messages: their path within the run.
        setting: what asks for it in a recipe; None for a set that every run has.
        paired: whether the responses 2i and 2i + 1 of a prompt are a pair, compared in itself.
        made_by: the tables that each step of the run makes of it, by step; empty for a set that a step makes as a
            whole, in its own folder.
    """

    root: Path
    prompts: Path
    splits: tuple[str, ...]
    prefix: str = ""
    setting: str | None = None
    paired: bool = False
    made_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def samples(self) -> Path:
        """Folder of its samples table: the responses."""
        return self.root / "samples"

    @property
    def scores(self) -> Path:
        """Holds a folder with a score table for each scorer."""
        return self.root / "scores"

    @property
    def tilted(self) -> Path:
        """Folder of its hand-off table, of a set that is trained on."""
        return self.root / "tilted"

    def scored_tables(self) -> tuple[str, ...]:
        """Names within the run of its own prompts, its samples and the score tables that are there, upstream first."""
        scores = (f"scores/{path.name}" for path in sorted(self.scores.glob("*")) if path.is_dir())
        return tuple(self.prefix + name for name in ("prompts", "samples", *scores))


def sampled_responses(folder: Path) -> ResponseSet:
    """What the reference was sampled for, in the folder of a run: the dual is solved on it."""
    return ResponseSet(
        root=folder,
        prompts=folder / "prompts",
        splits=SPLITS,
        made_by={"prepare": ("prompts",), "sample": ("samples",), "score": ("scores",), "export": ("tilted",)},
    )


def data_set_pairs(folder: Path) -> ResponseSet:
    """The pairs of a data set that are trained on instead, in the folder of a run whose recipe names some."""
    return ResponseSet(
        root=folder / "pairs",
        prompts=folder / "pairs" / "prompts",
        splits=("train",),
        prefix="pairs/",
        setting="training.pairs",
        paired=True,
        made_by={"sample": ("prompts", "samples"), "score": ("scores",), "export": ("tilted",)},
    )


def policy_responses(root: Path, *, prompts: Path, split: str, prefix: str = "") -> ResponseSet:
    """What a trained policy is sampled for, to judge it on the prompts of one split.

    Args:
        root: folder that holds its tables.
        prompts: folder of the run's prompts.
        split: of them.
        prefix: as of :class:`ResponseSet`.
    """
    return ResponseSet(root=root, prompts=prompts, splits=(split,), prefix=prefix)


def evaluated_responses(folder: Path) -> ResponseSet:
    """What the trained policy is sampled for by the step ``evaluate``, in the folder of a run."""
    return policy_responses(folder / "evaluation", prompts=folder / "prompts", split="test", prefix="evaluation/")


def known_response_sets(folder: Path) -> tuple[ResponseSet, ...]:
    """Every set that the folder of a run may hold, whatever its recipe asks for by now."""
    return sampled_responses(folder), data_set_pairs(folder), evaluated_responses(folder)
