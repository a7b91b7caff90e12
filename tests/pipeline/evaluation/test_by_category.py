"""A demand that holds on average, and is judged in each category by the prompts of that category alone."""

import numpy as np
import pytest

from pipeline.contracts.problem import Constraint
from pipeline.contracts.statistics import Statistic
from pipeline.evaluation import judge_categories
from pipeline.evaluation.intervals import mean_interval
from pipeline.scoring.categories import statistics_by_category
from pipeline.scoring.joined import JoinedScores


def joined(score_pk, reward_pk):
    n_prompts, n_samples = score_pk.shape
    return JoinedScores(
        prompt_ids=tuple(f"p{place:03d}" for place in range(n_prompts)),
        prompt_n=np.repeat(np.arange(n_prompts), n_samples),
        sample_index_n=np.tile(np.arange(n_samples), n_prompts),
        reward_n=reward_pk.reshape(-1),
        score_names=("g",),
        scores_ns=score_pk.reshape(-1, 1),
        cut_off_n=np.zeros(n_prompts * n_samples, dtype=bool),
    )


@pytest.fixture(scope="module")
def judged():
    """Twenty prompts of one category that gained 1, twenty of another that gained nothing, and one alone."""
    rng = np.random.default_rng(3)
    before = rng.normal(size=(41, 16))
    gained = np.repeat([1.0, 0.0, 5.0], [20, 20, 1])[:, np.newaxis]
    reference, policy = joined(before, before), joined(before + gained, before - gained)
    names = np.repeat(["a", "b", "c"], [20, 20, 1])
    categories = {f"p{place:03d}": str(name) for place, name in enumerate(names)}
    constraints = [
        Constraint("margin", ">=", margin=0.5, statistic=Statistic("g")),
        Constraint("share", "<=", threshold=0.6, statistic=Statistic("g", "share", at_least=0.0)),
        Constraint("level", "=", margin=0.0, statistic=Statistic("g"), tolerance=0.1),
    ]
    table = statistics_by_category(
        {"reference": (reference, None), "realised": (policy, None)}, categories, reward="r", constraints=constraints
    )
    found = judge_categories(
        table,
        reference=reference,
        policy=policy,
        categories=categories,
        constraints=constraints,
        tolerances=[None, None, 0.1],
    )
    return found, before


def test_each_category_has_its_own_verdicts(judged):
    found, _ = judged
    assert [entry["category"] for entry in found] == ["a", "b", "c"]
    verdicts = [[score["status"] for score in entry["scores"][1:]] for entry in found]
    assert verdicts[0] == ["satisfied", "violated", "violated"]
    assert verdicts[1] == ["violated", "satisfied", "satisfied"]
    assert verdicts[2] == [None, None, None]  # one prompt says nothing of others


def test_what_was_gained_is_paired_with_the_reference_in_the_category(judged):
    found, before = judged
    reward, margin, share, _ = found[0]["scores"]
    assert reward["improvement"] == pytest.approx(-1)
    assert reward["improvement_ci95"] == pytest.approx([-1, -1])
    assert margin["improvement"] == pytest.approx(1)
    assert margin["ci95"] == pytest.approx([margin["reference"] + 1] * 2)
    after_p = (before[:20] + 1 >= 0).mean(axis=1)
    assert share["realised"] == pytest.approx(after_p.mean())
    assert share["ci95"][0] < after_p.mean() < share["ci95"][1]
    gained_p = after_p - (before[:20] >= 0).mean(axis=1)
    assert share["improvement_ci95"] == pytest.approx(mean_interval(gained_p))


def test_a_constraint_on_some_prompts_is_not_judged_where_there_are_none(judged):
    rng = np.random.default_rng(1)
    rows = joined(rng.normal(size=(8, 4)), rng.normal(size=(8, 4)))
    categories = {f"p{place:03d}": "ab"[place % 2] for place in range(8)}
    with_column = JoinedScores(**{**vars(rows), "prompt_columns": {"category": np.array(list("ab" * 4))}})
    constraint = Constraint("only_a", ">=", threshold=-9.0, statistic=Statistic("g").within("category", "a"))
    policies = {"reference": (with_column, None), "realised": (with_column, None)}
    table = statistics_by_category(policies, categories, reward="r", constraints=[constraint])
    found = judge_categories(
        table,
        reference=with_column,
        policy=with_column,
        categories=categories,
        constraints=[constraint],
        tolerances=[None],
    )
    assert [entry["scores"][1]["status"] for entry in found] == ["satisfied", None]
