"""How large a world is built. The default is the one the recipe uses; tests build smaller ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorldSize:
    """Counts of prompts, layers, steps and so on; every field changes the result and enters the digest."""

    n_train_prompts: int = 400
    n_test_prompts: int = 160

    policy_vocabulary: int = 1024
    policy_layers: int = 2
    policy_width: int = 128
    policy_heads: int = 4
    policy_ffn_width: int = 352
    policy_steps: int = 2400
    policy_batch: int = 16
    policy_learning_rate: float = 4e-3
    policy_temperature: float = 1.25
    """Of its training: the checkpoint itself draws at the inverse, 0.8, and so fewer of the tokens that no reply of
    the grammar has there. Two minutes of training leave many, and what is scored after one cannot be foreseen."""

    scorer_vocabulary: int = 768
    scorer_layers: int = 2
    scorer_width: int = 64
    scorer_heads: int = 2
    scorer_ffn_width: int = 176
    scorer_steps: int = 400
    scorer_batch: int = 48  # pairs
    scorer_learning_rate: float = 3e-3
    n_judges: int = 15  # Bernoulli draws for each preference pair
    n_heldout_pairs: int = 2000

    max_positions: int = 256
