"""The page and the figures of a table of scores: what ``dualign solve --table`` writes for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from pipeline.contracts.artifacts import atomic_write_bytes
from pipeline.report.page import SCRIPTS, place_plates, save_plates
from pipeline.report.page_data import Command, table_data
from pipeline.report.plates import stage1_plates
from pipeline.report.shell import render_page
from pipeline.report.solved import ReportedSolution
from pipeline.report.views import stage1_view
from stage1_dual.dual import DualProblem, DualSolution


def write_table_report(
    dual: Mapping[str, Any],
    problem: DualProblem,
    solution: DualSolution,
    frontier: pa.Table,
    *,
    name: str,
    output: Path,
    commands: Mapping[str, Command] = MappingProxyType({}),
) -> list[Path]:
    """Write ``report.html`` and ``figures/`` of a solution into a folder.

    Args:
        dual: the content of ``dual.json``.
        problem: what was solved.
        solution: its solution.
        frontier: the content of ``frontier.parquet``.
        name: of the table.
        output: the folder.
        commands: what asks for another demand, by constraint.

    Returns:
        What was written: the page first.
    """
    share_p = solution.ess_p / problem.samples.counts_p
    solved = ReportedSolution.from_document(dual)
    plates = stage1_plates(solved, problem, share_p=share_p, frontier=frontier, evaluation=None)
    written = save_plates(plates, output / "figures")
    placed = place_plates(plates, written)
    page = render_page(
        "table.html.jinja",
        scripts=SCRIPTS,
        data=table_data(solved, problem, frontier, commands),
        table=name,
        solved=solved,
        dual=dual,
        view=stage1_view(dual),
        plates_shown=[placed[plate.stem] for plate in plates],
    )
    path = output / "report.html"
    atomic_write_bytes(path, page.encode())
    return [path, *(path for paths in written.values() for path in paths)]
