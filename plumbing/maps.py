"""Label maps: images with the number of a class, or `IGNORED`, in every pixel. How they are read, written and drawn."""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from plumbing.files import UserError
from plumbing.loading import open_image
from plumbing.plots import plot_panels

IGNORED = 255  # the label of pixels that do not count
MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's names of images with one number per pixel
Example = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # uint8: image (3, H, W), true and predicted labels (H, W)


# --- files ------------------------------------------------------------------------------------------------------------


def read_labels(path: str, classes: int, reduce_zero_label: bool = False) -> np.ndarray:
    """Read labels 0 .. classes - 1 and 255, uint8 (H, W). ValueError for other labels, and for an image in colours.

    reduce_zero_label: the file has 1 .. classes instead, and 0 or 255.
    """
    labels, first = read_numbers(path), int(reduce_zero_label)
    wrong = (labels < 0) | ((labels >= classes + first) & (labels != IGNORED))
    if wrong.any():
        known = f"the {classes} classes have {first} to {classes - 1 + first}, and 255 does not count"
        raise ValueError(f"{path} has the label {labels[wrong].max()}, but {known}")
    if reduce_zero_label:
        labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
    return labels.astype(np.uint8)


def read_numbers(path: str) -> np.ndarray:
    """Read the numbers in a palette, greyscale or 16-bit image, int64 (H, W). ValueError for an image in colours."""
    image = open_image(path)
    if image.mode not in MODES:
        fix = "save labels as numbers, in a palette or greyscale PNG"
        raise ValueError(f"{path} is an image in colours ({image.mode}), not a label map; {fix}")
    return np.asarray(image).astype(np.int64)


def write_labels(path: Path, labels: np.ndarray, colours: list[tuple], reduce_zero_label: bool = False) -> None:
    """The inverse of `read_labels`: write uint8 (H, W) as a palette PNG with the classes' colours."""
    first = int(reduce_zero_label)
    numbers = np.where(labels == IGNORED, 0 if first else IGNORED, labels + first)
    image = Image.fromarray(numbers.astype(np.uint8), mode="P")
    palette = [(0, 0, 0)] * first + list(colours) + [(0, 0, 0)] * 256  # of fewer colours Pillow would make fewer bits
    image.putpalette([value for colour in palette[:256] for value in colour])
    image.save(path, format="PNG")


def count_classes(paths: Iterable[str], reduce_zero_label: bool = False) -> int:
    """Count the classes that label maps need; those that cannot be read are left out."""

    def largest(path):
        try:
            labels = read_numbers(path)
        except Exception:  # damaged files raise nearly anything
            return -1
        return max(labels[labels != IGNORED].tolist(), default=-1)

    with ThreadPoolExecutor() as pool:
        return 1 + max(pool.map(largest, paths)) - reduce_zero_label


# --- classes ----------------------------------------------------------------------------------------------------------


def read_classes(path: str | Path) -> tuple[list[str], list[tuple]]:
    """Read class names, one per line, and colours if each line ends in three numbers; or objectInfo150.txt."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the classes {path} ({error})") from None
    if lines and lines[0].startswith("Idx\t"):
        lines = [line.split("\t")[-1] for line in lines[1:]]
    matches = [re.fullmatch(r"(.*\S)[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})", line) for line in lines]
    names = [match[1].rstrip(",") for match in matches] if all(matches) else lines
    if not 1 <= len(set(names)) == len(names) <= IGNORED:
        raise UserError(
            f"{path} names {len(names)} classes, {len(set(names))} different; name 1 to {IGNORED}, each once"
        )
    if not all(matches):
        return names, class_colours(len(names))
    colours = [tuple(map(int, match.groups()[1:])) for match in matches]
    if max(map(max, colours)) > 255:
        raise UserError(f"{path} has the colour {max(colours, key=max)}; red, green and blue end at 255")
    return names, colours


def class_colours(count: int) -> list[tuple]:
    """Choose `count` colours: twenty that are easy to tell apart, then all hues."""
    from matplotlib import colormaps  # imported only when it is needed, as in plumbing/plots.py

    strong, pale = ([colormaps["tab20"](k) for k in range(first, 20, 2)] for first in (0, 1))
    hues = [colormaps["hsv"](k * 0.618 % 1) for k in range(max(count - 20, 0))]
    return [tuple(round(255 * value) for value in colour[:3]) for colour in [*strong, *pale, *hues][:count]]


# --- drawing ----------------------------------------------------------------------------------------------------------


def paint(labels: torch.Tensor, colours: list[tuple]) -> torch.Tensor:
    """Labels (H, W) in their classes' colours, black where they do not count: uint8 (3, H, W)."""
    table = torch.zeros(IGNORED + 1, 3, dtype=torch.uint8)
    table[: len(colours)] = torch.tensor(colours, dtype=torch.uint8)
    return table[labels.long()].permute(2, 0, 1)  # (H, W) -> (H, W, 3) -> (3, H, W)


def overlay(image: torch.Tensor, labels: torch.Tensor, colours: list[tuple]) -> torch.Tensor:
    """Lay labels (H, W) over their image: uint8 (3, H, W)."""
    return (0.4 * image + 0.6 * paint(labels, colours)).round().to(torch.uint8)


def mark_errors(image: torch.Tensor, truth: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """The image in pale grey, wrong pixels in red, and black where none count: uint8 (3, H, W)."""
    grey = 160 + 0.35 * image.float().mean(dim=0, keepdim=True)  # (3, H, W) -> (1, H, W)
    red = torch.tensor([214.0, 39.0, 40.0]).view(3, 1, 1)
    marked = torch.where(prediction == truth, grey, red)  # (1, H, W) -> (3, H, W)
    return marked.masked_fill(truth == IGNORED, 0).to(torch.uint8)


def draw_segmentation(path: Path, examples: Sequence[Example], classes: list[str], colours: list[tuple]) -> None:
    """Draw images, true labels, predictions and errors, with a legend of the classes that occur."""
    columns, labels = {"image": [], "truth": [], "prediction": [], "wrong in red": []}, []
    for image, truth, prediction in examples:
        row = image, paint(truth, colours), paint(prediction, colours), mark_errors(image, truth, prediction)
        for column, panel in zip(columns.values(), row):
            column.append(panel)
        labels += [truth.flatten(), prediction.flatten()]
    draw_with_legend(path, columns, torch.cat(labels), classes, colours, 256, 1.7)


def draw_overlay(
    path: Path, image: torch.Tensor, prediction: torch.Tensor, classes: list[str], colours: list[tuple]
) -> None:
    """Draw an image beside its prediction, laid over it."""
    columns = {"image": [image], "labels": [overlay(image, prediction, colours)]}
    draw_with_legend(path, columns, prediction, classes, colours, 480, 4)


def draw_with_legend(
    path: Path, columns: dict[str, list[torch.Tensor]], labels: torch.Tensor, classes: list[str], colours: list[tuple],
    side: int, inches: float,
) -> None:  # fmt: skip
    """Draw columns of images (3, H, W), each with its long side scaled to `side`, and the names of their `labels`."""
    scaled = {title: [enlarge(image, side) for image in images] for title, images in columns.items()}
    height, width = (max(image.shape[axis] for image in scaled["image"]) for axis in (1, 2))
    panels = {  # white beside smaller ones
        title: torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1]), value=1.0) for i in images])
        for title, images in scaled.items()
    }
    numbers = labels.unique().tolist()
    legend = {classes[k]: colours[k] for k in numbers if k != IGNORED}
    plot_panels(path, panels, "", inches=inches, legend=legend | ({"ignored": (0, 0, 0)} if IGNORED in numbers else {}))


def enlarge(image: torch.Tensor, side: int) -> torch.Tensor:
    """Scale uint8 (3, H, W) so that its long side is `side`: floats in [0, 1]."""
    factor = side / max(image.shape[1:])
    size = [max(1, round(length * factor)) for length in image.shape[1:]]
    return v2.functional.resize(image, size, v2.InterpolationMode.NEAREST_EXACT) / 255
