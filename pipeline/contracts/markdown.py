"""What users wrote, in the Markdown of our cards."""

from __future__ import annotations

import re

from pipeline.contracts.errors import printable

_MARKS = re.compile(r"([\\`*_\[\]<>|~&$])")


def plain_markdown(value: object) -> str:
    """A value as running text or a table's cell, on one line: nothing in it is markup, HTML, a link or a formula."""
    return _MARKS.sub(r"\\\1", _one_line(value))


def code_markdown(value: object) -> str:
    """A value as code on one line, in a table too, where a bar is a bar only behind a backslash."""
    text = _one_line(value).replace("|", r"\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _one_line(value: object) -> str:
    return " ".join(printable(str(value)).split())
