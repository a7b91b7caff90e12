"""From a recipe file and settings of the command line to a configuration, every fault of it at once."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.recipe import RunConfig
from pipeline.contracts.errors import ConfigError, InputError
from pipeline.contracts.problem import MAX_CONSTRAINTS, Direction, require_consistent
from pipeline.contracts.section import nearest
from pipeline.contracts.tables import PROMPT_COLUMNS
from pipeline.scorers.kinds import KINDS, kind_of

RECIPES = Path(__file__).parents[1] / "recipes"
_MOST_SHOWN = 20
"""Constraints without a scorer that are named one by one."""
_NAME = re.compile(r"[A-Za-z_][\w-]{0,99}")


def load_config(
    path: Path, overrides: Mapping[str, str] | None = None, *, pairs_limit: str | None = None
) -> RunConfig:
    """Read a recipe and apply ``section.key -> text`` overrides (text is read as YAML).

    Args:
        path: a YAML file, or the bare name of a shipped recipe.
        overrides: dotted key to text, as on the command line.
        pairs_limit: text for ``training.pairs.limit`` of a recipe that trains on pairs of a data set.

    Raises:
        ConfigError: lists every fault, with the nearest valid name where a name is unknown.
    """
    found = _find_recipe(path)
    source = f"{found}" + (" with the settings of the command line" if overrides else "")
    try:
        tree = yaml.load(found.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"not valid YAML: {error}"], source=str(found)) from error
    except RecursionError as error:
        raise ConfigError(["not valid YAML: it is nested too deeply"], source=str(found)) from error
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror or error}"], source=str(found)) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"holds {type(tree).__name__}; it must be a mapping of settings"], source=str(found))
    for key, text in (overrides or {}).items():
        _set(tree, key, text)
    training = tree.get("training")
    if pairs_limit is not None and isinstance(training, Mapping) and training.get("pairs") is not None:
        _set(tree, "training.pairs.limit", pairs_limit)
    _look_beside(found, tree)
    return build_config(tree, source=source)


def build_config(tree: Mapping[str, Any], *, source: str) -> RunConfig:
    """Validate a nested mapping of settings.

    Raises:
        ConfigError: lists every fault.
    """
    faults: list[str] = []
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        faults.extend(_describe(fault) for fault in error.errors())
    faults.extend(_cross_faults(tree))
    if config is not None and not faults:
        try:
            require_consistent([constraint for constraint, _ in config.stated_constraints()])
        except InputError as error:
            faults.append(f"`constraints`: {error}")
    if faults or config is None:
        raise ConfigError(list(dict.fromkeys(faults)), source=source)
    return config


def _find_recipe(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = RECIPES / f"{path.name}.yaml"
    if path.parent == Path() and shipped.is_file():
        return shipped
    names = [recipe.stem for recipe in RECIPES.glob("*.yaml")]
    raise ConfigError(
        [f"there is no such file, and no such shipped recipe{nearest(path.stem, names)}"], source=str(path)
    )


def _look_beside(recipe: Path, tree: Mapping[str, Any]) -> None:
    """What a kind of scorer looks for in a folder is in the recipe's own, unless it names another."""
    scorers = tree.get("scorers")
    for scorer in scorers.values() if isinstance(scorers, Mapping) else ():
        kind = kind_of(scorer) if isinstance(scorer, dict) else None
        if kind is not None and kind.folder_setting is not None:
            scorer.setdefault(kind.folder_setting, str(recipe.parent))


def _set(tree: dict[str, Any], key: str, text: str) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError([f"`{key}`: `{section}` is a value, not a section"], source="the command line")
        node = child
    if text in get_args(Direction):  # a shell has taken the quotes that YAML wants around `>=` and `=`
        node[leaf] = text
        return
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            [f"`{key}` is {text!r}, which is not a YAML value: {error}"], source="the command line"
        ) from error


def _describe(fault: Any) -> str:
    # Within a scorer, pydantic names its kind as if it were a setting.
    in_scorer = fault["loc"][:1] == ("scorers",)
    kinded = 2 if in_scorer else 1 if fault["loc"][:1] == ("beta",) else None
    place = ".".join(str(part) for k, part in enumerate(fault["loc"]) if k != kinded)
    kind, value = fault["type"], fault.get("input")
    if kind == "union_tag_invalid":
        tag = str(fault["ctx"]["tag"])
        return f"`{place}.kind` is {tag!r}; there is no such kind{nearest(tag, KINDS)}"
    if kind == "union_tag_not_found":
        return f"`{place}` is {value!r}; a scorer is a mapping of settings"
    if kind == "extra_forbidden":
        return f"unknown setting `{place}`{nearest(str(fault['loc'][-1]), _fields_at(fault['loc'][:-1]))}"
    if kind == "missing":
        return f"`{place}` is missing; it has no default"
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(value, str | int | float | bool) or value is None:
        return f"`{place}` is {value!r}: {message[:1].lower()}{message[1:]}"
    return f"`{place}`: {message}" if place else message


def _fields_at(location: Sequence[str | int]) -> list[str]:
    model: Any = RunConfig
    for k, part in enumerate(location):
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            annotation: Any = model.model_fields[str(part)].annotation
            arguments: Any = getattr(annotation, "__args__", ())
            model = arguments[1] if getattr(annotation, "__origin__", None) is dict else annotation
            if type(None) in arguments:  # a section that may be left out
                model = arguments[0]
        elif location[0] == "scorers" and k == 2:
            model = KINDS[str(part)]
        # Other keys of a dict section (names of scorers, constraints) leave the model as it is.
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _cross_faults(tree: Mapping[str, Any]) -> list[str]:
    """Faults between sections; read from the raw tree, so that they are found beside the others."""
    scorers, constraints = tree.get("scorers"), tree.get("constraints")
    faults: list[str] = []
    if isinstance(constraints, Mapping) and len(constraints) > MAX_CONSTRAINTS:
        # Faults of each would bury this one.
        return [f"`constraints` has {len(constraints)} entries; a problem has at most {MAX_CONSTRAINTS}"]
    if isinstance(scorers, Mapping):
        faults.extend(
            f"`scorers.{_shown(name)}`: a name is at most 100 letters, digits, `_` and `-`, and begins with a letter"
            for name in scorers
            if not _NAME.fullmatch(str(name))
        )
        reward = tree.get("reward")
        if isinstance(reward, str) and reward not in scorers:
            faults.append(f"`reward` is {reward!r}: there is no such scorer{nearest(reward, map(str, scorers))}")
        if isinstance(constraints, Mapping):
            faults.extend(_constraint_faults(constraints, scorers, reward))
    faults.extend(_column_faults(constraints, tree.get("prompts")))
    if isinstance(constraints, Mapping) and not constraints:
        faults.append("`constraints` is empty; it needs at least one")
    faults.extend(_pair_faults(tree))
    faults.extend(_until_faults(tree))
    published = tree.get("published")
    if isinstance(published, Mapping) and isinstance(published.get("constraints"), Mapping):
        bounds = {str(name): bound for name, bound in constraints.items()} if isinstance(constraints, Mapping) else {}
        faults.extend(
            f"`published.constraints.{name}`: there is no such constraint{nearest(str(name), bounds)}"
            for name in published["constraints"]
            if str(name) not in bounds
        )
        faults.extend(
            f"`published.constraints.{name}`: a gain is better where it is higher, and this constraint is from above; "
            "turn its score with `sign: -1`"
            for name in published["constraints"]
            if isinstance(bound := bounds.get(str(name)), Mapping) and bound.get("direction") == "<="
        )
    return faults


def _constraint_faults(constraints: Mapping[Any, Any], scorers: Mapping[Any, Any], reward: object) -> Iterator[str]:
    """Names of constraints, and of the scorers that they are computed from."""
    unknown = 0
    for name, bound in constraints.items():
        if not _NAME.fullmatch(str(name)):
            yield (
                f"`constraints.{_shown(name)}`: a name is at most 100 letters, digits, `_` and `-`, and begins with a "
                "letter"
            )
        for setting, score in _scores_of(name, bound):
            if score not in scorers:
                unknown += 1
                if unknown <= _MOST_SHOWN:
                    there = nearest(str(score), map(str, scorers))
                    yield (
                        f"`constraints.{_shown(name)}{setting}` is {_shown(score)!r}: there is no such scorer{there}"
                        if setting
                        else f"`constraints.{_shown(name)}`: there is no scorer of this name{there}"
                    )
            elif score == reward and setting != ".per" and _is_of_the_mean(bound):
                yield f"`constraints.{_shown(name)}` bounds the reward itself; a constraint bounds another score"
    if unknown > _MOST_SHOWN:
        yield f"`constraints`: {unknown - _MOST_SHOWN} more have no scorer of their name"


def _column_faults(constraints: object, prompts: object) -> Iterator[str]:
    """Columns of the prompts that constraints name: prompts have two, one of them where the recipe says so."""
    settings = prompts if isinstance(prompts, Mapping) else {}
    has_categories = settings.get("source", "embedded") == "embedded" or settings.get("category_column") is not None
    for name, bound in constraints.items() if isinstance(constraints, Mapping) else ():
        if not isinstance(bound, Mapping):
            continue
        where, each = bound.get("where"), bound.get("each")
        asked = [("where", column) for column in where] if isinstance(where, Mapping) else []
        asked += [("each", each)] if each is not None else []
        for setting, column in asked:
            if column not in PROMPT_COLUMNS:
                yield (
                    f"`constraints.{_shown(name)}.{setting}` names the column {_shown(column)!r}; prompts have "
                    f"{' and '.join(PROMPT_COLUMNS)}"
                )
            elif column == "category" and not has_categories:
                yield (
                    f"`constraints.{_shown(name)}.{setting}` is of the category, which prompts have where "
                    "`prompts.category_column` names it"
                )


def _scores_of(name: object, bound: object) -> Iterator[tuple[str, object]]:
    """The settings of a constraint that name a scorer, with what they name."""
    settings = bound if isinstance(bound, Mapping) else {}
    yield (".score", settings["score"]) if settings.get("score") is not None else ("", name)
    if settings.get("per") is not None:
        yield ".per", settings["per"]


def _is_of_the_mean(bound: object) -> bool:
    """Whether a constraint bounds the mean of its score over all prompts, which of the reward is no constraint."""
    settings = bound if isinstance(bound, Mapping) else {}
    return settings.get("statistic", "mean") == "mean" and not any(
        settings.get(name) is not None for name in ("where", "each", "per")
    )


def _shown(name: object) -> str:
    """A name in a message: it may be long, or hold what a terminal would follow."""
    text = str(name).encode("unicode_escape").decode() if not str(name).isprintable() else str(name)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _pair_faults(tree: Mapping[str, Any]) -> list[str]:
    """Scores that pairs of a data set cannot have: those that are looked up by the key of a sampled response."""
    training, scorers, constraints = tree.get("training"), tree.get("scorers"), tree.get("constraints")
    if not isinstance(training, Mapping) or training.get("pairs") is None or not isinstance(scorers, Mapping):
        return []
    bounds = constraints if isinstance(constraints, Mapping) else {}
    used = dict.fromkeys(
        [tree.get("reward"), *(score for name, bound in bounds.items() for _, score in _scores_of(name, bound))]
    )
    return [
        f"`scorers.{name}.kind` is {kind.kind_name()!r}, which has scores of the sampled responses alone, and "
        "`training.pairs` names other ones; it must be a scorer that computes its scores"
        for name in used
        if isinstance(scorer := scorers.get(name), Mapping)
        and (kind := kind_of(scorer)) is not None
        and not kind.scores_any_response
    ]


def _until_faults(tree: Mapping[str, Any]) -> Iterator[str]:
    """Prompts can be added where some were left out, and slacks be foretold of what no tail moves."""
    sampling, prompts = tree.get("sampling"), tree.get("prompts")
    until = sampling.get("until") if isinstance(sampling, Mapping) else None
    if until is None:
        return
    scorers = tree.get("scorers")
    if isinstance(scorers, Mapping):
        yield from (
            f"`scorers.{_shown(name)}.kind` is {kind.kind_name()!r}, which has scores of responses that are there "
            "already, and `sampling.until` draws more; it must be a scorer that computes its scores"
            for name, scorer in scorers.items()
            if isinstance(scorer, Mapping)
            and scorer.get("table") is not None
            and (kind := kind_of(scorer)) is not None
            and not kind.scores_any_response
        )
    constraints = tree.get("constraints")
    if isinstance(constraints, Mapping):
        yield from (
            f"`constraints.{_shown(name)}.statistic` is 'cvar', the mean of a tail whose beginning moves with the "
            "sample, of which `sampling.until` can tell nothing; bound a share or a shortfall, or leave it out"
            for name, bound in constraints.items()
            if isinstance(bound, Mapping) and bound.get("statistic") == "cvar"
        )
    most = until.get("most_prompts") if isinstance(until, Mapping) else None
    if not isinstance(most, int):
        return
    limit = prompts.get("limit") if isinstance(prompts, Mapping) else None
    if limit is None:
        yield (
            f"`sampling.until.most_prompts` is {most}, and all prompts take part from the start; `prompts.limit` "
            "(`--limit N`) says how many are drawn for first"
        )
    elif isinstance(limit, int) and limit > most:
        yield f"`sampling.until.most_prompts` is {most}, fewer than `prompts.limit`, {limit}, drawn for first"


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, which also refuses a key written twice (YAML would keep the last one in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # of another mapping, whose settings the own ones go before
                continue
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)
