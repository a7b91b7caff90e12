"""Published reward models whose heads are more than one matrix, from the format of their checkpoints.

Their authors publish them with code of their own, which is never run here. The formats, as the published
configurations, weights and model cards have them:

*Two layers* (Qwen/Qwen2.5-Math-RM-72B, architecture ``Qwen2ForRewardModel``; infly/INF-ORM-Llama3.1-70B, architecture
``INFORMForSequenceClassification``): a decoder under ``model.``; ``score.0.weight`` (width, width), ``score.0.bias``,
``score.2.weight`` (labels, width), ``score.2.bias``, with a ReLU between the two. A text's score is that of its last
token that is not padding. A ``lm_head.weight`` may be left over from the language model.

*Gated objectives* (RLHFlow/ArmoRM-Llama3-8B-v0.1, arXiv 2406.12845, architecture ``LlamaForRewardModelWithGating``): a
Llama under ``model.``; ``regression_layer.weight`` (objectives, width), ``reward_transform_matrix`` (objectives,
objectives), ``gating.logit_scale`` (1), ``gating.layers.N.weight`` and ``.bias``, of which ``gating_n_hidden`` have
``gating_hidden_dim`` outputs and the last as many as there are objectives. config.json: ``num_objectives``,
``gating_temperature``, ``gating_hidden_dim``, ``gating_n_hidden``.

* The objectives r are ``regression_layer`` on the last token of the text.
* The gate reads the prompt alone: the hidden state where the last :data:`RESPONSE_HEADER` begins, through its layers
  with ReLUs between them, g = logit_scale · softmax(layers(h) / temperature).
* The score is Σ_i g_i (r · reward_transform_matrix)_i.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from pipeline.contracts.errors import InputError
from stage1_dual.scoring.decoder_heads import DecoderHeads
from stage1_dual.scoring.protocol import RowFailure, ScoreRequest
from stage1_dual.scoring.shared_prefix import PaddingCounts
from stage1_dual.scoring.texts import ReadText, TextReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESPONSE_HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
"""What Llama 3's chat template writes between a prompt and its response; ArmoRM's gate reads where it begins."""


class TwoLayerRewardModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Decoder and a head of two layers, under the names of the format; the head is float32."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = {"score"}  # noqa: RUF012  # as transformers declares it
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        self.score = torch.nn.Sequential(
            torch.nn.Linear(config.hidden_size, config.hidden_size),
            torch.nn.ReLU(),
            torch.nn.Linear(config.hidden_size, config.num_labels),
        )
        self.post_init()  # type: ignore[no-untyped-call]


class Gate(torch.nn.Module):
    """The weights of the objectives, from the hidden state at the end of a prompt.

    Args:
        width: of the hidden state.
        objectives: number of weights.
        hidden: width of the layers between.
        n_hidden: number of those.
        temperature: of the softmax.
    """

    def __init__(self, width: int, objectives: int, *, hidden: int, n_hidden: int, temperature: float) -> None:
        super().__init__()
        widths = [width, *[hidden] * n_hidden, objectives]
        self.logit_scale = torch.nn.Parameter(torch.ones(1))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(before, after) for before, after in pairwise(widths))
        self._temperature = temperature

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Weights (rows, objectives) from hidden states (rows, width)."""
        *inner, last = self.layers
        for layer in inner:
            hidden = layer(hidden).relu()
        weights: torch.Tensor = (last(hidden) / self._temperature).softmax(-1) * self.logit_scale
        return weights


class GatedRewardModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Llama, objectives and gate, under the names of the format; all but the Llama is float32."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = {"regression_layer", "reward_transform_matrix", "gating"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # The defaults are those of the published class.
        objectives = int(getattr(config, "num_objectives", 19))
        self.model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        self.regression_layer = torch.nn.Linear(config.hidden_size, objectives, bias=False)
        self.reward_transform_matrix = torch.nn.Parameter(torch.eye(objectives))
        self.gating = Gate(
            config.hidden_size,
            objectives,
            hidden=int(getattr(config, "gating_hidden_dim", 1024)),
            n_hidden=int(getattr(config, "gating_n_hidden", 3)),
            temperature=float(getattr(config, "gating_temperature", 10)),
        )
        self.post_init()  # type: ignore[no-untyped-call]


class GatedNetwork:
    """Score and objectives of texts: first the score, then the objectives in their order.

    The gate's hidden state depends on the prompt alone, so that it is computed once for all of its responses. A text
    without :data:`RESPONSE_HEADER` has objectives, and NaN for a score.

    Args:
        model: on its device.
        header: :data:`RESPONSE_HEADER` in tokens.
        token_budget: padded tokens of a batch (speed only).
        share_prefixes: whether the responses to a prompt share its computation (speed only).
    """

    def __init__(
        self, model: GatedRewardModel, *, header: Sequence[int], token_budget: int, share_prefixes: bool
    ) -> None:
        settings: Mapping[str, Any] = {"token_budget": token_budget, "share_prefixes": share_prefixes}
        self._objectives = DecoderHeads(model.model, model.regression_layer, **settings)
        self._gate = DecoderHeads(model.model, model.gating, **settings)
        self._transform = model.reward_transform_matrix.detach().double().cpu().numpy()
        self._header = tuple(header)

    @property
    def counts(self) -> PaddingCounts:
        """The tokens that went through the model so far, with and without padding."""
        return self._objectives.counts + self._gate.counts

    def logits(self, token_ids: Sequence[Sequence[int]], groups: Sequence[Hashable]) -> np.ndarray:
        """Score and objectives of each text, float64, shape (n, 1 + objectives)."""
        objectives = self._objectives.logits(token_ids, groups)
        places = [find_last(ids, self._header) for ids in token_ids]
        prompts = [
            None if place is None else tuple(ids[: place + 1]) for ids, place in zip(token_ids, places, strict=True)
        ]
        distinct = list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))
        scores = np.full(len(token_ids), np.nan)
        if distinct:
            of_prompt = dict(zip(distinct, self._gate.logits(distinct, range(len(distinct))), strict=True))
            adjusted = objectives @ self._transform
            for row, prompt in enumerate(prompts):
                if prompt is not None:
                    scores[row] = of_prompt[prompt] @ adjusted[row]
        return np.column_stack([scores, objectives])


class GatedTextReader:
    """Reads texts as another reader does, and fails those in which a gate finds no prompt to read.

    Args:
        reader: from rows to tokens.
        header: :data:`RESPONSE_HEADER` in tokens.
    """

    def __init__(self, reader: TextReader, header: Sequence[int]) -> None:
        self._reader = reader
        self._header = tuple(header)

    def describe(self) -> dict[str, object]:
        """How texts are read, JSON-serialisable."""
        return self._reader.describe()

    def read(self, rows: Sequence[ScoreRequest]) -> list[ReadText | RowFailure]:
        """One text a row, in the order of the rows."""
        return [
            RowFailure(
                f"what is read of the text of prompt {row.prompt_id} has no {RESPONSE_HEADER!r}, where the gate reads "
                "the prompt: " + ("the response is too long" if text.truncated else "the template must write it")
            )
            if isinstance(text, ReadText) and find_last(text.token_ids, self._header) is None
            else text
            for row, text in zip(rows, self._reader.read(rows), strict=True)
        ]


def read_header(tokenizer: PreTrainedTokenizerBase, *, checkpoint: str) -> tuple[int, ...]:
    """:data:`RESPONSE_HEADER` in a checkpoint's tokens.

    Raises:
        InputError: the tokenizer has not the special tokens of Llama 3, so that no text has it.
    """
    absent = [
        token
        for token in ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
        if token not in tokenizer.all_special_tokens and token not in tokenizer.get_added_vocab()
    ]
    if absent:
        raise InputError(
            f"the tokenizer of {checkpoint} has no token {', '.join(absent)}; a gate in the layout of ArmoRM reads "
            f"the prompt where {RESPONSE_HEADER!r} begins"
        )
    return tuple(tokenizer.encode(RESPONSE_HEADER, add_special_tokens=False))


def find_last(token_ids: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Where the last occurrence of a pattern begins; None where there is none."""
    pattern = tuple(pattern)
    for start in range(len(token_ids) - len(pattern), -1, -1):
        if tuple(token_ids[start : start + len(pattern)]) == pattern:
            return start
    return None
