"""`import dualign`: light, documented by examples that run, and strict about names."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import dualign
import pipeline
from pipeline.contracts.errors import DualignError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def loaded_by(code: str) -> set[str]:
    """Modules of a fresh interpreter after some code."""
    code = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_it_imports_nothing_heavy() -> None:
    loaded = loaded_by("import dualign")
    heavy = {"torch", "pandas", "numpy", "pyarrow", "scipy", "matplotlib", "pydantic", "yaml", "rich", "transformers"}
    assert not heavy & loaded
    assert {name for name in loaded if name.startswith(("pipeline", "stage1_dual", "stage2_policy"))} == set()


def test_a_solution_of_a_table_loads_no_model_and_no_figure() -> None:
    code = (
        "import numpy as np, pyarrow as pa, dualign\n"
        "g = np.random.default_rng(0).normal(size=(2, 400))\n"
        "table = pa.table({'prompt_id': np.arange(400) % 20, 'r': g[0], 'g': g[1]})\n"
        "repr(dualign.solve(table, reward='r', constraints=['g >= ref + 0.2'], beta=1))"
    )
    loaded = loaded_by(code)
    assert "pipeline.dual.result" in loaded
    assert (
        not {"torch", "transformers", "matplotlib", "scipy.stats", "pipeline.config", "pipeline.microworld"} & loaded
    )


def test_every_name_is_there_and_no_other() -> None:
    assert set(dir(dualign)) == set(dualign.__all__)
    for name in dualign.__all__:
        assert (getattr(dualign, name).__doc__ or "").strip(), name
    assert issubclass(dualign.InfeasibleError, dualign.DualignError)
    assert dualign.DualignError is DualignError
    with pytest.raises(AttributeError, match="has no attribute 'sovle'"):
        _ = dualign.sovle  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_distribution() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert dualign.__version__ == declared
    # Nobody else says it.
    assert "__version__" not in vars(pipeline)


def test_the_examples_of_the_docstrings_run() -> None:
    found = doctest.testmod(dualign)
    assert found.attempted >= 8
    assert found.failed == 0


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    example = next(block for block in blocks if "dualign.solve(" in block).partition("run = dualign.load_run")[0]
    rng = np.random.default_rng(0)
    harmless = rng.normal(size=40 * 32)
    frame = pd.DataFrame({"prompt_id": np.repeat(np.arange(40), 32), "harmless": harmless})
    frame["helpful"] = rng.normal(size=len(frame)) - harmless / 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"frame": frame}
    exec(compile(example, "README.md", "exec"), names)
    assert (tmp_path / "out" / "dual.json").is_file()
    assert frame["weight"].groupby(frame["prompt_id"]).sum().to_numpy() == pytest.approx(1.0)
