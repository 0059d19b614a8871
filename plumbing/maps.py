"""Read, write and draw label maps: images with the number of a class, or `IGNORED`, in every pixel."""

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

from plumbing.files import UserError, read_lines
from plumbing.loading import opened, upright, upright_size
from plumbing.plots import plot_panels

IGNORED = 255  # the label of pixels that do not count
Example = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # uint8: image (3, H, W), true and predicted labels (H, W)


class Classes(NamedTuple):
    """The classes of label maps: names, colours, and the number that each has in files."""

    names: list[str]
    colours: list[tuple]
    numbers: Sequence[int]


# --- files and classes ------------------------------------------------------------------------------------------------


def read_map(path: str | Path) -> np.ndarray:
    """Read a label map (H, W) of numbers 0 to 65535, also as grey RGB. ValueError for others, UserError for a JPEG."""
    with opened(path) as image:
        if image.format == "JPEG":
            raise UserError(f"{path} is a JPEG file, whose compression changes numbers; save label maps as PNG")
        values = np.atleast_3d(upright(image))[..., : 1 if image.mode == "LA" else 3]  # (H, W, channels), without alpha
    labels = values[..., 0].astype(np.uint16)
    if (values != labels[..., None]).any():
        fix = "save labels as numbers 0 to 65535, in a palette or greyscale PNG"
        raise ValueError(f"{path} is no label map (mode {image.mode}); {fix}")
    return labels


def read_labels(path: str | Path, numbers: Sequence[int]) -> np.ndarray:
    """Read a label map, uint8 (H, W): class k is `numbers[k]` in the file; other numbers become IGNORED."""
    table = np.full(2**16, IGNORED, dtype=np.uint8)
    table[list(numbers)] = np.arange(len(numbers))
    return table[read_map(path)]


def write_labels(path: Path, labels: np.ndarray, classes: Classes) -> None:
    """Write labels (H, W) as a palette PNG with the classes' numbers and colours."""
    image = Image.fromarray(np.minimum(classes.numbers, 255).astype(np.uint8)[labels], mode="P")
    palette = [0] * 3 * 256
    for number, colour in zip(classes.numbers, classes.colours):
        palette[3 * min(number, 255) : 3 * min(number, 255) + 3] = colour
    image.putpalette(palette)
    image.save(path, format="PNG")


def count_labels(pairs: Sequence[tuple[str, str]]) -> tuple[Counter, dict[int, str]]:
    """Count every label's pixels in the maps of (image, map) paths; also name one map for each label.

    UserError for a map in JPEG or of another size than its image, and if none can be read; unreadable ones are skipped.
    """
    pixels, files, errors = Counter(), {}, []

    def count(pair: tuple[str, str]) -> dict[int, int]:
        image, path = pair
        try:
            with opened(image) as file:
                size = upright_size(file)
            values = read_map(path)
        except Exception as error:  # damaged files raise nearly anything
            errors.append(error)
            return {}
        if values.shape[::-1] != size:
            sizes = " x ".join(map(str, size)), " x ".join(map(str, values.shape[::-1]))
            problem = f"{image} is {sizes[0]} pixels, and its label map {path} {sizes[1]}"
            raise UserError(f"{problem}; one of them was resized, cropped or rotated (EXIF orientations are applied)")
        return {label: n for label, n in enumerate(np.bincount(values.ravel()).tolist()) if n}

    with ThreadPoolExecutor() as pool:
        results = tqdm(pool.map(count, pairs), "label maps", len(pairs), disable=None, leave=False)
        for (_, path), counts in zip(pairs, results):
            pixels.update(counts)
            files |= dict.fromkeys(counts, path)
    if not pixels:
        raise UserError(f"none of {len(pairs)} label maps can be read ({errors[0]})")
    return pixels, files


def read_classes(path: str | Path) -> tuple[list[str], list[tuple]]:
    """Read class names, one per line, and colours if each line ends in three numbers; or ADE20K's list."""
    lines = read_lines(path)
    if lines and lines[0].startswith("Idx\t"):
        lines = [line.split("\t")[-1] for line in lines[1:]]
    matches = [re.fullmatch(r"(.*\S)[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})", line) for line in lines]
    names = [match[1].rstrip(",") for match in matches] if all(matches) else lines
    if not 1 <= (count := len(set(names))) == len(names) <= IGNORED:
        raise UserError(f"{path} names {len(names)} classes, {count} different; name 1 to {IGNORED}, each once")
    colours = [tuple(map(int, match.groups()[1:])) for match in matches] if all(matches) else class_colours(count)
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
    """Paint labels (H, W) in their classes' colours, black where ignored: uint8 (3, H, W)."""
    table = torch.zeros(IGNORED + 1, 3, dtype=torch.uint8)
    table[: len(colours)] = torch.tensor(colours, dtype=torch.uint8)
    return table[labels.long()].permute(2, 0, 1)  # (H, W) -> (H, W, 3) -> (3, H, W)


def mark_errors(image: torch.Tensor, truth: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Draw the image in pale grey, wrong pixels in red, ignored ones in black: uint8 (3, H, W)."""
    grey = 160 + 0.35 * image.float().mean(dim=0, keepdim=True)  # (3, H, W) -> (1, H, W)
    red = torch.tensor([214.0, 39.0, 40.0]).view(3, 1, 1)
    marked = torch.where(prediction == truth, grey, red)  # (1, H, W) -> (3, H, W)
    return marked.masked_fill(truth == IGNORED, 0).to(torch.uint8)


def draw_segmentation(path: Path, examples: Sequence[Example], classes: Classes) -> None:
    """Draw images, true labels, predictions and errors, with a legend of the classes that occur."""
    images, truths, predictions = zip(*(scaled(example, 256) for example in examples))
    painted = [[paint(labels, classes.colours) for labels in column] for column in (truths, predictions)]
    wrong = [mark_errors(*row) for row in zip(images, truths, predictions)]
    columns = {"image": images, "truth": painted[0], "prediction": painted[1], "wrong in red": wrong}
    labels = torch.cat([labels.flatten() for labels in truths + predictions])
    draw_with_legend(path, columns, labels, classes, 1.7)


def draw_overlay(path: Path, image: torch.Tensor, prediction: torch.Tensor, classes: Classes) -> None:
    """Draw an image, and beside it the prediction laid over the image."""
    image, prediction = scaled((image, prediction), 480)
    overlay = (0.4 * image + 0.6 * paint(prediction, classes.colours)).round()
    draw_with_legend(path, {"image": [image], "labels": [overlay]}, prediction.flatten(), classes, 4)


def draw_with_legend(path: Path, columns: dict, labels: torch.Tensor, classes: Classes, inches: float) -> None:
    """Draw columns of uint8 images (3, H, W), with a legend of the ten most frequent `labels` (n,)."""
    height, width = (max(image.shape[axis] for image in columns["image"]) for axis in (1, 2))
    panels = {  # smaller images are padded with white
        title: torch.stack([F.pad(i / 255, (0, width - i.shape[2], 0, height - i.shape[1]), value=1.0) for i in images])
        for title, images in columns.items()
    }
    pixels = labels.long().bincount(minlength=IGNORED + 1)
    largest = [k for k in pixels[:IGNORED].argsort(descending=True)[:10].tolist() if pixels[k]]
    legend = {classes.names[k]: classes.colours[k] for k in sorted(largest)}
    plot_panels(path, panels, "", inches=inches, legend=legend | ({"ignored": (0, 0, 0)} if pixels[IGNORED] else {}))


def scaled(example: Sequence[torch.Tensor], side: int) -> list[torch.Tensor]:
    """Scale an image (3, H, W) and label maps (H, W), uint8, to a long side of `side`, before anything is drawn."""
    height, width = example[0].shape[1:]
    size = [max(1, round(length * side / max(height, width))) for length in (height, width)]
    parts = [part.reshape(-1, height, width) for part in example]  # (3, H, W) or (H, W) -> (3 or 1, H, W)
    return [v2.functional.resize(part, size, v2.InterpolationMode.NEAREST_EXACT).squeeze(0) for part in parts]
