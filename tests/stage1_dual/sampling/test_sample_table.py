from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.tiny_models import save_tiny_policy

from pipeline.contracts.errors import WorkerFailedError
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES
from stage1_dual.sampling.protocol import OnTokens, SampledCompletion, Sampler, SampleRequest
from stage1_dual.sampling.sample_table import PromptTokens, SamplingCounts, sample_table
from stage1_dual.sampling.seeds import sample_seed
from stage1_dual.sampling.transformers_sampler import TransformersSampler

pytestmark = pytest.mark.slow

PROMPTS = [
    PromptTokens(f"p{place}", "test" if place % 3 == 2 else "train", np.array([1, 10 + place, 30], np.int32))
    for place in range(7)
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), eos_logit=24.0)


def never() -> Sampler:
    raise AssertionError("the sampler was started although nothing was missing")


def run(
    folder: Path,
    factory: Callable[[], Sampler],
    *,
    prompts: list[PromptTokens] = PROMPTS,
    samples_per_prompt: int = 4,
    shard_rows: int = 5,
    max_failed_share: float = 0.0,
) -> SamplingCounts:
    return sample_table(
        sampler_factory=factory,
        prompts=prompts,
        samples_per_prompt=samples_per_prompt,
        run_seed=3,
        table=ShardedTable(folder, SAMPLES, {}),
        shard_rows=shard_rows,
        show_progress=False,
        max_failed_share=max_failed_share,
    )


def rows(folder: Path) -> pa.Table:
    """All rows with their split, by key."""
    table = ShardedTable(folder, SAMPLES, {})
    parts = [
        part.append_column("split", pa.array([split] * part.num_rows, pa.string()))
        for split in ("train", "test")
        for part in [table.read(split)]
    ]
    return pa.concat_tables(parts).sort_by([("prompt_id", "ascending"), ("sample_index", "ascending")])


def without_logp(table: pa.Table) -> pa.Table:
    return table.drop_columns("sampler_logp")


def test_rows_hold_what_was_asked_and_drawn(policy: Path, tmp_path: Path) -> None:
    counts = run(tmp_path, lambda: TransformersSampler(str(policy), max_new_tokens=6))
    table = rows(tmp_path).to_pylist()
    assert [(row["prompt_id"], row["sample_index"]) for row in table] == [
        (prompt.prompt_id, k) for prompt in PROMPTS for k in range(4)
    ]
    for row in table:
        prompt = PROMPTS[int(row["prompt_id"][1:])]
        assert row["split"] == prompt.split
        assert row["prompt_token_ids"] == prompt.token_ids.tolist()
        assert row["seed"] == sample_seed(3, row["prompt_id"], row["sample_index"])
        assert (row["completion_token_ids"][-1] == 2) == (row["finish_reason"] == "stop")
    assert (counts.rows_sampled, counts.rows_present) == (28, 0)
    assert counts.tokens_sampled == sum(len(row["completion_token_ids"]) for row in table)
    assert sum(counts.finish_reasons.values()) == 28
    assert counts.sampler["temperature"] == 1.0


@pytest.mark.parametrize("n_prompts", range(1, 8))
@pytest.mark.parametrize("shard_rows", [1, 3, 100])
def test_no_row_is_dropped_or_repeated(policy: Path, tmp_path: Path, n_prompts: int, shard_rows: int) -> None:
    # One token a sample: most samples of a prompt are equal, and all are kept.
    counts = run(
        tmp_path,
        lambda: TransformersSampler(str(policy), max_new_tokens=1),
        prompts=PROMPTS[:n_prompts],
        shard_rows=shard_rows,
    )
    table = rows(tmp_path)
    keys = list(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
    assert keys == [(prompt.prompt_id, k) for prompt in PROMPTS[:n_prompts] for k in range(4)]
    assert counts.rows_sampled == len(keys)


def test_a_complete_table_starts_no_sampler(policy: Path, tmp_path: Path) -> None:
    run(tmp_path, lambda: TransformersSampler(str(policy), max_new_tokens=6))
    before = rows(tmp_path)
    counts = run(tmp_path, never)
    assert (counts.rows_sampled, counts.rows_present) == (0, 28)
    ShardedTable(tmp_path, SAMPLES, {}).finish()
    assert run(tmp_path, never).rows_present == 28
    assert rows(tmp_path) == before


@pytest.mark.parametrize("finished", [False, True])
def test_a_top_up_draws_only_what_is_new(policy: Path, tmp_path: Path, finished: bool) -> None:
    def factory() -> Sampler:
        return TransformersSampler(str(policy), max_new_tokens=6)

    run(tmp_path / "grown", factory, prompts=PROMPTS[1:], samples_per_prompt=3)
    first = rows(tmp_path / "grown")
    if finished:
        ShardedTable(tmp_path / "grown", SAMPLES, {}).finish()
    counts = run(tmp_path / "grown", factory, samples_per_prompt=9)
    assert (counts.rows_sampled, counts.rows_present) == (63 - 18, 18)
    grown = rows(tmp_path / "grown")
    assert set(map(str, first.to_pylist())) <= set(map(str, grown.to_pylist()))
    assert len(set(grown["seed"].to_pylist())) == 63
    run(tmp_path / "at_once", factory, samples_per_prompt=9)
    assert without_logp(grown) == without_logp(rows(tmp_path / "at_once"))


class Breaking(TransformersSampler):
    """Breaks down at every request of some prompts."""

    poisoned: frozenset[str] = frozenset()

    def stream(
        self, requests: Iterable[SampleRequest], *, on_tokens: OnTokens | None = None
    ) -> Iterator[tuple[SampleRequest, SampledCompletion]]:
        for request, completion in super().stream(requests, on_tokens=on_tokens):
            if request.prompt_id in self.poisoned:
                raise ZeroDivisionError("it breaks")
            yield request, completion


@pytest.mark.parametrize(("poisoned", "n_failed"), [({"p1"}, 16), ({"p0", "p1"}, 32), ({"p0", "p3", "p5"}, 48)])
def test_prompts_at_which_the_sampler_breaks_down_harm_no_other(
    policy: Path, tmp_path: Path, poisoned: set[str], n_failed: int
) -> None:
    starts = []

    def factory(names: set[str] = poisoned) -> Sampler:
        sampler = Breaking(str(policy), max_new_tokens=6)
        sampler.poisoned = frozenset(names)
        starts.append(sampler)
        return sampler

    arguments: dict[str, Any] = {"samples_per_prompt": 16, "shard_rows": 200, "max_failed_share": 0.5}
    counts = run(tmp_path, factory, **arguments)
    assert {failure.prompt_id for failure in counts.failures} == poisoned
    assert len(counts.failures) == n_failed
    assert counts.rows_sampled == 7 * 16 - n_failed
    assert len(starts) < 12 * len(poisoned)
    counts = run(tmp_path, lambda: factory(set()), **arguments)
    assert (counts.rows_sampled, counts.failures) == (n_failed, ())
    assert len(rows(tmp_path)) == len(set(rows(tmp_path)["seed"].to_pylist())) == 7 * 16


def test_a_sampler_that_breaks_down_at_everything_ends_the_step(policy: Path, tmp_path: Path) -> None:
    def factory() -> Sampler:
        sampler = Breaking(str(policy), max_new_tokens=6)
        sampler.poisoned = frozenset(prompt.prompt_id for prompt in PROMPTS)
        return sampler

    with pytest.raises(WorkerFailedError, match=r"of 3 prompts one after the other.* ZeroDivisionError: it breaks"):
        run(tmp_path, factory, samples_per_prompt=16, shard_rows=200, max_failed_share=0.5)


_KILLED = """
import sys
from pathlib import Path
import numpy as np
import torch
from stage1_dual.sampling.sample_table import PromptTokens, sample_table
from stage1_dual.sampling.transformers_sampler import TransformersSampler
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLES

torch.set_num_threads(1)
folder, policy = sys.argv[1:]
sample_table(
    sampler_factory=lambda: TransformersSampler(policy, max_new_tokens=24),
    prompts=[
        PromptTokens(f"p{place}", "test" if place % 3 == 2 else "train", np.array([1, 10 + place, 30], np.int32))
        for place in range(7)
    ],
    samples_per_prompt=120,
    run_seed=3,
    table=ShardedTable(Path(folder), SAMPLES, {}),
    shard_rows=10,
    show_progress=False,
)
"""


def test_a_killed_run_continues_to_the_same_rows(policy: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(killed), str(policy)])
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

    def factory() -> Sampler:
        return TransformersSampler(str(policy), max_new_tokens=24)

    counts = run(killed, factory, samples_per_prompt=120, shard_rows=10)
    assert counts.rows_present >= 30
    assert counts.rows_sampled > 0
    assert counts.rows_present + counts.rows_sampled == 840
    run(tmp_path / "whole", factory, samples_per_prompt=120, shard_rows=10)
    assert rows(killed) == rows(tmp_path / "whole")
    files = ShardedTable(killed, SAMPLES, {}).finish()
    assert len(files) == 84
