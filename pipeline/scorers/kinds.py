"""The one table of the kinds of scorer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from pipeline.scorers.column import ColumnSettings, check_column, column_identity, start_column
from pipeline.scorers.kind import TOKEN_IDS, ScorerBase, ScorerKind
from pipeline.scorers.log_ratio import LogRatioSettings, check_log_ratio, log_ratio_identity, start_log_ratio
from pipeline.scorers.python_function import PythonSettings, check_function, function_identity, start_function
from pipeline.scorers.safe_rlhf_score import SafeRlhfSettings, check_score_model, start_score_model
from pipeline.scorers.sequence_classification import SequenceClassificationSettings, check_classifier, start_classifier
from pipeline.scorers.text_models import same_text, text_identity

SCORER_SETTINGS: Mapping[str, type[ScorerBase]] = {
    "sequence_classification": SequenceClassificationSettings,
    "safe_rlhf_score": SafeRlhfSettings,
    "log_ratio": LogRatioSettings,
    "python": PythonSettings,
    "column": ColumnSettings,
}
"""The settings of each kind of scorer; a further kind is a row here and in ``ScorerSettings``."""


def _scorer_kind(scorer: Any) -> Any:
    if isinstance(scorer, Mapping):
        return scorer.get("kind", "sequence_classification")
    return getattr(scorer, "kind", None)


ScorerSettings = Annotated[
    Annotated[SequenceClassificationSettings, Tag("sequence_classification")]
    | Annotated[SafeRlhfSettings, Tag("safe_rlhf_score")]
    | Annotated[LogRatioSettings, Tag("log_ratio")]
    | Annotated[PythonSettings, Tag("python")]
    | Annotated[ColumnSettings, Tag("column")],
    Discriminator(_scorer_kind),
]
"""A score. Its bound, and whether it is one from below or from above, belong to the constraint that uses it."""


KINDS: Mapping[str, ScorerKind] = {
    "sequence_classification": ScorerKind(check_classifier, same_text, text_identity, start_classifier),
    "safe_rlhf_score": ScorerKind(check_score_model, same_text, text_identity, start_score_model),
    "log_ratio": ScorerKind(check_log_ratio, None, log_ratio_identity, start_log_ratio, lambda _: TOKEN_IDS),
    "python": ScorerKind(
        check_function, None, function_identity, start_function, lambda _: TOKEN_IDS, uses_device=False
    ),
    "column": ScorerKind(
        check_column,
        None,
        column_identity,
        start_column,
        lambda settings: (settings.column,) if settings.table is None else (),
        uses_device=False,
    ),
}
