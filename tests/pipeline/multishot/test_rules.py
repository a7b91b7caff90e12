"""The steps of the iterative baseline, on policies that follow lambda by a known law."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.multishot.rules import Measured, gradient_step, secant_step


def test_the_gradient_step_is_projected() -> None:
    last = Measured(np.array([0.5, 0.1]), np.array([-0.4, 2.0]))
    np.testing.assert_allclose(gradient_step(last, step_size=0.25), [0.6, 0.0])


def test_the_first_step_is_newtons() -> None:
    hess = np.array([[2.0, 0.3], [0.3, 1.0]])
    last = Measured(np.array([1.0, 1.0]), np.array([-0.2, 0.1]))
    np.testing.assert_allclose(secant_step([last], hess), last.lam - np.linalg.solve(hess, last.slack), rtol=1e-5)


@pytest.mark.parametrize("response", [0.5, 0.8, 1.0, 1.5])
def test_the_secant_finds_the_multiplier_of_a_policy_that_follows_by_another_slope(response: float) -> None:
    """Slack = response * h * (lam - root): after two policies the secant knows the slope, and the third meets it."""
    hess, root = np.array([[1.3]]), 0.9
    history: list[Measured] = []
    lam = np.array([0.4])
    for _ in range(3):
        history.append(Measured(lam, response * hess[0] * (lam - root)))
        lam = secant_step(history, hess)
    assert lam[0] == pytest.approx(root, abs=1e-4)


def test_a_constraint_with_room_gives_its_multiplier_up_and_the_other_knows_it() -> None:
    hess = np.array([[1.0, 0.5], [0.5, 1.0]])
    last = Measured(np.array([0.3, 0.2]), np.array([-0.1, 0.9]))
    lam = secant_step([last], hess)
    assert lam[1] == 0.0
    # Stationary in the free multiplier, pushed against the bound in the other: the KKT conditions of the step.
    change = lam - last.lam
    gradient = last.slack + hess @ change
    assert gradient[0] == pytest.approx(0.0, abs=1e-5)
    assert gradient[1] >= 0.0


@given(
    lam=st.lists(st.floats(0, 5), min_size=2, max_size=2),
    slack=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    tilt=st.floats(-0.95, 0.95),
)
def test_noise_cannot_throw_the_step_beyond_four_of_newtons(lam: list[float], slack: list[float], tilt: float) -> None:
    hess = np.array([[1.0, tilt], [tilt, 1.0]])
    before = Measured(np.array(lam) + 1e-3, np.array(slack[:2]))
    last = Measured(np.array(lam), np.array(slack[2:]))
    found = secant_step([before, last], hess)
    assert np.all(found >= 0)
    # In the norm of the Hessian the projected step is no longer than the free one, which is at most 4 times Newton's.
    change = found - last.lam
    newton = np.linalg.solve(hess, last.slack)
    assert change @ hess @ change <= 16 * newton @ hess @ newton * (1 + 1e-3) + 1e-6


def test_dependent_constraints_do_not_stop_it() -> None:
    lam = secant_step([Measured(np.array([0.5, 0.5]), np.array([-0.2, -0.2]))], np.ones((2, 2)))
    assert np.isfinite(lam).all()
    assert lam.sum() == pytest.approx(1.2, abs=1e-3)
