"""The experiments' figures with every method there is."""

import numpy as np
import pyarrow as pa
from helpers.figures import require_nothing_cut_off

from pipeline.baselines.figures import LOOKS, trade_off_figure


def test_the_names_of_all_methods_fit_beside_the_trade_off():
    rows = []
    for place, method in enumerate(LOOKS):
        row = {"method": method}
        for name in ("helpful", "harmless", "gold_helpful", "gold_harmless"):
            row |= {name: 0.1 * place, f"{name}_ci95_low": 0.1 * place - 0.05, f"{name}_ci95_high": 0.1 * place + 0.05}
        rows.append(row)
    curve = pa.table({"harmless": np.linspace(0, 1, 5), "helpful": np.linspace(1, 0, 5)})
    figure = trade_off_figure(pa.Table.from_pylist(rows), {"": curve, "gold_": curve})
    shown = {text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()}
    assert set(LOOKS) <= shown
    require_nothing_cut_off(figure)
