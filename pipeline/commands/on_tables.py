"""The commands on any table of scores, without a run: ``solve --table`` and ``frontier``."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.json_output import apart_from_json, print_json
from pipeline.commands.subcommand import Subcommand, add_json_option, add_progress_option, say_where, shows_progress
from pipeline.commands.unknown_options import require_no_more
from pipeline.contracts.errors import InputError, NoFeasibleThresholdError, require_extra
from pipeline.steps.order import SUMMARIES

if TYPE_CHECKING:
    from pipeline.contracts.problem import Constraint, Safeguard
    from pipeline.dual.from_table import SafeguardName, TableRequest
    from pipeline.report.page_data import Command
    from stage1_dual.ray_execution import RayExecutor

_SAFEGUARDS: dict[SafeguardName, str] = {
    "reserve": "score units asked of the dual beyond the demand",
    "assurance": "probability that the final evaluation calls the constraint satisfied",
    "score_error": "root mean square error of the scorer's differences, which the margin must outgrow",
}


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which problem of which table is asked about."""
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
    parser.add_argument("--ray", metavar="ADDRESS", help="run the passes on a Ray cluster; `local` starts one here")
    add_progress_option(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--force", action="store_true", help="replace the results of another problem in the folder")


def _add_solve_table_options(parser: argparse.ArgumentParser) -> None:
    add_table_options(parser)
    _add_output_options(parser)
    add_json_option(parser, what="dual.json, the folder and the files")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    for name, meaning in _SAFEGUARDS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, action="append", default=[], metavar="NAME=NUMBER", help=meaning)
    parser.add_argument("--evaluation-prompts", type=int, default=0, metavar="N", help="for --assurance")
    parser.add_argument("--evaluation-responses", type=int, default=0, metavar="K", help="for --assurance")
    parser.add_argument(
        "--correct-response-bias", action="store_true", help="lambda* corrected for finitely many responses"
    )


def _solve_table(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.contracts.artifacts import read_json
    from pipeline.contracts.constraint_text import read_constraints
    from pipeline.dual.from_table import solve_table
    from pipeline.dual.solving import EvaluationSize
    from pipeline.report.terminal import print_stage1

    require_no_more(rest, command="solve --table")
    request = replace(
        table_request(options, read_constraints(options.constraint)),
        seed=options.seed,
        safeguards=_safeguards(options),
        evaluation=EvaluationSize(options.evaluation_prompts, options.evaluation_responses),
        corrects_response_bias=options.correct_response_bias,
    )
    with apart_from_json(options.json), _scratch(options, request, asked={}) as scratch:
        solution = solve_table(request, scratch=scratch)
        # Before the figures, which take longer than the answer.
        print_stage1(solution.content)
        written = solution.save(options.output, commands=_commands(options, request))
        say_where(written)
    if options.json:
        dual = read_json(options.output / "dual.json")
        print_json({"output": str(options.output), "files": list(map(str, written)), "dual": dual})


_ANOTHER_FOLDER = (
    "The command that asks for it: give --output another folder to keep what is there, or add --force to replace it."
)


def _commands(options: argparse.Namespace, request: TableRequest) -> dict[str, Command]:
    """What asks for another demand on each constraint that has a text of its own."""
    from pipeline.contracts.constraint_text import with_number
    from pipeline.report.page_data import Command

    words = ["dualign", "solve", "--table", str(options.table)]
    if options.prompt_id != "prompt_id":
        words += ["--prompt-id", options.prompt_id]
    words += ["--reward", options.reward]
    after = ["--beta", str(options.beta)] if options.kl is None else ["--kl", str(options.kl)]
    for field in _SAFEGUARDS:
        for text in getattr(options, field):
            after += [f"--{field.replace('_', '-')}", text]
    for name in ("evaluation_prompts", "evaluation_responses", "seed"):
        if value := getattr(options, name):
            after += [f"--{name.replace('_', '-')}", str(value)]
    after += ["--correct-response-bias"] if options.correct_response_bias else []
    after += ["--ray", options.ray] if options.ray else []
    after += ["--output", str(options.output)]
    found = {}
    names = iter([one.name for one in request.constraints])
    for place, text in enumerate(options.constraint):
        for changed, name in zip(with_number(text, "{}"), names, strict=False):
            texts = [*options.constraint[:place], changed, *options.constraint[place + 1 :]]
            given = [word for one in texts for word in ("--constraint", one or "")]
            line = shlex.join([*words, *given, *after])
            if changed is not None and line.count("{}") == 1:  # what a name holds is no place for the number
                found[name] = Command(line, _ANOTHER_FOLDER)
    return found


def _add_frontier_options(parser: argparse.ArgumentParser) -> None:
    add_table_options(parser)
    _add_output_options(parser)
    add_json_option(parser, what="the rows of frontier.parquet and the files")


def _frontier(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from pipeline.report.swept import grid_view
    from pipeline.report.terminal import print_view
    from pipeline.steps.frontier import read_grid, solve_grid, write_grid

    require_no_more(rest, command="frontier")
    grid = read_grid(options.constraint)
    request = table_request(options, grid.first)
    asked = {"frontier": [" ".join(text.split()) for text in options.constraint]}
    with apart_from_json(options.json), _scratch(options, request, asked=asked) as scratch:
        solved = solve_grid(request, grid, scratch=scratch)
        print_view(grid_view(solved))
        written = write_grid(options.output, solved, problem=request.problem(request.open_table()) | asked)
        say_where(written)
    if options.json:
        print_json(
            {
                "output": str(options.output),
                "files": list(map(str, written)),
                "n_thresholds": solved.rows.num_rows,
                "n_feasible": solved.n_feasible,
                "rows": solved.rows.to_pylist(),
            }
        )
    if not solved.n_feasible:
        thresholds = f"{solved.rows.num_rows} thresholds of" if solved.rows.num_rows > 1 else "threshold of"
        raise NoFeasibleThresholdError(
            f"the {thresholds} {' '.join(asked['frontier'])} cannot be met by any policy on these samples"
        )


def table_request(options: argparse.Namespace, constraints: Sequence[Constraint]) -> TableRequest:
    """The question that the options of :func:`add_table_options` ask.

    Args:
        options: of the command.
        constraints: read from its texts.
    """
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
        show_progress=shows_progress(options),
    )


@contextmanager
def _scratch(options: argparse.Namespace, request: TableRequest, *, asked: Mapping[str, Any]) -> Iterator[Path]:
    """A folder in the output folder for scores that do not fit in memory, gone whatever happens.

    Args:
        options: with the output folder, and whether the results of another problem there may be replaced.
        request: what is asked.
        asked: what is asked besides, of the results that will be there.
    """
    from pipeline.dual.output_folder import hold_output, require_same_problem

    table = request.open_table()  # what is wrong with it is said before a folder is made
    with (
        hold_output(options.output, request.source),
        tempfile.TemporaryDirectory(prefix=".scores-", dir=options.output.resolve()) as folder,
    ):
        if not options.force:
            require_same_problem(options.output, lambda: {**request.problem(table), **asked})
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


SOLVE_TABLE = Subcommand(
    SUMMARIES["solve"],
    _add_solve_table_options,
    _solve_table,
    (
        (
            "scores in a CSV file, one row a response",
            (
                "dualign solve --table scores.csv --reward helpful \\\n"
                "      --constraint 'harmless >= ref + 0.8' --beta 1 --output out/"
            ),
        ),
        (
            "two constraints, and a KL budget in place of beta",
            (
                "dualign solve --table scores.parquet --reward helpful \\\n"
                "      --constraint 'harmless >= ref + 0.8' \\\n"
                "      --constraint 'share(toxicity <= 0.5) >= 0.97' --kl 0.5 --output out/"
            ),
        ),
        ("the results again", "dualign show out/"),
    ),
)
"""``dualign solve --table``: the dual without a run."""

FRONTIER = Subcommand(
    "solve for a range of thresholds on any table of scores",
    _add_frontier_options,
    _frontier,
    (
        (
            "what harmlessness costs",
            (
                "dualign frontier --table scores.csv --reward helpful \\\n"
                "      --constraint 'harmless >= ref + 0:2:0.1' --beta 1 --output frontier/"
            ),
        ),
        (
            "of two constraints at once",
            (
                "dualign frontier --table scores.parquet --reward helpful \\\n"
                "      --constraint 'harmless >= ref + 0:1:0.25' \\\n"
                "      --constraint 'toxicity <= 0.1:0.3:0.1' --beta 1 --output frontier/"
            ),
        ),
    ),
)
