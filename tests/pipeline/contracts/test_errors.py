"""Errors reach the user from workers in other processes, too."""

import pickle

import pytest

from pipeline.contracts.errors import (
    ConfigError,
    ConstraintsNotSatisfiedError,
    DualignError,
    InputError,
    MissingExtraError,
    WorkerFailedError,
)
from stage1_dual.dual.errors import InfeasibleError, NotCertifiedError


@pytest.mark.parametrize(
    "error",
    [
        InputError("the value is wrong"),
        WorkerFailedError("the sampler failed"),
        MissingExtraError(package="vllm", extra="sample", purpose="sampling with vLLM"),
    ],
)
def test_an_error_of_a_worker_comes_back_as_it_was(error: DualignError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found)) == (type(error), str(error))


def test_exit_codes() -> None:
    codes = {DualignError: 1, InputError: 2, ConfigError: 2, InfeasibleError: 3, NotCertifiedError: 4}
    assert {kind: kind.exit_code for kind in codes} == codes
    assert ConstraintsNotSatisfiedError.exit_code == 5
