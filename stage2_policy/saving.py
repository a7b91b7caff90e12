"""The trained policy as an ordinary checkpoint, with its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.contracts.artifacts import atomic_write_bytes, read_json, write_json
from pipeline.contracts.markdown import code_markdown, plain_markdown
from pipeline.contracts.solution import Solution
from pipeline.networks import make_readable, plain_generation

_TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
_PROVENANCE = "provenance.json"


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy_dir: Path,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write weights (safetensors), configuration, tokenizer, chat template and a neutral generation configuration.

    The evaluated policy is the plain model, so defaults that bend its distribution (top-p, top-k, temperature) are
    written out of the generation configuration.

    Args:
        model: the policy.
        tokenizer: of the policy.
        policy_dir: folder to write.
        weights: gathered weights by name, for a model whose own are sharded.
    """
    if model.generation_config is not None:
        model.generation_config = plain_generation(model.generation_config)
    model.save_pretrained(policy_dir, state_dict=None if weights is None else dict(weights))
    tokenizer.save_pretrained(policy_dir)
    make_readable(policy_dir)


def read_provenance(policy_dir: Path) -> dict[str, Any]:
    """The ``identities`` of what a policy was made from, the settings of its ``training`` and the ``doubt`` about it.

    Raises:
        CorruptArtifactError: the folder records none.
    """
    found: dict[str, Any] = read_json(policy_dir / _PROVENANCE)
    return found


def write_model_card(
    policy_dir: Path,
    *,
    dual: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    identities: Mapping[str, str] | None = None,
    training: Mapping[str, Any] | None = None,
    doubt: str = "",
) -> None:
    """Write README.md of a policy.

    Args:
        policy_dir: folder of the policy.
        dual: content of dual.json.
        evaluation: content of evaluation.json, or None before the policy is evaluated.
        identities: identity of each artifact the policy was made from; remembered from the first call.
        training: settings of the training run; remembered from the first call.
        doubt: what the verdict on training warns of, for the top of the card; remembered with the others.

    Raises:
        CorruptArtifactError: no earlier call has recorded identities and training settings, and they are not given.
    """
    if identities is not None and training is not None:
        record = {"identities": dict(identities), "training": dict(training), "doubt": doubt}
        write_json(policy_dir / _PROVENANCE, record)
    provenance = {"doubt": "", **read_provenance(policy_dir)}  # policies of older versions have none
    realised = {} if evaluation is None else {row["name"]: row for row in evaluation["constraints"]}
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["alignment", "constrained-alignment", "dualign"],
        ),
        template_path=str(_TEMPLATE),
        solution=Solution.from_document(dual),
        dual=dual,
        evaluation=evaluation,
        realised=realised,
        code=code_markdown,
        plain=plain_markdown,
        **provenance,
    )
    atomic_write_bytes(policy_dir / "README.md", str(card).encode())
