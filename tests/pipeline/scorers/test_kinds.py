"""The table of kinds: each of them works from the recipe to the scores, and a further one is a file and a row."""

from __future__ import annotations

import inspect
import json
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pytest
import yaml
from helpers.scorers import ROWS, every_kind, scorer_config, scorer_groups, settings_faults, values_of
from helpers.tiny_runs import dualign, rows_of, run_folder, write_recipe

from pipeline.config.loading import load_config
from pipeline.config.recipe import RunConfig
from pipeline.contracts.artifacts import content_sha256, read_manifest
from pipeline.contracts.tables import TOKEN_IDS
from pipeline.run.run import Run
from pipeline.scorers.kind import ScorerSettings
from pipeline.scorers.kinds import DEFAULT_KIND, KINDS, kind_of
from pipeline.scorers.models import Models
from pipeline.scoring.groups import check_scorers, group_scorers
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.python_function import row_sha256

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[3] / "docs" / "scorers.md").read_text()


class LengthSettings(ScorerSettings):
    """How long a response is."""

    uses_device: ClassVar = False

    kind: Literal["length"]
    unit: Literal["words", "tokens"] = "words"

    def reads(self) -> tuple[str, ...]:
        """The token ids, where they are counted."""
        return TOKEN_IDS if self.unit == "tokens" else ()

    def identity(self, models: Models) -> str:
        """Of nothing: it reads no file."""
        del models
        return content_sha256("length")

    @classmethod
    def start(cls, scorers: Sequence[Self], models: Models) -> Callable[..., LengthScorer]:
        """One unit a pass."""
        del models
        (one,) = scorers
        return partial(LengthScorer, one.unit, affine=one.affine)


class LengthScorer:
    """Counts the words or the tokens of responses."""

    def __init__(self, unit: Literal["words", "tokens"], *, affine: Affine) -> None:
        self._unit, self._affine = unit, affine

    def score(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """One result a row, in the order of the rows."""
        return [Score((self._affine.apply(self._count(row)),), row_sha256(row), truncated=False) for row in rows]

    def describe(self) -> dict[str, object]:
        """The resolved settings."""
        return {"scorer": "length", "model": "none", "outputs": [{"unit": self._unit, "affine": asdict(self._affine)}]}

    def close(self) -> None:
        """Nothing is held."""

    def _count(self, row: ScoreRequest) -> int:
        return len(row.completion.split() if self._unit == "words" else row.completion_token_ids)


@pytest.fixture
def length_is_a_kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The row of the table; the recipe is built from it again, as by an import."""
    monkeypatch.setitem(KINDS, LengthSettings.kind_name(), LengthSettings)
    RunConfig.model_rebuild(force=True)
    yield
    monkeypatch.undo()
    RunConfig.model_rebuild(force=True)


@pytest.mark.usefixtures("length_is_a_kind")
def test_a_kind_of_ones_own_is_a_file_and_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    brief = {"kind": "length", "unit": "tokens", "sign": -1}
    recipe = write_recipe(
        tmp_path,
        scorers={"brief": brief, "words": {"kind": "length"}},
        constraints={"brief": {"direction": ">=", "margin": 0.0}},
    )
    config = load_config(recipe)
    assert isinstance(config.scorers["brief"], LengthSettings)
    assert config.scorers["brief"].model_dump(exclude_unset=True) == brief
    check_scorers(config, [])
    groups = group_scorers(Run(config=config, name="r", data_dir=tmp_path), ["brief", "words"])
    assert [(group.names, group.reads, group.uses_device) for group in groups] == [
        (("brief",), TOKEN_IDS, False),
        (("words",), (), False),
    ]
    assert groups[0].settings == ({"sign": -1, "offset": 0.0, "kind": "length", "unit": "tokens"},)
    assert values_of(groups[0].start()) == [(-3.0,)] * 3
    assert values_of(groups[1].start()) == [(0.0,), (1.0,), (2.0,)]

    assert dualign("stage1", recipe, "--dry-run") == 0
    assert "brief (length)" in capsys.readouterr().out
    for command in ("prepare", "sample", "score"):
        assert dualign(command, recipe) == 0
    samples, folder = rows_of(run_folder(recipe) / "samples"), run_folder(recipe) / "scores"
    scores = {name: rows_of(folder / name) for name in ("brief", "words")}
    assert [row["value"] for row in scores["brief"]] == [-len(row["completion_token_ids"]) for row in samples]
    assert [row["value"] for row in scores["words"]] == [len(row["completion"].split()) for row in samples]
    assert len(samples) == 144
    assert dict(read_manifest(folder / "brief").settings) == groups[0].settings[0]


@pytest.mark.usefixtures("length_is_a_kind")
def test_faults_of_a_kind_of_ones_own_read_as_those_of_any(score_models: dict[str, str]) -> None:
    assert settings_faults(score_models, {"kind": "length", "unti": "words"}) == (
        "unknown setting `scorers.x.unti`; did you mean `unit`?",
    )
    (fault,) = settings_faults(score_models, {"kind": "lenght"})
    assert fault == "`scorers.x.kind` is 'lenght'; there is no such kind; did you mean `length`?"
    (fault,) = settings_faults(score_models, {"kind": "length", "unit": "lines"})
    assert fault.startswith("`scorers.x.unit` is 'lines': ")


def test_the_documented_kind_is_the_one_of_this_file() -> None:
    for part in (LengthSettings, LengthScorer):
        assert inspect.getsource(part) in PAGE


def test_a_kind_that_is_not_in_the_table_is_none(score_models: dict[str, str]) -> None:
    (fault,) = settings_faults(score_models, {"kind": "length"})
    assert fault.startswith("`scorers.x.kind` is 'length'; there is no such kind; known: column, judge, log_ratio, ")


def test_the_kind_of_a_scorer_that_names_none() -> None:
    assert DEFAULT_KIND == "sequence_classification"
    assert kind_of({"model": "m"}) is KINDS[DEFAULT_KIND]
    assert kind_of({"kind": "column"}) is KINDS["column"]
    assert kind_of({"kind": "colum"}) is None


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ({"kind": "sequence_clasification", "model": "m"}, "no such kind; did you mean `sequence_classification`?"),
        ({"kind": ["column"]}, "`scorers.x.kind` is \"['column']\"; there is no such kind"),
        ({"kind": None}, "`scorers.x.kind` is 'None'; there is no such kind"),
        (3, "`scorers.x` is 3; a scorer is a mapping of settings"),
        (None, "`scorers.x` is None; a scorer is a mapping of settings"),
    ],
)
def test_what_is_of_no_kind_is_named(score_models: dict[str, str], scorer: Any, message: str) -> None:
    (fault,) = settings_faults(score_models, scorer)
    assert message in fault


def test_every_kind_starts_after_a_pickle_and_scores(score_models: dict[str, str], tmp_path: Path) -> None:
    scorers = every_kind(score_models, tmp_path)
    config = scorer_config(score_models, scorers)
    assert {settings.kind_name() for settings in config.scorers.values()} == set(KINDS)
    check_scorers(config, [])
    groups = scorer_groups(score_models, scorers, tmp_path)
    assert [group.names for group in groups] == [(name,) for name in scorers]
    assert len({group.identity for group in groups}) == len(groups)
    for group in groups:
        start = pickle.loads(pickle.dumps(group.start))
        scorer = start(device="cpu") if group.uses_device else start()
        rows = [ScoreRequest(**{**vars(row), "columns": {"sampler_logp": -2.0}}) for row in ROWS]
        assert all(len(values) == 1 for values in values_of(scorer, rows)), group.names
        json.dumps([scorer.describe(), group.settings])
        assert {"model", "outputs"} <= scorer.describe().keys()
        scorer.close()


def test_a_recipe_reads_back_as_it_was_written(score_models: dict[str, str], tmp_path: Path) -> None:
    config = scorer_config(score_models, every_kind(score_models, tmp_path))
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert RunConfig.model_validate({name: getattr(config, name) for name in RunConfig.model_fields}) == config


def test_the_documented_recipes_are_valid(score_models: dict[str, str]) -> None:
    scorers = {
        name: settings
        for snippet in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
        for name, settings in yaml.safe_load(snippet)["scorers"].items()
    }
    config = scorer_config(score_models, scorers)
    assert {settings.kind_name() for settings in config.scorers.values()} == set(KINDS)
    for kind, settings in KINDS.items():
        assert f"## `{kind}`" in PAGE
        for name in settings.model_fields:
            assert name == "kind" or f"`{name}" in PAGE, name


def test_a_base_is_no_kind() -> None:
    """One without identity or start is a fault of the programmer's, found when the recipe is read."""

    class Unfinished(ScorerSettings):
        kind: Literal["unfinished"]

    with pytest.raises(TypeError, match="abstract"):
        Unfinished(kind="unfinished")
