"""From the scorers of a recipe to what computes them: the one table of kinds, checks, and shared forward passes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.recipe import RunConfig
from pipeline.contracts.errors import ConfigError, InputError
from pipeline.run.run import Run
from pipeline.scorers.kinds import KINDS
from pipeline.scorers.log_ratio import LogRatioSettings
from pipeline.scorers.models import EMBEDDED, Locate, ModelSettings, Source, resolve_model
from stage1_dual.scoring.protocol import Scorer

# Where and how a scorer reads, as opposed to what it computes; what it reads is in the identity.
_NOT_IDENTITY = {
    "model",
    "revision",
    "reference",
    "batch_tokens",
    "calibration",
    "min_accuracy",
    "folder",
    "table",
}


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
    """

    names: tuple[str, ...]
    settings: tuple[Mapping[str, Any], ...]
    identity: str
    start: Callable[..., Scorer]
    reads: tuple[str, ...] = ()
    uses_device: bool = True


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
        for inner, (setting, model) in _models(config, name).items():
            try:
                path = locate(model, places, setting=setting)
            except InputError as error:
                faults.append(str(error))
            else:
                if path is not None and not model.model.startswith(EMBEDDED):
                    models[inner] = Source(path, model.revision)
        quantised = config.reference.quantization is not None
        if isinstance(settings, LogRatioSettings) and settings.reference is None and quantised:
            faults.append(
                f"`scorers.{name}`: the run's reference is quantised, which a log-ratio does not read; give it a "
                "`reference` of its own"
            )
        for check in KINDS[settings.kind].check(settings, models):
            try:
                check()
            except InputError as error:
                faults.append(f"`scorers.{name}`: {error}")
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)), source="the scorers")


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
            for inner, (setting, model) in _models(run.config, name).items()
        }
        share = KINDS[settings.kind].share
        key: Hashable = name if share is None else (settings.kind, share(settings, models[name]))
        shared.setdefault(key, []).append(name)
    groups = []
    for members in shared.values():
        settings_of = [run.config.scorers[name] for name in members]
        first, kind = settings_of[0], KINDS[settings_of[0].kind]
        groups.append(
            ScorerGroup(
                names=tuple(members),
                settings=tuple(one.model_dump(mode="json", exclude=_NOT_IDENTITY) for one in settings_of),
                identity=kind.identity(first, models[members[0]]),
                start=kind.start(settings_of, models[members[0]]),
                reads=kind.reads(first),
                uses_device=kind.uses_device,
            )
        )
    return groups


def _models(config: RunConfig, name: str) -> dict[str, tuple[str, ModelSettings]]:
    """The models of a scorer by the name of their setting within it: (setting of the recipe, model)."""
    scorer = config.scorers[name]
    models = {
        inner: (f"scorers.{name}.{inner}".removesuffix("."), model) for inner, model in scorer.checkpoints().items()
    }
    if isinstance(scorer, LogRatioSettings):
        models.setdefault("reference", ("reference", config.reference))
    return models
