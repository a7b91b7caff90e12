"""The commands around a run: the experiments, and what is asked of the program itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.commands.run_options import SETTINGS_NOTE, add_run_options, read_run
from pipeline.commands.subcommand import Subcommand, add_data_options, shows_progress, stay_offline
from pipeline.commands.unknown_options import require_no_more


def _add_multishot_options(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument("--redo", action="store_true", help="remove the iterates, then do them anew")


def _multishot(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.contracts.artifacts import read_json
    from pipeline.contracts.training_verdict import read_training_verdict
    from pipeline.multishot.loop import run_multishot
    from pipeline.report.terminal import print_stage2
    from pipeline.run.launch import require_one_process

    require_one_process(("multishot",))
    kept = run_multishot(read_run(options, rest), redo=options.redo)
    print_stage2(
        read_json(kept.folder / "evaluation" / "evaluation.json"),
        read_json(kept.folder / "dual" / "dual.json"),
        read_training_verdict(kept.folder / "policy"),
    )


def _add_baselines_options(parser: argparse.ArgumentParser) -> None:
    from pipeline.baselines.experiments import EXPERIMENTS, PERFORMED_UNASKED

    by_name = [name for name in EXPERIMENTS if name not in PERFORMED_UNASKED]
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"some of {', '.join(EXPERIMENTS)} (default: all but {', '.join(by_name)}, which takes hours)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="seeds of the experiments that use several (default: 3; quick: 1)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="experiments at a time, which share the cores (default: as many as there are cores)",
    )
    parser.add_argument("--quick", action="store_true", help="rough numbers in a few minutes")
    add_data_options(parser)


def _baselines(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.baselines.command import build_study, run_experiments
    from pipeline.run.launch import require_one_process

    require_no_more(rest, command="baselines")
    require_one_process(("baselines",))
    stay_offline()
    study = build_study(
        data_dir=options.data_dir,
        n_seeds=options.seeds if options.seeds is not None else (1 if options.quick else 3),
        quick=options.quick,
        show_progress=shows_progress(options),
    )
    run_experiments(study, options.only, jobs=options.jobs)


def _env(options: argparse.Namespace, rest: Sequence[str]) -> None:  # noqa: ARG001  # the signature of a command
    from pipeline.steps.env import describe_environment

    require_no_more(rest, command="env")
    print(describe_environment())


def _add_completion_options(parser: argparse.ArgumentParser) -> None:
    from pipeline.steps.completion import SHELLS

    parser.add_argument("shell", choices=SHELLS, help="the shell")


def _completion(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.commands.parsers import whole_parser  # which knows every command, this one too
    from pipeline.steps.completion import completion_script

    require_no_more(rest, command="completion")
    print(completion_script(whole_parser(), options.shell))


MULTISHOT = Subcommand(
    "the iterative baseline, from the run's one-shot policy on",
    _add_multishot_options,
    _multishot,
    (("from a finished run on", "dualign multishot --config my.yaml --run mine"),),
    (SETTINGS_NOTE,),
)

BASELINES = Subcommand(
    "the experiments of the papers on the embedded world",
    _add_baselines_options,
    _baselines,
    (("one of them, roughly", "dualign baselines --only trade_off --quick"),),
)

ENV = Subcommand("versions and devices, for bug reports", lambda _: None, _env, (("as text", "dualign env"),))

COMPLETION = Subcommand(
    "a script that lets a shell complete commands and options",
    _add_completion_options,
    _completion,
    (
        (
            "bash, for this user",
            "dualign completion bash > ~/.local/share/bash-completion/completions/dualign",
        ),
        ("zsh, into a folder of $fpath", "dualign completion zsh > ~/.zfunc/_dualign"),
    ),
)
