"""Training settings that differ in a few places."""

from __future__ import annotations

from typing import Any

from stage2_policy.settings import TrainSettings


def changed(settings: TrainSettings, **change: Any) -> TrainSettings:
    """The settings with some changed, checked anew."""
    return TrainSettings(**{**settings.model_dump(), **change})
