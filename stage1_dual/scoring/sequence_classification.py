"""Scores from a sequence classifier: one logit of ``AutoModelForSequenceClassification``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pipeline.contracts.errors import InputError, MissingExtraError
from stage1_dual.checkpoints import check_head, check_scorer_checkpoint, is_local
from stage1_dual.sampling.prompts import load_tokenizer, read_max_positions
from stage1_dual.scoring.batches import batches_by_tokens
from stage1_dual.scoring.protocol import Score, ScoreRow
from stage1_dual.scoring.templates import ScorerTemplate

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]


class SequenceClassificationScorer:
    """Scores with one raw logit of a classifier: no activation, no change of sign.

    A score is what the model's own forward pass gives for the row's text alone: batches are masked, and padded on the
    right so that the model pools the same token as without padding. A text longer than ``max_length`` keeps its BOS
    and its end, where the response and the pooled token are, and its score is flagged as truncated.

    Args:
        checkpoint: folder of a sequence classifier, or its id on the Hub.
        revision: branch, tag or commit of a Hub model.
        template: see :class:`~stage1_dual.scoring.templates.ScorerTemplate`.
        head: index of the logit.
        dtype: of weights and arithmetic; the classification head is float32 whatever it is.
        max_length: longest text in tokens, or None for the model's own limit.
        token_budget: padded tokens of a batch (speed only).
        device: torch device.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        InputError: the checkpoint does not fit, or a weight is missing, unexpected or of another shape.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        revision: str | None = None,
        template: str | None = None,
        head: int = 0,
        dtype: Dtype = "float32",
        max_length: int | None = None,
        token_budget: int = 4096,
        device: str = "cpu",
    ) -> None:
        check_scorer_checkpoint(checkpoint, head=head, template=template, revision=revision)
        positions = read_max_positions(checkpoint, revision=revision)
        if max_length is not None and not 1 < max_length <= positions:
            raise InputError(f"`max_length` is {max_length}; {checkpoint} reads texts of 2 to {positions} tokens")
        self._checkpoint = checkpoint
        self._revision = revision
        self._head = head
        self._dtype = dtype
        self._max_length = max_length if max_length is not None else positions
        self._token_budget = token_budget
        tokenizer = load_tokenizer(checkpoint, revision=revision)
        self._bos_token_id = tokenizer.bos_token_id
        self._template = ScorerTemplate(tokenizer, template)
        self._model: Any = _load_classifier(checkpoint, revision=revision, dtype=dtype)
        check_head(head, num_labels=self._model.config.num_labels, checkpoint=checkpoint)
        self._model.to(device)

    def score(self, rows: Sequence[ScoreRow]) -> list[Score]:
        """One score a row, in the order of the rows; equal texts are computed once."""
        texts = [self._template.render(row) for row in rows]
        distinct = list(dict.fromkeys(texts))
        scores = dict(zip(distinct, self._score_texts(distinct), strict=True))
        return [scores[text] for text in texts]

    def describe(self) -> Mapping[str, object]:
        """The resolved settings of the scorer, JSON-serialisable."""
        return {
            "scorer": "sequence_classification",
            "model": self._checkpoint,
            "revision": self._revision,
            "head": self._head,
            "num_labels": self._model.config.num_labels,
            "dtype": self._dtype,
            "max_length": self._max_length,
            "template_sha256": self._template.sha256,
        }

    def close(self) -> None:
        """Free the model."""
        self._model = None

    def _score_texts(self, texts: Sequence[str]) -> list[Score]:
        import torch

        whole = self._template.encode(texts)
        read = [self._fit(ids) for ids in whole]
        values = [0.0] * len(texts)
        with torch.inference_mode():
            for places in batches_by_tokens([len(ids) for ids in read], token_budget=self._token_budget):
                logits = self._logits([read[place] for place in places])
                for place, value in zip(places, logits.tolist(), strict=True):
                    values[place] = value
        return [
            Score(value, hashlib.sha256(text.encode()).hexdigest(), truncated=len(kept) < len(ids))
            for text, ids, kept, value in zip(texts, whole, read, values, strict=True)
        ]

    def _fit(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        if len(token_ids) <= self._max_length:
            return token_ids
        front = token_ids[:1] if token_ids[0] == self._bos_token_id else ()
        return (*front, *token_ids[len(token_ids) - self._max_length + len(front) :])

    def _logits(self, token_ids: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """The wanted logit of each row of a batch, (rows,), float64."""
        import torch

        config = self._model.config.get_text_config()
        # The model pools the last token that is not the padding id. Without such an id it pools the last token of a
        # single text, as it does here with an id that ends no row. Where that id is the EOS too, it passes over
        # trailing EOS, in a padded batch as in a single text.
        filler = config.pad_token_id if config.pad_token_id is not None else _id_that_ends_none(token_ids)
        longest = max(len(ids) for ids in token_ids)
        tokens = torch.tensor([[*ids, *[filler] * (longest - len(ids))] for ids in token_ids])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in token_ids])
        before, config.pad_token_id = config.pad_token_id, filler
        try:
            logits: torch.Tensor = self._model(
                input_ids=tokens.to(self._model.device), attention_mask=mask.to(self._model.device)
            ).logits
        finally:
            config.pad_token_id = before
        return logits[:, self._head].double().cpu()


def _load_classifier(checkpoint: str, *, revision: str | None, dtype: Dtype) -> Any:
    try:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification
    except ImportError as error:
        raise MissingExtraError(
            package=error.name or "transformers", extra="sample", purpose="scoring with transformers"
        ) from error
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            checkpoint,
            revision=revision,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=is_local(checkpoint),
            ignore_mismatched_sizes=True,  # reported below, with the others
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"transformers cannot load the scorer {checkpoint}: {error}") from error
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in loading[f"{kind}_keys"])
        if keys:
            raise InputError(
                f"the scorer {checkpoint} has {len(keys)} {kind} weights ({', '.join(keys[:3])}): "
                f"{type(model).__name__} would not be the trained model"
            )
    model.eval()
    model.config.use_cache = False  # of keys and values, which nothing here reads again
    if dtype != "float32":
        _compute_head_in_float32(model)
    return model


def _compute_head_in_float32(model: Any) -> None:
    """Logits rounded to bfloat16 take few distinct values; the head is small enough to be exact."""
    import torch

    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    if not isinstance(head, torch.nn.Module):
        raise InputError(f"{type(model).__name__} has neither `score` nor `classifier`; score with dtype float32")
    head.float()
    head.register_forward_pre_hook(lambda _, inputs: tuple(part.float() for part in inputs))


def _id_that_ends_none(token_ids: Sequence[Sequence[int]]) -> int:
    last = {ids[-1] for ids in token_ids}
    return next(token for token in range(len(last) + 1) if token not in last)
