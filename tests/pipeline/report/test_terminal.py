from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from pipeline.report.terminal import print_stage1, print_stage2, render_view, stage1_table, stage2_table
from pipeline.report.views import Cell, Row, TableView

LONG_NAME = "refusal_of_questions_that_need_no_refusal"


def _text(renderable: Any, *, width: int, terminal: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=terminal, color_system="truecolor" if terminal else None).print(
        renderable
    )
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_stage1_shows_what_was_demanded_and_predicted(two_bounds: Any, width: int) -> None:
    text = _text(stage1_table(two_bounds.dual), width=width)
    for bound in two_bounds.dual["constraints"]:
        assert f"{bound['direction']} {bound['threshold']:.3f}" in text
        assert f"{bound['multiplier']:.3f}" in text
        assert "[{:.3f}, {:.3f}]".format(*bound["multiplier_ci95"]) in text
        origin = 0.0 if bound["margin"] is None else bound["reference"]
        assert f"{bound['predicted_corrected'] - origin:.3f}" in text
        assert f"{bound['heldout'] - (bound['heldout_reference'] if origin else 0.0):.3f}" in text
        assert f"{bound['heldout_slack']:+.3f}" in text
    assert "ref + 0.800" in text
    assert "binding" in text
    assert f"{two_bounds.dual['kl']['predicted']:.3f} nats" in text
    assert f"median {two_bounds.dual['diagnostics']['ess_median']:.1f} of 48" in text
    trust = two_bounds.dual["trust"]
    reason = trust["reasons"][0]
    assert f"Trust in lambda*: {trust['verdict'].upper()}. {reason[0].upper()}{reason[1:]}." in " ".join(text.split())
    assert "Evaluation: NOT YET" in text
    corrected = two_bounds.dual["constraints"][0]["multiplier_corrected"]
    assert f"corrected for finite responses, as the intervals are, {corrected:.3f}" in " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
def test_stage2_shows_what_was_realised(two_bounds: Any, width: int) -> None:
    text = _text(stage2_table(two_bounds.evaluation, two_bounds.dual), width=width)
    assert two_bounds.evaluation["status"] == "violated"
    assert "Evaluation: VIOLATED. harmless misses its demand of +0.800" in " ".join(text.split())
    assert f"Trust in lambda*: {two_bounds.dual['trust']['verdict'].upper()}" in text
    for bound in two_bounds.evaluation["constraints"]:
        assert bound["status"] in text
        assert f"{bound['direction']} {bound['threshold']:.3f}" in text
        origin = 0.0 if bound["margin"] is None else bound["reference"]
        assert f"{bound['realised'] - origin:.3f}" in text
        assert "[{:.3f}, {:.3f}]".format(*(end - origin for end in bound["ci95"])) in text
    reward = two_bounds.evaluation["reward"]
    path = f"{reward['reference']:.3f} reference -> {reward['predicted']:.3f} predicted -> {reward['realised']:.3f}"
    assert path in " ".join(text.split())
    lagrangian = two_bounds.evaluation["lagrangian"]
    assert f"{lagrangian['closed_fraction']:.2f} [{lagrangian['closed_fraction_ci95'][0]:.2f}" in text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_nothing_is_cut_or_runs_over(two_bounds: Any, width: int) -> None:
    long = [{**bound, "name": f"{LONG_NAME}_{bound['name']}"} for bound in two_bounds.dual["constraints"]]
    rungs = [
        {**rung, "multipliers": {f"{LONG_NAME}_{name}": value for name, value in rung["multipliers"].items()}}
        for rung in two_bounds.dual["ladder"]["rungs"]
    ]
    dual = {**two_bounds.dual, "constraints": long, "ladder": {**two_bounds.dual["ladder"], "rungs": rungs}}
    evaluated = [{**bound, "name": f"{LONG_NAME}_{bound['name']}"} for bound in two_bounds.evaluation["constraints"]]
    evaluation = {**two_bounds.evaluation, "constraints": evaluated}
    shown = {
        stage1_table(dual): "[{:.3f}, {:.3f}]".format(*long[1]["predicted_ci95"]),
        stage2_table(evaluation, dual): "[{:.3f}, {:.3f}]".format(*evaluated[1]["ci95"]),
    }
    for renderable, interval in shown.items():
        text = _text(renderable, width=width)
        assert max(map(len, text.splitlines())) <= width
        assert "\N{HORIZONTAL ELLIPSIS}" not in text
        assert interval in text
        assert re.search(r"^(binding|violated)\b", text, re.MULTILINE)  # a verdict is never folded
        names = [bound["name"] for bound in long]
        if width < 72:  # rows below each other: the names have the whole width
            assert all(name in "".join(text.split()) for name in names)


@pytest.mark.parametrize("n_columns", [2, 4, 7])
def test_no_width_cuts_a_number(n_columns: int) -> None:
    header = tuple(Cell(f"column {place}") for place in range(n_columns))
    values = [f"{place}.2345678" for place in range(n_columns)]
    view = TableView(title="t", header=header, rows=(Row(tuple(Cell(value, "x") for value in values)),))
    for width in range(24, 100):
        text = _text(render_view(view), width=width)
        assert all(value in text for value in values), width


def test_a_narrow_terminal_shows_the_names_and_every_value(two_bounds: Any) -> None:
    table = stage2_table(two_bounds.evaluation, two_bounds.dual)
    narrow, wide = (_text(table, width=width) for width in (60, 100))
    for name in ("helpful", "harmless", "toxicity"):
        assert re.search(rf"^{name}$", narrow, re.MULTILINE)
        assert re.search(rf"^{name} ", wide, re.MULTILINE)
    for found in (two_bounds.evaluation["reward"], *two_bounds.evaluation["constraints"]):
        margin = found.get("margin") is not None
        value = f"{found['realised'] - (found['reference'] if margin else 0.0):{'+' if margin else ''}.3f}"
        assert re.search(rf"^  realised +{re.escape(value)} \[", narrow, re.MULTILINE)


def test_a_pipe_gets_no_colour_and_a_terminal_does(two_bounds: Any) -> None:
    renderable = stage2_table(two_bounds.evaluation, two_bounds.dual)
    assert "\x1b" not in _text(renderable, width=80)
    assert "\x1b[1;31mviolated" in _text(renderable, width=80, terminal=True)


def test_an_ascii_stream_is_enough(two_bounds: Any) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(file=stream, width=80)
    print_stage1(two_bounds.dual, console=console)
    print_stage2(two_bounds.evaluation, two_bounds.dual, console=console)
    stream.flush()
    assert b"lambda*" in raw.getvalue()


def test_markup_in_a_name_is_text(one_bound: Any) -> None:
    reward = {**one_bound.dual["reward"], "name": "[red]x[/red]"}
    assert "[red]x[/red]" in _text(stage1_table({**one_bound.dual, "reward": reward}), width=120)


@pytest.mark.parametrize("width", [40, 120])
def test_markup_in_any_cell_or_fact_is_text(width: int) -> None:
    """As in the name of one constraint of an `each`."""
    cells = (Cell("1"), Cell("harmless[topic=a]", "of [b]"))
    heads = (Cell("[i]n[/i]"), Cell("score[topic=a]", "detail"))
    view = TableView("[b]title[/b]", heads, (Row(cells),), facts=(("fact[x=y]", "text[x=y]"),))
    text = _text(render_view(view), width=width)
    wanted = ["[b]title[/b]", "harmless[topic=a]", "score[topic=a]", "of [b]", "fact[x=y]", "text[x=y]"]
    assert [one for one in wanted if one not in text] == []
