"""The program ``dualign``: its streams, its log, its exit codes; what each command does is in `pipeline.commands`.

Every setting of a recipe is an option: ``--sampling.samples_per_prompt 64``, ``--beta 0.5``. The command line wins.
Exit codes are listed in :mod:`pipeline.contracts.errors`.

The modules of a command are imported when it is used, never for another one: `dualign --help` and
`dualign solve --table` start at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline.commands.parsers import names_a_table, parser_for
from pipeline.commands.subcommand import is_quiet
from pipeline.contracts.errors import DualignError, loading_failure, printable, writing_failure
from pipeline.contracts.privacy import keep_private
from pipeline.logs import show_log


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``dualign``; returns the exit code."""
    _mend_streams()
    keep_private()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    kept = "" if names_a_table(arguments) else "; finished work is kept, run the same command to continue"
    verbose = False
    try:
        with _told_to_stop():
            parser = parser_for(arguments)
            if not arguments:
                parser.print_help(sys.stderr)
                return 2
            options, rest = parser.parse_known_args(arguments)
            verbose = bool(getattr(options, "verbose", False))
            show_log(quiet=is_quiet(options), verbose=verbose)
            code = int(options.perform(options, rest) or 0)
            sys.stdout.flush()  # here a disk that is full is still ours to report
            return code
    except DualignError as error:
        return _fail(error, verbose=verbose)
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is left in the buffer would fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if (failure := writing_failure(error) or loading_failure(error)) is None:
            raise
        return _fail(failure, verbose=verbose)
    except Exception as error:
        if (failure := loading_failure(error)) is None:
            raise
        return _fail(failure, verbose=verbose)
    except KeyboardInterrupt:
        print(f"dualign: interrupted{kept}", file=sys.stderr)
        return 130
    except _ToldToStop:
        print(f"dualign: terminated{kept}", file=sys.stderr)
        return 143


def _mend_streams() -> None:
    """Make standard streams that can be written to, whatever this process was given.

    The number of a closed one would go to the next file that is opened, and what a library prints into that file; one
    of another encoding than UTF-8 would fail at the first letter that it has not.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error is from the start


class _ToldToStop(BaseException):
    """SIGTERM, as an exception: it passes through the clean-up of what was written on the way."""


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Turn SIGTERM into an exception; only the main thread may, and only there commands run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _ToldToStop

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(error: DualignError, *, verbose: bool) -> int:
    if verbose:
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
    print(f"dualign: {printable(str(error))}", file=sys.stderr)
    return error.exit_code
