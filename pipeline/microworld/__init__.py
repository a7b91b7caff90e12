"""The embedded default: a small counselling-chat world with ground truth, built from source on first use.

Importing this package imports neither torch nor transformers; only building does.
"""

from pipeline.microworld.gold import gold_scores
from pipeline.microworld.world import Prompt, World, build_reference, build_world, read_world

__all__ = ["Prompt", "World", "build_reference", "build_world", "gold_scores", "read_world"]
