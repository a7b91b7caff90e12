from __future__ import annotations

import pytest

from pipeline.contracts.errors import InputError
from stage2_policy import losses
from stage2_policy.objectives import OBJECTIVES, find_objective


def test_every_objective_is_the_loss_of_its_name() -> None:
    assert len(OBJECTIVES) >= 3
    for name, objective in OBJECTIVES.items():
        assert objective.load_row_loss() is getattr(losses, name)
        assert find_objective(name) is objective


def test_an_unknown_objective_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"there is no such objective; did you mean `tilted_pairwise`\?"):
        find_objective("tilted_pairwize")
    with pytest.raises(InputError, match="there is no such objective; known: dpo, tilted_nll, tilted_pairwise"):
        find_objective("xyz")
