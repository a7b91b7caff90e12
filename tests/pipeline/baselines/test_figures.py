"""The experiments' figures with every method there is."""

import numpy as np
import pyarrow as pa
from helpers.figures import require_nothing_cut_off

from pipeline.baselines import policies
from pipeline.baselines.figures import LOOKS, trade_off_figure, two_constraints_figure


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


def test_two_constraints_show_every_pair_once_and_every_policy_of_both_methods():
    rows = []
    for method, seeds in ((policies.ONE_SHOT, (0, 1, 2)), (policies.MULTI_SHOT, (0,))):
        for seed in seeds:
            for place in range(8):
                row = {"method": method, "seed": seed}
                for name in ("harmless", "humour"):
                    at = 0.2 + 0.1 * place + 0.01 * seed
                    row |= {
                        f"{name}_demanded": 0.2 + 0.1 * place,
                        f"{name}_realised": at,
                        f"{name}_ci95_low": at - 0.05,
                        f"{name}_ci95_high": at + 0.05,
                    }
                rows.append(row)
    figure = two_constraints_figure(pa.Table.from_pylist(rows))
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["demanded", "one-shot (95%)", "multi-shot (95%)"]
    require_nothing_cut_off(figure)
