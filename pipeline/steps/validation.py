"""What ``dualign validate`` finds, of a run and of a hand-off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.contracts.artifacts import shown
from pipeline.contracts.errors import DualignError
from pipeline.progress import progress_bar

Check = tuple[str, Callable[[], Iterator[str]]]
"""What is looked at, for messages, and what finds its faults."""

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

    def perform(self, checks: Sequence[Check], *, unreadable: Callable[[str], str], show_progress: bool) -> None:
        """Look for faults, to the end whatever one of the files is.

        Args:
            checks: what to look at.
            unreadable: from what was looked at to the beginning of the fault that nobody foresaw.
            show_progress: show a progress bar.
        """
        with progress_bar(total=len(checks), doing="validating", unit="checks", shown=show_progress) as bar:
            for description, find_faults in checks:
                try:
                    with np.errstate(all="ignore"):  # what is not finite is said where it is looked for
                        self.faults += find_faults()
                except DualignError as error:
                    self.faults.append(f"{description}: {error}")
                except UNFORESEEN as error:
                    what = shown(f"{type(error).__name__}: {error}", limit=300)
                    self.faults.append(f"{unreadable(description)} ({what})")
                bar.update()
