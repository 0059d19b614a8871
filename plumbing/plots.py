"""Figures, drawn without a display."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torchvision.utils import make_grid

from plumbing.files import write_atomically


def new_figure(rows: int, columns: int, width: float, height: float):
    """Make a matplotlib figure and its axes (rows, columns), without a display."""
    if not os.environ.get("MPLBACKEND", "").startswith("module://"):  # a notebook's backend
        os.environ.pop("MPLBACKEND", None)  # unused here, and matplotlib cannot be imported with an unknown name
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path: Path) -> None:
    """Write a PNG atomically; texts are not parsed as formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # names of folders and classes are no formulas, and may be invalid Unicode
        text.set_parse_math(False)
        text.set_text(text.get_text().encode(errors="backslashreplace").decode())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the font shows boxes for them
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def plot_panels(path: Path, *args, **more) -> None:
    """Write `draw_panels` as a PNG."""
    save_figure(draw_panels(*args, **more), path)


def draw_panels(
    columns: dict[str, torch.Tensor], caption: str, rows: Sequence[str] = (), inches: float = 1.7,
    legend: Mapping[str, tuple] = MappingProxyType({}),
):  # fmt: skip
    """Draw a table of images, one column per entry of `columns`: title -> (N, 3, H, W) float images in [0, 1].

    `rows` names the images, drawn one per row, each `inches` wide; without names, a row holds two.
    legend: name -> (red, green, blue), 0 to 255.
    """
    images = torch.stack(list(columns.values()), dim=1).cpu()  # (N, columns, 3, H, W)
    height, width = images.shape[-2:]
    gap, beside = max(2, width // 24), 1 if rows or len(images) == 1 else 2
    mosaic = make_grid(images.flatten(0, 1), beside * len(columns), gap, pad_value=1.0)  # (3, rows, columns)
    ticks, lines = torch.arange(beside * len(columns)), -(-len(images) // beside)
    across = inches * len(ticks)
    per_row = max(1, int(across / (0.6 + 0.1 * max(map(len, legend), default=0))))  # names in a row of the legend
    legend_rows = -(-len(legend) // per_row)
    down = inches * lines * height / width + 0.8 + 0.25 * legend_rows
    figure, [[axis]] = new_figure(1, 1, across + 1.4 * bool(rows), down)
    axis.imshow(mosaic.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_xticks(gap + width / 2 + ticks * (width + gap), list(columns) * beside, fontsize=11)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.set_yticks(gap + height / 2 + torch.arange(len(rows)) * (height + gap), rows, fontsize=11)
    axis.spines[:].set_visible(False)
    axis.set_xlabel(caption, fontsize=11)
    if legend:
        from matplotlib.patches import Patch

        handles = [Patch(fc=[v / 255 for v in colour], ec="grey", label=name) for name, colour in legend.items()]
        columns = -(-len(handles) // legend_rows)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
    return figure


# Okabe and Ito's palette, colour-blind-safe.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442"]


def draw_curves(axis, curves: dict[str, tuple], x_label: str, y_label: str, title: str) -> None:
    """Plot a line per entry of `curves`, label -> (x, y); mark points if few; add a legend if there are several."""
    for (label, (x, y)), colour in zip(curves.items(), COLOURS):
        axis.plot(x, y, color=colour, linewidth=1.5, marker="o" if len(x) < 15 else None, markersize=4, label=label)
    axis.set(xlabel=x_label, ylabel=y_label, title=title)
    axis.grid(alpha=0.3)
    if len(curves) > 1:
        axis.legend()


def curves_of(records: list[dict], keys: Mapping[str, str], scale: float = 1.0) -> dict[str, tuple]:
    """Collect curves over epochs from a log's records; `keys` maps labels to records' keys, absent ones left out."""
    points = {
        label: [(record["epoch"], scale * record[key]) for record in records if record.get(key) is not None]
        for label, key in keys.items()
    }
    return {label: tuple(zip(*values)) for label, values in points.items() if values}


def plot_evaluations(path: Path, records: list[dict], keys: Mapping, y_label: str, title: str, scale=1.0) -> None:
    """Write `curves_of` the log's records as a PNG."""
    figure, [[axis]] = new_figure(1, 1, 6, 3.6)
    draw_curves(axis, curves_of(records, keys, scale), "epoch", y_label, title)
    save_figure(figure, path)
