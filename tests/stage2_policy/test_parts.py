"""A factor for each part of a policy's change, so that several constraints are met at once."""

from __future__ import annotations

import numpy as np
import pytest

from stage2_policy.parts import OUTSIDE, SPREAD, Gaps, choose_part_factors, parts_of


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (["model.embed_tokens.weight", "model.norm.weight"], {OUTSIDE: 2}),
        (["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"], {OUTSIDE: 1, "in the lower layers": 1}),
        (
            [f"transformer.h.{n}.attn.c_attn.weight" for n in range(2)],
            {"in the lower layers": 1, "in the upper layers": 1},
        ),
        (
            [f"base_model.model.model.layers.{n}.q_proj.lora_B.default.weight" for n in range(25, 30)],
            {"in the lower layers": 2, "in the middle layers": 2, "in the upper layers": 1},
        ),
    ],
)
def test_parts_are_by_depth_whatever_a_network_calls_its_layers(names: list[str], sizes: dict[str, int]) -> None:
    parts = parts_of(names)
    assert {part: len(some) for part, some in parts.items()} == sizes
    assert sorted(name for some in parts.values() for name in some) == sorted(names)


def test_layers_are_ordered_by_number_not_by_text() -> None:
    parts = parts_of([f"model.layers.{n}.w" for n in (10, 9, 2)])
    assert parts["in the lower layers"] == ["model.layers.2.w"]
    assert parts["in the upper layers"] == ["model.layers.10.w"]


def test_what_is_known_surely_is_closed_by_the_smallest_change() -> None:
    slopes = np.array([[0.3, 0.1, 0.0], [0.1, 0.4, 0.0]])
    gaps = Gaps(np.array([0.02, -0.03]), 1e-12 * np.eye(2))
    factors = choose_part_factors(gaps, slopes)
    np.testing.assert_allclose(slopes @ (factors - 1), gaps.mean, atol=1e-8)
    assert factors[2] == pytest.approx(1.0)
    np.testing.assert_allclose(factors - 1, np.linalg.pinv(slopes) @ gaps.mean, atol=1e-8)


def test_what_is_not_known_is_left_as_it_is() -> None:
    gaps = Gaps(np.array([0.02, -0.03]), 1e6 * np.eye(2))
    np.testing.assert_allclose(choose_part_factors(gaps, np.ones((2, 3))), 1.0, atol=1e-6)


def test_one_measurement_as_sure_as_the_prior_closes_half() -> None:
    gaps = Gaps(np.array([0.01]), np.array([[SPREAD**2]]))
    np.testing.assert_allclose(choose_part_factors(gaps, np.ones((1, 1))), 1.005)


def test_more_constraints_than_parts_are_met_as_well_as_can_be() -> None:
    rng = np.random.default_rng(0)
    slopes, gap_m = rng.normal(size=(9, 3)), 0.01 * rng.normal(size=9)
    factors = choose_part_factors(Gaps(gap_m, 1e-8 * np.eye(9)), slopes)
    np.testing.assert_allclose(factors - 1, np.linalg.lstsq(slopes, gap_m, rcond=None)[0], atol=1e-4)


def test_constraints_of_one_column_are_no_fault() -> None:
    """Two bounds of a band on one score are told apart by nothing."""
    gaps = Gaps(np.array([0.02, 0.02]), np.full((2, 2), 1e-6))
    factors = choose_part_factors(gaps, np.array([[0.2, 0.1], [0.2, 0.1]]))
    assert np.isfinite(factors).all()
    assert np.array([0.2, 0.1]) @ (factors - 1) == pytest.approx(0.02, rel=0.01)
