"""The steps in their order, and the commands that run several: what ``dualign --help`` shows, and imports nothing."""

from __future__ import annotations

SUMMARIES: dict[str, str] = {
    "prepare": "write the prompts; build the embedded world where a recipe uses it",
    "sample": "draw responses from the reference policy",
    "score": "score the responses",
    "solve": "minimise the dual and certify the answer",
    "export": "write the tilted table",
    "train": "fine-tune once on the tilted responses",
    "evaluate": "compare the trained policy with the prediction",
    "report": "write the figures and the page",
}

STAGES: dict[str, tuple[str, ...]] = {
    "stage1": ("prepare", "sample", "score", "solve", "export"),
    "stage2": ("train", "evaluate", "report"),
    "run": tuple(SUMMARIES),
}
