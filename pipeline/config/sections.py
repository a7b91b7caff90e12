"""The sections of a run configuration, each with the rules between its own settings."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Constraint, Direction, Safeguard
from pipeline.contracts.section import Positive, Section
from pipeline.contracts.statistics import Kind, Statistic
from pipeline.published import PublishedPoint, read_points
from pipeline.scorers.models import ModelSettings, is_gguf
from stage1_dual.sampling.protocol import Distribution
from stage2_policy.settings import TrainSettings, require_comparison


class _SourceSettings(Section):
    """A source of rows with prompts: a Parquet, JSON Lines or CSV file; a folder or a Hub id that
    ``datasets.load_dataset`` reads.
    """

    source: str
    """Path of a file or folder, or id of a data set on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub, which needs one."""
    dataset_config: str | None = None
    """Name of a configuration of the data set."""
    dataset_splits: dict[str, Literal["train", "test"]] | None = None
    """Splits of the data set to read, and what they are here. Without it ``train`` and ``test`` are read if both are
    there, and otherwise all splits, which are then split by hash."""
    prompt_column: str = "prompt"
    """Holds a string, or a list of messages with ``role`` and ``content``."""
    split_column: str | None = None
    """Column that holds ``train`` or ``test``; without it, and without splits of a data set, the split is by a hash of
    the prompt."""


WIDER = "embedded:wider"
"""The source of prompts that is written like those of the embedded world, and larger."""


class PromptSettings(_SourceSettings):
    """Where the prompts come from: ``embedded`` (the built-in world), or any other source."""

    source: str = "embedded"
    """``embedded``, the path of a file or folder, the id of a data set on the Hub, or ``embedded:wider``: the prompts
    of the embedded world among 1,920 in its manner, with the columns ``prompt``, ``split``, ``category`` and ``mood``.
    """
    system: str | None = None
    """System message put before every prompt that has none."""
    category_column: str | None = None
    """Column with the category of a prompt, by which means are given and constraints may be stated."""
    info_columns: tuple[str, ...] = ()
    """Columns that scorers of the kinds ``python`` and ``judge`` may read of a prompt, as ``row.info``: a reference
    answer, tests, anything that JSON can hold."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the prompts that a split by hash puts into ``test``."""
    repeated: Literal["refuse", "drop"] = "refuse"
    """What to do with a prompt that occurs again; dropped ones are counted."""
    last_assistant_turn: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do with a prompt whose last message is the assistant's, as lists for supervised fine-tuning have it:
    ``drop`` leaves that message out, ``keep`` has the model go on from it."""
    limit: Positive | None = None
    """At most so many prompts of each split take part: those whose ``prompt_id``, a hash, comes first. A larger limit
    adds prompts to those of a smaller one. ``--limit N`` is its short name on the command line."""

    @field_validator("source")
    @classmethod
    def _is_known_where_embedded(cls, value: str) -> str:
        if value.startswith("embedded:") and value != WIDER:
            raise ValueError(f"there is no source {value!r} in the embedded world; there are 'embedded' and {WIDER!r}")
        return value

    @field_validator("info_columns")
    @classmethod
    def _are_of_a_source(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if value and info.data.get("source") == "embedded":
            raise ValueError(f"the prompts of the embedded world have no column {value[0]!r}")
        return value


class ReferenceSettings(ModelSettings):
    """The reference policy."""

    template: str | None = None
    """A text with ``{prompt}``, or the path of a chat template file; without it the tokenizer's own chat template."""
    template_date: date | None = None
    """The date that a chat template which reads the clock is given, in every rendering; without it such a template is
    refused."""
    special_tokens_in_prompts: Literal["keep", "refuse"] = "keep"
    """What becomes of prompts whose text writes special tokens of the tokenizer, which a policy reads as control
    tokens: they are kept, and counted in a warning, or left out as prompts that cannot be sampled from."""
    adapter: str | None = None
    """Folder of a LoRA adapter that is part of the reference."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """The reference is the model at this temperature: `prepare` divides its logits by it once, in its weights, so that
    drawing at temperature 1, training and log-probabilities are all of one ordinary checkpoint."""
    quantization: str | None = None
    """vLLM's name of a quantisation to load the reference with."""

    @property
    def is_written(self) -> bool:
        """Whether `prepare` writes it, from a GGUF file, with an adapter's weights or at a temperature."""
        return is_gguf(self.model) or self.adapter is not None or self.temperature is not None


class UntilSettings(Section):
    """When enough is drawn: until then what was drawn is looked at, and more is drawn (docs/sample_sizes.md)."""

    within: Annotated[float, Field(gt=0)]
    """How far the slack of each constraint may be from its demand in the population, in its own units."""
    confidence: Annotated[float, Field(ge=0.5, le=0.999)] = 0.95  # at most LARGEST_CONFIDENCE of stage1_dual.dual
    """With which probability all slacks are within."""
    verdict: Literal["ok", "weak"] | None = "ok"
    """The worst verdict on trust that will do; null for any."""
    at_most: Positive = 1024
    """Responses a prompt at most."""
    most_prompts: Positive | None = None
    """Prompts of each split at most, of those that ``prompts.limit`` leaves out at first; without it none is added."""


class SamplingSettings(Section):
    """How responses are drawn.

    The dual assumes draws from the reference itself: temperature 1 and the whole vocabulary.
    """

    engine: Literal["vllm", "transformers"] = "vllm"
    """What draws; transformers where vLLM does not run."""
    samples_per_prompt: Positive = 128
    """Responses to each prompt; a larger number later draws only the new ones."""
    until: UntilSettings | None = Field(default=None, exclude_if=lambda x: x is None)
    """Where it is given, ``samples_per_prompt`` is what is drawn first, and more is drawn until the solution is
    trusted."""
    max_new_tokens: Positive = 512
    """Longest response; longer ones are cut off, and ``solve.on_length`` says what becomes of them."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """1 draws from the reference; see ``samples_are_not_of_the_reference``."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """1 draws from the whole vocabulary."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 draws from the whole vocabulary."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """0 draws from the whole vocabulary."""
    samples_are_not_of_the_reference: bool = False
    """Must be true for any other temperature, top_p, top_k or min_p: the result then holds for the changed
    distribution, which is not the model that is fine-tuned."""
    logp_rows: Annotated[int, Field(ge=0)] = 128
    """Samples whose log-probability is computed again by the training stack; 0 for none."""
    logp_limit: Annotated[float, Field(gt=0)] = 0.1
    """Mean absolute difference to the sampler's log-probability above which the step fails, nats a token."""
    shard_rows: Positive = 4096
    """Responses a shard; what a killed run loses at most."""
    max_num_seqs: Positive | None = None
    """Responses decoded at the same time; throughput only. Without it 256 on a CPU, vLLM's own number on a GPU (1,024
    on one of 80 GB, but for the A100; otherwise 256)."""
    tensor_parallel_size: Positive = 1
    """Accelerators that share the model."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of an accelerator's memory that vLLM takes."""

    @model_validator(mode="after")
    def _of_the_reference(self) -> Self:
        if not (self.distribution.is_the_policy or self.samples_are_not_of_the_reference):
            raise ValueError(
                f"temperature {self.temperature:g}, top_p {self.top_p:g}, top_k {self.top_k} and min_p {self.min_p:g} "
                "do not draw from the reference (1, 1, 0 and 0 do); the dual and the training assume that it is. Set "
                "`samples_are_not_of_the_reference: true` to go on all the same"
            )
        return self

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.until is not None and self.until.at_most < self.samples_per_prompt:
            raise ValueError(
                f"`until.at_most` is {self.until.at_most}, fewer than `samples_per_prompt`, "
                f"{self.samples_per_prompt}, which are drawn first"
            )
        return self

    @property
    def distribution(self) -> Distribution:
        """What is drawn from."""
        return Distribution(self.temperature, self.top_p, self.top_k, self.min_p)


class ExecutionSettings(Section):
    """Where samplers and scorers run. Nothing of what they write depends on it."""

    kind: Literal["in_process", "ray"] = "in_process"
    """In the process of the command, or as actors of a Ray cluster."""
    address: str | None = None
    """Of a running Ray cluster (``auto``, ``ray://HOST:PORT``); without it one is started on this machine."""
    min_actors: Positive = 1
    """Actors that there are from the start."""
    max_actors: Positive = 1
    """Actors that there may come to be, as the cluster has room."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    """Without it: as many as ``sampling.tensor_parallel_size`` where this machine has a GPU, otherwise none."""
    cpus_per_actor: Annotated[float, Field(gt=0)] | None = None
    """Threads of each, too. Without it: an equal share of this machine's where the cluster is started here and no
    actor has a GPU, otherwise 1."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors is {self.max_actors}, fewer than min_actors, {self.min_actors}")
        return self


class KlBudget(Section):
    """The largest KL to spend, in place of a beta, which is then an outcome."""

    kl: Annotated[float, Field(gt=0)]
    """Nats a prompt."""


_EVER = frozenset({"direction", "threshold", "margin", "reserve", "assurance", "score_error"})


class ConstraintSettings(Section):
    """Bound on a statistic of a score, in its own direction and units (docs/constraints.md)."""

    score: str | None = None
    """Scorer of the score; without it the one that has the constraint's name."""
    statistic: Kind = "mean"
    """What is bounded of the score."""
    at_least: float | None = None
    """Of a ``share``: responses count whose score is at or above this."""
    at_most: float | None = None
    """Of a ``share``: responses count whose score is at or below this."""
    below: float | None = None
    """Of a ``shortfall``: what a response lacks to this score."""
    level: float | None = None
    """Of a ``cvar``: which share of all responses, the worst ones, the mean is of."""
    per: str | None = None
    """Scorer of the score that the mean is divided by, such as the number of claims; its scores must be positive."""
    where: dict[str, Annotated[list[str], Field(min_length=1)]] | None = None
    """Columns of the prompts with the values that count, such as ``category: [benign]``."""
    each: str | None = None
    """Column of the prompts of which every value makes a constraint of its own, such as ``category``."""
    direction: Direction | None = None
    """From which side the statistic is bounded, or that it is held."""
    threshold: float | None = None
    """The bound itself, units of the statistic."""
    margin: float | None = None
    """Over the statistic under the reference policy."""
    between: tuple[float, float] | None = None
    """Lower and upper end, in place of direction and threshold: two bounds."""
    equals: float | None = None
    """In place of direction and threshold: the statistic is held there."""
    tolerance: float | None = None
    """Of an equality: how far from it the evaluation takes it for met, in units of the statistic; without it a tenth
    of a standard deviation of the statistic's column under the reference."""
    reserve: float = 0.0
    """Units of the statistic the dual asks for beyond the demand, since a fine-tuned policy falls short of the tilted
    optimum by what it cannot learn; negative for one that is known to overshoot. The evaluation judges the demand
    itself."""
    assurance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Probability that the evaluation of a policy at the tilted optimum calls the constraint satisfied: the dual is
    asked for as much more as the errors of prediction and evaluation need."""
    score_error: Annotated[float, Field(ge=0)] = 0.0
    """Root mean square error of the scorer's differences between two responses, score units: the dual is asked for as
    much more as such an error can hide. Of means of scores alone."""
    score_noise: Annotated[float, Field(ge=0)] | Literal["measured"] = Field(default=0.0, exclude_if=lambda x: x == 0)
    """Standard deviation of noise in the score that another rating of the same response would not repeat, or
    ``measured`` for what the rows that were scored twice show: the dual is asked for as much more as the tilt leans on
    that noise. Of a judge whose ratings are drawn, and of means of scores alone."""

    @model_validator(mode="after")
    def _is_a_constraint(self) -> Self:
        if self.between is not None or self.equals is not None:
            used = "between" if self.between is not None else "equals"
            for name in ("threshold", "margin", "direction", "equals"):
                if name != used and getattr(self, name) is not None:
                    raise ValueError(f"gives both of `{used}` and `{name}`; `{used}` stands alone")
        else:
            if (self.threshold is None) == (self.margin is None):
                given = "both" if self.threshold is not None else "neither"
                others = "; give exactly one" if given == "both" else ", nor `between` or `equals`"
                raise ValueError(f"gives {given} of `threshold` and `margin`{others}")
            if self.direction is None:
                raise ValueError("gives no `direction`; it must be '>=', '<=' or '='")
        if self.between is not None and not self.between[0] < self.between[1]:
            low, high = self.between
            raise ValueError(f"`between` is [{low:g}, {high:g}]; its lower end comes first, and below its upper one")
        try:
            for made in self.constraints("it"):
                self.safeguard.require_fit(made)
        except InputError as error:
            raise ValueError(str(error).removeprefix("constraint `it`: ")) from None
        return self

    @model_serializer(mode="wrap")
    def _what_is_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the settings that recipes of before there were statistics have not, where they say nothing: a run
        made then is not another one now.
        """
        settings: dict[str, Any] = handler(self)
        return {
            name: value
            for name, value in settings.items()
            if name in _EVER or value != type(self).model_fields[name].default
        }

    def constraints(self, name: str) -> tuple[Constraint, ...]:
        """The constraints it stands for: one, or the two ends of a band; ``each`` is not expanded.

        Args:
            name: its key in the recipe, which is the score's where no other is given.

        Raises:
            InputError: the statistic cannot have these settings.
        """
        directions: dict[Direction, tuple[str, float | None, float | None]]
        if self.between is not None:
            low, high = self.between
            directions = {">=": (f"{name}.at_least", low, None), "<=": (f"{name}.at_most", high, None)}
        elif self.equals is not None:
            directions = {"=": (name, self.equals, None)}
        else:
            assert self.direction is not None  # the validator's
            directions = {self.direction: (name, self.threshold, self.margin)}
        return tuple(
            Constraint(
                full_name,
                direction,
                threshold=threshold,
                margin=margin,
                statistic=self._statistic(name, direction),
                each=self.each,
                tolerance=self.tolerance,
            )
            for direction, (full_name, threshold, margin) in directions.items()
        )

    @classmethod
    def of(cls, constraint: Constraint, *, reserve: float = 0.0) -> Self:
        """The settings of a constraint of its own name, with no other safeguard than a reserve."""
        stated = constraint.statistic
        return cls(
            score=stated.score,
            statistic=stated.kind,
            at_least=stated.at_least,
            at_most=stated.at_most,
            below=stated.below,
            level=stated.level,
            per=stated.per,
            where={column: list(values) for column, values in stated.where} or None,
            each=constraint.each,
            direction=constraint.direction,
            threshold=constraint.threshold,
            margin=constraint.margin,
            tolerance=constraint.tolerance,
            reserve=reserve,
        )

    def _statistic(self, name: str, direction: Direction) -> Statistic:
        return Statistic(
            self.score if self.score is not None else name,
            self.statistic,
            at_least=self.at_least,
            at_most=self.at_most,
            below=self.below,
            level=self.level,
            tail="upper" if self.statistic == "cvar" and direction == "<=" else "lower",
            per=self.per,
            where=tuple((column, tuple(values)) for column, values in (self.where or {}).items()),
        )

    @property
    def safeguard(self) -> Safeguard:
        """What the dual is asked for beyond the demand."""
        measured = self.score_noise == "measured"
        return Safeguard(
            reserve=self.reserve,
            assurance=self.assurance,
            score_error=self.score_error,
            score_noise=0.0 if isinstance(self.score_noise, str) else self.score_noise,
            measures_noise=measured,
        )


class SolveSettings(Section):
    """Statistics around the solution; the problem itself is `beta`, `reward` and `constraints`."""

    on_length: Literal["keep", "drop", "flag"] = "keep"
    """Responses that the token limit cut off: kept, left out of all that follows, or kept with a warning. Their effect
    on each mean is reported in any case."""
    correct_response_bias: bool = False
    """Take the multipliers that the response ladder corrects for finitely many responses, where it allows that: those
    that are best on the samples overfulfil the demand where responses are few."""
    bootstrap_replicates: Annotated[int, Field(ge=100)] = 1000
    """Of the intervals of ``dual.json``."""
    frontier_points: Annotated[int, Field(ge=2)] = 61
    """Thresholds that are solved for each constraint."""


class PairSettings(_SourceSettings):
    """Pairs of responses of a data set, one pair a row.

    System message and share of test prompts are those of ``prompts``, so that a prompt has the same id and the same
    split in both.
    """

    response_columns: tuple[str, str]
    """The two columns with the responses of a pair, texts."""
    limit: Positive | None = None
    """At most so many train prompts take part, with all their pairs: those whose ``prompt_id``, a hash, comes first.
    ``--limit N`` sets it too."""

    @model_validator(mode="after")
    def _two_columns(self) -> Self:
        first, second = self.response_columns
        if first == second:
            raise ValueError(f"`response_columns` names {first!r} twice; a pair is two responses, each in its column")
        return self


class TrainingSettings(TrainSettings):
    """The settings of stage 2, and what a recipe says besides: what is trained on, and where training starts."""

    pairs: PairSettings | None = None
    """Train on the pairs of a data set, each compared in itself, instead of on the reference's own responses. The
    objective must be one that compares responses; ``responses_per_group`` is then of no effect."""
    initial: str | None = None
    """Folder of a policy that training starts from, of the reference's own architecture; with an adapter, one that has
    such an adapter. The reference stays the sampled one; without it training starts there."""

    @field_validator("pairs")
    @classmethod
    def _are_compared(cls, value: PairSettings | None, info: ValidationInfo) -> PairSettings | None:
        objective = info.data.get("objective")  # absent where it is wrong itself
        if value is not None and objective is not None:
            try:
                require_comparison(objective)
            except InputError as error:
                raise ValueError(str(error)) from None
        return value


class EvaluationSettings(Section):
    """How the trained policy is judged, on the test prompts."""

    samples_per_prompt: Positive = 64
    """Responses of the trained policy to each test prompt."""
    bootstrap_replicates: Annotated[int, Field(ge=100)] = 2000
    """Of the interval of the closed fraction."""


class MultishotSettings(Section):
    """The iterative baseline: train at lambda(t), sample the trained policy, step lambda by the slack it shows.

    It starts from the run's own one-shot policy. What is not here is as in ``training``.
    """

    iterations: Annotated[int, Field(ge=2)] = 4
    """Policies in all, the one-shot one included."""
    rule: Literal["secant", "gradient"] = "secant"
    """How lambda moves: by the dual's own curvature, scaled to what the policies show, or by projected gradient."""
    step_size: Annotated[float, Field(gt=0)] | None = None
    """Of the rule `gradient`, reward per squared score unit."""
    samples_per_prompt: Positive = 16
    """Responses of each iterate to every train prompt, by which its slack is measured."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak rate of each iteration after the first, which starts from the policy before it."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Of each iteration after the first."""

    @model_validator(mode="after")
    def _step_of_the_gradient(self) -> Self:
        if (self.rule == "gradient") != (self.step_size is not None):
            raise ValueError(
                f"rule is {self.rule!r} and step_size {self.step_size}; `gradient` needs one, `secant` has none"
            )
        return self


class PublishedSettings(Section):
    """Others' results to draw in the report beside the run's own, from ``pipeline/published/numbers.csv``."""

    paper: str
    """arXiv number."""
    sources: Annotated[list[str], Field(min_length=1)]
    """Tables and figures of the paper."""
    reward: str
    """Metric that is the run's reward, such as ``helpful_gain``."""
    constraints: Annotated[dict[str, str], Field(min_length=1)]
    """Metric by the name of the constraint whose score it is, such as ``safety_gain``."""

    def points(self) -> dict[str, tuple[PublishedPoint, ...]]:
        """The published policies by constraint."""
        return {
            name: read_points(self.paper, self.sources, score=metric, reward=self.reward)
            for name, metric in self.constraints.items()
        }

    @model_validator(mode="after")
    def _are_there(self) -> Self:
        try:
            self.points()
        except InputError as error:
            raise ValueError(str(error)) from error
        return self
