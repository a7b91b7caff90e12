"""The one table of the formats; a further one is a row here."""

from __future__ import annotations

from pipeline.formats import (
    axolotl,
    llama_factory,
    nemo_rl,
    openai_jsonl,
    rl_reward,
    trl_preference,
    trl_unpaired,
    weighted_sft,
)
from pipeline.formats.export_format import ExportFormat

FORMATS: dict[str, ExportFormat] = {
    one.name: one
    for one in (
        trl_preference.FORMAT,
        trl_unpaired.FORMAT,
        weighted_sft.FORMAT,
        openai_jsonl.FORMAT,
        nemo_rl.FORMAT,
        llama_factory.FORMAT,
        axolotl.FORMAT,
        rl_reward.FORMAT,
    )
}
"""The formats by name."""
