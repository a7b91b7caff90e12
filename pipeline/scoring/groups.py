"""From the scorers of a recipe to what computes them: checks, and shared forward passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.recipe import RunConfig
from pipeline.contracts.errors import ConfigError, InputError
from pipeline.run.run import Run
from pipeline.scorers.kind import Check, ScorerSettings
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
        keeps_answers: whether ``start`` takes ``cache=``, a folder for the answers that it pays for.
        repeated_share: share of the rows that are scored twice, to measure the noise.
        info_columns: columns of ``prompts.info_columns`` that it reads; None for all of them.
    """

    names: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    identity: str
    start: Callable[..., Scorer]
    reads: tuple[str, ...] = ()
    uses_device: bool = True
    looks_up: bool = False
    keeps_answers: bool = False
    repeated_share: float = 0.0
    info_columns: tuple[str, ...] | None = ()


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
        checks: list[Check] = [*settings.check(models), partial(_check_info, config, settings)]
        for check in checks:
            try:
                check()
            except InputError as error:
                faults.append(f"`scorers.{name}`: {error}")
    faults.extend(
        f"`constraints.{one.name}.score_noise` is 'measured', and the scorer {one.statistic.score!r} scores no row "
        "twice (for those of the kind `judge` at an endpoint, `repeat_share` says how many); give the standard "
        "deviation as a number"
        for one, guard in config.stated_constraints()
        if guard.measures_noise and not config.scorers[one.statistic.score].repeated_share
    )
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)), source="the scorers")


def _check_info(config: RunConfig, settings: ScorerSettings) -> None:
    """Check that the columns a scorer reads of the prompts are named, and that what it scores has them.

    Raises:
        InputError: they are not.
    """
    columns, known = settings.info_columns(), config.prompts.info_columns
    missing = [name for name in columns or () if name not in known]
    if missing or (columns is None and not known):
        what = f"the column {missing[0]!r} of the prompts" if missing else "columns of the prompts, {info}"
        raise InputError(f"it reads {what}; `prompts.info_columns` must name it (it has {list(known)})")
    if columns != () and config.training.pairs is not None:
        raise InputError(
            "it reads columns of the prompts, which the pairs of `training.pairs` do not have; train on the samples"
        )


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
                uses_device=first.uses_device and bool(first.checkpoints()),
                looks_up=not first.scores_any_response,
                keeps_answers=first.keeps_answers,
                repeated_share=first.repeated_share,
                info_columns=first.info_columns(),
            )
        )
    return groups
