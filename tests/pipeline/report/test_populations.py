from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.report.populations as populations
from pipeline.report.populations import (
    Population,
    PromptTexts,
    brief_messages,
    brief_text,
    judged_split,
    read_populations,
    read_texts,
    solved_rows,
)
from pipeline.report.readers import build_problem, read_tilted_scores


def _population(n_prompts: int = 10, n_samples: int = 4) -> Population:
    order = np.random.default_rng(0).permutation(n_prompts * n_samples)
    table = pa.table(
        {
            "prompt_id": pa.array([f"p{place:03d}" for place in np.repeat(np.arange(n_prompts), n_samples)[order]]),
            "sample_index": pa.array(np.tile(np.arange(n_samples), n_prompts)[order], pa.int32()),
            "reward": pa.array(np.arange(n_prompts * n_samples, dtype=np.float64)[order]),
        }
    )
    return Population.of_table(table, ["reward"])


def test_rows_stand_by_prompt_and_number() -> None:
    found = _population()
    assert found.prompt_ids[:2] == ("p000", "p001")
    assert found.counts_p.tolist() == [4] * 10
    assert found.columns["reward"].tolist() == list(range(40))
    assert found.own_weight_n().sum() == pytest.approx(1)


def test_of_too_many_prompts_an_even_part_is_kept_whole() -> None:
    whole = _population()
    assert whole.is_whole
    assert whole.within(160) is whole
    part = whole.within(80)
    assert not part.is_whole
    assert part.n_prompts_in_all == 10
    assert part.prompt_ids == ("p000", "p002", "p004", "p006", "p008")
    assert part.columns["reward"].tolist() == [4 * p + k for p in range(0, 10, 2) for k in range(4)]
    document = part.to_document()
    assert document["counts"] == [4] * 5
    assert document["prompts"] == 10
    assert (
        np.frombuffer(base64.b64decode(document["columns"]["reward"]), "<f4").tolist()
        == part.columns["reward"].tolist()
    )


def test_no_more_bytes_are_kept_than_may_be_however_uneven_the_prompts() -> None:
    counts_p = np.tile([1, 99], 50)
    n = int(counts_p.sum())
    columns = {"reward": np.zeros(n), "weight": np.zeros(n)}
    whole = Population(tuple(map(str, range(100))), counts_p, np.arange(n), columns, 100)
    assert whole.within(4 * n) is whole  # the page has no weights
    for most in (15_000, 4_000, 500):
        kept = whole.within(most)
        assert 0 < 4 * kept.counts_p.sum() <= most
    few = whole.of_prompts({"3", "4"})
    assert (few.prompt_ids, few.counts_p.tolist(), few.n_prompts_in_all) == (("3", "4"), [99, 1], 100)


def test_without_a_run_the_rows_are_those_of_the_dual(two_bounds: Any) -> None:
    solved = two_bounds.solved
    problem = build_problem(solved, read_tilted_scores(two_bounds.folder / "tilted", solved.names))
    expected = read_populations(two_bounds.folder, solved, drops_cut_off=False)["train"]
    names = ["reward", "constraint_harmless", "constraint_toxicity"]
    found = solved_rows(problem, solved, most_bytes=10**9)
    assert list(found.columns) == names
    assert found.is_whole
    assert found.counts_p.tolist() == expected.counts_p.tolist()
    assert found.sample_index_n.tolist() == expected.sample_index_n.tolist()
    # Which prompt is which a problem does not say.
    for name in names:
        assert np.sort(found.columns[name]) == pytest.approx(np.sort(expected.columns[name]), abs=1e-12)
    part = solved_rows(problem, solved, most_bytes=4 * 3 * problem.n_samples // 3)
    assert not part.is_whole
    assert len(part.prompt_ids) == 9
    assert part.columns["reward"].reshape(9, 48).tolist() == found.columns["reward"].reshape(27, 48)[::3].tolist()


def test_the_longest_texts_are_cut_and_say_so() -> None:
    assert brief_text("x" * 10_000) == "x" * 10_000
    assert brief_text("x" * 12_345) == "x" * 10_000 + "… [2,345 more characters]"
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert brief_messages(short) == short
    long = [{"role": "user", "content": str(place) + "x" * 3999} for place in range(9)]
    found = brief_messages(long)
    assert found[0] == {"role": "…", "content": "6 earlier messages"}
    assert [one["content"][0] for one in found[1:]] == ["6", "7", "8"]
    assert found[1]["content"] == "6" + "x" * 1999 + "… [2,000 more characters]"


def test_the_populations_of_a_run_are_its_scores(two_bounds: Any) -> None:
    found = read_populations(two_bounds.folder, two_bounds.solved, drops_cut_off=False)
    assert list(found) == ["train", "test", "policy"]
    assert judged_split(found) == "test"
    assert judged_split({"train": found["train"]}) == "train"
    means = {
        name: {column: float(value_n @ one.own_weight_n()) for column, value_n in one.columns.items()}
        for name, one in found.items()
    }
    evaluation = two_bounds.evaluation
    for column, entry in zip(
        ("reward", "constraint_harmless", "constraint_toxicity"),
        (evaluation["reward"], *evaluation["constraints"]),
        strict=True,
    ):
        assert means["test"][column] == pytest.approx(entry["reference"])
        assert means["policy"][column] == pytest.approx(entry["realised"])
    assert found["train"].columns["weight"].sum() == pytest.approx(len(found["train"].prompt_ids))
    assert "weight" not in found["train"].to_document()["columns"]


def test_responses_that_were_cut_off_are_left_out_where_the_run_drops_them(two_bounds: Any, tmp_path: Path) -> None:
    (tmp_path / "tilted").symlink_to(two_bounds.folder / "tilted")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "scores").symlink_to(two_bounds.folder / "evaluation" / "scores")
    source = next((two_bounds.folder / "evaluation" / "samples" / "data").glob("*"))
    table = pq.read_table(source)
    reasons = ["length" if k % 2 else "stop" for k in table["sample_index"].to_pylist()]
    changed = table.set_column(
        table.schema.get_field_index("finish_reason"), table.schema.field("finish_reason"), [reasons]
    )
    target = tmp_path / "evaluation" / "samples" / "data" / source.name
    target.parent.mkdir(parents=True)
    pq.write_table(changed, target)
    sizes = [
        len(read_populations(tmp_path, two_bounds.solved, drops_cut_off=drops)["policy"].sample_index_n)
        for drops in (False, True)
    ]
    assert sizes == [table.num_rows, table.num_rows // 2]


def test_texts_stand_beside_their_scores(two_bounds: Any) -> None:
    found = read_populations(two_bounds.folder, two_bounds.solved, drops_cut_off=False)
    texts = read_texts(two_bounds.folder, "test", found["test"], found["policy"])
    assert len(texts) == len(found["test"].prompt_ids)
    rows = pq.read_table(two_bounds.folder / "tilted" / "data").to_pylist()
    reward_of = {(row["prompt"][0]["content"], row["completion"]): row["reward"] for row in rows}
    starts = np.cumsum(found["test"].counts_p) - found["test"].counts_p
    for one in texts:
        assert one.category in {"family", "work"}
        assert len(one.texts) == len(one.policy_texts) == 48
        for k, text in enumerate(one.texts):
            reward = reward_of[one.messages[0]["content"], text]
            assert found["test"].columns["reward"][starts[one.place] + k] == reward


def test_too_many_texts_become_fewer_responses_and_then_fewer_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 200)) for _ in range(3000)]
    texts = [PromptTexts([], "", p, tuple(words[100 * p : 100 * p + 100])) for p in range(30)]

    def size(found: list[PromptTexts]) -> int:
        return sum(
            len(zlib.compress(json.dumps([list(one.messages), one.texts, one.policy_texts]).encode())) for one in found
        )

    assert populations._fitted(texts) == texts
    for most in (120_000, 20_000, 4_000):
        monkeypatch.setattr(populations, "MOST_TEXT_BYTES", most)
        fewer = populations._fitted(texts)
        assert 0 < size(fewer) <= most
        lengths = {len(one.texts) for one in fewer}
        assert len(lengths) == 1
        assert lengths <= {4, 8, 16, 32, 64}
        assert len(fewer) == 30 or lengths == {4}
        assert all(one.texts == texts[one.place].texts[: len(one.texts)] for one in fewer)
