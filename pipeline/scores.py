"""Scored samples as arrays: what the dual, the export and the evaluation read, joined by key and never by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.contracts.errors import CorruptArtifactError, InputError
from pipeline.contracts.shards import ShardedTable
from pipeline.contracts.tables import SAMPLE_KEY, SCORES


@dataclass(frozen=True)
class ScoredRows:
    """One row a response, sorted by key, in the user's own directions and units.

    Attributes:
        prompt_id_n: shape (n,), strings.
        sample_index_n: shape (n,), integers.
        reward_n: shape (n,), reward units.
        constraints_nm: shape (n, m), score units.
    """

    prompt_id_n: np.ndarray
    sample_index_n: np.ndarray
    reward_n: np.ndarray
    constraints_nm: np.ndarray

    @property
    def n_samples(self) -> int:
        """Number of responses."""
        return len(self.reward_n)

    def select(self, mask_n: np.ndarray) -> ScoredRows:
        """The rows where a boolean mask, shape (n,), is true."""
        return ScoredRows(
            prompt_id_n=self.prompt_id_n[mask_n],
            sample_index_n=self.sample_index_n[mask_n],
            reward_n=self.reward_n[mask_n],
            constraints_nm=self.constraints_nm[mask_n],
        )

    def by_prompt(self) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
        """Prompt ids in sorted order, and for each its rewards (k_p,) and its constraint scores (k_p, m)."""
        prompt_ids, starts = np.unique(self.prompt_id_n, return_index=True)
        cuts = starts[1:]
        return list(prompt_ids), np.split(self.reward_n, cuts), np.split(self.constraints_nm, cuts)


def read_scores(
    scores: Path, *, reward: str, constraints: Sequence[str], split: str, expected: set[tuple[str, int]] | None = None
) -> ScoredRows:
    """Join the score tables of the reward and the constraints on their key.

    Args:
        scores: folder with one table a scorer.
        reward: scorer of the reward.
        constraints: scorers of the constraints, in order.
        split: ``train`` or ``test``.
        expected: keys that must all be there, no more and no fewer.

    Raises:
        CorruptArtifactError: a scorer has other rows than the others or than ``expected``.
        InputError: a score is not finite; names the rows.
    """
    columns = {name: _read_one(scores / name, split) for name in dict.fromkeys([reward, *constraints])}
    keys = {
        name: set(zip(*(t.column(key).to_pylist() for key in SAMPLE_KEY), strict=True)) for name, t in columns.items()
    }
    wanted = expected if expected is not None else keys[reward]
    for name, found in keys.items():
        if found != wanted:
            raise CorruptArtifactError(
                f"{scores / name}: {len(wanted - found)} {split} rows missing and {len(found - wanted)} unexpected; "
                "score the samples again"
            )
        _require_finite(columns[name], name)
    key_table = columns[reward]
    return ScoredRows(
        prompt_id_n=key_table.column("prompt_id").to_numpy(),
        sample_index_n=key_table.column("sample_index").to_numpy(),
        reward_n=_values(columns[reward]),
        constraints_nm=np.stack([_values(columns[name]) for name in constraints], axis=1),
    )


def _read_one(folder: Path, split: str) -> pa.Table:
    table = ShardedTable(folder=folder, schema=SCORES, metadata={}).read(split, columns=[*SAMPLE_KEY, "value"])
    return table.sort_by([(key, "ascending") for key in SAMPLE_KEY])


def _values(table: pa.Table) -> np.ndarray:
    return np.array(table.column("value").to_numpy(), dtype=np.float64)


def _require_finite(table: pa.Table, name: str) -> None:
    wrong = table.filter(pc.invert(pc.is_finite(table["value"])))
    if wrong.num_rows:
        shown = "; ".join(
            f"{row['prompt_id'][:12]}… sample {row['sample_index']}: {row['value']}"
            for row in wrong.slice(0, 3).to_pylist()
        )
        raise InputError(
            f"scorer `{name}` gave {wrong.num_rows} scores that are not finite ({shown}); all must be finite"
        )
