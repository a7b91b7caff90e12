"""The commands that read what is there already: ``show``, ``compare`` and ``validate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.json_output import apart_from_json, print_json
from pipeline.commands.subcommand import Subcommand, add_data_options, add_json_option, say_where, shows_progress
from pipeline.commands.unknown_options import require_no_more
from pipeline.contracts.errors import InputError, printable

if TYPE_CHECKING:
    from pipeline.report.views import TableView


def _add_name_options(parser: argparse.ArgumentParser, *, help_text: str) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", help=f"{help_text} (default: embedded)")
    parser.add_argument("--run", dest="run_name", metavar="NAME", help="the same, as an option")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="holds runs/ (data)")


def _named(options: argparse.Namespace) -> str:
    """The run that is asked for.

    Raises:
        InputError: two are.
    """
    if options.run is not None and options.run_name not in (None, options.run):
        raise InputError(f"two runs are named, {options.run!r} and --run {options.run_name!r}; give one")
    return str(options.run or options.run_name or "embedded")


def _print_views(views: Sequence[TableView]) -> None:
    from pipeline.report.terminal import print_view

    for view in views:
        print_view(view)


def _add_show_options(parser: argparse.ArgumentParser) -> None:
    _add_name_options(parser, help_text="a run by name or folder, or an output folder of `dualign solve --table`")
    add_json_option(parser, what="dual.json, evaluation.json and whether training paid")


def _show(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.run.finding import find_run
    from pipeline.steps.show import read_results

    require_no_more(rest, command="show")
    found = read_results(find_run(_named(options), data_dir=options.data_dir))
    if options.json:
        print_json(found.document)
    else:
        _print_views(found.views)


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="runs by name or folder, or output folders of `dualign solve --table`",
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="holds runs/ (data)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="also write compare.html, compare.json and figures/ there"
    )
    add_json_option(parser, what="the runs")


def _compare(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.steps.compare import compare_runs, write_comparison

    require_no_more(rest, command="compare")
    found = compare_runs(options.runs, data_dir=options.data_dir)
    with apart_from_json(options.json):
        _print_views(found.views)
        written = [] if options.output is None else write_comparison(found, options.output)
        say_where(written)
    if options.json:
        print_json(found.document | {"files": list(map(str, written))})


def _add_validate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="a run by name or folder, or the folder of a hand-off (default: embedded)",
    )
    parser.add_argument("--run", dest="run_name", metavar="NAME", help="the same, as an option")
    add_data_options(parser, holds="runs/")
    add_json_option(parser, what="the artifacts and the faults")


def _validate(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.run.finding import find_run
    from pipeline.steps.validate import validate

    require_no_more(rest, command="validate")
    folder = find_run(_named(options), data_dir=options.data_dir)
    with apart_from_json(options.json):
        found = validate(folder, show_progress=shows_progress(options))
    if options.json:
        print_json(
            {"folder": str(folder), "artifacts": [asdict(link) for link in found.chain], "faults": found.faults}
        )
    else:
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


SHOW = Subcommand(
    "the tables of a run again",
    _add_show_options,
    _show,
    (
        ("the run of that name", "dualign show embedded"),
        ("what `dualign solve --table` wrote", "dualign show out/"),
        ("lambda* for a script", "dualign show mine --json | jq '.dual.constraints[].multiplier'"),
    ),
)

COMPARE = Subcommand(
    "several runs beside each other",
    _add_compare_options,
    _compare,
    (
        ("three runs", "dualign compare mild middle steep"),
        ("as a page with figures", "dualign compare mild steep --output comparison/"),
        ("for a script", "dualign compare mild steep --json | jq '.runs[].closed_fraction'"),
    ),
)

VALIDATE = Subcommand(
    "check every file of a run against what it claims to be",
    _add_validate_options,
    _validate,
    (
        ("a run", "dualign validate embedded"),
        ("a hand-off, on the machine of whoever got it", "dualign validate ./trl-preference"),
        ("for a script: the faults, and exit code 2 if there are any", "dualign validate mine --json | jq .faults"),
    ),
)
