"""Pictures, drawn without a display."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torchvision.utils import make_grid

from plumbing.files import write_atomically


def new_figure(rows: int, columns: int, width: float, height: float):
    """A matplotlib figure and its axes (rows, columns), drawn without a display."""
    if not os.environ.get("MPLBACKEND", "").startswith("module://"):  # a notebook's
        os.environ.pop("MPLBACKEND", None)  # none is used here, and a name unknown to matplotlib would stop its import
    from matplotlib.figure import (
        Figure,
    )  # not pyplot: no display, no global state, and imported only when a picture is due

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path: Path) -> None:
    """Write a PNG atomically, its texts as they are."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # folders' and classes' names are no formulas, and may hold what is no Unicode
        text.set_parse_math(False)
        text.set_text(text.get_text().encode(errors="backslashreplace").decode())
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from"
        )  # in a script that the font lacks, boxes stand for letters
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def plot_panels(path: Path, *args, **more) -> None:
    """Write `draw_panels` as a PNG."""
    save_figure(draw_panels(*args, **more), path)


def draw_panels(
    columns: dict[str, torch.Tensor], caption: str, rows: Sequence[str] = (), inches: float = 1.7,
    legend: Mapping[str, tuple] = MappingProxyType({}),
):  # fmt: skip
    """A table of pictures as a figure, one column per entry of `columns`: title -> (N, 3, H, W) float images in [0, 1].

    `rows` names the images, one to a row, each `inches` wide. Without names two stand side by side in a row.
    legend: name -> (red, green, blue), 0 to 255.
    """
    images = torch.stack(list(columns.values()), dim=1).cpu()  # (N, columns, 3, H, W)
    height, width = images.shape[-2:]
    gap, beside = max(2, width // 24), 1 if rows or len(images) == 1 else 2
    mosaic = make_grid(
        images.flatten(0, 1), nrow=beside * len(columns), padding=gap, pad_value=1.0
    )  # (3, rows, columns)
    ticks = [gap + width / 2 + k * (width + gap) for k in range(beside * len(columns))]
    lines = -(-len(images) // beside)
    fitting = max(
        1, int(inches * len(ticks) / (0.6 + 0.1 * max(map(len, legend), default=0)))
    )  # names in a row of the legend
    legend_rows = -(-len(legend) // fitting)
    figure, axes = new_figure(
        1, 1, inches * len(ticks) + 1.4 * bool(rows), inches * lines * height / width + 0.8 + 0.25 * legend_rows
    )
    axes[0, 0].imshow(mosaic.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes[0, 0].set_xticks(ticks, list(columns) * beside, fontsize=11)
    axes[0, 0].tick_params(length=0, labeltop=True, labelbottom=False)
    axes[0, 0].set_yticks([gap + height / 2 + k * (height + gap) for k in range(len(rows))], rows, fontsize=11)
    axes[0, 0].spines[:].set_visible(False)
    axes[0, 0].set_xlabel(caption, fontsize=11)
    if legend:
        from matplotlib.patches import Patch

        handles = [
            Patch(facecolor=[v / 255 for v in colour], edgecolor="grey", label=name) for name, colour in legend.items()
        ]
        columns = -(-len(handles) // legend_rows)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
    return figure


# Okabe and Ito's, colour-blind-safe.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442"]


def plot_curves(
    path: Path, curves: dict[str, tuple], x_label: str, y_label: str, title: str, from_zero: bool = False
) -> None:
    """Write `draw_curves` as a PNG; `from_zero`: axes from 0."""
    figure, axes = new_figure(1, 1, 6, 3.6)
    draw_curves(axes[0, 0], curves, x_label, y_label, title)
    if from_zero:
        axes[0, 0].set(xlim=(0, None), ylim=(0, None))
    save_figure(figure, path)


def draw_curves(axis, curves: dict[str, tuple], x_label: str, y_label: str, title: str) -> None:
    """Plot a line per entry of `curves`, label -> (x, y), few points marked; a legend if there are several."""
    for (label, (x, y)), colour in zip(curves.items(), COLOURS):
        axis.plot(x, y, color=colour, linewidth=1.5, marker="o" if len(x) < 15 else None, markersize=4, label=label)
    axis.set(xlabel=x_label, ylabel=y_label, title=title)
    axis.grid(alpha=0.3)
    if len(curves) > 1:
        axis.legend()


def plot_evaluations(
    path: Path, records: list[dict], curves: dict[str, str], y_label: str, title: str, scale: float = 1.0
) -> None:
    """Plot scores over epochs from a log's records; `curves` maps labels to the records' keys, absent ones left out."""
    records = [record for record in records if next(iter(curves.values())) in record]
    epochs = [record["epoch"] for record in records]
    lines = {label: key for label, key in curves.items() if key in records[0]}
    values = {key: [math.nan if row[key] is None else scale * row[key] for row in records] for key in lines.values()}
    points = {label: (epochs, values[key]) for label, key in lines.items()}
    plot_curves(path, points, "epoch", y_label, title)
