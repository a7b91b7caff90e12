"""Byte-level BPE tokenizers trained on the world's own text, each with its chat template."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class RoleMarkers:
    """The special tokens that open a turn of the user and of the assistant."""

    user: str
    assistant: str


# The policy and the scorers differ on purpose, as models from different makers do: a text rendered for one is not
# valid input for the other.
POLICY_MARKERS = RoleMarkers(user="<|user|>", assistant="<|assistant|>")
SCORER_MARKERS = RoleMarkers(user="<|question|>", assistant="<|reply|>")


def build_tokenizer(
    texts: Iterable[str], *, vocabulary: int, markers: RoleMarkers, max_positions: int, padding_side: str
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most ``vocabulary`` tokens on ``texts``.

    Its chat template begins a dialogue with the only BOS and ends each assistant turn with EOS. Tokenising with
    special tokens also adds a BOS, as Llama's tokenizer does, so a rendered dialogue must be tokenised without them.
    """
    specials = [BOS, EOS, PAD, markers.user, markers.assistant]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _single_threaded_tokenizers():
        tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[markers.user, markers.assistant],
        chat_template=_chat_template(markers),
        model_max_length=max_positions,
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Token ids of a dialogue up to and including the marker that opens the reply."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_replies(tokenizer: PreTrainedTokenizerFast, replies: Sequence[str]) -> list[list[int]]:
    """Token ids of finished replies, EOS included.

    The marker that ends a prompt is a special token, and no merge crosses one: the ids of a prompt followed by those
    of a reply are the ids of the whole dialogue.
    """
    with _single_threaded_tokenizers():
        rows = tokenizer(list(replies), add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in rows]


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Once the tokenizers library has run threads, it warns on stderr at every later fork of the process."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _chat_template(markers: RoleMarkers) -> str:
    return (
        "{{ bos_token }}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{ '{markers.user}' + message['content'] }}}}"
        "{%- elif message['role'] == 'assistant' -%}"
        f"{{{{ '{markers.assistant}' + message['content'] + eos_token }}}}"
        "{%- else -%}"
        "{{ raise_exception('only the roles user and assistant are known, not ' + message['role']) }}"
        "{%- endif -%}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ '{markers.assistant}' }}}}{{%- endif -%}}"
    )
