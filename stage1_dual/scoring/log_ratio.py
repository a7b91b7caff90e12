"""The implicit reward of a preference-tuned policy: scale (log pi_tuned(y|x) - log pi_ref(y|x))."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.messages import plain_messages
from pipeline.contracts.section import Dtype
from stage1_dual.chat_templates import read_template, render_chat, template_file
from stage1_dual.checkpoints import check_template, is_text_template
from stage1_dual.sampling.rendering import load_tokenizer, read_max_positions, with_one_bos
from stage1_dual.scoring.calibration import Calibration, calibrate
from stage1_dual.scoring.loading import load_model, resolve_device
from stage1_dual.scoring.logprobs import TokenIds, response_logp
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.texts import check_max_length
from stage1_dual.scoring.user_tables import open_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
_Sequence = tuple[TokenIds, TokenIds]


class LogRatioScorer:
    """Scores with the log-ratio of two policies on the token ids that were sampled (PeCAN, arXiv 2405.19544, 4.2).

    Both models are held on the device at once: twice the weights of one policy, and no loading between batches. Both
    compute in one arithmetic, so that a sampler's own log-probabilities never enter the ratio. A log-probability of
    part of a response is not one: a sequence longer than the models read fails.

    ``scored_sha256`` is that of the token ids, prompt and response, as decimal numbers with a comma between tokens
    and a bar between the two.

    Args:
        checkpoint: folder of the tuned policy, or its id on the Hub.
        reference: of the policy it was tuned from.
        revision: of a tuned policy on the Hub.
        reference_revision: of a reference on the Hub.
        scale: what the log-ratio is multiplied with, score units per nat: the beta of the preference tuning.
        affine: from that to the user's units.
        dtype: of weights and arithmetic; softmax and sums are float32 and float64 whatever it is.
        max_length: longest prompt and response together, tokens, or None for the shorter of the models' limits.
        calibration: table of preference pairs with the columns prompt, chosen and rejected, to be judged at the start.
        min_accuracy: share of those pairs that the score must get right.
        template: how the pairs' prompts are rendered: None for the reference's chat template, the path of a chat
            template file, or a text with ``{prompt}`` and ``{completion}``, of which what comes before the completion
            counts.
        token_budget: padded tokens of a batch (speed only).
        device: torch device; ``auto`` for the accelerator that the process sees, or else its CPU.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        InputError: a model cannot be loaded, the tokenizers differ, or the pairs are wrong or too often misjudged.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        reference: str,
        revision: str | None = None,
        reference_revision: str | None = None,
        scale: float = 1.0,
        affine: Affine = Affine(),  # noqa: B008  # frozen
        dtype: Dtype = "float32",
        max_length: int | None = None,
        calibration: str | None = None,
        min_accuracy: float | None = None,
        template: str | None = None,
        token_budget: int = 4096,
        device: str = "auto",
    ) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise import_failure(
                error, package="transformers", extra="sample", purpose="scoring with transformers"
            ) from error
        check_template(template, reads_prompt=True)
        sources = ((checkpoint, revision), (reference, reference_revision))
        positions = min(read_max_positions(name, revision=version) for name, version in sources)
        self._max_length = check_max_length(max_length, positions=positions, checkpoint=checkpoint)
        tokenizers = [load_tokenizer(name, revision=version) for name, version in sources]
        require_same_tokenizer(*tokenizers, checkpoint=checkpoint, reference=reference)
        self._scale, self._affine, self._token_budget = scale, affine, token_budget
        place = resolve_device(device)
        self._models: list[Any] = [
            load_model(AutoModelForCausalLM, name, revision=version, dtype=dtype).to(place)
            for name, version in sources
        ]
        self._vocab_size = min(model.config.get_text_config().vocab_size for model in self._models)
        self._description: dict[str, object] = {
            "scorer": "log_ratio",
            "model": checkpoint,
            "revision": revision,
            "reference": reference,
            "reference_revision": reference_revision,
            "dtype": dtype,
            "max_length": self._max_length,
            "outputs": [{"scale": scale, "affine": asdict(affine)}],
        }
        if calibration is not None:
            found = self._calibrate(Path(calibration), tokenizers[1], template)
            self._description["calibration"] = {"table": calibration, **asdict(found)}
            if min_accuracy is not None and found.accuracy < min_accuracy:
                raise InputError(
                    f"{checkpoint} gets {found.accuracy:.3f} of the {found.n_pairs} pairs of {calibration} right; "
                    f"`min_accuracy` is {min_accuracy}: its log-ratio is not the preference that the pairs show"
                )

    def score(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """One result a row, in the order of the rows; equal sequences are computed once."""
        sequences = [self._sequence(row) for row in rows]
        distinct = list(dict.fromkeys(pair for pair in sequences if not isinstance(pair, RowFailure)))
        scores: dict[_Sequence, Score] = {}
        if distinct:
            for pair, raw in zip(distinct, self._ratios(distinct).tolist(), strict=True):
                scores[pair] = Score((self._affine.apply(raw),), _sha256(pair), truncated=False)
        return [pair if isinstance(pair, RowFailure) else scores[pair] for pair in sequences]

    def describe(self) -> Mapping[str, object]:
        """The resolved settings of the scorer, JSON-serialisable; with the calibration where there is one."""
        return self._description

    def close(self) -> None:
        """Free the models."""
        self._models = []

    def _sequence(self, row: ScoreRequest) -> _Sequence | RowFailure:
        prompt, response = tuple(map(int, row.prompt_token_ids)), tuple(map(int, row.completion_token_ids))
        if not prompt or not response:
            return RowFailure("the sample has no token ids; a log-ratio is computed on those that were drawn")
        if len(prompt) + len(response) > self._max_length:
            return RowFailure(
                f"prompt and response have {len(prompt) + len(response)} tokens; the scorer reads {self._max_length}"
            )
        if not 0 <= min(*prompt, *response) <= max(*prompt, *response) < self._vocab_size:
            return RowFailure(f"a token id is not below the {self._vocab_size} entries of the models' vocabulary")
        return prompt, response

    def _ratios(self, sequences: Sequence[_Sequence]) -> np.ndarray:
        tuned, reference = (response_logp(model, sequences, token_budget=self._token_budget) for model in self._models)
        values: np.ndarray = self._scale * (tuned - reference)
        return values

    def _calibrate(self, path: Path, tokenizer: PreTrainedTokenizerBase, template: str | None) -> Calibration:
        pairs = read_pairs(path)
        prompts = [_render_prompt(tokenizer, messages, template) for messages, _, _ in pairs]
        end = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        sequences: list[_Sequence] = []
        for side in (1, 2):
            texts = [str(pair[side]) for pair in pairs]
            encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
            sequences += [(prompt, (*ids, *end)) for prompt, ids in zip(prompts, encoded, strict=True)]
        long = sum(len(prompt) + len(response) > self._max_length for prompt, response in sequences)
        if long:
            raise InputError(f"{path}: {long} of its responses do not fit the scorer's {self._max_length} tokens")
        ratios = self._ratios(sequences)
        return calibrate(ratios[: len(pairs)], ratios[len(pairs) :])


def read_pairs(path: Path) -> list[tuple[list[dict[str, str]], str, str]]:
    """Preference pairs as (prompt messages, chosen text, rejected text).

    The columns ``prompt``, ``chosen`` and ``rejected`` hold texts, or lists of messages with ``role`` and ``content``.

    Raises:
        InputError: a column is missing, or a cell is neither; names the row.
    """
    table = open_table(path, PAIR_COLUMNS, setting="calibration")
    pairs = []
    for number, row in enumerate(table.rows(PAIR_COLUMNS)):
        place = f"{path}, row {number}"
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(messages, list) or not messages:
            raise InputError(f"{place}: the prompt is {prompt!r}; it must be a text or a list of messages")
        messages = plain_messages(messages, place=place)
        chosen, rejected = (_response(row[name], place=f"{place}, {name}") for name in PAIR_COLUMNS[1:])
        pairs.append((messages, chosen, rejected))
    return pairs


def _response(cell: Any, *, place: str) -> str:
    if isinstance(cell, list) and len(cell) == 1:
        cell = plain_messages(cell, place=place)[0]["content"]
    if not isinstance(cell, str):
        raise InputError(f"{place}: the response is {cell!r}; it must be a text or a list of one message")
    return cell


def _render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], template: str | None
) -> TokenIds:
    if template is not None and is_text_template(template):
        if len(messages) != 1:
            raise InputError(f"a pair's prompt has {len(messages)} messages; a text template takes prompts of one")
        text = template.split("{completion}")[0].replace("{prompt}", messages[0]["content"])
    else:
        path = None if template is None else template_file(template)
        text = render_chat(
            tokenizer,
            messages,
            chat_template=None if path is None else read_template(path, setting="template"),
            add_generation_prompt=True,
        )
    return with_one_bos(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id)


def require_same_tokenizer(
    tuned: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, checkpoint: str, reference: str
) -> None:
    """Raise InputError where two tokenizers give a token another id, or one of them has a token more."""
    mine, theirs = tuned.get_vocab(), other.get_vocab()
    if mine == theirs:
        return
    differing = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    raise InputError(
        f"the tokenizers of {checkpoint} and of the reference {reference} differ in {len(differing)} tokens "
        f"(first: {differing[0]!r}); a log-ratio compares the same token ids under both"
    )


def _sha256(pair: _Sequence) -> str:
    text = "|".join(",".join(map(str, part)) for part in pair)
    return hashlib.sha256(text.encode()).hexdigest()
