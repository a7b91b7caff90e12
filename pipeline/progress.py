"""The progress bar of all long work: a bar in a terminal or a notebook, a line now and then in a file or a pipe.

The embedded world has a bar of its own, since its sources are what its models are built from, byte by byte. It and the
bars of libraries follow tqdm's own variables, which the command line sets (:mod:`pipeline.cli`).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm
from typing_extensions import override

LINE_SHARE = 0.1
"""Where nobody watches, a line is written each tenth of the work ..."""

LINE_SECONDS = 60.0
"""... and each minute where a tenth takes longer ..."""

_SHORTEST_SECONDS = 1.0
"""... but no two within this time."""

_LINE = (
    "{desc}: {percentage:.0f}%, {n_fmt}/{total_fmt}{unit}, "
    "{elapsed} passed, {remaining} left, {rate_noinv_fmt}{postfix}"
)


class _Lines(tqdm):  # type: ignore[type-arg]  # the class is generic for type checkers only
    """A bar that writes lines, as a log wants them, instead of drawing over the last one."""

    @override
    def __init__(self, *, initial: float, **settings: Any) -> None:
        self._written_n, self._written_at = initial, time.monotonic()
        super().__init__(initial=initial, mininterval=_SHORTEST_SECONDS, bar_format=_LINE, **settings)

    @override
    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override]  # its stub says None
        """Write a line if one is due; tqdm asks every second, and with an empty text to take the last one away."""
        if msg == "" or not self._is_due():
            return False
        self._write()
        return True

    @override
    def close(self) -> None:
        """Write the last line, unless it is there already."""
        if not self.disable and self.leave and self.n != self._written_n:
            self._write()
        self.leave = False
        super().close()

    def _is_due(self) -> bool:
        seconds = time.monotonic() - self._written_at
        if self.n == self._written_n or seconds < _SHORTEST_SECONDS:
            return False
        tenths = 1 / (LINE_SHARE * self.total) if self.total else 0.0
        return int(self.n * tenths) > int(self._written_n * tenths) or seconds >= LINE_SECONDS

    def _write(self) -> None:
        self._written_n, self._written_at = self.n, time.monotonic()
        self.fp.write(f"{' '.join(str(self).split())}\n")  # tqdm pads its numbers
        self.fp.flush()


def progress_bar(
    *,
    total: float,
    doing: str,
    unit: str,
    initial: float = 0,
    unit_scale: bool = False,
    stays: bool = True,
    shown: bool = True,
) -> tqdm[Any]:
    """A progress bar on standard error, with the time left; its ``update`` moves it.

    Args:
        total: of the work, in units.
        doing: what it says in front.
        unit: of the work, in the plural.
        initial: done before.
        unit_scale: write large numbers as 1.2M.
        stays: whether it is still there when the work is done.
        shown: whether it is shown at all.
    """
    kind: type[tqdm[Any]] = tqdm if sys.stderr.isatty() else _Lines
    if "ipykernel" in sys.modules:  # a notebook: no terminal, and yet watched
        from tqdm.auto import tqdm as kind
    return kind(
        total=total,
        desc=doing,
        unit=f" {unit}",
        initial=initial,
        unit_scale=unit_scale,
        leave=stays,
        disable=not shown,
    )
