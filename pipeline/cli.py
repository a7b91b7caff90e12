"""The command line: one subcommand a step, `stage1`, `stage2` and `run` for several.

Every setting of a recipe is an option: ``--sampling.samples_per_prompt 64``, ``--beta 0.5``. The command line wins.
Exit codes are listed in :mod:`pipeline.contracts.errors`.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.baselines.command import build_study, run_experiments
from pipeline.baselines.experiments import EXPERIMENTS
from pipeline.config.loading import load_config
from pipeline.contracts.artifacts import environment, is_complete, read_json
from pipeline.contracts.errors import (
    ConfigError,
    ConstraintsNotSatisfiedError,
    DualignError,
    InputError,
    require_extra,
)
from pipeline.contracts.problem import Safeguard
from pipeline.formats import FORMATS, ExportSettings, write_exports
from pipeline.multishot.loop import run_multishot
from pipeline.planning.dry_run import show_plan
from pipeline.report import print_stage2
from pipeline.run.launch import launch_training, process_number, require_one_process
from pipeline.run.run import Run
from pipeline.scorers.models import is_hub_id
from pipeline.steps.evaluate import read_status
from pipeline.steps.runner import STAGES, STEPS, preview_samples, run_steps
from pipeline.steps.train import perform_training
from pipeline.steps.validate import validate_run

if TYPE_CHECKING:
    from stage1_dual.ray_execution import RayExecutor

_DESCRIPTION = """Raise one score of a language model while keeping others above a line:
sample, score, solve a small convex dual, fine-tune once."""


_SAFEGUARDS = {
    "reserve": "score units asked of the dual beyond the demand",
    "assurance": "probability that the final evaluation calls the constraint satisfied",
    "score_error": "root mean square error of the scorer's differences, which the margin must outgrow",
}

_SAFEGUARD_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "reserve": ("finite", lambda _: True),
    "assurance": ("between 0 and 1", lambda value: 0 < value < 1),
    "score_error": ("finite and not negative", lambda value: value >= 0),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``dualign``; returns the exit code."""
    _show_log()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["solve"] and any(token.partition("=")[0] == "--table" for token in arguments):
            return _table_command("solve", arguments[1:])
        options, rest = _parser().parse_known_args(arguments)
        return int(options.command(options, rest) or 0)
    except DualignError as error:
        print(f"dualign: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        kept = "" if "--table" in arguments else "; finished work is kept, run the same command to continue"
        print(f"dualign: interrupted{kept}", file=sys.stderr)
        return 130


def _show_log() -> None:
    """Messages of the run to standard error; standard output is for tables."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("dualign")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # What these libraries warn of is theirs to change; what matters of it is checked where a model is loaded.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dualign", description=_DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, step in STEPS.items():
        command = commands.add_parser(name, help=step.summary, allow_abbrev=False)
        _add_run_options(command)
        command.add_argument("--redo", action="store_true", help="remove this step and all after it, then do it anew")
        if name == "sample":
            command.add_argument(
                "--dry-run", action="store_true", help="show two prompts as the reference reads them, write nothing"
            )
        if name == "solve":
            command.epilog = (
                "On any table of scores, without a run: dualign solve --table FILE ... "
                "(options: dualign solve --table FILE --help)"
            )
        if name == "export":
            _add_export_options(command)
        if name == "train":
            _add_train_options(command)
        if name == "evaluate":
            command.add_argument(
                "--require-satisfied", action="store_true", help="exit with 5 unless every constraint is satisfied"
            )
        command.set_defaults(command=_run_command, steps=(name,))
    for name, steps in STAGES.items():
        command = commands.add_parser(name, help=" → ".join(steps), allow_abbrev=False)
        _add_run_options(command)
        command.add_argument("--redo-from", metavar="STEP", choices=steps, help="redo this step and all after it")
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="check the recipe, show what would be loaded, sampled and trained, and estimates; no network",
        )
        command.set_defaults(command=_run_command, steps=steps)
    command = commands.add_parser(
        "multishot", help="the iterative baseline, from the run's one-shot policy on", allow_abbrev=False
    )
    _add_run_options(command)
    command.add_argument("--redo", action="store_true", help="remove the iterates, then do them anew")
    command.set_defaults(command=_multishot)
    command = commands.add_parser(
        "baselines", help="the experiments of the papers on the embedded world", allow_abbrev=False
    )
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"some of {', '.join(EXPERIMENTS)}")
    command.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="seeds of constraint_satisfaction and sample_sizes (default: 3; quick: 1)",
    )
    command.add_argument("--quick", action="store_true", help="rough numbers in a few minutes")
    command.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="holds runs/ and models/")
    command.add_argument("--no-progress", action="store_true", help="no progress bars")
    command.set_defaults(command=_baselines)
    command = commands.add_parser(
        "frontier", help="solve for a range of thresholds on any table of scores", add_help=False, allow_abbrev=False
    )
    command.set_defaults(command=lambda _, rest: _table_command("frontier", rest))
    command = commands.add_parser(
        "validate", help="check every file of a run against what it claims to be", allow_abbrev=False
    )
    command.add_argument("run", metavar="RUN", nargs="?", help="name of the run, or its folder (default: embedded)")
    command.add_argument("--run", dest="run_name", metavar="NAME", help="the same, as an option")
    command.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="holds runs/")
    command.add_argument("--no-progress", action="store_true", help="no progress bar")
    command.set_defaults(command=_validate)
    command = commands.add_parser("env", help="versions and devices, for bug reports", allow_abbrev=False)
    command.set_defaults(command=_env)
    return parser


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, default=Path("embedded"), metavar="FILE", help="recipe, or its name")
    command.add_argument("--run", metavar="NAME", help="name of the run (default: the recipe's)")
    command.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="holds runs/ and models/")
    command.add_argument("--no-progress", action="store_true", help="no progress bars")
    command.add_argument(
        "--limit",
        metavar="N",
        help="try it small: at most N prompts of each split (--prompts.limit), and of pairs (--training.pairs.limit)",
    )
    command.epilog = "Settings of the recipe are options too, e.g. --sampling.samples_per_prompt 64"


def _add_train_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--accelerate-config",
        metavar="NAME",
        help="train on several processes: single_gpu, multi_gpu, fsdp2, zero3, or a configuration file of accelerate",
    )
    command.add_argument("--processes", type=int, metavar="N", help="how many (default: as the configuration says)")


def _add_export_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--format",
        action="append",
        choices=list(FORMATS),
        help="also write exports/FORMAT/, for people who train elsewhere; may be given several times",
    )
    for name, meaning in (
        ("pairs-per-prompt", "pairs of trl-preference"),
        ("lines-per-prompt", "resampled lines of openai-jsonl"),
    ):
        default = getattr(ExportSettings, name.replace("-", "_"))
        command.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} ({default})")


def _table_parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"dualign {command}", allow_abbrev=False)
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
        help="'NAME >= NUMBER', 'NAME <= NUMBER' or 'NAME >= ref + NUMBER'; for a frontier START:STOP:STEP in some",
    )
    parser.add_argument("--beta", type=float, required=True, help="KL strength, reward per nat")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--ray", metavar="ADDRESS", help="run the passes on a Ray cluster; `local` starts one here")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    if command == "solve":
        parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
        for name, meaning in _SAFEGUARDS.items():
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, action="append", default=[], metavar="NAME=NUMBER", help=meaning)
        parser.add_argument("--evaluation-prompts", type=int, default=0, metavar="N", help="for --assurance")
        parser.add_argument("--evaluation-responses", type=int, default=0, metavar="K", help="for --assurance")
        parser.add_argument(
            "--correct-response-bias", action="store_true", help="lambda* corrected for finitely many responses"
        )
    return parser


def _safeguards(options: argparse.Namespace) -> dict[str, Safeguard]:
    found: dict[str, Safeguard] = {}
    for field in _SAFEGUARDS:
        for text in getattr(options, field):
            name, _, number = text.rpartition("=")  # a name may hold the sign itself
            try:
                value = float(number)
            except ValueError:
                raise InputError(f"--{field.replace('_', '-')} {text!r}: it must be NAME=NUMBER") from None
            rule, allowed = _SAFEGUARD_RULES[field]
            if not (math.isfinite(value) and allowed(value)):
                raise InputError(f"--{field.replace('_', '-')} {text!r}: the number must be {rule}")
            found[name] = replace(found.get(name, Safeguard()), **{field: value})
    return found


def _table_command(command: str, arguments: Sequence[str]) -> int:
    from pipeline.dual.from_table import TableRequest, frontier_table, solve_table
    from pipeline.dual.solving import EvaluationSize
    from pipeline.report import print_stage1

    options = _table_parser(command).parse_args(arguments)
    # As an exception it passes through the clean-up of what was written on the way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    request = TableRequest(
        table=options.table,
        prompt_id=options.prompt_id,
        reward=options.reward,
        constraints=tuple(options.constraint),
        beta=options.beta,
        output=options.output,
        executor=_ray_executor(options.ray) if options.ray else None,
        show_progress=not (options.no_progress or os.environ.get("TQDM_DISABLE")),
    )
    if command == "solve":
        request = replace(
            request,
            seed=options.seed,
            safeguards=_safeguards(options),
            evaluation=EvaluationSize(options.evaluation_prompts, options.evaluation_responses),
            corrects_response_bias=options.correct_response_bias,
        )
        print_stage1(solve_table(request))
    else:
        rows = frontier_table(request)
        feasible = sum(rows["feasible"].to_pylist())
        print(f"{rows.num_rows} thresholds, {feasible} of them feasible: {request.output / 'frontier.parquet'}")
    return 0


def _ray_executor(address: str) -> RayExecutor:
    require_extra("ray", "ray", purpose="--ray")
    from stage1_dual.ray_execution import RayExecutor

    return RayExecutor.connect(address)


def _read_run(options: argparse.Namespace, rest: Sequence[str]) -> Run:
    if options.limit is not None:
        rest = [*rest, "--prompts.limit", options.limit]
    config = load_config(options.config, _overrides(rest), pairs_limit=options.limit)
    if _only_plans(options) or not any(is_hub_id(model.model) for model in config.checkpoints().values()):
        # Nothing of this run is on the Hub, or is wanted: no look-up may leave the machine, nor a bar announce one.
        os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    return Run(
        config=config,
        name=options.run or options.config.stem,
        data_dir=options.data_dir,
        show_progress=not (options.no_progress or os.environ.get("TQDM_DISABLE")),
    )


def _baselines(options: argparse.Namespace, rest: Sequence[str]) -> int:
    _require_no_more(rest, command="baselines")
    require_one_process(("baselines",))
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    study = build_study(
        data_dir=options.data_dir,
        n_seeds=options.seeds if options.seeds is not None else (1 if options.quick else 3),
        quick=options.quick,
        show_progress=not (options.no_progress or os.environ.get("TQDM_DISABLE")),
    )
    run_experiments(study, options.only)
    return 0


def _only_plans(options: argparse.Namespace) -> bool:
    """Whether a plan is asked for; `sample --dry-run` reads the tokenizer, which may be on the Hub."""
    return getattr(options, "dry_run", False) and options.steps != ("sample",)


def _multishot(options: argparse.Namespace, rest: Sequence[str]) -> int:
    require_one_process(("multishot",))
    kept = run_multishot(_read_run(options, rest), redo=options.redo)
    print_stage2(read_json(kept.folder / "evaluation" / "evaluation.json"), read_json(kept.folder / "dual/dual.json"))
    return 0


def _run_command(options: argparse.Namespace, rest: Sequence[str]) -> int:
    run = _read_run(options, rest)
    if getattr(options, "dry_run", False):
        print(show_plan(run, options.steps) if _only_plans(options) else preview_samples(run))
        return 0
    require_one_process(options.steps)
    if getattr(options, "accelerate_config", None):
        return _launch(options, rest)
    if process_number() > 0:
        # The first process holds the run, checks and records; the others only train.
        if options.redo or not is_complete(run.folder / "policy"):
            perform_training(run)
        return 0
    redo = getattr(options, "redo_from", None) or (options.steps[0] if getattr(options, "redo", False) else None)
    run_steps(run, options.steps, redo_from=redo)
    if getattr(options, "format", None):
        counts = {name: getattr(options, name) for name in ("pairs_per_prompt", "lines_per_prompt")}
        write_exports(run, options.format, ExportSettings(seed=run.config.seed, **counts))
    if getattr(options, "require_satisfied", False) and (status := read_status(run)) != "satisfied":
        raise ConstraintsNotSatisfiedError(f"the evaluation of run `{run.name}` is {status}, and must be satisfied")
    return 0


def _launch(options: argparse.Namespace, rest: Sequence[str]) -> int:
    require_extra("train", "torch", "transformers", "accelerate", "peft", purpose="training")
    arguments = ["--config", str(options.config), "--data-dir", str(options.data_dir)]
    arguments += ["--run", options.run] if options.run else []
    arguments += ["--no-progress"] if options.no_progress else []
    arguments += ["--redo"] if options.redo else []
    arguments += ["--limit", options.limit] if options.limit is not None else []
    return launch_training(
        [*arguments, *rest], accelerate_config=options.accelerate_config, n_processes=options.processes
    )


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    """Pairs of dotted key and text from ``--a.b value`` and ``--a.b=value``."""
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
        if key in overrides:
            raise ConfigError([f"`--{key}` is given twice"], source="the command line")
        overrides[key] = text
    return overrides


def _validate(options: argparse.Namespace, rest: Sequence[str]) -> int:
    _require_no_more(rest, command="validate RUN")
    name = options.run or options.run_name or "embedded"
    folder = options.data_dir / "runs" / name
    if not folder.is_dir() and Path(name).is_dir():
        folder = Path(name)
    found = validate_run(folder, show_progress=not (options.no_progress or os.environ.get("TQDM_DISABLE")))
    for link in found.chain:
        counts = ", ".join(f"{count} {what}" for what, count in link.counts.items())
        origin = f"from {', '.join(link.made_from)}" if link.made_from else ""
        if link.run not in (None, folder.name):
            origin += f" (made as run {link.run})"
        print(f"{link.name:24} {(link.identity or 'not finished')[:12]:14} {counts or '-':44} {origin}".rstrip())
    for fault in found.faults:
        print(f"fault: {fault}")
    if not found.faults:
        print(f"{len(found.chain)} artifacts, no faults")
    if found.faults:
        raise InputError(f"{folder} has {len(found.faults)} fault{'s' if len(found.faults) > 1 else ''}")
    return 0


def _require_no_more(rest: Sequence[str], *, command: str) -> None:
    if rest:
        raise ConfigError(
            [f"`dualign {command}` takes no more arguments, {rest[0]!r} given"], source="the command line"
        )


def _env(options: argparse.Namespace, rest: Sequence[str]) -> int:  # noqa: ARG001  # the signature of a command
    _require_no_more(rest, command="env")
    for name, value in environment().items():
        print(f"{name:14} {value}")
    for line in _devices():
        print(line)
    return 0


def _devices() -> list[str]:
    try:
        import torch
    except ImportError:
        return ["torch is not installed: solve, frontier and report work, sample, score and train do not"]
    if not torch.cuda.is_available():
        return [f"{'devices':14} CPU only, {torch.get_num_threads()} threads"]
    return [
        f"{'device ' + str(index):14} {torch.cuda.get_device_name(index)}, "
        f"{torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
        for index in range(torch.cuda.device_count())
    ]
