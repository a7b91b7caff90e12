"""From the scorers of a recipe to what computes them: checks, and shared forward passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.recipe import RunConfig
from pipeline.contracts.errors import ConfigError, InputError
from pipeline.run.run import Run
from pipeline.scorers.models import EMBEDDED, Locate, Source, resolve_model
from stage1_dual.scoring.protocol import Scorer


@dataclass(frozen=True)
class ScorerGroup:
    """Scorers of the recipe that one pass over the samples computes.

    Attributes:
        names: of the scorers, in the order of the outputs.
        settings: for each of them what determines its values, JSON-serialisable; neither speed nor place.
        identity: sha256 of the checkpoint, code or table it reads.
        start: starts the scorer; can be pickled. Called without arguments it uses the accelerator its process sees;
            where ``uses_device`` it takes ``device=``, a torch device.
        reads: columns of the samples table it needs besides prompt_id, sample_index and completion.
        uses_device: whether it computes on a torch device.
        looks_up: whether its scores are looked up, which costs nothing to do again.
    """

    names: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    identity: str
    start: Callable[..., Scorer]
    reads: tuple[str, ...] = ()
    uses_device: bool = True
    looks_up: bool = False


def check_scorers(config: RunConfig, embedded: Iterable[str], *, locate: Locate = resolve_model) -> None:
    """Check everything about the scorers that can be known before models are built and samples drawn.

    Args:
        config: the run configuration.
        embedded: names of the embedded models, of which only the name is checked.
        locate: finds each model; of one that it does not find, what the recipe says of it is checked.

    Raises:
        ConfigError: lists every fault, with the scorer it belongs to.
    """
    places = {name: Path() for name in embedded}
    faults: list[str] = []
    for name, settings in config.scorers.items():
        models: dict[str, Source] = {}
        for inner, (setting, model) in config.models_of(name).items():
            try:
                path = locate(model, places, setting=setting)
            except InputError as error:
                faults.append(str(error))
            else:
                if path is not None and not model.model.startswith(EMBEDDED):
                    models[inner] = Source(path, model.revision)
        if config.reference.quantization is not None:
            faults.extend(
                f"`scorers.{name}`: the run's reference is quantised, which no scorer reads; give it a "
                f"`{inner}` of its own"
                for inner, model in settings.checkpoints().items()
                if model is None
            )
        for check in settings.check(models):
            try:
                check()
            except InputError as error:
                faults.append(f"`scorers.{name}`: {error}")
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)), source="the scorers")


def check_new_responses(config: RunConfig) -> None:
    """Check that the reward and the constraints can have scores of what a policy yet to be trained will say.

    Raises:
        ConfigError: lists every scorer that cannot.
    """
    faults: list[str] = []
    for name in config.needed_scores():
        try:
            config.scorers[name].check_new_responses()
        except InputError as error:
            faults.append(f"`scorers.{name}`: {error}")
    if faults:
        raise ConfigError(faults, source="the scorers, of which an evaluation needs those of reward and constraints")


def group_scorers(run: Run, names: Sequence[str]) -> list[ScorerGroup]:
    """The passes that compute the scorers named, in the order in which each is first named.

    Raises:
        InputError: a model is not there.
    """
    shared: dict[Hashable, list[str]] = {}
    models: dict[str, dict[str, Source]] = {}
    for name in names:
        settings = run.config.scorers[name]
        models[name] = {
            inner: Source(run.model(model, setting), model.revision)
            for inner, (setting, model) in run.config.models_of(name).items()
        }
        common = settings.shared_settings()
        key: Hashable = name if common is None else (type(settings), tuple(models[name].items()), common)
        shared.setdefault(key, []).append(name)
    groups = []
    for members in shared.values():
        settings_of = [run.config.scorers[name] for name in members]
        first, places = settings_of[0], models[members[0]]
        groups.append(
            ScorerGroup(
                names=tuple(members),
                settings=tuple(one.identity_settings() for one in settings_of),
                identity=first.identity(places),
                start=first.start(settings_of, places),
                reads=first.reads(),
                uses_device=first.uses_device,
                looks_up=not first.scores_any_response,
            )
        )
    return groups
