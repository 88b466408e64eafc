"""Figures hold the data they are given, and their labels do not overlap."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lalora_lightning import plotting
from lalora_lightning.runs import Run, parameter_totals


def new_run(layers: int = 12, points: int = 30, prefix: str = "model.encoder.layer.") -> Run:
    steps = range(0, 10 * points, 10)
    ranks = [[1 + (t + i) % 8 for i in range(layers)] for t in range(points)]
    sparsity = {step: [1 / (1 + step / 50 + i / 10) for i in range(layers)] for step in steps}
    return Run([f"{prefix}{i}" for i in range(layers)], 8, steps, ranks, [2.0 * layers] * points, sparsity)


OF_ONE_RUN = [
    plotting.plot_rank_trajectories,
    plotting.plot_rank_lines,
    plotting.plot_budget,
    plotting.plot_sparsity,
    plotting.plot_sparsity_and_rank,
    lambda run: plotting.plot_final_ranks({"mrpc": run, "cola": run}),
]


@pytest.mark.parametrize("plot", OF_ONE_RUN)
@pytest.mark.parametrize("layers", [1, 12, 96])
@pytest.mark.parametrize("points", [1, 30])
def test_axes_are_labeled_and_labels_do_not_overlap(plot: Callable[[Run], Figure], layers: int, points: int):
    figure = plot(new_run(layers, points))
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_ylabel()
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [
                label.get_window_extent()
                for label in axis.get_ticklabels()
                if label.get_text()
                and axes.get_window_extent().padded(1).overlaps(label.get_window_extent().padded(20))
            ]
            across = axis.axis_name == "x"
            spans = sorted((box.x0, box.x1) if across else (box.y0, box.y1) for box in boxes)
            assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert any(
        axes.get_xlabel() in ("optimizer step", "layer (model.encoder.layer.*)", "layer") for axes in figure.axes
    )


def test_long_common_prefixes_are_cut_short():
    run = new_run(prefix="base_model.model.bert.encoder.layer.")
    assert plotting.plot_rank_trajectories(run).axes[0].get_ylabel() == "layer\n(...bert.encoder.layer.*)"
    both = Run(["net.encoder.block.0", "net.decoder.block.0"], 8, [1], [[1, 2]], [3.0])
    axes = plotting.plot_final_ranks({"cnn": both}).axes[0]
    assert axes.get_xlabel() == "layer (net.*)"
    labels = axes.get_xticklabels()
    assert [(label.get_text(), label.get_rotation()) for label in labels] == [
        ("encoder.block.0", 90),
        ("decoder.block.0", 90),
    ]


@pytest.mark.parametrize(("layers", "labels"), [(1, ["model.encoder.layer.0"]), (12, ["0", "1"]), (96, ["0", "4"])])
def test_the_heat_map_holds_the_ranks(layers: int, labels: list[str]):
    run = new_run(layers)
    heat, total, colorbar = plotting.plot_rank_trajectories(run).axes
    (mesh,) = heat.collections
    assert mesh.get_array().T.tolist() == run.ranks
    assert mesh.get_clim() == (1, 8)
    assert colorbar.get_ylabel() == "rank"
    assert [label.get_text() for label in heat.get_yticklabels()][:2] == labels
    assert len(heat.get_yticklabels()) <= 24
    assert total.lines[0].get_ydata().tolist() == [sum(row) for row in run.ranks]


@pytest.mark.parametrize("layers", [1, 3, 12, 36])
@pytest.mark.parametrize("plot", [plotting.plot_rank_trajectories, plotting.plot_rank_lines])
def test_no_axis_label_is_cut_off(plot: Callable[[Run], Figure], layers: int):
    figure = plot(new_run(layers, prefix="base_model.model.roberta.encoder.layer."))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for label in (axes.xaxis.label, axes.yaxis.label):
            box = label.get_window_extent()
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1


def all_linear_run(blocks: int) -> Run:
    """LLaMA's projections; a rank of a feed-forward projection costs twice as much."""
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    names = [f"model.layers.{i}.{kind}" for i in range(blocks) for kind in kinds]
    final = [1 + i % 5 for i in range(len(names))]
    ranks = [[1] * len(names), final]
    totals = parameter_totals(ranks, [10, 10, 20] * blocks, 8)
    return Run(names, 8, [0, 5], ranks, [3.0 * blocks] * 2, **totals)


def test_the_heat_map_of_projections_is_sorted_by_kind():
    heat, total, _ = plotting.plot_rank_trajectories(all_linear_run(2)).axes
    assert [label.get_text() for label in heat.get_yticklabels()] == ["q_proj", "o_proj", "up_proj"]
    # In the middle of each kind.
    assert heat.get_yticks().tolist() == [1, 3, 5]
    (mesh,) = heat.collections
    # Blocks 0 and 1 of q_proj, then of o_proj and of up_proj.
    assert mesh.get_array()[:, 1].tolist() == [1, 4, 2, 5, 3, 1]
    assert total.get_ylabel() == "parameters"


def test_totals_are_parameters_where_costs_differ():
    run = all_linear_run(2)
    total, budget, lora = plotting.plot_budget(run).axes[0].lines
    # 10 * (1 + 2 + 4 + 5) + 20 * (3 + 1), and six ranks of the mean cost 40 / 3.
    assert total.get_ydata().tolist() == [80, 200]
    assert budget.get_ydata().tolist() == pytest.approx([80, 80])
    assert set(lora.get_ydata()) == {8 * 80}
    assert plotting.plot_final_ranks({"sst2": run}).axes[0].get_title() == (
        "sst2: adapter parameters 200 of LoRA's 640 (31%)"
    )


@pytest.mark.parametrize("blocks", [2, 12, 32])
def test_the_rank_map(blocks: int):
    run = all_linear_run(blocks)
    outlined = [run.layer_names[0], run.layer_names[4]]
    figure = plotting.plot_rank_map(run.layer_names, run.ranks[-1], outlined, title="ranks")
    axes, colorbar = figure.axes
    assert axes.images[0].get_array().tolist() == [list(run.ranks[-1][3 * i : 3 * i + 3]) for i in range(blocks)]
    assert [text.get_text() for text in axes.texts] == [str(rank) for rank in run.ranks[-1]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q_proj", "o_proj", "up_proj"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(i) for i in range(blocks)]
    assert [(round(box.get_x()), round(box.get_y())) for box in axes.patches] == [(0, 0), (1, 1)]
    assert (axes.get_title(), colorbar.get_ylabel()) == ("ranks", "rank")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_a_rank_map_has_empty_cells_and_needs_several_kinds():
    figure = plotting.plot_rank_map(["b.0.q", "b.0.up", "b.1.q"], [3, 1, 0])
    assert figure.axes[0].images[0].get_array().mask.tolist() == [[False, False], [False, True]]
    with pytest.raises(ValueError, match=r"Expected projections of several blocks and several kinds but got layer.0"):
        plotting.plot_rank_map(["layer.0", "layer.1"], [1, 2])


def test_lines_hold_the_ranks_slightly_shifted():
    run = new_run(layers=3)
    lines = plotting.plot_rank_lines(run).axes[0].lines
    assert [[round(y) for y in line.get_ydata()] for line in lines] == [list(c) for c in zip(*run.ranks, strict=True)]
    first = [line.get_ydata()[0] - rank for line, rank in zip(lines, run.ranks[0], strict=True)]
    assert first == pytest.approx([-0.33, 0.0, 0.33])


def test_budget_total_and_loras_total():
    run = new_run()
    total, budget, lora = plotting.plot_budget(run).axes[0].lines
    assert total.get_ydata().tolist() == [sum(row) for row in run.ranks]
    assert budget.get_ydata().tolist() == run.budgets
    assert set(lora.get_ydata()) == {96}
    assert lora.get_label() == "LoRA at rank 8"


def test_bars_are_the_final_ranks():
    short, long = new_run(points=1), new_run(points=3)
    figure = plotting.plot_final_ranks({"mrpc": short, "cola": long})
    for axes, run, title in zip(
        figure.axes, (short, long), ("mrpc: total rank 46 of", "cola: total rank 54 of"), strict=True
    ):
        assert [bar.get_height() for bar in axes.patches] == run.ranks[-1]
        assert axes.get_title().startswith(title)
    with pytest.raises(ValueError, match=r"Expected runs of one model, .* but cola has model.encoder.layer.0 to .*.5"):
        plotting.plot_final_ranks({"mrpc": short, "cola": new_run(6)})


def test_sparsity_in_percent():
    run = new_run(layers=2, points=2)
    lines = plotting.plot_sparsity(run).axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [
        pytest.approx([100, 100 / 1.2]),
        pytest.approx([100 / 1.1, 100 / 1.3]),
    ]
    above, below = plotting.plot_sparsity_and_rank(run).axes
    assert [bar.get_height() for bar in above.patches] == [2, 3]
    assert [bar.get_height() for bar in below.patches] == pytest.approx([100 / 1.2, 100 / 1.3])


def test_a_run_without_sparsity():
    run = Run(["a.0"], 8, [1], [[1]], [1.0])
    with pytest.raises(ValueError, match=r"Expected a run with sparsities .*LaLoraCallback\(log_sparsity=True\)"):
        plotting.plot_sparsity(run)


def test_scores_are_means_with_intervals():
    scores = {"MRPC": {4.0: [80.0, 82.0, 84.0], 1.0: [70.0]}, "STS-B": {1.0: [88.0, 90.0], 4.0: [91.0]}}
    for plot in (plotting.plot_gamma, plotting.plot_parameter_budget):
        axes = plot(scores, "score, %").axes[0]
        mrpc, _ = axes.containers
        assert mrpc.lines[0].get_xdata().tolist() == [1.0, 4.0]
        assert mrpc.lines[0].get_ydata().tolist() == [70.0, 82.0]
        # Student's t for two degrees of freedom, 4.303, times 2 / sqrt(3).
        low, high = mrpc.lines[2][0].get_segments()[1][:, 1]
        assert (low, high) == pytest.approx((82 - 4.968, 82 + 4.968), abs=1e-2)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["MRPC", "STS-B"]
        assert axes.get_ylabel() == "score, %"


def test_comparison():
    scores = {"LoRA": [1.0, 2.0, 3.0], "La-LoRA": [2.0]}
    axes = plotting.plot_comparison(scores, "accuracy, %").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["LoRA", "La-LoRA"]
    (seeds,) = [line.get_xdata().tolist() for line in axes.lines if line.get_label() == "one seed"]
    assert seeds == [1.0, 2.0, 3.0]
    assert [container.lines[0].get_xdata().tolist() for container in axes.containers] == [[2.0], [2.0]]
    assert axes.get_xlabel() == "accuracy, %"


def test_learning_rates():
    scores = {"LoRA": {0.01: 90.0, 0.001: 70.0, 0.1: math.nan}, "La-LoRA": {0.001: 80.0, 0.01: 60.0}}
    axes = plotting.plot_learning_rates(scores, "accuracy, %").axes[0]
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines[::2]]
    assert drawn == [([0.001, 0.01], [70.0, 90.0]), ([0.001, 0.01], [80.0, 60.0])]
    assert [line.get_xdata() for line in axes.lines[1::2]] == [[0.01], [0.001]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01", "0.1"]
    assert (axes.get_xscale(), axes.get_ylabel()) == ("log", "accuracy, %")


def test_matplotlib_is_imported_when_called(tmp_path: Path):
    # torchmetrics imports it by itself where it finds it.
    code = "import sys, lalora_lightning\n"
    code += "for name in [*sys.modules]:\n    if name.startswith('matplotlib'): del sys.modules[name]\n"
    code += "import lalora_lightning.plotting; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
