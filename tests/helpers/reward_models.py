"""Tiny reward models in the layouts in which large ones are published, and their scores from the raw tensors.

Each has the configuration of the published one with other sizes, its names of weights, and weights that are random and
seeded. Scores are computed by the formula of the layout on the hidden states of transformers' decoder in float64, one
text at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from helpers.score_models import read_weights, write_weights
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 2, 1
OBJECTIVES, GATE_WIDTH, GATE_LAYERS, GATE_TEMPERATURE = 5, 24, 3, 10
ATTRIBUTES = ("helpfulness", "correctness", "verbosity", "honesty")

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GUARD = (
    "{% if messages | length % 2 == 0 %}{% set role = 'Agent' %}{% else %}{% set role = 'User' %}{% endif %}"
    "{{ bos_token }}<|start_header_id|>user<|end_header_id|>\n\n"
    "Task: Check if there is unsafe content in '{{ role }}' messages in conversations according "
    "our safety policy with the below categories.\n\n"
    "<BEGIN UNSAFE CONTENT CATEGORIES>\nS1: Violent Crimes.\nS2: Self-Harm.\n<END UNSAFE CONTENT CATEGORIES>\n\n"
    "<BEGIN CONVERSATION>\n\n"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ 'User' if message['role'] == 'user' else 'Agent' }}: {{ message['content'] | trim }}\n\n{% endfor %}"
    "<END CONVERSATION>\n\nProvide your safety assessment for ONLY THE LAST {{ role }} message in the above "
    "conversation:\n - First line must read 'safe' or 'unsafe'.\n - If unsafe, a second line must include a "
    "comma-separated list of violated categories.<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
)
"""As that of Llama Guard 3, with two of its categories: what is asked for ends before the answer's two line breaks."""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts a text into words: line breaks are a word of their own, whatever follows them."""

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Published:
    """A layout.

    Attributes:
        like: a model that is published in it.
        config: what config.json has beside the sizes.
        head: names and shapes of the weights beside the decoder's, and of what is left over.
        score: all heads of a text (heads,), from the weights, the hidden states (tokens, width) and the token ids.
        template: the chat template.
        decoder: names and shapes of each layer's weights beside those of a Llama.
    """

    like: str
    config: dict[str, Any]
    head: dict[str, tuple[int, ...]]
    score: Callable[[Weights, torch.Tensor, Sequence[int]], torch.Tensor]
    template: str = LLAMA_3
    decoder: dict[str, tuple[int, ...]] = field(default_factory=dict)


def _linear(weights: Weights, hidden: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    del token_ids
    return weights["score.weight"] @ hidden[-1]


def _next_token(weights: Weights, hidden: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    del token_ids
    return weights["lm_head.weight"] @ hidden[-1]


def _two_layers(weights: Weights, hidden: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    del token_ids
    inner = (weights["score.0.weight"] @ hidden[-1] + weights["score.0.bias"]).clamp(min=0)
    return weights["score.2.weight"] @ inner + weights["score.2.bias"]


def _gated(weights: Weights, hidden: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    ids = list(token_ids)
    header = build_published_tokenizer(LLAMA_3).encode(
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False
    )
    begins = [place for place in range(len(ids)) if ids[place : place + len(header)] == header]
    rewards = weights["regression_layer.weight"] @ hidden[-1]
    gate = hidden[begins[-1]]
    for layer in range(GATE_LAYERS + 1):
        gate = weights[f"gating.layers.{layer}.weight"] @ gate + weights[f"gating.layers.{layer}.bias"]
        gate = gate.clamp(min=0) if layer < GATE_LAYERS else gate
    gate = torch.softmax(gate / GATE_TEMPERATURE, dim=0) * weights["gating.logit_scale"]
    score = (gate * (rewards @ weights["reward_transform_matrix"])).sum()
    return torch.cat([score[None], rewards])


_ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
_TWO_LAYER_HEAD = {
    "score.0.weight": (WIDTH, WIDTH),
    "score.0.bias": (WIDTH,),
    "score.2.weight": (1, WIDTH),
    "score.2.bias": (1,),
}
_QKV_BIAS = {
    "self_attn.q_proj.bias": (WIDTH,),
    "self_attn.k_proj.bias": (WIDTH // HEADS * KV_HEADS,),
    "self_attn.v_proj.bias": (WIDTH // HEADS * KV_HEADS,),
}
_LLAMA_31_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
_QWEN_2 = {"model_type": "qwen2", "max_window_layers": 1, "sliding_window": 64, "use_sliding_window": False}
_GATE_WIDTHS = [WIDTH, *[GATE_WIDTH] * GATE_LAYERS, OBJECTIVES]

PUBLISHED = {
    "llama_guard": Published(
        "meta-llama/Llama-Guard-3-8B",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "max_position_embeddings": 1024,
            "rope_scaling": _LLAMA_31_ROPE,
        },
        {"lm_head.weight": (-1, WIDTH)},
        _next_token,
        GUARD,
    ),
    "skywork_llama": Published(
        "Skywork/Skywork-Reward-Llama-3.1-8B",
        {
            "architectures": ["LlamaForSequenceClassification"],
            "model_type": "llama",
            "rope_scaling": _LLAMA_31_ROPE,
            **_ONE_LABEL,
        },
        {"score.weight": (1, WIDTH)},
        _linear,
    ),
    "skywork_qwen": Published(
        "Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        {
            "architectures": ["Qwen3ForSequenceClassification"],
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": WIDTH // HEADS,
            "max_window_layers": LAYERS,
            "sliding_window": None,
            "use_sliding_window": False,
            **_ONE_LABEL,
        },
        {"score.weight": (1, WIDTH)},
        _linear,
        CHATML,
        {"self_attn.q_norm.weight": (WIDTH // HEADS,), "self_attn.k_norm.weight": (WIDTH // HEADS,)},
    ),
    "left_over_head": Published(
        "a reward model saved with its language model's head",
        {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "num_labels": 1},
        {"score.weight": (1, WIDTH), "lm_head.weight": (-1, WIDTH)},
        _linear,
    ),
    "causal_config": Published(
        "a reward model saved with its language model's configuration",
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"score.weight": (1, WIDTH), "lm_head.weight": (-1, WIDTH)},
        _linear,
    ),
    "attributes": Published(
        "RLHFlow/RewardModel-Mistral-7B-for-DPA-v1",
        {
            "architectures": ["MistralForSequenceClassification"],
            "model_type": "mistral",
            "sliding_window": None,
            "id2label": {str(index): name for index, name in enumerate(ATTRIBUTES)},
            "label2id": {name: index for index, name in enumerate(ATTRIBUTES)},
            "problem_type": "regression",
        },
        {"score.weight": (len(ATTRIBUTES), WIDTH)},
        _linear,
    ),
    "qwen_reward": Published(
        "Qwen/Qwen2.5-Math-RM-72B",
        {
            "architectures": ["Qwen2ForRewardModel"],
            "auto_map": {
                "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
                "AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel",
            },
            **_QWEN_2,
        },
        {**_TWO_LAYER_HEAD, "lm_head.weight": (-1, WIDTH)},
        _two_layers,
        CHATML,
        _QKV_BIAS,
    ),
    "inf_orm": Published(
        "infly/INF-ORM-Llama3.1-70B",
        {
            "architectures": ["INFORMForSequenceClassification"],
            "model_type": "llama",
            "rope_scaling": _LLAMA_31_ROPE,
        },
        _TWO_LAYER_HEAD,
        _two_layers,
    ),
    "armorm": Published(
        "RLHFlow/ArmoRM-Llama3-8B-v0.1",
        {
            "architectures": ["LlamaForRewardModelWithGating"],
            "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
            "model_type": "llama",
            "num_objectives": OBJECTIVES,
            "gating_temperature": GATE_TEMPERATURE,
            "gating_hidden_dim": GATE_WIDTH,
            "gating_n_hidden": GATE_LAYERS,
            **_ONE_LABEL,
        },
        {
            "regression_layer.weight": (OBJECTIVES, WIDTH),
            "reward_transform_matrix": (OBJECTIVES, OBJECTIVES),
            "gating.logit_scale": (1,),
            **{
                f"gating.layers.{layer}.{part}": (after, before)[: 1 + (part == "weight")]
                for layer, (before, after) in enumerate(pairwise(_GATE_WIDTHS))
                for part in ("weight", "bias")
            },
        },
        _gated,
    ),
}
"""The layouts by a short name."""
CLASSIFIERS = tuple(name for name in PUBLISHED if name != "llama_guard")
"""Those that the kind ``sequence_classification`` reads; the other one is a preset of a judge."""


def build_published_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of a chat template, which is its own."""
    is_llama = template in (LLAMA_3, GUARD)
    bos, ends, pad = (
        ("<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "[PAD]")
        if is_llama
        else (None, ["<|im_start|>", "<|im_end|>"], "<|endoftext|>")
    )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [" user assistant system\n\n\n\n", " take a small step, call your friend and rest"],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    core.add_special_tokens([AddedToken(name, special=True) for name in [bos, *ends, pad] if name is not None])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=ends[-1],
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def save_published(folder: Path, name: str, *, seed: int = 0, **changed: Any) -> Path:
    """A random reward model in a published layout; returns the folder.

    Args:
        folder: where to save it.
        name: of the layout.
        seed: of the weights.
        changed: entries of config.json that differ.
    """
    layout = PUBLISHED[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_published_tokenizer(layout.template)
    tokenizer.save_pretrained(folder)
    rng = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) / math.sqrt(shape[-1])

    key_width = WIDTH // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj.weight": (WIDTH, WIDTH),
        "self_attn.k_proj.weight": (key_width, WIDTH),
        "self_attn.v_proj.weight": (key_width, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, WIDTH),
        "mlp.gate_proj.weight": (INNER, WIDTH),
        "mlp.up_proj.weight": (INNER, WIDTH),
        "mlp.down_proj.weight": (WIDTH, INNER),
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
        **layout.decoder,
    }
    weights = {
        f"model.layers.{layer}.{part}": 1 + 0.1 * weight(*shape) if "norm" in part else weight(*shape)
        for layer in range(LAYERS)
        for part, shape in shapes.items()
    }
    weights |= {"model.embed_tokens.weight": weight(len(tokenizer), WIDTH), "model.norm.weight": torch.ones(WIDTH)}
    # A gate's and a matrix's rows are of order one, so that what they do shows in the scores.
    weights |= {
        part: 3 * weight(*(len(tokenizer) if size < 0 else size for size in shape))
        for part, shape in layout.head.items()
    }
    config = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 128,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.44.2",
        "use_cache": False,
        "vocab_size": len(tokenizer),
        # Qwen's own configurations name no padding.
        **({"pad_token_id": tokenizer.pad_token_id} if layout.template != CHATML else {}),
        **layout.config,
        **changed,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, weights)
    return folder


def published_scores(
    folder: Path, name: str, token_ids: Sequence[int], *, dtype: torch.dtype = torch.float64
) -> list[float]:
    """All heads of one text, from the raw tensors; ``dtype`` is that of the decoder alone."""
    weights = {key: tensor.double() for key, tensor in read_weights(folder).items()}
    decoder = AutoModel.from_config(AutoConfig.from_pretrained(folder), dtype=dtype).eval()
    decoder.load_state_dict({key.removeprefix("model."): w for key, w in weights.items() if key.startswith("model.")})
    with torch.inference_mode():
        hidden = decoder(torch.tensor([list(token_ids)])).last_hidden_state[0].double()
        scores: list[float] = PUBLISHED[name].score(weights, hidden, token_ids).tolist()
    return scores
