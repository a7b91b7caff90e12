"""A module's test is where its name says, and no two files have one name for different things."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]

COVERED_ELSEWHERE = {
    "pipeline/__main__.py": "tests/pipeline/test_cli.py starts it as a program",
    "pipeline/contracts/arrays.py": "two names of types",
    # What a command takes and starts shows where it is typed.
    "pipeline/commands/all_commands.py": "tests/pipeline/test_cli.py",
    "pipeline/commands/around_runs.py": "tests/pipeline/test_cli.py",
    "pipeline/commands/on_pilots.py": "tests/pipeline/planning/test_sample_plan.py",
    "pipeline/commands/on_runs.py": "tests/pipeline/test_cli.py",
    "pipeline/commands/run_options.py": "tests/pipeline/test_cli.py",
    "pipeline/commands/subcommand.py": "tests/pipeline/commands/test_parsers.py",
    "pipeline/logs.py": "tests/pipeline/test_cli.py",
    "pipeline/baselines/palette.py": "colours",
    # What solve_problem and its file say are one question.
    "pipeline/dual/document.py": "tests/pipeline/dual/test_solving.py",
    # What a file of tables is shows in what is read of it.
    "pipeline/contracts/table_files.py": "tests/pipeline/contracts/test_table_rows.py",
    "pipeline/dual/table_shards.py": "tests/pipeline/dual/test_from_table.py",
    # The record of a verdict, and who finds it.
    "pipeline/contracts/training_verdict.py": "tests/stage2_policy/test_verdict.py",
    # What is estimated is what is judged, and shown by category.
    "pipeline/scoring/statistic_estimates.py": "tests/pipeline/evaluation/test_judging.py",
    # Its policies are trained with those of the other experiments.
    "pipeline/baselines/constraint_kinds.py": "tests/pipeline/baselines/test_experiments.py",
    # The parts of a world are compared on one built world.
    "pipeline/microworld/policy.py": "tests/pipeline/microworld/test_world.py",
    "pipeline/microworld/scorers.py": "tests/pipeline/microworld/test_world.py",
    "pipeline/microworld/size.py": "tests/pipeline/microworld/test_world.py",
    "pipeline/microworld/tokenizer.py": "tests/pipeline/microworld/test_world.py",
    # What a format is, and what all of them read, shows in what is written of each.
    "pipeline/formats/all_formats.py": "tests/pipeline/formats/test_writing.py",
    "pipeline/formats/export_format.py": "tests/pipeline/formats/test_writing.py",
    "pipeline/formats/prompt_rows.py": "tests/pipeline/formats/test_writing.py",
    "pipeline/formats/resampling.py": "tests/pipeline/formats/test_openai_jsonl.py",
    # Handed on by a format, and tested as it is handed on.
    "pipeline/formats/dualign_reward.py": "tests/pipeline/formats/test_rl_reward.py",
    # Each fault is made in a hand-off.
    "pipeline/formats/row_checks.py": "tests/pipeline/steps/test_validate_hand_off.py",
    "pipeline/steps/validation.py": "tests/pipeline/steps/test_validate.py",
    # The public face is where users meet these.
    "pipeline/dual/result.py": "tests/dualign/test_solve.py",
    "pipeline/run/loaded.py": "tests/dualign/test_load_run.py",
    # What needs a run is tested on whole runs of real, tiny checkpoints.
    "pipeline/sampling/pair_samples.py": "tests/pipeline/sources/test_pairs.py",
    "pipeline/sampling/policy_samples.py": "tests/pipeline/steps/test_runner.py",
    "pipeline/sampling/preview.py": "tests/pipeline/steps/test_runner.py",
    "pipeline/scoring/log_ratios.py": "tests/pipeline/steps/test_runner.py",
    "pipeline/scoring/sample_scores.py": "tests/pipeline/steps/test_runner.py",
    "pipeline/planning/pilot_rates.py": "tests/pipeline/planning/test_sample_plan.py",
    "pipeline/planning/plan_options.py": "tests/pipeline/planning/test_sample_plan.py",
    # A look is where its record is read.
    "pipeline/run/looks.py": "tests/pipeline/steps/test_look.py",
    "pipeline/steps/evaluate.py": "tests/end_to_end/test_main_job.py",
    "pipeline/steps/prepare.py": "tests/pipeline/steps/test_runner.py",
    "pipeline/steps/report.py": "tests/pipeline/steps/test_inputs.py",
    "pipeline/steps/sample.py": "tests/pipeline/steps/test_runner.py",
    "pipeline/steps/score.py": "tests/pipeline/steps/test_runner.py",
}
"""Modules of pipeline/ without a test file of their name: the file that covers them, or why none must."""

SAME_NAME = {
    # A kind's settings, and the scorer that they start.
    "column.py": ("pipeline/scorers", "stage1_dual/scoring"),
    "judge.py": ("pipeline/scorers", "stage1_dual/scoring"),
    "log_ratio.py": ("pipeline/scorers", "stage1_dual/scoring"),
    "python_function.py": ("pipeline/scorers", "stage1_dual/scoring"),
    "safe_rlhf_score.py": ("pipeline/scorers", "stage1_dual/scoring"),
    "sequence_classification.py": ("pipeline/scorers", "stage1_dual/scoring"),
    # The user's statement, and the arrays that it becomes.
    "problem.py": ("pipeline/contracts", "stage1_dual/dual"),
    # The command, and what it asks.
    "frontier.py": ("pipeline/steps", "stage1_dual/dual"),
    # The dual is a library of its own: its two errors need nothing of the run.
    "errors.py": ("pipeline/contracts", "stage1_dual/dual"),
    # What a sampler and a scorer take and give.
    "protocol.py": ("stage1_dual/sampling", "stage1_dual/scoring"),
    # The same numbers for scoring, and for training, in chunks and with gradients; stages are blind to each other.
    "logprobs.py": ("stage1_dual/scoring", "stage2_policy"),
    # Recipes and score models: each loads what its room is about.
    "loading.py": ("pipeline/config", "stage1_dual/scoring"),
    # The pictures of the report and of the experiments.
    "figures.py": ("pipeline/baselines", "pipeline/report"),
    # Those an experiment trains, and those a run samples from.
    "policies.py": ("pipeline/baselines", "pipeline/sampling"),
}
"""File names that stand in two rooms: where, and above each why one name is right."""


def _modules(*packages: str) -> list[str]:
    files = (path.relative_to(ROOT) for package in packages for path in (ROOT / package).rglob("*.py"))
    return sorted(str(path) for path in files if path.name != "__init__.py")


def _own_test(module: str) -> Path:
    path = Path(module)
    return ROOT / "tests" / path.parent / f"test_{path.name}"


def test_every_module_of_the_run_has_the_test_of_its_name() -> None:
    modules = _modules("pipeline")
    assert len(modules) > 80
    without = {module for module in modules if not _own_test(module).is_file()}
    assert sorted(without - set(COVERED_ELSEWHERE)) == [], "modules without a test file of their name"
    assert sorted(set(COVERED_ELSEWHERE) - without) == [], "exceptions that are none"


def test_what_covers_the_others_is_there() -> None:
    for module, where in COVERED_ELSEWHERE.items():
        if where.startswith("tests/"):
            assert (ROOT / where.split()[0]).is_file(), (module, where)


def test_every_test_file_of_a_module_has_its_module_or_room() -> None:
    for path in sorted((ROOT / "tests").glob("*/**/test_*.py")):
        room = path.parent.relative_to(ROOT / "tests")
        assert (ROOT / room).is_dir() or room.name == "end_to_end", f"{path} tests a room that is not there"


def test_no_two_files_have_one_name_for_different_things() -> None:
    rooms = defaultdict(list)
    for module in _modules("dualign", "pipeline", "stage1_dual", "stage2_policy"):
        rooms[Path(module).name].append(str(Path(module).parent))
    twice = {name: tuple(found) for name, found in rooms.items() if len(found) > 1}
    assert twice == SAME_NAME
