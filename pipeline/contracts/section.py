"""What every section of settings has in common: frozen, no unknown names, suggestions for misspelt ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Dtype = Literal["float32", "bfloat16", "float16"]
"""Of a model's weights and arithmetic."""
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of settings: it cannot be changed, and knows every name that may stand in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_for_a_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` where a number is meant, which Python takes for 1."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if bool not in (annotation, *get_args(annotation)) and Any not in (annotation, *get_args(annotation)):
                raise ValueError("it must not be true or false")
        return value


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error about an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"
