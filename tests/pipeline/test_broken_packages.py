"""A package that is installed and does not load is not "not installed": its cause is told, before anything begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny_runs import write_recipe

from pipeline.contracts.errors import InputError, MissingExtraError, loading_failure, require_extra

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CAUSE = "libcudart.so.12: cannot open shared object file"
BREAKS = {
    "a driver is missing": (f"raise ImportError({CAUSE!r})", f"which is installed and cannot be loaded: {CAUSE}"),
    "a library is missing": (f"raise OSError({CAUSE!r})", f"which is installed and cannot be loaded: {CAUSE}"),
    "another version": (
        "raise RuntimeError('operator torchvision::nms does not exist')",
        "which is installed and cannot be loaded: operator torchvision::nms does not exist",
    ),
    "a package is missing": ("import nowhere_at_all", "`nowhere_at_all`, which is not installed: pip install"),
}


def write_package(folder: Path, name: str, content: str) -> dict[str, str]:
    """A package of this name that goes before the one that is installed; the environment that has it."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(content + "\n")
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}


def call(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("package", "broken"),
    [*(("torch", broken) for broken in BREAKS), ("peft", "a driver is missing"), ("ray", "another version")],
)
def test_what_a_step_needs_is_loaded_before_it(tmp_path: Path, package: str, broken: str) -> None:
    content, message = BREAKS[broken]
    recipe = write_recipe(tmp_path)
    env = write_package(tmp_path / "packages", package, content)
    options = ("--config", str(recipe), "--data-dir", str(tmp_path / "data"), "--no-progress")
    done = call("run", *options, "--execution", "ray" if package == "ray" else "in_process", env=env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert f"`{package}`" in done.stderr or "nowhere_at_all" in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("package", ["matplotlib", "rich"])
def test_what_every_command_needs_is_named_too(tmp_path: Path, package: str, broken: str) -> None:
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=640) for name in ("r", "g")}
    table = pa.table({"prompt_id": np.repeat([f"p{i}" for i in range(40)], 16), **columns})
    pq.write_table(table, tmp_path / "scores.parquet")
    env = write_package(tmp_path / "packages", package, BREAKS[broken][0])
    options = ("--reward", "r", "--constraint", "g >= ref + 0.3", "--beta", "1", "--output", str(tmp_path / "out"))
    done = call("solve", "--table", str(tmp_path / "scores.parquet"), *options, "--no-progress", env=env)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    if broken == "a package is missing":
        assert f"`nowhere_at_all` is needed here by `{package}` and is not installed" in done.stderr
    else:
        assert f"the package `{package}` is needed here and is installed and cannot be loaded: " in done.stderr


@pytest.mark.parametrize("broken", BREAKS)
def test_the_page_for_bug_reports_says_what_is_the_matter(tmp_path: Path, broken: str) -> None:
    done = call("env", env=write_package(tmp_path / "packages", "torch", BREAKS[broken][0]))
    assert done.returncode == 0
    assert "torch is installed and cannot be loaded (" in done.stdout


def test_what_is_not_there_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtraError, match="training needs the package `nowhere_at_all`, which is not installed"):
        require_extra("train", "json", "nowhere_at_all", purpose="training")


def test_errors_of_our_own_are_not_those_of_a_package() -> None:
    for statement in ("from pipeline.contracts.errors import nothing_of_this_name", "import pipeline.no_such_module"):
        with pytest.raises(ImportError) as caught:
            exec(statement, {"__name__": "pipeline.contracts.errors"})
        assert loading_failure(caught.value) is None
    with pytest.raises(ValueError, match="invalid literal") as other:
        int("x")
    assert loading_failure(other.value) is None
    assert issubclass(MissingExtraError, InputError)
