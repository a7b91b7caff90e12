"""Recipes of scorers on tiny checkpoints, and the passes that compute them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.score_models import save_tiny_score_model
from helpers.tiny_models import save_tiny_classifier, save_tiny_policy

from pipeline.config.loading import build_config
from pipeline.config.recipe import RunConfig
from pipeline.contracts.errors import ConfigError
from pipeline.run.run import Run
from pipeline.scoring.groups import ScorerGroup, check_scorers, group_scorers
from stage1_dual.scoring.protocol import Score, Scorer, ScoreRequest

ROWS = [
    ScoreRequest("p", k, [{"role": "user", "content": "why?"}], "rest " * k, [1, 7], [9, 11 + k, 2]) for k in range(3)
]
RULES = "rules_of_test_scorers"
"""Name of the module of functions that tests write."""

Scorers = Mapping[str, Mapping[str, Any]]


def save_score_models(folder: Path) -> dict[str, str]:
    """One checkpoint of each sort that a scorer reads, by a name for it."""
    return {
        "policy": str(save_tiny_policy(folder / "policy")),
        "tuned": str(save_tiny_policy(folder / "tuned", seed=5)),
        "heads": str(save_tiny_classifier(folder / "heads", labels=3)),
        "other": str(save_tiny_classifier(folder / "other", seed=1)),
        "cost": str(save_tiny_score_model(folder / "cost", score_type="cost", score_dim=2)),
    }


def scorer_tree(models: Mapping[str, str], scorers: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose reward is a classifier, with further scorers, the first of which is bounded."""
    return {
        "beta": 1.0,
        "reference": {"model": models["policy"]},
        "scorers": {"base": {"model": models["other"]}, **scorers},
        "reward": "base",
        "constraints": {next(iter(scorers)): {"direction": ">=", "margin": 0.0}},
    }


def scorer_config(models: Mapping[str, str], scorers: Mapping[str, Any]) -> RunConfig:
    """The recipe of :func:`scorer_tree`, validated."""
    return build_config(scorer_tree(models, scorers), source="the test")


def scorer_groups(models: Mapping[str, str], scorers: Scorers, folder: Path) -> list[ScorerGroup]:
    """The passes of the scorers, without the base."""
    run = Run(config=scorer_config(models, scorers), name="r", data_dir=folder)
    return group_scorers(run, list(scorers))


def values_of(scorer: Scorer, rows: Sequence[ScoreRequest] = tuple(ROWS)) -> list[tuple[float, ...]]:
    """What a scorer gives for rows that can all be scored."""
    found = scorer.score(rows)
    assert all(isinstance(score, Score) for score in found), found
    return [score.values for score in found if isinstance(score, Score)]


def settings_faults(models: Mapping[str, str], scorer: Any) -> tuple[str, ...]:
    """The faults of the settings of a scorer ``x``."""
    with pytest.raises(ConfigError) as caught:
        scorer_config(models, {"x": scorer})
    return caught.value.faults


def check_faults(models: Mapping[str, str], scorer: Any, *, embedded: Sequence[str] = ()) -> tuple[str, ...]:
    """The faults that the check before sampling finds in a scorer ``x``; empty for none."""
    try:
        check_scorers(scorer_config(models, {"x": scorer}), embedded)
    except ConfigError as error:
        return error.faults
    return ()


def identity_of(models: Mapping[str, str], scorer: Mapping[str, Any], folder: Path) -> tuple[object, ...]:
    """What the manifest of a scorer's table is recognised by."""
    (group,) = scorer_groups(models, {"x": scorer}, folder)
    return group.settings, group.identity


def write_rules(
    folder: Path, body: str = "def words(rows, times=1): return [times * len(r.completion.split()) for r in rows]"
) -> Path:
    """A module with a function that scores."""
    path = folder / f"{RULES}.py"
    path.write_text(body)
    return path


def write_marks(folder: Path) -> Path:
    """A table with a score of each row."""
    path = folder / "scores.csv"
    path.write_text("prompt,completion,mark\n" + "".join(f"why?,{r.completion},{r.sample_index}\n" for r in ROWS))
    return path


def every_kind(models: Mapping[str, str], folder: Path) -> dict[str, dict[str, Any]]:
    """A scorer of each kind, of ``column`` one of a table and one of the samples; writes what they read."""
    write_rules(folder)
    return {
        "classifier": {"model": models["heads"], "head": "LABEL_1"},
        "beaver": {"kind": "safe_rlhf_score", "model": models["cost"], "sign": -1},
        "ratio": {"kind": "log_ratio", "model": models["tuned"], "scale": 0.1},
        "rule": {"kind": "python", "function": f"{RULES}:words", "settings": {"times": 2}, "folder": str(folder)},
        "mark": {"kind": "column", "column": "mark", "table": str(write_marks(folder))},
        "judge": {"kind": "judge", "model": models["policy"], "rubric": "{prompt} {completion}", "min_answer_mass": 0},
        "logp": {"kind": "column", "column": "sampler_logp"},
    }
