"""What ``dualign validate`` finds, of a run and of a hand-off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

UNFORESEEN = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    pa.ArrowException,
)
"""What reading files that nobody foresaw raises. A run is reported on to its end, whatever one of its artifacts is."""


@dataclass(frozen=True)
class Link:
    """One artifact of the chain.

    Attributes:
        name: its folder relative to the run.
        identity: its identity, or None where the step has not finished.
        run: name of the run it was made in.
        counts: what its manifest counts.
        made_from: the artifacts it was made from.
    """

    name: str
    identity: str | None
    run: str | None
    counts: Mapping[str, int]
    made_from: tuple[str, ...]


@dataclass
class Validation:
    """What was found.

    Attributes:
        chain: the artifacts in order.
        faults: what is wrong, each with the file it is in.
    """

    chain: list[Link] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
