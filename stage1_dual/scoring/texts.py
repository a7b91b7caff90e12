"""From rows to the tokens a scorer reads: one template, one BOS, never a silent cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.protocol import RowFailure, ScoreRequest
from stage1_dual.scoring.templates import ScorerTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverLength = Literal["flag", "fail"]


@dataclass(frozen=True)
class ReadText:
    """One text as a scorer reads it.

    Attributes:
        token_ids: what the model reads, at least one token.
        sha256: of the whole rendered text, UTF-8.
        truncated: whether the front of the text was left out.
        prompt_id: of the prompt; texts of one prompt begin alike.
    """

    token_ids: tuple[int, ...]
    sha256: str
    truncated: bool
    prompt_id: str


class TextReader:
    """Renders, tokenises and fits texts to a length.

    A text longer than ``max_length`` keeps its BOS and its end, where the response and the pooled token are, and is
    flagged (``over_length="flag"``), or its row fails (``"fail"``).

    Args:
        tokenizer: of the scorer.
        template: as :class:`~stage1_dual.scoring.templates.ScorerTemplate` takes it.
        max_length: longest text, tokens.
        over_length: what becomes of a longer one.

    Raises:
        InputError: there is no such template, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        *,
        max_length: int,
        over_length: OverLength,
    ) -> None:
        self._template = ScorerTemplate(tokenizer, template)
        self._max_length = max_length
        self._over_length = over_length
        self._bos_token_id = tokenizer.bos_token_id

    def describe(self) -> dict[str, object]:
        """How texts are read, JSON-serialisable."""
        return {
            "max_length": self._max_length,
            "over_length": self._over_length,
            "template_sha256": self._template.sha256,
        }

    def read(self, rows: Sequence[ScoreRequest]) -> list[ReadText | RowFailure]:
        """One text a row, in the order of the rows; equal texts of a prompt are one object."""
        rendered = [self._render(row) for row in rows]
        distinct = {
            (row.prompt_id, text): None for row, text in zip(rows, rendered, strict=True) if isinstance(text, str)
        }
        encoded = self._template.encode([text for _, text in distinct])
        read = {key: self._fit(key[1], ids, prompt_id=key[0]) for key, ids in zip(distinct, encoded, strict=True)}
        return [
            read[row.prompt_id, text] if isinstance(text, str) else text
            for row, text in zip(rows, rendered, strict=True)
        ]

    def _render(self, row: ScoreRequest) -> str | RowFailure:
        try:
            text = self._template.render(row)
            text.encode()
        except InputError as error:
            return RowFailure(str(error))
        except UnicodeEncodeError as error:
            return RowFailure(f"the text of prompt {row.prompt_id}, sample {row.sample_index} is not Unicode: {error}")
        return text

    def _fit(self, text: str, token_ids: tuple[int, ...], *, prompt_id: str) -> ReadText | RowFailure:
        if not token_ids:
            return RowFailure(f"the rendered text of prompt {prompt_id} has no tokens")
        kept = token_ids
        if len(token_ids) > self._max_length:
            if self._over_length == "fail":
                return RowFailure(f"the text has {len(token_ids)} tokens; the scorer reads {self._max_length}")
            front = token_ids[:1] if token_ids[0] == self._bos_token_id else ()
            kept = (*front, *token_ids[len(token_ids) - self._max_length + len(front) :])
        return ReadText(kept, hashlib.sha256(text.encode()).hexdigest(), len(kept) < len(token_ids), prompt_id)


def check_max_length(max_length: int | None, *, positions: int, checkpoint: str) -> int:
    """The longest text a scorer reads, tokens.

    Raises:
        InputError: more than the model has positions for.
    """
    if max_length is not None and not 1 < max_length <= positions:
        raise InputError(f"`max_length` is {max_length}; {checkpoint} reads texts of 2 to {positions} tokens")
    return max_length if max_length is not None else positions
