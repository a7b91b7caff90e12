"""The log of a process on standard error: its messages, and which of those of libraries are let through."""

from __future__ import annotations

import logging
import os
import sys

from pipeline.contracts.errors import printable


def show_log(*, quiet: bool, verbose: bool) -> None:
    """Messages of the run to standard error; standard output is for tables.

    Args:
        quiet: warnings alone, and no bars of libraries.
        verbose: with the time, and what libraries say of themselves.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(asctime)s %(message)s" if verbose else "%(message)s"))
    logger = logging.getLogger("dualign")
    logger.handlers = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    # What these libraries warn of is theirs to change; what matters of it is checked where a model is loaded.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if verbose else "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "WARNING" if verbose else "ERROR")
    if verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    else:
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a home where it cannot keep its list of fonts
    # Read when tqdm is imported.
    if quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")
    elif not sys.stderr.isatty():
        # Our bars write lines there (pipeline.progress); others, once a minute.
        os.environ.setdefault("TQDM_MININTERVAL", "60")
        os.environ.setdefault("TQDM_MAXINTERVAL", "60")


class _PrintableFormatter(logging.Formatter):
    """Messages name what strangers wrote: prompts, files, models."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
