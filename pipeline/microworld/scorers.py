"""The score models: small classifiers trained on preferences drawn from the gold scores.

The loss is that of Bradley and Terry, "Rank analysis of incomplete block designs" (Biometrika 39, 1952,
doi:10.2307/2334029): P(a preferred to b) = sigmoid(score(a) - score(b)). Labels are drawn with the same formula from
the gold scores, so a trained score is in the units of gold (nats of preference), up to a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from pipeline.microworld.gold import SCORES, gold_scores
from pipeline.microworld.grammar import Grammar, GrammarPrompt
from pipeline.microworld.size import WorldSize
from pipeline.microworld.tokenizer import SCORER_MARKERS, build_tokenizer, encode_prompt, encode_replies
from pipeline.microworld.training import INITIALIZER_RANGE, TrainingJob, bucket_batches, pad_right

_Item = TypeVar("_Item")

# One reply in five is damaged before it is judged, so that the scorers know what a policy's slips look like.
_DAMAGED_SHARE = 0.2
# Pairs of replies to one prompt leave a constant for each prompt open. One pair in four compares replies to two
# prompts, which fixes it.
_CROSS_PROMPT_SHARE = 0.25


@dataclass(frozen=True)
class _Dialogue:
    prompt: str
    reply: str


@dataclass(frozen=True)
class _Pair:
    ids: tuple[list[int], list[int]]
    gold: tuple[Mapping[str, float], Mapping[str, float]]


@dataclass(frozen=True)
class Scorer:
    """The model and tokenizer of one score."""

    name: str
    model: LlamaForSequenceClassification
    tokenizer: PreTrainedTokenizerFast

    def write(self, directory: Path) -> None:
        """Write an ordinary checkpoint."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def measure_accuracy(
        self, grammar: Grammar, prompts: Sequence[GrammarPrompt], *, n_pairs: int, seed: int
    ) -> float:
        """Share of pairs of undamaged replies with distinct gold scores that are put in the gold order."""
        rng = np.random.default_rng(seed)
        drawn = _draw_pairs(grammar, prompts, n_pairs=n_pairs, cross_prompt_share=0.0, damaged_share=0.0, rng=rng)
        pairs = [
            pair for pair in _judge_pairs(self.tokenizer, drawn) if pair.gold[0][self.name] != pair.gold[1][self.name]
        ]
        gaps: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(pairs), 256):
                gaps += _score_gaps(self, pairs[start : start + 256]).tolist()
        gold_gaps = np.array([pair.gold[0][self.name] - pair.gold[1][self.name] for pair in pairs])
        return float(np.mean(np.sign(gaps) == np.sign(gold_gaps)))


def plan_scorers(
    grammar: Grammar, prompts: Sequence[GrammarPrompt], *, size: WorldSize, seed: int
) -> tuple[list[Scorer], list[TrainingJob[list[tuple[_Pair, float]]]]]:
    """An untrained classifier for each gold score and the jobs that train them on replies to ``prompts``.

    The initial weights come from torch's global generator.
    """
    rng = np.random.default_rng(seed)
    drawn = _draw_pairs(
        grammar,
        prompts,
        n_pairs=size.scorer_steps * size.scorer_batch,
        cross_prompt_share=_CROSS_PROMPT_SHARE,
        damaged_share=_DAMAGED_SHARE,
        rng=rng,
    )
    tokenizer = build_tokenizer(
        (text for pair in drawn for dialogue in pair for text in (dialogue.prompt, dialogue.reply)),
        vocabulary=size.scorer_vocabulary,
        markers=SCORER_MARKERS,
        max_positions=size.max_positions,
        padding_side="right",
    )
    pairs = _judge_pairs(tokenizer, drawn)
    config = _scorer_config(tokenizer, size=size)
    scorers = [
        Scorer(name, LlamaForSequenceClassification(config), tokenizer)  # type: ignore[no-untyped-call]
        for name in SCORES
    ]
    return scorers, [_plan_scorer(scorer, pairs, size=size, rng=rng) for scorer in scorers]


def _draw_pairs(
    grammar: Grammar,
    prompts: Sequence[GrammarPrompt],
    *,
    n_pairs: int,
    cross_prompt_share: float,
    damaged_share: float,
    rng: np.random.Generator,
) -> list[tuple[_Dialogue, _Dialogue]]:
    def draw_dialogue(prompt: GrammarPrompt) -> _Dialogue:
        reply = grammar.draw_response(prompt, rng=rng)
        if rng.random() < damaged_share:
            reply = _damage_reply(reply, other=grammar.draw_response(_draw(prompts, rng=rng), rng=rng), rng=rng)
        return _Dialogue(prompt.text, reply)

    pairs = []
    for _ in range(n_pairs):
        first = _draw(prompts, rng=rng)
        second = _draw(prompts, rng=rng) if rng.random() < cross_prompt_share else first
        pairs.append((draw_dialogue(first), draw_dialogue(second)))
    return pairs


def _damage_reply(reply: str, *, other: str, rng: np.random.Generator) -> str:
    """``reply`` with a slip: a word lost, doubled or from ``other``, cut short, one sentence or all of ``other``."""
    words = reply.split()
    at = int(rng.integers(len(words)))
    slips = (
        [*words[:at], *words[at + 1 :]],
        [*words[:at], words[at], *words[at:]],
        [*words[:at], _draw(other.split(), rng=rng), *words[at + 1 :]],
        words[: at + 1],
        [*words, *other.split(". ")[-1].split()],
        other.split(),
    )
    return " ".join(_draw(slips, rng=rng))


def _draw(items: Sequence[_Item], *, rng: np.random.Generator) -> _Item:
    return items[int(rng.integers(len(items)))]


def _judge_pairs(tokenizer: PreTrainedTokenizerFast, drawn: Sequence[tuple[_Dialogue, _Dialogue]]) -> list[_Pair]:
    dialogues = [dialogue for pair in drawn for dialogue in pair]
    prompt_ids = {prompt: encode_prompt(tokenizer, prompt) for prompt in {row.prompt for row in dialogues}}
    reply_ids = encode_replies(tokenizer, [row.reply for row in dialogues])
    ids = [prompt_ids[row.prompt] + reply for row, reply in zip(dialogues, reply_ids, strict=True)]
    gold = [gold_scores(row.prompt, row.reply) for row in dialogues]
    return [_Pair(ids=(ids[i], ids[i + 1]), gold=(gold[i], gold[i + 1])) for i in range(0, len(dialogues), 2)]


def _scorer_config(tokenizer: PreTrainedTokenizerFast, *, size: WorldSize) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.scorer_width,
        intermediate_size=size.scorer_ffn_width,
        num_hidden_layers=size.scorer_layers,
        num_attention_heads=size.scorer_heads,
        num_key_value_heads=size.scorer_heads,
        max_position_embeddings=size.max_positions,
        initializer_range=INITIALIZER_RANGE,
        num_labels=1,  # type: ignore[call-arg]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # The classifier reads the state at the last token that is not this one.
        pad_token_id=tokenizer.pad_token_id,
    )


def _plan_scorer(
    scorer: Scorer, pairs: Sequence[_Pair], *, size: WorldSize, rng: np.random.Generator
) -> TrainingJob[list[tuple[_Pair, float]]]:
    margins = np.array([first[scorer.name] - second[scorer.name] for first, second in (pair.gold for pair in pairs)])
    shares = rng.binomial(size.n_judges, 1 / (1 + np.exp(-margins))) / size.n_judges

    def loss_of(batch: list[tuple[_Pair, float]]) -> torch.Tensor:
        share = torch.tensor([share for _, share in batch], dtype=torch.float32)
        gaps = _score_gaps(scorer, [pair for pair, _ in batch])
        return functional.binary_cross_entropy_with_logits(gaps, share)

    return TrainingJob(
        name=scorer.name,
        model=scorer.model,
        batches=bucket_batches(
            list(zip(pairs, shares.tolist(), strict=True)),
            batch=size.scorer_batch,
            length_of=lambda row: max(len(ids) for ids in row[0].ids),
            rng=rng,
        ),
        loss_of=loss_of,
        learning_rate=size.scorer_learning_rate,
        step_cost=2 * size.scorer_batch * scorer.model.num_parameters(),
    )


def _score_gaps(scorer: Scorer, pairs: Sequence[_Pair]) -> torch.Tensor:
    """Score of the first reply minus that of the second, shape (pairs,)."""
    rows = [pair.ids[0] for pair in pairs] + [pair.ids[1] for pair in pairs]
    # Classifiers pool by the id of the padding, so they need no mask either.
    input_ids = pad_right(rows, value=scorer.tokenizer.pad_token_id)
    scores: torch.Tensor = scorer.model(input_ids=input_ids, use_cache=False).logits.squeeze(-1)
    return scores[: len(pairs)] - scores[len(pairs) :]
