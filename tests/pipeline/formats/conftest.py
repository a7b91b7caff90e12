"""A run that exports can be made of, and all of them made once."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from helpers.hand_offs import SETTINGS, make_run, write_tilted

from pipeline.formats.all_formats import FORMATS
from pipeline.formats.writing import write_exports
from pipeline.run.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    run = make_run(tmp_path_factory.mktemp("data"))
    table = write_tilted(run)
    write_exports(run, list(FORMATS), SETTINGS, command=["dualign export", "--config mine.yaml"])
    return run.folder / "exports", table
