"""The command line: one subcommand a step, `stage1`, `stage2` and `run` for several.

Every setting of a recipe is an option: ``--sampling.samples_per_prompt 64``, ``--beta 0.5``. The command line wins.
Exit codes are listed in :mod:`pipeline.contracts.errors`.

A command is one row of the table at the end: what it is for, its options, and what it does. Its modules are imported
when it is used, never for another command: `dualign --help` and `dualign solve --table` start at once.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.contracts.errors import (
    ConfigError,
    ConstraintsNotSatisfiedError,
    DualignError,
    InputError,
    loading_failure,
    printable,
    require_extra,
    writing_failure,
)
from pipeline.contracts.privacy import keep_private
from pipeline.steps.order import STAGES, SUMMARIES

if TYPE_CHECKING:
    from pipeline.contracts.problem import Constraint, Safeguard
    from pipeline.dual.from_table import SafeguardName, TableRequest
    from pipeline.run.run import Run
    from stage1_dual.ray_execution import RayExecutor

_DESCRIPTION = """Raise one score of a language model while keeping others above a line:
sample, score, solve a small convex dual, fine-tune once."""

_SAFEGUARDS: dict[SafeguardName, str] = {
    "reserve": "score units asked of the dual beyond the demand",
    "assurance": "probability that the final evaluation calls the constraint satisfied",
    "score_error": "root mean square error of the scorer's differences, which the margin must outgrow",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``dualign``; returns the exit code."""
    _mend_streams()
    keep_private()
    _show_log()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    kept = "" if _names_a_table(arguments) else "; finished work is kept, run the same command to continue"
    try:
        with _told_to_stop():
            options, rest = _parser(arguments).parse_known_args(arguments)
            code = int(options.perform(options, rest) or 0)
            sys.stdout.flush()  # here a disk that is full is still ours to report
            return code
    except DualignError as error:
        return _fail(error)
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is left in the buffer would fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if (failure := writing_failure(error) or loading_failure(error)) is None:
            raise
        return _fail(failure)
    except Exception as error:
        if (failure := loading_failure(error)) is None:
            raise
        return _fail(failure)
    except KeyboardInterrupt:
        print(f"dualign: interrupted{kept}", file=sys.stderr)
        return 130
    except _ToldToStop:
        print(f"dualign: terminated{kept}", file=sys.stderr)
        return 143


def _mend_streams() -> None:
    """Make standard streams that can be written to, whatever this process was given.

    The number of a closed one would go to the next file that is opened, and what a library prints into that file; one
    of another encoding than UTF-8 would fail at the first letter that it has not.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error is from the start


class _ToldToStop(BaseException):
    """SIGTERM, as an exception: it passes through the clean-up of what was written on the way."""


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Turn SIGTERM into an exception; only the main thread may, and only there commands run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _ToldToStop

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(error: DualignError) -> int:
    print(f"dualign: {printable(str(error))}", file=sys.stderr)
    return error.exit_code


def _show_log() -> None:
    """Messages of the run to standard error; standard output is for tables."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logger = logging.getLogger("dualign")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # What these libraries warn of is theirs to change; what matters of it is checked where a model is loaded.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a home where it cannot keep its list of fonts
    if not sys.stderr.isatty():
        # Our bars write lines there (pipeline.progress); others, once a minute. Read when tqdm is imported.
        os.environ.setdefault("TQDM_MININTERVAL", "60")
        os.environ.setdefault("TQDM_MAXINTERVAL", "60")


class _PrintableFormatter(logging.Formatter):
    """Messages name what strangers wrote: prompts, files, models."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@dataclass(frozen=True)
class _Command:
    """One subcommand.

    Attributes:
        summary: a line for ``dualign --help``.
        add_options: adds its options to its parser; may import what the command needs anyway.
        perform: does it, given the options and what is left of the command line; returns an exit code, or None for 0.
    """

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    perform: Callable[[argparse.Namespace, Sequence[str]], int | None]


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"dualign {version('dualign')}")
        parser.exit()


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """A parser that lists every command and knows the options of the one that is asked for.

    Raises:
        InputError: more constraints than a problem can have; to read so many would take minutes.
    """
    n_constraints = sum(text.partition("=")[0] == "--constraint" for text in arguments)
    if n_constraints:
        from pipeline.contracts.problem import require_few_constraints

        require_few_constraints(n_constraints)
    parser = argparse.ArgumentParser(prog="dualign", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version and leave")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((text for text in arguments if not text.startswith("-")), None)
    commands = _COMMANDS | ({"solve": _SOLVE_TABLE} if _names_a_table(arguments) else {})
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.summary, allow_abbrev=False)
        if name == asked:
            command.add_options(subparser)
            subparser.set_defaults(command=name, perform=command.perform)
    return parser


def _names_a_table(arguments: Sequence[str]) -> bool:
    return any(text.partition("=")[0] == "--table" for text in arguments)


def _add_data_options(parser: argparse.ArgumentParser, *, holds: str = "runs/ and models/") -> None:
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help=f"holds {holds}")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("embedded"), metavar="FILE", help="recipe, or its name")
    parser.add_argument("--run", metavar="NAME", help="name of the run (default: the recipe's)")
    _add_data_options(parser)
    parser.add_argument(
        "--limit",
        metavar="N",
        help="try it small: at most N prompts of each split (--prompts.limit), and of pairs (--training.pairs.limit)",
    )
    parser.epilog = (
        "Settings of the recipe are options too, e.g. --sampling.samples_per_prompt 64; --kl NATS in place of --beta "
        "is the largest KL to spend"
    )


def _add_step_options(parser: argparse.ArgumentParser) -> None:
    _add_run_options(parser)
    parser.add_argument("--redo", action="store_true", help="remove this step and all after it, then do it anew")


def _shows_progress(options: argparse.Namespace) -> bool:
    return not (options.no_progress or os.environ.get("TQDM_DISABLE"))


def _read_run(options: argparse.Namespace, rest: Sequence[str], *, offline: bool = False) -> Run:
    """The run that the options name; ``offline`` where nothing is wanted from the Hub, whatever it names."""
    from pipeline.config.loading import load_config
    from pipeline.run.run import Run, require_plain_name
    from pipeline.scorers.models import is_hub_id

    if options.limit is not None:
        rest = [*rest, "--prompts.limit", options.limit]
    config = load_config(options.config, _overrides(rest), pairs_limit=options.limit)
    if offline or not any(is_hub_id(model.model) for model in config.checkpoints().values()):
        _stay_offline()
    return Run(
        config=config,
        name=require_plain_name(options.run or options.config.stem, option="--run"),
        data_dir=options.data_dir,
        show_progress=_shows_progress(options),
    )


def _stay_offline() -> None:
    """No look-up may leave the machine, nor a bar announce one."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    """Pairs of dotted key and text from ``--a.b value`` and ``--a.b=value``; ``--kl`` is short for ``--beta.kl``."""
    overrides: dict[str, str] = {}
    waiting = list(rest)
    while waiting:
        token = waiting.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise ConfigError(
                [f"unexpected argument {token!r}; settings are --section.key VALUE"], source="the command line"
            )
        if not equals:
            if not waiting:
                raise ConfigError([f"`{token}` has no value"], source="the command line")
            text = waiting.pop(0)
        if key == "kl":
            key, text = "beta", f"{{kl: {text}}}"
        if key in overrides:
            both = " (`--kl` sets it too)" if key == "beta" else ""
            raise ConfigError([f"`--{key}` is given twice{both}"], source="the command line")
        overrides[key] = text
    return overrides


def _require_no_more(rest: Sequence[str], *, command: str) -> None:
    if rest:
        raise ConfigError(
            [f"`dualign {command}` takes no more arguments, {rest[0]!r} given"], source="the command line"
        )


# Steps and stages.


def _step(options: argparse.Namespace, rest: Sequence[str]) -> None:
    _perform(_read_run(options, rest), (options.command,), redo_from=options.command if options.redo else None)


def _add_improvement_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--require-improvement",
        action="store_true",
        help="exit with 6 unless training certainly paid (without: only if no checkpoint beat the reference)",
    )


def _perform(run: Run, steps: Sequence[str], *, redo_from: str | None) -> None:
    from pipeline.run.launch import require_one_process
    from pipeline.steps.runner import run_steps

    require_one_process(steps)
    run_steps(run, steps, redo_from=redo_from)


def _add_sample_options(parser: argparse.ArgumentParser) -> None:
    _add_step_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="show two prompts as the reference reads them, write nothing"
    )


def _sample(options: argparse.Namespace, rest: Sequence[str]) -> None:
    if options.dry_run:
        from pipeline.steps.sample import preview_samples

        print(printable(preview_samples(_read_run(options, rest))))  # not offline: the tokenizer may be on the Hub
    else:
        _step(options, rest)


def _add_solve_options(parser: argparse.ArgumentParser) -> None:
    _add_step_options(parser)
    parser.epilog = (
        "On any table of scores, without a run: dualign solve --table FILE ... "
        "(options: dualign solve --table FILE --help)"
    )


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    from pipeline.formats.all_formats import FORMATS
    from pipeline.formats.export_format import ExportSettings

    _add_step_options(parser)
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

    run = _read_run(options, rest)
    _perform(run, ("export",), redo_from="export" if options.redo else None)
    if options.format:
        counts = {name: getattr(options, name) for name in ("pairs_per_prompt", "lines_per_prompt")}
        command = ["dualign export", f"--config {shlex.quote(str(options.config))}", f"--run {shlex.quote(run.name)}"]
        command += [] if options.limit is None else [f"--limit {options.limit}"]
        command += [shlex.quote(one) for one in rest]
        write_exports(run, options.format, ExportSettings(seed=run.config.seed, **counts), command=command)


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    _add_step_options(parser)
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

    run = _read_run(options, rest)
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
    arguments += ["--redo"] if options.redo else []
    arguments += ["--limit", options.limit] if options.limit is not None else []
    return launch_training(
        [*arguments, *rest], accelerate_config=options.accelerate_config, n_processes=options.processes
    )


def _add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    _add_step_options(parser)
    parser.add_argument(
        "--require-satisfied", action="store_true", help="exit with 5 unless every constraint is satisfied"
    )


def _evaluate(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.steps.evaluate import read_status

    run = _read_run(options, rest)
    _perform(run, ("evaluate",), redo_from="evaluate" if options.redo else None)
    if options.require_satisfied and (status := read_status(run)) != "satisfied":
        raise ConstraintsNotSatisfiedError(f"the evaluation of run `{run.name}` is {status}, and must be satisfied")


def _add_stage_options(steps: Sequence[str]) -> Callable[[argparse.ArgumentParser], None]:
    def add_options(parser: argparse.ArgumentParser) -> None:
        _add_run_options(parser)
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
    run = _read_run(options, rest, offline=options.dry_run)
    steps = STAGES[options.command]
    if options.dry_run:
        from pipeline.planning.dry_run import show_plan

        print(printable(show_plan(run, steps)))
    else:
        _perform(run, steps, redo_from=options.redo_from)
        if "train" in steps:
            from pipeline.steps.train import require_improvement

            require_improvement(run, certainly=options.require_improvement)


# Around the steps.


def _add_multishot_options(parser: argparse.ArgumentParser) -> None:
    _add_run_options(parser)
    parser.add_argument("--redo", action="store_true", help="remove the iterates, then do them anew")


def _multishot(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.contracts.artifacts import read_json
    from pipeline.contracts.training_verdict import read_training_verdict
    from pipeline.multishot.loop import run_multishot
    from pipeline.report.terminal import print_stage2
    from pipeline.run.launch import require_one_process

    require_one_process(("multishot",))
    kept = run_multishot(_read_run(options, rest), redo=options.redo)
    print_stage2(
        read_json(kept.folder / "evaluation" / "evaluation.json"),
        read_json(kept.folder / "dual" / "dual.json"),
        read_training_verdict(kept.folder / "policy"),
    )


def _add_baselines_options(parser: argparse.ArgumentParser) -> None:
    from pipeline.baselines.experiments import EXPERIMENTS

    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"some of {', '.join(EXPERIMENTS)}")
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="seeds of constraint_satisfaction and sample_sizes (default: 3; quick: 1)",
    )
    parser.add_argument("--quick", action="store_true", help="rough numbers in a few minutes")
    _add_data_options(parser)


def _baselines(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.baselines.command import build_study, run_experiments
    from pipeline.run.launch import require_one_process

    _require_no_more(rest, command="baselines")
    require_one_process(("baselines",))
    _stay_offline()
    study = build_study(
        data_dir=options.data_dir,
        n_seeds=options.seeds if options.seeds is not None else (1 if options.quick else 3),
        quick=options.quick,
        show_progress=_shows_progress(options),
    )
    run_experiments(study, options.only)


def _add_validate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="a run by name or folder, or the folder of a hand-off (default: embedded)",
    )
    parser.add_argument("--run", dest="run_name", metavar="NAME", help="the same, as an option")
    _add_data_options(parser, holds="runs/")


def _validate(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.steps.validate import validate

    _require_no_more(rest, command="validate RUN")
    name = options.run or options.run_name or "embedded"
    folder = options.data_dir / "runs" / name
    if not os.path.isdir(folder) and os.path.isdir(name):  # noqa: PTH112  # of a name too long for a file, False
        folder = Path(name)
    found = validate(folder, show_progress=_shows_progress(options))
    for link in found.chain:
        counts = ", ".join(f"{count} {what}" for what, count in link.counts.items())
        origin = f"from {', '.join(link.made_from)}" if link.made_from else ""
        if link.run not in (None, folder.name):
            origin += f" (made as run {link.run})"
        row = f"{link.name:24} {(link.identity or 'not finished')[:12]:14} {counts or '-':44} {origin}".rstrip()
        print(printable(row))
    for fault in found.faults:
        print(printable(f"fault: {fault}"))
    if not found.faults:
        print(f"{len(found.chain)} artifact{'s' if len(found.chain) != 1 else ''}, no faults")
    if found.faults:
        raise InputError(f"{folder} has {len(found.faults)} fault{'s' if len(found.faults) > 1 else ''}")


def _env(options: argparse.Namespace, rest: Sequence[str]) -> None:  # noqa: ARG001  # the signature of a command
    from pipeline.steps.env import describe_environment

    _require_no_more(rest, command="env")
    print(describe_environment())


# The dual of a table of scores.


def _add_table_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table",
        type=Path,
        required=True,
        metavar="PATH",
        help="file of scores (Parquet, CSV or JSON Lines), or a folder of such files",
    )
    parser.add_argument("--prompt-id", default="prompt_id", metavar="COLUMN", help="which prompt a row answers")
    parser.add_argument("--reward", required=True, metavar="COLUMN", help="the score to maximise")
    parser.add_argument(
        "--constraint",
        action="append",
        required=True,
        metavar="TEXT",
        help="such as 'NAME >= NUMBER', 'NAME >= ref + NUMBER', 'share(NAME >= NUMBER) >= 0.97', 'each(COLUMN): ...' "
        "(docs/constraints.md); for a frontier START:STOP:STEP in some",
    )
    strength = parser.add_mutually_exclusive_group(required=True)
    strength.add_argument("--beta", type=float, help="KL strength, reward per nat")
    strength.add_argument("--kl", type=float, metavar="NATS", help="instead: the largest KL to spend, nats a prompt")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--ray", metavar="ADDRESS", help="run the passes on a Ray cluster; `local` starts one here")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def _add_solve_table_options(parser: argparse.ArgumentParser) -> None:
    _add_table_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    for name, meaning in _SAFEGUARDS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, action="append", default=[], metavar="NAME=NUMBER", help=meaning)
    parser.add_argument("--evaluation-prompts", type=int, default=0, metavar="N", help="for --assurance")
    parser.add_argument("--evaluation-responses", type=int, default=0, metavar="K", help="for --assurance")
    parser.add_argument(
        "--correct-response-bias", action="store_true", help="lambda* corrected for finitely many responses"
    )


def _solve_table(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.contracts.constraint_text import read_constraints
    from pipeline.dual.from_table import solve_table
    from pipeline.dual.solving import EvaluationSize
    from pipeline.report.terminal import print_stage1

    _require_no_more(rest, command="solve --table")
    request = replace(
        _table_request(options, read_constraints(options.constraint)),
        seed=options.seed,
        safeguards=_safeguards(options),
        evaluation=EvaluationSize(options.evaluation_prompts, options.evaluation_responses),
        corrects_response_bias=options.correct_response_bias,
    )
    with _scratch(options.output, request) as scratch:
        solution = solve_table(request, scratch=scratch)
        # Before the figures, which take longer than the answer.
        print_stage1(solution.content)
        solution.save(options.output)


def _frontier(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.dual.sweep import write_frontier
    from pipeline.steps.frontier import read_grid, solve_grid

    _require_no_more(rest, command="frontier")
    grid = read_grid(options.constraint)
    request = _table_request(options, grid.first)
    with _scratch(options.output, request) as scratch:
        rows = solve_grid(request, grid, scratch=scratch)
    path = options.output / "frontier.parquet"
    write_frontier(path, rows, metadata={})
    print(f"{rows.num_rows} thresholds, {sum(rows['feasible'].to_pylist())} of them feasible: {path}")


def _table_request(options: argparse.Namespace, constraints: Sequence[Constraint]) -> TableRequest:
    from pipeline.dual.from_table import TableRequest, labels_of, scores_of
    from pipeline.dual.table_sources import ScoreFiles

    columns = (options.prompt_id, options.reward, *scores_of(constraints))
    return TableRequest(
        source=ScoreFiles(options.table, columns, labels_of(constraints)),
        prompt_id=options.prompt_id,
        reward=options.reward,
        constraints=tuple(constraints),
        beta=options.beta,
        kl=options.kl,
        executor=_ray_executor(options.ray) if options.ray else None,
        show_progress=_shows_progress(options),
    )


@contextmanager
def _scratch(output: Path, request: TableRequest) -> Iterator[Path]:
    """A folder in the output folder for scores that do not fit in memory, gone whatever happens."""
    from pipeline.dual.from_table import hold_output

    request.open_table()  # what is wrong with it is said before a folder is made
    with (
        hold_output(output, request.source),
        tempfile.TemporaryDirectory(prefix=".scores-", dir=output.resolve()) as folder,
    ):
        yield Path(folder)


def _safeguards(options: argparse.Namespace) -> dict[str, Safeguard]:
    from pipeline.contracts.problem import Safeguard
    from pipeline.dual.from_table import require_safeguard

    found: dict[str, Safeguard] = {}
    for field in _SAFEGUARDS:
        for text in getattr(options, field):
            given = f"--{field.replace('_', '-')} {text!r}"
            name, _, number = text.rpartition("=")  # a name may hold the sign itself
            try:
                value = float(number)
            except ValueError:
                raise InputError(f"{given}: it must be NAME=NUMBER") from None
            value = require_safeguard(field, value, given=given)
            changes: dict[str, Any] = {field: value}
            found[name] = replace(found.get(name, Safeguard()), **changes)
    return found


def _ray_executor(address: str) -> RayExecutor:
    require_extra("ray", "ray", purpose="--ray")
    from stage1_dual.ray_execution import RayExecutor

    return RayExecutor.connect(address)


_SOLVE_TABLE = _Command(SUMMARIES["solve"], _add_solve_table_options, _solve_table)
"""``dualign solve --table``: the dual without a run."""

_COMMANDS: dict[str, _Command] = {
    "prepare": _Command(SUMMARIES["prepare"], _add_step_options, _step),
    "sample": _Command(SUMMARIES["sample"], _add_sample_options, _sample),
    "score": _Command(SUMMARIES["score"], _add_step_options, _step),
    "solve": _Command(SUMMARIES["solve"], _add_solve_options, _step),
    "export": _Command(SUMMARIES["export"], _add_export_options, _export),
    "train": _Command(SUMMARIES["train"], _add_train_options, _train),
    "evaluate": _Command(SUMMARIES["evaluate"], _add_evaluate_options, _evaluate),
    "report": _Command(SUMMARIES["report"], _add_step_options, _step),
    **{name: _Command(" → ".join(steps), _add_stage_options(steps), _stage) for name, steps in STAGES.items()},
    "multishot": _Command(
        "the iterative baseline, from the run's one-shot policy on", _add_multishot_options, _multishot
    ),
    "baselines": _Command("the experiments of the papers on the embedded world", _add_baselines_options, _baselines),
    "frontier": _Command("solve for a range of thresholds on any table of scores", _add_table_options, _frontier),
    "validate": _Command("check every file of a run against what it claims to be", _add_validate_options, _validate),
    "env": _Command("versions and devices, for bug reports", lambda _: None, _env),
}
