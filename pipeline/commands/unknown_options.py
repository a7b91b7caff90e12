"""Options that a command does not have: what was meant, or which command has them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from pipeline.contracts.errors import ConfigError

SOURCE = "the command line"
"""Where faults of options are, for messages."""

_LIKE, _RATHER_LIKE = 0.75, 0.6
"""How like two options are of which one may be meant by the other, as :mod:`difflib` has it."""


def require_no_more(rest: Sequence[str], *, command: str) -> None:
    """Refuse what a command has no use for, with what may have been meant.

    Args:
        rest: what is left of the command line.
        command: its name.

    Raises:
        ConfigError: there is something left; names each option.
    """
    if not rest:
        return
    known = options_by_command()
    faults = [unknown_option(text, command=command, known=known) for text in rest if text.startswith("-")]
    raise ConfigError(faults or [f"`dualign {command}` takes no more arguments, {rest[0]!r} given"], source=SOURCE)


def unknown_option(text: str, *, command: str, known: Mapping[str, Sequence[str]]) -> str:
    """A sentence about an option that the command does not have.

    Args:
        text: as it was given, with or without a value after ``=``.
        command: as it was given, ``solve --table`` for that form of it.
        known: the options of every command by its name.
    """
    option = text.partition("=")[0]
    head = f"`dualign {command}` has no option `{option}`"
    having = [name for name, options in known.items() if option in options]
    if having:
        where = ", ".join(f"`dualign {name}`" for name in having[:4])
        return f"{head}; it is an option of {where}{' and others' if len(having) > 4 else ''}"
    own = [*known.get(command, ()), *known.get(f"{command} --table", ())]
    elsewhere = {other: name for name, options in known.items() for other in options}
    # An option of the command goes before one of another that is as close, and far behind one that is closer.
    for options, likeness in ((own, _LIKE), (list(elsewhere), _LIKE), (own, _RATHER_LIKE)):
        close = difflib.get_close_matches(option, options, n=1, cutoff=likeness)
        if close:
            where = "" if close[0] in own else f" of `dualign {elsewhere[close[0]]}`"
            return f"{head}; did you mean `{close[0]}`{where}?"
    return f"{head}; `dualign {command} --help` lists them"


def options_by_command() -> dict[str, list[str]]:
    """The long options of every command by its name, in the order of ``dualign --help``."""
    from pipeline.commands.parsers import command_parsers  # which knows every command, and so this one's caller

    return {
        name: [text for action in parser._actions for text in action.option_strings if text.startswith("--")]
        for name, parser in command_parsers().items()
    }
