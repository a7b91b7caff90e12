"""Random checkpoints of a few thousand weights, saved in the ordinary Hugging Face layout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

Bos = Literal["none", "tokenizer", "template", "both", "neither"]
"""Who writes the BOS: there is none, the tokenizer, the chat template, both, or neither although there is one."""

PAD, BOS, EOS, USER, ASSISTANT = "<pad>", "<bos>", "<eos>", "<user>", "<assistant>"

_TURNS = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_CORPUS = (
    "I feel tired and alone after the move; what could I do this week?",
    "Take one small step: call a friend, walk for ten minutes, write down what went well.",
    "That sounds hard. Perhaps a short talk with your sister would help you to rest.",
)


def build_tokenizer(
    *, bos: Bos = "tokenizer", vocab_size: int = 320, pad_is_eos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template."""
    specials = [PAD, BOS, EOS, USER, ASSISTANT]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [*_CORPUS, *(f" word{number}" for number in range(3 * vocab_size))],  # enough text for the asked vocabulary
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos in {"tokenizer", "both"}:
        core.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=EOS if pad_is_eos else PAD,
        bos_token=None if bos == "none" else BOS,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (BOS if bos in {"template", "both"} else "") + _TURNS
    return tokenizer


def save_tiny_policy(
    folder: Path,
    *,
    bos: Bos = "tokenizer",
    seed: int = 0,
    vocab_size: int = 320,
    width: int = 64,
    layers: int = 2,
    max_positions: int = 128,
    eos_logit: float = 4.0,
) -> Path:
    """A random Llama policy with its tokenizer; returns the folder.

    Args:
        folder: where to save it.
        bos: who writes the BOS.
        seed: of the weights.
        vocab_size: entries of the vocabulary.
        width: hidden size, a multiple of 32.
        layers: number of layers.
        max_positions: context length.
        eos_logit: roughly how far the logit of the EOS lies above the mean logit, so that some samples stop early.
    """
    tokenizer = build_tokenizer(bos=bos, vocab_size=vocab_size)
    config = _config(tokenizer, width=width, layers=layers, max_positions=max_positions)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Every hidden state gets a common component, which the row of the EOS reads.
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[config.eos_token_id] = 0.0
        model.lm_head.weight[config.eos_token_id, 0] = eos_logit / width**0.5
    return _save(folder, model, tokenizer)


def save_tiny_classifier(
    folder: Path,
    *,
    bos: Bos = "tokenizer",
    seed: int = 0,
    labels: int = 1,
    max_positions: int = 128,
    pad_is_eos: bool = False,
    pad_in_config: bool = True,
    vocab_size: int = 320,
    width: int = 64,
    layers: int = 2,
) -> Path:
    """A random Llama sequence classifier with its tokenizer; returns the folder."""
    tokenizer = build_tokenizer(bos=bos, vocab_size=vocab_size, pad_is_eos=pad_is_eos)
    config = _config(tokenizer, width=width, layers=layers, max_positions=max_positions)
    config.num_labels = labels
    if not pad_in_config:
        config.pad_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config)
        torch.nn.init.normal_(model.score.weight, std=width**-0.5)  # scores of order one
    return _save(folder, model, tokenizer)


def _config(tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int, max_positions: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=max_positions,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def _save(
    folder: Path, model: LlamaForCausalLM | LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast
) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
