"""The score models of safe-rlhf, from the format of their checkpoints.

The repository PKU-Alignment/safe-rlhf (Apache-2.0) trains and publishes them, among others as
``PKU-Alignment/beaver-7b-v1.0-reward`` and ``-cost``; its own classes need an old transformers and DeepSpeed. The
format, as its ``safe_rlhf/models`` defines it:

* A decoder under ``model.``; ``score_head.weight`` (score_dim, hidden) and, with a bias, ``score_head.bias``;
  ``normalizer.mean`` and ``normalizer.var`` (score_dim), ``normalizer.count`` (1).
* config.json: ``score_type`` (``reward``, ``cost`` or ``critic``), ``score_dim``, ``score_bias`` (in older files
  ``bias``), ``do_normalize``, ``normalizer_type`` and ``momentum``.
* The score of a text is that of its last attended token, in float32.
* With ``do_normalize`` it is normalised by the running statistics: a reward x to (x - mean) / (std + 1e-8), a cost to
  x / (std + 1e-8), so that the sign of a cost, positive for unsafe, keeps its meaning; a critic's is left alone.
  ``normalizer_type`` and ``momentum`` only say how training updated the statistics: at inference all are alike.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from pipeline.contracts.errors import InputError

_EPSILON = 1e-8
# Decoders whose class in transformers and in safe-rlhf both sit under `model.`
MODEL_TYPES = ("llama", "mistral", "gemma", "qwen2", "phi")
_FUNCTIONS = {"reward": "affine", "cost": "scale", "critic": "identity"}


class ScoreNormalizer(torch.nn.Module):
    """The running statistics of a score model and what its ``score_type`` does with them.

    Args:
        score_dim: number of scores.
        function: ``affine``, ``scale`` or ``identity``.
    """

    def __init__(self, score_dim: int, *, function: str) -> None:
        super().__init__()
        self._function = function
        self.register_buffer("mean", torch.zeros(score_dim))
        self.register_buffer("var", torch.ones(score_dim))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Normalised scores, same shape (..., score_dim)."""
        mean, std = self.get_buffer("mean").float(), self.get_buffer("var").float().sqrt()
        if self._function == "affine":
            return (scores - mean) / (std + _EPSILON)
        if self._function == "scale":
            return scores / (std + _EPSILON)
        return scores


class SafeRlhfScoreModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Decoder, score head and normaliser, under the names of the format; head and normaliser are float32."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = {"score_head", "normalizer"}  # noqa: RUF012  # as transformers declares it
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        score_dim = int(getattr(config, "score_dim", 1))
        self.score_head = torch.nn.Linear(config.hidden_size, score_dim, bias=_has_bias(config))
        self.normalizer = ScoreNormalizer(score_dim, function=_FUNCTIONS[score_type(config)])
        self.post_init()  # type: ignore[no-untyped-call]

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores (rows, score_dim), float32, from the hidden states of the last tokens (rows, width)."""
        scores: torch.Tensor = self.score_head(hidden.float())
        return self.normalizer(scores) if getattr(self.config, "do_normalize", False) else scores


class ScoreReader(torch.nn.Module):
    """Head and normaliser as one module."""

    def __init__(self, model: SafeRlhfScoreModel) -> None:
        super().__init__()
        self._model = model

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Read normalised scores off hidden states, as :meth:`SafeRlhfScoreModel.read` does."""
        return self._model.read(hidden)


def score_type(config: Any) -> str:
    """The checked ``score_type`` of a configuration.

    Raises:
        InputError: another type, or a decoder of another kind.
    """
    if config.model_type not in MODEL_TYPES:
        raise InputError(
            f"a score model of safe-rlhf on {config.model_type!r} is not read; {', '.join(MODEL_TYPES)} are"
        )
    found = getattr(config, "score_type", "reward")
    if found not in _FUNCTIONS:
        raise InputError(f"config.json has the `score_type` {found!r}; it must be one of {', '.join(_FUNCTIONS)}")
    return str(found)


def _has_bias(config: Any) -> bool:
    if hasattr(config, "score_bias"):
        return bool(config.score_bias)
    return bool(getattr(config, "bias", True))  # the older name; the newest default where neither is written
