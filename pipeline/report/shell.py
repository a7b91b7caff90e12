"""The shell of a page: template, style and scripts in one file that opens offline and asks the network for nothing.

A page is a Jinja template that extends ``shell.html.jinja``. Its scripts are files of ``assets/``, after the libraries
of ``vendor/``; what they read is one block of JSON, compressed. The page's own policy lets nothing else run: scripts
are named by their hash, and no address may be fetched, so that a text of a model that became markup would do nothing.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_HERE = Path(__file__).parent
_ASSETS = _HERE / "assets"
_LIBRARIES = ("d3.min.js", "plot.umd.min.js")
_DATA = "application/json"


def render_page(
    template: str, *, scripts: Sequence[str] = (), data: Mapping[str, Any] | None = None, **context: Any
) -> str:
    """A whole page.

    Args:
        template: name of a template of this package that extends ``shell.html.jinja``.
        scripts: names of files of ``assets/``, in the order they run in, as one function; with none there are no
            libraries either.
        data: what the scripts read, as JSON has it: ``readData()`` of ``data.js``.
        context: of the template.
    """
    blocks: list[tuple[str, Markup]] = []
    if scripts:
        own = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in scripts)
        bodies = [(_HERE / "vendor" / name).read_text(encoding="utf-8") for name in _LIBRARIES]
        blocks += [("", _as_script(body)) for body in (*bodies, f'(() => {{\n"use strict";\n{own}\n}})();')]
        blocks.insert(0, (_DATA, packed(data or {})))
    style = (_ASSETS / "page.css").read_text(encoding="utf-8")
    return (
        page_environment()
        .get_template(template)
        .render(style=Markup(style), scripts=blocks, policy=_policy(blocks), **context)  # noqa: S704  # a file of ours
    )


def packed(data: Mapping[str, Any]) -> Markup:
    """A value as JSON, compressed, in letters that mean nothing to HTML."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Lone surrogates, which JSON may hold and UTF-8 may not, are shown as what they are.
    squeezed = gzip.compress(text.encode("utf-8", "backslashreplace"), mtime=0)
    return Markup(f'"{base64.b64encode(squeezed).decode("ascii")}"')  # noqa: S704  # base64


def data_uri(content: bytes, kind: str) -> str:
    """An address that holds its own content."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def page_environment() -> Environment:
    """Templates of this package: everything is escaped, nothing undefined passes."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,  # whatever the file is called
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"typeset": typeset, "plain": plain}
    return environment


def _as_script(body: str) -> Markup:
    """A script that HTML and XML read alike."""
    body = body.strip().replace("]]>", "]] >")
    if re.search(r"</script|<!--", body, re.IGNORECASE):
        raise ValueError("a script holds `</script` or `<!--`, where HTML would end or hide it")
    return Markup(f"//<![CDATA[\n{body}\n//]]>")  # noqa: S704  # files of ours


def _policy(blocks: Sequence[tuple[str, str]]) -> str:
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for kind, text in blocks if kind != _DATA
    ]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Control characters but for tabs and line breaks, and what turns the direction of the text around it."""


def visible(text: str) -> str:
    """A text for the page: what no reader would see is shown as an escape."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def plain(value: Any) -> str:
    """A diagnostic as text: numbers to four digits, in mappings and lists too."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def typeset(text: str) -> str:
    """The terminal's ASCII as print has it. Only for our own words and numbers."""
    text = re.sub(r"(?<![\w-])-(?=[\d])", "\N{MINUS SIGN}", text)
    for ascii_form, printed in (
        ("lambda*", "λ*"),
        ("Lambda*", "λ*"),
        (">=", "≥"),
        ("<=", "≤"),
        ("->", "→"),
        ("<-", "←"),
        ("ref - ", "ref − "),
    ):
        text = text.replace(ascii_form, printed)
    return text
