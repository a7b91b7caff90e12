"""The command that plans how many prompts and responses a demand needs: ``plan``, from a run and from a table."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.json_output import apart_from_json, print_json
from pipeline.commands.on_tables import add_table_options, table_request
from pipeline.commands.run_options import SETTINGS_NOTE, add_run_options, read_run
from pipeline.commands.subcommand import Subcommand, add_json_option, say_where
from pipeline.commands.unknown_options import require_no_more

if TYPE_CHECKING:
    from pipeline.planning.sample_plan import FoundPlan

_SUMMARY = "how many prompts and responses a demand needs, from a pilot"
_WHAT = "the plan and its files"


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    from pipeline.planning.plan_options import add_plan_options

    add_run_options(parser)
    add_plan_options(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the figure (default: plan/ of the run)")
    add_json_option(parser, what=_WHAT)


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.planning.plan_options import read_question
    from pipeline.planning.sample_plan import plan_from_run

    run = read_run(options, rest, offline=True)
    question = read_question(options, evaluation_responses=run.config.evaluation.samples_per_prompt)
    _show(options, plan_from_run(run, question), options.output or run.folder / "plan")


def _add_plan_table_options(parser: argparse.ArgumentParser) -> None:
    from pipeline.planning.plan_options import add_plan_options

    add_table_options(parser)
    add_plan_options(parser)
    parser.add_argument("--tokens-per-response", type=float, metavar="NUMBER", help="for the costs")
    parser.add_argument("--tokens-per-second", type=float, metavar="NUMBER", help="for the costs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the figure (default: none is drawn)")
    add_json_option(parser, what=_WHAT)


def _plan_table(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.contracts.constraint_text import read_constraints
    from pipeline.planning.pilot_rates import rates_of_table
    from pipeline.planning.plan_options import read_question
    from pipeline.planning.sample_plan import plan_from_table

    require_no_more(rest, command="plan --table")
    question = read_question(options, evaluation_responses=None)
    request = table_request(options, read_constraints(options.constraint))
    rates = rates_of_table(
        options.table,
        rows=request.open_table().n_responses,
        tokens=options.tokens_per_response,
        tokens_per_second=options.tokens_per_second,
    )
    with tempfile.TemporaryDirectory(prefix="dualign-plan-") as folder:
        found = plan_from_table(request, question, rates=rates, scratch=Path(folder))
    _show(options, found, options.output)


def _show(options: argparse.Namespace, found: FoundPlan, folder: Path | None) -> None:
    """Print the plan, as a table or as JSON, and write its files where there is a folder for them.

    Raises:
        NoPlanError: no numbers within the limits will do.
        PlanNotTrustedError: nothing that follows from the pilot is to be trusted.
    """
    from pipeline.planning.sample_plan import plan_view, require_plan, write_plan
    from pipeline.report.terminal import print_view

    with apart_from_json(options.json):
        print_view(plan_view(found.content))
        written = [] if folder is None else write_plan(found, folder)
        say_where(written)
    if options.json:
        print_json(found.content | {"files": [str(path) for path in written]})
    require_plan(found.content)


PLAN = Subcommand(
    _SUMMARY,
    _add_plan_options,
    _plan,
    (
        (
            "a pilot of the recipe, and the plan that follows from it",
            (
                "dualign stage1 --config my.yaml --run pilot --limit 64 \\\n"
                "      --sampling.samples_per_prompt 32\n"
                "  dualign plan --config my.yaml --run pilot --within 0.05"
            ),
        ),
    ),
    (SETTINGS_NOTE,),
)

PLAN_TABLE = Subcommand(
    _SUMMARY,
    _add_plan_table_options,
    _plan_table,
    (
        (
            "from the scores of a pilot",
            (
                "dualign plan --table pilot.parquet --reward helpful \\\n"
                "      --constraint 'harmless >= ref + 0.8' --beta 1 --within 0.05"
            ),
        ),
    ),
)
"""``dualign plan --table``: the same from a table of scores."""
