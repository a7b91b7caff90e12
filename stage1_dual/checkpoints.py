"""What a checkpoint's configuration files and headers tell, before anything expensive starts: its checks, its size."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.contracts.errors import InputError
from pipeline.contracts.section import Dtype
from stage1_dual.chat_templates import read_template, template_file

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Endings of the architectures of causal language models; the second one is GPT-2's."""
GATED = "LlamaForRewardModelWithGating"
"""The class of ArmoRM and its like: several objectives, and their mean by weights that depend on the prompt."""
TWO_LAYERS = frozenset({"Qwen2ForRewardModel", "INFORMForSequenceClassification"})
"""Classes whose head is two layers with a ReLU between them: Qwen's and INF's outcome reward models."""
PROCESS = "Qwen2ForProcessRewardModel"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class Heads:
    """The heads of a sequence classifier or reward model.

    Attributes:
        architectures: as config.json names them.
        layout: ``linear`` for one matrix on the last token; ``two_layers`` for two with a ReLU between them;
            ``gated`` for objectives and their mean by the weights of a gate.
        labels: name of each head by its index.
    """

    architectures: Sequence[str]
    layout: Literal["linear", "two_layers", "gated"]
    labels: Mapping[int, str]


def is_local(checkpoint: str) -> bool:
    """Whether the checkpoint is a folder on this machine, as opposed to an id on the Hugging Face Hub."""
    return bool(checkpoint) and Path(checkpoint).is_dir()  # an empty path would be the working folder


def count_weights(folder: Path) -> int:
    """How many weights the safetensors files of a folder hold, from their headers.

    Raises:
        OSError, ValueError, KeyError: a header cannot be read.
    """
    return sum(_count_weights(path) for path in sorted(folder.glob("*.safetensors")))


def _count_weights(path: Path) -> int:
    """Weights in a safetensors file: a header of JSON, its length in front of it in eight bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is not a safetensors file")
        header = json.loads(file.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def cache_bytes_per_token(checkpoint: str, *, revision: str | None, dtype: Dtype) -> int:
    """Memory of the keys and values of one token, in the arithmetic that computes them."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        checkpoint, revision=revision, trust_remote_code=False, local_files_only=is_local(checkpoint)
    ).get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kv_heads * width * getattr(torch, dtype).itemsize)


def check_policy_checkpoint(checkpoint: str, *, revision: str | None = None, template: str | None = None) -> None:
    """Check that a folder holds a causal language model with a usable chat template, without loading it.

    Args:
        checkpoint: a folder, or the id of a model on the Hub, of which only the form is checked.
        revision: branch, tag or commit of a Hub model.
        template: as :func:`stage1_dual.sampling.rendering.resolve_chat_template` takes it.

    Raises:
        InputError: no such folder, a file of it is missing or unreadable, or it holds another kind of model.
    """
    check_prompt_template(template)
    folder = _local_folder(checkpoint, revision, what="the policy")
    if folder is None:
        return
    config = _check_files(folder, what="the policy")
    _check_architecture(folder, config, suffix=_CAUSAL, what="the policy", kind="a causal language model")
    if template is None and not _has_chat_template(folder):
        raise InputError(
            f"the policy {folder} has no chat template (chat_template.jinja, or in tokenizer_config.json); give "
            "`reference.template`: a text with {prompt}, or the path of a chat template file"
        )


def is_prompt_template(template: str) -> bool:
    """Whether a policy's template is a text with ``{prompt}``, as opposed to a file's path."""
    return template.count("{prompt}") == 1


def check_prompt_template(template: str | None) -> None:
    """Raise InputError where a policy's template is neither a text with its place nor a file that can be read."""
    if template is None or is_prompt_template(template):
        return
    path = template_file(template)
    if path is None:
        raise InputError(
            f"`reference.template` is {_shown(template)}, which is neither a text with {{prompt}} (once) nor the path "
            "of a chat template file"
        )
    read_template(path, setting="reference.template")


def check_scorer_checkpoint(
    checkpoint: str, *, head: int | str, template: str | None, revision: str | None = None
) -> Heads | None:
    """Check that a folder holds a sequence classifier with the head and a usable template, without loading it.

    Args:
        checkpoint: a folder, or the id of a model on the Hub, of which only the form is checked.
        head: the head wanted, by index or by label.
        template: as :class:`stage1_dual.scoring.templates.ScorerTemplate` takes it.
        revision: branch, tag or commit of a Hub model.

    Returns:
        The heads of the checkpoint; None of a model on the Hub.

    Raises:
        InputError: as :func:`check_policy_checkpoint`; there is no such head; there is no template.
    """
    check_template(template)
    folder = _local_folder(checkpoint, revision, what="the scorer")
    if folder is None:
        return None
    heads = find_heads(_check_files(folder, what="the scorer"), weight_shapes(folder), checkpoint=str(folder))
    resolve_head(head, heads.labels, checkpoint=str(folder))
    if template is None and not _has_chat_template(folder):
        raise InputError(
            f"the scorer {folder} has no chat template; give `template`: a text with {{prompt}} and {{completion}}, "
            "or the path of a chat template file"
        )
    return heads


def find_heads(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], *, checkpoint: str) -> Heads:
    """The heads of a sequence classifier or reward model, from its configuration and the shapes of its weights.

    Args:
        config: the content of config.json.
        shapes: of the weights by name; empty where they are not known.
        checkpoint: for messages.

    Raises:
        InputError: it is none, or one whose values are not of a whole response.
    """
    architectures = [str(name) for name in config.get("architectures") or []]
    if GATED in architectures:
        # The number that the published class takes where the configuration does not say.
        objectives = int(config.get("num_objectives", 19))
        labels = {0: "score", **{1 + index: f"objective_{index}" for index in range(objectives)}}
        return Heads(architectures, "gated", labels)
    if PROCESS in architectures:
        raise InputError(
            f"the scorer {checkpoint} is a process reward model ({PROCESS}): it has a value for each step, which its "
            "text has to mark, and none for a response"
        )
    if any(name in TWO_LAYERS for name in architectures):
        # The published configurations leave the number of labels to the class, which has one.
        (rows, *_) = shapes.get("score.2.weight", (1,))
        return Heads(architectures, "two_layers", {index: f"LABEL_{index}" for index in range(rows)})
    is_classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    # Some trainers save a reward model with the configuration of the language model it was made from.
    if is_classifier or ("score.weight" in shapes and any(name.endswith(_CAUSAL) for name in architectures)):
        return Heads(architectures, "linear", _labels(config, shapes))
    raise InputError(
        f"the scorer {checkpoint} is not a sequence classifier: config.json names the architectures {architectures}, "
        f"none *ForSequenceClassification, {', '.join((*sorted(TWO_LAYERS), GATED))}, and no weight is `score.weight`"
    )


def _labels(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[int, str]:
    """The labels by index, as transformers reads them."""
    if config.get("id2label"):
        return {int(index): str(label) for index, label in config["id2label"].items()}
    # transformers leaves id2label out of config.json where the labels are its default, two of them.
    default, *_ = shapes.get("score.weight", (2,))
    return {index: f"LABEL_{index}" for index in range(int(config.get("num_labels", default)))}


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a folder's weights by name, from the headers of its safetensors files: no weight is read.

    Raises:
        InputError: a file is not one of safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                # Eight bytes with the length of the header, which is a JSON object; 100 MB are the format's limit.
                header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 100_000_000)))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    return shapes


def check_score_model_checkpoint(
    checkpoint: str, *, head: int, template: str | None, revision: str | None = None
) -> None:
    """Check that a folder holds a score model of safe-rlhf (Beaver's reward and cost models), without loading it.

    Args:
        checkpoint: a folder, or the id of a model on the Hub, of which only the form is checked.
        head: index of the score wanted.
        template: as :class:`stage1_dual.scoring.templates.ScorerTemplate` takes it; None for Beaver's own.
        revision: branch, tag or commit of a Hub model.

    Raises:
        InputError: as :func:`check_policy_checkpoint`; the head is out of range.
    """
    check_template(template)
    folder = _local_folder(checkpoint, revision, what="the scorer")
    if folder is None:
        return
    config = _check_files(folder, what="the scorer")
    _check_architecture(folder, config, suffix=("ForScore",), what="the scorer", kind="a score model of safe-rlhf")
    score_dim = int(config.get("score_dim", 1))
    resolve_head(head, {index: str(index) for index in range(score_dim)}, checkpoint=str(folder))


def check_causal_checkpoint(checkpoint: str, *, revision: str | None = None) -> None:
    """Check that a folder holds a causal language model, with or without a chat template, without loading it.

    Raises:
        InputError: as :func:`check_policy_checkpoint`.
    """
    folder = _local_folder(checkpoint, revision, what="the policy")
    if folder is not None:
        config = _check_files(folder, what="the policy")
        _check_architecture(folder, config, suffix=_CAUSAL, what="the policy", kind="a causal language model")


def resolve_head(head: int | str, labels: Mapping[int, str], *, checkpoint: str) -> int:
    """The index of a head given by index or by label.

    Raises:
        InputError: no such head; names those there are.
    """
    if isinstance(head, str):
        found = [index for index, label in labels.items() if label == head]
        if len(found) == 1:
            return found[0]
        known = ", ".join(labels[index] for index in sorted(labels))
        raise InputError(
            f"the scorer {checkpoint} has {'several heads' if found else 'no head'} with the label {head!r}; "
            f"its labels are {known}"
        )
    if not 0 <= head < len(labels):
        raise InputError(
            f"the scorer {checkpoint} has no head {head}: num_labels is {len(labels)}, "
            f"so `head` must be between 0 and {len(labels) - 1}"
        )
    return head


def is_text_template(template: str) -> bool:
    """Whether a scorer's template is a text with ``{completion}``, as opposed to a file's path.

    A text without ``{prompt}`` is for scorers that read the completion alone.
    """
    return "{completion}" in template


def check_template(template: str | None, *, reads_prompt: bool = False) -> None:
    """Raise InputError where a scorer's template is neither a text with its places nor a file that is there.

    Args:
        template: of the scorer.
        reads_prompt: whether a text must have ``{prompt}``.
    """
    if template is None or (is_text_template(template) and ("{prompt}" in template or not reads_prompt)):
        return
    path = template_file(template)
    if path is None:
        raise InputError(
            f"`template` is {_shown(template)}, which is neither a text with {{prompt}} and {{completion}} "
            "nor the path of a chat template file"
        )
    read_template(path, setting="template")


def _shown(template: str) -> str:
    """A template in a message: a text may be long."""
    return repr(template if len(template) <= 200 else f"{template[:200]}…")


def _local_folder(checkpoint: str, revision: str | None, *, what: str) -> Path | None:
    if is_local(checkpoint):
        return Path(checkpoint)
    if Path(checkpoint).is_file():
        raise InputError(f"{what} {checkpoint} is a file; give the folder of the checkpoint")
    if _HUB_ID.fullmatch(checkpoint) and revision is not None:
        return None
    raise InputError(
        f"{what} {checkpoint!r} is not there: no such folder"
        + ("; if it is the id of a model on the Hub, give its `revision` too" if _HUB_ID.fullmatch(checkpoint) else "")
    )


def _check_files(folder: Path, *, what: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{what} {folder} has no config.json: it is not a Hugging Face checkpoint")
    config = _read_object(path)
    if not any(folder.glob("*.safetensors")):
        other = sorted(path.name for path in folder.glob("*.bin"))
        raise InputError(
            f"{what} {folder} has no *.safetensors file; other weight formats are not read"
            + (
                f". Convert {other[0]}{' and the others' if len(other) > 1 else ''} once: read each with "
                "torch.load(FILE, weights_only=True) and write it with safetensors.torch.save_file "
                "(docs/scorers.md, Weights)"
                if other
                else ""
            )
        )
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = _read_object(index).get("weight_map")
        outside = (
            sorted({str(name) for name in shards.values() if Path(str(name)).name != name})
            if isinstance(shards, dict)
            else ["no `weight_map`"]
        )
        if outside:
            # What is outside is not in the checkpoint's identity: it could change unnoticed.
            raise InputError(f"{what} {folder}: {index.name} names weights outside of the folder ({outside[0]})")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(f"{what} {folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    return config


def _check_architecture(
    folder: Path, config: dict[str, Any], *, suffix: tuple[str, ...], what: str, kind: str
) -> None:
    architectures = config.get("architectures") or []
    if not any(str(name).endswith(suffix) for name in architectures):
        raise InputError(
            f"{what} {folder} is not {kind}: config.json names the architectures {architectures}, none "
            + " or ".join(f"*{ending}" for ending in suffix)
        )


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(_read_object(path).get("chat_template"))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, not an object")
    return value
