from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stage1_dual.dual as package

ROOT = Path(__file__).parents[3]
SMALL_TABLE = """
import numpy as np
from stage1_dual.dual import *

ids, rng = np.repeat(np.arange(50), 16), np.random.default_rng(0)
frame = {"prompt_id": ids, "reward": rng.normal(size=800), "harmless": rng.normal(size=800)}
problem = DualProblem.from_frame(frame, prompt_id="prompt_id", reward="reward", thresholds={"harmless": 0.3}, beta=1.0)
solution = solve_dual(problem)
bootstrap_intervals(problem, solution, rng=rng)
ladder = climb_ladder(problem, solution)
judge_trust(problem, solution, diagnostics=diagnose(problem, solution), ladder=ladder, heldout=None)
"""


@pytest.mark.parametrize(
    "code",
    [
        "import stage1_dual.dual",
        SMALL_TABLE,
        # What evaluates and what calibrates is imported by commands that do neither.
        "import pipeline.evaluation, stage1_dual.scoring.calibration",
    ],
    ids=["import", "small table", "evaluation"],
)
def test_import_is_light(code: str) -> None:
    code += """
import sys
heavy = {"torch", "pandas", "transformers", "vllm", "pyarrow", "scipy.special", "scipy.optimize", "scipy.stats"}
print(sorted(heavy & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"


def test_everything_public_is_documented() -> None:
    for name in package.__all__:
        assert (getattr(package, name).__doc__ or "").strip(), name


def test_other_packages_come_in_by_the_front_door() -> None:
    files = [path for folder in ("pipeline", "stage2_policy", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    files += [path for path in (ROOT / "stage1_dual").rglob("*.py") if path.parent.name != "dual"]
    assert len(files) > 100
    imported = [
        (path, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stage1_dual.dual")
    ]
    assert len(imported) > 10
    assert [str(path) for path, node in imported if node.module != "stage1_dual.dual"] == []
    public = set(package.__all__)
    assert [str(path) for path, node in imported if not {alias.name for alias in node.names} <= public] == []


def test_no_module_imports_one_that_imports_it() -> None:
    """Not for type checkers only, either: who reads one of the two must read the other."""
    folder = ROOT / "stage1_dual" / "dual"
    imports = {
        path.stem: {
            node.module.removeprefix("stage1_dual.dual.")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stage1_dual.dual.")
        }
        for path in folder.glob("*.py")
        if path.stem != "__init__"
    }
    assert imports["dual_function"] >= {"problem", "tilting"}
    while free := {name for name, others in imports.items() if not others}:
        imports = {name: others - free for name, others in imports.items() if name not in free}
    assert not imports, f"a circle among {sorted(imports)}"
