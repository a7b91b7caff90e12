from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.microworld import World
from pipeline.microworld.size import WorldSize
from pipeline.microworld.world import build_world_of_size

_TINY = WorldSize(
    n_train_prompts=24,
    n_test_prompts=12,
    policy_vocabulary=320,
    policy_layers=2,
    policy_width=32,
    policy_heads=2,
    policy_ffn_width=64,
    policy_steps=12,
    policy_batch=8,
    scorer_vocabulary=320,
    scorer_layers=1,
    scorer_width=16,
    scorer_heads=1,
    scorer_ffn_width=32,
    scorer_steps=12,
    scorer_batch=8,
    n_heldout_pairs=40,
)


@pytest.fixture(scope="session")
def tiny_size() -> WorldSize:
    return _TINY


@pytest.fixture(scope="session")
def build_tiny() -> Callable[[Path, int], World]:
    def build(cache_root: Path, seed: int) -> World:
        return build_world_of_size(cache_root, seed=seed, size=_TINY, show_progress=False)

    return build


@pytest.fixture(scope="session")
def tiny_world(build_tiny: Callable[[Path, int], World], tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_tiny(tmp_path_factory.mktemp("worlds"), 3)
