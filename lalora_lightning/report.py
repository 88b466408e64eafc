"""A one-page report of a run, from its logs or a checkpoint alone.

python -m lalora_lightning.report LOG_FOLDER
"""

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
from lalora_lightning.runs import Run, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = list[list[str]]

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
    "table{border-collapse:collapse}td,th{padding:.1em .8em;border-bottom:1px solid #ddd;text-align:left}"
)


def write_report(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` (pictures embedded), ``report.md`` and the pictures as PNG into a folder.

    Args:
        source: A folder with the logs of one run, or a Trainer's checkpoint; see :func:`runs.read_run`.
        output: The folder, made where there is none; older reports in it are written over.

    Returns:
        Path of the HTML file.

    Raises:
        FileNotFoundError: There is no such file or folder, or no logs in it.
        ValueError: There are logs of several runs, none of La-LoRA, or a file is damaged.
    """
    run = read_run(source)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, figure in figures(run).items():
        figure.savefig(folder / f"{name}.png", dpi=120)
        pictures.append(folder / f"{name}.png")
    title = f"La-LoRA: {source}"
    sections = tables(run)
    (folder / "report.md").write_text(_markdown(title, sections, pictures), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_html(title, sections, pictures), encoding="utf-8")
    return page


def tables(run: Run) -> dict[str, Table]:
    """The report's tables by their title; the first row of each is its header, empty ones are left out."""
    total, full = sum(run.ranks[-1]), len(run.layer_names) * run.max_rank
    ranks = [[name, str(rank)] for name, rank in zip(run.layer_names, run.ranks[-1], strict=True)]
    if run.sparsity:
        for row, share in zip(ranks, run.sparsity[max(run.sparsity)], strict=True):
            row.append(f"{100 * share:.2f} %")
    sections = {
        "Run": [
            ["", ""],
            ["optimizer steps", str(run.steps[-1])],
            ["total rank", f"{total} of LoRA's {full} ({total / full:.0%})"],
            ["budget", f"{run.budgets[-1]:.1f}"],
            *([key, _text(value)] for key, value in run.summary.items() if key != "optimizer steps"),
        ],
        "Scores": [
            ["metric", "last", "step", "lowest", "highest"],
            *(
                [key, _text(readings[-1][1]), str(readings[-1][0]), *_range([value for _, value in readings])]
                for key, readings in run.scores.items()
            ),
        ],
        "Ranks": [["layer", f"rank, of {run.max_rank}", *(["sparsity"] if run.sparsity else [])], *ranks],
        "Settings": [
            ["setting", "value"],
            *([key, _text(value)] for key, value in run.settings.items() if value is not None),
        ],
    }
    return {title: table for title, table in sections.items() if len(table) > 1}


def figures(run: Run) -> dict[str, Figure]:
    """The report's pictures by the name of their file."""
    pictures = {"rank-trajectories": plotting.plot_rank_trajectories(run), "rank-lines": plotting.plot_rank_lines(run)}
    if run.sparsity:
        pictures["sparsity"] = plotting.plot_sparsity(run)
        pictures["sparsity-and-rank"] = plotting.plot_sparsity_and_rank(run)
    else:
        pictures["final-ranks"] = plotting.plot_final_ranks({"end of the run": run})
    return pictures


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m lalora_lightning.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, metavar="LOG_FOLDER", help="folder of one run's logs, or a checkpoint")
    parser.add_argument("--output", type=Path, help="folder to write to; by default LOG_FOLDER/report")
    options = parser.parse_args(arguments)
    default = options.source / "report" if options.source.is_dir() else options.source.with_suffix(".report")
    try:
        print(write_report(options.source, options.output or default))
    except ModuleNotFoundError as error:
        sys.exit(f"error: Expected {error.name}, which draws and reads, but it is missing; pip install {error.name}.")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


def _range(values: Sequence[float]) -> list[str]:
    return [_text(min(values)), _text(max(values))]


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _markdown(title: str, sections: Mapping[str, Table], pictures: Sequence[Path]) -> str:
    parts = [f"# {title}"]
    for name, (header, *rows) in sections.items():
        lines = [header, ["---"] * len(header), *rows]
        escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
        parts.append(f"## {name}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in escaped))
        if name == "Ranks":
            parts += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


def _html(title: str, sections: Mapping[str, Table], pictures: Sequence[Path]) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for name, (header, *rows) in sections.items():
        parts.append(f"<h2>{name}</h2><table>{_row(header, 'th')}{''.join(_row(row, 'td') for row in rows)}</table>")
        if name == "Ranks":
            for picture in pictures:
                data = base64.b64encode(picture.read_bytes()).decode()
                parts.append(f'<p><img alt="{picture.stem}" src="data:image/png;base64,{data}"></p>')
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


if __name__ == "__main__":
    main()
