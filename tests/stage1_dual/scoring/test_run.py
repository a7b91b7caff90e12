from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.tiny_models import save_tiny_classifier
from safetensors.torch import load_file, save_file

from pipeline.contracts.errors import InputError
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SCORES
from stage1_dual.scoring.protocol import Scorer
from stage1_dual.scoring.run import ScoringCounts, score_table
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer

MESSAGES = {f"p{place}": [{"role": "user", "content": f"what could I do, {place}?"}] for place in range(9)}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("classifier"))


def samples(per_prompt: int) -> dict[str, pa.Table]:
    tables = {}
    for split, places in (("train", range(6)), ("test", range(6, 9))):
        keys = [(f"p{place}", k) for place in places for k in range(per_prompt)]
        tables[split] = pa.table(
            {
                "prompt_id": [prompt_id for prompt_id, _ in keys],
                "sample_index": pa.array([k for _, k in keys], pa.int32()),
                "completion": [f"step {k} " * (1 + k % 7) + prompt_id for prompt_id, k in keys],
            }
        )
    return tables


def never() -> Scorer:
    raise AssertionError("the scorer was started although nothing was missing")


def run(folder: Path, factory: Callable[[], Scorer], *, per_prompt: int = 5, shard_rows: int = 4) -> ScoringCounts:
    return score_table(
        scorer_factory=factory,
        samples=samples(per_prompt),
        messages=MESSAGES,
        table=ShardedTable(folder, SCORES, {}),
        shard_rows=shard_rows,
        show_progress=False,
    )


def rows(folder: Path) -> dict[tuple[str, int], dict[str, object]]:
    table = ShardedTable(folder, SCORES, {})
    found = [row for split in ("train", "test") for row in table.read(split).to_pylist()]
    by_key = {(row["prompt_id"], row["sample_index"]): row for row in found}
    assert len(by_key) == len(found)
    return by_key


@pytest.mark.parametrize("shard_rows", [1, 4, 7, 1000])
def test_every_sample_gets_its_own_score(classifier: Path, tmp_path: Path, shard_rows: int) -> None:
    counts = run(tmp_path, lambda: SequenceClassificationScorer(str(classifier)), shard_rows=shard_rows)
    assert (counts.rows_scored, counts.rows_present, counts.rows_truncated) == (45, 0, 0)
    assert counts.scorer["head"] == 0
    found = rows(tmp_path)
    assert set(found) == {(prompt_id, k) for prompt_id in MESSAGES for k in range(5)}
    whole = tmp_path / "whole"
    run(whole, lambda: SequenceClassificationScorer(str(classifier)), shard_rows=1000)
    for key, row in rows(whole).items():
        assert found[key]["value"] == pytest.approx(row["value"], abs=1e-5)
        assert found[key]["scored_sha256"] == row["scored_sha256"]


@pytest.mark.parametrize("finished", [False, True])
def test_more_samples_score_only_what_is_new(classifier: Path, tmp_path: Path, finished: bool) -> None:
    run(tmp_path, lambda: SequenceClassificationScorer(str(classifier)), per_prompt=3)
    first = rows(tmp_path)
    if finished:
        ShardedTable(tmp_path, SCORES, {}).finish()
    counts = run(tmp_path, lambda: SequenceClassificationScorer(str(classifier)), per_prompt=8)
    assert (counts.rows_scored, counts.rows_present) == (72 - 27, 27)
    grown = rows(tmp_path)
    assert len(grown) == 72
    assert {key: grown[key] for key in first} == first
    assert run(tmp_path, never, per_prompt=8).rows_present == 72


def test_cut_texts_are_counted(classifier: Path, tmp_path: Path) -> None:
    counts = run(tmp_path, lambda: SequenceClassificationScorer(str(classifier), max_length=40))
    assert 0 < counts.rows_truncated < counts.rows_scored
    assert sum(bool(row["truncated"]) for row in rows(tmp_path).values()) == counts.rows_truncated


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_named_and_not_written(tmp_path: Path, value: float) -> None:
    folder = save_tiny_classifier(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"4 scores of .*broken are not finite \(first: prompt_id p0, sample_index 0"):
        run(tmp_path / "scores", lambda: SequenceClassificationScorer(str(folder)))
    assert rows(tmp_path / "scores") == {}


def test_a_sample_of_an_unknown_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"1 prompts of the samples are not among the prompts \(first: p8\)"):
        score_table(
            scorer_factory=never,
            samples=samples(2),
            messages={prompt_id: messages for prompt_id, messages in MESSAGES.items() if prompt_id != "p8"},
            table=ShardedTable(tmp_path, SCORES, {}),
            shard_rows=4,
            show_progress=False,
        )


_KILLED = """
import sys
from pathlib import Path
import pyarrow.parquet as pq
import torch
from stage1_dual.scoring.run import score_table
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SCORES

torch.set_num_threads(1)
folder, classifier, *tables = sys.argv[1:]
score_table(
    scorer_factory=lambda: SequenceClassificationScorer(classifier),
    samples=dict(zip(("train", "test"), map(pq.read_table, tables))),
    messages={f"p{place}": [{"role": "user", "content": f"what could I do, {place}?"}] for place in range(9)},
    table=ShardedTable(Path(folder), SCORES, {}),
    shard_rows=6,
    show_progress=False,
)
"""


def test_a_killed_run_continues_to_the_same_rows(classifier: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    tables = []
    for split, table in samples(60).items():
        pq.write_table(table, tmp_path / f"{split}.parquet")
        tables.append(str(tmp_path / f"{split}.parquet"))
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(killed), str(classifier), *tables])
    try:
        deadline = time.monotonic() + 120
        while len(list(killed.glob("parts/*.parquet"))) < 3:
            assert process.poll() is None, "the process ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    counts = run(killed, lambda: SequenceClassificationScorer(str(classifier)), per_prompt=60, shard_rows=6)
    assert counts.rows_present >= 18
    assert counts.rows_scored > 0
    assert counts.rows_present + counts.rows_scored == 540
    whole = tmp_path / "whole"
    run(whole, lambda: SequenceClassificationScorer(str(classifier)), per_prompt=60, shard_rows=6)
    assert rows(killed) == rows(whole)
