"""Pictures, drawn without a display."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from plumbing.coco import decode_mask
from plumbing.files import write_atomically


def new_figure(rows: int, columns: int, width: float, height: float):
    """A matplotlib figure and its axes (rows, columns), drawn without a display."""
    if not os.environ.get("MPLBACKEND", "").startswith("module://"):  # a notebook's
        os.environ.pop("MPLBACKEND", None)  # none is used here, and a name unknown to matplotlib would stop its import
    from matplotlib.figure import Figure  # not pyplot: no display, no global state, and imported only when a picture is due

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path: Path) -> None:
    """Write a PNG atomically, its texts as they are."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # folders' and classes' names are no formulas, and may hold what is no Unicode
        text.set_parse_math(False)
        text.set_text(text.get_text().encode(errors="backslashreplace").decode())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # in a script that the font lacks, boxes stand for letters
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def plot_panels(path: Path, *args, **more) -> None:
    """Write `draw_panels` as a PNG."""
    save_figure(draw_panels(*args, **more), path)


def draw_panels(
    columns: dict[str, torch.Tensor], caption: str, rows: Sequence[str] = (), inches: float = 1.7,
    legend: Mapping[str, tuple] = MappingProxyType({}),
):  # fmt: skip
    """A table of pictures as a figure, one column per entry of `columns`: title -> (N, 3, H, W) float images in [0, 1].

    `rows` names the images, one to a row; each is `inches` wide. Without names two stand side by side, so that the figure grows less tall.
    legend: name -> (red, green, blue), 0 to 255.
    """
    images = torch.stack(list(columns.values()), dim=1).cpu()  # (N, columns, 3, H, W)
    height, width = images.shape[-2:]
    gap, beside = max(2, width // 24), 1 if rows or len(images) == 1 else 2
    mosaic = make_grid(images.flatten(0, 1), nrow=beside * len(columns), padding=gap, pad_value=1.0)  # (3, rows, columns)
    ticks = [gap + width / 2 + k * (width + gap) for k in range(beside * len(columns))]
    lines = -(-len(images) // beside)
    fitting = max(1, int(inches * len(ticks) / (0.6 + 0.1 * max(map(len, legend), default=0))))  # names in a row of the legend
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

        handles = [Patch(facecolor=[v / 255 for v in colour], edgecolor="grey", label=name) for name, colour in legend.items()]
        columns = -(-len(handles) // legend_rows)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
    return figure


def draw_objects(picture: Image.Image, rows: list[dict], names: dict[int, str], square: int | None = None) -> torch.Tensor:
    """A picture with its objects' boxes, masks, names and scores, uint8 (3, H, W).

    rows: in COCO's format, of annotations or results; names: of category ids. square: scale the picture to fill a square of this
    side, white beside it.
    """
    import matplotlib.font_manager  # its font, at a size that can be read
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = square / max(picture.size) if square else 1.0
    width, height = (max(1, round(side * scale)) for side in picture.size)
    drawn = pil_to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC))
    colours = {number: to_hex(colormaps["tab20"](k % 20)) for k, number in enumerate(names)}
    rows = sorted(rows, key=lambda row: -row.get("score", 1))
    chosen = [colours[row["category_id"]] for row in rows]
    masks = [decode_mask(row["segmentation"], picture.height, picture.width) for row in rows if row.get("segmentation")]
    if rows and len(masks) == len(rows):
        masks = torch.nn.functional.interpolate(torch.from_numpy(np.stack(masks))[None], (height, width))[0].bool()  # (n, H, W)
        masks &= masks.cumsum(dim=0) == 1  # a pixel of several is the best one's; torchvision would paint it black
        drawn = draw_segmentation_masks(drawn, masks, alpha=0.45, colors=chosen)
    if rows:
        x, y, w, h = (torch.tensor([row["bbox"] for row in rows], dtype=torch.float32) * scale).unbind(1)
        boxes = torch.stack([x, y, x + w, y + h], dim=1)
        texts = [names[row["category_id"]] + (f" {row['score']:.2f}" if "score" in row else "") for row in rows]
        font, size = matplotlib.font_manager.findfont("DejaVu Sans"), max(10, max(width, height) // 24)
        drawn = draw_bounding_boxes(
            drawn, boxes, texts, chosen, width=max(1, size // 8), font=font, font_size=size, fill_labels=True
        )
    if not square:
        return drawn
    whole = torch.full((3, square, square), 255, dtype=torch.uint8)
    whole[:, :height, :width] = drawn
    return whole


def write_png(path: Path, picture: torch.Tensor) -> None:
    """Write uint8 (3, H, W) atomically."""
    write_atomically(path, lambda file: to_pil_image(picture).save(file, format="PNG"))


# Okabe and Ito's, colour-blind-safe.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442"]


def plot_curves(path: Path, curves: dict[str, tuple], x_label: str, y_label: str, title: str, from_zero: bool = False) -> None:
    """One line per entry of `curves`: label -> (x, y); a single line needs no legend. `from_zero` begins both axes at 0."""
    figure, axes = new_figure(1, 1, 6, 3.6)
    for (label, (x, y)), colour in zip(curves.items(), COLOURS):
        axes[0, 0].plot(x, y, color=colour, linewidth=1.5, marker="o" if len(x) < 3 else None, label=label)
    axes[0, 0].set(xlabel=x_label, ylabel=y_label, title=title)
    axes[0, 0].grid(alpha=0.3)
    if from_zero:
        axes[0, 0].set(xlim=(0, None), ylim=(0, None))
    if len(curves) > 1:
        axes[0, 0].legend()
    save_figure(figure, path)
