"""``--json``: one JSON object on standard output, and nothing else there."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any


@contextmanager
def apart_from_json(wanted: bool) -> Iterator[None]:
    """Send to standard error whatever is printed meanwhile, by us or by a library in any language.

    Args:
        wanted: whether there will be JSON; nothing is changed without it.
    """
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 1)
        os.close(kept)


def print_json(value: Mapping[str, Any]) -> None:
    """Print an object as strict JSON in ASCII, which any terminal and any parser takes.

    Args:
        value: of what JSON knows; a number that is not finite becomes null.
    """
    print(json.dumps(_strict(value), indent=2, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    return value
