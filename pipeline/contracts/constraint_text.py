"""Constraints as texts: the form of the command line and of ``dualign.solve``.

    harmless >= ref + 0.5                         a mean; `ref` is the reference policy's own
    share(harmless >= 0) >= 0.97                  the share of responses
    shortfall(harmless, 0) <= 0.1                 the mean of what responses lack to 0
    cvar(harmless, 0.05) >= -4                    the mean of the worst twentieth
    facts per claims >= 0.9                       a ratio of means
    80 <= words <= 120                            two bounds
    mentions_she = 0.5                            an equality
    harmless[category=benign] >= 0                of some rows alone
    each(category): harmless >= ref + 0.5         one for each value of a column

``[...]`` follows whatever is bounded, with several values as ``category=a|b`` and several columns after commas. A
name that is not letters, digits, ``_``, ``.`` and ``-`` stands in single or double quotes; such a quote inside it is
written twice.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline.contracts.errors import InputError
from pipeline.contracts.problem import (
    MAX_FRONTIER_POINTS,
    Constraint,
    Direction,
    check_name,
    require_consistent,
)
from pipeline.contracts.statistics import Statistic

_NAME = r"""(?:"(?:[^"]|"")*"|'(?:[^']|'')*'|[^\W\d][\w.-]*)"""
_VALUE = r"""(?:"(?:[^"]|"")*"|'(?:[^']|'')*'|[^\s,|=\[\]"']+)"""
_LEFT = rf"""
    (?:(?P<kind>share|shortfall|cvar)\s*\(\s*(?P<inner>{_NAME})\s*(?P<separator>>=|<=|,)\s*(?P<value>[^\s(),]+)\s*\)
      |(?P<name>{_NAME})(?:\s+per\s+(?P<per>{_NAME}))?)
    \s*(?:\[(?P<where>(?:"(?:[^"]|"")*"|'(?:[^']|'')*'|[^\]"'])*)\])?"""
_EACH = rf"^\s*(?:each\s*\(\s*(?P<each>{_NAME})\s*\)\s*:)?\s*"
_BOUND = re.compile(
    rf"{_EACH}{_LEFT}\s*(?P<direction>>=|<=|==?)\s*(?:(?P<reference>ref)\s*(?P<sign>[+-])\s*)?(?P<number>[^\s]+)\s*$",
    re.VERBOSE,
)
_BAND = re.compile(rf"{_EACH}(?P<low>[^\s<>=]+)\s*<=\s*{_LEFT}\s*<=\s*(?P<high>[^\s<>=]+)\s*$", re.VERBOSE)
_WHERE = re.compile(rf"\s*(?P<column>{_NAME})\s*=\s*(?P<values>{_VALUE}(?:\s*\|\s*{_VALUE})*)\s*(?P<end>,|$)")

_FORMS = (
    "'NAME >= NUMBER', 'NAME <= NUMBER', 'NAME = NUMBER', 'NAME >= ref + NUMBER' or 'NUMBER <= NAME <= NUMBER', where "
    "for NAME there may also stand 'share(NAME >= NUMBER)', 'shortfall(NAME, NUMBER)', 'cvar(NAME, LEVEL)', 'NAME per "
    "NAME', each with '[COLUMN=VALUE]' after it, and before it all 'each(COLUMN):'"
)
_NAME_RULE = (
    "a NAME of other characters than letters, digits, `_`, `.` and `-`, or that begins with none of letters and `_`, "
    "stands in quotes: '\"safety score\" >= 0.5'"
)


def read_constraint(text: str) -> tuple[Constraint, ...]:
    """Read one text: one constraint, or the two of a band.

    Raises:
        InputError: the text has another form, a name cannot be one, or the statistic cannot have such a setting.
    """
    parts = _read_parts(text)
    return tuple(bound.at(_number(bound.number, text)) for bound in parts)


def read_constraints(texts: Sequence[str]) -> tuple[Constraint, ...]:
    """Read texts that hold together, in order, and give those that bound the same statistic distinct names.

    Raises:
        InputError: as :func:`read_constraint`; it is one text where several are expected; or two that are the same, or
            contradict each other.
    """
    if isinstance(texts, str):
        raise InputError(f"the constraints are the text {texts!r}; give a list of texts")
    found = distinct_names([bound for text in texts for bound in read_constraint(text)])
    require_consistent(found)
    return found


def read_constraint_families(texts: Sequence[str]) -> tuple[tuple[Constraint, ...], ...]:
    """Read texts whose numbers may be ranges ``START:STOP:STEP``: for each constraint one for each of its numbers.

    Raises:
        InputError: as :func:`read_constraints`, or a range that is malformed or of more than
            :data:`~pipeline.contracts.problem.MAX_FRONTIER_POINTS` numbers.
    """
    families = [
        tuple(bound.at(number) for number in _range(bound.number, text))
        for text in texts
        for bound in _read_parts(text)
    ]
    names = [bound.name for bound in distinct_names([family[0] for family in families])]
    named = tuple(
        tuple(replace(bound, name=name) for bound in family) for name, family in zip(names, families, strict=True)
    )
    require_consistent([family[0] for family in named if len(family) == 1])
    return named


def hold_ranges(text: str) -> tuple[bool, ...]:
    """Whether the number of each constraint that a text stands for is a range ``START:STOP:STEP``.

    Raises:
        InputError: as :func:`read_constraint`, but for the number.
    """
    return tuple(bound.is_range for bound in _read_parts(text))


def with_number(text: str, number: str) -> tuple[str | None, ...]:
    """For each constraint that a text stands for, in order, the text with another number in its place.

    Args:
        text: one that :func:`read_constraint` reads.
        number: what stands in place of the threshold or the margin.

    Returns:
        The texts; None where one number is that of several constraints, as under ``each``.
    """
    if (match := _BAND.match(text)) is not None:
        spans = [match.span(end) for end in ("low", "high")]
    elif (match := _BOUND.match(text)) is not None:
        spans = [(match.start("sign" if match["reference"] else "number"), match.end("number"))]
        number = f"+ {number}" if match["reference"] else number
    else:
        raise _malformed(text)
    if match["each"] is not None:
        return (None,) * len(spans)
    return tuple(f"{text[:start]}{number}{text[end:]}" for start, end in spans)


def distinct_names(constraints: Sequence[Constraint]) -> tuple[Constraint, ...]:
    """The constraints, those of one name told apart by their side: ``words.at_least``, ``words.at_most``.

    Raises:
        InputError: two bound the same statistic from the same side, both by a threshold or both by a margin.
    """
    named = _told_apart(constraints, {">=": ".at_least", "<=": ".at_most", "=": ".equal"})
    named = [
        replace(one, name=f"{one.name}_over_reference") if again and one.margin is not None else one
        for one, again in zip(named, _repeated(named), strict=True)
    ]
    for one, again in zip(named, _repeated(named), strict=True):
        if again:
            first, second = [other.text() for other in named if (other.name, other.each) == (one.name, one.each)][:2]
            if first == second:
                raise InputError(f"two constraints are the same: {first!r}")
            raise InputError(f"{first!r} and {second!r} bound the same from the same side; one of them is enough")
    return tuple(named)


def _told_apart(constraints: Sequence[Constraint], suffix: dict[Direction, str]) -> list[Constraint]:
    return [
        replace(one, name=one.name + suffix[one.direction]) if again else one
        for one, again in zip(constraints, _repeated(constraints), strict=True)
    ]


def _repeated(constraints: Iterable[Constraint]) -> list[bool]:
    # What `each` makes of a name is another one for every value.
    names = [(one.name, one.each) for one in constraints]
    counts = Counter(names)
    return [counts[name] > 1 for name in names]


@dataclass(frozen=True)
class _Parts:
    """A bound whose number is not read yet."""

    name: str
    direction: Direction
    statistic: Statistic
    each: str | None
    sign: str | None
    number: str

    @property
    def is_range(self) -> bool:
        return self.number.count(":") == 2

    def at(self, number: float) -> Constraint:
        margin = None if self.sign is None else number if self.sign == "+" else -number
        return Constraint(
            self.name,
            self.direction,
            threshold=number if margin is None else None,
            margin=margin,
            statistic=self.statistic,
            each=self.each,
        )


def _read_parts(text: str) -> tuple[_Parts, ...]:
    try:
        band = _BAND.match(text)
        if band is not None:
            low, high = (_number(band[end], text) for end in ("low", "high"))
            if low >= high:
                raise InputError(f"its lower end, {low:g}, is not below its upper one, {high:g}")
            return (
                _parts(band, text, ">=", ".at_least", number=band["low"]),
                _parts(band, text, "<=", ".at_most", number=band["high"]),
            )
        match = _BOUND.match(text)
        if match is None:
            raise _malformed(text)
        direction: Direction = ">=" if match["direction"] == ">=" else "<=" if match["direction"] == "<=" else "="
        sign = match["sign"] if match["reference"] else None
        return (_parts(match, text, direction, "", number=match["number"], sign=sign),)
    except InputError as error:
        if str(error).startswith("constraint "):
            raise
        raise InputError(f"constraint {text!r}: {error}") from None


def _parts(
    match: re.Match[str], text: str, direction: Direction, suffix: str, *, number: str, sign: str | None = None
) -> _Parts:
    statistic = _statistic(match, text, direction)
    for name in statistic.scores:
        check_name(name, what=f"constraint {text!r}: the name")
    each = None if match["each"] is None else _unquoted(match["each"])
    return _Parts(statistic.text() + suffix, direction, statistic, each, sign, number)


def _statistic(match: re.Match[str], text: str, direction: Direction) -> Statistic:
    where = _where(match["where"], text)
    if match["kind"] is None:
        per = None if match["per"] is None else _unquoted(match["per"])
        return Statistic(_unquoted(match["name"]), per=per, where=where)
    score, separator = _unquoted(match["inner"]), match["separator"]
    value = _number(match["value"], text)
    if (match["kind"] == "share") == (separator == ","):
        raise _malformed(text)
    if match["kind"] == "share":
        if separator == ">=":
            return Statistic(score, "share", at_least=value, where=where)
        return Statistic(score, "share", at_most=value, where=where)
    if match["kind"] == "shortfall":
        return Statistic(score, "shortfall", below=value, where=where)
    return Statistic(score, "cvar", level=value, tail="upper" if direction == "<=" else "lower", where=where)


def _where(text: str | None, whole: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if text is None:
        return ()
    found: list[tuple[str, tuple[str, ...]]] = []
    place = 0
    while not found or place < len(text):
        match = _WHERE.match(text, place)
        if match is None or (match["end"] == "," and match.end() == len(text)):
            raise InputError(
                f"constraint {whole!r}: [{text}] is not of the form [COLUMN=VALUE] or [COLUMN=VALUE|VALUE]"
            )
        values = re.findall(_VALUE, match["values"])
        found.append((_unquoted(match["column"]), tuple(map(_unquoted, values))))
        place = match.end()
    return tuple(found)


def _unquoted(name: str) -> str:
    quote = name[:1]
    return name[1:-1].replace(quote * 2, quote) if quote in {'"', "'"} else name


def _number(number: str, text: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise _malformed(text) from None


def _range(number: str, text: str) -> list[float]:
    """The numbers of a range, its end among them; a single number is a range of one."""
    if number.count(":") != 2:
        return [_number(number, text)]
    try:
        start, stop, step = map(float, number.split(":"))
    except ValueError:
        raise InputError(f"constraint {text!r}: the range {number!r} is not three numbers START:STOP:STEP") from None
    if not (all(map(math.isfinite, (start, stop, step))) and step > 0 and stop >= start):
        raise InputError(f"constraint {text!r}: a range needs STEP > 0 and STOP >= START, {number!r} given")
    n_steps = (stop - start) / step
    if not n_steps < MAX_FRONTIER_POINTS:
        raise InputError(
            f"constraint {text!r}: the range {number!r} has {n_steps:.4g} steps; a frontier has at most "
            f"{MAX_FRONTIER_POINTS} points"
        )
    # The end belongs to the range although its sum of steps is rounded.
    return [start + step * place for place in range(math.floor(n_steps * (1 + 1e-12) + 1e-9) + 1)]


def _malformed(text: str) -> InputError:
    return InputError(f"constraint {text!r} is not of the form {_FORMS}; {_NAME_RULE}")
