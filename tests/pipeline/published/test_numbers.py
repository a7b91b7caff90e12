"""The published numbers are those of the papers."""

import pytest

from pipeline.contracts.errors import CorruptArtifactError
from pipeline.published import numbers, read_numbers

METRICS = {
    "predicted_safety_gain",
    "safety_gain",
    "helpful_gain",
    "harmless_gain",
    "humour_gain",
    "helpful_mean",
    "safety_mean",
    "helpful_win_rate",
    "safety_win_rate",
    "threshold",
    "multiplier",
    "hours_a_model",
}


def find(**wanted):
    found = [row for row in read_numbers() if all(getattr(row, name) == value for name, value in wanted.items())]
    assert len(found) == 1, (wanted, found)
    return found[0]


def test_every_row_has_a_source_and_a_number():
    rows = read_numbers()
    assert len(rows) > 250
    for row in rows:
        assert row.paper in (numbers.ONE_SHOT, numbers.ITERATIVE)
        assert row.source
        assert row.method
        assert row.metric in METRICS
        assert (row.low is None) == (row.high is None)
        assert row.value is not None or row.low is not None
        if row.low is not None and row.high is not None:
            assert row.low < row.high
            assert row.value is None or row.low <= row.value <= row.high
        if row.metric.endswith("win_rate"):
            assert 0 < row.value < 1
        assert row.parameters or not row.setting
    keys = [(row.paper, row.source, row.method, row.setting, row.metric) for row in rows]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("wanted", "value", "interval"),
    [
        ({"source": "Table 4", "setting": "lambda=0.75", "metric": "predicted_safety_gain"}, 2.82, None),
        ({"source": "Table 4", "setting": "lambda=0.9", "metric": "safety_gain"}, None, (3.61, 4.14)),
        ({"source": "Figure 3 left", "setting": "lambda=2", "metric": "helpful_gain"}, 1.54, None),
        ({"source": "mb.ipynb [5]", "method": "reference", "metric": "safety_mean"}, -1.607, None),
        ({"source": "mb.ipynb [23]", "setting": "threshold=3; responses=128"}, 1.2901171, None),
        ({"source": "Figure 4 right", "setting": "b=5.4; responses=128"}, 1.88, None),
        ({"source": "pbc.ipynb [14]", "setting": "b=1.58; responses=192; prompts=1604"}, 0.92, None),
        (
            {"source": "Tables 4 and 5", "method": "multi-shot", "setting": "b=9", "metric": "safety_gain"},
            11.420,
            (10.972, 11.869),
        ),
        (
            {"source": "Tables 4 and 5", "method": "one-shot", "setting": "b=3", "metric": "safety_gain"},
            0.352,
            (0.024, 0.680),
        ),
        (
            {"source": "multi-constraint table", "setting": "b=1.0,1.0", "metric": "helpful_gain"},
            -0.020,
            (-0.072, 0.032),
        ),
        ({"source": "Figure 4b", "setting": "b=0.95,0.55", "metric": "humour_gain"}, 0.93, None),
        ({"source": "Figure 5", "setting": "b=8", "metric": "helpful_win_rate"}, 0.361, None),
    ],
)
def test_selected_numbers(wanted, value, interval):
    row = find(**wanted)
    assert row.value == value
    assert (row.low, row.high) == (interval or (None, None))
    assert row.read_off_plot == (row.source.startswith("Figure") or row.source.startswith("pbc"))


def test_the_copy_error_is_marked_and_settings_are_numbers():
    rows = [row for row in read_numbers() if row.source == "Tables 4 and 5" and row.method == "multi-shot"]
    three, four = ([(r.metric, r.value) for r in rows if r.setting == f"b={b}"] for b in (3, 4))
    assert three == four
    assert all("copy error" in row.note for row in rows if row.setting in ("b=3", "b=4"))
    assert find(source="Figure 4b", setting="b=0.3,1.2", metric="harmless_gain").parameters == {"b": (0.3, 1.2)}
    one_shot = [row for row in read_numbers() if row.source == "Tables 4 and 5" and row.method == "one-shot"]
    errors = [abs(row.value - row.parameters["b"][0]) for row in one_shot if row.metric == "safety_gain"]
    assert sum(errors) / len(errors) == pytest.approx(1.52, abs=0.005)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2405.19544,t,m,s,multiplier,x,,,no,", "line 2: could not convert"),
        ("2405.19544,t,m,s,multiplier,1,,,maybe,", "line 2: 'maybe'"),
        ("2405.19544,t,m,s,multiplier,nan,,,no,", "line 2: a number is not finite"),
    ],
)
def test_a_row_of_another_type_is_named(tmp_path, monkeypatch, line, message):
    (tmp_path / "numbers.csv").write_text(",".join(numbers.COLUMNS) + "\n" + line + "\n")
    monkeypatch.setattr(numbers, "__file__", str(tmp_path / "numbers.py"))
    with pytest.raises(CorruptArtifactError, match=message):
        numbers.read_numbers.__wrapped__()


def test_other_columns_are_named(tmp_path, monkeypatch):
    (tmp_path / "numbers.csv").write_text("paper,value\n")
    monkeypatch.setattr(numbers, "__file__", str(tmp_path / "numbers.py"))
    with pytest.raises(CorruptArtifactError, match="they must be"):
        numbers.read_numbers.__wrapped__()
