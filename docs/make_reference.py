"""Write the reference pages (``docs/reference/``) from the code: settings, command line, tables, Python.

    python docs/make_reference.py            # writes them; `make docs` and `make reference` do it first
    python docs/make_reference.py --check    # exit code 1 where a page on disk is not what the code says

It needs the core install alone. tests/test_docs.py checks the pages, so that they cannot go stale.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import inspect
import re
import sys
import textwrap
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import pyarrow as pa
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dualign  # noqa: E402
import stage1_dual.dual  # noqa: E402
from pipeline.commands.parsers import command_parsers  # noqa: E402
from pipeline.config.recipe import RunConfig  # noqa: E402
from pipeline.config.sections import ConstraintSettings, KlBudget  # noqa: E402
from pipeline.contracts import errors, tables  # noqa: E402
from pipeline.contracts.section import Section  # noqa: E402
from pipeline.scorers.kinds import KINDS  # noqa: E402

FOLDER = ROOT / "docs" / "reference"
_HEAD = "<!-- Written by docs/make_reference.py from the code; change it there, then run `make reference`. -->\n\n"


def pages() -> dict[str, str]:
    """Every page by its file name, as the code has it now."""
    made = {
        "settings.md": settings_page(),
        "command-line.md": command_page(),
        "tables.md": tables_page(),
        "python.md": python_page(),
    }
    return {name: _HEAD + text.rstrip() + "\n" for name, text in made.items()}


# Markdown.


def _cell(text: str) -> str:
    """A text as a cell of a table: one line, and no bar that would end it."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines) + "\n"


def _markdown(text: str) -> str:
    """A docstring's text in Markdown: its roles and double quotes of code are code."""
    text = re.sub(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"\bdocs/(\w+)\.md\b", r"[docs/\1.md](../\1.md)", text)
    return text.replace("``", "`")


# Settings.


def settings_page() -> str:
    """Every setting of a recipe: its values, its default, what it means."""
    sections = list(_sections_in(RunConfig, ""))
    parts = [
        "# Settings\n",
        (
            "Every setting of a recipe, with the values that it takes and its default. A recipe is one YAML file "
            "([recipes](../recipes.md)); each setting is an option of the command line too, by its dotted name: "
            "`--sampling.samples_per_prompt 128`. The command line wins. An unknown name is an error, and all "
            "faults of a recipe are reported together. `config.yaml` in a run has every value that was used.\n"
        ),
        "## The recipe as a whole\n",
        _settings_table(RunConfig, ""),
    ]
    for name, section in sections:
        parts += [f"## `{name}`\n", _intro(section), _settings_table(section, f"{name}.")]
    parts += [
        "## `constraints.NAME`\n",
        _intro(ConstraintSettings),
        "[Constraints](../constraints.md) has an example of every kind.\n",
        _settings_table(ConstraintSettings, "constraints.NAME."),
        "## A KL budget: `beta.kl`\n",
        _intro(KlBudget),
        _settings_table(KlBudget, "beta."),
        "## `scorers.NAME`\n",
        "A scorer's settings depend on its `kind` ([scorers](../scorers.md)).\n",
    ]
    for kind, settings in KINDS.items():
        parts += [f"### kind `{kind}`\n", _intro(settings), _settings_table(settings, "scorers.NAME.")]
        for name, field in settings.model_fields.items():
            nested = _section_of(field.annotation)
            if nested is not None and name == "endpoint":
                parts += [f"#### `{name}` of kind `{kind}`\n", _intro(nested)]
                parts += [_settings_table(nested, f"scorers.NAME.{name}.")]
    return "\n".join(parts)


def _sections_in(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections within a section by their dotted names, each before those within it; but for the KL budget."""
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None and inner is not KlBudget:
            yield f"{prefix}{name}", inner
            yield from _sections_in(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one, also where it may be left out; none where it holds several."""
    if get_origin(annotation) is dict:
        return None
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, Section):
            return one
    return None


def _intro(section: type[BaseModel]) -> str:
    text = inspect.cleandoc(section.__doc__ or "").split("\n\nRaises:")[0].split("\n\nAttributes:")[0]
    return _markdown(text) + "\n"


def _settings_table(section: type[BaseModel], prefix: str) -> str:
    notes = _field_notes(section)
    rows = []
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else _default(field)
        shown, note = f"`{prefix}{name}`", notes.get(name, "")
        if (inner := _section_of(field.annotation)) is not None and not note:
            shown, note = f"[{shown}](#{_anchor(shown)})", _intro(inner).split("\n\n")[0]
        rows.append([shown, _values(field.annotation, field.metadata), default, note])
    return _table(["setting", "value", "default", "meaning"], rows)


def settings_without_a_sentence() -> list[str]:
    """Settings of which the code says nothing; a sentence below the field says what it means."""
    sections: list[type[BaseModel]] = [RunConfig, KlBudget, ConstraintSettings, *KINDS.values()]
    for section in sections:  # grows while it is read: sections within sections
        for field in section.model_fields.values():
            if (found := _section_of(field.annotation)) is not None and found not in sections:
                sections.append(found)
    return [
        f"{section.__name__}.{name}"
        for section in sections
        for name in section.model_fields
        if not _field_notes(section).get(name)
        and name != "kind"
        and _section_of(section.model_fields[name].annotation) is None
    ]


def _field_notes(section: type[BaseModel]) -> dict[str, str]:
    """The string below each field of a section and of those it extends, by the field's name."""
    notes: dict[str, str] = {}
    for one in reversed(section.__mro__):
        if not issubclass(one, BaseModel) or one is BaseModel:
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr)):
                continue
            if isinstance(after.value, ast.Constant):
                notes[ast.unparse(statement.target)] = _markdown(inspect.cleandoc(str(after.value.value)))
    return notes


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, Mapping):
        return f"`{{{', '.join(f'{name}: {one:g}' for name, one in value.items())}}}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


_PLAIN = {bool: "true or false", int: "whole number", float: "number", str: "text", datetime.date: "date", Any: "any"}


def _values(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values of a type in words, with the bounds of its metadata."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        # The names of the kinds of scorers alone would fill a page.
        named = [one for one in arguments if one is not type(None)]
        if len(named) > 4:
            return "a scorer"
        return " or ".join(_values(one, metadata if len(named) == 1 else ()) for one in named)
    if origin is tuple:
        number = "" if arguments[-1] is Ellipsis else f", {len(arguments)} of them"
        return f"list of {_values(arguments[0])}{number}"
    if origin is list:
        return f"list of {_values(arguments[0])}"
    if origin is dict:
        return f"name: {_values(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    return " ".join([_PLAIN.get(annotation, str(annotation)), *_bounds(metadata)])


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for one in metadata:
        if isinstance(one, FieldInfo):
            yield from _bounds(one.metadata)
        for kind, sign, name in (
            (annotated_types.Gt, ">", "gt"),
            (annotated_types.Ge, "≥", "ge"),
            (annotated_types.Lt, "<", "lt"),
            (annotated_types.Le, "≤", "le"),
        ):
            if isinstance(one, kind):
                bound = getattr(one, name)
                yield f"{sign} {'2^31' if bound == 2**31 else format(bound, 'g')}"


# The command line.

_SHARED = 4
"""An option or a note that so many commands have, alike, is described once."""


def command_page() -> str:
    """Every command with its options, read off the parser."""
    commands = command_parsers()
    summaries = {name: (parser.description or "").rstrip(".") for name, parser in commands.items()}
    for name in commands:
        if name.endswith(" --table"):
            summaries[name] += ", of any table of scores, without a run"
    counts = Counter(_option(action) for parser in commands.values() for action in _shown(parser))
    shared = {option for option, count in counts.items() if count >= _SHARED}
    notes = Counter(note for parser in commands.values() for note in (parser.epilog or "").split("\n\n"))
    parts = [
        "# Command line\n",
        (
            "`dualign COMMAND --help` prints the same. Settings of the recipe are options of every command that "
            "takes a recipe: `--sampling.samples_per_prompt 64`, `--beta=0.5` ([settings](settings.md)). Results "
            "go to standard output, messages and progress to standard error.\n"
        ),
        _table(
            ["command", "what it does"],
            [[f"[`dualign {name}`](#{_anchor(f'dualign {name}')})", summaries[name]] for name in commands],
        ),
        "## Shared options\n",
        _table(["option", "meaning"], [list(option) for option in counts if option in shared]),
        "## Exit codes\n",
        _exit_codes(),
    ]
    for name, parser in commands.items():
        taken = [_option(action) for action in _shown(parser)]
        common = [re.split(r"[ ,`]", option[0].strip("`"))[0] for option in taken if option in shared]
        own = [option for option in taken if option not in shared]
        parts += [f"## `dualign {name}`\n", _sentence(summaries[name])]
        if own:
            parts.append(_table(["option", "meaning"], [list(option) for option in own]))
        if common:
            parts.append(f"Shared options: {', '.join(f'`{option}`' for option in common)}.\n")
        parts += [_note(note) for note in (parser.epilog or "").split("\n\n") if note and notes[note] < _SHARED]
    return "\n".join(parts)


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [
        action
        for action in parser._actions
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
    ]


def _option(action: argparse.Action) -> tuple[str, str]:
    """An option as it is given, and what it means with its choices and default."""
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    takes = action.nargs != 0
    if action.option_strings:
        value = f" {metavar}" if takes else ""
        text = ", ".join(f"`{name}{value}`" for name in action.option_strings)
    else:
        text = f"`{metavar}`"
    meaning = (action.help or "") % {"default": action.default, "prog": "dualign"} if action.help else ""
    if action.choices:
        meaning += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
    if action.required and action.option_strings:
        meaning += "; required"
    elif takes and action.default not in (None, [], argparse.SUPPRESS) and "(" not in meaning:
        meaning += f" (default: `{action.default}`)"
    return text, meaning


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}.\n"


def _note(text: str) -> str:
    """What stands below the options: a paragraph, or examples as they are typed."""
    head, _, lines = text.partition("\n")
    if head == "examples:":
        return f"```bash\n{textwrap.dedent(lines)}\n```\n"
    return _sentence(_markdown(re.sub(r"\s+", " ", text)))


def _exit_codes() -> str:
    lines = inspect.cleandoc(errors.__doc__ or "").splitlines()
    rows = [re.match(r"(\d+)\s{2,}(.+)", line) for line in lines]
    found = [[f"`{row[1]}`", row[2]] for row in rows if row is not None]
    found += [["`130`", "interrupted; finished work is kept"], ["`143`", "terminated; finished work is kept"]]
    return _table(["code", "meaning"], found)


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# Tables.


def tables_page() -> str:
    """The Arrow schemas of the tables of a run."""
    schemas = {
        "`prompts/`": (tables.PROMPTS, "One row a prompt. Key: `prompt_id`."),
        "`samples/`": (tables.SAMPLES, "One row a response. Key: `prompt_id`, `sample_index`."),
        "`scores/<scorer>/`": (tables.SCORES, "One row a response. Key: `prompt_id`, `sample_index`."),
        "`tilted/`": (
            tables.tilted_schema(["<name>"], ["<score>"]),
            (
                "One row a response, what other teams read. Key: `prompt_id`, `sample_index`. There is a "
                "`constraint_<name>` for each constraint, and a `score_<score>` for each score that stands in no such "
                "column."
            ),
        ),
        "`prompts/info.parquet`": (tables.INFO, "Columns of the prompts that scorers may read. Key: `prompt_id`."),
    }
    parts = [
        "# Tables\n",
        (
            "The tables of a run, as Arrow has them: Parquet with zstd, files named "
            f"`data/<split>-00000-of-0000N.parquet`, schema version {tables.SCHEMA_VERSION}. No column holds "
            "nulls. Rows join by key, never by position. What the columns mean, and the JSON files beside them, is in "
            "[artifacts](../artifacts.md).\n"
        ),
    ]
    for name, (schema, what) in schemas.items():
        rows = [[f"`{field.name}`", f"`{_arrow(field.type)}`"] for field in schema]
        parts += [f"## {name}\n", f"{what}\n", _table(["column", "type"], rows)]
    return "\n".join(parts)


def _arrow(kind: pa.DataType) -> str:
    return str(kind).replace("element: ", "").replace("item: ", "")


# Python.

_PUBLIC = (
    "solve",
    "SolveResult",
    "FrontierResult",
    "load_run",
    "LoadedRun",
    "DualignError",
    "InputError",
    "InfeasibleError",
    "KlBudgetError",
    "NotCertifiedError",
    "CorruptArtifactError",
)
_DUAL = (
    "DualProblem",
    "solve_dual",
    "DualSolution",
    "solve_frontier",
    "Frontier",
    "InfeasibilityCertificate",
    "Trust",
)


def python_page() -> str:
    """The public Python interface, from its docstrings."""
    missing = sorted(set(dualign.__all__) - {*_PUBLIC, "__version__"})
    assert not missing, f"dualign has public names that the reference leaves out: {missing}"
    parts = [
        "# Python\n",
        "`import dualign` is light and needs no torch: the core install has all of this page.\n",
        "## `dualign`\n",
    ]
    for name in _PUBLIC:
        parts += _describe(name, getattr(dualign, name), package="dualign")
    parts += [
        "## `stage1_dual.dual`\n",
        (
            "The dual on arrays: pure NumPy and SciPy. Scores are turned so that higher is better, and slack ≥ 0 "
            "means satisfied.\n"
        ),
    ]
    for name in _DUAL:
        parts += _describe(name, getattr(stage1_dual.dual, name), package="stage1_dual.dual")
    others = [name for name in stage1_dual.dual.__all__ if name not in {*_DUAL, *_PUBLIC}]
    rows = [[f"`{name}`", _summary(getattr(stage1_dual.dual, name))] for name in others]
    parts += ["### The rest of it\n", _table(["name", "what it is"], rows)]
    return "\n".join(parts)


def _summary(thing: Any) -> str:
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return f"a constant, of type `{type(thing).__name__}`"
    return _markdown(inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0])


def _describe(name: str, thing: Any, *, package: str) -> Iterator[str]:
    yield f"### `{package}.{name}`\n"
    if not inspect.isclass(thing):
        yield f"```python\n{_signature(name, thing)}\n```\n"
        yield from _docstring(thing.__doc__)
        return
    if issubclass(thing, Exception):
        bases = thing.__mro__[1].__name__
        code = getattr(thing, "exit_code", None)
        yield f"An error, a `{bases}`" + (f"; exit code {code} of the command line.\n" if code is not None else ".\n")
    yield from _docstring(thing.__doc__)
    for member, value in vars(thing).items():
        if member.startswith("_") or (issubclass(thing, Exception) and member == "exit_code"):
            continue
        if isinstance(value, property) or type(value).__name__ == "cached_property":
            getter = value.fget if isinstance(value, property) else value.func
            yield f"**`{name}.{member}`**\n"
            yield from _docstring(getter.__doc__)
        elif inspect.isfunction(value) or isinstance(value, classmethod | staticmethod):
            function = value if inspect.isfunction(value) else value.__func__
            yield f"```python\n{_signature(f'{name}.{member}', function)}\n```\n"
            yield from _docstring(function.__doc__)


def _signature(name: str, function: Any) -> str:
    """The signature on one line where it is short, else an argument a line."""
    signature = inspect.signature(function)
    parameters = [one for key, one in signature.parameters.items() if key not in {"self", "cls"}]
    texts: list[str] = []
    starred = False
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and not starred:
            texts.append("*")
            starred = True
        annotation = "" if one.annotation is one.empty else f": {one.annotation}"
        default = "" if one.default is one.empty else f" = {one.default!r}"
        texts.append(f"{one.name}{annotation}{default if annotation else default.replace(' ', '')}")
    back = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(texts)}){back}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {text},\n" for text in texts) + f"){back}"


_SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Yields")


def _docstring(text: str | None) -> Iterator[str]:
    """A docstring in Google's style as Markdown: paragraphs, examples as code, sections as lists."""
    paragraphs = re.split(r"\n(?=(?:Args|Returns|Raises|Attributes|Yields):\n)", inspect.cleandoc(text or ""))
    for part in paragraphs:
        head, _, body = part.partition("\n")
        if head.rstrip(":") in _SECTIONS and head.endswith(":"):
            title = {"Args": "Arguments"}.get(head.rstrip(":"), head.rstrip(":"))
            yield f"{title}:\n"
            items = _items(textwrap.dedent(body), plain=title in {"Returns", "Yields"})
            yield "".join(f"- {item}\n" for item in items)
        else:
            yield _with_code(part)


def _items(body: str, *, plain: bool) -> Iterator[str]:
    """The entries of a section: a name and what it is, over lines that are indented further."""
    if plain:
        yield re.sub(r"\s+", " ", _markdown(body)).strip()
        return
    for entry in re.split(r"\n(?=\S)", body.strip()):
        name, _, what = entry.partition(":")
        yield re.sub(r"\s+", " ", f"`{name.strip()}`: {_markdown(what)}").strip()


def _with_code(text: str) -> str:
    """Paragraphs, with examples (``>>>`` or indented) fenced."""
    made = []
    for paragraph in text.strip().split("\n\n"):
        if paragraph.startswith(">>>"):
            made.append(f"```pycon\n{paragraph}\n```")
        elif paragraph.startswith("    "):
            made.append(f"```python\n{textwrap.dedent(paragraph)}\n```")
        else:
            made.append(_markdown(paragraph))
    return "\n\n".join(made) + "\n"


def main() -> int:
    """Write the pages, or with ``--check`` compare them; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the pages with the code, write nothing")
    options = parser.parse_args()
    stale = {name: text for name, text in pages().items() if not _is(FOLDER / name, text)}
    if options.check:
        for name in stale:
            print(f"docs/reference/{name} is not what the code says; run `make reference`", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for name, text in stale.items():
        (FOLDER / name).write_text(text)
        print(f"docs/reference/{name}")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main())
