"""From the scorers of a recipe to what computes them: the one table of kinds, checks, and shared forward passes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import (
    EMBEDDED,
    ColumnSettings,
    LogRatioSettings,
    ModelSettings,
    PythonSettings,
    RunConfig,
    SafeRlhfSettings,
    SequenceClassificationSettings,
)
from pipeline.contracts.artifacts import checkpoint_sha256, content_sha256, file_sha256
from pipeline.contracts.errors import ConfigError, InputError
from pipeline.contracts.tables import SAMPLES
from pipeline.models import Locate, resolve_model
from pipeline.run import Run
from stage1_dual.checkpoints import (
    check_causal_checkpoint,
    check_score_model_checkpoint,
    check_scorer_checkpoint,
    check_template,
    is_text_template,
)
from stage1_dual.sampling.prompts import load_tokenizer
from stage1_dual.scoring.column import ColumnScorer, require_numbers
from stage1_dual.scoring.log_ratio import LogRatioScorer, read_pairs, require_same_tokenizer
from stage1_dual.scoring.outputs import Affine, HeadOutput
from stage1_dual.scoring.protocol import Scorer
from stage1_dual.scoring.python_function import PythonScorer, find_source, import_function
from stage1_dual.scoring.safe_rlhf_score import SafeRlhfScorer
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer

_TOKEN_IDS = ("prompt_token_ids", "completion_token_ids")
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

Check = Callable[[], object]


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder, or an id on the Hub with its revision."""

    path: str
    revision: str | None

    @property
    def is_folder(self) -> bool:
        """Whether it is on this machine."""
        return Path(self.path).is_dir()

    @property
    def identity(self) -> str:
        """sha256 of the files of a folder, or of name and revision of a model on the Hub."""
        if self.is_folder:
            return checkpoint_sha256(Path(self.path))
        return content_sha256({"hub": self.path, "revision": self.revision})


Models = Mapping[str, Source]
"""The models of a scorer by the name of their setting, "" for its own; without those that are yet to be built."""


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


@dataclass(frozen=True)
class _Kind:
    """One kind of scorer.

    Attributes:
        check: what can be checked before anything expensive, from the scorer's settings and models, as calls that
            raise InputError.
        share: scorers of the kind with equal values share one pass; None where a scorer always has its own.
        identity: sha256 of what the scorers of one pass read, from the settings of any of them and its models.
        start: starts their scorer, from the settings of all of them and the models.
        reads: as in :class:`ScorerGroup`.
        uses_device: the same.
    """

    check: Callable[[Any, Models], Iterator[Check]]
    share: Callable[[Any, Models], Hashable] | None
    identity: Callable[[Any, Models], str]
    start: Callable[[Sequence[Any], Models], Callable[..., Scorer]]
    reads: Callable[[Any], tuple[str, ...]] = lambda _: ()
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
        for check in _KINDS[settings.kind].check(settings, models):
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
        share = _KINDS[settings.kind].share
        key: Hashable = name if share is None else (settings.kind, share(settings, models[name]))
        shared.setdefault(key, []).append(name)
    groups = []
    for members in shared.values():
        settings_of = [run.config.scorers[name] for name in members]
        first, kind = settings_of[0], _KINDS[settings_of[0].kind]
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


def _affine(settings: Any) -> Affine:
    return Affine(sign=settings.sign, offset=settings.offset)


def _same_text(settings: Any, models: Models) -> Hashable:
    """What two heads must have in common to be read off one pass."""
    return (
        models[""],
        settings.template,
        settings.dtype,
        settings.max_length,
        settings.over_length,
    )


def _text_identity(settings: Any, models: Models) -> str:
    checkpoint = models[""].identity
    if settings.template is None or is_text_template(settings.template):
        return checkpoint
    # The settings hold the name of the file only.
    return content_sha256({"checkpoint": checkpoint, "template": file_sha256(Path(settings.template))})


def _absolute(template: str | None) -> str | None:
    """A template file by its whole path: workers of a cluster have another current folder."""
    return template if template is None or is_text_template(template) else str(Path(template).absolute())


def _text_arguments(settings: Sequence[Any], models: Models) -> dict[str, Any]:
    first = settings[0]
    return {
        "revision": models[""].revision,
        "template": _absolute(first.template),
        "dtype": first.dtype,
        "max_length": first.max_length,
        "over_length": first.over_length,
        "token_budget": min(one.batch_tokens for one in settings),
    }


def _check_classifier(settings: SequenceClassificationSettings, models: Models) -> Iterator[Check]:
    if "" in models:
        yield partial(
            check_scorer_checkpoint,
            models[""].path,
            head=settings.head,
            template=settings.template,
            revision=models[""].revision,
        )
    else:
        yield partial(check_template, settings.template)


def _start_classifier(
    settings: Sequence[SequenceClassificationSettings], models: Models
) -> Callable[..., SequenceClassificationScorer]:
    outputs = tuple(HeadOutput(one.head, one.output, _affine(one)) for one in settings)
    return partial(SequenceClassificationScorer, models[""].path, outputs=outputs, **_text_arguments(settings, models))


def _check_score_model(settings: SafeRlhfSettings, models: Models) -> Iterator[Check]:
    if "" in models:
        yield partial(
            check_score_model_checkpoint,
            models[""].path,
            head=settings.head,
            template=settings.template,
            revision=models[""].revision,
        )
    else:
        yield partial(check_template, settings.template)


def _start_score_model(settings: Sequence[SafeRlhfSettings], models: Models) -> Callable[..., SafeRlhfScorer]:
    outputs = tuple(HeadOutput(one.head, "logit", _affine(one)) for one in settings)
    return partial(SafeRlhfScorer, models[""].path, outputs=outputs, **_text_arguments(settings, models))


def _check_log_ratio(settings: LogRatioSettings, models: Models) -> Iterator[Check]:
    if "" in models:
        yield partial(check_causal_checkpoint, models[""].path, revision=models[""].revision)
    yield partial(check_template, settings.template, reads_prompt=True)
    if settings.calibration is not None:
        yield partial(read_pairs, Path(settings.calibration))
    local = all(inner in models and models[inner].is_folder for inner in ("", "reference"))
    if local and importlib.util.find_spec("transformers") is not None:
        yield partial(_check_tokenizers, models[""].path, models["reference"].path)


def _check_tokenizers(tuned: str, reference: str) -> None:
    require_same_tokenizer(load_tokenizer(tuned), load_tokenizer(reference), checkpoint=tuned, reference=reference)


def _log_ratio_identity(settings: LogRatioSettings, models: Models) -> str:
    del settings
    return content_sha256({"tuned": models[""].identity, "reference": models["reference"].identity})


def _start_log_ratio(settings: Sequence[LogRatioSettings], models: Models) -> Callable[..., LogRatioScorer]:
    one = settings[0]
    return partial(
        LogRatioScorer,
        models[""].path,
        reference=models["reference"].path,
        revision=models[""].revision,
        reference_revision=models["reference"].revision,
        scale=one.scale,
        affine=_affine(one),
        dtype=one.dtype,
        max_length=one.max_length,
        calibration=None if one.calibration is None else str(Path(one.calibration).absolute()),
        min_accuracy=one.min_accuracy,
        template=_absolute(one.template),
        token_budget=one.batch_tokens,
    )


def _folders(settings: PythonSettings) -> tuple[str, ...]:
    return (*([settings.folder] if settings.folder is not None else []), str(Path.cwd()))


def _check_function(settings: PythonSettings, models: Models) -> Iterator[Check]:
    del models
    yield partial(import_function, settings.function, folders=_folders(settings))


def _function_identity(settings: PythonSettings, models: Models) -> str:
    del models
    return file_sha256(find_source(settings.function, folders=_folders(settings)))


def _start_function(settings: Sequence[PythonSettings], models: Models) -> Callable[..., PythonScorer]:
    del models
    one = settings[0]
    folders = tuple(str(Path(folder).resolve()) for folder in _folders(one))
    return partial(PythonScorer, one.function, folders=folders, settings=one.settings, affine=_affine(one))


def _check_column(settings: ColumnSettings, models: Models) -> Iterator[Check]:
    del models
    if settings.table is not None:
        yield partial(ColumnScorer, settings.column, table=settings.table)
    else:
        yield partial(_check_sample_column, settings.column)


def _check_sample_column(column: str) -> None:
    if column not in SAMPLES.names:
        raise InputError(f"`column` is {column!r}; the samples have the columns {SAMPLES.names}; or give a `table`")
    require_numbers(SAMPLES.field(column), where="the samples")


def _column_identity(settings: ColumnSettings, models: Models) -> str:
    del models
    return content_sha256("samples") if settings.table is None else file_sha256(Path(settings.table))


def _start_column(settings: Sequence[ColumnSettings], models: Models) -> Callable[..., ColumnScorer]:
    del models
    one = settings[0]
    table = None if one.table is None else str(Path(one.table).resolve())
    return partial(ColumnScorer, one.column, table=table, affine=_affine(one))


_KINDS: Mapping[str, _Kind] = {
    "sequence_classification": _Kind(_check_classifier, _same_text, _text_identity, _start_classifier),
    "safe_rlhf_score": _Kind(_check_score_model, _same_text, _text_identity, _start_score_model),
    "log_ratio": _Kind(_check_log_ratio, None, _log_ratio_identity, _start_log_ratio, lambda _: _TOKEN_IDS),
    "python": _Kind(
        _check_function, None, _function_identity, _start_function, lambda _: _TOKEN_IDS, uses_device=False
    ),
    "column": _Kind(
        _check_column,
        None,
        _column_identity,
        _start_column,
        lambda settings: (settings.column,) if settings.table is None else (),
        uses_device=False,
    ),
}
