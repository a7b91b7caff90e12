"""Whether training paid, as stage 2 finds it and the manifest of ``policy/`` records it (``details.verdict``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.contracts.artifacts import MANIFEST, read_manifest
from pipeline.contracts.solution import Part

_Texts = Annotated[tuple[str, ...], Field(strict=False)]
_Ends = Annotated[tuple[float, float], Field(strict=False)]


class TrainingVerdict(Part):
    """The kept policy against the reference on held-out prompts; the rule is in :mod:`stage2_policy.verdict`.

    Attributes:
        verdict: "paid", "undecided" or "did not pay".
        closed_fraction: of the kept checkpoint, estimated on held-out prompts.
        closed_fraction_ci95: its 95% interval over prompts, for all checkpoints at once; None where it cannot be had.
        n_checkpoints: how many were compared.
        n_prompts: held-out prompts they were compared on.
        reasons: plain sentences without their stops: what was found, and what was tried.
        advice: what to do about it, in numbers; empty for "paid".
    """

    verdict: Literal["paid", "undecided", "did not pay"]
    closed_fraction: float
    closed_fraction_ci95: _Ends | None
    n_checkpoints: int
    n_prompts: int
    reasons: _Texts
    advice: _Texts

    @property
    def sentence(self) -> str:
        """Verdict, reasons and advice in one line."""
        advice = f" Advice: {', '.join(self.advice)}." if self.advice else ""
        return f"training {self.verdict.upper()}: {'. '.join(self.reasons)}.{advice}"


def read_training_verdict(policy_dir: Path) -> TrainingVerdict | None:
    """The verdict that a finished ``policy/`` records; None for policies of older versions, which record none.

    Raises:
        CorruptArtifactError: the step is not finished, or its manifest is damaged.
    """
    recorded = read_manifest(policy_dir).details.get("verdict")
    return None if recorded is None else TrainingVerdict.from_document(recorded, source=policy_dir / MANIFEST)
