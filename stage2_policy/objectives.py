"""The objectives of stage 2: their names, what each needs, and where its loss is. Importable without torch.

A new one is a function in :mod:`stage2_policy.losses` and a row here; docs/stage2.md says when to pick which.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.contracts.errors import InputError
from pipeline.contracts.section import nearest

if TYPE_CHECKING:
    from stage2_policy.losses import RowLoss


@dataclass(frozen=True)
class Objective:
    """An objective and what it needs.

    Attributes:
        row_loss: where its :class:`stage2_policy.losses.RowLoss` is, ``module:function``.
        uses_reference: whether it reads ``Targets.ref_logp``; the reference is then scored on every training response.
        uses_groups: whether it compares responses of a prompt, so that groups need at least 2.
        may_skip: whether a response counts by its tilted weight alone, so that leaving out responses of a small weight
            in all changes the minimiser by no more than that, in total variation.
        any_source: whether pi_lambda minimises it whatever the responses were drawn from, since it reads nothing but
            differences of log-ratios and scores within a group; otherwise they must be draws of pi_ref.
    """

    row_loss: str
    uses_reference: bool = True
    uses_groups: bool = True
    may_skip: bool = False
    any_source: bool = True

    def load_row_loss(self) -> RowLoss:
        """The loss of each response; imports torch."""
        module, _, function = self.row_loss.partition(":")
        loss: RowLoss = getattr(import_module(module), function)
        return loss


OBJECTIVES: dict[str, Objective] = {
    "tilted_pairwise": Objective("stage2_policy.losses:tilted_pairwise"),
    "tilted_nll": Objective(
        "stage2_policy.losses:tilted_nll", uses_reference=False, uses_groups=False, may_skip=True, any_source=False
    ),
    "dpo": Objective("stage2_policy.losses:dpo"),
}


def find_objective(name: str) -> Objective:
    """The objective of that name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    if name not in OBJECTIVES:
        raise InputError(f"there is no such objective{nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name]
