"""Ratings of a causal language model by a rubric: in this process, or at an endpoint that the recipe names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.contracts.artifacts import content_sha256
from pipeline.contracts.errors import InputError
from pipeline.contracts.section import Positive
from pipeline.scorers.kind import Check, ScorerSettings
from pipeline.scorers.models import Models, ModelSettings
from stage1_dual.chat_templates import read_template, template_file
from stage1_dual.checkpoints import check_causal_checkpoint, is_text_template
from stage1_dual.scoring.judge import JudgeScorer
from stage1_dual.scoring.protocol import Scorer
from stage1_dual.scoring.rubrics import AnswerScale, JudgeOutput, Question, Rubric

_RATINGS = {str(rating): float(rating) for rating in range(1, 6)}


class JudgeSettings(ScorerSettings, ModelSettings):
    """A causal model that rates responses by a rubric; its value is read off the probabilities of its answers.

    What a judge is asked is one :class:`~stage1_dual.scoring.rubrics.Question`, which :meth:`question` builds from
    the settings: a preset for models of one family is a different question, with the same scorers behind it.
    """

    not_identity: ClassVar = frozenset({"model", "revision", "batch_tokens", "rubric", "folder"})
    folder_setting: ClassVar = "folder"

    kind: Literal["judge"]
    rubric: str
    """A text with ``{completion}``, or the path of a file with one; its places are those of
    :class:`~stage1_dual.scoring.rubrics.Rubric`."""
    folder: str | None = None
    """Where the rubric's file is looked for first, before the current folder; the recipe's own folder where not
    given."""
    answers: dict[str, float] = Field(default_factory=lambda: dict(_RATINGS))
    """The answers that the judge may give, each with its value."""
    output: JudgeOutput = "rating"
    """The mean of the values under the judge's probabilities of the answers, or the log-odds of the higher of two
    values against the lower, nats."""
    min_answer_mass: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The least probability of all answers together (of draws: the least share that are answers); below it the row
    fails. At one half the judge is likelier to answer than to say anything else."""
    as_message: bool = True
    """Whether the filled rubric is the user's message in the judge's chat template, as opposed to a text that the
    answer continues."""
    answer_prefix: str = ""
    """What the judge is taken to have begun its answer with."""
    max_length: Positive | None = None
    """Longest text, tokens; a longer one fails. The model's own limit where not given."""
    batch_tokens: Positive = 4096

    @field_validator("answers", mode="before")
    @classmethod
    def _answers_are_texts(cls, value: Any) -> Any:
        """Take the whole number 1 for the text "1"; refuse what YAML made of `yes` and `no`."""
        if not isinstance(value, dict):
            return value
        if any(isinstance(answer, bool) for answer in value):
            raise ValueError("YAML reads an unquoted `yes` or `no` as true or false; put the answers in quotes")
        return {str(answer) if isinstance(answer, int) else answer: number for answer, number in value.items()}

    @model_validator(mode="after")
    def _scale_is_one(self) -> Self:
        try:
            self.scale()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def scale(self) -> AnswerScale:
        """The answers and what is made of them."""
        return AnswerScale(tuple(self.answers.items()), self.output, self.min_answer_mass)

    def question(self) -> Question:
        """What the judge is asked.

        Raises:
            InputError: the rubric is not there, cannot be read or is none.
        """
        return Question(Rubric(self._rubric_text()), self.scale(), self.as_message, self.answer_prefix)

    def checkpoints(self) -> dict[str, ModelSettings | None]:
        """The judge."""
        return {"": self}

    @property
    def tokens_at_once(self) -> int:
        """Padded tokens of a batch."""
        return self.batch_tokens

    def check(self, models: Models) -> Iterator[Check]:
        """The rubric, and the judge's checkpoint where it is here."""
        yield self.question
        if "" in models:
            yield partial(check_causal_checkpoint, models[""].path, revision=models[""].revision)

    def identity(self, models: Models) -> str:
        """Of the judge and the rubric."""
        return content_sha256({"judge": models[""].identity, "rubric": self._rubric_text()})

    @classmethod
    def start(cls, scorers: Sequence[Self], models: Models) -> Callable[..., Scorer]:
        """One rubric a pass."""
        (one,) = scorers
        return partial(
            JudgeScorer,
            models[""].path,
            question=one.question(),
            affine=one.affine,
            revision=models[""].revision,
            dtype=one.dtype,
            max_length=one.max_length,
            token_budget=one.batch_tokens,
        )

    def _rubric_text(self) -> str:
        if is_text_template(self.rubric):
            return self.rubric
        for folder in (*([self.folder] if self.folder is not None else []), str(Path.cwd())):
            path = template_file(str(Path(folder) / self.rubric))
            if path is not None:
                return read_template(path, setting="rubric")
        raise InputError(
            f"`rubric` is {self.rubric!r}, which is neither a text with {{completion}} nor a file beside the recipe or "
            "in the current folder"
        )
