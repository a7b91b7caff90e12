"""The one table of the kinds of scorer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

from pydantic import Discriminator, GetCoreSchemaHandler, Tag
from pydantic_core import CoreSchema

from pipeline.scorers.column import ColumnSettings
from pipeline.scorers.judge import JudgeSettings
from pipeline.scorers.kind import ScorerSettings
from pipeline.scorers.log_ratio import LogRatioSettings
from pipeline.scorers.python_function import PythonSettings
from pipeline.scorers.safe_rlhf_score import SafeRlhfSettings
from pipeline.scorers.sequence_classification import SequenceClassificationSettings

KINDS: dict[str, type[ScorerSettings]] = {
    kind.kind_name(): kind
    for kind in (
        SequenceClassificationSettings,
        SafeRlhfSettings,
        LogRatioSettings,
        PythonSettings,
        ColumnSettings,
        JudgeSettings,
    )
}
"""The kinds by name; a further one is a row here."""

DEFAULT_KIND = SequenceClassificationSettings.kind_name()
"""The kind of a scorer whose recipe does not say."""


def kind_of(scorer: Mapping[str, Any]) -> type[ScorerSettings] | None:
    """The kind of a scorer as the recipe writes it; None where there is no such kind."""
    return KINDS.get(_kind_name(scorer))


def _kind_name(scorer: Mapping[str, Any]) -> str:
    return str(scorer.get("kind", DEFAULT_KIND))


def _tag(scorer: Any) -> str | None:
    if isinstance(scorer, ScorerSettings):
        return scorer.kind_name()
    return _kind_name(scorer) if isinstance(scorer, Mapping) else None


class _OfItsKind:
    """Validates a scorer by the settings of its kind, and no others: a fault is of that kind alone."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        del source
        rows = tuple(Annotated[kind, Tag(name)] for name, kind in KINDS.items())
        return handler.generate_schema(Annotated[Union[rows], Discriminator(_tag)])  # noqa: UP007  # no `|` of a tuple


AnyScorerSettings = Annotated[ScorerSettings, _OfItsKind()]
"""A scorer of any kind of the table."""
