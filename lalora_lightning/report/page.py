"""A one-page report of a run, from its logs or a checkpoint."""

from __future__ import annotations

import argparse
import base64
import html
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lalora_lightning import plotting
from lalora_lightning.names import blocks_by_kind
from lalora_lightning.runs import Run, read_run
from lalora_lightning.tables import block_table, html_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures", "main", "tables", "write_report"]

_Table = list[list[str]]

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
    "table{border-collapse:collapse}td,th{padding:.1em .8em;border-bottom:1px solid #ddd;text-align:left}"
)


def write_report(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write a self-contained ``report.html``, and its figures as PNG files, into a folder.

    Args:
        source: A folder with the logs of one run, or a Trainer's checkpoint, see
            :func:`lalora_lightning.runs.read_run`.
        output: The folder. It is created if needed; an older report in it is overwritten.

    Returns:
        Path of the HTML file.

    Raises:
        FileNotFoundError: There is no such file or folder, or no logs in it.
        ValueError: The logs are of several runs, or of a run without La-LoRA, or a file is damaged.
    """
    run = read_run(source)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures(run).items():
        figure.savefig(folder / f"{name}.png", dpi=120)
        files.append(folder / f"{name}.png")
    page = folder / "report.html"
    page.write_text(_page(f"La-LoRA: {source}", tables(run), files), encoding="utf-8")
    return page


def tables(run: Run) -> dict[str, _Table]:
    """Return the report's tables by title, without empty ones; the first row of each is its header."""
    layout = blocks_by_kind(run.layer_names)
    ranks = [[name, str(rank)] for name, rank in zip(run.layer_names, run.ranks[-1], strict=True)]
    if run.sparsity:
        for row, share in zip(ranks, run.sparsity[max(run.sparsity)], strict=True):
            row.append(f"{100 * share:.2f} %")
    header = ["layer", f"rank, of {run.max_rank}", *(["sparsity"] if run.sparsity else [])]
    by_layer = [header, *ranks]
    sections = {
        "Run": [
            ["quantity", "value"],
            ["optimizer steps", str(run.steps[-1])],
            [run.total_name, run.describe_total()],
            ["budget", run.describe_budget()],
            *([key, _text(value)] for key, value in run.summary.items() if key != "optimizer steps"),
        ],
        "Scores": [
            ["metric", "last", "step", "lowest", "highest"],
            *(
                [key, _text(values[-1][1]), str(values[-1][0]), *_range([value for _, value in values])]
                for key, values in run.scores.items()
            ),
        ],
        "Ranks": by_layer if layout is None else block_table(layout, [str(rank) for rank in run.ranks[-1]]),
        "Settings": [
            ["setting", "value"],
            *([key, _text(value)] for key, value in run.settings.items() if value is not None),
        ],
    }
    return {title: table for title, table in sections.items() if len(table) > 1}


def figures(run: Run) -> dict[str, Figure]:
    """Return the report's figures by the name of their file."""
    drawn = {"rank-trajectories": plotting.plot_rank_trajectories(run)}
    is_map = blocks_by_kind(run.layer_names) is not None
    if is_map:
        drawn["rank-map"] = plotting.plot_rank_map(run.layer_names, run.ranks[-1], title="final ranks")
    else:
        drawn["rank-lines"] = plotting.plot_rank_lines(run)
    if run.sparsity:
        drawn["sparsity"] = plotting.plot_sparsity(run)
        drawn["sparsity-and-rank"] = plotting.plot_sparsity_and_rank(run)
    elif not is_map:
        drawn["final-ranks"] = plotting.plot_final_ranks({"end of the run": run})
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; if :func:`write_report` fails, exit with its error message."""
    parser = argparse.ArgumentParser("python -m lalora_lightning.report", description=__doc__)
    parser.add_argument("source", type=Path, metavar="LOG_FOLDER", help="folder of one run's logs, or a checkpoint")
    parser.add_argument("--output", type=Path, help="folder to write to; by default LOG_FOLDER/report")
    options = parser.parse_args(arguments)
    default = options.source / "report" if options.source.is_dir() else options.source.with_suffix(".report")
    try:
        print(write_report(options.source, options.output or default))
    except ModuleNotFoundError as error:
        sys.exit(f"error: Expected {error.name} to be installed but it is missing; pip install {error.name}.")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


def _range(values: Sequence[float]) -> list[str]:
    return [_text(min(values)), _text(max(values))]


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _page(title: str, sections: Mapping[str, _Table], figure_files: Sequence[Path]) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for name, (header, *rows) in sections.items():
        parts.append(f"<h2>{name}</h2>{html_table(header, rows)}")
        if name == "Ranks":
            for file in figure_files:
                data = base64.b64encode(file.read_bytes()).decode()
                parts.append(f'<p><img alt="{file.stem}" src="data:image/png;base64,{data}"></p>')
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
