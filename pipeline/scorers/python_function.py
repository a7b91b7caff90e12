"""Scores of a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.contracts.artifacts import file_sha256
from pipeline.scorers.kind import Check, ScorerBase, affine_of
from pipeline.scorers.models import Models
from stage1_dual.scoring.python_function import PythonScorer, find_source, import_function


class PythonSettings(ScorerBase):
    """A function of the user's."""

    kind: Literal["python"]
    function: str
    """``module:name``."""
    settings: dict[str, Any] = {}
    """Keyword arguments of the function."""
    folder: str | None = None
    """Where the module is looked for first, before the current folder; the recipe's own folder where not given."""


def _folders(settings: PythonSettings) -> tuple[str, ...]:
    return (*([settings.folder] if settings.folder is not None else []), str(Path.cwd()))


def check_function(settings: PythonSettings, models: Models) -> Iterator[Check]:
    del models
    yield partial(import_function, settings.function, folders=_folders(settings))


def function_identity(settings: PythonSettings, models: Models) -> str:
    del models
    return file_sha256(find_source(settings.function, folders=_folders(settings)))


def start_function(settings: Sequence[PythonSettings], models: Models) -> Callable[..., PythonScorer]:
    del models
    one = settings[0]
    folders = tuple(str(Path(folder).resolve()) for folder in _folders(one))
    return partial(PythonScorer, one.function, folders=folders, settings=one.settings, affine=affine_of(one))
