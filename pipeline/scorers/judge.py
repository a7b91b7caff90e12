"""Ratings of a causal language model by a rubric: in this process, or at an endpoint that the recipe names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipeline.contracts.artifacts import content_sha256
from pipeline.contracts.errors import InputError
from pipeline.contracts.section import Positive, Section
from pipeline.scorers.judge_presets import Preset, with_preset
from pipeline.scorers.kind import Check, Remote, ScorerSettings
from pipeline.scorers.models import Models, ModelSettings
from stage1_dual.chat_templates import read_template, template_file
from stage1_dual.checkpoints import check_causal_checkpoint, is_text_template
from stage1_dual.scoring.endpoint import Endpoint, read_key
from stage1_dual.scoring.judge import JudgeScorer
from stage1_dual.scoring.judge_endpoint import EndpointJudge, Reading
from stage1_dual.scoring.protocol import Scorer
from stage1_dual.scoring.rubrics import AnswerScale, JudgeOutput, Question, Rubric

# Capitals, as such names are by convention: keys have small letters.
_ENV_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_RATINGS = {str(rating): float(rating) for rating in range(1, 6)}


class EndpointSettings(Section):
    """An OpenAI-compatible endpoint of chat completions, and how it is asked."""

    base_url: str
    """Of the interface, such as ``http://localhost:8000/v1``."""
    key_env: str | None = None
    """Name of the environment variable that holds the key; without it no key is sent."""
    draws: Positive | None = None
    """Answers that are drawn of each row, whose mean is its rating, for an endpoint that gives no log-probabilities;
    without it they are read."""
    top_logprobs: Annotated[int, Field(ge=2)] = 20
    """Most probable tokens whose log-probability is asked for."""
    max_tokens: Positive = 16
    """Of a drawn answer."""
    request: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request; a null leaves out one that would be there."""
    concurrency: Positive = 8
    """Requests at the same time."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Their pace; without it as fast as answers come."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds, for a connection and for each wait for data."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Of a request that failed in a way that may pass."""

    @field_validator("base_url")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.fragment:
            raise ValueError("it must be an address such as https://HOST/v1")
        return value

    @model_validator(mode="before")
    @classmethod
    def _has_no_secret(cls, value: Any) -> Any:
        """Refuse a key where its variable's name or an address is meant, without repeating it in the message."""
        if isinstance(value, dict):
            name, url = value.get("key_env"), value.get("base_url")
            if isinstance(name, str) and _ENV_NAME.fullmatch(name) is None:
                raise ValueError(
                    "`key_env` is not the name of an environment variable, in capitals; it names the variable that "
                    "holds the key, and is never the key itself"
                )
            if isinstance(url, str) and {"@", "?"} & set(url):
                raise ValueError(
                    "`base_url` has a `@` or `?`, of a user, a password or a query; it is an address alone, and a key "
                    "is in the variable of `key_env`"
                )
        return value

    @property
    def endpoint(self) -> Endpoint:
        """Where requests go, and how."""
        return Endpoint(
            base_url=self.base_url,
            key_env=self.key_env,
            concurrency=self.concurrency,
            requests_per_minute=self.requests_per_minute,
            timeout=self.timeout,
            retries=self.retries,
        )

    @property
    def reading(self) -> Reading:
        """What is asked, and what is read of the answers."""
        return Reading(self.draws, self.top_logprobs, self.max_tokens, self.request)


_ASKED = frozenset({"draws", "top_logprobs", "max_tokens", "request"})
"""Settings of an endpoint that determine the values."""
_IN_PROCESS = ("revision", "dtype", "max_length", "as_message", "answer_prefix", "engine")
"""Settings that only a judge in this process has a use for."""


class JudgeSettings(ScorerSettings, ModelSettings):
    """A causal model that rates responses by a rubric; its value is read off the probabilities of its answers.

    What a judge is asked is one :class:`~stage1_dual.scoring.rubrics.Question`, which :meth:`question` builds from
    the settings: a preset for models of one family is a different question, with the same scorers behind it.
    """

    not_identity: ClassVar = frozenset(
        {"model", "revision", "batch_tokens", "rubric", "folder", "endpoint", "repeat_share"}
        | {"checked_share", "engine_limit"}
    )
    folder_setting: ClassVar = "folder"

    kind: Literal["judge"]
    endpoint: EndpointSettings | None = None
    """Has the model rated by an endpoint, where ``model`` is its name there; nothing is sent anywhere without it."""
    repeat_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the rows that an endpoint rates a second time, independently, by which its noise is measured."""
    rubric: str | None = None
    """A text with ``{completion}``, or the path of a file with one; its places are those of
    :class:`~stage1_dual.scoring.rubrics.Rubric`."""
    preset: Preset | None = None
    """A family of safety classifiers that read the conversation itself, by their chat template, instead of a rubric;
    it sets ``answers``, ``output`` and ``answer_prefix`` where the recipe does not."""
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
    """Padded tokens of a batch; throughput and memory only."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What computes the probabilities; vLLM's are compared with those of transformers."""
    checked_share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Share of the texts that vLLM is compared on, besides the longest of every shard."""
    engine_limit: Annotated[float, Field(gt=0)] = 1e-4
    """Largest difference to transformers above which the step fails, nats; a share of log-probabilities beyond 1."""

    @model_validator(mode="before")
    @classmethod
    def _has_its_preset(cls, value: Any) -> Any:
        return with_preset(value)

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

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if (self.rubric is None) == (self.preset is None):
            raise ValueError("a judge has a `rubric` or a `preset`, one of the two")
        if self.preset is not None and not self.as_message:
            raise ValueError("a `preset` reads the conversation by a chat template; leave out `as_message: false`")
        return self

    @model_validator(mode="after")
    def _of_vllm(self) -> Self:
        fields = type(self).model_fields
        changed = [name for name in ("checked_share", "engine_limit") if getattr(self, name) != fields[name].default]
        if changed and self.engine != "vllm":
            raise ValueError(f"{' and '.join(changed)} belong to `engine: vllm`, and the engine is {self.engine}")
        return self

    @model_validator(mode="after")
    def _endpoint_can(self) -> Self:
        if self.endpoint is None:
            return self
        if self.preset is not None:
            raise ValueError("a `preset` reads the answer behind its first tokens, which no endpoint shows")
        idle = [name for name in _IN_PROCESS if getattr(self, name) != type(self).model_fields[name].default]
        if idle:
            raise ValueError(
                f"`{idle[0]}` has no effect at an endpoint, which reads messages as it is served to; leave it out"
            )
        if self.endpoint.draws is not None and self.output == "log_odds":
            raise ValueError("`output: log_odds` needs log-probabilities, which `endpoint.draws` does without")
        if self.endpoint.draws is None:
            try:
                self.scale().require_distinct_beginnings()
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
        text = self._rubric_text()
        rubric = None if text is None else Rubric(text)
        return Question(rubric, self.scale(), self.as_message, self.answer_prefix)

    def checkpoints(self) -> dict[str, ModelSettings | None]:
        """The judge, where it is a checkpoint."""
        return {} if self.endpoint is not None else {"": self}

    def packages(self) -> tuple[str, ...]:
        """The engine, or what asks an endpoint."""
        if self.endpoint is not None:
            return ("httpx",)
        return ("vllm",) if self.engine == "vllm" else ()

    @property
    def copies(self) -> int:
        """By vLLM two: what it is compared with is held beside it."""
        return 2 if self.engine == "vllm" else 1

    @property
    def tokens_at_once(self) -> int:
        """Padded tokens of a batch."""
        return self.batch_tokens if self.endpoint is None else 0

    def remote(self) -> Remote | None:
        """The requests of an endpoint."""
        if self.endpoint is None:
            return None
        return Remote(
            url=self.endpoint.base_url,
            model=self.model,
            requests=self.endpoint.draws or 1,
            characters=len(self._rubric_text() or ""),
            per_minute=self.endpoint.requests_per_minute,
        )

    @property
    def keeps_answers(self) -> bool:
        """What an endpoint answered was paid for."""
        return self.endpoint is not None

    @property
    def repeated_share(self) -> float:
        """Rows whose second rating is independent of the first; a judge in this process would repeat itself."""
        return self.repeat_share if self.endpoint is not None else 0.0

    def info_columns(self) -> tuple[str, ...] | None:
        """Those that the rubric has places for."""
        return self.question().info_columns

    def check(self, models: Models) -> Iterator[Check]:
        """The rubric; the judge's checkpoint where it is here, or the key that its endpoint needs."""
        yield self.question
        if self.endpoint is not None:
            yield partial(read_key, self.endpoint.key_env)
        elif "" in models:
            yield partial(check_causal_checkpoint, models[""].path, revision=models[""].revision)

    def identity_settings(self) -> Mapping[str, Any]:
        """Without where and how fast an endpoint is asked."""
        asked = None if self.endpoint is None else self.endpoint.model_dump(mode="json", include=set(_ASKED))
        return {**super().identity_settings(), "endpoint": asked}

    def identity(self, models: Models) -> str:
        """Of the judge, by an endpoint's name of it, and the rubric."""
        judge = models[""].identity if self.endpoint is None else content_sha256({"endpoint": self.model})
        return content_sha256({"judge": judge, "rubric": self._rubric_text()})

    @classmethod
    def start(cls, scorers: Sequence[Self], models: Models) -> Callable[..., Scorer]:
        """One rubric a pass."""
        (one,) = scorers
        if one.endpoint is not None:
            return partial(
                EndpointJudge,
                one.endpoint.endpoint,
                model=one.model,
                question=one.question(),
                reading=one.endpoint.reading,
                affine=one.affine,
            )
        return partial(
            JudgeScorer,
            models[""].path,
            question=one.question(),
            affine=one.affine,
            revision=models[""].revision,
            dtype=one.dtype,
            max_length=one.max_length,
            token_budget=one.batch_tokens,
            engine=one.engine,
            checked_share=one.checked_share,
            engine_limit=one.engine_limit,
        )

    def _rubric_text(self) -> str | None:
        if self.rubric is None:
            return None
        if is_text_template(self.rubric):
            return self.rubric
        for folder in (*([self.folder] if self.folder is not None else []), str(Path.cwd())):
            path = template_file(str(Path(folder) / self.rubric))
            if path is not None:
                return read_template(path, setting="rubric")
        raise InputError(
            f"`rubric` is {self.rubric!r}, which is neither a text with {{completion}} nor a file beside the recipe "
            "or in the current folder"
        )
