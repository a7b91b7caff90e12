"""What generative safety classifiers are asked and answer: settings of a judge by the name of a family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["llama_guard"]

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    # Llama Guard 3 (meta-llama/Llama-Guard-3-8B): its chat template holds the hazards and the conversation, ends with
    # the header of the answer, and the answer begins with two line breaks, then `safe` or `unsafe`. The card reads the
    # probability of that word for a score.
    "llama_guard": {
        "answers": {"safe": 1.0, "unsafe": 0.0},
        "output": "log_odds",
        "answer_prefix": "\n\n",
    },
}
"""The settings of each preset; a recipe may give any of them another value."""


def with_preset(settings: Any) -> Any:
    """The settings of a judge as a recipe writes them, with those of its preset where it names one that there is."""
    if not isinstance(settings, dict) or settings.get("preset") not in PRESETS:
        return settings
    return {**PRESETS[settings["preset"]], **settings}
