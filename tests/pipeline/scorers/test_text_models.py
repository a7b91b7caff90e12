from __future__ import annotations

from pathlib import Path

import pytest
from helpers.scorers import check_faults, identity_of, scorer_groups

TEMPLATE = "{{ messages[0]['content'] }}"


def test_a_pass_takes_the_smallest_batch_of_its_scorers(score_models: dict[str, str], tmp_path: Path) -> None:
    scorers = {
        name: {"model": score_models["heads"], "batch_tokens": tokens} for name, tokens in (("a", 100), ("b", 50))
    }
    (group,) = scorer_groups(score_models, scorers, tmp_path)
    assert group.names == ("a", "b")
    assert group.start.keywords["token_budget"] == 50


def test_another_template_in_the_file_makes_other_scores(
    score_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    settings = {"model": score_models["heads"], "template": path.name}
    before = identity_of(score_models, settings, tmp_path)
    assert before == identity_of(score_models, settings, tmp_path)
    path.write_text(TEMPLATE.replace("0", "1"))
    assert before != identity_of(score_models, settings, tmp_path)
    (group,) = scorer_groups(score_models, {"x": settings}, tmp_path)
    assert group.start.keywords["template"] == str(path)


def test_of_a_model_that_is_yet_to_be_built_the_template_is_checked(score_models: dict[str, str]) -> None:
    settings = {"model": "embedded:helpful"}
    assert check_faults(score_models, settings, embedded=["helpful"]) == ()
    (fault,) = check_faults(score_models, {**settings, "template": "{prompt} only"}, embedded=["helpful"])
    assert fault.startswith("`scorers.x`: `template` is '{prompt} only'")
