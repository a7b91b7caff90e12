"""What scorers that read a rendered text with one model have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self

from pipeline.contracts.artifacts import content_sha256, file_sha256
from pipeline.contracts.section import Positive
from pipeline.scorers.kind import Check, ScorerSettings
from pipeline.scorers.models import Models, ModelSettings, Source
from stage1_dual.checkpoints import check_template, is_text_template
from stage1_dual.scoring.outputs import HeadOutput
from stage1_dual.scoring.protocol import Scorer


class TextScorerSettings(ScorerSettings, ModelSettings):
    """A scorer that reads a rendered text with one model, a head of it for each output.

    Attributes:
        scorer: what computes the scores of one pass.
    """

    not_identity: ClassVar = frozenset({"model", "revision", "batch_tokens"})
    scorer: ClassVar[Callable[..., Scorer]]

    template: str | None = None
    """Text with ``{prompt}`` and ``{completion}``, or a chat template file; without it the scorer's own."""
    max_length: Positive | None = None
    """Longest text, tokens; the model's own limit where not given."""
    over_length: Literal["flag", "fail"] = "flag"
    """A longer text is scored from its end and flagged as truncated, or its row fails."""
    batch_tokens: Positive = 4096
    """Padded tokens of a batch; throughput and memory only."""

    @abstractmethod
    def check_checkpoint(self, source: Source) -> None:
        """Check the files of the checkpoint, its head and the template.

        Raises:
            InputError: it is of another kind, or has no such head or no template.
        """

    @abstractmethod
    def head_output(self) -> HeadOutput:
        """What the scorer reads off the model."""

    def checkpoints(self) -> dict[str, ModelSettings | None]:
        """The score model."""
        return {"": self}

    @property
    def tokens_at_once(self) -> int:
        """Padded tokens of a batch."""
        return self.batch_tokens

    def check(self, models: Models) -> Iterator[Check]:
        """The checkpoint with its head and the template; of a checkpoint that is not here the template alone."""
        yield partial(self.check_checkpoint, models[""]) if "" in models else partial(check_template, self.template)

    def shared_settings(self) -> Hashable:
        """What two heads must have in common to be read off one pass."""
        return self.template, self.dtype, self.max_length, self.over_length

    def identity(self, models: Models) -> str:
        """Of the checkpoint, and of the template where it is a file: the settings hold its name only."""
        checkpoint = models[""].identity
        if self.template is None or is_text_template(self.template):
            return checkpoint
        return content_sha256({"checkpoint": checkpoint, "template": file_sha256(Path(self.template))})

    @classmethod
    def start(cls, scorers: Sequence[Self], models: Models) -> Callable[..., Scorer]:
        """All heads of one pass."""
        first = scorers[0]
        return partial(
            cls.scorer,
            models[""].path,
            outputs=tuple(one.head_output() for one in scorers),
            revision=models[""].revision,
            template=absolute_template(first.template),
            dtype=first.dtype,
            max_length=first.max_length,
            over_length=first.over_length,
            token_budget=min(one.batch_tokens for one in scorers),
        )


def absolute_template(template: str | None) -> str | None:
    """A template file by its whole path: workers of a cluster have another current folder."""
    return template if template is None or is_text_template(template) else str(Path(template).absolute())
