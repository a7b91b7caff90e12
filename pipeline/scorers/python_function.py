"""Scores of a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from pipeline.contracts.artifacts import file_sha256
from pipeline.contracts.tables import TOKEN_IDS
from pipeline.scorers.kind import Check, ScorerSettings
from pipeline.scorers.models import Models
from stage1_dual.scoring.python_function import PythonScorer, find_source, import_function


class PythonSettings(ScorerSettings):
    """A function of the user's."""

    not_identity: ClassVar = frozenset({"folder"})
    uses_device: ClassVar = False
    folder_setting: ClassVar = "folder"

    kind: Literal["python"]
    function: str
    """``module:name``."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""
    info: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    """Columns that the function reads as ``row.info``, of those that ``prompts.info_columns`` names."""
    folder: str | None = None
    """Where the module is looked for first, before the current folder; the recipe's own folder where not given."""

    def reads(self) -> tuple[str, ...]:
        """The token ids, of which a function may make use."""
        return TOKEN_IDS

    def info_columns(self) -> tuple[str, ...]:
        """Those that the recipe says the function reads."""
        return self.info

    def check(self, models: Models) -> Iterator[Check]:
        """That the module is there and has the function."""
        del models
        yield partial(import_function, self.function, folders=self._folders())

    def identity(self, models: Models) -> str:
        """Of the module's source."""
        del models
        return file_sha256(find_source(self.function, folders=self._folders()))

    @classmethod
    def start(cls, scorers: Sequence[Self], models: Models) -> Callable[..., PythonScorer]:
        """One function a pass."""
        del models
        (one,) = scorers
        folders = tuple(str(Path(folder).resolve()) for folder in one._folders())
        return partial(PythonScorer, one.function, folders=folders, settings=one.settings, affine=one.affine)

    def _folders(self) -> tuple[str, ...]:
        return (*([self.folder] if self.folder is not None else []), str(Path.cwd()))
