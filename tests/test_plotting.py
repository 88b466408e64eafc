import pytest

from lalora_lightning.plotting import plot_rank_trajectories


@pytest.mark.parametrize("layers", [1, 12, 96])
@pytest.mark.parametrize("readings", [1, 30])
def test_rank_trajectories(layers: int, readings: int):
    ranks = [[1 + (step + i) % 8 for i in range(layers)] for step in range(readings)]
    names = [f"model.encoder.layer.{i}" for i in range(layers)]
    figure = plot_rank_trajectories(range(0, 10 * readings, 10), ranks, names, [2.0 * layers] * readings, max_rank=8)
    figure.canvas.draw()
    heat, total, colorbar = figure.axes
    (mesh,) = heat.collections
    assert mesh.get_array().shape == (layers, readings)
    assert mesh.get_array()[layers - 1, readings - 1] == ranks[-1][-1]
    assert mesh.get_clim() == (1, 8)
    assert colorbar.get_ylabel() == "rank"
    assert total.get_xlabel() == "optimizer step"
    labels = [label.get_text() for label in heat.get_yticklabels()]
    # Not so many that they overlap, and without what all names share.
    assert len(labels) <= 24
    assert labels[:2] == (["0", "1"], ["0", "4"])[layers == 96] if layers > 1 else labels == names
    heights = [label.get_window_extent().height for label in heat.get_yticklabels()]
    assert sum(heights) < heat.get_window_extent().height
    # The line of totals ends at the sum of the last ranks.
    assert total.lines[0].get_ydata()[-1] == sum(ranks[-1])
