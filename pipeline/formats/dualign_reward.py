"""The reward of online training: r + <lambda*, g - b> of a solved dual, one number a response.

This file needs the standard library alone, and is handed on with ``reward.json`` beside it, which has beta, the score
that is maximised and, of every constraint, its score, what is done to it, its coefficient and its threshold. Whoever
trains writes a third file beside both, ``scorers.py``, with one function::

    def score(prompts, completions):
        return {"helpful": [0.3, ...], "harmless": [-1.2, ...]}

where a prompt is a list of messages, a completion a text, and the lists have one raw score a response, in the units
and directions that the dual was solved in, of every name in ``reward.json``. The scores must be those of the same
scorers: lambda* means nothing for others.

``trl_reward`` is for TRL, ``compute_score`` for verl, ``reward_func`` for OpenRLHF. Each sums before the trainer can
normalise anything. README.md says which settings keep the trainer from scaling the sum.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent

Scores = Mapping[str, float]


def _share(value: float, transform: Mapping[str, Any], scores: Scores) -> float:
    del scores
    at_least, at_most = transform.get("at_least"), transform.get("at_most")
    return float((at_least is None or value >= at_least) and (at_most is None or value <= at_most))


def _shortfall(value: float, transform: Mapping[str, Any], scores: Scores) -> float:
    del scores
    return float(max(transform["below"] - value, 0.0))


def _tail(value: float, transform: Mapping[str, Any], scores: Scores) -> float:
    del scores
    sign = 1.0 if transform["tail"] == "lower" else -1.0
    at, level = transform["at"], transform["level"]
    return float(at - sign * max(sign * (at - value), 0.0) / level)


def _ratio(value: float, transform: Mapping[str, Any], scores: Scores) -> float:
    return float(value - transform["ratio"] * _score(scores, transform["per"]))


TRANSFORMS: dict[str, Callable[[float, Mapping[str, Any], Scores], float]] = {
    "identity": lambda value, *_: value,
    "share": _share,
    "shortfall": _shortfall,
    "cvar": _tail,
    "ratio": _ratio,
}
"""What can be done to a raw score before its coefficient multiplies it, by the ``kind`` of its ``transform``.

A share counts a response or not, a shortfall is what it lacks, a tail (``cvar``) charges what lies beyond ``at``, a
ratio takes off so much of another score. Each takes the score, the ``transform``, and all scores of the response.
"""


def load_terms(folder: Path) -> dict[str, Any]:
    """The content of the ``reward.json`` of a folder.

    Raises:
        ValueError: a constraint asks for a transform that this file does not have.
    """
    document: dict[str, Any] = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
    for term in document["constraints"]:
        kind = term["transform"]["kind"]
        if kind not in TRANSFORMS:
            raise ValueError(
                f"the constraint {term['name']!r} transforms its score by {kind!r}; this file knows "
                f"{sorted(TRANSFORMS)}"
            )
    return document


@cache
def read_terms() -> dict[str, Any]:
    """The content of the ``reward.json`` beside this file, read once; raises as :func:`load_terms`."""
    return load_terms(FOLDER)


def combine(scores: Scores, terms: Mapping[str, Any] | None = None) -> float:
    """R + sum_j c_j (T_j(g_j) - b_j), reward units.

    Args:
        scores: the raw scores of a response by name.
        terms: as :func:`read_terms` gives them, by default those of the file beside this one.

    Raises:
        ValueError: a score is missing or not finite.
    """
    terms = read_terms() if terms is None else terms
    total = _score(scores, terms["reward"]["score"])
    for term in terms["constraints"]:
        transform = term["transform"]
        value = TRANSFORMS[transform["kind"]](_score(scores, term["score"]), transform, scores)
        total += term["coefficient"] * (value - term["threshold"])
    return total


def beta() -> float:
    """KL strength that the multipliers were solved for, reward per nat."""
    return float(read_terms()["beta"])


def score_responses(
    prompts: Sequence[Any], completions: Sequence[str]
) -> tuple[list[float], dict[str, Sequence[float]]]:
    """The rewards of responses, and their raw scores by name.

    Raises:
        ValueError: ``scorers.py`` gives no list of finite numbers, one a response, for a score.
    """
    scores = _load_scorer(FOLDER)(list(prompts), list(completions))
    terms = read_terms()
    names = [terms["reward"]["score"]]
    for term in terms["constraints"]:
        names += [term["score"], *filter(None, [term["transform"].get("per")])]
    for name in names:
        if name not in scores:
            raise ValueError(f"score() of scorers.py gives no {name!r}; it gives {sorted(scores)}")
        if len(scores[name]) != len(completions):
            raise ValueError(
                f"score() of scorers.py gives {len(scores[name])} values of {name!r} for {len(completions)} responses"
            )
    rewards = [combine({name: scores[name][place] for name in names}) for place in range(len(completions))]
    return rewards, {name: scores[name] for name in names}


def trl_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float]:
    """For ``reward_funcs`` of TRL's RLOOTrainer and GRPOTrainer; the mean of every score is logged too."""
    del columns
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    rewards, scores = score_responses(prompts, texts)
    if log_metric is not None:
        for name, values in scores.items():
            log_metric(f"score/{name}", sum(values) / len(values))
    return rewards


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **others: Any
) -> dict[str, float]:
    """For ``reward.custom_reward_function`` of verl; the prompt's messages are the ground truth, as JSON."""
    del data_source, extra_info, others
    rewards, scores = score_responses([json.loads(ground_truth)], [solution_str])
    return {"score": rewards[0], **{f"score/{name}": float(values[0]) for name, values in scores.items()}}


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **others: Any
) -> dict[str, Any]:
    """For ``--reward.remote_url`` of OpenRLHF, which asks for one response at a time; labels are messages as JSON.

    Raises:
        ValueError: more than one response, or one whose text does not begin with its prompt.
    """
    del others
    if len(queries) != 1:
        raise ValueError(f"reward_func is asked for {len(queries)} responses; OpenRLHF asks for one at a time")
    query, prompt = queries[0], prompts[0]
    if not query.startswith(prompt):
        raise ValueError(f"the response to the prompt {prompt[:80]!r} does not begin with it")
    end = read_terms()["end_of_text"]
    text = query[len(prompt) :].removesuffix(end) if end else query[len(prompt) :]
    rewards, scores = score_responses([json.loads(labels[0])], [text])
    logs = {f"score/{name}": float(values[0]) for name, values in scores.items()}
    return {"rewards": rewards[0], "scores": rewards[0], "extra_logs": logs}


@cache
def _load_scorer(folder: Path) -> Callable[[list[Any], list[str]], Mapping[str, Sequence[float]]]:
    path = folder / "scorers.py"
    if not path.is_file():
        raise ValueError(f"there is no {path}; write it with a function score(prompts, completions)")
    spec = importlib.util.spec_from_file_location("dualign_scorers", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be loaded as a module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[list[Any], list[str]], Mapping[str, Sequence[float]]] = module.score
    return found


def _score(scores: Scores, name: str) -> float:
    if name not in scores:
        raise ValueError(f"there is no score {name!r}; there are {sorted(scores)}")
    value = float(scores[name])
    if not math.isfinite(value):
        raise ValueError(f"the score {name!r} is {value}; it must be finite")
    return value
