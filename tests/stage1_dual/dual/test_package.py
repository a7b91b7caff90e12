from __future__ import annotations

import subprocess
import sys

import stage1_dual.dual as package


def test_import_is_light() -> None:
    code = (
        "import sys, stage1_dual.dual\n"
        "heavy = {'torch', 'pandas', 'transformers', 'vllm', 'pyarrow', 'scipy.optimize', 'scipy.stats'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_everything_public_is_documented() -> None:
    for name in package.__all__:
        assert (getattr(package, name).__doc__ or "").strip(), name
