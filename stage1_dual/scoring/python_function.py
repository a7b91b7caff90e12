"""Scores from a function of the user's: a rule, or a score that is computed elsewhere."""

from __future__ import annotations

import hashlib
import importlib
import json
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import FrameType, ModuleType
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
        InputError: there is no such module or function, it cannot be imported, or it ends the process.
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
            InputError: the function returned another number of values than rows, or something that is not a number, or
            ended the process instead.
        """
        try:
            returned = self._function(list(rows), **self._settings)
        except SystemExit as error:
            raise InputError(f"{self._name} ended in sys.exit({error.code!r}); it must return one number a row") from (
                error
            )
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
    """sha256 of prompt and completion: compact JSON of the list of messages and of the completion, UTF-8; where the
    scorer reads ``info``, of that as well.
    """
    messages = [{"role": message["role"], "content": message["content"]} for message in row.messages]
    whole = [messages, row.completion, *([dict(row.info)] if row.info else [])]
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def find_source(function: str, *, folders: Sequence[str] = ()) -> Path:
    """The file of the module of ``module:name``, without importing anything.

    Raises:
        InputError: not of that form, or there is no such module.
    """
    return _find_spec(function, folders).source


def import_function(function: str, *, folders: Sequence[str] = ()) -> Callable[..., Any]:
    """The function of ``module:name``.

    A module in one of the folders is loaded by its path, under a name of its own: whatever it is called, it takes the
    place of no package, and no package takes its. It may import its neighbours; nobody else can.

    Raises:
        InputError: there is no such module or function, it cannot be imported, or it ends the process instead.
    """
    found = _find_spec(function, folders)
    _, name = _split(function)
    try:
        module = found.load()
    except Exception as error:  # whatever the user's module raises is the user's to read
        raise InputError(f"`function` is {function!r}; importing {found.source} failed: {error!r}") from error
    except SystemExit as error:
        raise InputError(
            f"`function` is {function!r}; importing {found.source} ended in sys.exit({error.code!r})"
        ) from (error)
    imported = getattr(module, name, None)
    if not callable(imported):
        raise InputError(f"`function` is {function!r}; {module.__file__} has no function {name!r}")
    return imported  # type: ignore[no-any-return]


def _split(function: str) -> tuple[str, str]:
    module, colon, name = function.partition(":")
    if not colon or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise InputError(f"`function` is {function!r}; it must be of the form module:name")
    return module, name


@dataclass(frozen=True)
class _FoundModule:
    """A module to import.

    Attributes:
        name: by which it is imported.
        source: its file.
        folder: of the user's, in which it was found; None for an installed one.
    """

    name: str
    source: Path
    folder: Path | None

    def load(self) -> ModuleType:
        if self.folder is None:
            return importlib.import_module(self.name)
        _Neighbours.serve(self.folder)
        # Its package goes first, so that relative imports find it.
        top, *inner = self.name.split(".")
        private = f"_dualign_{hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]}_{top}"
        if private not in sys.modules:
            _load_by_path(private, _module_file(self.folder / top) or self.folder / top)
        return importlib.import_module(".".join([private, *inner]))


def _find_spec(function: str, folders: Sequence[str]) -> _FoundModule:
    name, _ = _split(function)
    for folder in (Path(folder).resolve() for folder in folders):
        file = _module_file(folder.joinpath(*name.split(".")))
        if file is not None:
            return _FoundModule(name, file, folder)
    places: Sequence[str] | None = sys.path
    spec, full = None, ""
    for part in name.split("."):
        full = f"{full}.{part}" if full else part
        spec = PathFinder.find_spec(full, places) if places is not None else None
        places = spec.submodule_search_locations if spec is not None else None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        looked = ", ".join([*folders, "the installed packages"])
        raise InputError(f"`function` is {function!r}; there is no module {name} in {looked}")
    return _FoundModule(name, Path(spec.origin), None)


def _module_file(place: Path) -> Path | None:
    """The file of a module or package at a path without suffix."""
    for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if file.is_file():
            return file
    return None


def _load_by_path(name: str, file: Path) -> ModuleType:
    """Load a module under a name; a folder without ``__init__.py`` is a package without code."""
    if file.is_dir():
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(file)]
    else:
        package = [str(file.parent)] if file.name == "__init__.py" else None
        found = spec_from_file_location(name, file, submodule_search_locations=package)
        assert found is not None  # it ends in .py
        spec = found
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        if spec.loader is not None:
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _Neighbours:
    """Finds modules in a user's folder, last of all, and for code of that folder alone.

    On ``sys.path`` the folder would be everybody's: a file ``torchvision.py`` beside a recipe would be taken for the
    package wherever that is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def serve(cls, folder: Path) -> None:
        """Serve a folder from now on."""
        if not any(isinstance(finder, cls) and finder.folder == folder for finder in sys.meta_path):
            sys.meta_path.append(cls(folder))

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        del target
        if path is not None or not self._asks():
            return None
        return PathFinder.find_spec(name, [str(self.folder)])

    def _asks(self) -> bool:
        """Whether the import statement that is being followed stands in a file of the folder."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        return frame is not None and Path(frame.f_code.co_filename).is_relative_to(self.folder)
