"""What every section of settings has in common: frozen, no unknown names, suggestions for misspelt ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]
"""Of a model's weights and arithmetic."""
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Settings that belong together: frozen, every name known, no NaN and no infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error about an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"
