from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.shards import ShardedTable
from stage1_dual.shard_loop import ShardsWritten, write_shards
from stage1_dual.work import Failure, OnProgress, ShardResult, Task

SCHEMA = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()), ("value", pa.float64())])


class Doubler:
    """Writes each number to `once` and its double to `twice`; a negative one fails, an odd one is in `once` alone."""

    def perform(
        self, tasks: Iterable[Task[list[int]]], *, on_progress: OnProgress
    ) -> Iterator[tuple[Task[list[int]], ShardResult]]:
        for task in tasks:
            for number in task.payload:
                on_progress({"rows": 0.5, "letters": 5})  # a row that breaks down counts half, as told
                if number >= 0:
                    on_progress({"rows": 0.5, "letters": 5})
            yield task, self.result(task.payload)

    def result(self, payload: list[int]) -> ShardResult:
        good = [number for number in payload if number >= 0]
        return ShardResult(
            tables={
                "once": table({number: float(number) for number in good}),
                "twice": table({number: 2.0 * number for number in good if number % 2 == 0}),
            },
            seconds=0.0,
            failures=[Failure("p", number, "negative") for number in payload if number < 0],
            counts={"rows": len(good), "letters": 10 * len(good)},
        )

    def describe(self) -> Mapping[str, object]:
        return {"name": "doubler"}

    def close(self) -> None:
        pass


def table(values: Mapping[int, float]) -> pa.Table:
    columns = {"prompt_id": ["p"] * len(values), "sample_index": list(values), "value": list(values.values())}
    return pa.table(columns, schema=SCHEMA)


def run(
    folder: Path,
    *payloads: list[int],
    show_progress: bool = False,
    max_failed_share: float = 0.0,
    worker: type[Doubler] = Doubler,
) -> ShardsWritten:
    return write_shards(
        worker,
        [Task("train", place, len(payload), payload) for place, payload in enumerate(payloads)],
        tables=tables(folder),
        n_rows=10,
        n_present=4,
        failing=folder,
        max_failed_share=max_failed_share,
        execution=None,
        doing="doubling",
        show_progress=show_progress,
        rate_of="letters",
    )


def tables(folder: Path) -> dict[str, ShardedTable]:
    return {name: ShardedTable(folder / name, SCHEMA, {}) for name in ("once", "twice")}


def values(folder: Path) -> dict[str, list[float]]:
    return {name: its.read("train")["value"].to_pylist() for name, its in tables(folder).items()}


def test_each_result_goes_to_the_tables_it_has_rows_of(tmp_path: Path) -> None:
    written = run(tmp_path, [0, 1, 2], [3, 5], [4])
    assert values(tmp_path) == {"once": [0, 1, 2, 3, 5, 4], "twice": [0, 4, 8]}
    assert len(tables(tmp_path)["twice"].paths("train")) == 2  # none of a result without rows
    assert dict(written.counts) == {"rows": 6, "letters": 60}
    assert written.description == {"name": "doubler"}
    assert written.failures == ()
    assert written.start_seconds >= 0
    assert written.working_seconds >= 0


def test_failures_within_the_share_are_reported_and_beyond_it_stop_what_is_not_yet_written(tmp_path: Path) -> None:
    written = run(tmp_path / "few", [0, -1], [2], max_failed_share=0.1)
    assert [failure.sample_index for failure in written.failures] == [-1]
    with pytest.raises(InputError, match=r"2 of 10 rows of .* failed so far, .* `max_failed_share`, 0.1 .* negative"):
        run(tmp_path / "many", [0, -1], [2, -2], [4], max_failed_share=0.1)
    assert values(tmp_path / "many")["once"] == [0, 2]


def test_the_bar_counts_from_what_is_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [0, 1], [2, 3, 4, 5], show_progress=True)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("doubling: 100%")
    assert "10/10" in last
    assert "letters/s" in last


class Slow(Doubler):
    """Tells of a letter every now and then, long before its only shard is done."""

    def perform(
        self, tasks: Iterable[Task[list[int]]], *, on_progress: OnProgress
    ) -> Iterator[tuple[Task[list[int]], ShardResult]]:
        for task in tasks:
            for _ in range(12):
                time.sleep(0.1)
                on_progress({"rows": 0.25, "letters": 5})
            yield task, self.result(task.payload)


def test_the_bar_moves_before_a_shard_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stage1_dual.shard_loop._SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr("pipeline.progress._SHORTEST_SECONDS", 0.0)
    run(tmp_path, [0, 1, 2], show_progress=True, worker=Slow)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[1] for line in lines] == ["5/10 samples", "6/10 samples", "7/10 samples"]
    for line in lines:
        left, rate = re.search(r"(\d\d:\d\d) left", line), re.search(r"([\d.,]+) letters/s", line)
        assert left is not None
        assert rate is not None
        assert float(rate[1]) <= 51  # five a tenth of a second, those of before the first time not counted
