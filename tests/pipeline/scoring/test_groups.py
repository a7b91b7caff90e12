from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.scorers import ROWS, identity_of, scorer_config, scorer_groups, values_of

from pipeline.contracts.errors import ConfigError
from pipeline.scoring.groups import check_scorers
from stage1_dual.scoring.protocol import Score


def test_scorers_of_one_checkpoint_read_alike_share_a_pass(score_models: dict[str, str], tmp_path: Path) -> None:
    models = score_models
    scorers = {
        "a": {"model": models["heads"], "head": 0},
        "b": {"model": models["other"]},
        "c": {"model": models["heads"], "head": "LABEL_2", "sign": -1, "offset": 1.0, "batch_tokens": 64},
        "d": {"model": models["heads"], "head": 1, "template": "{prompt} {completion}"},
        "e": {"model": models["heads"], "head": 1, "dtype": "bfloat16"},
        "f": {"model": models["heads"], "head": 1, "over_length": "fail"},
        "g": {"model": models["heads"], "head": 1, "max_length": 100},
        "h": {"model": models["heads"], "head": 1, "output": "probability"},
        "i": {"kind": "safe_rlhf_score", "model": models["cost"]},
        "j": {"kind": "safe_rlhf_score", "model": models["cost"], "head": 1},
        "k": {"kind": "log_ratio", "model": models["tuned"]},
        "l": {"kind": "log_ratio", "model": models["tuned"]},
    }
    groups = scorer_groups(models, scorers, tmp_path)
    assert [group.names for group in groups] == [
        ("a", "c", "h"), ("b",), ("d",), ("e",), ("f",), ("g",), ("i", "j"), ("k",), ("l",)
    ]  # fmt: skip
    together = groups[0].start(device="cpu").score(ROWS)
    apart = [scorer_groups(models, {name: scorers[name]}, tmp_path)[0] for name in groups[0].names]
    assert [group.settings[0] for group in apart] == list(groups[0].settings)
    assert {group.identity for group in apart} == {groups[0].identity}
    for place, group in enumerate(apart):
        alone = group.start(device="cpu")
        for values, many in zip(values_of(alone), together, strict=True):
            assert isinstance(many, Score)
            assert many.values[place] == pytest.approx(values[0], abs=1e-5)
        for one, many in zip(alone.score(ROWS), together, strict=True):
            assert isinstance(one, Score)
            assert isinstance(many, Score)
            assert many.scored_sha256 == one.scored_sha256


MANIFESTS = {
    "helpful": (
        {"model": "heads", "head": "LABEL_1", "template": "template.jinja", "max_length": 64, "batch_tokens": 512},
        (
            '{"dtype": "float32", "sign": 1, "offset": 0.0, "template": "template.jinja", "max_length": 64, '
            '"over_length": "flag", "kind": "sequence_classification", "head": "LABEL_1", "output": "logit"}'
        ),
        "cce519d14b8c916d9f0774bcbe4dc066df7d7a9e781270a019df8c913143a152",
    ),
    "toxic": (
        {
            "kind": "sequence_classification",
            "model": "heads",
            "output": "probability",
            "over_length": "fail",
            "dtype": "bfloat16",
        },
        (
            '{"dtype": "bfloat16", "sign": 1, "offset": 0.0, "template": null, "max_length": null, '
            '"over_length": "fail", "kind": "sequence_classification", "head": 0, "output": "probability"}'
        ),
        "87134cce7d735d1ad1f604fcfe3e95dd3ecfcffe3adea3d8e47be758ac5cbbbf",
    ),
    "cost": (
        {
            "kind": "safe_rlhf_score",
            "model": "cost",
            "head": 1,
            "sign": -1,
            "offset": 0.5,
            "template": "{prompt} {completion}",
        },
        (
            '{"dtype": "float32", "sign": -1, "offset": 0.5, "template": "{prompt} {completion}", "max_length": null, '
            '"over_length": "flag", "kind": "safe_rlhf_score", "head": 1}'
        ),
        "a9f2c5f2eb5ee0823db378231642e66a9121630f8570d5108d43ecc458a2a4bc",
    ),
    "implicit": (
        {"kind": "log_ratio", "model": "tuned", "scale": 0.1, "calibration": "pairs.jsonl", "min_accuracy": 0.6},
        (
            '{"dtype": "float32", "sign": 1, "offset": 0.0, "kind": "log_ratio", "scale": 0.1, "max_length": null, '
            '"template": null}'
        ),
        "73b5c63c6e2b0659ec99943fe4743278418487224336ca8d5cd0024c36e8b747",
    ),
    "own": (
        {
            "kind": "log_ratio",
            "model": "tuned",
            "reference": {"model": "heads"},
            "max_length": 99,
            "template": "{prompt} {completion}",
        },
        (
            '{"dtype": "float32", "sign": 1, "offset": 0.0, "kind": "log_ratio", "scale": 1.0, "max_length": 99, '
            '"template": "{prompt} {completion}"}'
        ),
        "f81d43b2507ca8e5e7f2a36259467be54bf7998e8a184e4b34af2a713e69803b",
    ),
    "rule": (
        {"kind": "python", "function": "rules:words", "settings": {"times": 2}, "folder": "."},
        '{"sign": 1, "offset": 0.0, "kind": "python", "function": "rules:words", "settings": {"times": 2}}',
        "149f742716897ecf9ee54ee6b35c65c24b18fea39f8b6ccfb4447940e48d2c61",
    ),
    "mark": (
        {"kind": "column", "column": "mark", "table": "scores.csv", "sign": -1},
        '{"sign": -1, "offset": 0.0, "kind": "column", "column": "mark"}',
        "fe39e1652c03042b55ea610c22615ee43121fd8b1c4c3260cb685e89ce9a8180",
    ),
    "likely": (
        {"kind": "column", "column": "sampler_logp"},
        '{"sign": 1, "offset": 0.0, "kind": "column", "column": "sampler_logp"}',
        "ec2a732ca7f1ca198210e1ab2d29c2c805fb6e5b308c2633c0143786b84ab0d1",
    ),
}
"""Settings of a recipe, and what version 0.1.0 wrote of them into the manifest of the score table."""


def test_score_tables_of_before_are_found_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another word in these settings, or another identity, and every score that anybody has is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    models = ("heads", "cost", "tuned", "policy", "other")
    for name in models:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"of": "{"reference" if name == "policy" else name}"}}')
        (tmp_path / name / "model.safetensors").write_bytes(b"reference" if name == "policy" else name.encode())
    (tmp_path / "rules.py").write_text("def words(rows, times=1): return [0.0 for _ in rows]\n")
    (tmp_path / "scores.csv").write_text("prompt_id,sample_index,mark\np,0,1\n")
    (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }}")
    scorers = {name: settings for name, (settings, _, _) in MANIFESTS.items()}
    groups = scorer_groups({name: name for name in models}, scorers, tmp_path)
    found = {group.names: [(json.dumps(settings), group.identity) for settings in group.settings] for group in groups}
    assert found == {(name,): [(settings, identity)] for name, (_, settings, identity) in MANIFESTS.items()}


def test_a_model_may_move(score_models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(score_models["heads"])
    here, there = (
        identity_of(score_models, {"model": path}, tmp_path)
        for path in (score_models["heads"], str(tmp_path / "elsewhere"))
    )
    assert here == there


def test_all_faults_of_all_scorers_in_one_message(score_models: dict[str, str], tmp_path: Path) -> None:
    models = score_models
    (tmp_path / "scores.csv").write_text("prompt_id,sample_index,mark\np,0,1\np,0,2\n")
    scorers = {
        "a": {"model": models["heads"], "head": 3},
        "b": {"model": models["policy"]},
        "c": {"model": "embedded:nothing"},
        "d": {"kind": "safe_rlhf_score", "model": models["heads"]},
        "e": {"kind": "log_ratio", "model": models["heads"]},
        "f": {"kind": "python", "function": "rules_that_are_not:f"},
        "g": {"kind": "column", "column": "mark", "table": str(tmp_path / "scores.csv")},
        "h": {"kind": "column", "column": "reward"},
        "i": {"kind": "column", "column": "completion"},
        "j": {"kind": "log_ratio", "model": models["tuned"], "calibration": str(tmp_path / "pairs.jsonl")},
        "k": {"model": "embedded:helpful", "template": "{prompt} only"},
        "l": {"model": "embedded:helpful"},
    }
    with pytest.raises(ConfigError) as caught:
        check_scorers(scorer_config(models, scorers), ["helpful"])
    wanted = [
        r"`scorers\.a`: the scorer .* has no head 3",
        r"`scorers\.b`: the scorer .* is not a sequence classifier",
        r"`scorers\.c\.model` is 'embedded:nothing'; there is no such embedded model",
        r"`scorers\.d`: the scorer .* is not a score model of safe-rlhf",
        r"`scorers\.e`: the policy .* is not a causal language model",
        r"`scorers\.f`: `function` is 'rules_that_are_not:f'; there is no module",
        r"`scorers\.g`: `table` .* has 1 rows for samples it had before",
        r"`scorers\.h`: `column` is 'reward'; the samples have the columns",
        r"`scorers\.i`: the samples: the column 'completion' holds string",
        r"`scorers\.j`: `calibration` is .* there is no such file",
        r"`scorers\.k`: `template` is '{prompt} only'",
    ]
    assert len(caught.value.faults) == len(wanted)
    for fault, pattern in zip(caught.value.faults, wanted, strict=True):
        assert re.match(pattern, fault)


def test_no_scorer_takes_a_quantised_reference_for_the_plain_one(score_models: dict[str, str]) -> None:
    settings = {"kind": "log_ratio", "model": score_models["tuned"]}
    config = scorer_config(score_models, {"r": settings})
    altered = {"reference": config.reference.model_copy(update={"quantization": "fp8"})}
    with pytest.raises(
        ConfigError, match=r"`scorers\.r`: the run's reference is quantised.* give it a `reference` of"
    ):
        check_scorers(config.model_copy(update=altered), [])
    own = scorer_config(score_models, {"r": {**settings, "reference": {"model": score_models["policy"]}}})
    check_scorers(own.model_copy(update=altered), [])
