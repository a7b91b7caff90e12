"""``dualign completion``: what a shell needs to complete commands, options and files."""

from __future__ import annotations

import argparse
from typing import Literal

Shell = Literal["bash", "zsh", "tcsh"]

SHELLS: tuple[Shell, ...] = ("bash", "zsh", "tcsh")


def completion_script(parser: argparse.ArgumentParser, shell: Shell) -> str:
    """The script of a shell for a command line.

    Args:
        parser: of the whole command line.
        shell: which.
    """
    import shtab

    for subparser in [parser, *_subparsers(parser)]:
        for action in subparser._actions:  # shtab reads what is to be completed off the action
            if action.metavar == "DIR":
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.metavar in {"FILE", "PATH", "RUN"}:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell=shell))


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    return [
        subparser
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for subparser in action.choices.values()
    ]
