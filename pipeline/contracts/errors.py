"""Every error a user can meet, each with the exit code of the command line.

===== ===========================================================
code  meaning
===== ===========================================================
0     done
1     anything unforeseen (any exception that is not one of ours)
2     the user's input or configuration is wrong
3     the thresholds are infeasible on these samples, or no plan of sample sizes keeps them
4     no certified solution
5     the evaluated policy does not satisfy the constraints
6     training did not pay: the trained policy is no better than the reference
7     the pilot is too small for a plan of sample sizes, which is withheld
===== ===========================================================
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

_OURS = frozenset({"dualign", "pipeline", "stage1_dual", "stage2_policy"})
_CHANGES_THE_PROCESS = frozenset({"vllm"})
"""Packages that are imported only where they are used, and put back the process as it was."""


def require_extra(extra: str, *packages: str, purpose: str) -> None:
    """Import what a step needs before it begins, and name the extra to install where something is not there.

    Raises:
        MissingExtraError: a package is not installed.
        InputError: one is installed and cannot be loaded.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package=package, extra=extra, purpose=purpose)
    for package in packages:
        if package in _CHANGES_THE_PROCESS:
            continue
        try:
            importlib.import_module(package)
        except Exception as error:  # a package that does not fit this machine raises whatever it meets
            raise import_failure(error, package=package, extra=extra, purpose=purpose) from error


class DualignError(Exception):
    """Base of all errors raised on purpose; its text is meant for the user as it is."""

    exit_code: ClassVar[int] = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is, whatever its constructor asks for: an error of a worker is raised in the process that waits."""
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[DualignError], args: tuple[Any, ...], attributes: Mapping[str, Any]) -> DualignError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class InputError(DualignError):
    """The user's input is wrong: a value, a file, a table. The message names it, its value and the rule."""

    exit_code = 2


class ConfigError(InputError):
    """One or more settings are wrong; ``faults`` lists all of them, not only the first."""

    def __init__(self, faults: Sequence[str], *, source: str = "the configuration") -> None:
        self.faults = tuple(faults)
        head = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''} in {source}:"
        super().__init__("\n".join([head, *(f"  - {fault}" for fault in self.faults)]))


class StaleArtifactError(InputError):
    """A step on disk was made with other settings or from other inputs than the ones asked for now."""


class CorruptArtifactError(InputError):
    """A file of a run is not what its manifest says, or cannot be read."""


class RunLockedError(InputError):
    """Another process works on the same run."""


class WorkerFailedError(DualignError):
    """A model at work stopped working, whatever it was given; not the user's doing, and finished shards are kept."""


class MissingExtraError(InputError):
    """A package of an optional extra is not installed."""

    def __init__(self, *, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package `{package}`, which is not installed: pip install 'dualign[{extra}]'"
        )


def printable(text: str) -> str:
    """A text for the terminal: what a terminal would follow, but for line breaks and tabs, is shown instead."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def import_failure(error: Exception, *, package: str, extra: str, purpose: str) -> InputError:
    """What to tell of an import that failed: a package that is not installed, or one that is and cannot be loaded.

    Args:
        error: the failure; a package that one needs may be the one that is not there.
        package: what was imported.
        extra: of this distribution that installs it.
        purpose: what needs it.
    """
    if (absent := _absent_package(error)) is not None:
        return MissingExtraError(package=absent, extra=extra, purpose=purpose)
    return InputError(f"{purpose} needs the package `{package}`, which {_not_loaded(error)}")


def loading_failure(error: Exception) -> InputError | None:
    """What to tell of a package that could not be imported, wherever that was; None for an error of another kind.

    A package that is there may still not fit the machine: a driver's library is missing, or it was built for another
    version of a package that it needs.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    ours = max((place for place, name in enumerate(names) if name in _OURS), default=-1)
    package = None
    if ours + 1 < len(frames) and (frames[ours + 1].f_code.co_name == "<module>" or isinstance(error, ImportError)):
        package = names[ours + 1]
    elif isinstance(error, ImportError) and error.name:
        package = error.name.partition(".")[0]
    if not package or package in _OURS:
        return None
    if (absent := _absent_package(error)) is not None:
        return InputError(
            f"the package `{absent}` is needed here"
            + (f" by `{package}`" if absent != package else "")
            + " and is not installed; dualign's extras (sample, train, ray) install what its commands need"
        )
    return InputError(f"the package `{package}` is needed here and {_not_loaded(error)}")


def _absent_package(error: Exception) -> str | None:
    """The package that is not installed, where that is what an import failed for."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    name = error.name.partition(".")[0]
    return name if importlib.util.find_spec(name) is None else None


def _not_loaded(error: Exception) -> str:
    because = f" (because of: {error.__cause__})" if error.__cause__ is not None else ""
    return f"is installed and cannot be loaded: {error}{because}"


_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
_DISK_TEXTS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "os error 28")


def writing_failure(error: BaseException, *, place: Path | None = None) -> InputError | None:
    """What to tell of a file that could not be written, whoever tried; None where the error is of another kind.

    Libraries wrap what the system said in errors of their own: the causes are looked through too.

    Args:
        error: what was raised.
        place: folder that was written to, for where the error names no file.
    """
    seen: BaseException | None = error
    while seen is not None:
        of_disk = isinstance(seen, OSError) and seen.errno in _DISK_FAULTS
        if of_disk or any(text in str(seen) for text in _DISK_TEXTS):
            file = getattr(seen, "filename", None) or place or "a file"
            reason = getattr(seen, "strerror", None) or seen
            return InputError(
                f"{file} cannot be written or read: {reason}. What was finished is kept; run the same command again "
                "once that is mended"
            )
        seen = seen.__cause__ or seen.__context__
    return None


class NoFeasibleThresholdError(DualignError):
    """``frontier`` was asked for thresholds that no policy on these samples meets, and has written that."""

    exit_code = 3


class NoPlanError(DualignError):
    """``plan`` found no numbers of prompts and responses, within the limits it was given, that will do; it says so."""

    exit_code = 3


class PlanNotTrustedError(DualignError):
    """``plan`` has withheld its numbers, since nothing that follows from this pilot is to be trusted."""

    exit_code = 7


class ConstraintsNotSatisfiedError(DualignError):
    """``evaluate --require-satisfied`` found a constraint that is not satisfied."""

    exit_code = 5


class TrainingDidNotPayError(DualignError):
    """All that was asked for is done and written, and the policy that came out is not better than the reference.

    A code of its own, so that a script that tries things out can let it pass.
    """

    exit_code = 6
