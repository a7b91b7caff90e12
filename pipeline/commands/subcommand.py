"""What a command is, and the options that most of them share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.contracts.errors import printable


@dataclass(frozen=True)
class Subcommand:
    """One subcommand.

    Attributes:
        summary: a line for ``dualign --help``.
        add_options: adds its options to its parser; may import what the command needs anyway.
        perform: does it, given the options and what is left of the command line; returns an exit code, or None for 0.
        examples: what one may want, and the command line that does it; shown by its ``--help``.
        notes: paragraphs for its ``--help``.
    """

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    perform: Callable[[argparse.Namespace, Sequence[str]], int | None]
    examples: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def add_to(self, parser: argparse.ArgumentParser, name: str) -> None:
        """Add the options, and make the parser answer with this command.

        Args:
            parser: of the command.
            name: of the command.
        """
        self.add_options(parser)
        add_loudness_options(parser)
        parser.set_defaults(command=name, perform=self.perform)
        examples = [f"  # {what}\n  {line}" for what, line in self.examples]
        parser.epilog = "\n\n".join([*self.notes, *(["\n".join(["examples:", *examples])] if examples else [])])


def add_loudness_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--quiet`` and ``--verbose``, which may stand before the command too."""
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="no progress and no notes; results, warnings and errors alone",
    )
    loudness.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="the time of every note, what the libraries say, and where an error comes from",
    )


def add_data_options(parser: argparse.ArgumentParser, *, holds: str = "runs/ and models/") -> None:
    """Add where runs are, and whether progress is shown."""
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help=f"holds {holds} (data)")
    add_progress_option(parser)


def add_progress_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-progress``."""
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def add_json_option(parser: argparse.ArgumentParser, *, what: str) -> None:
    """Add ``--json``.

    Args:
        parser: of the command.
        what: the object holds.
    """
    parser.add_argument(
        "--json",
        action="store_true",
        help=f"print {what} as one JSON object and nothing else; tables and progress go to standard error",
    )


def shows_progress(options: argparse.Namespace) -> bool:
    """Whether long work shows how far it is."""
    return not (options.no_progress or is_quiet(options) or os.environ.get("TQDM_DISABLE"))


def is_quiet(options: argparse.Namespace) -> bool:
    """Whether ``--quiet`` is given."""
    return bool(getattr(options, "quiet", False))


def stay_offline() -> None:
    """No look-up may leave the machine, nor a bar announce one."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})


def say_where(written: Sequence[Path]) -> None:
    """Print where results are; many figures are one line.

    Args:
        written: the files, figures last.
    """
    stems = {path.stem for path in written if path.parent.name == "figures"}
    folded = len(stems) > 1
    for path in written:
        if not (folded and path.parent.name == "figures"):
            print(printable(f"wrote {path}"))
    if folded:
        print(printable(f"wrote {written[-1].parent}{os.sep}, {len(stems)} figures"))
