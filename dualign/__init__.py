"""dualign: raise one score of a language model while keeping others above a line.

The public Python face. It asks the same question of the same code as the command ``dualign solve --table``, and opens
the runs that ``dualign run`` leaves. Importing it imports nothing heavy: what a name needs is loaded when it is used.

    import dualign

    result = dualign.solve(frame, reward="helpful", constraints=["harmless >= ref + 0.3"], beta=1.0)
    result                                   # a table: demanded, reference, lambda* with its interval, predicted
    result.multipliers["harmless"], result.trust.verdict, result.weights
    result.frontier().plot()
    result.save("out/")

    run = dualign.load_run("data/runs/embedded")
    run.dual, run.evaluation, run.tilted, run.policy_path

Errors are the package's own and say in one message what is wrong: :class:`InputError`, :class:`InfeasibleError` (no
reweighting of the rows meets the thresholds; its ``certificate`` proves it), :class:`NotCertifiedError`, and
:class:`CorruptArtifactError` for a damaged run. All are a :class:`DualignError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from pipeline.contracts.errors import CorruptArtifactError, DualignError, InputError
    from pipeline.dual.result import FrontierResult, SolveResult
    from pipeline.run.loaded import LoadedRun
    from stage1_dual.dual import InfeasibleError, KlBudgetError, NotCertifiedError

    __version__: str

__all__ = [
    "CorruptArtifactError",
    "DualignError",
    "FrontierResult",
    "InfeasibleError",
    "InputError",
    "KlBudgetError",
    "LoadedRun",
    "NotCertifiedError",
    "SolveResult",
    "__version__",
    "load_run",
    "solve",
]

_HOMES = {
    "CorruptArtifactError": "pipeline.contracts.errors",
    "DualignError": "pipeline.contracts.errors",
    "FrontierResult": "pipeline.dual.result",
    "InfeasibleError": "stage1_dual.dual",
    "InputError": "pipeline.contracts.errors",
    "KlBudgetError": "stage1_dual.dual",
    "LoadedRun": "pipeline.run.loaded",
    "NotCertifiedError": "stage1_dual.dual",
    "SolveResult": "pipeline.dual.result",
}


def solve(
    frame: pd.DataFrame | pa.Table | str | Path,
    *,
    reward: str,
    constraints: Sequence[str],
    beta: float | None = None,
    kl: float | None = None,
    prompt_id: str = "prompt_id",
    seed: int = 0,
    reserve: Mapping[str, float] | None = None,
    assurance: Mapping[str, float] | None = None,
    score_error: Mapping[str, float] | None = None,
    evaluation_prompts: int = 0,
    evaluation_responses: int = 0,
    correct_response_bias: bool = False,
    show_progress: bool = False,
) -> SolveResult:
    """Solve and certify the dual of a table of scored responses.

    A row is a response to a prompt, or a prompt with lists of scores, of any number of responses each. A column
    ``split`` with the values ``train`` and ``test`` keeps the test rows for held-out predictions; ``sample_index``
    names the responses in the weights.

    >>> import numpy as np, pyarrow as pa
    >>> rng = np.random.default_rng(0)
    >>> harmless = rng.normal(size=50 * 64)
    >>> frame = pa.table({
    ...     "prompt_id": np.repeat(np.arange(50), 64),
    ...     "helpful": rng.normal(size=50 * 64) - harmless / 2,
    ...     "harmless": harmless,
    ... })
    >>> result = solve(frame, reward="helpful", constraints=["harmless >= ref + 0.3"], beta=1.0)
    >>> {name: round(multiplier, 2) for name, multiplier in result.multipliers.items()}
    {'harmless': 0.83}
    >>> result.trust.verdict
    'ok'
    >>> result.weights.column_names
    ['prompt_id', 'sample_index', 'weight']

    Args:
        frame: a pandas DataFrame, a pyarrow Table, or the path of a Parquet file or of a folder of them.
        reward: column to maximise.
        constraints: texts such as ``"harmless >= ref + 0.3"`` (over the mean of the column, the reference policy's),
            ``"toxicity <= 0.1"``, ``"80 <= words <= 120"``, ``"share(harmless >= 0) >= 0.97"``,
            ``"each(category): harmless >= ref + 0.3"`` (docs/constraints.md has all forms).
        beta: KL strength, reward per nat.
        kl: the largest KL to spend instead of a beta, nats a prompt; beta is then an outcome.
        prompt_id: column that says which prompt a row answers, text or integers.
        seed: of the bootstrap that gives the intervals.
        reserve: by constraint, units of its statistic asked of the dual beyond the demand.
        assurance: by constraint, probability that the final evaluation calls it satisfied.
        score_error: by constraint, root mean square error of the scorer's differences, which the margin must outgrow.
        evaluation_prompts: size of the final evaluation; needed for ``assurance``.
        evaluation_responses: responses to each of its prompts; needed for ``assurance``.
        correct_response_bias: take the multipliers corrected for finitely many responses, where they can be.
        show_progress: show progress bars. A table that does not fit in memory is grouped in the system's temporary
            folder (``TMPDIR``) for as long as the result lives.

    Returns:
        The certified solution; with a DataFrame given, its tables are DataFrames, else pyarrow Tables.

    Raises:
        InputError: a column is missing or of the wrong type, a score is empty, NaN or infinite, or an argument is not
            what it must be; names it, its value and the rule.
        InfeasibleError: no reweighting of the rows meets the thresholds.
        KlBudgetError: no beta spends the KL budget: the constraints need more, or the best policy spends less.
        NotCertifiedError: the solution failed the independent check.
    """
    from pipeline.dual.result import solve_frame
    from pipeline.dual.solving import EvaluationSize

    return solve_frame(
        frame,
        prompt_id=prompt_id,
        reward=reward,
        constraints=constraints,
        beta=beta,
        kl=kl,
        seed=seed,
        safeguards={"reserve": reserve, "assurance": assurance, "score_error": score_error},
        evaluation=EvaluationSize(evaluation_prompts, evaluation_responses),
        correct_response_bias=correct_response_bias,
        show_progress=show_progress,
    )


def load_run(folder: str | Path) -> LoadedRun:
    """Open a run for its results; nothing of it is changed, and each part is read when it is asked for.

    >>> load_run("elsewhere/no-such-run")
    Traceback (most recent call last):
    ...
    pipeline.contracts.errors.InputError: there is no run 'elsewhere/no-such-run'

    Args:
        folder: of the run, such as ``data/runs/embedded``.

    Raises:
        InputError: there is no run in the folder.
    """
    from pipeline.run.loaded import load_run as load

    return load(Path(folder))


if not TYPE_CHECKING:  # a type checker knows the names above, and no others

    def __getattr__(name: str) -> Any:
        """Names of other modules, imported when they are used (PEP 562)."""
        if name == "__version__":
            from importlib.metadata import version

            return version("dualign")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        found = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return found

    def __dir__() -> list[str]:
        return sorted(__all__)
