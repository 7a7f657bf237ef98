import io
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from PIL import Image

from softlms.workbook.plots.execution_pictures import draw_curve
from softlms.workbook.plots.explorer import curve_explorer, rank_explorer, speed_explorer, threshold_explorer
from softlms.workbook.plots.grid_pictures import draw_rank_bars
from softlms.workbook.plots.pictures import describe_cut, draw_cut, draw_speed_bars

LAPTOP = Path(__file__).parent.parent / "results" / "laptop"
SIGMA = torch.linspace(5, 0.05, 100)


def test_description():
    assert describe_cut(SIGMA, (100, 100), 3.975) == "rank 21 of 100, 4,200 of 10,000 weights kept (42.0%)"
    assert "10,000 of 10,000 weights kept (100.0%)" in describe_cut(SIGMA, (100, 100), 0.0)


def test_moving_the_sliders_changes_picture_and_text():
    plt.close("all")
    alpha, s, text, picture = threshold_explorer(SIGMA, (100, 100)).children
    seen = {(text.value, picture.value)}
    alpha.value = 3.975
    assert "rank 21 of 100" in text.value
    seen.add((text.value, picture.value))
    s.value = 1.0
    seen.add((text.value, picture.value))
    assert len({image for _, image in seen}) == 3
    assert Image.open(io.BytesIO(picture.value)).size[0] > 500
    assert not plt.get_fignums()  # no figure is left open behind the widgets


def test_static_twin_draws_the_same_numbers():
    fig, ax = plt.subplots()
    draw_cut(ax, SIGMA, (100, 100), 3.975, 50)
    assert ax.get_title() == describe_cut(SIGMA, (100, 100), 3.975)
    plt.close(fig)


def test_rank_explorer_shows_the_runs():
    rows, ranks = (pd.read_csv(LAPTOP / f"05_bert_table{name}.csv") for name in ("", "_ranks"))
    task, method, budget, text, picture = rank_explorer(rows, ranks).children
    assert [label for label, _ in budget.options] == ["35%", "50%", "75%"] and budget.label == "75%"
    assert text.value == "<b>trained for 75%: dev f1 85.6 ± 1.1, test f1 85.3 ± 1.1</b>"  # README's table
    largest = picture.value
    budget.value = 0.5
    trained = "trained for 50%: dev f1 85.9 ± 0.6, test f1 85.3 ± 0.9"
    assert text.value == f"<b>{trained}; cut from 75% without training: dev f1 86.5 ± 0.9</b>"
    assert picture.value != largest
    half = picture.value
    method.value = "svd+uniform"
    assert text.value == "<b>trained for 50%: dev f1 82.0 ± 0.6, test f1 79.7 ± 0.1</b>" and picture.value != half
    task.value = "sst2"
    assert text.value == "<b>trained for 50%: dev accuracy 83.3 ± 0.7</b>"
    with pytest.raises(ValueError, match="no ranks of 'soft'; known: asvd"):
        rank_explorer(rows, ranks, method="soft")


def test_rank_explorer_where_a_method_was_not_run():
    rows, ranks = (pd.read_csv(LAPTOP / f"05_bert_table{name}.csv") for name in ("", "_ranks"))
    ranks = ranks[(ranks.method != "svd+mask") | (ranks.keep == 0.5)]
    _, method, _, text, picture = rank_explorer(rows, ranks).children
    method.value = "svd+mask"
    assert text.value == "svd+mask was not run at 75% on mrpc." and picture.value == b""


def test_rank_bars_are_the_mean_ranks():
    ranks = pd.read_csv(LAPTOP / "05_bert_table_ranks.csv")
    fig, ax = plt.subplots()
    draw_rank_bars(ax, ranks, "mrpc", "whitened+soft", 0.35)
    full, largest, kept = ([bar.get_height() for bar in bars] for bars in ax.containers)
    plt.close(fig)
    assert full == [384] * 36
    layer = (ranks.task == "mrpc") & (ranks.method == "whitened+soft") & (ranks.block == 5) & (ranks.symbol == "W_fc2")
    assert kept[-1] == pytest.approx(ranks[layer & (ranks.keep == 0.35)]["rank"].mean())
    assert largest[-1] == pytest.approx(ranks[layer & (ranks.keep == 0.75)]["rank"].mean())
    assert all(low < high for low, high in zip(kept, largest, strict=True))


def test_speed_explorer_shows_the_runs():
    table = pd.read_csv(LAPTOP / "09_speedup.csv")
    model, batch, threads, text, picture = speed_explorer(table).children
    shown = table.query("model == 'bert-base' and part == 'stack' and phase == 'prefill' and batch == threads == 1")
    fast = {row.form: f"{row.form} {row.speed_up:.2f} of {row.flop_limit:.2f}" for row in shown.itertuples()}
    assert text.value == (
        f"<b>bert-base, blocks, times as fast as dense: {fast['uniform ranks']}; {fast['trained ranks']}</b>"
    )
    pictures = {picture.value}
    for widget, value in ((model, "gpt2"), (batch, 8), (threads, 2)):
        widget.value = value
        pictures.add(picture.value)
    assert text.value.startswith("<b>gpt2") and len(pictures) == 4
    fig, ax = plt.subplots()
    draw_speed_bars(ax, table, "gpt2", 8, 2)
    rows = table[(table.model == "gpt2") & (table.batch == 8) & (table.threads == 2) & (table.form == "uniform ranks")]
    assert [bar.get_height() for bar in ax.containers[0]] == list(rows.speed_up)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["blocks, prefill", "whole model, prefill"]
    plt.close(fig)


def test_curve_explorer_says_what_a_threshold_costs():
    lines = [
        {"task": "mrpc", "family": family, "split": split, "seed": seed, "threshold": threshold, "blocks": blocks}
        | {"value": value + seed / 100}
        for family in ("one", "other")
        for split in ("dev", "test")
        for seed in (0, 1)
        for threshold, blocks, value in ((0.5, 1.0, 0.7), (1.0, 6.0, 0.8))
    ]
    lines += [line | {"family": "coarse", "threshold": 2.0} for line in lines[:1]]
    curves = pd.DataFrame(lines)
    curves = pd.concat([curves, curves[curves.family == "coarse"].assign(task="rte", family="absent")])
    task, family, place, text, picture = curve_explorer(curves, "blocks").children
    assert text.value == "<b>threshold 1: test f1 80.5 at 6.00 blocks (+0.0 against everything run)</b>"
    whole = picture.value
    place.value = 0.0
    assert text.value == "<b>threshold 0.5: test f1 70.5 at 1.00 blocks (-10.0 against everything run)</b>"
    assert picture.value != whole
    family.value = "coarse"
    assert text.value == "<b>threshold 2: dev f1 70.0 at 1.00 blocks (+0.0 against everything run)</b>"
    task.value = "rte"
    assert text.value == "coarse was not run on rte." and picture.value == b""
    fig, ax = plt.subplots()
    draw_curve(ax, curves, "mrpc", "one", 0.5, "blocks")  # the static twin
    curve, point = ax.lines
    plt.close(fig)
    assert curve.get_ydata().tolist() == pytest.approx([70.5, 80.5]) and point.get_xdata().tolist() == [1]
