from pathlib import Path

import pytest
import yaml

from pipeline.config.loading import RECIPES, load_config
from pipeline.contracts.errors import ConfigError
from pipeline.contracts.problem import Constraint, Safeguard

MINIMAL = """
beta: 1.0
reference: {model: embedded:reference}
scorers:
  helpful: {model: embedded:helpful}
  harmless: {model: embedded:harmless}
reward: helpful
constraints:
  harmless: {direction: ">=", margin: 0.5}
"""


def faults(text, tmp_path, overrides=None):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(path) in str(caught.value) or "command line" in str(caught.value)
    return caught.value.faults


def test_every_shipped_recipe_is_valid():
    recipes = [path for path in RECIPES.rglob("*.yaml") if path.parent.name != "accelerate_configs"]
    assert len(recipes) >= 1
    for recipe in recipes:
        load_config(recipe)


def test_recipes_are_found_by_name_and_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    assert [one for one, _ in load_config(path).stated_constraints()] == [Constraint("harmless", ">=", margin=0.5)]
    assert load_config(Path("embedded")).reward == "helpful"


def test_the_command_line_wins(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    config = load_config(path, {"sampling.samples_per_prompt": "16", "constraints.harmless.margin": "-1", "seed": "3"})
    assert (config.sampling.samples_per_prompt, config.constraints["harmless"].margin, config.seed) == (16, -1.0, 3)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"sampling.samples_per_promt": "3"},
            "unknown setting `sampling.samples_per_promt`; did you mean `samples_per_prompt`?",
        ),
        ({"samplng.max_new_tokens": "3"}, "unknown setting `samplng`; did you mean `sampling`?"),
        (
            {"constraints.harmless.treshold": "1"},
            "unknown setting `constraints.harmless.treshold`; did you mean `threshold`?",
        ),
        ({"scorers.helpful.hed": "1"}, "unknown setting `scorers.helpful.hed`; did you mean `head`?"),
        ({"reward": "helpfull"}, "`reward` is 'helpfull': there is no such scorer; did you mean `helpful`?"),
        (
            {"constraints.harmles.margin": "1"},
            "`constraints.harmles`: there is no scorer of this name; did you mean `harmless`?",
        ),
        (
            {"constraints.harmless.threshold": "1"},
            "`constraints.harmless`: gives both of `threshold` and `margin`; give exactly one",
        ),
        (
            {"constraints.harmless.margin": "null"},
            "`constraints.harmless`: gives neither of `threshold` and `margin`, nor `between` or `equals`",
        ),
        ({"beta": "0"}, "`beta` is 0: input should be greater than 0"),
        ({"beta": "-1"}, "`beta` is -1: input should be greater than 0"),
        ({"beta": ".nan"}, "`beta` is nan: input should be a finite number"),
        ({"sampling.engine": "vlm"}, "`sampling.engine` is 'vlm': input should be 'vllm' or 'transformers'"),
        (
            {"sampling.samples_per_prompt": "0"},
            "`sampling.samples_per_prompt` is 0: input should be greater than or equal to 1",
        ),
        ({"constraints": "{}"}, "`constraints` is empty; it needs at least one"),
        ({"reward": "harmless"}, "`constraints.harmless` bounds the reward itself; a constraint bounds another score"),
    ],
)
def test_each_fault_is_one_clear_line(tmp_path, change, fault):
    assert fault in faults(MINIMAL, tmp_path, change)


PAIRS = "{source: pairs.jsonl, response_columns: [a, b]}"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"training.objective": "tilted_nll"},
            "`training.pairs`: the objective is `tilted_nll`, which takes the responses for draws of the reference",
        ),
        ({"training.pairs.response_columns": "[a, a]"}, "`response_columns` names 'a' twice"),
        ({"training.pairs.response_columns": "[a]"}, "`training.pairs.response_columns"),
        ({"training.pairs": "{source: p.jsonl}"}, "`training.pairs.response_columns` is missing; it has no default"),
        ({"training.pairs.promt_column": "q"}, "`training.pairs.promt_column`; did you mean `prompt_column`?"),
        (
            {"scorers.harmless": "{kind: column, column: safe}"},
            "`scorers.harmless.kind` is 'column', which has scores of the sampled responses alone",
        ),
    ],
)
def test_faults_of_training_on_pairs_are_named_with_all_others(tmp_path, change, fault):
    found = faults(MINIMAL, tmp_path, {"training.pairs": PAIRS, **change, "beta": "0"})
    assert any(fault in line for line in found), found
    assert "`beta` is 0: input should be greater than 0" in found


def test_an_unused_column_of_scores_goes_with_pairs_and_a_limit_is_theirs_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    change = {"training.pairs": PAIRS, "scorers.human": "{kind: column, column: human}"}
    assert load_config(path, change, pairs_limit="7").training.pairs.limit == 7
    assert load_config(path, pairs_limit="7").training.pairs is None


def test_all_faults_of_training_are_reported_together(tmp_path):
    training = "{objective: tilted_pairwise, negligible_mass: 0.1, responses_per_group: 1, report_to: [nope], lora: 3}"
    found = faults(MINIMAL, tmp_path, {"training": training, "training.pairs": "{source: 3}"})
    assert len(found) == 6
    assert "unknown setting `training.lora`; did you mean `lora_r`?" in found
    wrong = faults(MINIMAL, tmp_path, {"training.objective": "dpoo", "training.report_to": "[wandb, wandbb]"})
    assert wrong == (
        "`training.objective` is 'dpoo': there is no such objective; did you mean `dpo`?",
        "`training.report_to.1` is 'wandbb': there is no such tracker; did you mean `wandb`?",
    )


@pytest.mark.parametrize("objective", ["{dpo: 0.5, tilted_nll: 0.5}", "tilted_kl", "dpo_soft"])
def test_objectives_that_have_left_are_refused(tmp_path, objective):
    (fault,) = faults(MINIMAL, tmp_path, {"training.objective": objective})
    assert "`training.objective`" in fault


def test_the_norm_of_gradients_is_a_setting_of_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    assert load_config(path, {"training.max_grad_norm": "0.5"}).training.max_grad_norm == 0.5


def test_all_faults_are_reported_together(tmp_path):
    found = faults(MINIMAL, tmp_path, {"beta": "0", "reward": "x", "sampling.engine": "y", "bogus": "1"})
    assert len(found) == 4


def test_a_missing_setting_is_named(tmp_path):
    assert "`beta` is missing; it has no default" in faults(MINIMAL.replace("beta: 1.0", ""), tmp_path)
    assert "`constraints.harmless`: gives no `direction`; it must be '>=', '<=' or '='" in faults(
        MINIMAL.replace('direction: ">=", ', ""), tmp_path
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "holds list"),
        (MINIMAL + "beta: 2\n", "given twice"),
        ("!!python/name:os.system", "not valid YAML"),
    ],
)
def test_files_that_are_not_recipes(tmp_path, text, fault):
    assert any(fault in line for line in faults(text, tmp_path))


def test_a_missing_file_suggests_a_recipe():
    with pytest.raises(ConfigError, match="did you mean `embedded`"):
        load_config(Path("embeded"))


def test_stop_strings_and_numbers_keep_their_types(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    template = (
        load_config(path, {"scorers.helpful.template": r'"Q: {prompt}\nA:{completion}"'}).scorers["helpful"].template
    )
    assert template == "Q: {prompt}\nA:{completion}"


@pytest.mark.parametrize(("direction", "solved"), [(">=", 0.7), ("<=", 0.3)])
def test_a_reserve_tightens_what_is_solved_and_not_what_is_judged(tmp_path, direction, solved):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL.replace('">="', f'"{direction}"'))
    config = load_config(path, {"constraints.harmless.reserve": "0.2"})
    ((demanded, safeguard),) = config.stated_constraints()
    assert demanded == Constraint("harmless", direction, margin=0.5)
    assert safeguard == Safeguard(reserve=0.2)
    assert demanded.tightened(0.2).margin == pytest.approx(solved)
    assert Constraint("g", direction, threshold=0.5).tightened(0.2).threshold == pytest.approx(solved)
    assert "`constraints.harmless.reserve`" in faults(MINIMAL, tmp_path, {"constraints.harmless.reserve": ".inf"})[0]


@pytest.mark.parametrize("setting", ["sampling.samples_per_prompt", "beta", "seed", "training.learning_rate"])
def test_true_is_no_number(setting):
    with pytest.raises(ConfigError, match=rf"`{setting}` is True: it must not be true or false"):
        load_config(Path("embedded"), {setting: "true"})
    assert load_config(Path("embedded"), {"training.match_prediction": "true"}).training.match_prediction


def test_yaml_may_merge_a_mapping_into_another(tmp_path):
    recipe = yaml.safe_load((RECIPES / "embedded.yaml").read_text())
    text = yaml.safe_dump({**recipe, "training": "PLACE"}).replace("PLACE", "{<<: &common {epochs: 3}, patience: 2}")
    (tmp_path / "r.yaml").write_text(text)
    training = load_config(tmp_path / "r.yaml").training
    assert (training.epochs, training.patience) == (3, 2)


def test_yaml_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("[" * 5000)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "r.yaml")


@pytest.mark.parametrize("name", ["harmless\n", "x" * 300, "a/b", "../a", "\x1b[31mred"])
def test_a_name_of_a_scorer_is_plain(name, tmp_path):
    recipe = yaml.safe_load((RECIPES / "embedded.yaml").read_text())
    recipe["scorers"][name] = recipe["scorers"]["harmless"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="a name is at most 100 letters, digits") as caught:
        load_config(tmp_path / "r.yaml")
    assert str(caught.value).isprintable() or str(caught.value).replace("\n", "").isprintable()
    assert len(str(caught.value)) < 1000


def test_many_constraints_without_a_scorer_are_counted(tmp_path):
    bounds = ", ".join(f'c{number}: {{direction: ">=", margin: 0}}' for number in range(50))
    with pytest.raises(ConfigError, match="`constraints`: 30 more have no scorer of their name"):
        load_config(Path("embedded"), {"constraints": f"{{{bounds}}}"})


def test_more_constraints_than_a_problem_can_have_are_one_fault(tmp_path):
    bounds = "".join(f"  c{number}: {{direction: '>=', margin: 0}}\n" for number in range(2_000))
    text = (RECIPES / "embedded.yaml").read_text()
    start = text.index("constraints:\n")
    (tmp_path / "r.yaml").write_text(f"{text[:start]}constraints:\n{bounds}")
    with pytest.raises(ConfigError, match="`constraints` has 2000 entries; a problem has at most 100") as caught:
        load_config(tmp_path / "r.yaml")
    assert len(caught.value.faults) == 1


CONSTRAINTS = """
constraints:
  unsafe: {score: harmless, statistic: share, at_least: 0.0, direction: ">=", threshold: 0.97}
  tone: {score: harmless, direction: ">=", margin: 0.5, each: category}
  length: {score: humour, between: [80, 120]}
  harmless: {direction: ">=", margin: 0.5}
  facts: {score: harmless, per: humour, direction: ">=", threshold: 0.9, where: {category: [a, b]}}
"""


def test_constraints_have_names_of_their_own_and_bound_any_score(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(_with_constraints(CONSTRAINTS))
    config = load_config(path)
    assert [one.name for one, _ in config.stated_constraints()] == [
        *("unsafe", "tone", "length.at_least", "length.at_most", "harmless", "facts")
    ]
    assert config.constraint_scores() == ("harmless", "humour")


@pytest.mark.parametrize(
    ("constraint", "fault"),
    [
        (
            "x: {score: harmles, equals: 1}",
            "`constraints.x.score` is 'harmles': there is no such scorer; did you mean",
        ),
        ("x: {score: harmless, per: humor, equals: 1}", "`constraints.x.per` is 'humor': there is no such scorer"),
        ("x.y: {score: harmless, equals: 1}", "`constraints.x.y`: a name is at most 100 letters"),
        ("x: {score: helpful, equals: 1}", "`constraints.x` bounds the reward itself"),
        (
            "{a: {score: harmless, equals: 1}, b: {score: harmless, equals: 1}}",
            "`constraints`: the constraints `a` and `b` are the same: harmless = 1",
        ),
        (
            "{a: {score: harmless, equals: 1}, b: {score: harmless, between: [2, 3]}}",
            "`constraints`: the constraints `a` (harmless = 1) and `b.at_least` (harmless >= 2) contradict each other",
        ),
        ("x: {score: harmless, equals: 1, level: 0.1}", "`constraints.x`: the statistic `mean` takes `per`"),
        (
            "x: {score: harmless, statistic: cvar, level: 1.5, direction: '>=', threshold: 0}",
            "`constraints.x`: `level` is 1.5; the share of the worst responses lies between 0 and 1",
        ),
    ],
)
def test_faults_of_constraints_are_one_clear_line(tmp_path, constraint, fault):
    text = constraint if constraint.startswith("{") else f"{{{constraint}}}"
    found = faults(_with_constraints(f"constraints: {text}"), tmp_path)
    assert any(line.startswith(fault) for line in found), found


def _with_constraints(text):
    head = MINIMAL[: MINIMAL.index("constraints:")]
    return head.replace("  harmless:", "  humour:\n    model: humour\n  harmless:") + text


@pytest.mark.parametrize("direction", [">=", "<=", "="])
def test_a_direction_needs_no_quotes_of_yaml_on_the_command_line(direction: str) -> None:
    assurance = {"constraints.harmless.assurance": "null"} if direction == "=" else {}  # bounds alone have one
    overrides = {"constraints.harmless.direction": direction, **assurance}
    assert load_config(Path("embedded"), overrides).constraints["harmless"].direction == direction
