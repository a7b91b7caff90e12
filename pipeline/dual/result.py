"""The answer to a question about a table of scores, as an object for people: what ``dualign.solve`` returns."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.contracts.constraint_text import read_constraints
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import Safeguard
from pipeline.contracts.section import nearest
from pipeline.dual.from_table import (
    SafeguardName,
    TableRequest,
    TableSolution,
    labels_of,
    require_safeguard,
    scores_of,
    solve_table,
)
from pipeline.dual.output_folder import hold_output
from pipeline.dual.solving import EvaluationSize
from pipeline.dual.table_sources import is_data_frame, open_source
from stage1_dual.dual import DualProblem, DualSolution, Trust

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from pipeline.report.views import TableView


def solve_frame(
    frame: pd.DataFrame | pa.Table | str | Path,
    *,
    prompt_id: str,
    reward: str,
    constraints: Sequence[str],
    beta: float | None,
    kl: float | None,
    seed: int,
    safeguards: Mapping[SafeguardName, Mapping[str, float] | None],
    evaluation: EvaluationSize,
    correct_response_bias: bool,
    show_progress: bool,
) -> SolveResult:
    """See :func:`dualign.solve`; ``safeguards`` are its three arguments by their names."""
    bounds = read_constraints(constraints)
    columns = (prompt_id, reward, *scores_of(bounds))
    request = TableRequest(
        source=open_source(frame, columns, labels_of(bounds)),
        prompt_id=prompt_id,
        reward=reward,
        constraints=bounds,
        beta=beta,
        kl=kl,
        seed=seed,
        safeguards=_read_safeguards(safeguards),
        evaluation=evaluation,
        corrects_response_bias=correct_response_bias,
        show_progress=show_progress,
    )
    scratch = Path(tempfile.mkdtemp(prefix="dualign-"))
    try:
        result = SolveResult(solve_table(request, scratch=scratch), frame if is_data_frame(frame) else None)
    except BaseException:
        shutil.rmtree(scratch)
        raise
    weakref.finalize(result, shutil.rmtree, scratch, ignore_errors=True)
    return result


def _read_safeguards(asked: Mapping[SafeguardName, Mapping[str, float] | None]) -> dict[str, Safeguard]:
    found: dict[str, Safeguard] = {}
    for field, numbers in asked.items():
        if not isinstance(numbers, Mapping | None):
            raise InputError(f"{field} is {numbers!r}; it must be a dict from a constraint's name to a number")
        for name, value in (numbers or {}).items():
            given = f"{field} {{{name!r}: {value!r}}}"
            try:
                number = require_safeguard(field, float(value), given=given)
            except (TypeError, ValueError):
                raise InputError(f"{given}: it must be a number") from None
            changes: dict[str, Any] = {field: number}
            found[name] = replace(found.get(name, Safeguard()), **changes)
    return found


class SolveResult:
    """A certified solution: lambda* for a table of scores, what it promises, and how far to trust it.

    Shown as the table that ``dualign solve`` prints.
    """

    def __init__(self, solution: TableSolution, frame: pd.DataFrame | None) -> None:
        self._solution = solution
        # Of a DataFrame only the index: it labels the weights, and cannot be changed.
        self._index = None if frame is None else frame.index

    @property
    def multipliers(self) -> dict[str, float]:
        """lambda* of each constraint by its name, reward per unit of its column; negative of equalities alone."""
        names = self._solution.solved.problem.constraint_names
        return dict(zip(names, self.solution.multipliers.tolist(), strict=True))

    @property
    def trust(self) -> Trust:
        """The verdict on trust, with its signs, reasons and advice (docs/dual.md)."""
        found = self.dual["trust"]
        signs = {name: math.nan if value is None else value for name, value in found["signs"].items()}
        return Trust(found["verdict"], signs, tuple(found["reasons"]), tuple(found["advice"]))

    @property
    def dual(self) -> dict[str, Any]:
        """The content of ``dual.json``, in the user's own directions and units, but for its ``inputs`` and
        ``environment`` (docs/artifacts.md).
        """
        return self._solution.content

    @property
    def problem(self) -> DualProblem:
        """What was solved, safeguards included; scores are turned so that higher is better."""
        return self._solution.solved.problem

    @property
    def solution(self) -> DualSolution:
        """Its solution with lambda* as an array, of the turned scores likewise."""
        return self._solution.solved.solution

    @cached_property
    def weights(self) -> pd.DataFrame | pa.Table:
        """The tilted weight of every response, in the order of the rows: what ``weights.parquet`` holds.

        Columns: the prompt's id, ``sample_index``, ``weight``, which sums to 1 within a prompt, and ``split`` where
        the frame has one. A DataFrame where a DataFrame was given, with its index, so that
        ``frame["weight"] = result.weights["weight"]`` puts each weight where it belongs; else a pyarrow Table.

        Raises:
            InputError: the files of the table have changed since they were solved.
        """
        chunks = list(self._solution.weights())
        table = pa.concat_tables([rows for _, rows in chunks])
        if self._index is None:
            return table
        found: pd.DataFrame = table.to_pandas()
        index = self._index.take([row for row_n, _ in chunks for row in row_n.tolist()])
        return found.set_axis(index, axis="index")

    def frontier(self) -> FrontierResult:
        """What each threshold costs, the others held: some sixty solved problems a constraint."""
        return FrontierResult(self._solution.frontier, self.dual, as_data_frame=self._index is not None)

    def save(self, folder: str | Path) -> None:
        """Write what ``dualign solve --table`` writes: ``dual.json``, ``frontier.parquet``, ``weights.parquet``,
        ``report.html`` and ``figures/``.

        Args:
            folder: made if missing; files of an earlier result are replaced.

        Raises:
            InputError: the folder cannot be written, or lies inside the table's, or the table has changed.
            RunLockedError: another process writes there.
        """
        with hold_output(Path(folder), self._solution.request.source):
            self._solution.save(Path(folder))

    def __repr__(self) -> str:
        from pipeline.report.summary import text_summary

        return text_summary(self._view())

    def _repr_html_(self) -> str:
        from pipeline.report.summary import html_summary

        return html_summary(self._view())

    def _view(self) -> TableView:
        from pipeline.report.views import stage1_view

        return stage1_view(self.dual)


class FrontierResult:
    """What each threshold costs: for a sweep of every constraint, lambda*, the predicted scores and the reward."""

    def __init__(self, table: pa.Table, dual: Mapping[str, Any], *, as_data_frame: bool) -> None:
        self._table = table
        self._dual = dual
        self._as_data_frame = as_data_frame

    @property
    def table(self) -> pd.DataFrame | pa.Table:
        """A row a threshold, what ``frontier.parquet`` holds (docs/artifacts.md); a DataFrame where one was given."""
        return self._table.to_pandas() if self._as_data_frame else self._table

    def plot(self, constraint: str | None = None) -> Figure:
        """Draw the best predicted reward for each level of a constraint, above its price lambda*.

        Args:
            constraint: which; may be left out where there is one.

        Returns:
            A figure of matplotlib, which a notebook shows; ``.savefig("frontier.png")`` writes it.

        Raises:
            InputError: there are several constraints and none is named, or there is none of that name, or no threshold
                of its sweep is feasible.
        """
        from pipeline.report.figures import frontier_figure
        from pipeline.report.readers import build_frontier_curves
        from pipeline.report.solved import ReportedSolution

        names = list(dict.fromkeys(self._table["constraint"].to_pylist()))
        if constraint is None and len(names) > 1:
            raise InputError(f"there are {len(names)} constraints; name the one to plot: {', '.join(names)}")
        wanted = names[0] if constraint is None else constraint
        if wanted not in names:
            raise InputError(f"there is no constraint {wanted!r}{nearest(wanted, names)}")
        solution = ReportedSolution.from_document(self._dual, source="the result")
        for curve in build_frontier_curves(self._table, solution, None):
            if curve.bound.name == wanted:
                return frontier_figure(curve)
        raise InputError(f"no threshold of the sweep of {wanted!r} is feasible; there is nothing to plot")

    def __repr__(self) -> str:
        from pipeline.report.summary import frontier_view, text_summary

        return text_summary(frontier_view(self._table))

    def _repr_html_(self) -> str:
        from pipeline.report.summary import frontier_view, html_summary

        return html_summary(frontier_view(self._table))
