"""The parsers of the command line: of one command, for who runs it, and of all, for who describes them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from pipeline.commands.all_commands import COMMANDS, TABLE_FORMS
from pipeline.commands.subcommand import Subcommand, add_loudness_options
from pipeline.commands.unknown_options import SOURCE
from pipeline.contracts.errors import ConfigError

_DESCRIPTION = """Raise one score of a language model while keeping others above a line:
sample, score, solve a small convex dual, fine-tune once."""

_EPILOG = """`dualign COMMAND --help` has the options of a command and examples.

examples:
  # the whole run on the embedded world
  dualign run
  # what a recipe would load and cost, without a network
  dualign run --config my.yaml --dry-run
  # scores that are there already
  dualign solve --table scores.csv --reward helpful \\
      --constraint 'harmless >= ref + 0.8' --beta 1 --output out/
  # the results again
  dualign show embedded"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors say which option may have been misspelt."""

    given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, where an option is close to what was given, and end with 2."""
        own = [text for action in self._actions for text in action.option_strings if text.startswith("--")]
        hints = []
        for option in (text.partition("=")[0] for text in self.given if text.startswith("--")):
            close = difflib.get_close_matches(option, own, n=1, cutoff=0.7)
            if close and option not in own:
                hints.append(f"there is no option `{option}`; did you mean `{close[0]}`?")
        super().error("\n  ".join([message, *hints]))


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"dualign {version('dualign')}")
        parser.exit()


def parser_for(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """A parser that lists every command and knows the options of the one that is asked for.

    Args:
        arguments: the command line.

    Raises:
        ConfigError: there is no such command; names the nearest.
        InputError: more constraints than a problem can have; to read so many would take minutes.
    """
    n_constraints = sum(text.partition("=")[0] == "--constraint" for text in arguments)
    if n_constraints:
        from pipeline.contracts.problem import require_few_constraints

        require_few_constraints(n_constraints)
    asked = next((text for text in arguments if not text.startswith("-")), None)
    commands = COMMANDS | (TABLE_FORMS if names_a_table(arguments) else {})
    if asked is not None and asked not in commands:
        raise ConfigError([_no_such_command(asked, arguments)], source=SOURCE)
    parser, subparsers = _empty_parser()
    for name, command in commands.items():
        subparser = _add_parser(subparsers, name, command)
        if name == asked:
            subparser.given = arguments
            command.add_to(subparser, name)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """The parser with the options of every command, as they are without ``--table``; for shell completion.

    The options that a command has with ``--table`` alone are added to it.
    """
    parser, subparsers = _empty_parser()
    for name, command in COMMANDS.items():
        subparser = _add_parser(subparsers, name, command)
        command.add_to(subparser, name)
        if name in TABLE_FORMS:
            known = {text for action in subparser._actions for text in action.option_strings}
            for action in _parser_of(f"{name} --table", TABLE_FORMS[name])._actions:
                if not known & set(action.option_strings):
                    action.required = False  # of a run they are not
                    subparser._add_action(action)
    return parser


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command by what is typed, in the order of ``dualign --help``.

    ``solve --table`` has its own, after ``solve``. For the generated reference, and for suggestions.
    """
    found: dict[str, argparse.ArgumentParser] = {}
    for name, command in COMMANDS.items():
        found[name] = _parser_of(name, command)
        if name in TABLE_FORMS:
            found[f"{name} --table"] = _parser_of(name, TABLE_FORMS[name])
    return found


def names_a_table(arguments: Sequence[str]) -> bool:
    """Whether a command line is about a table of scores, not about a run."""
    return any(text.partition("=")[0] == "--table" for text in arguments)


def _empty_parser() -> tuple[_Parser, Any]:
    parser = _Parser(
        prog="dualign",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version and leave")
    add_loudness_options(parser)
    return parser, parser.add_subparsers(required=True, metavar="COMMAND")


def _settings_of(command: Subcommand) -> dict[str, Any]:
    summary = command.summary
    return {
        "description": summary[:1].upper() + summary[1:] + ".",
        "allow_abbrev": False,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _add_parser(subparsers: Any, name: str, command: Subcommand) -> _Parser:
    parser: _Parser = subparsers.add_parser(name, help=command.summary, **_settings_of(command))
    return parser


def _parser_of(name: str, command: Subcommand) -> _Parser:
    parser = _Parser(prog=f"dualign {name}", **_settings_of(command))
    command.add_to(parser, name)
    return parser


def _no_such_command(asked: str, arguments: Sequence[str]) -> str:
    close = difflib.get_close_matches(asked, COMMANDS, n=1)
    if close:
        return f"there is no command {asked!r}; did you mean `dualign {close[0]}`?"
    first = "" if arguments[0] == asked else "; the command comes first, its options after it"
    return f"there is no command {asked!r}{first}; the commands are {', '.join(COMMANDS)}"
