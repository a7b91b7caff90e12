"""Published results as points of a plane: what a figure draws beside a run's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pipeline.contracts.errors import InputError
from pipeline.published.numbers import PublishedNumber, read_numbers


@dataclass(frozen=True)
class PublishedValue:
    """One coordinate, with its 95% interval over prompts where one is given."""

    value: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class PublishedPoint:
    """One policy of a paper: gains over the paper's own reference policy, in its score units.

    Attributes:
        paper: arXiv number.
        method: whose policy it is.
        setting: such as ``lambda=0.35``.
        score: gain in the score that a constraint bounds.
        reward: gain in the reward.
    """

    paper: str
    method: str
    setting: str
    score: PublishedValue
    reward: PublishedValue


def read_points(paper: str, sources: Collection[str], *, score: str, reward: str) -> tuple[PublishedPoint, ...]:
    """The policies of which a paper reports both metrics, in the order of ``numbers.csv``.

    Args:
        paper: arXiv number.
        sources: tables and figures to take them from.
        score: metric of the constraint's score, such as ``safety_gain``.
        reward: metric of the reward, such as ``helpful_gain``.

    Raises:
        InputError: a source has no policy with both; the message lists what there is.
    """
    numbers = [number for number in read_numbers() if number.paper == paper]
    points = []
    for source in sources:
        by_metric = {
            metric: {(one.method, one.setting): one for one in numbers if (one.source, one.metric) == (source, metric)}
            for metric in (score, reward)
        }
        both = [policy for policy in by_metric[score] if policy in by_metric[reward]]
        if not both:
            known = sorted({f"{one.source} ({one.metric})" for one in numbers if one.metric.endswith("_gain")})
            raise InputError(
                f"arXiv {paper}, {source}: no policy with both {score} and {reward}; "
                + (f"there are {', '.join(known)}" if known else "no gains are known of this paper")
            )
        points += [
            PublishedPoint(
                paper=paper,
                method=method,
                setting=setting,
                score=_value(by_metric[score], (method, setting)),
                reward=_value(by_metric[reward], (method, setting)),
            )
            for method, setting in both
        ]
    return tuple(points)


def _value(numbers: Mapping[tuple[str, str], PublishedNumber], policy: tuple[str, str]) -> PublishedValue:
    found = numbers[policy]
    ci95 = None if found.low is None or found.high is None else (found.low, found.high)
    if found.value is not None:
        return PublishedValue(found.value, ci95)
    assert ci95 is not None  # a row of the table has a value or an interval
    return PublishedValue((ci95[0] + ci95[1]) / 2, ci95)
