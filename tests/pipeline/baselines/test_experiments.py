"""Every experiment on random checkpoints of a few thousand weights: real steps, tables checked against artifacts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny_models import save_tiny_classifier
from helpers.tiny_runs import write_recipe

from pipeline.baselines import policies
from pipeline.baselines.command import build_study, run_experiments
from pipeline.baselines.experiments import EXPERIMENTS
from pipeline.baselines.results import markdown_table
from pipeline.baselines.study import Study, at_margin, change_config
from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import read_json, read_manifest
from pipeline.contracts.errors import ConfigError, InputError, StaleArtifactError
from pipeline.steps.runner import run_steps

pytestmark = pytest.mark.slow

MARGINS = (0.005, 0.01)

PERFORMED = [name for name in EXPERIMENTS if name != "many_constraints"]
"""All but the one whose demands are assured together: so few responses have no room for that."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("baselines")
    # The responses of a random policy have no true scores: further classifiers stand for the annotators.
    names = ("humour", "gold_helpful", "gold_harmless", "gold_humour", "words")
    for seed, name in enumerate(names, start=7):
        save_tiny_classifier(folder / name, seed=seed)
    scorers = {name: {"model": str(folder / name)} for name in ("helpful", "harmless", *names)}
    recipe = write_recipe(
        folder,
        scorers=scorers,
        training={"epochs": 1, "tokens_per_step": 1024, "evaluations": 1, "learning_rate": 1e-3},
        evaluation={"samples_per_prompt": 4, "bootstrap_replicates": 100},
        multishot={"iterations": 2, "samples_per_prompt": 2},
    )
    return Study(
        config=load_config(recipe),
        data_dir=folder / "data",
        name="tiny",
        seeds=(0,),
        margins=MARGINS,
        pairs=((-1.0, -1.0),),  # so small a world has no room for what is assured beyond a demand
        dpo_epochs=1.0,
        sizes={},
        real_model=load_config(recipe),
        show_progress=False,
    )


@pytest.fixture(scope="module")
def results(study: Study) -> Path:
    run_experiments(study, PERFORMED)
    return study.folder / "results"


def test_every_experiment_leaves_a_table_a_page_and_a_picture(results: Path) -> None:
    for name in PERFORMED:
        for ending in ("parquet", "md", "png", "svg"):
            path = results / f"{name}.{ending}"
            assert path.stat().st_size > 0, path
        assert pq.read_table(results / f"{name}.parquet").num_rows > 0
        assert f"]({name}.md)" in (results / "README.md").read_text()


def test_demands_of_which_none_can_be_met_are_named(study: Study, results: Path) -> None:
    with pytest.raises(
        InputError, match="many_constraints: none of its demands can be met; three, seed 0: the thresh"
    ):
        run_experiments(study, ["many_constraints"])
    assert not (results / "many_constraints.parquet").exists()


def test_realised_margins_are_those_of_the_evaluations(study: Study, results: Path) -> None:
    rows = pq.read_table(results / "constraint_satisfaction.parquet").to_pylist()
    assert {(row["method"], row["seed"], row["demanded"]) for row in rows} == {
        (method, seed, margin)
        for method, margins in ((policies.ONE_SHOT, MARGINS), (policies.MULTI_SHOT, study.some_margins))
        for seed in study.seeds
        for margin in margins
    }
    for row in rows:
        evaluation = read_json(study.data_dir / "runs" / row["run"] / "evaluation" / "evaluation.json")
        bound = evaluation["constraints"][0]
        assert bound["margin"] == row["demanded"]
        assert row["realised"] == pytest.approx(bound["improvement"], abs=1e-12)
        np.testing.assert_allclose([row["ci95_low"], row["ci95_high"]], bound["improvement_ci95"], atol=1e-12)
        assert row["status"] == bound["status"]


def test_reference_points_have_the_lambda_of_their_name(study: Study, results: Path) -> None:
    base = study.base(0)

    def multiplier(run: str) -> float:
        return float(read_json(base.folder / run / "dual" / "dual.json")["constraints"][0]["multiplier"])

    assert multiplier("reward-only") == 0.0
    assert multiplier("constraint-only") == 0.0
    assert multiplier("equal-weights") == pytest.approx(1.0, abs=1e-6)
    assert multiplier("dpo-0.01") == multiplier("one-shot-0.01")
    assert (results / "trade_off.parquet").is_file()


def test_the_policies_of_the_preference_based_method_never_see_a_score_model(study: Study, results: Path) -> None:
    base = study.base(0)
    for side in policies.IMPLICIT:
        dual = read_json(base.folder / f"prefer-{side}" / "dual" / "dual.json")
        assert dual["reward"]["name"] == f"gold_{side}"
    dual = read_json(base.folder / "preference-based" / f"margin-{MARGINS[1]:g}" / "dual" / "dual.json")
    assert dual["reward"]["name"] == "implicit_helpful"
    assert [entry["name"] for entry in dual["constraints"]] == ["implicit_harmless"]
    # The mean implicit reward of the reference is minus beta KL(reference || tuned).
    assert dual["constraints"][0]["reference"] < 0
    assert (results / "preference_calibration.parquet").is_file()


def test_a_soup_lies_between_its_ingredients(study: Study, results: Path) -> None:
    from safetensors.numpy import load_file

    base = study.base(0)
    weights = [
        load_file(base.folder / name / "policy" / "model.safetensors")
        for name in ("reward-only", "soup-0.25", "constraint-only")
    ]
    for name, mixed in weights[1].items():
        np.testing.assert_allclose(mixed, 0.75 * weights[0][name] + 0.25 * weights[2][name], atol=1e-6)
    assert (results / "trade_off.md").is_file()


def test_a_second_call_trains_nothing(study: Study, results: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.folder.rglob("model.safetensors")}
    assert before
    run_experiments(study, ["constraint_satisfaction"])
    assert {path: path.stat().st_mtime_ns for path in study.folder.rglob("model.safetensors")} == before


@pytest.mark.parametrize(
    ("key", "value"), [("training.epochs", 2), ("multishot.epochs", 2), ("sampling.max_new_tokens", 13)]
)
def test_a_changed_recipe_is_refused_as_often_as_it_is_tried(
    study: Study, results: Path, key: str, value: int
) -> None:
    changed = replace(study, config=change_config(study.config, {key: value}))
    for _ in range(2):
        with pytest.raises(StaleArtifactError, match=key.rpartition(".")[2]) as caught:
            run_experiments(changed, ["constraint_satisfaction"])
        # `dualign sample --redo` would redo another run: the experiments have none of their own to name.
        assert "--redo" not in str(caught.value)
        assert f"remove {study.folder}" in str(caught.value)
    assert (results / "constraint_satisfaction.md").is_file()


def test_a_step_of_another_run_is_not_redone_through_a_link(study: Study, results: Path) -> None:
    base = study.base(0)
    arm = study.arm_run(base, policies.one_shot(MARGINS[0]))
    with pytest.raises(InputError, match=r"the step `sample` of run `tiny.*` is that of"):
        run_steps(arm, ("sample", "score", "solve"), redo_from="sample")
    assert read_manifest(base.folder / "samples").step == "sample"
    assert read_manifest(arm.folder / "policy").step == "train"
    assert (results / "cost.md").is_file()


def test_arms_share_the_samples_of_their_seed(study: Study, results: Path) -> None:
    base = study.base(0)
    arm = base.folder / "one-shot-0.01"
    assert (arm / "samples").resolve() == (base.folder / "samples").resolve()
    assert read_manifest(arm / "policy").inputs["samples"] == read_manifest(base.folder / "samples").identity
    other = study.base(1)
    assert read_manifest(base.folder / "samples").identity != read_manifest(other.folder / "samples").identity
    assert (results / "cost.md").is_file()


def test_what_cannot_be_asked(study: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--seeds is 0; it must be at least 1"):
        build_study(data_dir=tmp_path, n_seeds=0, quick=True, show_progress=False)
    with pytest.raises(InputError, match="--only trade: there is no such experiment"):
        run_experiments(study, ["trade"])
    with pytest.raises(ConfigError, match="learning_rate"):
        change_config(study.config, {"training.learning_rate": -1})


def test_changes_replace_whole_sections(study: Study) -> None:
    changed = change_config(study.config, {**at_margin(0.3, name="humour"), "training.objective": "dpo"})
    assert list(changed.constraints) == ["humour"]
    assert changed.training == study.config.training.model_copy(update={"objective": "dpo"})
    assert replace(study, config=changed).config.reward == study.config.reward


def test_a_markdown_table_shows_numbers_plainly() -> None:
    table = pa.Table.from_pylist([{"a": 0.12345, "b": None, "c": "x|y", "d": True, "e": 12345.6, "f": 3}])
    head, rule, row = markdown_table(table)
    assert head == "| a | b | c | d | e | f |"
    assert rule == "|---|---|---|---|---|---|"
    assert row == "| 0.123 | – | x\\|y | yes | 12,346 | 3 |"
