"""The dual on any table of scores: one row a response, a column a score. No models, no run folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.config import nearest
from pipeline.contracts.artifacts import environment, file_sha256, require_writable, write_json
from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import read_constraint
from pipeline.scores import ScoredRows
from pipeline.solving import build_frontier_table, frontier_of_thresholds, solve_scores, write_frontier

_SPLIT = "split"
_RANGE = re.compile(r"(?P<start>[^\s:]+):(?P<stop>[^\s:]+):(?P<step>[^\s:]+)\s*$")


@dataclass(frozen=True)
class TableRequest:
    """What to solve on which table.

    Attributes:
        table: Parquet file, or folder of Parquet files.
        prompt_id: column that says which prompt a row answers.
        reward: column to maximise.
        constraints: texts such as ``harmless >= ref + 0.8``; in :func:`frontier_table` one of them may hold a range
            ``start:stop:step`` in place of the number.
        beta: KL strength, reward per nat.
        output: folder for the results.
        seed: of the bootstrap.
        n_replicates: bootstrap replicates over prompts.
    """

    table: Path
    prompt_id: str
    reward: str
    constraints: tuple[str, ...]
    beta: float
    output: Path
    seed: int = 0
    n_replicates: int = 1000


def solve_table(request: TableRequest) -> dict[str, Any]:
    """Solve, certify and write ``dual.json`` and ``frontier.parquet``; returns the content of ``dual.json``.

    Where the table has a column ``split`` with the values ``train`` and ``test``, the train rows determine lambda* and
    the test rows give held-out predictions; without one, every row determines lambda*.

    Raises:
        InputError: a column is missing or of the wrong type, or a value is null, NaN or infinite; names both.
        InfeasibleError: no reweighting of the rows meets the thresholds.
        NotCertifiedError: the solution failed the independent check.
    """
    require_writable(request.output)
    constraints = [read_constraint(text) for text in request.constraints]
    scored, heldout = _read_rows(request, [constraint.name for constraint in constraints])
    dual, problem = solve_scores(
        scored,
        heldout=heldout,
        reward_name=request.reward,
        constraints=constraints,
        beta=request.beta,
        n_replicates=request.n_replicates,
        rng=np.random.default_rng(request.seed),
    )
    dual |= {"seed": request.seed, "inputs": _identity(request.table), "environment": environment()}
    frontier = build_frontier_table(problem, constraints, n_points=61)
    write_frontier(request.output / "frontier.parquet", frontier, metadata={})
    write_json(request.output / "dual.json", dual)
    return dual


def frontier_table(request: TableRequest) -> pa.Table:
    """Solve for a range of one constraint's thresholds and write ``frontier.parquet``; returns its rows.

    Raises:
        InputError: no range or more than one among the constraints, a malformed range, or as :func:`solve_table`.
    """
    require_writable(request.output)
    ranged = [place for place, text in enumerate(request.constraints) if _RANGE.search(text)]
    if len(ranged) != 1:
        raise InputError(
            f"{len(ranged)} of the constraints {list(request.constraints)} hold a range; a frontier needs exactly one "
            "of the form 'NAME >= ref + START:STOP:STEP'"
        )
    swept = ranged[0]
    numbers = _range_numbers(request.constraints[swept])
    families = [
        [
            read_constraint(_RANGE.sub(repr(number), text)) if place == swept else read_constraint(text)
            for number in numbers
        ]
        for place, text in enumerate(request.constraints)
    ]
    scored, _ = _read_rows(request, [family[0].name for family in families])
    points = list(zip(*families, strict=True))
    frontier = frontier_of_thresholds(scored, points, swept=swept, beta=request.beta)
    write_frontier(request.output / "frontier.parquet", frontier, metadata={})
    return frontier


def _range_numbers(text: str) -> list[float]:
    match = _RANGE.search(text)
    assert match is not None  # the caller looked
    try:
        start, stop, step = (float(match[name]) for name in ("start", "stop", "step"))
    except ValueError:
        raise InputError(f"constraint {text!r}: the range {match[0]!r} is not three numbers START:STOP:STEP") from None
    if not (np.isfinite([start, stop, step]).all() and step > 0 and stop >= start):
        raise InputError(f"constraint {text!r}: a range needs STEP > 0 and STOP >= START, {match[0]!r} given")
    # The end belongs to the range although its sum of steps is rounded.
    count = int(np.floor((stop - start) / step * (1 + 1e-12) + 1e-9)) + 1
    return [start + step * place for place in range(count)]


def _read_rows(request: TableRequest, constraint_names: Sequence[str]) -> tuple[ScoredRows, ScoredRows | None]:
    try:
        dataset = ds.dataset([str(path) for path in _files(request.table)], format="parquet")
        names = dataset.schema.names
        wanted = [request.prompt_id, request.reward, *constraint_names]
        for name in wanted:
            if name not in names:
                raise InputError(f"{request.table} has no column {name!r}{nearest(name, names)}")
        table = dataset.to_table(columns=[*dict.fromkeys(wanted), *([_SPLIT] if _SPLIT in names else [])])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"--table {request.table} cannot be read as Parquet: {error}") from error
    if table.num_rows == 0:
        raise InputError(f"{request.table} has no rows")
    _require_whole(table[request.prompt_id], request.prompt_id, request.table)
    scores = {name: _numbers(table[name], name, request.table) for name in dict.fromkeys(wanted[1:])}
    rows = ScoredRows(
        prompt_id_n=np.array(table[request.prompt_id].to_pylist()).astype(str),
        sample_index_n=np.arange(table.num_rows),
        reward_n=scores[request.reward],
        constraints_nm=np.stack([scores[name] for name in constraint_names], axis=1),
    )
    if _SPLIT not in table.column_names:
        return rows, None
    split_n = np.array(table[_SPLIT].to_pylist())
    if not np.any(split_n == "train"):
        raise InputError(f"{request.table} has a column `{_SPLIT}`, but no row of the split 'train'")
    return rows.select(split_n == "train"), rows.select(split_n == "test") if np.any(split_n == "test") else None


def _numbers(column: pa.ChunkedArray, name: str, path: Path) -> np.ndarray:
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise InputError(f"{path}: column {name!r} is of type {column.type}; a score must be a number")
    _require_whole(column, name, path)
    values = np.array(column.cast(pa.float64()).to_numpy())
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        shown = ", ".join(f"row {row}: {values[row]}" for row in wrong[:3])
        raise InputError(f"{path}: column {name!r} has {len(wrong)} values that are not finite ({shown})")
    return values


def _require_whole(column: pa.ChunkedArray, name: str, path: Path) -> None:
    if column.null_count:
        rows = np.flatnonzero(pc.is_null(column).to_numpy())[:3].tolist()
        raise InputError(f"{path}: column {name!r} has {column.null_count} empty values (first rows: {rows})")


def _identity(table: Path) -> dict[str, str]:
    return {path.name if path == table else str(path.relative_to(table)): file_sha256(path) for path in _files(table)}


def _files(table: Path) -> list[Path]:
    paths = [table] if table.is_file() else sorted(table.rglob("*.parquet"))
    if not paths:
        raise InputError(f"--table is {str(table)!r}; there is no such file, nor a folder with Parquet files")
    return paths
