"""What libraries would tell their makers of a run, and to whom their engines would listen: nobody, unless asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

PRIVATE: Mapping[str, str] = MappingProxyType(
    {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_HOST_IP": "127.0.0.1",  # an engine of ours is on one machine
    }
)
"""Variables of the environment that Hugging Face, vLLM and Ray read when they are imported or started."""


def keep_private() -> None:
    """Set what the user has not set; before the libraries are imported, and again in workers on other machines."""
    for name, value in PRIVATE.items():
        os.environ.setdefault(name, value)
