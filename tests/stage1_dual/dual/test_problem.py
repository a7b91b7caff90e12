from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers.dual_problems import draw_scores

from stage1_dual.dual import DualProblem, InputError, solve_dual

R_PK, G_PKM = draw_scores(n_prompts=6, n_responses=5, n_constraints=2, seed=0)
B_M = np.array([0.1, -0.2])


def _with(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_pk": _with(R_PK, (2, 3), np.nan)}, r"`reward_pk` has 1 NaN .* \(prompt, response\): \(2, 3\) = nan"),
        (
            {"constraints_pkm": _with(G_PKM, (4, 0, 1), -np.inf)},
            r"`constraints_pkm` has 1 NaN or infinite value, .* \(4, 0, 1\) = -inf",
        ),
        ({"reward_pk": np.full((6, 5), np.nan)}, r"has 30 NaN or infinite values, .* and 25 more"),
        ({"reward_pk": R_PK[0]}, r"`reward_pk` has shape \(5,\); it must be \(prompts, responses\)"),
        ({"reward_pk": np.empty((0, 5))}, r"`reward_pk` has shape \(0, 5\); it must hold at least one"),
        ({"reward_pk": np.empty((5, 0))}, r"it must hold at least one prompt and one response"),
        ({"constraints_pkm": G_PKM[:, :4]}, r"`constraints_pkm` has shape \(6, 4, 2\); with `reward_pk` of shape"),
        ({"constraints_pkm": [["a", "b"]]}, r"`constraints_pkm` has dtype <U1; it must be an array of real numbers"),
        ({"reward_pk": R_PK * 1j}, r"`reward_pk` has dtype complex128"),
        ({"reward_pk": [[1.0, 2.0], [3.0]]}, r"`reward_pk` is not a rectangular array of numbers"),
        ({"reward_pk": np.ma.masked_greater(R_PK, 0)}, r"`reward_pk` is a masked array"),
        ({"reward_pk": np.where(R_PK > 2, None, R_PK)}, r"`reward_pk` has \d NaN or infinite"),
        ({"thresholds": [0.0, 0.0, 0.0]}, r"`thresholds` has shape \(3,\); it must be \(2,\), one per constraint"),
        ({"thresholds": 0.0}, r"`thresholds` has shape \(1,\); it must be \(2,\)"),
        ({"thresholds": [0.0, np.nan]}, r"`thresholds` is \[0\.0, nan\]; thresholds must be finite"),
        ({"beta": 0.0}, r"`beta` is 0\.0; it must be a positive, finite number"),
        ({"beta": -1.0}, r"`beta` is -1\.0; it must be a positive"),
        ({"beta": np.inf}, r"`beta` is inf; it must be a positive"),
        ({"beta": "strong"}, r"`beta` is 'strong'; it must be a positive"),
        ({"beta": 5e-324}, r"`beta` is 5e-324: rewards divided by it overflow"),
        ({"constraint_names": ["a", "a"]}, r"`constraint_names` is \['a', 'a'\]; it must be 2 distinct names"),
        ({"constraint_names": ["a"]}, r"it must be 2 distinct names"),
        ({"constraint_names": "ab"}, r"it must be 2 distinct names"),
    ],
)
def test_bad_arrays_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "reward_pk": R_PK,
        "constraints_pkm": G_PKM,
        "thresholds": B_M,
        "beta": 1.0,
        "constraint_names": None,
    } | change
    with pytest.raises(InputError, match=message):
        DualProblem.from_arrays(
            arguments["reward_pk"],
            arguments["constraints_pkm"],
            thresholds=arguments["thresholds"],
            beta=arguments["beta"],
            constraint_names=arguments["constraint_names"],
        )


ID_N = np.array([3, 1, 3, 1])
R_N = np.array([0.0, 1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("prompt_id_n", "reward_n", "constraints_n", "message"),
    [
        (ID_N, [0.0, np.nan, 2.0, np.inf], R_N, r"`reward_n` has 2 NaN or infinite values, at row: 1 = nan, 3 = inf"),
        (ID_N, R_N, [[0.0], [1.0], [np.nan], [3.0]], r"`constraints_nm` .* \(row, constraint\): \(2, 0\) = nan"),
        (ID_N[:3], R_N, R_N, r"`prompt_id_n` has shape \(3,\); it must be \(4,\), one id per row"),
        (ID_N, R_N, R_N[:3], r"`constraints_nm` has shape \(3,\); with 4 rows"),
        (ID_N, R_N[np.newaxis], R_N, r"`reward_n` has shape \(1, 4\); it must be \(rows,\)"),
        ([], [], [], r"`reward_n` is empty"),
        ([1.0, np.nan, 2.0, np.nan], R_N, R_N, r"`prompt_id_n` has missing ids at rows \[1, 3\]"),
        (np.array(["a", None, "b", "a"], dtype=object), R_N, R_N, r"`prompt_id_n` has missing ids at rows \[1\]"),
        (np.array(["a", 2, "b", "a"], dtype=object), R_N, R_N, r"`prompt_id_n` mixes types"),
    ],
)
def test_bad_rows_are_named(prompt_id_n: Any, reward_n: Any, constraints_n: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DualProblem.from_rows(prompt_id_n, reward_n, constraints_n, thresholds=0.0, beta=1.0)


@pytest.mark.parametrize("lam", [[-0.1, 0.0], [np.nan, 0.0], [1.0], [[1.0, 2.0]]])
def test_bad_multipliers_are_named(lam: Any) -> None:
    problem = DualProblem.from_arrays(R_PK, G_PKM, thresholds=B_M, beta=1.0)
    with pytest.raises(InputError, match=r"`lam` "):
        problem.tilted_weights(lam)
    with pytest.raises(InputError, match=r"`initial_multipliers` "):
        solve_dual(problem, initial_multipliers=lam)


def test_inputs_are_copied_not_changed_and_may_be_read_only_or_strided() -> None:
    wide_r, wide_g = np.repeat(R_PK, 2, axis=1), np.repeat(G_PKM, 2, axis=1)
    strided_r, strided_g = wide_r[:, ::2], np.asfortranarray(wide_g)[:, ::2]
    strided_r.flags.writeable = False
    before_r, before_g = strided_r.copy(), strided_g.copy()
    problem = DualProblem.from_arrays(strided_r, strided_g, thresholds=B_M, beta=1.0)
    solution = solve_dual(problem)
    np.testing.assert_array_equal(strided_r, before_r)
    np.testing.assert_array_equal(strided_g, before_g)
    plain = solve_dual(DualProblem.from_arrays(R_PK, G_PKM, thresholds=B_M, beta=1.0))
    np.testing.assert_array_equal(solution.multipliers, plain.multipliers)
    wide_g[:] = 0.0
    np.testing.assert_array_equal(solve_dual(problem).multipliers, plain.multipliers)


def test_problem_cannot_be_changed() -> None:
    problem = DualProblem.from_arrays(R_PK, G_PKM, thresholds=B_M, beta=1.0)
    with pytest.raises(AttributeError):
        problem.beta = 2.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        problem.thresholds_m[0] = 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_])
def test_other_dtypes_become_float64(dtype: type) -> None:
    r_pk = (R_PK > 0).astype(dtype)
    problem = DualProblem.from_arrays(r_pk, r_pk, thresholds=0.1, beta=1.0)
    assert problem.tilted_weights([0.5]).dtype == np.float64


def test_weights_keep_the_callers_row_order_and_sum_to_one_within_a_prompt() -> None:
    rng = np.random.default_rng(1)
    prompt_id_n = rng.permutation(np.repeat(np.array(["b", "a", "c", "d"]), [1, 4, 7, 2]))
    r_n, g_nm = rng.normal(size=14), rng.normal(size=(14, 2))
    problem = DualProblem.from_rows(prompt_id_n, r_n, g_nm, thresholds=[0.0, 0.0], beta=0.7)
    lam_m = np.array([0.3, 1.2])
    weights_n = problem.tilted_weights(lam_m)
    assert weights_n.shape == (14,)
    for prompt in "abcd":
        rows = prompt_id_n == prompt
        tilted = np.exp((r_n[rows] + g_nm[rows] @ lam_m) / 0.7)
        np.testing.assert_allclose(weights_n[rows], tilted / tilted.sum(), rtol=1e-12)


FRAME = {
    "id": np.array(["b", "a", "b", "a"]),
    "helpful": np.array([0.0, 1.0, 2.0, 3.0]),
    "harmless": np.array([1.0, 0.0, -1.0, 0.5]),
    "short": np.array([3, 1, 2, 5]),
}


@pytest.mark.parametrize("kind", [dict, pd.DataFrame, pa.table])
def test_a_frame_keeps_its_names_and_is_the_same_problem_as_its_rows(kind: Callable[[Any], Any]) -> None:
    arguments: dict[str, Any] = {"prompt_id": "id", "reward": "helpful", "beta": 2.0}
    found = DualProblem.from_frame(kind(FRAME), thresholds={"short": 2.6, "harmless": 0.2}, **arguments)
    scores_nm = np.column_stack([FRAME["short"], FRAME["harmless"]])
    rows = DualProblem.from_rows(FRAME["id"], FRAME["helpful"], scores_nm, thresholds=[2.6, 0.2], beta=2.0)
    assert found.constraint_names == ("short", "harmless")
    np.testing.assert_array_equal(solve_dual(found).multipliers, solve_dual(rows).multipliers)
    np.testing.assert_array_equal(found.tilted_weights([0.1, 0.3]), rows.tilted_weights([0.1, 0.3]))
    free = DualProblem.from_frame(kind(FRAME), thresholds={}, **arguments)
    assert solve_dual(free).multipliers.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"harmless": [1.0, None, 0.0, 0.0]}, r"`harmless` has 1 NaN or infinite value, at row: 1 = nan"),
        ({"helpful": ["x", "y", "z", "w"]}, r"`helpful` has dtype .*; it must be an array of real numbers"),
        ({"id": ["a", None, "b", "a"]}, r"`prompt_id_n` has missing ids at rows \[1\]"),
        ({"harmless": None}, r"the frame has no column 'harmless'"),
    ],
)
@pytest.mark.parametrize("kind", [pd.DataFrame, pa.table])
def test_bad_columns_are_named(change: dict[str, Any], message: str, kind: Callable[[Any], Any]) -> None:
    frame = kind({name: values for name, values in (FRAME | change).items() if values is not None})
    with pytest.raises(InputError, match=message):
        DualProblem.from_frame(frame, prompt_id="id", reward="helpful", thresholds={"harmless": 0.0}, beta=1.0)


def test_a_name_that_two_columns_have_is_refused() -> None:
    frame = pd.DataFrame(np.zeros((4, 3)), columns=["id", "helpful", "helpful"])
    with pytest.raises(InputError, match=r"`helpful` has shape \(4, 2\); it must be one column"):
        DualProblem.from_frame(frame, prompt_id="id", reward="helpful", thresholds={}, beta=1.0)


def test_dense_weights_have_the_shape_of_the_reward() -> None:
    weights_pk = DualProblem.from_arrays(R_PK, G_PKM, thresholds=B_M, beta=1.0).tilted_weights([0.5, 0.1])
    assert weights_pk.shape == R_PK.shape
    np.testing.assert_allclose(weights_pk.sum(axis=1), 1.0, rtol=1e-14)


def test_reference_means_are_means_over_prompts_of_prompt_means() -> None:
    problem = DualProblem.from_rows(
        [1, 1, 1, 2], [1.0, 2.0, 3.0, 10.0], [0.0, 0.0, 3.0, 5.0], thresholds=0.0, beta=1.0
    )
    assert problem.reference_reward == pytest.approx((2.0 + 10.0) / 2, rel=1e-15)
    assert problem.reference_means_m[0] == pytest.approx((1.0 + 5.0) / 2, rel=1e-15)
    # Within prompts: variances 2 (of 0, 0, 3) and 0 (one response).
    assert problem.score_scale_m[0] == pytest.approx(1.0, rel=1e-15)
