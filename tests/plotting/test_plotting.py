"""Figures hold the data they are given, and their labels do not overlap."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lalora_lightning import plotting
from lalora_lightning.runs import Run


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
    figure.canvas.draw()
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


def test_matplotlib_is_imported_when_called(tmp_path: Path):
    # torchmetrics imports it by itself where it finds it.
    code = "import sys, lalora_lightning\n"
    code += "for name in [*sys.modules]:\n    if name.startswith('matplotlib'): del sys.modules[name]\n"
    code += "import lalora_lightning.plotting; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
