"""Pictures whose every pixel has a label, for segmentation: where they come from, how both are transformed together, how they are shown.

The embedded ones are `data.py`'s drawings: the ground is one class, and each of the ten kinds of shape in front of it another.
What is drawn for a sample depends on (seed, epoch, sample index), as everywhere here.
"""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from data import GREY, SCENES, SHAPES, SPLITS, STATISTICS, draw_scenes, list_images, normalise, open_rgb, why_unreadable
from plumbing.plots import plot_panels
from plumbing.script import UserError, counted
from plumbing.seeds import mix_seed
from segmenter import IGNORED

MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # Pillow's names of pictures with one number a pixel


class LabelMaps(Dataset):
    """Pictures with maps of labels, indexed by (epoch, index).

    Args:
        items: file paths, or a uint8 array (n, H, W, 3).
        maps: file paths, or a uint8 array (n, H, W), of labels 0 .. classes - 1, or 255 for what is not counted; or None.
        classes: names, of label 0 first.
        colours: (red, green, blue), 0 to 255, of each class.
        statistics: a name in `data.STATISTICS`, by which pictures are normalised.
        transform: of picture and map together; its draws are a function of (seed, epoch, index). Without one both come as they are.
        reduce_zero_label: in files, label 0 is not counted, and 1 is the first class.

    An item is (uint8 picture (3, H, W), uint8 labels (H, W), failed). `failed` is -1, or the index of a file that could not be
    read, in whose place stands the next readable one of a hundred, else nothing at all: a grey picture of which no pixel counts.
    UserError for maps that do not fit their picture or the classes.
    """

    def __init__(
        self, items, maps, classes: list[str], colours: list[tuple], statistics: str, transform: v2.Transform | None = None,
        seed: int = 0, reduce_zero_label: bool = False,
    ):  # fmt: skip
        self.items, self.maps, self.classes, self.colours, self.statistics = items, maps, classes, colours, statistics
        self.transform, self.seed, self.reduce_zero_label = transform, seed, reduce_zero_label

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int]:
        epoch, index = place
        places = ((index + k) % len(self) for k in range(min(100, len(self))))
        at, found = next(((at, found) for at in places if (found := self.open(at)) is not None), (None, None))
        picture, labels = found or (Image.new("RGB", (64, 64), GREY), np.full((64, 64), IGNORED, dtype=np.uint8))
        labels = tv_tensors.Mask(torch.from_numpy(labels))
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: lend it one of our own
                torch.default_generator.manual_seed(mix_seed("crop", self.seed, epoch, index))
                picture, labels = self.transform(picture, labels)
        return v2.functional.pil_to_tensor(picture), labels.as_subclass(torch.Tensor), index if at != index else -1

    def open(self, index: int) -> tuple[Image.Image, np.ndarray] | None:
        """A picture and its labels, uint8 (H, W); None if one of them cannot be read."""
        item = self.items[index]
        try:
            picture = Image.fromarray(item) if isinstance(item, np.ndarray) else open_rgb(item)
            if self.maps is None:
                return picture, np.full((picture.height, picture.width), IGNORED, dtype=np.uint8)
            labels = self.maps[index]
            if not isinstance(labels, np.ndarray):
                labels = read_labels(labels, len(self.classes), self.reduce_zero_label)
        except UserError:
            raise
        except Exception:  # damaged files raise nearly anything, depending on the decoder
            return None
        if labels.shape != (picture.height, picture.width):
            theirs = f"its labels {self.maps[index]} {labels.shape[1]} x {labels.shape[0]}"
            raise UserError(f"{item} is {picture.width} x {picture.height} pixels, {theirs}; both must have the same size")
        return picture, labels

    def why(self, index: int) -> str:
        """Why a picture, or its map, cannot be read."""
        why = why_unreadable(self.items[index])
        if why == "it can be read now" and self.maps is not None:
            why = f"its labels {self.maps[index]}: {why_unreadable(self.maps[index])}"
        return why

    def on_device(self, pictures: torch.Tensor, labels: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """What a loader gave -> normalised pictures (N, 3, H, W) and int64 labels (N, H, W), on `device`."""
        pictures = normalise(pictures, STATISTICS[self.statistics], device).contiguous(memory_format=torch.channels_last)
        return pictures, labels.to(device, non_blocking=True).long()


# --- label maps in files ------------------------------------------------------------------------------------------------


def read_labels(path: str, classes: int, reduce_zero_label: bool = False) -> np.ndarray:
    """The labels of a palette, greyscale or 16-bit picture, uint8 (H, W), checked; UserError for those that are no class's."""
    labels = read_numbers(path)
    first = int(reduce_zero_label)
    wrong = (labels < 0) | ((labels >= classes + first) & (labels != IGNORED))
    if wrong.any():
        known = f"the {classes} classes have {first} to {classes - 1 + first}, and 255 is not counted"
        fix = "correct it, or name all classes in classes.txt" + ("" if first else ", or --reduce_zero_label if 0 is none")
        raise UserError(f"{path} has the label {labels[wrong].max()}, but {known}; {fix}")
    if reduce_zero_label:
        labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
    return labels.astype(np.uint8)


def read_numbers(path: str) -> np.ndarray:
    """The numbers in a label map's file as they are, int64 (H, W); UserError for a picture in colours."""
    with Image.open(path) as image:
        if image.mode not in MODES:
            fix = "save labels as numbers, in a palette or greyscale PNG"
            raise UserError(f"{path} is a picture in colours ({image.mode}), not a map of labels; {fix}")
        return np.asarray(image).astype(np.int64)


def write_labels(path: Path, labels: np.ndarray, colours: list[tuple], reduce_zero_label: bool = False) -> None:
    """The inverse of `read_labels`: uint8 (H, W) as a palette PNG with the classes' colours."""
    first = int(reduce_zero_label)
    image = Image.fromarray(np.where(labels == IGNORED, 0 if first else IGNORED, labels + first).astype(np.uint8), mode="P")
    palette = ([(0, 0, 0)] * first + list(colours) + [(0, 0, 0)] * 256)[:256]  # of fewer colours Pillow would make fewer bits
    image.putpalette([value for colour in palette for value in colour])
    image.save(path, format="PNG")


def read_classes(path: str | Path) -> tuple[list[str], list[tuple] | None]:
    """Class names, a line for each, and colours where each line ends in three numbers; ADE20K's objectInfo150.txt too."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the classes {path} ({getattr(error, 'strerror', None) or 'no text in UTF-8'})") from None
    if lines and lines[0].startswith("Idx\t"):
        lines = [line.split("\t")[-1] for line in lines[1:]]
    found = [re.fullmatch(r"(.*\S)[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})", line) for line in lines]
    coloured = bool(lines) and all(found)
    names = [match[1].rstrip(",") for match in found] if coloured else lines
    if not 1 <= len(names) <= IGNORED:
        raise UserError(f"{path} names {counted(len(names), 'class')}; at least 1 and at most {IGNORED} can be told apart")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path} names the class {twice[0]} more than once; give each its own name")
    colours = [tuple(map(int, match.groups()[1:])) for match in found] if coloured else None
    if coloured and max(map(max, colours)) > 255:
        raise UserError(f"{path} has the colour {max(colours, key=max)}; red, green and blue end at 255")
    return names, colours


def class_colours(count: int) -> list[tuple]:
    """Colours for so many classes: twenty that are easy to tell apart, then all hues."""
    from matplotlib import colormaps  # imported only when it is needed, as in plumbing/plots.py

    strong, pale = ([colormaps["tab20"](k) for k in range(first, 20, 2)] for first in (0, 1))
    more = [colormaps["hsv"](k * 0.618 % 1) for k in range(max(count - 20, 0))]
    return [tuple(round(255 * value) for value in colour[:3]) for colour in [*strong, *pale, *more][:count]]


# --- where they come from -----------------------------------------------------------------------------------------------


def embedded_maps(
    split: str, size: int, transform: v2.Transform | None = None, seed: int = 0, count: int | None = None
) -> LabelMaps:
    """The drawn pictures of detection: 5,000 to train on, 200 to evaluate, or `count`. Ground is label 0, kind k of shape k + 1."""
    salt = SPLITS.index(split)
    pictures, kinds, masks = draw_scenes(count or SCENES[salt], salt, size)
    labels = (masks * (kinds[:, :, None, None] + 1)).sum(axis=1).astype(np.uint8)  # masks (n, 3, S, S) are disjoint -> (n, S, S)
    colours = [(232, 232, 232), *class_colours(len(SHAPES))]
    return LabelMaps(pictures, labels, ["ground", *SHAPES], colours, "embedded", transform, seed)


def folder_maps(
    root: str, split: str, classes: tuple[list[str], list[tuple]], transform: v2.Transform | None = None, seed: int = 0,
    reduce_zero_label: bool = False,
) -> LabelMaps:  # fmt: skip
    """ROOT/images/<split> and ROOT/annotations/<split>, as in ADE20K; UserError where the two do not match."""
    items, maps = list_pairs(root, split)
    found = LabelMaps(items, maps, *classes, "folder", transform, seed, reduce_zero_label)
    tried = range(0, len(items), -(-len(items) // 8))
    if all(found.open(index) is None for index in tried):
        raise UserError(f"cannot read {items[0]} ({found.why(0)}), nor any other picture tried with its labels; check the files")
    return found


def list_pairs(root: str, split: str) -> tuple[list[str], list[str]]:
    """Pictures and their label maps, which have the same path below ROOT/images/<split> and ROOT/annotations/<split>, but for the suffix."""
    found = {}
    for kind in ("images", "annotations"):
        folder = Path(root) / kind / split
        if not folder.is_dir():
            raise UserError(
                f"the folder {folder} does not exist; DIR holds images/ and annotations/, each with training/, validation/"
            )
        paths = list_images(folder)
        found[kind] = {str(Path(path).relative_to(folder).with_suffix("")): path for path in paths}
        if not paths:
            raise UserError(f"no images under {folder}; pictures and label maps belong there")
        if len(found[kind]) < len(paths):
            twice = Counter(str(Path(path).with_suffix("")) for path in paths).most_common(1)[0][0]
            raise UserError(f"{twice} is there with more than one suffix; keep one of these files")
    pictures, maps = found["images"], found["annotations"]
    for lonely, what in ((pictures.keys() - maps.keys(), "picture"), (maps.keys() - pictures.keys(), "label map")):
        if lonely:
            one = (pictures | maps)[min(lonely)]
            other = f"{root}/{'annotations' if what == 'picture' else 'images'}/{split}"
            raise UserError(
                f"{counted(len(lonely), what)} without a counterpart, {one} for one; add it to {other}, or remove {one}"
            )
    names = sorted(pictures)
    return [pictures[name] for name in names], [maps[name] for name in names]


def class_file(root: str, path: str | None) -> str | Path | None:
    """The file of the classes' names: `path`, or ROOT/classes.txt, or ROOT/objectInfo150.txt, if there is one."""
    files = [path] if path else [file for name in ("classes.txt", "objectInfo150.txt") if (file := Path(root) / name).is_file()]
    return next(iter(files), None)


def find_classes(root: str, path: str | None, count: int | None, reduce_zero_label: bool) -> tuple[list[str], list[tuple], str]:
    """Names and colours of the classes of a folder, and a line that says where they come from.

    `count` nameless ones; or those of the `class_file`; or as many nameless ones as the training maps have.
    """
    if count is None and (file := class_file(root, path)):
        names, colours = read_classes(file)
        return names, colours or class_colours(len(names)), f"{counted(len(names), 'class')} of {file}"
    where = "as --nb_classes says"
    if count is None:
        with ThreadPoolExecutor() as pool:
            count = 1 + max(pool.map(largest_label, list_pairs(root, "training")[1])) - reduce_zero_label
        where = "as the training maps have; a classes.txt would name them"
    if not 1 <= count <= IGNORED:
        raise UserError(
            f"{counted(count, 'class')} in the label maps of {root}; at least 1 and at most {IGNORED} can be told apart"
        )
    return [f"class {k}" for k in range(count)], class_colours(count), f"{counted(count, 'class')}, {where}"


def largest_label(path: str) -> int:
    """The largest label of a file but for 255; -1 if it cannot be read or has no other."""
    try:
        labels = read_numbers(path)
    except UserError:
        raise
    except Exception:
        return -1
    return max(labels[labels != IGNORED].tolist(), default=-1)


def class_weights(maps: LabelMaps, balance: float, most: int = 500) -> torch.Tensor:
    """For the loss, each class's share of the pixels to the power of `-balance`: float32 (K,), whose mean over the pixels is one.

    Shares are those in up to `most` pictures, spread over the set; a class that is hardly met there is taken for one of .01%.
    """
    with ThreadPoolExecutor() as pool:
        found = [each[1] for each in pool.map(maps.open, range(0, len(maps), -(-len(maps) // most))) if each]
    counts = np.zeros(len(maps.classes))
    for labels in found:
        counts += np.bincount(labels.flatten(), minlength=IGNORED + 1)[: len(counts)]
    shares = torch.from_numpy(counts / max(counts.sum(), 1)).clamp(min=1e-4)
    weights = shares**-balance
    return (weights / (weights * shares).sum()).float()


# --- transforms -----------------------------------------------------------------------------------------------------------


def scaled_size(height: int, width: int, short: float, least: int = 1) -> tuple[int, int]:
    """The size of a picture whose short side becomes `short`, and whose long one at most four times that; `least` for each side."""
    factor = min(short / min(height, width), 4 * short / max(height, width))
    return max(least, round(height * factor)), max(least, round(width * factor))


class RandomScale(v2.Transform):
    """Resize so that the short side becomes `short` times a factor drawn uniformly from `scale`."""

    def __init__(self, short: int, scale: tuple[float, float]):
        super().__init__()
        self.short, self.scale = short, scale

    def forward(self, picture: Image.Image, labels: tv_tensors.Mask) -> tuple[Image.Image, tv_tensors.Mask]:
        """picture, labels (H, W) -> the same of another size."""
        low, high = self.scale
        size = list(scaled_size(picture.height, picture.width, self.short * (low + (high - low) * torch.rand(()).item())))
        # v2's own for masks takes the pixel before each place, not the nearest: labels would be shifted against the picture.
        exact = v2.functional.resize_image(labels.as_subclass(torch.Tensor)[None], size, v2.InterpolationMode.NEAREST_EXACT)[0]
        return v2.functional.resize(picture, size, v2.InterpolationMode.BILINEAR), tv_tensors.Mask(exact)


class LimitedCrop(v2.Transform):
    """A random crop of `size` x `size`, padded where need be, in which no class has more than the share `most` of what is counted.

    Ten are tried, and the last one is taken as it is.
    """

    def __init__(self, size: int, most: float):
        super().__init__()
        self.most = most
        self.crop = v2.RandomCrop((size, size), pad_if_needed=True, fill={Image.Image: GREY, tv_tensors.Mask: IGNORED, "others": 0})

    def forward(self, picture: Image.Image, labels: tv_tensors.Mask) -> tuple[Image.Image, tv_tensors.Mask]:
        """picture, labels (H, W) -> crops of both, from the same place."""
        for _ in range(10 if self.most < 1 else 1):
            crop, cropped = self.crop(picture, labels)
            counts = cropped.as_subclass(torch.Tensor).flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
            if counts.max() <= self.most * counts.sum():
                break
        return crop, cropped


def augmentation(size: int, short: int, scale: tuple[float, float], most: float, photometric: bool) -> v2.Transform:
    """What is done to a training picture and its labels; the arguments are segment.py's flags."""
    steps = [RandomScale(short, scale), LimitedCrop(size, most), v2.RandomHorizontalFlip()]
    return v2.Compose([*steps, *([v2.RandomPhotometricDistort()] if photometric else [])])


# --- pictures ---------------------------------------------------------------------------------------------------------------


def painted(labels: torch.Tensor, colours: list[tuple]) -> torch.Tensor:
    """Labels (H, W) in their classes' colours, black where not counted: uint8 (3, H, W)."""
    table = torch.zeros(IGNORED + 1, 3, dtype=torch.uint8)
    table[: len(colours)] = torch.tensor(colours, dtype=torch.uint8)
    return table[labels.long()].permute(2, 0, 1)  # (H, W) -> (H, W, 3) -> (3, H, W)


def blended(picture: torch.Tensor, labels: torch.Tensor, colours: list[tuple]) -> torch.Tensor:
    """uint8 (3, H, W) with its labels (H, W) laid over it."""
    return (0.4 * picture + 0.6 * painted(labels, colours)).round().to(torch.uint8)


def mistakes(picture: torch.Tensor, truth: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """uint8 (3, H, W): the picture in pale grey, what is wrong in red, what is not counted in black."""
    shown = (
        (160 + 0.35 * picture.float().mean(dim=0, keepdim=True)).expand(3, -1, -1).clone()
    )  # (3, H, W) -> (1, H, W) -> (3, H, W)
    shown[:, (prediction != truth) & (truth != IGNORED)] = torch.tensor([[214.0], [39.0], [40.0]])
    shown[:, truth == IGNORED] = 0
    return shown.to(torch.uint8)


def enlarged(picture: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 (3, H, W) scaled so that its longer side is `side`: floats in [0, 1]."""
    factor = side / max(picture.shape[1:])
    size = [max(1, round(length * factor)) for length in picture.shape[1:]]
    return v2.functional.resize(picture, size, v2.InterpolationMode.NEAREST_EXACT) / 255


def draw_segmentation(path: Path, maps: LabelMaps, predictions: dict[int, np.ndarray]) -> None:
    """Picture, truth, prediction and mistakes of the pictures of these indices, and a legend of the classes that occur there."""
    columns, seen = {"picture": [], "truth": [], "prediction": [], "wrong in red": []}, set()
    for index, prediction in sorted(predictions.items()):
        picture, truth = maps.open(index)
        picture, truth, found = v2.functional.pil_to_tensor(picture), torch.from_numpy(truth), torch.from_numpy(prediction)
        rows = picture, painted(truth, maps.colours), painted(found, maps.colours), mistakes(picture, truth, found)
        for column, row in zip(columns.values(), rows):
            column.append(enlarged(row, 256))
        seen |= set(truth.unique().tolist()) | set(found.unique().tolist())
    draw_with_legend(path, columns, seen, maps)


def draw_with_legend(
    path: Path, columns: dict[str, list[torch.Tensor]], seen: set[int], maps: LabelMaps, inches: float = 1.7
) -> None:
    """`plot_panels` of columns of pictures (3, h, w), white beside smaller ones, and the names of the labels `seen` in them."""
    height, width = (max(picture.shape[axis] for picture in columns["picture"]) for axis in (1, 2))
    whole = {
        title: torch.stack(
            [F.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1]), value=1.0) for picture in pictures]
        )
        for title, pictures in columns.items()
    }
    legend = {maps.classes[k]: maps.colours[k] for k in sorted(seen - {IGNORED})}
    legend |= {"not counted": (0, 0, 0)} if IGNORED in seen else {}
    plot_panels(path, whole, "", inches=inches, legend=legend)
