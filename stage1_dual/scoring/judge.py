"""Ratings by a causal language model in this process: read off the probabilities of the next token."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.contracts.errors import InputError, import_failure
from pipeline.contracts.section import Dtype
from stage1_dual.chat_templates import render_chat, require_repeatable
from stage1_dual.checkpoints import check_causal_checkpoint
from stage1_dual.sampling.rendering import load_tokenizer, read_max_positions, with_one_bos
from stage1_dual.scoring.checked_network import CheckedNetwork
from stage1_dual.scoring.loading import load_model, resolve_device
from stage1_dual.scoring.outputs import Affine
from stage1_dual.scoring.protocol import RowFailure, Score, ScoreRequest
from stage1_dual.scoring.rubrics import Question
from stage1_dual.scoring.shared_prefix import PaddingCounts, can_share, iterate_forward, shared_lengths
from stage1_dual.scoring.text_scores import TextNetwork
from stage1_dual.scoring.texts import check_max_length
from stage1_dual.scoring.vllm_next_token import VllmNextToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Engine = Literal["transformers", "vllm"]


class JudgeScorer:
    """Rates responses with a causal language model, one forward pass a text and no drawing.

    The value is what :class:`~stage1_dual.scoring.rubrics.AnswerScale` makes of the probabilities, under the softmax
    over the whole vocabulary, of the first token of each answer. The same row has the same value whenever it is
    scored, up to rounding. A text longer than the judge reads fails: without its front it would lack the rubric.

    ``scored_sha256`` is that of the rendered text, answer prefix included.

    Args:
        checkpoint: folder of the judge, or its id on the Hub.
        question: what it is asked.
        affine: from the judge's number to the user's units.
        revision: of a judge on the Hub.
        dtype: of weights and arithmetic; the softmax is float64 whatever it is.
        max_length: longest text, tokens, or None for the model's own limit.
        token_budget: padded tokens of a batch (speed only).
        engine: what computes the probabilities. With ``vllm`` transformers still computes those that are checked, so
            that the weights are held twice.
        checked_share: share of the texts that ``vllm`` is checked on.
        engine_limit: as :class:`~stage1_dual.scoring.checked_network.CheckedNetwork` takes it, of log-probabilities.
        device: torch device; ``auto`` for the accelerator that the process sees, or else its CPU.

    Raises:
        MissingExtraError: torch, transformers or the engine is not installed.
        InputError: the judge cannot be loaded, has no chat template where one is needed, or two answers of different
            values begin with the same token.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        question: Question,
        affine: Affine = Affine(),  # noqa: B008  # frozen
        revision: str | None = None,
        dtype: Dtype = "float32",
        max_length: int | None = None,
        token_budget: int = 4096,
        engine: Engine = "transformers",
        checked_share: float = 0.02,
        engine_limit: float = 1e-4,
        device: str = "auto",
    ) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise import_failure(
                error, package="transformers", extra="sample", purpose="scoring with transformers"
            ) from error
        check_causal_checkpoint(checkpoint, revision=revision)
        self._reader = JudgeReader(load_tokenizer(checkpoint, revision=revision), question)
        positions = read_max_positions(checkpoint, revision=revision)
        self._max_length = check_max_length(max_length, positions=positions, checkpoint=checkpoint)
        model = load_model(AutoModelForCausalLM, checkpoint, revision=revision, dtype=dtype)
        wanted = self._reader.first_token_ids
        trusted = NextToken(model.to(resolve_device(device)), wanted=wanted, token_budget=token_budget)
        self._network: TextNetwork | None = trusted
        self._affine = affine
        self._vllm: VllmNextToken | None = None
        if engine == "vllm":
            # The token that vLLM draws, and nobody reads, has a position too.
            self._max_length = min(self._max_length, positions - 1)
            self._vllm = VllmNextToken(
                checkpoint,
                wanted=wanted,
                revision=revision,
                dtype=dtype,
                max_length=self._max_length,
                token_budget=token_budget,
            )
            self._network = CheckedNetwork(
                self._vllm,
                trusted,
                share=checked_share,
                limit=engine_limit,
                cut=tuple,
                names=("vLLM", "transformers", "engine_limit"),
            )
        self._description = {
            "engine": engine,
            "scorer": "judge",
            "model": checkpoint,
            "dtype": dtype,
            "max_length": self._max_length,
            "answer_tokens": self._reader.answer_tokens,
            "outputs": [{**question.describe(), "affine": asdict(affine)}],
        }

    def score(self, rows: Sequence[ScoreRequest]) -> list[Score | RowFailure]:
        """One result a row, in the order of the rows; equal texts are computed once."""
        read = self._reader.read(rows, max_length=self._max_length)
        distinct = {text.token_ids: text for text in read if isinstance(text, JudgeText)}
        assert self._network is not None
        logp = np.empty((0, 0))
        if distinct:
            logp = self._network.logits(list(distinct), [text.prompt_id for text in distinct.values()])
        values = {ids: self._value(logp_a) for ids, logp_a in zip(distinct, logp, strict=True)}
        return [text if isinstance(text, RowFailure) else _score(text, values[text.token_ids]) for text in read]

    def describe(self) -> Mapping[str, object]:
        """The resolved settings of the judge, JSON-serialisable, with the tokens that its answers begin with."""
        return self._description

    def close(self) -> None:
        """Free the model and the engine."""
        self._network = None
        if self._vllm is not None:
            self._vllm.close()
            self._vllm = None

    def _value(self, logp_a: np.ndarray) -> float | RowFailure:
        try:
            return self._affine.apply(self._reader.value_of(logp_a))
        except InputError as error:
            return RowFailure(str(error))


def _score(text: JudgeText, value: float | RowFailure) -> Score | RowFailure:
    return value if isinstance(value, RowFailure) else Score((value,), text.sha256, truncated=False)


@dataclass(frozen=True)
class JudgeText:
    """One text as a judge reads it.

    Attributes:
        token_ids: what the model reads, at least one token.
        sha256: of the text, UTF-8.
        prompt_id: of the prompt; texts of one prompt may begin alike.
    """

    token_ids: tuple[int, ...]
    sha256: str
    prompt_id: str


class JudgeReader:
    """From rows to the tokens a judge reads, and from probabilities of its next token to its number.

    Args:
        tokenizer: of the judge.
        question: what it is asked.

    Raises:
        InputError: there is no chat template where one is needed, or the answers cannot be told apart by their first
            token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, question: Question) -> None:
        self._tokenizer, self._question = tokenizer, question
        self._as_chat = question.as_message or question.rubric is None
        if self._as_chat:
            if not tokenizer.chat_template:
                raise InputError(
                    f"the tokenizer of {tokenizer.name_or_path} has no chat template; `as_message: false` has the "
                    "judge go on from the filled rubric as it stands"
                )
            require_repeatable(str(tokenizer.chat_template), setting="model")
        self._value_of_token = self._find_answers()

    @property
    def first_token_ids(self) -> list[int]:
        """The tokens that answers begin with."""
        return list(self._value_of_token)

    @property
    def answer_tokens(self) -> dict[str, float]:
        """Those tokens by their texts, each with the value of the answers that begin with it."""
        return {
            f"{token} {self._tokenizer.convert_ids_to_tokens(token)}": value
            for token, value in self._value_of_token.items()
        }

    def read(self, rows: Sequence[ScoreRequest], *, max_length: int) -> list[JudgeText | RowFailure]:
        """One text a row, in the order of the rows."""
        rendered: list[str | RowFailure] = []
        for row in rows:
            try:
                text = self._render(row)
                text.encode()
                rendered.append(text)
            except (InputError, UnicodeEncodeError) as error:
                rendered.append(RowFailure(str(error)))
        distinct = list(dict.fromkeys(text for text in rendered if isinstance(text, str)))
        ids = dict(zip(distinct, self._encode(distinct), strict=True))
        found: list[JudgeText | RowFailure] = []
        for row, one in zip(rows, rendered, strict=True):
            if isinstance(one, RowFailure):
                found.append(one)
            elif len(ids[one]) > max_length:
                found.append(RowFailure(f"the judge's text has {len(ids[one])} tokens; it reads {max_length}"))
            else:
                found.append(JudgeText(ids[one], hashlib.sha256(one.encode()).hexdigest(), row.prompt_id))
        return found

    def value_of(self, logp_a: np.ndarray) -> float:
        """The judge's number, from the log-probabilities of the first tokens, in their order, shape (answers,).

        Raises:
            InputError: it is no answer, see :meth:`~stage1_dual.scoring.rubrics.AnswerScale.value_of`.
        """
        total: dict[float, float] = {}
        for value, logp in zip(self._value_of_token.values(), logp_a.tolist(), strict=True):
            total[value] = float(np.logaddexp(total.get(value, -math.inf), logp))
        return self._question.scale.value_of(total)

    def _render(self, row: ScoreRequest) -> str:
        conversation = self._question.conversation(row)
        if not self._as_chat:
            return conversation[0]["content"] + self._question.prefix
        text = render_chat(
            self._tokenizer,
            conversation,
            chat_template=None,
            add_generation_prompt=True,
            template_name="the judge's chat template",
            prompt_name=f"prompt {row.prompt_id}",
        )
        return text + self._question.prefix

    def _encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=not self._as_chat,
            truncation=False,
            verbose=False,
            return_attention_mask=False,
        )["input_ids"]
        end = self._tokenizer.eos_token_id
        # Some tokenizers end whatever they encode with an EOS, after which no answer begins.
        open_ended = [ids[:-1] if not self._as_chat and ids and ids[-1] == end else ids for ids in encoded]
        return [with_one_bos(ids, self._tokenizer.bos_token_id) for ids in open_ended]

    def _find_answers(self) -> dict[int, float]:
        """The value of each token that an answer begins with, where it follows the judge's text.

        An answer is tokenised where it stands, behind a text of a made-up row: by itself it may be other tokens.
        """
        rubric, scale = self._question.rubric, self._question.scale
        columns = rubric.info_columns if rubric is not None else ()
        row = ScoreRequest("", 0, [{"role": "user", "content": "x"}], "x", info=dict.fromkeys(columns or ("x",), "x"))
        text = self._render(row)
        before, *after = self._encode([text, *(text + answer for answer, _ in scale.answers)])
        values: dict[int, float] = {}
        owner: dict[int, str] = {}
        for (answer, value), ids in zip(scale.answers, after, strict=True):
            if ids[: len(before)] != before or len(ids) == len(before):
                raise InputError(
                    f"`answers` has {answer!r}, which the judge's tokenizer joins with what stands before it; let the "
                    "rubric (or `answer_prefix`) end, or the answer begin, with the blank between them"
                )
            token = ids[len(before)]
            if values.setdefault(token, value) != value:
                raise InputError(
                    f"`answers` has {owner[token]!r} and {answer!r} of different values, and both begin with the "
                    f"token {self._tokenizer.convert_ids_to_tokens(token)!r}: the judge's next token does not tell "
                    "them apart"
                )
            owner.setdefault(token, answer)
        return values


class NextToken:
    """Log-probabilities of some tokens as the next one of a text, by transformers: :func:`next_token_logp`.

    Args:
        model: a causal language model of transformers, on its device.
        wanted: the tokens.
        token_budget: padded tokens of a batch (speed only).
    """

    def __init__(self, model: Any, *, wanted: Sequence[int], token_budget: int) -> None:
        self._model, self._wanted, self._token_budget = model, tuple(wanted), token_budget
        self.counts = PaddingCounts()

    def logits(self, token_ids: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> np.ndarray:
        """Log-probability of each wanted token behind each text, nats, float64, shape (n, wanted)."""
        return next_token_logp(
            self._model, token_ids, groups=groups, token_ids=self._wanted, token_budget=self._token_budget
        )


def next_token_logp(
    model: Any,
    texts: Sequence[Sequence[int]],
    *,
    groups: Sequence[Hashable],
    token_ids: Sequence[int],
    token_budget: int,
) -> np.ndarray:
    """Log-probability of some tokens as the next one of each text, nats, float64, shape (n, tokens).

    The logits of a text's last token alone are computed, by the model's own head with whatever it does to them. One
    call at a time: the head is hooked meanwhile.

    Args:
        model: a causal language model of transformers, on its device.
        texts: token ids of each, at least one.
        groups: texts of one group may begin alike.
        token_ids: the tokens.
        token_budget: padded tokens of a batch (speed only).
    """
    import torch

    logp = np.empty((len(texts), len(token_ids)))
    shared = shared_lengths(texts, groups) if can_share(model) else [0] * len(texts)
    wanted = torch.tensor(list(token_ids), device=model.device)
    lengths: list[int] = []

    def keep_last(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the head the last hidden state of each row, as (rows, 1, width)."""
        (hidden,) = inputs
        return (hidden[torch.arange(len(lengths)), torch.tensor(lengths) - 1][:, None],)

    def announce(row_lengths: Sequence[int]) -> None:
        lengths[:] = row_lengths

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_last)
    try:
        with torch.inference_mode():
            for places, output, _, _ in iterate_forward(
                model, texts, shared=shared, token_budget=token_budget, device=model.device, announce=announce
            ):
                last = output.logits[:, 0].double()
                logp[places] = (last[:, wanted] - last.logsumexp(dim=-1, keepdim=True)).cpu().numpy()
    finally:
        hook.remove()
    return logp
