"""What scorers that read a rendered text with one model have in common."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.contracts.artifacts import content_sha256, file_sha256
from pipeline.contracts.section import Positive
from pipeline.scorers.kind import ScorerBase
from pipeline.scorers.models import Models, ModelSettings
from stage1_dual.checkpoints import is_text_template


class TextScorerSettings(ScorerBase, ModelSettings):
    """A scorer that reads a rendered text with one model."""

    template: str | None = None
    """Text with ``{prompt}`` and ``{completion}``, or a chat template file; without it the scorer's own."""
    max_length: Positive | None = None
    """Longest text, tokens; the model's own limit where not given."""
    over_length: Literal["flag", "fail"] = "flag"
    """A longer text is scored from its end and flagged as truncated, or its row fails."""
    batch_tokens: Positive = 4096
    """Padded tokens of a batch; throughput and memory only."""

    def checkpoints(self) -> dict[str, ModelSettings]:
        """The score model."""
        return {"": self}


def same_text(settings: Any, models: Models) -> Hashable:
    """What two heads must have in common to be read off one pass."""
    return (
        models[""],
        settings.template,
        settings.dtype,
        settings.max_length,
        settings.over_length,
    )


def text_identity(settings: Any, models: Models) -> str:
    checkpoint = models[""].identity
    if settings.template is None or is_text_template(settings.template):
        return checkpoint
    # The settings hold the name of the file only.
    return content_sha256({"checkpoint": checkpoint, "template": file_sha256(Path(settings.template))})


def absolute_template(template: str | None) -> str | None:
    """A template file by its whole path: workers of a cluster have another current folder."""
    return template if template is None or is_text_template(template) else str(Path(template).absolute())


def text_arguments(settings: Sequence[Any], models: Models) -> dict[str, Any]:
    first = settings[0]
    return {
        "revision": models[""].revision,
        "template": absolute_template(first.template),
        "dtype": first.dtype,
        "max_length": first.max_length,
        "over_length": first.over_length,
        "token_budget": min(one.batch_tokens for one in settings),
    }
