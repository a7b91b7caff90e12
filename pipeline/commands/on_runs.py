"""The commands that make a run: every step, and those that perform several."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.commands.json_output import apart_from_json, print_json
from pipeline.commands.run_options import SETTINGS_NOTE, add_run_options, add_step_options, read_run
from pipeline.commands.subcommand import Subcommand, add_json_option
from pipeline.contracts.errors import ConstraintsNotSatisfiedError, printable, require_extra
from pipeline.steps.order import STAGES, SUMMARIES

if TYPE_CHECKING:
    from pipeline.run.run import Run


def perform_step(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Perform the step that the command is named after."""
    _perform(read_run(options, rest), (options.command,), redo_from=options.command if options.redo else None)


def _perform(run: Run, steps: Sequence[str], *, redo_from: str | None) -> None:
    from pipeline.run.launch import require_one_process
    from pipeline.steps.runner import run_steps

    require_one_process(steps)
    run_steps(run, steps, redo_from=redo_from)


def _add_sample_options(parser: argparse.ArgumentParser) -> None:
    add_step_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="show two prompts as the reference reads them, write nothing"
    )


def _sample(options: argparse.Namespace, rest: Sequence[str]) -> None:
    if options.dry_run:
        from pipeline.steps.sample import preview_samples

        print(printable(preview_samples(read_run(options, rest))))  # not offline: the tokenizer may be on the Hub
    else:
        perform_step(options, rest)


def _add_solve_options(parser: argparse.ArgumentParser) -> None:
    add_step_options(parser)
    add_json_option(parser, what="dual.json and where it is")


def _solve(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.contracts.artifacts import read_json
    from pipeline.report.terminal import print_stage1

    run = read_run(options, rest)
    with apart_from_json(options.json):
        _perform(run, ("solve",), redo_from="solve" if options.redo else None)
        dual = read_json(run.dual / "dual.json")
        print_stage1(dual)
    if options.json:
        print_json({"run": run.name, "folder": str(run.folder), "dual": dual})


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    from pipeline.formats.all_formats import FORMATS
    from pipeline.formats.export_format import ExportSettings

    add_step_options(parser)
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        choices=list(FORMATS),
        help="also write exports/FORMAT/, for people who train elsewhere; may be given several times",
    )
    for name, meaning in (
        ("pairs-per-prompt", "pairs of the formats that train on preferences"),
        ("lines-per-prompt", "resampled lines of those that train on likelihood without weights"),
    ):
        default = getattr(ExportSettings, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} ({default})")


def _export(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.formats.export_format import ExportSettings
    from pipeline.formats.writing import write_exports

    run = read_run(options, rest)
    _perform(run, ("export",), redo_from="export" if options.redo else None)
    if options.format:
        counts = {name: getattr(options, name) for name in ("pairs_per_prompt", "lines_per_prompt")}
        command = ["dualign export", f"--config {shlex.quote(str(options.config))}", f"--run {shlex.quote(run.name)}"]
        command += [] if options.limit is None else [f"--limit {options.limit}"]
        command += [shlex.quote(one) for one in rest]
        write_exports(run, options.format, ExportSettings(seed=run.config.seed, **counts), command=command)


def _add_improvement_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--require-improvement",
        action="store_true",
        help="exit with 6 unless training certainly paid (without: only if no checkpoint beat the reference)",
    )


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    add_step_options(parser)
    parser.add_argument(
        "--accelerate-config",
        metavar="NAME",
        help="train on several processes: single_gpu, multi_gpu, fsdp2, zero3, or a configuration file of accelerate",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many (default: as the configuration says)")
    _add_improvement_option(parser)
    # An exit code of a process that a launcher started would come out as the launcher's traceback.
    parser.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)


def _train(options: argparse.Namespace, rest: Sequence[str]) -> int | None:
    from pipeline.contracts.artifacts import is_complete
    from pipeline.run.launch import process_number
    from pipeline.steps.train import perform_training, require_improvement

    run = read_run(options, rest)
    if options.accelerate_config:
        code = _launch(options, rest)
        if code == 0:
            require_improvement(run, certainly=options.require_improvement)
        return code
    if process_number() == 0:
        _perform(run, ("train",), redo_from="train" if options.redo else None)
        if not options.launched:
            require_improvement(run, certainly=options.require_improvement)
    elif options.redo or not is_complete(run.folder / "policy"):
        # The first process holds the run, checks and records; the others only train.
        perform_training(run)
    return None


def _launch(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from pipeline.run.launch import launch_training

    require_extra("train", "torch", "transformers", "accelerate", "peft", purpose="training")
    arguments = ["--launched", "--config", str(options.config), "--data-dir", str(options.data_dir)]
    arguments += ["--run", options.run] if options.run else []
    arguments += ["--no-progress"] if options.no_progress else []
    arguments += [f"--{name}" for name in ("quiet", "verbose") if getattr(options, name, False)]
    arguments += ["--redo"] if options.redo else []
    arguments += ["--limit", options.limit] if options.limit is not None else []
    return launch_training(
        [*arguments, *rest], accelerate_config=options.accelerate_config, n_processes=options.processes
    )


def _add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    add_step_options(parser)
    parser.add_argument(
        "--require-satisfied", action="store_true", help="exit with 5 unless every constraint is satisfied"
    )
    add_json_option(parser, what="evaluation.json, where it is, and whether training paid")


def _evaluate(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.contracts.artifacts import read_json
    from pipeline.contracts.training_verdict import read_training_verdict
    from pipeline.steps.evaluate import read_status

    run = read_run(options, rest)
    with apart_from_json(options.json):
        _perform(run, ("evaluate",), redo_from="evaluate" if options.redo else None)
    if options.json:
        training = read_training_verdict(run.policy)
        print_json(
            {
                "run": run.name,
                "folder": str(run.folder),
                "training": None if training is None else training.model_dump(mode="json"),
                "evaluation": read_json(run.evaluation / "evaluation.json"),
            }
        )
    if options.require_satisfied and (status := read_status(run)) != "satisfied":
        raise ConstraintsNotSatisfiedError(f"the evaluation of run `{run.name}` is {status}, and must be satisfied")


def _add_stage_options(steps: Sequence[str]) -> Callable[[argparse.ArgumentParser], None]:
    def add_options(parser: argparse.ArgumentParser) -> None:
        add_run_options(parser)
        parser.add_argument("--redo-from", metavar="STEP", choices=steps, help="redo this step and all after it")
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="check the recipe, show what would be loaded, sampled and trained, and estimates; no network",
        )
        if "train" in steps:
            _add_improvement_option(parser)

    return add_options


def _stage(options: argparse.Namespace, rest: Sequence[str]) -> None:
    run = read_run(options, rest, offline=options.dry_run)
    steps = STAGES[options.command]
    if options.dry_run:
        from pipeline.planning.dry_run import show_plan

        print(printable(show_plan(run, steps)))
    else:
        _perform(run, steps, redo_from=options.redo_from)
        if "train" in steps:
            from pipeline.steps.train import require_improvement

            require_improvement(run, certainly=options.require_improvement)


_OF_TABLES = """on any table of scores, without a run: `dualign solve --table FILE ...`;
  its options: `dualign solve --table FILE --help`."""


def _of_run(
    name: str,
    add_options: Callable[[argparse.ArgumentParser], None] = add_step_options,
    perform: Callable[[argparse.Namespace, Sequence[str]], int | None] = perform_step,
    *,
    examples: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
) -> Subcommand:
    return Subcommand(SUMMARIES[name], add_options, perform, tuple(examples), (*notes, SETTINGS_NOTE))


STEP_COMMANDS: dict[str, Subcommand] = {
    "prepare": _of_run(
        "prepare",
        examples=[
            ("the prompts, and the embedded world", "dualign prepare"),
            ("of a recipe of one's own", "dualign prepare --config my.yaml --run mine"),
        ],
    ),
    "sample": _of_run(
        "sample",
        _add_sample_options,
        _sample,
        examples=[
            ("two prompts as the model reads them", "dualign sample --config my.yaml --dry-run"),
            ("more responses to each; only new ones are drawn", "dualign sample --sampling.samples_per_prompt 256"),
        ],
    ),
    "score": _of_run(
        "score",
        examples=[("every response with every scorer", "dualign score --config my.yaml --run mine")],
    ),
    "solve": _of_run(
        "solve",
        _add_solve_options,
        _solve,
        examples=[
            ("lambda* of a run", "dualign solve --config my.yaml --run mine"),
            ("for a script", "dualign solve --json | jq '.dual.constraints[0].multiplier'"),
            (
                "of a table, without a run",
                (
                    "dualign solve --table scores.parquet --reward helpful \\\n"
                    "      --constraint 'harmless >= ref + 0.8' --beta 1 --output out/"
                ),
            ),
        ],
        notes=[_OF_TABLES],
    ),
    "export": _of_run(
        "export",
        _add_export_options,
        _export,
        examples=[
            ("the hand-off table", "dualign export --config my.yaml --run mine"),
            ("for TRL as well", "dualign export --format trl-preference"),
        ],
    ),
    "train": _of_run(
        "train",
        _add_train_options,
        _train,
        examples=[
            ("in this process", "dualign train --config my.yaml --run mine"),
            ("on several GPUs", "dualign train --config my.yaml --accelerate-config fsdp2"),
        ],
    ),
    "evaluate": _of_run(
        "evaluate",
        _add_evaluate_options,
        _evaluate,
        examples=[
            ("for continuous integration", "dualign evaluate --run mine --require-satisfied"),
            ("for a script", "dualign evaluate --json | jq -r .evaluation.status"),
        ],
    ),
    "report": _of_run(
        "report",
        examples=[("the figures and the page again", "dualign report --config my.yaml --run mine")],
    ),
}

_STAGE_EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "stage1": [
        ("the embedded world", "dualign stage1"),
        ("the dual and what follows anew", "dualign stage1 --config my.yaml --redo-from solve"),
    ],
    "stage2": [("train, evaluate, report", "dualign stage2 --config my.yaml --run mine")],
    "run": [
        ("what it would load and cost", "dualign run --config my.yaml --dry-run"),
        ("try it with twenty prompts", "dualign run --config my.yaml --run small --limit 20"),
    ],
}

STAGE_COMMANDS: dict[str, Subcommand] = {
    name: Subcommand(
        " → ".join(steps), _add_stage_options(steps), _stage, tuple(_STAGE_EXAMPLES[name]), (SETTINGS_NOTE,)
    )
    for name, steps in STAGES.items()
}
