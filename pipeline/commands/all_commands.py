"""The table of all commands, in the order of ``dualign --help``. Its modules import nothing that a command needs."""

from __future__ import annotations

from pipeline.commands.around_runs import BASELINES, COMPLETION, ENV, MULTISHOT
from pipeline.commands.on_pilots import PLAN, PLAN_TABLE
from pipeline.commands.on_results import COMPARE, SHOW, VALIDATE
from pipeline.commands.on_runs import STAGE_COMMANDS, STEP_COMMANDS
from pipeline.commands.on_tables import FRONTIER, SOLVE_TABLE
from pipeline.commands.subcommand import Subcommand

COMMANDS: dict[str, Subcommand] = {
    **STEP_COMMANDS,
    **STAGE_COMMANDS,
    "plan": PLAN,
    "show": SHOW,
    "compare": COMPARE,
    "frontier": FRONTIER,
    "validate": VALIDATE,
    "multishot": MULTISHOT,
    "baselines": BASELINES,
    "env": ENV,
    "completion": COMPLETION,
}

TABLE_FORMS: dict[str, Subcommand] = {"solve": SOLVE_TABLE, "plan": PLAN_TABLE}
"""Commands that are another one where they are given ``--table``."""
