"""The options of commands on a run: its recipe, its name, and every setting of the recipe."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.commands.subcommand import add_data_options, shows_progress, stay_offline
from pipeline.commands.unknown_options import SOURCE, options_by_command, unknown_option
from pipeline.contracts.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.run.run import Run

SETTINGS_NOTE = """settings of the recipe are options too, e.g.
  --sampling.samples_per_prompt 64; --kl NATS in place of --beta is the
  largest KL to spend. The command line wins."""


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what names a run and its recipe."""
    parser.add_argument(
        "--config", type=Path, default=Path("embedded"), metavar="FILE", help="recipe, or its name (embedded)"
    )
    parser.add_argument("--run", metavar="NAME", help="name of the run (default: the recipe's)")
    add_data_options(parser)
    parser.add_argument(
        "--limit",
        metavar="N",
        help="try it small: at most N prompts of each split (--prompts.limit), and of pairs (--training.pairs.limit)",
    )


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Add what one step takes."""
    add_run_options(parser)
    parser.add_argument("--redo", action="store_true", help="remove this step and all after it, then do it anew")


def read_run(options: argparse.Namespace, rest: Sequence[str], *, offline: bool = False) -> Run:
    """The run that the options name.

    Args:
        options: of the command.
        rest: settings of the recipe as options.
        offline: whether nothing is wanted from the Hub, whatever the recipe names.

    Raises:
        ConfigError: lists every fault of recipe and settings.
        InputError: the name of the run is not one.
    """
    from pipeline.config.loading import load_config
    from pipeline.run.run import Run, require_plain_name
    from pipeline.scorers.models import is_hub_id

    if options.limit is not None:
        rest = [*rest, "--prompts.limit", options.limit]
    _require_settings(rest, command=options.command)
    config = load_config(options.config, _overrides(rest), pairs_limit=options.limit)
    if offline or not any(is_hub_id(model.model) for model in config.checkpoints().values()):
        stay_offline()
    return Run(
        config=config,
        name=require_plain_name(options.run or options.config.stem, option="--run"),
        data_dir=options.data_dir,
        show_progress=shows_progress(options),
    )


def _require_settings(rest: Sequence[str], *, command: str) -> None:
    """Refuse options that are no setting and are, or are close to, an option of some command.

    Raises:
        ConfigError: there are some; names each, with what was meant or which command has it.
    """
    from pipeline.config.recipe import RunConfig

    settings = [f"--{name}" for name in (*RunConfig.model_fields, "kl")]
    given = [text for text in rest if text.startswith("--") and "." not in text.partition("=")[0]]
    unknown = [text for text in given if text.partition("=")[0] not in settings]
    if not unknown:
        return
    known = options_by_command()
    of_commands = {option for options in known.values() for option in options}
    faults = []
    for text in unknown:
        close = difflib.get_close_matches(text.partition("=")[0], [*of_commands, *settings], n=1)
        if close and close[0] in of_commands:
            faults.append(unknown_option(text, command=command, known=known))
    if faults:
        raise ConfigError(faults, source=SOURCE)


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    """Pairs of dotted key and text from ``--a.b value`` and ``--a.b=value``; ``--kl`` is short for ``--beta.kl``."""
    overrides: dict[str, str] = {}
    waiting = list(rest)
    while waiting:
        token = waiting.pop(0)
        key, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            raise ConfigError([f"unexpected argument {token!r}; settings are --section.key VALUE"], source=SOURCE)
        if not equals:
            if not waiting:
                raise ConfigError([f"`{token}` has no value"], source=SOURCE)
            text = waiting.pop(0)
        if key == "kl":
            key, text = "beta", f"{{kl: {text}}}"
        if key in overrides:
            both = " (`--kl` sets it too)" if key == "beta" else ""
            raise ConfigError([f"`--{key}` is given twice{both}"], source=SOURCE)
        overrides[key] = text
    return overrides
