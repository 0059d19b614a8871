"""Data sets of images (drawn ones, CIFAR, folders), their splits and labels, and their preparation for the network.

No randomness here has a hidden state: a sample's augmentation depends on (seed, epoch, sample index).
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from copy import copy
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from plumbing import dist
from plumbing.files import UserError
from plumbing.loading import Samples, divided, make_loader, mix_seed, opened, upright, upright_size
from plumbing.shapes import DRAWN, SPLITS, TEXTURES, draw_images

say_once = cache(dist.say)

# Mean and standard deviation per channel, of pixels in [0, 1]; folders take ImageNet's.
STATISTICS = {
    "embedded": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
GREY = tuple(round(255 * value) for value in STATISTICS["folder"][0])  # colour of padding: the mean
DATA_SETS = tuple(STATISTICS)
BICUBIC = v2.InterpolationMode.BICUBIC
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
IMAGE_SUFFIXES |= {".avif"} if features.check("avif") else set()  # Pillow's own wheels read it since 11.3
CONVERT = f"files must end in {', '.join(sorted(IMAGE_SUFFIXES))}; convert others, such as HEIC, to JPEG"
LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini"}  # files that Windows leaves in folders
HIDDEN = (".", "@eaDir", "__MACOSX", "$RECYCLE.BIN")  # prefixes of hidden files and folders
OUTPUTS = {"log.jsonl", "scores.json", "classes.csv", "predictions.csv", "predictions.json"}  # that scripts write
PICTURES = ("predictions", "accuracy.png", "confusion.png", "progress.png", "reconstructions.png")  # beside them
VALIDATION = ("val", "validation", "valid")


# --- datasets ---------------------------------------------------------------------------------------------------------


class Images(Samples):
    """Images, uint8 (3, S, S), with their labels, int, or -1 without labels.

    Args:
        items: file paths, or a uint8 array (n, H, W, 3).
        labels: one class index per item, or None.
        classes: class names, or None.
        transform: from a PIL image to a uint8 tensor (3, S, S), random or not.
        statistics: mean and standard deviation per channel, for `normalise`.
        seed: seed of the augmentation.
    """

    def __init__(self, items, labels, classes, transform: v2.Compose | None, statistics: tuple, seed: int = 0):
        super().__init__(items, seed)
        self.labels, self.classes, self.transform, self.statistics = labels, classes, transform, statistics

    @property
    def crop(self) -> v2.RandomResizedCrop | None:
        """Return the random crop that the transform begins with, if any; files are cropped while decoding."""
        first = self.transform.transforms[0]
        return first if isinstance(first, v2.RandomResizedCrop) else None

    def read(self, index: int) -> Image.Image:
        """Read an image, cropped if the transform begins with a crop."""
        item = self.items[index]
        if not isinstance(item, np.ndarray):
            return open_rgb(item, self.crop, self.image_max)
        image = Image.fromarray(item)
        return self.crop(image) if self.crop else image

    def augment(self, image: Image.Image, index: int) -> tuple[torch.Tensor, int]:
        """Apply the rest of the transform, and add the label."""
        steps = self.transform.transforms[self.crop is not None :]
        return v2.Compose(steps)(image), -1 if self.labels is None else int(self.labels[index])

    def on_device(self, pixels: torch.Tensor, labels: torch.Tensor, device: torch.device) -> tuple:
        """Loaded uint8 (N, 3, S, S) and labels (N,) -> normalised images (N, 3, S, S) and labels, on `device`."""
        return normalise(pixels, self.statistics, device), labels.to(device)

    def subset(self, indices: list[int]) -> "Images":
        """Return the images of these indices."""
        subset = copy(self)
        items = self.items[indices] if isinstance(self.items, np.ndarray) else [self.items[i] for i in indices]
        Samples.__init__(subset, items, self.seed)
        subset.labels = None if self.labels is None else [self.labels[i] for i in indices]
        return subset


def load_batches(images: Images, indices: list[int], batch_size: int, workers: int = 0) -> Iterator[tuple]:
    """Yield uint8 images (B, 3, S, S) and labels (B,) of these indices, skipping unreadable images."""
    positions = divided(indices, batch_size)
    loader = tqdm(make_loader(images, positions, workers), unit="batch", disable=None, leave=False)
    for (pixels, labels), batch in zip(loader, positions):
        readable = images.readable(batch)
        if readable.any():
            yield pixels[readable], labels[readable]


def choose(length: int, count: int | None, seed: int = 0) -> list[int]:
    """Choose `count` of `length` indices by the seed, or all of them; return them sorted."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(mix_seed("images", seed)))
    return sorted(order[:count].tolist())


def load_choice(images: Images, count: int, size: int, workers: int) -> list[tuple]:
    """Load `count` images, chosen by seed 0, cropped at the centre to `size`, as batches of `load_batches`."""
    part = images.subset(choose(len(images), count))
    part.transform = center_transform(size)
    return [*load_batches(part, range(len(part)), 32, workers)]


def sample_images(images: Images, size: int, count: int = 8) -> torch.Tensor:
    """Read up to `count` images, spread over the set, uint8 (count, 3, size, size)."""
    images, count = copy(images), min(count, len(images))
    images.transform = center_transform(size)
    return torch.stack([images[0, i * len(images) // count][0] for i in range(count)])


def open_rgb(path: str, crop: v2.RandomResizedCrop | None = None, image_max: float | None = None) -> Image.Image:
    """Read an image file's first frame, upright, as 8-bit RGB (`to_rgb`). Raises nearly anything for a damaged file.

    crop: random crop to take while decoding. JPEG files decode faster at 1/2, 1/4 or 1/8 of their size;
    the smallest of these that leaves the crop no smaller than its output is used.
    """
    with opened(path) as image:
        if crop is None:
            return to_rgb(upright(image), image_max)
        width, height = upright_size(image)
        box = crop.make_params([torch.empty(1, height, width, device="meta")])
        factor = min(box["height"] / crop.size[0], box["width"] / crop.size[1])
        if image.format == "JPEG" and factor > 1:
            image.draft(None, [math.ceil(side / factor) for side in image.size])
            scale = round(max(width, height) / max(image.size))  # 1, 2, 4 or 8
            top, left = round(box["top"] / scale), round(box["left"] / scale)
            bottom, right = round((box["top"] + box["height"]) / scale), round((box["left"] + box["width"]) / scale)
            box = dict(top=top, left=left, height=bottom - top, width=right - left)
        return crop.transform(to_rgb(upright(image), image_max), box)


def to_rgb(image: Image.Image, image_max: float | None = None) -> Image.Image:
    """Convert a Pillow image of any mode to 8-bit RGB: palette, alpha (dropped), CMYK, grey, 16-bit, floating-point.

    In the last two, `white_of` is white; ValueError if values lie far beyond it and `image_max` is not given.
    """
    if white := white_of(image, image_max):  # Pillow would clip 16-bit values at 255
        values = np.asarray(image, dtype=np.float32)
        if not image_max and not -white <= values.min() <= values.max() <= 2 * white:
            limits = f"values from {values.min():g} to {values.max():g}, where 0 is black and {white} white"
            raise ValueError(f"{limits}; give all images' largest value as --image_max")
        image = Image.fromarray(np.clip(np.nan_to_num(values) * (255 / white), 0, 255).astype(np.uint8))
    return image.convert("RGB")


def white_of(image: Image.Image, image_max: float | None) -> float | None:
    """Return the value of white in a 16-bit (by default 65535) or floating-point image (1); None for others."""
    default = {"I": 65535, "F": 1}.get(image.mode[0])
    return default and (image_max or default)


# --- folders ----------------------------------------------------------------------------------------------------------


def list_images(directory: str | Path) -> list[str]:
    """List all image files under a directory, sorted, following links, each folder once. UserError if none.

    Skips hidden files and folders, and folders of scripts' outputs below it. Prints how many files of other kinds there
    are, and warns of unreadable folders.
    """
    images, ignored, visited, outputs = [], Counter(), set(), []

    def warn(error: OSError) -> None:
        tqdm.write(f"warning: cannot read the folder {error.filename} ({error.strerror})", file=sys.stderr)

    for folder, subfolders, names in os.walk(directory, onerror=warn, followlinks=True):
        real, ours = os.path.realpath(folder), any(name in OUTPUTS or name.endswith("-overlay.png") for name in names)
        if real in visited or (ours and folder != str(directory)):
            outputs += [folder] * (real not in visited)
            subfolders.clear()
            continue
        visited.add(real)
        hidden = HIDDEN + PICTURES * ours
        subfolders[:] = (name for name in subfolders if not name.startswith(hidden))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(hidden) or name.lower() in LITTER:
                continue
            if suffix in IMAGE_SUFFIXES:
                images.append(os.path.join(folder, name))
            else:
                ignored[suffix or "without a suffix"] += 1
    kinds = [f"{count:,} {kind}" for kind, count in ignored.most_common(8)] + ["..."] * (len(ignored) > 8)
    if not images:
        raise UserError(f"no images under {directory}{', but ' * bool(kinds)}{', '.join(kinds)}; {CONVERT}")
    if kinds := kinds + [f"the outputs in {folder}" for folder in sorted(outputs)]:
        say_once(f"{directory}: {len(images):,} images; not read: {', '.join(kinds)}")
    return sorted(images)


def find_images(paths: list[str], flag: str = "--predict", image_max: float | None = None) -> list[str]:
    """List these files, and all images under these folders, in order. UserError if one is missing, or all damaged."""
    images = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{flag} {path} does not exist; give files or folders of images")
        images += list_images(path) if os.path.isdir(path) else [path]
    check_readable(images, image_max)
    return images


def same_images(one: tuple[str, str | None], other: tuple[str, str | None]) -> bool:
    """Tell whether two data sets, each a name and a path, are the same."""
    return one[0] == other[0] and os.path.realpath(one[1] or "") == os.path.realpath(other[1] or "")


def split_folder(directory: str | Path, split: str) -> Path | None:
    """Return DIR/train or DIR/val if it exists; beside DIR/train, DIR/validation and DIR/valid count as DIR/val."""
    root = Path(directory)
    names = VALIDATION if split == "val" and os.path.isdir(root / "train") else (split,)
    name = next((name for name in names if os.path.isdir(root / name)), None)  # unlike Path.is_dir, never raises
    if name not in (None, split):
        say_once(f"{root / name} is used as {root / split}, which does not exist")
    return name and root / name


def image_folder(directory: str, split: str) -> Path:
    """Find a split's folder, or DIR itself if it has neither train/ nor val/. UserError if only the other exists."""
    if not os.path.isdir(directory):
        problem = "is not a directory" if os.path.exists(directory) else "does not exist"
        raise UserError(f"the folder {directory} {problem}; give a folder of images, as by --data_path DIR")
    folders = {name: folder for name in ("train", "val") if (folder := split_folder(directory, name))}
    if folders and split not in folders:
        fix = ", name other images by --eval_data_path, or train with --holdout 0.2" if split == "val" else ""
        raise UserError(f"{directory} has a folder {next(iter(folders))} and none named {split}; add it{fix}")
    return folders.get(split, Path(directory))


def load_images(
    data_set: str, data_path: str | None, split: str, transform: v2.Compose | None, seed: int = 0,
    count: int | None = None, image_max: float | None = None,
) -> Images:  # fmt: skip
    """Load a data set's "train" or "val" images; `count`: of drawn images; `image_max`: as in `to_rgb`.

    In folders, an image's label is its first folder below the split's; labels are None if any image lies in none.
    UserError if there are no images, or none can be read.
    """
    statistics = STATISTICS[data_set]
    if data_set == "embedded":
        salt = SPLITS.index(split)
        return Images(*draw_images(count or DRAWN[salt], salt), TEXTURES, transform, statistics, seed)
    if data_set != "folder":
        kind, root = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data_set], data_path or "data"
        try:
            cifar = kind(root, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            problem = f"{data_set} is not in {root} and could not be downloaded ({error})"
            raise UserError(f"{problem}; give its folder as --data_path") from None
        return Images(cifar.data, cifar.targets, cifar.classes, transform, statistics, seed)

    root, labels, classes = image_folder(data_path, split), None, None
    paths = list_images(root)
    folders = [os.path.relpath(path, root).split(os.sep)[:-1] for path in paths]
    if all(folders):
        classes, labels = (a.tolist() for a in np.unique([names[0] for names in folders], return_inverse=True))
    check_readable(paths, image_max)
    images = Images(paths, labels, classes, transform, statistics, seed)
    images.image_max = image_max
    return images


def check_readable(paths: list[str], image_max: float | None = None) -> None:
    """Raise UserError if none of up to eight `paths`, spread out, can be read. Prints the value of white in 16 bits."""
    problems = []
    for path in paths[:: -(-len(paths) // 8)]:
        try:
            with opened(path) as image:
                to_rgb(upright(image), image_max)
                if white := white_of(image, image_max):
                    say_once(f"{path}: values up to {image.getextrema()[1]:g}; {white} is white (--image_max)")
            return
        except Exception as error:  # damaged files raise nearly anything, depending on the decoder
            problems.append(f"{path} ({error})")
    raise UserError(f"none of {len(problems)} images tried can be read, such as {problems[0]}; check the files")


# --- labels -----------------------------------------------------------------------------------------------------------


def check_labels(images: Images) -> None:
    """Raise UserError unless every image lies in a class folder."""
    if images.labels is None:
        path = min(images.items, key=lambda path: path.count(os.sep))
        fix = "arrange images as train/<class>/ and val/<class>/"
        raise UserError(f"{path} lies in no class folder, and labels are needed; {fix}")


def check_classes(expected: list[str], actual: list[str], all: bool = True) -> None:
    """Raise UserError unless the validation images have the trained classes; without `all`, some of them suffice."""
    missing, unknown = set(expected) - set(actual) if all else (), set(actual) - set(expected)
    for problem, classes in (("lack the class", missing), ("have an unknown class", unknown)):
        if classes:
            names = f"{', '.join(sorted(classes)[:5])} ({len(classes)} in all)"
            raise UserError(f"the validation images {problem} {names}; training and validation folders must agree")


def shuffled_by_class(images: Images, seed: int) -> list[list[int]]:
    """List the image indices of each class, in random order; without classes, those of all images in one list."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    by_class = [[] for _ in images.classes or [None]]
    for index in order:
        by_class[int(images.labels[index]) if images.classes else 0].append(index)
    return by_class


def split_holdout(images: Images, fraction: float) -> tuple[Images, Images]:
    """Hold out a fraction of every class, whatever the run's seed; return the rest, then the fraction."""
    by_class = shuffled_by_class(images, mix_seed("holdout"))
    held = sorted(index for indices in by_class for index in indices[: round(fraction * len(indices))])
    if not held and fraction * len(images) >= 1:  # classes are too small: take a fraction of all images
        held = sorted([index for indices in by_class for index in indices][:: round(1 / fraction)])
    if not 0 < len(held) < len(images):
        raise UserError(f"--holdout {fraction} of {len(images)} images is {len(held)}; hold out some, and not all")
    return images.subset(sorted(set(range(len(images))) - set(held))), images.subset(held)


def few_labels(images: Images, count: int, seed: int) -> Images:
    """Choose `count` images of every class by the seed; a larger count adds to the same images."""
    by_class = shuffled_by_class(images, mix_seed("labels", seed))
    size, name = min((len(indices), name) for indices, name in zip(by_class, images.classes))
    if size < count:
        raise UserError(f"--labels_per_class {count} is more than the {size} images of class {name}; lower it")
    return images.subset(sorted(index for indices in by_class for index in indices[:count]))


# --- transforms -------------------------------------------------------------------------------------------------------


def pretrain_transform(size: int) -> v2.Transform:
    """Random crop of 20 to 100% of the area and horizontal flip, the only augmentation of FCMAE (paper Tab. 8)."""
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])


def short_side(size: int, crop_pct: float | None) -> int | None:
    """Return the length to which evaluation scales the short side; None if it warps the whole image to a square.

    The default is size / (224 / 256); sizes from 384 pixels on, and up to 32, as in training, are warped. The authors
    do the same.
    """
    return None if crop_pct is None and not 32 < size < 384 else int(size / (crop_pct or 224 / 256))


def evaluation_transform(size: int, crop_pct: float | None = None) -> v2.Transform:
    """Scale to `short_side`, then crop the central square."""
    if side := short_side(size, crop_pct):
        return center_transform(size, side)
    return v2.Compose([v2.Resize((size, size), interpolation=BICUBIC), v2.PILToTensor()])


def describe_evaluation(size: int, crop_pct: float | None, data_set: str) -> str:
    """Describe what `evaluation_transform` does, and whose statistics normalise the images."""
    side = short_side(size, crop_pct)
    shape = f"the centre of a short side of {side}" if side else "whole, warped to the square"
    return f"at {size} px ({shape}), normalised as {data_set}"


def center_transform(size: int, short_side: int | None = None) -> v2.Transform:
    """Scale the short side to `short_side` (by default `size`), then crop the central square of `size`."""
    resize = v2.Resize(short_side or size, interpolation=BICUBIC)
    return v2.Compose([v2.Lambda(trim), resize, v2.CenterCrop(size), v2.PILToTensor()])


def trim(image: Image.Image) -> Image.Image:
    """Crop a strip to 16 times its width: a line of single pixels, scaled up whole, would fill memory."""
    longest = 16 * min(image.size)
    return v2.functional.center_crop(image, [min(image.height, longest), min(image.width, longest)])


def normalise(images: torch.Tensor, statistics: tuple, device: torch.device) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> float32 on `device`, zero mean and unit variance; only bytes are transferred."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in statistics)
    return (images.to(device, non_blocking=True).float() / 255 - mean) / std


def denormalise(images: torch.Tensor, statistics: tuple) -> torch.Tensor:
    """Undo `normalise`: floats in [0, 1]."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in statistics)
    return (images.float() * std + mean).clamp(0, 1)
