"""The reference policy: a small Llama trained from scratch on dialogues of the grammar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.microworld.grammar import Grammar, GrammarPrompt
from pipeline.microworld.size import WorldSize
from pipeline.microworld.tokenizer import POLICY_MARKERS, build_tokenizer, encode_prompt, encode_replies
from pipeline.microworld.training import INITIALIZER_RANGE, TrainingJob, bucket_batches, pad_right

_IGNORED = -100


@dataclass(frozen=True)
class Policy:
    """The model and tokenizer of the reference policy."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    def write(self, directory: Path) -> None:
        """Write an ordinary checkpoint."""
        # A Hub model often ships sampling defaults that are not the distribution its probabilities describe. This
        # one does so too, so that a sampler that does not override them is found out: expectations under the
        # reference policy need temperature 1 and no truncation.
        self.model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


@dataclass(frozen=True)
class _Example:
    prompt_ids: list[int]
    reply_ids: list[int]


def plan_policy(
    grammar: Grammar, prompts: Sequence[GrammarPrompt], *, size: WorldSize, seed: int
) -> tuple[Policy, TrainingJob[list[_Example]]]:
    """The untrained reference policy and the job that trains it on replies to ``prompts``.

    The initial weights come from torch's global generator.
    """
    rng = np.random.default_rng(seed)
    n_dialogues = size.policy_steps * size.policy_batch
    asked = [prompts[index] for index in rng.integers(len(prompts), size=n_dialogues)]
    replies = [grammar.draw_response(prompt, rng=rng) for prompt in asked]
    tokenizer = build_tokenizer(
        [*(prompt.text for prompt in asked), *replies],
        vocabulary=size.policy_vocabulary,
        markers=POLICY_MARKERS,
        max_positions=size.max_positions,
        padding_side="left",  # replies are generated to the right of the prompts
    )
    prompt_ids = {prompt.text: encode_prompt(tokenizer, prompt.text) for prompt in prompts}
    examples = [
        _Example(prompt_ids[prompt.text], reply_ids)
        for prompt, reply_ids in zip(asked, encode_replies(tokenizer, replies), strict=True)
    ]
    model = LlamaForCausalLM(_policy_config(tokenizer, size=size))  # type: ignore[no-untyped-call]
    job = TrainingJob(
        name="reference",
        model=model,
        batches=bucket_batches(
            examples,
            batch=size.policy_batch,
            length_of=lambda example: len(example.prompt_ids) + len(example.reply_ids),
            rng=rng,
        ),
        loss_of=lambda batch: _reply_loss(
            model, batch, pad_id=tokenizer.pad_token_id, temperature=size.policy_temperature
        ),
        learning_rate=size.policy_learning_rate,
        step_cost=size.policy_batch * model.num_parameters(),
    )
    return Policy(model, tokenizer), job


def _policy_config(tokenizer: PreTrainedTokenizerFast, *, size: WorldSize) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.policy_width,
        intermediate_size=size.policy_ffn_width,
        num_hidden_layers=size.policy_layers,
        num_attention_heads=size.policy_heads,
        num_key_value_heads=size.policy_heads,
        max_position_embeddings=size.max_positions,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _reply_loss(model: LlamaForCausalLM, batch: list[_Example], *, pad_id: int, temperature: float) -> torch.Tensor:
    """Mean negative log-likelihood of the tokens of the replies and their EOS at a temperature, in nats per token."""
    # Padding on the right never reaches a real token through causal attention, so no mask is needed.
    input_ids = pad_right([example.prompt_ids + example.reply_ids for example in batch], value=pad_id)
    labels = pad_right([[_IGNORED] * len(example.prompt_ids) + example.reply_ids for example in batch], value=_IGNORED)
    states = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    is_reply = targets != _IGNORED
    return functional.cross_entropy(model.lm_head(states[is_reply]) / temperature, targets[is_reply])
