from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from helpers.tiny_models import save_tiny_classifier
from safetensors.torch import load_file, save_file

from pipeline.contracts.errors import InputError
from pipeline.contracts.keys import PromptPlaces
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES, SCORES
from stage1_dual.scoring.protocol import RowFailure, Score, Scorer, ScoreRequest
from stage1_dual.scoring.score_tables import ScoringCounts, score_tables
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer
from stage1_dual.shard_plan import missing_shards, shard_order

pytestmark = pytest.mark.slow

MESSAGES = {f"p{place}": [{"role": "user", "content": f"what could I do, {place}?"}] for place in range(9)}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("classifier"))


def write_samples(folder: Path, *, per_prompt: int, shard_rows: int) -> ShardedTable:
    """A samples table; called again with more samples a prompt, the new ones in files of their own."""
    table = ShardedTable(folder, SAMPLES, {})
    for split, places in (("train", range(6)), ("test", range(6, 9))):
        prompts = PromptPlaces([f"p{place}" for place in places])
        presence = table.presence(split, prompts, n_samples=per_prompt)
        for place, prompt_n, sample_n in missing_shards(presence, shard_rows=shard_rows):
            keys = [(prompts.ids[prompt], int(k)) for prompt, k in zip(prompt_n, sample_n, strict=True)]
            rows = [
                {
                    "prompt_id": prompt_id,
                    "sample_index": k,
                    "completion": f"step {k} " * (1 + k % 7) + prompt_id,
                    "prompt_token_ids": [1, 5],
                    "completion_token_ids": [7, 2],
                    "finish_reason": "stop",
                    "seed": k,
                    "sampler_logp": -float(k),
                }
                for prompt_id, k in keys
            ]
            table.write_shard(pa.Table.from_pylist(rows, schema=SAMPLES), split=split, order=shard_order(place, keys))
    return table


def never() -> Scorer:
    raise AssertionError("the scorer was started although nothing was missing")


def run(
    folder: Path, factory: Callable[[], Scorer], *, per_prompt: int = 5, shard_rows: int = 4, **options: Any
) -> ScoringCounts:
    return score_tables(
        scorer_factory=factory,
        samples=write_samples(folder.parent / f"{folder.name}-samples", per_prompt=per_prompt, shard_rows=shard_rows),
        splits=("train", "test"),
        messages=MESSAGES,
        tables={"one": ShardedTable(folder, SCORES, {})},
        show_progress=False,
        **options,
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
    assert counts.scorer["outputs"]
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
def test_scores_that_are_no_numbers_are_failures_and_too_many_stop_the_step(tmp_path: Path, value: float) -> None:
    folder = save_tiny_classifier(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"4 of 45 rows of .*samples failed so far.*0\.05 \(first: prompt p0, sample 0: the score is"
    ):
        run(tmp_path / "scores", lambda: SequenceClassificationScorer(str(folder)), max_failed_share=0.05)
    assert rows(tmp_path / "scores") == {}


class Poisoned:
    """Gives two values a row, and cannot bear some rows: one that it reports, one at which it breaks down."""

    def __init__(self, *, mended: bool = False) -> None:
        self.mended = mended
        self.calls = 0

    def score(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        self.calls += 1
        if not self.mended and any((row.prompt_id, row.sample_index) == ("p2", 1) for row in rows):
            raise ZeroDivisionError("p2 breaks it")
        return [
            RowFailure("p4 is refused")
            if not self.mended and (row.prompt_id, row.sample_index) == ("p4", 0)
            else Score((float(row.sample_index), float(row.columns["sampler_logp"])), "hash", truncated=False)
            for row in rows
        ]

    def describe(self) -> Mapping[str, object]:
        return {"model": "poisoned"}

    def close(self) -> None:
        pass


def test_a_poisoned_row_harms_no_other_and_is_tried_again(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples", per_prompt=5, shard_rows=4)
    tables = {name: ShardedTable(tmp_path / name, SCORES, {}) for name in ("index", "logp")}

    def score(scorer: Poisoned, **options: Any) -> ScoringCounts:
        return score_tables(
            scorer_factory=lambda: scorer,
            samples=samples,
            splits=("train", "test"),
            messages=MESSAGES,
            tables=tables,
            show_progress=False,
            reads=("sampler_logp",),
            **options,
        )

    counts = score(Poisoned(), max_failed_share=0.05)
    assert counts.rows_scored == 43
    reasons = {(failure.prompt_id, failure.sample_index): failure.reason for failure in counts.failures}
    assert reasons == {("p2", 1): "ZeroDivisionError: p2 breaks it", ("p4", 0): "p4 is refused"}
    assert len(rows(tmp_path / "index")) == len(rows(tmp_path / "logp")) == 43
    assert all(row["value"] == key[1] for key, row in rows(tmp_path / "index").items())
    assert all(row["value"] == -key[1] for key, row in rows(tmp_path / "logp").items())
    again = Poisoned(mended=True)
    counts = score(again, max_failed_share=0.05)
    assert (counts.rows_scored, counts.rows_present, counts.failures) == (2, 43, ())
    assert again.calls == 2
    assert len(rows(tmp_path / "index")) == 45


def two_heads(samples: ShardedTable, tables: dict[str, ShardedTable]) -> dict[str, Any]:
    """The arguments of a pass for two tables, but for its scorer."""
    return {
        "samples": samples,
        "splits": ("train", "test"),
        "messages": MESSAGES,
        "tables": tables,
        "show_progress": False,
        "reads": ("sampler_logp",),
    }


def test_one_table_of_several_is_completed_without_touching_the_others(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples", per_prompt=5, shard_rows=4)
    tables = {name: ShardedTable(tmp_path / name, SCORES, {}) for name in ("index", "logp")}
    arguments = two_heads(samples, tables)
    score_tables(scorer_factory=lambda: Poisoned(mended=True), **arguments)
    kept = {path: path.read_bytes() for path in (tmp_path / "index").glob("parts/*")}
    next((tmp_path / "logp").glob("parts/train-*")).unlink()
    counts = score_tables(scorer_factory=lambda: Poisoned(mended=True), **arguments)
    assert counts.rows_scored == 4
    assert kept == {path: path.read_bytes() for path in (tmp_path / "index").glob("parts/*")}
    assert rows(tmp_path / "logp").keys() == rows(tmp_path / "index").keys()


@pytest.mark.parametrize("finished", [False, True])
def test_a_failed_row_is_mended_beside_a_table_that_lacks_everything(tmp_path: Path, finished: bool) -> None:
    """Another head of the same model asks for all rows again; those the first table has must stay."""
    samples = write_samples(tmp_path / "samples", per_prompt=5, shard_rows=4)
    tables = {name: ShardedTable(tmp_path / name, SCORES, {}) for name in ("index", "logp")}
    arguments = two_heads(samples, tables)
    score_tables(scorer_factory=Poisoned, max_failed_share=0.05, **arguments)
    if finished:
        tables["index"].finish()
    for path in (tmp_path / "logp").glob("parts/*"):
        path.unlink()
    score_tables(scorer_factory=lambda: Poisoned(mended=True), **arguments)
    assert len(tables["index"].finish()) == len(tables["logp"].finish()) + 2
    assert len(rows(tmp_path / "index")) == len(rows(tmp_path / "logp")) == 45


def test_a_sample_of_an_unknown_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"1 rows are of prompts that are not in the run \(first: p8\)"):
        score_tables(
            scorer_factory=never,
            samples=write_samples(tmp_path / "samples", per_prompt=1, shard_rows=1),
            splits=("train", "test"),
            messages={prompt_id: messages for prompt_id, messages in MESSAGES.items() if prompt_id != "p8"},
            tables={"one": ShardedTable(tmp_path, SCORES, {})},
            show_progress=False,
        )


_KILLED = """
import sys
from pathlib import Path
import torch
from stage1_dual.scoring.score_tables import score_tables
from stage1_dual.scoring.sequence_classification import SequenceClassificationScorer
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES, SCORES

torch.set_num_threads(1)
folder, classifier, samples = sys.argv[1:]
score_tables(
    scorer_factory=lambda: SequenceClassificationScorer(classifier),
    samples=ShardedTable(Path(samples), SAMPLES, {}),
    splits=("train", "test"),
    messages={f"p{place}": [{"role": "user", "content": f"what could I do, {place}?"}] for place in range(9)},
    tables={"one": ShardedTable(Path(folder), SCORES, {})},
    show_progress=False,
)
"""


def test_a_killed_run_continues_to_the_same_rows(classifier: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    samples = write_samples(tmp_path / "killed-samples", per_prompt=60, shard_rows=6).folder
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(killed), str(classifier), str(samples)])
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
