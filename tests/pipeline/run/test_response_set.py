from pathlib import Path

from pipeline.config.loading import load_config
from pipeline.run.response_set import known_response_sets
from pipeline.run.run import Run

PAIRS = "{source: p.jsonl, response_columns: [a, b]}"


def run_of(tmp_path: Path, **overrides: str) -> Run:
    return Run(load_config(Path("embedded"), overrides), "r", tmp_path)


def test_a_run_has_one_set_or_two_and_trains_on_the_last(tmp_path: Path) -> None:
    alone, with_pairs = run_of(tmp_path), run_of(tmp_path, **{"training.pairs": PAIRS})
    assert alone.response_sets() == (alone.sampled,)
    assert alone.trained_on == alone.sampled
    sampled, pairs = with_pairs.response_sets()
    assert sampled == alone.sampled
    assert with_pairs.trained_on == pairs
    assert (sampled.paired, pairs.paired) == (False, True)
    assert (sampled.splits, pairs.splits) == (("train", "test"), ("train",))
    assert pairs.setting == "training.pairs"


def test_the_folders_are_those_of_the_artifacts(tmp_path: Path) -> None:
    run = run_of(tmp_path, **{"training.pairs": PAIRS})
    sampled, pairs, evaluated = known_response_sets(run.folder)
    assert (run.samples, run.scores, run.tilted) == (sampled.samples, sampled.scores, sampled.tilted)
    found = {
        str(folder.relative_to(run.folder))
        for one in (sampled, pairs, evaluated)
        for folder in (one.prompts, one.samples, one.scores, one.tilted)
    }
    own = {"prompts", "samples", "scores", "tilted"}
    assert found == {*own, *(f"pairs/{name}" for name in own)} | {
        f"evaluation/{name}" for name in ("samples", "scores", "tilted")
    }
    assert evaluated == run.evaluated
    assert {folder.name for folder in (run.dual, run.policy, run.evaluation)} == {"dual", "policy", "evaluation"}


def test_score_tables_that_are_there_are_named_after_what_they_are_made_from(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    for name in ("scores/b", "scores/a", "pairs/scores/a"):
        (run.folder / name).mkdir(parents=True)
    (run.scores / "note.txt").touch()
    sampled, pairs, evaluated = known_response_sets(run.folder)
    assert sampled.scored_tables() == ("prompts", "samples", "scores/a", "scores/b")
    assert pairs.scored_tables() == ("pairs/prompts", "pairs/samples", "pairs/scores/a")
    assert evaluated.scored_tables() == ("evaluation/prompts", "evaluation/samples")
