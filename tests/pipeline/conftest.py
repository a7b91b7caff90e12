from __future__ import annotations

import pytest
from helpers.scorers import save_score_models


@pytest.fixture(scope="session")
def score_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny checkpoints that scorers read, by name; tests leave them as they are."""
    return save_score_models(tmp_path_factory.mktemp("score_models"))
