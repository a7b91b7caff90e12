from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.judge_server import JudgeServer, serving, share_of
from helpers.scorers import check_faults, identity_of, scorer_groups, settings_faults, values_of
from helpers.tiny_runs import dualign, rows_of, run_folder, write_recipe

from pipeline.cli import main
from pipeline.contracts.artifacts import read_json, read_manifest
from pipeline.scoring.repeats import read_noise

pytestmark = pytest.mark.slow

KEY = "sk-0123456789abcdef"
RUBRIC = "Is {completion} fine after {prompt}?"
HERE = {"kind": "judge", "rubric": RUBRIC, "min_answer_mass": 0}


def _judge(models: Mapping[str, str], **more: Any) -> dict[str, Any]:
    return {**HERE, "model": models["policy"], **more}


def _remote(url: str = "http://127.0.0.1:9/v1", **endpoint: Any) -> dict[str, Any]:
    return {"kind": "judge", "model": "judge", "rubric": RUBRIC, "endpoint": {"base_url": url, **endpoint}}


def test_a_rubric_is_a_text_or_a_file_beside_the_recipe(score_models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "fine.txt").write_text(RUBRIC)
    as_file = _judge(score_models, rubric="fine.txt", folder=str(tmp_path))
    one, other = (scorer_groups(score_models, {"x": s}, tmp_path)[0] for s in (_judge(score_models), as_file))
    values = values_of(one.start(device="cpu"))
    assert values == values_of(other.start(device="cpu"))
    assert all(1 < value < 5 for (value,) in values)
    assert (one.settings, one.identity) == (other.settings, other.identity)
    assert (one.uses_device, one.keeps_answers, one.repeated_share, one.reads) == (True, False, 0.0, ())


def test_what_makes_other_ratings_and_what_does_not(score_models: dict[str, str], tmp_path: Path) -> None:
    def identity(scorer: Mapping[str, Any]) -> tuple[object, ...]:
        return identity_of(score_models, scorer, tmp_path)

    here, there = identity(_judge(score_models)), identity(_remote())
    for other in ({"rubric": RUBRIC + " "}, {"answers": {"1": 0, "2": 1}}, {"answer_prefix": "So "}, {"sign": -1}):
        assert identity(_judge(score_models, **other)) != here, other
    assert identity(_judge(score_models, batch_tokens=7)) == here
    for other in ({"draws": 3}, {"top_logprobs": 5}, {"request": {"seed": 1}}):
        assert identity(_remote(**other)) != there, other
    assert identity({**_remote(), "model": "another"}) != there
    for same in ({"concurrency": 2}, {"retries": 0}, {"timeout": 3}, {"key_env": "A_KEY"}, {"requests_per_minute": 9}):
        assert identity(_remote(**same)) == there, same
    assert identity(_remote("https://elsewhere/v1")) == there


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answers": {True: 1, False: 0}}, "put the answers in quotes"),
        ({"answers": {"a": 1}}, "it needs at least two values"),
        ({"output": "log_odds"}, "it needs two values for `output: log_odds`"),
        ({"endpoint": {"base_url": "localhost:8000"}}, "it must be an address such as"),
        ({"endpoint": {"base_url": "http://h/v1"}, "answer_prefix": "x"}, "`answer_prefix` has no effect at an"),
        ({"endpoint": {"base_url": "http://h/v1"}, "answers": {"1": 1, "10": 2}}, "one begins the other"),
        (
            {"endpoint": {"base_url": "http://h/v1", "draws": 2}, "answers": {"a": 1, "b": 2}, "output": "log_odds"},
            "`output: log_odds` needs log-probabilities",
        ),
    ],
)
def test_faults_of_the_settings(score_models: dict[str, str], settings: dict[str, Any], message: str) -> None:
    faults = settings_faults(score_models, _judge(score_models, **settings))
    assert any(message in fault for fault in faults), faults


def test_a_key_in_a_recipe_is_refused_and_not_repeated(score_models: dict[str, str]) -> None:
    for endpoint in ({"key_env": KEY}, {"key_env": KEY.replace("-", "_")}):
        (fault,) = settings_faults(score_models, _remote(**endpoint))
        assert "is never the key itself" in fault
        assert KEY[3:] not in fault
    for url in (f"https://me:{KEY}@host/v1", f"https://host/v1?api_key={KEY}"):
        (fault,) = settings_faults(score_models, _remote(url))
        assert "a key is in the variable of `key_env`" in fault
        assert KEY not in fault


def test_faults_before_anything_is_sampled(score_models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    (fault,) = check_faults(score_models, _judge(score_models, rubric="nowhere.txt"))
    assert "which is neither a text with {completion} nor a file beside the recipe" in fault
    (fault,) = check_faults(score_models, _judge(score_models, rubric="{completion} {promt}"))
    assert "the rubric has {promt}" in fault
    (fault,) = check_faults(score_models, _judge(score_models, model=score_models["heads"]))
    assert "LlamaForSequenceClassification" in fault
    monkeypatch.delenv("NOBODYS_KEY", raising=False)
    (fault,) = check_faults(score_models, _remote(key_env="NOBODYS_KEY"))
    assert "names the environment variable NOBODYS_KEY, which is not set" in fault
    (fault,) = check_faults(score_models, _judge(score_models, rubric="{completion} {info.answer}"))
    assert "it reads the column 'answer' of the prompts; `prompts.info_columns` must name it" in fault


def _probability(content: str) -> float:
    """Of a rating of 3 over one of 1: a response is good or not, and the judge nearly sure."""
    return 0.95 if len(content) % 2 else 0.05


def _rate(body: Mapping[str, Any]) -> Mapping[str, float]:
    p = _probability(body["messages"][0]["content"])
    return {"3": p, "1": 1 - p}


def _faults(body: str, times: int) -> str | None:
    kind = int(share_of(body) * 6)
    return ("429", "500", "truncated")[kind] if times == 1 and kind < 3 else None


def _endpoint_recipe(folder: Path, server: JudgeServer, **settings: Any) -> Path:
    judge = _remote(server.url, key_env="TEST_JUDGE_KEY", draws=2, concurrency=8)
    return write_recipe(
        folder,
        scorers={"judge": {**judge, "answers": {"1": 1, "3": 3}, "repeat_share": 0.5}},
        constraints={"judge": {"direction": ">=", "margin": 0.1, "score_noise": "measured"}},
        **settings,
    )


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("environment")
def test_a_killed_run_pays_for_nothing_twice_and_says_its_key_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(JudgeServer(_rate, fault=_faults, key=KEY, delay=0.02)) as server:
        recipe = _endpoint_recipe(tmp_path, server)
        assert dualign("prepare", recipe) == dualign("sample", recipe) == 0
        assert server.seen.total() == 0, "nothing is sent before it is scored"
        command = [sys.executable, "-m", "pipeline", "score", "--config", str(recipe), "--run", "tiny"]
        command += ["--data-dir", str(tmp_path / "data")]
        with subprocess.Popen(command, env=os.environ.copy(), start_new_session=True) as process:
            deadline = time.monotonic() + 120
            while server.answered.total() < 70 and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        paid = server.answered.total()
        assert not (run_folder(recipe) / "scores" / "judge" / "manifest.json").exists()

        assert dualign("score", recipe) == 0
        scores, samples = rows_of(run_folder(recipe) / "scores" / "judge"), rows_of(run_folder(recipe) / "samples")
        assert len(scores) == len(samples) == 144
        # Two draws of each, and two more of those rated twice; texts may be equal.
        noise = read_noise(run_folder(recipe) / "scores" / "judge")
        assert noise is not None
        assert 30 <= noise.rows < 144
        twice = [name for name, times in server.answered.items() if times > 1]
        assert len(twice) <= 8, "only what was on its way when the process was killed"
        assert max(server.answered.values()) <= 2
        assert server.answered.total() > paid
        total = server.answered.total()
        assert dualign("score", recipe) == dualign("solve", recipe) == 0
        assert dualign("score", recipe, "--redo") == dualign("solve", recipe) == 0
        assert rows_of(run_folder(recipe) / "scores" / "judge") == scores
        assert server.answered.total() == total

    manifest = read_manifest(run_folder(recipe) / "scores" / "judge")
    assert manifest.details["score_noise"]["sigma"] == noise.sigma
    assert "repeats.parquet" in manifest.files
    # Of two draws, each 1 or 3 with a probability of 0.05 for the other one.
    expected = math.sqrt(4 * 0.05 * 0.95 / 2)
    assert abs(noise.sigma - expected) < 4 * noise.standard_error + 0.05
    (bound,) = (
        bound
        for bound in read_json(run_folder(recipe) / "dual" / "dual.json")["constraints"]
        if bound["name"] == "judge"
    )
    guard = bound["safeguard"]
    assert guard["score_noise_sigma"] == noise.sigma
    assert guard["score_noise"] == pytest.approx(bound["multiplier"] * noise.sigma**2, abs=2e-4)
    assert bound["margin"] == pytest.approx(0.1 + guard["score_noise"], abs=1e-12)

    assert main(["validate", str(run_folder(recipe)), "--no-progress"]) == 0
    shown = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written
    assert KEY not in shown.out + shown.err
    assert "noise of one score" in shown.err


@pytest.mark.usefixtures("environment")
def test_half_of_the_rows_unreadable_is_half_of_the_rows_lost_and_nothing_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def rate(body: Mapping[str, Any]) -> Mapping[str, float]:
        return {"Well, it depends": 1.0} if _probability(body["messages"][0]["content"]) < 0.5 else {"3": 1.0}

    with serving(JudgeServer(rate, key=KEY)) as server:
        recipe = _endpoint_recipe(tmp_path, server)
        assert dualign("prepare", recipe) == dualign("sample", recipe) == 0
        assert dualign("score", recipe) == 2
        assert "a larger share than `max_failed_share`" in capfd.readouterr().err
        assert dualign("score", recipe, "--max_failed_share", "0.9") == 0
        total = server.answered.total()
        folder = run_folder(recipe) / "scores" / "judge"
        failures, scores = read_json(folder / "failures.json"), rows_of(folder)
        assert len(failures) + len(scores) == 144
        assert 30 < len(failures) < 114
        assert {row["reason"] for row in failures} == {
            "0 of 2 draws of the judge are answers, less than `min_answer_mass`, 0.5"
        }
        assert {row["value"] for row in scores} == {3.0}
        assert set(server.answered.values()) == {1}
        assert dualign("score", recipe, "--max_failed_share", "0.9") == 0
        assert server.answered.total() == total


def test_noise_that_nothing_measures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bound = {"direction": ">=", "margin": 0.0, "score_noise": "measured"}
    assert dualign("sample", write_recipe(tmp_path, constraints={"harmless": bound})) == 2
    assert "`constraints.harmless.score_noise` is 'measured', and the scorer 'harmless' scores no row twice" in (
        capsys.readouterr().err
    )
    assert dualign("prepare", write_recipe(tmp_path, constraints={"harmless": {**bound, "score_noise": 0.1}})) == 0


@pytest.mark.usefixtures("environment")
def test_a_dry_run_says_what_would_be_sent_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(JudgeServer(_rate, key=KEY)) as server:
        recipe = _endpoint_recipe(tmp_path, server)
        assert dualign("run", recipe, "--dry-run") == 0
        shown = capsys.readouterr().out
        assert server.seen.total() == 0
    # 144 responses, of which half are rated twice, and 64 of each of the 5 test prompts; two draws a rating.
    (line,) = re.findall(r".*SENT.*", shown)
    assert f"judge: at most {2 * (216 + 320):,} requests of " in line
    assert f"to {server.url}, model judge" in line
    assert KEY not in shown
