"""What users wrote stays text in a card, whatever it looks like."""

from __future__ import annotations

import pytest

from pipeline.contracts.markdown import code_markdown, plain_markdown


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain words, 3.5", "plain words, 3.5"),
        ("a|b", r"a\|b"),
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("[link](http://x) and *this*", r"\[link\](http://x) and \*this\*"),
        ("$x_1$", r"\$x\_1\$"),
        ("two\nlines\tand  more", "two lines and more"),
        ("\x1b[31m", r"\\x1b\[31m"),
    ],
)
def test_nothing_of_a_text_is_markup(value: str, written: str) -> None:
    assert plain_markdown(value) == written


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("harmless", "`harmless`"),
        ("a|b", r"`a\|b`"),
        ("one ` two", "``one ` two``"),
        ("`", "`` ` ``"),
        ("", "`  `"),
        ("two\nlines", "`two lines`"),
    ],
)
def test_code_ends_where_it_ends(value: str, written: str) -> None:
    assert code_markdown(value) == written
