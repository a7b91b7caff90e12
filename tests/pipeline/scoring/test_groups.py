from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.score_models import save_tiny_score_model
from helpers.tiny_models import save_tiny_classifier, save_tiny_policy

from pipeline.config.loading import build_config, load_config
from pipeline.config.recipe import RunConfig
from pipeline.contracts.errors import ConfigError
from pipeline.run.run import Run
from pipeline.scorers.kinds import KINDS
from pipeline.scoring.groups import ScorerGroup, check_scorers, group_scorers
from stage1_dual.scoring.protocol import Score, ScoreRequest

ROWS = [
    ScoreRequest("p", k, [{"role": "user", "content": "why?"}], "rest " * k, [1, 7], [9, 11 + k, 2]) for k in range(3)
]
Scorers = Mapping[str, Mapping[str, Any]]


@pytest.fixture(autouse=True)
def _imports() -> Iterator[None]:
    """What a test imports from its folder is forgotten after it."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("rules_of_test_scorers", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "policy": str(save_tiny_policy(folder / "policy")),
        "tuned": str(save_tiny_policy(folder / "tuned", seed=5)),
        "heads": str(save_tiny_classifier(folder / "heads", labels=3)),
        "other": str(save_tiny_classifier(folder / "other", seed=1)),
        "cost": str(save_tiny_score_model(folder / "cost", score_type="cost", score_dim=2)),
    }


def make_config(models: Mapping[str, str], scorers: Scorers) -> RunConfig:
    tree = {
        "beta": 1.0,
        "reference": {"model": models["policy"]},
        "scorers": {"base": {"model": models["other"]}, **scorers},
        "reward": "base",
        "constraints": {next(iter(scorers), "base2"): {"direction": ">=", "margin": 0.0}},
    }
    return build_config(tree, source="the test")


def make_groups(models: Mapping[str, str], scorers: Scorers, folder: Path) -> list[ScorerGroup]:
    run = Run(config=make_config(models, scorers), name="r", data_dir=folder)
    return group_scorers(run, list(scorers))


def write_rules(
    folder: Path, body: str = "def words(rows, times=1): return [times * len(r.completion.split()) for r in rows]"
) -> Path:
    path = folder / "rules_of_test_scorers.py"
    path.write_text(body)
    return path


def every_kind(models: Mapping[str, str], folder: Path) -> dict[str, dict[str, Any]]:
    write_rules(folder)
    (folder / "scores.csv").write_text(
        "prompt,completion,mark\n" + "".join(f"why?,{r.completion},{r.sample_index}\n" for r in ROWS)
    )
    return {
        "classifier": {"model": models["heads"], "head": "LABEL_1"},
        "beaver": {"kind": "safe_rlhf_score", "model": models["cost"], "sign": -1},
        "ratio": {"kind": "log_ratio", "model": models["tuned"], "scale": 0.1},
        "rule": {
            "kind": "python",
            "function": "rules_of_test_scorers:words",
            "settings": {"times": 2},
            "folder": str(folder),
        },
        "mark": {"kind": "column", "column": "mark", "table": str(folder / "scores.csv")},
        "logp": {"kind": "column", "column": "sampler_logp"},
    }


def test_every_kind_starts_after_a_pickle_and_scores(models: dict[str, str], tmp_path: Path) -> None:
    scorers = every_kind(models, tmp_path)
    assert {settings.get("kind", "sequence_classification") for settings in scorers.values()} == set(KINDS)
    check_scorers(make_config(models, scorers), [])
    groups = make_groups(models, scorers, tmp_path)
    assert [group.names for group in groups] == [(name,) for name in scorers]
    assert len({group.identity for group in groups}) == len(groups)
    for group in groups:
        start = pickle.loads(pickle.dumps(group.start))
        scorer = start(device="cpu") if group.uses_device else start()
        rows = [ScoreRequest(**{**vars(row), "columns": {"sampler_logp": -2.0}}) for row in ROWS]
        found = scorer.score(rows)
        assert all(isinstance(score, Score) and len(score.values) == 1 for score in found), (group.names, found)
        json.dumps([scorer.describe(), group.settings])
        assert {"model", "outputs"} <= scorer.describe().keys()
        scorer.close()


def test_what_each_kind_reads_of_the_samples(models: dict[str, str], tmp_path: Path) -> None:
    groups = make_groups(models, every_kind(models, tmp_path), tmp_path)
    ids = ("prompt_token_ids", "completion_token_ids")
    assert {group.names[0]: group.reads for group in groups} == {
        "classifier": (), "beaver": (), "ratio": ids, "rule": ids, "mark": (), "logp": ("sampler_logp",)
    }  # fmt: skip


def test_scorers_of_one_checkpoint_read_alike_share_a_pass(models: dict[str, str], tmp_path: Path) -> None:
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
    }
    groups = make_groups(models, scorers, tmp_path)
    assert [group.names for group in groups] == [("a", "c", "h"), ("b",), ("d",), ("e",), ("f",), ("g",), ("i", "j")]
    together = groups[0].start(device="cpu").score(ROWS)
    apart = [make_groups(models, {name: scorers[name]}, tmp_path)[0] for name in groups[0].names]
    assert [group.settings[0] for group in apart] == list(groups[0].settings)
    assert {group.identity for group in apart} == {groups[0].identity}
    for place, group in enumerate(apart):
        alone = group.start(device="cpu").score(ROWS)
        for one, many in zip(alone, together, strict=True):
            assert isinstance(one, Score)
            assert isinstance(many, Score)
            assert many.values[place] == pytest.approx(one.values[0], abs=1e-5)
            assert many.scored_sha256 == one.scored_sha256


def identity(group: ScorerGroup) -> tuple[object, ...]:
    return group.settings, group.identity


@pytest.mark.parametrize(
    ("name", "change", "same"),
    [
        ("classifier", {"batch_tokens": 7}, True),
        ("classifier", {"head": 2}, False),
        ("classifier", {"sign": -1}, False),
        ("classifier", {"offset": 0.5}, False),
        ("classifier", {"dtype": "bfloat16"}, False),
        ("classifier", {"max_length": 9}, False),
        ("classifier", {"output": "probability"}, False),
        ("ratio", {"batch_tokens": 7}, True),
        ("ratio", {"scale": 0.2}, False),
        ("rule", {"settings": {"times": 3}}, False),
        ("mark", {"sign": -1}, False),
    ],
)
def test_settings_that_change_values_change_the_identity(
    models: dict[str, str], tmp_path: Path, name: str, change: dict[str, Any], same: bool
) -> None:
    scorers = every_kind(models, tmp_path)
    before = identity(make_groups(models, {name: scorers[name]}, tmp_path)[0])
    after = identity(make_groups(models, {name: {**scorers[name], **change}}, tmp_path)[0])
    assert (before == after) is same


def edit_rules(folder: Path) -> None:
    write_rules(folder, "def words(rows, times=1): return [0.0] * len(rows)")


def edit_scores(folder: Path) -> None:
    path = folder / "scores.csv"
    path.write_text(path.read_text().replace(",0\n", ",9\n"))


def edit_template(folder: Path) -> None:
    (folder / "template.jinja").write_text("{{ messages[1]['content'] }}")


@pytest.mark.parametrize(
    ("name", "edit"), [("rule", edit_rules), ("mark", edit_scores), ("classifier", edit_template)]
)
def test_files_that_change_values_change_the_identity(
    models: dict[str, str], tmp_path: Path, name: str, edit: Callable[[Path], None]
) -> None:
    settings = every_kind(models, tmp_path)[name]
    if name == "classifier":
        (tmp_path / "template.jinja").write_text("{{ messages[0]['content'] }}")
        settings["template"] = str(tmp_path / "template.jinja")
    before = identity(make_groups(models, {name: settings}, tmp_path)[0])
    assert before == identity(make_groups(models, {name: settings}, tmp_path)[0])
    edit(tmp_path)
    assert before != identity(make_groups(models, {name: settings}, tmp_path)[0])


def test_a_model_may_move(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(models["heads"])
    groups = [
        make_groups(models, {"a": {"model": path}}, tmp_path)[0]
        for path in (models["heads"], str(tmp_path / "elsewhere"))
    ]
    assert identity(groups[0]) == identity(groups[1])


def test_all_faults_of_all_scorers_in_one_message(models: dict[str, str], tmp_path: Path) -> None:
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
        check_scorers(make_config(models, scorers), ["helpful"])
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


def test_tokenizers_of_a_log_ratio_are_compared_before_the_work(models: dict[str, str], tmp_path: Path) -> None:
    tuned = str(save_tiny_policy(tmp_path, vocab_size=330))
    with pytest.raises(ConfigError, match=r"`scorers\.r`: the tokenizers of .* differ"):
        check_scorers(make_config(models, {"r": {"kind": "log_ratio", "model": tuned}}), [])


@pytest.mark.parametrize("change", [{"quantization": "fp8"}])
def test_a_log_ratio_does_not_take_an_altered_reference_for_the_plain_one(
    models: dict[str, str], change: dict[str, str]
) -> None:
    settings = {"kind": "log_ratio", "model": models["tuned"]}
    config = make_config(models, {"r": settings})
    altered = {"reference": config.reference.model_copy(update=change)}
    with pytest.raises(ConfigError, match=r"`scorers\.r`: the run's reference is quantised"):
        check_scorers(config.model_copy(update=altered), [])
    own = make_config(models, {"r": {**settings, "reference": {"model": models["policy"]}}})
    check_scorers(own.model_copy(update=altered), [])


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (
            {"kind": "sequence_clasification", "model": "m"},
            "is 'sequence_clasification'; there is no such kind; did you mean `sequence_classification`?",
        ),
        ({"model": "m", "hed": 1}, "unknown setting `scorers.x.hed`; did you mean `head`?"),
        ({"kind": "python", "functon": "a:b"}, "unknown setting `scorers.x.functon`; did you mean `function`?"),
        ({"kind": "column", "model": "m"}, "`scorers.x.column` is missing"),
        ({"model": "m", "sign": 2}, "`scorers.x.sign` is 2"),
        ({"model": "m", "output": "softmax"}, "`scorers.x.output` is 'softmax'"),
        ({"kind": "safe_rlhf_score", "model": "m", "head": "x"}, "`scorers.x.head` is 'x'"),
        ({"kind": "log_ratio", "model": "m", "min_accuracy": 0.6}, "gives `min_accuracy` without `calibration`"),
        ({"kind": "log_ratio", "model": "m", "scale": 0.0}, "`scorers.x.scale` is 0.0"),
        ({"kind": "log_ratio", "model": "m", "reference": {"modl": "m"}}, "unknown setting `scorers.x.reference."),
        (3, "`scorers.x` is 3; a scorer is a mapping of settings"),
    ],
)
def test_faults_of_a_scorers_settings(models: dict[str, str], scorer: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(models, {"x": scorer})
    assert message in str(caught.value)


def test_a_recipes_functions_are_looked_for_beside_it(models: dict[str, str], tmp_path: Path) -> None:
    write_rules(tmp_path)
    path = tmp_path / "recipe.yaml"
    tree = {
        "beta": 1.0,
        "reference": {"model": models["policy"]},
        "scorers": {
            "base": {"model": models["other"]},
            "x": {"kind": "python", "function": "rules_of_test_scorers:words"},
        },
        "reward": "base",
        "constraints": {"x": {"direction": "<=", "threshold": 2.0}},
    }
    path.write_text(json.dumps(tree))
    config = load_config(path)
    check_scorers(config, [])
    (group,) = group_scorers(Run(config=config, name="r", data_dir=tmp_path), ["x"])
    assert [s.values for s in group.start().score(ROWS) if isinstance(s, Score)] == [(0.0,), (1.0,), (2.0,)]


def test_the_documented_recipes_are_valid(models: dict[str, str]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "scorers.md").read_text()
    scorers = {
        name: settings
        for snippet in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
        for name, settings in yaml.safe_load(snippet)["scorers"].items()
    }
    config = make_config(models, scorers)
    assert {settings.kind_name() for settings in config.scorers.values()} == set(KINDS)
    for kind, settings in KINDS.items():
        assert f"## `{kind}`" in page
        for name in settings.model_fields:
            assert name == "kind" or f"`{name}" in page, name
