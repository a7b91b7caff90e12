"""Errors reach the user from workers in other processes, too."""

import errno
import importlib
import pickle
from pathlib import Path

import pytest

from pipeline.contracts.errors import (
    ConfigError,
    ConstraintsNotSatisfiedError,
    DualignError,
    InputError,
    MissingExtraError,
    WorkerFailedError,
    import_failure,
    printable,
    writing_failure,
)
from stage1_dual.dual.errors import InfeasibleError, KlBudgetError, NotCertifiedError


@pytest.mark.parametrize(
    "error",
    [
        InputError("the value is wrong"),
        WorkerFailedError("the sampler failed"),
        MissingExtraError(package="vllm", extra="sample", purpose="sampling with vLLM"),
        ConfigError(["one", "two"], source="my.yaml"),
        KlBudgetError("too much", kl_budget=0.5, attainable_kl=0.75),
    ],
)
def test_an_error_of_a_worker_comes_back_as_it_was(error: DualignError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_a_package_that_cannot_be_loaded_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_driver.py").write_text("raise ImportError('libdriver.so.1: cannot open shared object file')")
    (tmp_path / "needs_absent.py").write_text("import absent_package")
    monkeypatch.syspath_prepend(tmp_path)
    messages = {}
    for package in ("broken_driver", "needs_absent", "absent_itself"):
        with pytest.raises(ImportError) as caught:
            importlib.import_module(package)
        messages[package] = import_failure(caught.value, package=package, extra="sample", purpose="sampling")
    assert "is installed and cannot be loaded: libdriver.so.1" in str(messages["broken_driver"])
    assert not isinstance(messages["broken_driver"], MissingExtraError)
    assert "needs the package `absent_package`, which is not installed" in str(messages["needs_absent"])
    assert "needs the package `absent_itself`, which is not installed" in str(messages["absent_itself"])


def test_what_a_full_disk_does_is_found_behind_what_libraries_make_of_it() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "weights.bin")
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error
    except RuntimeError as error:
        failure = writing_failure(error)
    assert str(failure).startswith("weights.bin cannot be written or read: No space left on device.")
    rust = writing_failure(ValueError("I/O error: No space left on device (os error 28)"), place=Path("policy"))
    assert str(rust).startswith("policy cannot be written or read: I/O error")
    assert writing_failure(ValueError("another fault")) is None
    assert writing_failure(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain λ ≥ 安全\n\ttabs", "plain λ ≥ 安全\n\ttabs"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("left\u202eright", "left\\u202eright"),
        ("a\rb", "a\\rb"),
    ],
)
def test_a_terminal_follows_nothing_in_a_message(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_exit_codes() -> None:
    codes = {DualignError: 1, InputError: 2, ConfigError: 2, InfeasibleError: 3, NotCertifiedError: 4}
    assert {kind: kind.exit_code for kind in codes} == codes
    assert ConstraintsNotSatisfiedError.exit_code == 5
