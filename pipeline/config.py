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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.contracts.errors import ConfigError, InputError
from pipeline.contracts.problem import Constraint, Direction, Safeguard

RECIPES = Path(__file__).parent / "recipes"
EMBEDDED = "embedded:"
"""Prefix of the names of models that ``dualign prepare`` builds."""

Dtype = Literal["float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(ge=1)]
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_NAME = re.compile(r"^[A-Za-z_][\w-]*$")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PromptSettings(_Section):
    """Where the prompts come from.

    ``source`` is ``embedded`` (the built-in world) or a Parquet or JSON Lines file with a prompt column (a string, or
    a list of messages with ``role`` and ``content``).
    """

    source: str = "embedded"
    prompt_column: str = "prompt"
    split_column: str | None = None
    """Column that holds ``train`` or ``test``; without it the split is by a hash of the prompt."""
    category_column: str | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the prompts that a split by hash puts into ``test``."""


class ModelSettings(_Section):
    """A checkpoint: ``embedded:NAME``, a local folder, or a Hub id (the only thing that uses the network).

    Code that comes with a model is never run.
    """

    model: str
    revision: str | None = None
    """Branch, tag or commit; a Hub id needs one."""
    dtype: Dtype = "float32"


class SamplingSettings(_Section):
    """How responses are drawn. Temperature 1 and the whole support are not settings: the dual assumes them."""

    engine: Literal["vllm", "transformers"] = "vllm"
    samples_per_prompt: Positive = 128
    max_new_tokens: Positive = 512
    shard_rows: Positive = 4096
    """Responses a shard; what a killed run loses at most."""
    max_num_seqs: Positive = 256
    """Responses decoded at the same time; throughput only."""


class ScorerSettings(ModelSettings):
    """A score model. The direction of a score belongs to the constraint that uses it."""

    kind: Literal["sequence_classification"] = "sequence_classification"
    head: Annotated[int, Field(ge=0)] = 0
    template: str | None = None
    """Text with ``{prompt}`` and ``{completion}``; without it the scorer's own chat template."""
    max_length: Positive | None = None


class ConstraintSettings(_Section):
    """Bound on the mean of a score, in its own direction and units."""

    direction: Direction
    threshold: float | None = None
    margin: float | None = None
    reserve: Annotated[float, Field(ge=0)] = 0.0
    """Score units the dual asks for beyond the demand, since a fine-tuned policy falls short of the tilted optimum by
    what it cannot learn. The evaluation judges the demand itself."""
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

    bootstrap_replicates: Annotated[int, Field(ge=100)] = 1000
    frontier_points: Annotated[int, Field(ge=2)] = 61


class TrainingSettings(_Section):
    """The one fine-tuning run. There is no lambda and no beta here: they come from the dual artifact."""

    objective: str | dict[str, Annotated[float, Field(gt=0)]] = "tilted_pairwise"
    """Name of an objective of stage 2, or several names with their weights."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    epochs: Annotated[float, Field(gt=0)] = 1.0
    tokens_per_step: Positive = 16384
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the train prompts that choose the checkpoint instead of training it."""
    evaluations: Positive = 12
    """How often the gap to the tilted optimum is estimated on held-out prompts, and a checkpoint saved."""
    dtype: Dtype = "float32"


class EvaluationSettings(_Section):
    """How the trained policy is judged, on the test prompts."""

    samples_per_prompt: Positive = 64
    bootstrap_replicates: Annotated[int, Field(ge=100)] = 2000


class RunConfig(_Section):
    """Everything that determines a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    beta: Annotated[float, Field(gt=0)]
    """KL strength, reward per nat; the only place where it is set."""
    prompts: PromptSettings = PromptSettings()
    reference: ModelSettings
    sampling: SamplingSettings = SamplingSettings()
    scorers: dict[str, ScorerSettings]
    reward: str
    """Name of the scorer to maximise."""
    constraints: dict[str, ConstraintSettings]
    """Bounds by the name of the scorer they bound."""
    solve: SolveSettings = SolveSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

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

    def used_scorers(self) -> dict[str, ScorerSettings]:
        """All scorers of the recipe, the reward first: an unused one is still scored, for the next question."""
        return {self.reward: self.scorers[self.reward], **self.scorers}


def load_config(path: Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read a recipe and apply ``section.key -> text`` overrides (text is read as YAML).

    Args:
        path: a YAML file, or the bare name of a shipped recipe.
        overrides: dotted key to text, as on the command line.

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


def resolve_model(settings: ModelSettings, embedded: Mapping[str, Path], *, setting: str) -> str:
    """The path or Hub id to load.

    Raises:
        InputError: an unknown embedded name, or a path that is not there.
    """
    name = settings.model
    if name.startswith(EMBEDDED):
        key = name.removeprefix(EMBEDDED)
        if key not in embedded:
            raise InputError(f"`{setting}.model` is {name!r}; there is no such embedded model{nearest(key, embedded)}")
        return str(embedded[key])
    if Path(name).is_dir():
        return name
    if not is_hub_id(name):
        raise InputError(
            f"`{setting}.model` is {name!r}; there is no such folder, and it is not a Hub id (owner/name)"
        )
    return name


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
    place = ".".join(str(part) for part in fault["loc"])
    kind, value = fault["type"], fault.get("input")
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
        # Keys of a dict section (names of scorers, constraints) leave the model as it is.
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
    return faults


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, which also refuses a key written twice (YAML would keep the last one in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
