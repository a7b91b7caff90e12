"""Scores from a function of the user's: a rule, or a score that is computed elsewhere."""

from __future__ import annotations

import hashlib
import importlib
import json
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest


class PythonScorer:
    """Scores with ``module:function``, called on batches of rows.

    The function gets a list of :class:`~stage1_dual.scoring.protocol.ScoreRequest` and the settings as keywords, and
    returns one number a row, in the order of the rows; None or NaN for a row that cannot be scored. It may be called
    on any batches, in any order, in several processes: a score must depend on its own row alone.

    ``scored_sha256`` is that of prompt and completion, see :func:`row_sha256`.

    Args:
        function: ``module:name``.
        folders: where the module is looked for before the installed ones, in this order.
        settings: keyword arguments of the function.
        affine: from the function's numbers to the user's units.

    Raises:
        InputError: there is no such module or function, or it cannot be imported.
    """

    def __init__(
        self,
        function: str,
        *,
        folders: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        affine: Affine = Affine(),  # noqa: B008  # frozen
    ) -> None:
        self._name = function
        self._function = import_function(function, folders=folders)
        self._settings = dict(settings or {})
        self._affine = affine

    def score(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """One result a row, in the order of the rows.

        Raises:
            InputError: the function returned another number of values than rows, or something that is not a number.
        """
        returned = self._function(list(rows), **self._settings)
        try:
            values = list(returned)
        except TypeError as error:
            raise InputError(
                f"{self._name} returned {type(returned).__name__}; it must return one number a row"
            ) from (error)
        if len(values) != len(rows):
            raise InputError(f"{self._name} returned {len(values)} values for {len(rows)} rows; one a row is the rule")
        return [self._result(row, value) for row, value in zip(rows, values, strict=True)]

    def describe(self) -> Mapping[str, object]:
        """The resolved settings of the scorer, JSON-serialisable."""
        return {
            "scorer": "python",
            "model": self._name,
            "outputs": [{"settings": self._settings, "affine": asdict(self._affine)}],
        }

    def close(self) -> None:
        """Nothing to free."""

    def _result(self, row: ScoreRequest, value: Any) -> Score | RowFailure:
        if value is None:
            return RowFailure(f"{self._name} gave no score")
        if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a number of NumPy or torch
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise InputError(
                f"{self._name} returned {value!r} for prompt {row.prompt_id}, sample {row.sample_index}; "
                "a score must be a number"
            )
        return Score((self._affine.apply(float(value)),), row_sha256(row), truncated=False)


def row_sha256(row: ScoreRequest) -> str:
    """sha256 of prompt and completion: compact JSON of the list of messages and of the completion, UTF-8."""
    messages = [{"role": message["role"], "content": message["content"]} for message in row.messages]
    text = json.dumps([messages, row.completion], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def find_source(function: str, *, folders: Sequence[str] = ()) -> Path:
    """The file of the module of ``module:name``, without importing anything.

    Raises:
        InputError: not of that form, there is no such module, or another one of its name is in use.
    """
    module, _ = _split(function)
    _add_folders(folders)
    spec = _find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        looked = ", ".join([*folders, "the installed packages"])
        raise InputError(f"`function` is {function!r}; there is no module {module} in {looked}")
    used = getattr(sys.modules.get(module), "__file__", None) or spec.origin
    if Path(used) != Path(spec.origin):
        raise InputError(f"`function` is {function!r}; {module} is already the name of {used}: rename {spec.origin}")
    return Path(spec.origin)


def import_function(function: str, *, folders: Sequence[str] = ()) -> Callable[..., Any]:
    """The function of ``module:name``.

    Raises:
        InputError: there is no such module or function, or it cannot be imported.
    """
    find_source(function, folders=folders)
    module_name, name = _split(function)
    try:
        module: ModuleType = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises is the user's to read
        raise InputError(f"`function` is {function!r}; importing {module_name} failed: {error!r}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"`function` is {function!r}; {module.__file__} has no function {name!r}")
    return found  # type: ignore[no-any-return]


def _split(function: str) -> tuple[str, str]:
    module, colon, name = function.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise InputError(f"`function` is {function!r}; it must be of the form module:name")
    return module, name


def _find_spec(module: str) -> ModuleSpec | None:
    """What would be imported, whatever is imported already."""
    places: Sequence[str] | None = sys.path
    name, spec = "", None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, places) if places is not None else None
        places = spec.submodule_search_locations if spec is not None else None
    return spec


def _add_folders(folders: Sequence[str]) -> None:
    for folder in reversed([str(Path(folder).resolve()) for folder in folders]):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    importlib.invalidate_caches()
