"""`dualign.solve`: the same answer through every door, in tables that fit the frame that was given."""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dualign
import pipeline.dual.from_table
from pipeline.cli import main

pytestmark = pytest.mark.slow

N_PROMPTS, N_RESPONSES = 60, 16
CONSTRAINTS = ["harmless >= ref + 0.3", "toxicity <= 0.1"]
ASKED = {"reward": "helpful", "constraints": CONSTRAINTS, "beta": 1.0}


def draw(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    harmless = rng.normal(size=N_PROMPTS * N_RESPONSES)
    return pd.DataFrame(
        {
            "prompt_id": np.repeat([f"p{i:03d}" for i in range(N_PROMPTS)], N_RESPONSES),
            "helpful": rng.normal(size=harmless.size) - harmless / 2,
            "harmless": harmless,
            "toxicity": rng.normal(size=harmless.size) - 0.3 * harmless,
            "remark": [{"any": "thing"}, "at all"] * (harmless.size // 2),  # not asked for: never converted
        }
    )


@pytest.fixture
def frame() -> pd.DataFrame:
    return draw()


def arrow(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame.drop(columns="remark", errors="ignore"), preserve_index=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("memory", [2**28, 0], ids=["in memory", "on disk"])
def test_path_table_and_data_frame_give_the_same_to_the_last_digit(
    frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    monkeypatch.setattr(pipeline.dual.from_table, "MEMORY_BYTES", memory)
    frame["split"] = np.repeat(["train", "train", "test"] * (N_PROMPTS // 3), N_RESPONSES)
    path = tmp_path / "scores.parquet"
    pq.write_table(arrow(frame), path, row_group_size=100)
    doors: list[pd.DataFrame | pa.Table | str | Path] = [path, str(path), arrow(frame), frame, frame.iloc[::1]]
    results = [dualign.solve(door, **ASKED) for door in doors]
    assert results[0].multipliers["harmless"] > 0
    for result in results[1:]:
        assert result.multipliers == results[0].multipliers
        assert result.dual == results[0].dual
        weights = np.asarray(result.weights["weight"])
        assert weights.tolist() == results[0].weights["weight"].to_pylist()


def test_what_is_saved_is_what_the_command_writes(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    pq.write_table(arrow(frame), path)
    command = ["solve", "--table", str(path), "--reward", "helpful", "--beta", "1", "--no-progress"]
    for text in CONSTRAINTS:
        command += ["--constraint", text]
    assert main([*command, "--output", str(tmp_path / "command")]) == 0
    written = files(tmp_path / "command")
    assert {"dual.json", "frontier.parquet", "weights.parquet", "figures/frontier_harmless.png"} <= written.keys()
    dualign.solve(path, **ASKED).save(tmp_path / "path")
    saved = files(tmp_path / "path")
    assert saved.keys() == written.keys()
    # The page of the command has the command that asks for another demand.
    assert {name for name in written if saved[name] != written[name]} == {"report.html"}
    dualign.solve(arrow(frame), **ASKED).save(str(tmp_path / "table"))
    dualign.solve(frame, **ASKED).save(tmp_path / "frame")
    for door in ("table", "frame"):
        saved = files(tmp_path / door)
        assert saved.keys() == written.keys()
        # The page names the table.
        named = {"dual.json", "weights.parquet", "report.html"}
        assert {name for name in written if saved[name] != written[name]} <= named
        dual, expected = json.loads(saved["dual.json"]), json.loads(written["dual.json"])
        assert list(dual.pop("inputs")) == ["table in memory"]
        del expected["inputs"]
        assert dual == expected
        weights = pq.read_table(tmp_path / door / "weights.parquet")
        assert weights.to_pylist() == pq.read_table(tmp_path / "command" / "weights.parquet").to_pylist()
    # A type of text apart, which is pandas', the same rows have the same hash.
    assert json.loads(files(tmp_path / "table")["dual.json"]) == json.loads(files(tmp_path / "frame")["dual.json"])


def test_weights_of_a_data_frame_fit_it_whatever_its_index(frame: pd.DataFrame) -> None:
    frame = frame.sample(frac=1, random_state=1)  # the index is no range any more
    frame["split"] = np.where(frame["prompt_id"] < "p040", "train", "neither")
    result = dualign.solve(frame, **ASKED)
    weights = result.weights
    assert isinstance(weights, pd.DataFrame)
    assert len(weights) == 40 * N_RESPONSES
    frame["weight"] = weights["weight"]
    assert frame["weight"].notna().equals(frame["split"] == "train")
    kept = frame.dropna(subset="weight")
    assert kept.groupby("prompt_id")["weight"].sum().to_numpy() == pytest.approx(1.0)
    slack = kept["weight"].to_numpy() @ kept["harmless"].to_numpy() / 40 - kept["harmless"].mean()
    assert slack == pytest.approx(0.3, abs=1e-9)
    assert isinstance(result.frontier().table, pd.DataFrame)


def test_a_change_of_the_frame_afterwards_changes_nothing(frame: pd.DataFrame) -> None:
    expected = dualign.solve(frame, **ASKED).weights
    result = dualign.solve(frame, **ASKED)
    frame.loc[:, "helpful"] = 0.0
    frame["harmless"].to_numpy(copy=False)  # a view, if pandas gives one
    assert result.weights.equals(expected)


def test_a_file_that_changes_afterwards_is_not_taken_for_the_one_solved(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    pq.write_table(arrow(frame), path)
    result = dualign.solve(path, **ASKED)
    pq.write_table(arrow(draw(seed=1)), path)
    with pytest.raises(dualign.InputError, match="has changed since it was first read"):
        _ = result.weights
    with pytest.raises(dualign.InputError, match="has changed"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out" / "dual.json").exists()


def test_ragged_prompts_as_rows_and_as_lists(frame: pd.DataFrame) -> None:
    keep = np.random.default_rng(2).uniform(size=len(frame)) < 0.7
    ragged = frame[keep].reset_index(drop=True)
    assert ragged.groupby("prompt_id").size().nunique() > 3
    rows = dualign.solve(ragged, **ASKED)
    lists = ragged.groupby("prompt_id")[["helpful", "harmless", "toxicity"]].agg(list)
    listed = dualign.solve(lists.reset_index(), **ASKED)
    assert listed.multipliers == rows.multipliers
    np.testing.assert_array_equal(listed.weights["weight"].to_numpy(), rows.weights["weight"].to_numpy())
    # The row of each prompt labels all its responses.
    assert (
        listed.weights.index.tolist() == np.repeat(np.arange(N_PROMPTS), ragged.groupby("prompt_id").size()).tolist()
    )


def test_scores_beyond_memory_are_gone_with_the_result(
    frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.dual.from_table, "MEMORY_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(dualign.InfeasibleError, match="best attainable"):
        dualign.solve(frame, reward="helpful", constraints=["harmless >= ref + 99"], beta=1.0)
    assert list(tmp_path.iterdir()) == []
    result = dualign.solve(frame, **ASKED)
    assert len(list(tmp_path.glob("dualign-*/train/partition-*"))) == 1
    assert len(result.weights) == len(frame)
    del result
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_safeguards_and_the_correction_are_those_of_the_command(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    pq.write_table(arrow(frame), path)
    result = dualign.solve(
        path,
        **ASKED,
        seed=7,
        reserve={"harmless": 0.1},
        assurance={"harmless": 0.9},
        score_error={"toxicity": 0.02},
        evaluation_prompts=200,
        evaluation_responses=64,
        correct_response_bias=True,
    )
    command = ["solve", "--table", str(path), "--reward", "helpful", "--beta", "1", "--no-progress", "--seed", "7"]
    command += ["--reserve", "harmless=0.1", "--assurance", "harmless=0.9", "--score-error", "toxicity=0.02"]
    command += ["--evaluation-prompts", "200", "--evaluation-responses", "64", "--correct-response-bias"]
    for text in CONSTRAINTS:
        command += ["--constraint", text]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "dual.json").read_text())
    assert written["seed"] == 7
    assert {key: written[key] for key in result.dual} == result.dual


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": "helpfull"}, "the DataFrame has no column 'helpfull'; did you mean `helpful`?"),
        ({"prompt_id": "promptid"}, "the DataFrame has no column 'promptid'; did you mean `prompt_id`?"),
        ({"constraints": ["harmles >= 0"]}, "no column 'harmles'; did you mean `harmless`?"),
        ({"constraints": ["harmless > 0"]}, "is not of the form"),
        ({"constraints": "harmless >= 0"}, "the constraints are the text 'harmless >= 0'; give a list"),
        ({"constraints": []}, "no constraint is given"),
        ({"constraints": ["harmless >= 0", "harmless >= 1"]}, "bound the same from the same side"),
        ({"reward": "remark"}, "column 'remark' holds values of several types"),
        ({"reward": "prompt_id"}, "the prompt's id is 'prompt_id', which is a score too"),
        ({"beta": 0}, "`beta` is 0"),
        ({"seed": -1}, "the seed is -1; it must not be negative"),
        ({"reserve": {"harmful": 0.1}}, "a safeguard is asked for 'harmful'"),
        ({"reserve": 0.1}, "reserve is 0.1; it must be a dict"),
        ({"reserve": {"harmless": "much"}}, r"reserve \{'harmless': 'much'\}: it must be a number"),
        ({"assurance": {"harmless": 1.0}}, r"assurance \{'harmless': 1.0\}: the number must be between 0 and 1"),
        ({"assurance": {"harmless": 0.9}}, "in Python evaluation_prompts and evaluation_responses"),
        ({"score_error": {"harmless": -1}}, "the number must be finite and not negative"),
    ],
)
def test_bad_arguments_are_named(frame: pd.DataFrame, change: dict[str, object], message: str) -> None:
    with pytest.raises(dualign.InputError, match=message):
        dualign.solve(frame, **(ASKED | change))  # type: ignore[arg-type]


def test_bad_frames_are_named(frame: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(
        dualign.InputError, match=r"the table is of type list; it must be a pandas DataFrame, a pyarrow"
    ):
        dualign.solve([1, 2], **ASKED)  # type: ignore[arg-type]
    with pytest.raises(dualign.InputError, match=r"nowhere\.parquet'; there is no such file"):
        dualign.solve(tmp_path / "nowhere.parquet", **ASKED)
    twice = pd.concat([frame, frame[["harmless"]]], axis=1)
    with pytest.raises(dualign.InputError, match="the DataFrame has 2 columns 'harmless'; it must have one"):
        dualign.solve(twice, **ASKED)
    with pytest.raises(dualign.InputError, match="the table has no column 'prompt_id'"):
        dualign.solve(arrow(frame).drop_columns("prompt_id"), **ASKED)
    with pytest.raises(dualign.InputError, match="the DataFrame has no rows"):
        dualign.solve(frame.iloc[:0].astype({"prompt_id": "str"}), **ASKED)
    frame.loc[[3, 5], "harmless"] = np.nan
    with pytest.raises(dualign.InputError, match=r"'harmless' has 2 empty values \(first rows: \[3, 5\]\)"):
        dualign.solve(frame, **ASKED)


def test_the_result_is_a_table_a_person_reads(frame: pd.DataFrame) -> None:
    result = dualign.solve(frame, **ASKED)
    shown = repr(result).splitlines()
    assert len(shown) <= 25
    assert max(map(len, shown)) <= 100
    lam = f"{result.multipliers['harmless']:.3f}"
    assert any("harmless" in line and lam in line and ">=" in line for line in shown)
    assert any(result.trust.verdict in line.lower() for line in shown)
    html = result._repr_html_()
    assert html.count("<tr>") <= 25
    assert f"<td>{lam}<br>" in html
    assert result.trust.verdict in {"ok", "weak", "unreliable"}
    assert result.problem.n_prompts == N_PROMPTS
    assert result.solution.multipliers.tolist() == list(result.multipliers.values())


def test_the_frontier_is_a_table_and_a_figure(frame: pd.DataFrame) -> None:
    result = dualign.solve(frame, **ASKED)
    frontier = result.frontier()
    assert set(frontier.table["constraint"]) == {"harmless", "toxicity"}
    shown = repr(frontier).splitlines()
    assert len(shown) <= 25
    assert "124 thresholds" in shown[0]
    assert frontier._repr_html_().count("<tr>") <= 25
    with pytest.raises(dualign.InputError, match="there are 2 constraints; name the one to plot: harmless, toxicity"):
        frontier.plot()
    with pytest.raises(dualign.InputError, match="no constraint 'toxic'; did you mean `toxicity`"):
        frontier.plot("toxic")
    figure = frontier.plot("harmless")
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert "harmless" in figure.axes[-1].get_xlabel()
    alone = dualign.solve(arrow(frame), reward="helpful", constraints=["harmless >= ref + 0.3"], beta=1.0).frontier()
    assert isinstance(alone.table, pa.Table)
    assert len(alone.plot().axes) == 2
