"""One frozen, typed run configuration; the files in ``recipes/`` are its instances.

A recipe is YAML (read by the safe loader), settings on the command line win over it, and every fault of the result is
reported at once. The configuration stays in this package: the stages take plain arguments.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.contracts.errors import ConfigError, InputError
from pipeline.contracts.problem import Constraint, Direction, Safeguard
from pipeline.published import PublishedPoint, read_points
from stage1_dual.sampling.protocol import Distribution

RECIPES = Path(__file__).parent / "recipes"
EMBEDDED = "embedded:"
"""Prefix of the names of models that ``dualign prepare`` builds."""

Dtype = Literal["float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(ge=1)]
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_NAME = re.compile(r"^[A-Za-z_][\w-]*$")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _SourceSettings(_Section):
    """A source of rows with prompts: a Parquet, JSON Lines or CSV file; a folder or a Hub id that
    ``datasets.load_dataset`` reads.
    """

    source: str
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


class PromptSettings(_SourceSettings):
    """Where the prompts come from: ``embedded`` (the built-in world), or any other source."""

    source: str = "embedded"
    system: str | None = None
    """System message put before every prompt that has none."""
    category_column: str | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the prompts that a split by hash puts into ``test``."""
    repeated: Literal["refuse", "drop"] = "refuse"
    """What to do with a prompt that occurs again; dropped ones are counted."""
    limit: Positive | None = None
    """At most so many prompts of each split take part: those whose ``prompt_id``, a hash, comes first. A larger limit
    adds prompts to those of a smaller one. ``--limit N`` is its short name on the command line."""


class ModelSettings(_Section):
    """A checkpoint: ``embedded:NAME``, a local folder, or a Hub id (the only thing that uses the network).

    Code that comes with a model is never run.
    """

    model: str
    revision: str | None = None
    """Branch, tag or commit; a Hub id needs one."""
    dtype: Dtype = "float32"


class ReferenceSettings(ModelSettings):
    """The reference policy."""

    template: str | None = None
    """A text with ``{prompt}``, or the path of a chat template file; without it the tokenizer's own chat template."""
    adapter: str | None = None
    """Folder of a LoRA adapter that is part of the reference."""
    quantization: str | None = None
    """vLLM's name of a quantisation to load the reference with."""


class SamplingSettings(_Section):
    """How responses are drawn.

    The dual assumes draws from the reference itself: temperature 1 and the whole vocabulary.
    """

    engine: Literal["vllm", "transformers"] = "vllm"
    samples_per_prompt: Positive = 128
    max_new_tokens: Positive = 512
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    samples_are_not_of_the_reference: bool = False
    """Must be true for any other temperature, top_p, top_k or min_p: the result then holds for the changed
    distribution, which is not the model that is fine-tuned."""
    logp_rows: Annotated[int, Field(ge=0)] = 128
    """Samples whose log-probability is computed again by the training stack; 0 for none."""
    logp_limit: Annotated[float, Field(gt=0)] = 0.1
    """Mean absolute difference to the sampler's log-probability above which the step fails, nats a token."""
    shard_rows: Positive = 4096
    """Responses a shard; what a killed run loses at most."""
    max_num_seqs: Positive = 256
    """Responses decoded at the same time; throughput only."""
    tensor_parallel_size: Positive = 1
    """Accelerators that share the model."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9

    @model_validator(mode="after")
    def _of_the_reference(self) -> Self:
        if not (self.distribution.is_the_policy or self.samples_are_not_of_the_reference):
            raise ValueError(
                f"temperature {self.temperature:g}, top_p {self.top_p:g}, top_k {self.top_k} and min_p {self.min_p:g} "
                "do not draw from the reference (1, 1, 0 and 0 do); the dual and the training assume that it is. Set "
                "`samples_are_not_of_the_reference: true` to go on all the same"
            )
        return self

    @property
    def distribution(self) -> Distribution:
        """What is drawn from."""
        return Distribution(self.temperature, self.top_p, self.top_k, self.min_p)


class ExecutionSettings(_Section):
    """Where samplers and scorers run. Nothing of what they write depends on it."""

    kind: Literal["in_process", "ray"] = "in_process"
    address: str | None = None
    """Of a running Ray cluster (``auto``, ``ray://HOST:PORT``); without it one is started on this machine."""
    min_actors: Positive = 1
    max_actors: Positive = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    """Without it: as many as ``sampling.tensor_parallel_size`` where this machine has a GPU, otherwise none."""
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors is {self.max_actors}, fewer than min_actors, {self.min_actors}")
        return self


class _ScorerBase(_Section):
    """What every scorer has. The value is ``sign * raw + offset``."""

    sign: Literal[1, -1] = 1
    """-1 turns the direction of a score round, as of a cost. A bound from above needs none: see ``direction``."""
    offset: float = 0.0

    def checkpoints(self) -> dict[str, ModelSettings]:
        """The models this scorer loads, by the name of the setting within it; empty for the scorer itself."""
        return {}


class _TextScorer(_ScorerBase, ModelSettings):
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


class SequenceClassificationSettings(_TextScorer):
    """One head of a sequence classifier; scorers of one checkpoint, read alike, share its forward pass."""

    kind: Literal["sequence_classification"] = "sequence_classification"
    head: int | str = 0
    """Index of the head, or its label."""
    output: Literal["logit", "probability"] = "logit"


class SafeRlhfSettings(_TextScorer):
    """A reward or cost model in the layout of safe-rlhf, such as Beaver's."""

    kind: Literal["safe_rlhf_score"]
    head: Annotated[int, Field(ge=0)] = 0
    """Which of the checkpoint's ``score_dim`` scores."""


class LogRatioSettings(_ScorerBase, ModelSettings):
    """The implicit reward of a preference-tuned policy: ``scale`` times the log-ratio to its reference."""

    kind: Literal["log_ratio"]
    reference: ModelSettings | None = None
    """The policy it was tuned from; the run's reference where not given."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Score units per nat: the beta of the preference tuning."""
    max_length: Positive | None = None
    calibration: str | None = None
    """Table of preference pairs (prompt, chosen, rejected), judged when scoring starts; see the manifest."""
    min_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of those pairs the score must get right, or the step fails."""
    template: str | None = None
    """How the pairs' prompts are rendered; without it by the reference's chat template."""
    batch_tokens: Positive = 4096

    def checkpoints(self) -> dict[str, ModelSettings]:
        """The tuned policy and, where the scorer names one, its reference."""
        return {"": self, **({"reference": self.reference} if self.reference is not None else {})}

    @model_validator(mode="after")
    def _accuracy_of_pairs(self) -> Self:
        if self.min_accuracy is not None and self.calibration is None:
            raise ValueError("gives `min_accuracy` without `calibration`; give the table of pairs to judge")
        return self


class PythonSettings(_ScorerBase):
    """A function of the user's."""

    kind: Literal["python"]
    function: str
    """``module:name``."""
    settings: dict[str, Any] = {}
    """Keyword arguments of the function."""
    folder: str | None = None
    """Where the module is looked for first, before the current folder; the recipe's own folder where not given."""


class ColumnSettings(_ScorerBase):
    """Scores that are there already."""

    kind: Literal["column"]
    column: str
    table: str | None = None
    """Parquet, CSV or JSON Lines; a column of the samples table where not given."""


SCORER_SETTINGS: Mapping[str, type[_ScorerBase]] = {
    "sequence_classification": SequenceClassificationSettings,
    "safe_rlhf_score": SafeRlhfSettings,
    "log_ratio": LogRatioSettings,
    "python": PythonSettings,
    "column": ColumnSettings,
}
"""The settings of each kind of scorer; a further kind is a row here and in ``ScorerSettings``."""


def _scorer_kind(scorer: Any) -> Any:
    if isinstance(scorer, Mapping):
        return scorer.get("kind", "sequence_classification")
    return getattr(scorer, "kind", None)


ScorerSettings = Annotated[
    Annotated[SequenceClassificationSettings, Tag("sequence_classification")]
    | Annotated[SafeRlhfSettings, Tag("safe_rlhf_score")]
    | Annotated[LogRatioSettings, Tag("log_ratio")]
    | Annotated[PythonSettings, Tag("python")]
    | Annotated[ColumnSettings, Tag("column")],
    Discriminator(_scorer_kind),
]
"""A score. Its bound, and whether it is one from below or from above, belong to the constraint that uses it."""


class ConstraintSettings(_Section):
    """Bound on the mean of a score, in its own direction and units."""

    direction: Direction
    threshold: float | None = None
    margin: float | None = None
    reserve: float = 0.0
    """Score units the dual asks for beyond the demand, since a fine-tuned policy falls short of the tilted optimum by
    what it cannot learn; negative for one that is known to overshoot. The evaluation judges the demand itself."""
    assurance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Probability that the evaluation of a policy at the tilted optimum calls the constraint satisfied: the dual is
    asked for as much more as the errors of prediction and evaluation need."""
    score_error: Annotated[float, Field(ge=0)] = 0.0
    """Root mean square error of the scorer's differences between two responses, score units: the dual is asked for as
    much more as such an error can hide."""

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.threshold is None) == (self.margin is None):
            given = "both" if self.threshold is not None else "neither"
            raise ValueError(f"gives {given} of `threshold` and `margin`; give exactly one")
        return self


class SolveSettings(_Section):
    """Statistics around the solution; the problem itself is `beta`, `reward` and `constraints`."""

    on_length: Literal["keep", "drop", "flag"] = "keep"
    """Responses that the token limit cut off: kept, left out of all that follows, or kept with a warning. Their effect
    on each mean is reported in any case."""
    correct_response_bias: bool = False
    """Take the multipliers that the response ladder corrects for finitely many responses, where it allows that: those
    that are best on the samples overfulfil the demand where responses are few."""
    bootstrap_replicates: Annotated[int, Field(ge=100)] = 1000
    frontier_points: Annotated[int, Field(ge=2)] = 61


LIKELIHOODS = ("tilted_nll", "tilted_kl")
"""Objectives that take the responses they are trained on for draws of the reference. A test holds them to the flag of
the objectives themselves, which cannot be read here: they need torch."""


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


class TrainingSettings(_Section):
    """The one fine-tuning run. There is no lambda and no beta here: they come from the dual artifact."""

    objective: str | dict[str, Annotated[float, Field(gt=0)]] = "tilted_pairwise"
    """Name of an objective of stage 2, or several names with their weights."""
    pairs: PairSettings | None = None
    """Train on the pairs of a data set, each compared in itself, instead of on the reference's own responses. The
    objective must be one that compares responses; ``responses_per_group`` is then of no effect."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    epochs: Annotated[float, Field(gt=0)] = 1.0
    tokens_per_step: Positive = 16384
    tokens_per_microbatch: Positive = 8192
    """Tokens in memory at once; speed and memory only."""
    responses_per_group: Positive = 8
    """How many responses to a prompt are compared with each other, about."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the train prompts that choose the checkpoint instead of training it."""
    evaluations: Positive = 12
    """How often the gap to the tilted optimum is estimated on held-out prompts, and a checkpoint saved."""
    patience: Positive = 4
    """Stop after so many evaluations without a better one."""
    negligible_mass: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a prompt's tilted weight that may be skipped, least weights first; for `tilted_nll` only."""
    match_prediction: bool = False
    """After training, move along the ray from the reference until the policy's mean score on held-out prompts is what
    the dual predicts: the fitted log-ratios are shrunken, as those of any regression are. Not with sharded weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass; speed and memory only."""
    adapter: Literal["none", "lora", "qlora"] = "none"
    """Train all weights, low-rank updates of them, or low-rank updates of weights in 4 bits (a CUDA device)."""
    lora_r: Positive = 16
    lora_alpha: Positive = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of what enters a low-rank update that is dropped in training, at random; none in any evaluation."""
    lora_target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the layers that get an update, or `all-linear`: all but the head."""
    initial: str | None = None
    """Folder of a policy that training starts from, of the reference's own architecture; with an adapter, one that has
    such an adapter. The reference stays the sampled one; without it training starts there."""
    report_to: tuple[str, ...] = ()
    """Trackers by the names of transformers, such as `[tensorboard]`; none by default."""

    @model_validator(mode="after")
    def _pairs_are_compared(self) -> Self:
        named = [self.objective] if isinstance(self.objective, str) else list(self.objective)
        likelihoods = [name for name in named if name in LIKELIHOODS]
        if self.pairs is not None and likelihoods:
            raise ValueError(
                f"`objective` is {self.objective!r}, and `pairs` names pairs of a data set: {likelihoods[0]} takes "
                "the responses for draws of the reference, which these are not; it must be an objective that compares "
                "two responses, such as `dpo` or `tilted_pairwise`"
            )
        return self


class EvaluationSettings(_Section):
    """How the trained policy is judged, on the test prompts."""

    samples_per_prompt: Positive = 64
    bootstrap_replicates: Annotated[int, Field(ge=100)] = 2000


class MultishotSettings(_Section):
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


class PublishedSettings(_Section):
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


class RunConfig(_Section):
    """Everything that determines a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    beta: Annotated[float, Field(gt=0)]
    """KL strength, reward per nat; the only place where it is set."""
    prompts: PromptSettings = PromptSettings()
    reference: ReferenceSettings
    sampling: SamplingSettings = SamplingSettings()
    execution: ExecutionSettings = ExecutionSettings()
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the rows of a step that may fail before it stops; failed rows are counted and tried again next time."""
    scorers: dict[str, ScorerSettings]
    reward: str
    """Name of the scorer to maximise."""
    constraints: dict[str, ConstraintSettings]
    """Bounds by the name of the scorer they bound."""
    solve: SolveSettings = SolveSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    multishot: MultishotSettings = MultishotSettings()
    published: PublishedSettings | None = None

    @field_validator("execution", mode="before")
    @classmethod
    def _execution_by_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    def demanded_constraints(self) -> tuple[Constraint, ...]:
        """The constraints as demanded, in the order of the recipe: what the evaluation judges."""
        return tuple(
            Constraint(name, bound.direction, threshold=bound.threshold, margin=bound.margin)
            for name, bound in self.constraints.items()
        )

    def safeguards(self) -> tuple[Safeguard, ...]:
        """What the dual is asked for beyond each demand, in the order of the recipe."""
        return tuple(
            Safeguard(reserve=bound.reserve, assurance=bound.assurance, score_error=bound.score_error)
            for bound in self.constraints.values()
        )

    def checkpoints(self) -> dict[str, ModelSettings]:
        """Every model of the run by the setting that names it, such as ``reference`` and ``scorers.helpful``."""
        found: dict[str, ModelSettings] = {"reference": self.reference}
        for name, scorer in self.scorers.items():
            for inner, model in scorer.checkpoints().items():
                found[f"scorers.{name}.{inner}".removesuffix(".")] = model
        return found

    def used_scorers(self) -> dict[str, ScorerSettings]:
        """All scorers of the recipe, the reward first: an unused one is still scored, for the next question."""
        return {self.reward: self.scorers[self.reward], **self.scorers}


def load_config(
    path: Path, overrides: Mapping[str, str] | None = None, *, pairs_limit: str | None = None
) -> RunConfig:
    """Read a recipe and apply ``section.key -> text`` overrides (text is read as YAML).

    Args:
        path: a YAML file, or the bare name of a shipped recipe.
        overrides: dotted key to text, as on the command line.
        pairs_limit: text for ``training.pairs.limit`` of a recipe that trains on pairs of a data set.

    Raises:
        ConfigError: lists every fault, with the nearest valid name where a name is unknown.
    """
    found = _find_recipe(path)
    source = f"{found}" + (" with the settings of the command line" if overrides else "")
    try:
        tree = yaml.load(found.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"not valid YAML: {error}"], source=str(found)) from error
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror or error}"], source=str(found)) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"holds {type(tree).__name__}; it must be a mapping of settings"], source=str(found))
    for key, text in (overrides or {}).items():
        _set(tree, key, text)
    training = tree.get("training")
    if pairs_limit is not None and isinstance(training, Mapping) and training.get("pairs") is not None:
        _set(tree, "training.pairs.limit", pairs_limit)
    _look_beside(found, tree)
    return build_config(tree, source=source)


def build_config(tree: Mapping[str, Any], *, source: str) -> RunConfig:
    """Validate a nested mapping of settings.

    Raises:
        ConfigError: lists every fault.
    """
    faults: list[str] = []
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        faults.extend(_describe(fault) for fault in error.errors())
    faults.extend(_cross_faults(tree))
    if faults or config is None:
        raise ConfigError(list(dict.fromkeys(faults)), source=source)
    return config


def is_hub_id(name: str) -> bool:
    """Whether the name of a model is that of a repository on the Hub: not embedded, not a folder, ``owner/name``."""
    return not name.startswith(EMBEDDED) and not Path(name).is_dir() and _HUB_ID.match(name) is not None


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error about an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"


def _find_recipe(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = RECIPES / f"{path.name}.yaml"
    if path.parent == Path() and shipped.is_file():
        return shipped
    names = [recipe.stem for recipe in RECIPES.glob("*.yaml")]
    raise ConfigError(
        [f"there is no such file, and no such shipped recipe{nearest(path.stem, names)}"], source=str(path)
    )


def _look_beside(recipe: Path, tree: Mapping[str, Any]) -> None:
    """The functions of a recipe are looked for in its own folder, unless it names another."""
    scorers = tree.get("scorers")
    for scorer in scorers.values() if isinstance(scorers, Mapping) else ():
        if isinstance(scorer, dict) and scorer.get("kind") == "python":
            scorer.setdefault("folder", str(recipe.parent))


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError([f"`{key}`: `{section}` is a value, not a section"], source="the command line")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            [f"`{key}` is {text!r}, which is not a YAML value: {error}"], source="the command line"
        ) from error


def _describe(fault: Any) -> str:
    # Within a scorer, pydantic names its kind as if it were a setting.
    in_scorer = fault["loc"][:1] == ("scorers",)
    place = ".".join(str(part) for k, part in enumerate(fault["loc"]) if not (in_scorer and k == 2))
    kind, value = fault["type"], fault.get("input")
    if kind == "union_tag_invalid":
        tag = str(fault["ctx"]["tag"])
        return f"`{place}.kind` is {tag!r}; there is no such kind{nearest(tag, SCORER_SETTINGS)}"
    if kind == "union_tag_not_found":
        return f"`{place}` is {value!r}; a scorer is a mapping of settings"
    if kind == "extra_forbidden":
        return f"unknown setting `{place}`{nearest(str(fault['loc'][-1]), _fields_at(fault['loc'][:-1]))}"
    if kind == "missing":
        return f"`{place}` is missing; it has no default"
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(value, str | int | float | bool) or value is None:
        return f"`{place}` is {value!r}: {message[:1].lower()}{message[1:]}"
    return f"`{place}`: {message}" if place else message


def _fields_at(location: Sequence[str | int]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            annotation: Any = model.model_fields[str(part)].annotation
            arguments: Any = getattr(annotation, "__args__", ())
            model = arguments[1] if getattr(annotation, "__origin__", None) is dict else annotation
            if type(None) in arguments:  # a section that may be left out
                model = arguments[0]
        elif part in SCORER_SETTINGS:
            model = SCORER_SETTINGS[str(part)]
        # Other keys of a dict section (names of scorers, constraints) leave the model as it is.
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _cross_faults(tree: Mapping[str, Any]) -> list[str]:
    """Faults between sections; read from the raw tree, so that they are found beside the others."""
    scorers, constraints = tree.get("scorers"), tree.get("constraints")
    faults: list[str] = []
    if isinstance(scorers, Mapping):
        faults.extend(
            f"`scorers.{name}`: a name is letters, digits, `_` and `-`, and begins with a letter"
            for name in scorers
            if not _NAME.match(str(name))
        )
        reward = tree.get("reward")
        if isinstance(reward, str) and reward not in scorers:
            faults.append(f"`reward` is {reward!r}: there is no such scorer{nearest(reward, map(str, scorers))}")
        if isinstance(constraints, Mapping):
            faults.extend(
                f"`constraints.{name}`: there is no scorer of this name{nearest(str(name), map(str, scorers))}"
                for name in constraints
                if name not in scorers
            )
            if isinstance(reward, str) and reward in constraints:
                faults.append(f"`constraints.{reward}` bounds the reward itself; a constraint bounds another score")
    if isinstance(constraints, Mapping) and not constraints:
        faults.append("`constraints` is empty; it needs at least one")
    faults.extend(_pair_faults(tree))
    published = tree.get("published")
    if isinstance(published, Mapping) and isinstance(published.get("constraints"), Mapping):
        bounds = {str(name): bound for name, bound in constraints.items()} if isinstance(constraints, Mapping) else {}
        faults.extend(
            f"`published.constraints.{name}`: there is no such constraint{nearest(str(name), bounds)}"
            for name in published["constraints"]
            if str(name) not in bounds
        )
        faults.extend(
            f"`published.constraints.{name}`: a gain is better where it is higher, and this constraint is from above; "
            "turn its score with `sign: -1`"
            for name in published["constraints"]
            if isinstance(bound := bounds.get(str(name)), Mapping) and bound.get("direction") == "<="
        )
    return faults


def _pair_faults(tree: Mapping[str, Any]) -> list[str]:
    """Scores that pairs of a data set cannot have: a column is looked up by the key of a sampled response."""
    training, scorers, constraints = tree.get("training"), tree.get("scorers"), tree.get("constraints")
    if not isinstance(training, Mapping) or training.get("pairs") is None or not isinstance(scorers, Mapping):
        return []
    used = [tree.get("reward"), *(constraints if isinstance(constraints, Mapping) else ())]
    return [
        f"`scorers.{name}.kind` is 'column', which has scores of the sampled responses alone, and `training.pairs` "
        "names other ones; it must be a scorer that computes its scores"
        for name in used
        if isinstance(scorer := scorers.get(name), Mapping) and scorer.get("kind") == "column"
    ]


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, which also refuses a key written twice (YAML would keep the last one in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
