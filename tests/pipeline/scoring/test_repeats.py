from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.contracts.errors import InputError
from pipeline.contracts.shards import write_parquet
from pipeline.scoring.repeats import estimate_noise, is_repeated, measured_sigma, read_noise


def test_the_noise_of_two_ratings_and_its_error() -> None:
    sigmas, errors = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        true_n = rng.normal(scale=3.0, size=100)
        noise = estimate_noise(true_n + rng.normal(scale=0.4, size=100), true_n + rng.normal(scale=0.4, size=100))
        sigmas.append(noise.sigma)
        errors.append(noise.standard_error)
    # Of a chi of 100 degrees: mean 0.4 (1 - 1/400), standard deviation 0.4 / sqrt(200).
    assert np.mean(sigmas) == pytest.approx(0.4 * (1 - 1 / 400), abs=4 * 0.4 / 200)
    assert np.mean(errors) == pytest.approx(0.4 / np.sqrt(200), rel=0.05)
    assert np.std(sigmas) == pytest.approx(0.4 / np.sqrt(200), rel=4 / np.sqrt(400))
    same = estimate_noise(np.ones(5), np.ones(5))
    assert (same.sigma, same.standard_error, same.rows) == (0.0, 0.0, 5)


def test_the_share_is_of_keys_and_more_of_it_adds() -> None:
    keys = [(f"p{k}", j) for k in range(200) for j in range(10)]
    few, more = ({key for key in keys if is_repeated(*key, share)} for share in (0.1, 0.3))
    assert few < more
    assert len(few) == pytest.approx(200, abs=4 * np.sqrt(2000 * 0.09))
    assert not any(is_repeated(*key, 0.0) for key in keys)
    assert all(is_repeated(*key, 1.0) for key in keys)


def test_too_few_are_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    with pytest.raises(InputError, match=r"0 rows of .* were scored twice; it needs 30"):
        measured_sigma(folder)
    for rows in (29, 30):
        columns = {
            "prompt_id": pa.array(["p"] * rows),
            "sample_index": pa.array(range(rows), pa.int32()),
            "value": pa.array([1.0] * rows),
            "again": pa.array([3.0] * rows),
        }
        schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()])
        write_parquet(folder / "repeats.parquet", pa.table(columns, schema=schema), metadata={})
        if rows == 29:
            with pytest.raises(InputError, match=r"raise `scorers\.judge\.repeat_share`"):
                measured_sigma(folder)
    assert measured_sigma(folder) == pytest.approx(np.sqrt(2.0))
    assert read_noise(tmp_path) is None
