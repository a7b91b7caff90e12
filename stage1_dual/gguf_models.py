"""References in a GGUF file: dequantised once into an ordinary checkpoint, and compared with the file.

transformers makes the network and the tokenizer; whether both are what the file holds is decided here, with the reader
of the package ``gguf`` (https://github.com/ggml-org/llama.cpp/tree/master/gguf-py): every tensor of the file is a
weight of the network and every weight a tensor, their numbers are the same ones, and so are the tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.contracts.errors import InputError, require_extra
from pipeline.networks import load_network, make_readable, quiet

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

log = logging.getLogger("dualign")

_MAGIC = b"GGUF"
_TOKENIZER = "tokenizer.ggml.tokens"
_TEMPLATE = "tokenizer.chat_template"
_UNREAD = (
    "rope.scaling.",
    "rope.dimension_sections",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "softcapping",
)
"""Settings of a network that transformers' reader of GGUF leaves out for most architectures, and without which it is
another one."""
_TIED_HEAD = "output.weight"


def check_gguf_file(path: str | Path, *, template: str | None) -> None:
    """Check that a file is a whole GGUF file of a model that can be a reference, without reading its weights.

    Args:
        path: of the file.
        template: ``reference.template``; without one the file must have a chat template.

    Raises:
        InputError: it is not GGUF or cut off, or a language model of an architecture that is not read, without
            tokens or without a chat template.
        MissingExtraError: the package ``gguf`` is not installed.
    """
    reader = _read(Path(path))
    architecture = _value(reader, "general.architecture")
    require_extra("sample", "torch", "transformers", purpose="a GGUF file as the reference")
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise InputError(
            f"`reference.model` is {str(path)!r}, of the architecture {architecture!r}, which transformers does not "
            f"read from GGUF (it reads {', '.join(sorted(map(str, GGUF_SUPPORTED_ARCHITECTURES)))})"
        )
    unread = sorted(
        key
        for key in reader.fields
        if key.startswith(f"{architecture}.")
        and any(part in key for part in _UNREAD)
        and _value(reader, key) != "none"
    )
    if unread:
        raise InputError(
            f"`reference.model` is {str(path)!r}, whose network depends on {', '.join(unread)}, which are lost where "
            "a GGUF file is read here: give the checkpoint it was made from"
        )
    if _TOKENIZER not in reader.fields:
        raise InputError(f"`reference.model` is {str(path)!r}, which has no tokenizer ({_TOKENIZER})")
    if template is None and not _value(reader, _TEMPLATE):
        raise InputError(
            f"`reference.model` is {str(path)!r}, which has no chat template ({_TEMPLATE}); give "
            "`reference.template`: a text with {prompt}, or the path of a chat template file"
        )


def write_dequantised_checkpoint(path: str | Path, output: Path) -> None:
    """Write the model of a GGUF file as an ordinary checkpoint in float32, which holds every dequantised number.

    Args:
        path: of the file.
        output: folder to write.

    Raises:
        InputError: as :func:`check_gguf_file`; or the network that transformers makes of it has other weights than the
            file, or its tokenizer other tokens.
        MissingExtraError: a package is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(path)
    reader = _read(path)
    place = {"gguf_file": path.name}
    model = load_network(
        AutoModelForCausalLM, path.parent, dtype=torch.float32, what=f"the model of {path.name} in", **place
    )
    model.hf_quantizer = None  # it was read from blocks, and is of ordinary numbers now
    model.config.__dict__.pop("quantization_config", None)
    with quiet():
        model.save_pretrained(output)
    del model
    written = load_network(AutoModelForCausalLM, output, dtype=torch.float32, what="the dequantised model")
    compared = _compare_weights(reader, written, path)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **place, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot make the tokenizer of {path}: {error}") from error
    tokenizer = _without_foreign_tokens(reader, tokenizer)
    _compare_tokens(reader, tokenizer, path)
    tokenizer.save_pretrained(output)
    make_readable(output)
    log.info("prepare: %s dequantised: all numbers of its %d tensors are in the checkpoint", path.name, compared)


def _read(path: Path) -> GGUFReader:
    """The file, its tensors mapped and not read."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise InputError(f"`reference.model` is {str(path)!r}, which cannot be read: {error.strerror}") from error
    if magic != _MAGIC:
        raise InputError(
            f"`reference.model` is {str(path)!r}, which is not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}"
        )
    require_extra("gguf", "gguf", purpose="a GGUF file as the reference")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise InputError(
            f"`reference.model` is {str(path)!r}, which is damaged or cut off ({path.stat().st_size:,} bytes are "
            f"there): {error}"
        ) from error
    if not reader.tensors or "general.architecture" not in reader.fields:
        raise InputError(f"`reference.model` is {str(path)!r}, which holds no model: no tensors, or no architecture")
    return reader


def _value(reader: GGUFReader, key: str) -> Any:
    """A value of the file's metadata, None where it has none."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _compare_weights(reader: GGUFReader, model: Any, path: Path) -> int:
    """Require that the network has the numbers of the file, all of them and no others; gives how many tensors.

    Tensors and weights are paired by the package's own table of names. A weight may be laid out otherwise than its
    tensor (the rows of query and key heads are), so that what is compared is which numbers it has, to the last bit.
    """
    import numpy as np
    from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map

    architecture = _value(reader, "general.architecture")
    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise InputError(f"`reference.model` is {str(path)!r}: `gguf` knows no architecture {architecture!r}")
    names = get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    weights: Mapping[str, Any] = model.state_dict()
    of_tensor = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in weights}
    if model.config.tie_word_embeddings:
        of_tensor.pop(_TIED_HEAD, None)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    lost, extra = sorted(tensors.keys() - of_tensor), sorted(str(name) for name in of_tensor.keys() - tensors)
    if lost or extra:
        raise InputError(
            f"`reference.model` is {str(path)!r}: "
            + "; ".join(
                f"{len(found)} {kind} ({', '.join(found[:3])})"
                for found, kind in (
                    (lost, "tensors of it are no weights of the network"),
                    (extra, "weights are not in it"),
                )
                if found
            )
            + ". The model that is read would not be the one in the file"
        )
    for name, tensor in tensors.items():
        expected: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
        found = weights[of_tensor[name]].numpy()
        same = expected.shape == found.shape and np.array_equal(expected, found)
        if not same and not np.array_equal(np.sort(expected, axis=None), np.sort(found, axis=None)):
            raise InputError(
                f"`reference.model` is {str(path)!r}: transformers makes other numbers of its tensor {name} than the "
                f"reader of `gguf` (architecture {architecture!r}); such a model cannot be checked here"
            )
    return len(tensors)


def _without_foreign_tokens(reader: GGUFReader, tokenizer: Any) -> Any:
    """The tokenizer without the tokens that its class in transformers adds behind those of the file.

    The network has no weights for them: a prompt that spells one could not be read.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokens = _value(reader, _TOKENIZER)
    if len(tokenizer) <= len(tokens):
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(tokens)]
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    places = {role: _value(reader, f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    own = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **{role: tokens[place] for role, place in places.items() if place is not None},
        clean_up_tokenization_spaces=False,
    )
    own.chat_template = tokenizer.chat_template
    return own


def _compare_tokens(reader: GGUFReader, tokenizer: Any, path: Path) -> None:
    """Require that each id is the token that the file says."""
    tokens = _value(reader, _TOKENIZER)
    found = {place: token for token, place in tokenizer.get_vocab().items()}
    differing = [place for place, token in enumerate(tokens) if found.get(place) != token]
    if differing or len(found) != len(tokens):
        raise InputError(
            f"`reference.model` is {str(path)!r}: the tokenizer that transformers makes of it has other tokens "
            f"({len(differing)} of {len(tokens)} differ, {len(found)} in all"
            + (f"; {differing[0]} is {tokens[differing[0]]!r} in the file" if differing else "")
            + ")"
        )
