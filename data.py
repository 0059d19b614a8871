"""Images in: an embedded data set that draws itself, CIFAR, and folders; and what is done to them before the network sees them.

Nothing random here has a hidden state: the augmentation of a sample depends on (seed, epoch, sample index).
"""

import argparse
import math
import os
import re
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from plumbing.script import UserError, counted, one_line, remark
from plumbing.seeds import mix_seed

# Mean and standard deviation per channel, of pixels in [0, 1]; folders take ImageNet's.
STATISTICS = {
    "embedded": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
GREY = tuple(round(255 * value) for value in STATISTICS["folder"][0])  # of padding: the mean colour
DATA_SETS = tuple(STATISTICS)
BICUBIC = v2.InterpolationMode.BICUBIC
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
IMAGE_SUFFIXES |= {".avif"} if features.check("avif") else set()  # Pillow's own packages read it since 11.3
CONVERT = f"files must end in {', '.join(sorted(IMAGE_SUFFIXES))}; convert others, such as HEIC, to JPEG"
LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini"}  # what Windows leaves in folders
VALIDATION = ("val", "validation", "valid")


# --- the embedded dataset ---------------------------------------------------------------------------------------------

TEXTURES = ("shading", "stripes", "checks", "dots", "grid", "waves", "rings", "rays", "dashes", "ripples")
SHAPES = ("disc", "ring", "crescent", "triangle", "square", "cross", "star", "flower", "heart", "spiral")
SPLITS = ("train", "val")  # their places in what follows, and their seeds
DRAWN = (4000, 1000)  # how many are drawn
SCENES = (5000, 200)  # for detection and segmentation
_CHUNK = 50  # pictures drawn at once; a multiple of the number of textures keeps the classes balanced


def draw_images(n: int, seed: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Draw `n` pictures of textured shapes on textured backgrounds: uint8 (n, size, size, 3) and their classes (n,).

    The class is the texture of the ground. Its scale, rotation and colours, the light, and three shapes with textures of
    their own in front of it are nuisance. Textures are periodic and shapes symmetric, so a hidden patch can be guessed.
    """
    images, labels, *_ = _draw(n, seed, size)
    return images, labels


def draw_scenes(n: int, seed: int, size: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same kind of pictures, and the shapes in them: uint8 (n, size, size, 3), kinds (n, 3) and masks, bool (n, 3, size, size).

    A kind is an index into SHAPES, back to front; a mask is the part that no later shape hides.
    """
    images, _, kinds, masks = _draw(n, seed, size)
    return images, kinds, masks


def _draw(n, seed, size):
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy leaves the interpreter lock; small chunks stay in the cache
        chunks = list(pool.map(lambda chunk: _draw_chunk(seed, chunk, size), range(-(-n // _CHUNK))))
    return [np.concatenate(parts)[:n] for parts in zip(*chunks)]


def _draw_chunk(seed, chunk, size):
    n = _CHUNK
    rng = np.random.default_rng([seed, chunk, size])
    labels = rng.permutation(np.arange(n) % len(TEXTURES))
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = np.broadcast_to(axis, (n, size, size)), np.broadcast_to(axis[:, None], (n, size, size))

    ground = rng.uniform(0.15, 0.85, size=(n, 1, 1, 3)).astype(np.float32)
    picture = _texture(rng, x, y, ground, labels)
    masks, all_kinds = np.zeros((n, 3, size, size), dtype=bool), np.empty((n, 3), dtype=np.int64)
    for layer, small in enumerate((True, True, False)):
        kinds = all_kinds[:, layer] = rng.integers(len(SHAPES), size=n)
        radius = _uniform(rng, n, 0.12, 0.2) if small else _uniform(rng, n, 0.35, 0.6)
        reach = 0.9 if small else 0.5
        u, v = _turn(x - _uniform(rng, n, -reach, reach), y - _uniform(rng, n, -reach, reach), _uniform(rng, n, 0, 2 * np.pi))
        inside = np.empty_like(picture[..., :1])
        for k in range(len(SHAPES)):
            chosen = kinds == k
            distance = _distance(SHAPES[k], u[chosen] / radius[chosen], v[chosen] / radius[chosen]) * radius[chosen]
            inside[chosen, :, :, 0] = np.clip(0.5 - distance * size / 3, 0, 1)  # a soft edge, about 1.5 pixels wide
        colour = (ground + rng.uniform(0.35, 0.65, size=ground.shape)) % 1  # far from the ground's in every channel
        fill = _texture(rng, u, v, colour.astype(np.float32), rng.integers(len(TEXTURES), size=n))
        picture += inside * (fill - picture)
        masks[:, layer] = inside[..., 0] > 0.5
        masks[:, :layer] &= ~masks[:, layer : layer + 1]
    tilt_x, tilt_y = _turn(x, y, _uniform(rng, n, 0, 2 * np.pi))
    picture *= (1 + 0.2 * (tilt_x + 0.5 * tilt_y))[..., None]  # light from one side
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8), labels, all_kinds, masks


def _uniform(rng, n, low, high):
    return rng.uniform(low, high, size=(n, 1, 1)).astype(np.float32)


def _turn(x, y, angle):
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _texture(rng, x, y, colour, kinds):
    """(n, S, S) coordinates -> (n, S, S, 3): a colour (n, 1, 1, 3) varied by each picture's kind of pattern."""
    n = len(x)
    u, v = _turn(x, y, _uniform(rng, n, 0, 2 * np.pi))
    frequency, phase = _uniform(rng, n, 8, 14), _uniform(rng, n, 0, 2 * np.pi)
    pattern = np.empty_like(u)
    for k, kind in enumerate(TEXTURES):
        chosen = kinds == k
        pattern[chosen] = _pattern(kind, u[chosen], v[chosen], frequency[chosen], phase[chosen])
    contrast = rng.uniform(0.15, 0.4, size=(n, 1, 1, 3)) * rng.choice((-1, 1), size=(n, 1, 1, 3))
    return colour + np.clip(pattern, -1, 1)[..., None] * contrast.astype(np.float32)


def _pattern(kind, u, v, frequency, phase):
    """About -1 to 1; what goes beyond is cut off, which makes flat areas with soft edges."""
    a, b = np.sin(frequency * u + phase), np.sin(frequency * v)
    match kind:
        case "shading":
            return 0.8 * u
        case "stripes":
            return 2 * a
        case "checks":
            return 4 * a * b
        case "dots":
            return 2.5 * (a + b) - 2.5
        case "grid":
            return 3 * np.maximum(np.abs(a), np.abs(b)) - 2.2
        case "waves":
            return 2 * np.sin(frequency * u + 2 * np.sin(frequency * v / 1.5))
        case "rings":
            return 2 * np.sin(frequency * np.hypot(u, v) + phase)
        case "rays":
            return 2 * np.sin(6 * np.arctan2(v, u) + phase)
        case "dashes":
            return 2 * a * (np.sin(frequency * v / 3) > 0)
        case _:
            return 1.4 * (np.sin(0.7 * frequency * u + phase) + np.sin(0.6 * frequency * v + 2 * u))


def _distance(shape, u, v):
    """A signed distance, negative inside, roughly in units of the shape's radius."""
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    match shape:
        case "disc":
            return r - 0.9
        case "ring":
            return np.abs(r - 0.72) - 0.23
        case "crescent":
            return np.maximum(r - 1, 0.8 - np.hypot(u - 0.45, v))
        case "triangle" | "square":
            k = 3 if shape == "triangle" else 4
            return r * np.cos((angle % (2 * np.pi / k)) - np.pi / k) - (0.6 if k == 3 else 0.75)
        case "cross":
            low, high = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
            return np.maximum(low - 0.3, high - 1)
        case "star":
            fold = np.abs((angle % (2 * np.pi / 5)) - np.pi / 5)  # 0 at a tip, pi / 5 in a notch
            return r * (0.5 + fold) - 0.55
        case "flower":
            return r - 0.75 - 0.25 * np.cos(5 * angle)
        case "heart":
            return np.hypot(u, 1.1 * v + 0.2 - 0.7 * np.sqrt(np.abs(u))) - 0.85
        case _:
            return np.maximum(0.35 - np.abs((angle / np.pi + 2.2 * r) % 2 - 1), r - 1) * 0.6


# --- datasets ---------------------------------------------------------------------------------------------------------


class Images(Dataset):
    """Images with or without labels, indexed by (epoch, index) so that augmentation is a function of its place.

    Args:
        items: file paths, or a uint8 array (n, H, W, 3).
        labels: one class index per item, or None.
        classes: class names, or None.
        transform: from a PIL image to a uint8 tensor (3, S, S), random or not.
        statistics: mean and standard deviation per channel, for `normalise`.
        seed: of the augmentation.

    An item is (image, label or -1, failed): `failed` is -1, or the index of a file that could not be read, in whose place
    stands the next readable one of a hundred, else a black picture.
    """

    def __init__(self, items, labels, classes, transform, statistics, seed: int = 0):
        self.items, self.labels, self.classes = items, labels, classes
        self.transform, self.statistics, self.seed = transform, statistics, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        epoch, index = place
        places = ((index + k) % len(self) for k in range(min(100, len(self))))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: lend it one of our own
            found = ((at, tensor) for at in places if (tensor := self._load(at, epoch, index)) is not None)
            at, tensor = next(found, (None, None))
            failed = at != index
            if tensor is None:
                at, tensor = index, self.transform(Image.new("RGB", (8, 8)))
        return tensor, -1 if self.labels is None else int(self.labels[at]), index if failed else -1

    def on_device(self, pixels: torch.Tensor, labels: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """What a loader gave of these images -> (B, 3, S, S) normalised images and (B,) labels, on `device`."""
        return normalise(self.render(pixels), self.statistics, device), labels.to(device)

    def render(self, batch: torch.Tensor) -> torch.Tensor:
        """What a loader gave of these images -> uint8 (B, 3, S, S): here it is that already."""
        return batch

    def subset(self, indices: list[int]) -> "Images":
        """The same with fewer items."""
        items = self.items[indices] if isinstance(self.items, np.ndarray) else [self.items[i] for i in indices]
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Images(items, labels, self.classes, self.transform, self.statistics, self.seed)

    def why(self, index: int) -> str:
        """Why a file cannot be read, in a few words."""
        return why_unreadable(self.items[index])

    def _load(self, index, epoch, place):
        torch.default_generator.manual_seed(mix_seed("crop", self.seed, epoch, place))
        crop, *others = getattr(self.transform, "transforms", [None])
        if isinstance(self.items, np.ndarray) or not isinstance(crop, v2.RandomResizedCrop):
            image = self._open(index)
            return image and self.transform(image)
        image = self._open(index, crop)
        return image and v2.Compose(others)(image)

    def _open(self, index, crop=None):
        item = self.items[index]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        try:
            return open_rgb(item, crop)
        except Exception:  # damaged files raise nearly anything, depending on the decoder
            return None


class HeldImages(Images):
    """An array of images held on a device, where they are cropped and flipped a batch at a time; a loader only draws the places.

    The draws are torchvision's own, the same as those of `Images`, and so are the pixels, but for Pillow's rounding (and clipping)
    between the two axes. `fit` tells which images and transforms can be held.
    """

    def __init__(self, images: Images, device: torch.device):
        super().__init__(images.items, images.labels, images.classes, images.transform, images.statistics, images.seed)
        self.pixels = torch.from_numpy(self.items).to(device).permute(0, 3, 1, 2).contiguous()  # uint8 (n, 3, H, W)

    @staticmethod
    def fit(images: Images) -> bool:
        """Whether `images` are in memory, and only cropped (bicubically) and flipped."""
        if not isinstance(images.items, np.ndarray) or not isinstance(images.transform, v2.Compose):
            return False
        first, *others = images.transform.transforms
        return (
            isinstance(first, (v2.RandomResizedCrop, v2.Resize))
            and first.interpolation == BICUBIC
            and all(isinstance(step, (v2.RandomCrop, v2.RandomHorizontalFlip, v2.PILToTensor)) for step in others)
        )

    def __getitem__(self, place: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        """As `Images`, with (8,) int64 for the image: index, crop (top, left, height, width), shift (down, right), flipped."""
        epoch, index = place
        height, width = self.items.shape[1:3]
        where = dict(top=0, left=0, height=height, width=width, down=0, right=0, flip=0)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed("crop", self.seed, epoch, index))
            for step in self.transform.transforms:
                if isinstance(step, v2.RandomResizedCrop):
                    where |= step.make_params([torch.empty(1, height, width)])
                elif isinstance(step, v2.RandomCrop):
                    drawn = step.make_params([torch.empty(1, *step.size)])
                    left, top, *_ = drawn["padding"]
                    where |= dict(down=drawn["top"] - top, right=drawn["left"] - left)
                elif isinstance(step, v2.RandomHorizontalFlip):
                    where["flip"] = int(torch.rand(1) < step.p)
        label = -1 if self.labels is None else int(self.labels[index])
        return torch.tensor([index, *where.values()]), label, -1

    def __getstate__(self) -> dict:  # for loader processes, which only draw
        return self.__dict__ | {"pixels": None}

    def render(self, batch: torch.Tensor) -> torch.Tensor:
        """Places (B, 8) -> uint8 (B, 3, S, S) on the device: each axis is resized by a matrix of its own."""
        index, top, left, height, width, down, right, flip = batch.to(self.pixels.device, non_blocking=True).unbind(1)
        size, (rows, columns) = self.transform.transforms[0].size[0], self.pixels.shape[2:]
        vertical = resize_matrices(top, height, down, size, rows)  # (B, S, H)
        horizontal = resize_matrices(left, width, right, size, columns)  # (B, S, W)
        horizontal = torch.where(flip[:, None, None] == 1, horizontal.flip(1), horizontal)
        images = vertical[:, None] @ self.pixels[index].float() @ horizontal.mT[:, None]  # (B, 3, H, W) -> (B, 3, S, S)
        return images.round().clamp(0, 255).to(torch.uint8)


def hold_on_device(images: Images, args: argparse.Namespace, device: torch.device) -> Images:
    """`images` held on the device if --hold_data says so; by default, if that is a GPU and they can be. UserError if they cannot.

    `args.hold_data` then tells what was done.
    """
    fit = HeldImages.fit(images)
    if args.hold_data and not fit:
        raise UserError(
            "--hold_data needs images that are in memory (embedded, CIFAR) and only cropped and flipped; leave it out, or take "
            "--aa none, --reprob 0, no --color_jitter and bicubic crops"
        )
    args.hold_data = fit and (device.type == "cuda" if args.hold_data is None else args.hold_data)
    return HeldImages(images, device) if args.hold_data else images


def resize_matrices(start: torch.Tensor, length: torch.Tensor, shift: torch.Tensor, size: int, source: int) -> torch.Tensor:
    """What each of `source` pixels gives to each of `size`, (B, size, source), by Pillow's antialiased bicubic filter.

    Pixels start .. start + length (B,) become `size` ones, of which those from `shift` on are taken; beyond them is zero.
    """
    start, length, shift = (x.float()[:, None, None] for x in (start, length, shift))  # (B, 1, 1)
    out = torch.arange(size, device=start.device)[:, None] + shift  # (B, size, 1)
    pixel = torch.arange(source, device=start.device) + 0.5
    scale = length / size
    x = ((pixel - start - (out + 0.5) * scale) / scale.clamp(min=1)).abs()  # (B, size, source)
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    inside = (x < 2) & (pixel > start) & (pixel < start + length) & (out >= 0) & (out < size)
    weight = torch.where(inside, weight, 0)
    return weight / weight.sum(dim=2, keepdim=True).where(inside.any(dim=2, keepdim=True), 1)


def open_rgb(path: str, crop: v2.RandomResizedCrop | None = None) -> Image.Image:
    """The first frame of an image file, as 8-bit RGB, and as it is stored: EXIF orientation is not applied.

    Neither do torchvision's ImageFolder and timm, so accuracies compare. Raises nearly anything for a damaged file, for one that
    declares more than twice Pillow's MAX_IMAGE_PIXELS (178 million in all, before they are allocated), and for what is no file.

    crop: taken while decoding. A JPEG file can be decoded at 1/2, 1/4 or 1/8 of its size, for a fraction of the time; the smallest
    that leaves the crop no smaller than its output is taken.
    """
    if not os.path.isfile(path):  # reading a pipe would wait for ever
        raise FileNotFoundError("no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on large images and odd metadata
        with Image.open(path) as image:
            if crop is None:
                return to_rgb(image)
            box = crop.make_params([image])  # drawn from the size, which stands in the file's header
            shrinks = min(box["height"] / crop.size[0], box["width"] / crop.size[1])
            if image.format == "JPEG" and shrinks > 1:
                full = image.width
                image.draft(None, [math.ceil(side / shrinks) for side in image.size])
                times = round(full / image.width)  # 1, 2, 4 or 8
                top, left = round(box["top"] / times), round(box["left"] / times)
                bottom, right = round((box["top"] + box["height"]) / times), round((box["left"] + box["width"]) / times)
                box = dict(top=top, left=left, height=bottom - top, width=right - left)
            return crop.transform(to_rgb(image), box)


def why_unreadable(path: str) -> str:
    """Why `open_rgb` fails, in a few words; the file is opened once more to find out."""
    try:
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            return "empty"
        open_rgb(path)
    except Image.DecompressionBombError:
        return f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    except UnidentifiedImageError:
        return "not an image, or of a format that is not supported"
    except Exception as error:  # damaged files raise nearly anything, depending on the decoder
        why = one_line(getattr(error, "strerror", None) or error)
        return "truncated" if "truncated" in why.lower() else why or "damaged"
    return "it can be read now"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB: palette, alpha (dropped), CMYK, greyscale, 16-bit and floating-point ones too."""
    if image.mode.startswith(("I", "F")):  # Pillow would clip 16-bit values at 255
        values = np.asarray(image, dtype=np.float32)
        top = 65535 if values.max() > 255 else 255 if values.max() > 1 else 1
        image = Image.fromarray(np.clip(values * (255 / top), 0, 255).astype(np.uint8))
    return image.convert("RGB")


def list_images(directory: Path) -> list[str]:
    """All image files under a directory, sorted; links are followed, each folder once; a warning names unreadable folders.

    A line counts the files of other kinds, but for hidden ones and what systems leave behind; UserError where there are no others.
    """
    found, others, seen = [], Counter(), set()

    def warn(error: OSError) -> None:
        tqdm.write(f"warning: cannot read the folder {one_line(error.filename)} ({error.strerror})", file=sys.stderr)

    for folder, subfolders, files in os.walk(directory, onerror=warn, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        for name in files:
            kind = os.path.splitext(name)[1].lower()
            if kind in IMAGE_SUFFIXES and not name.startswith("._"):  # what macOS leaves beside each file on other disks
                found.append(os.path.join(folder, name))
            elif not name.startswith(".") and name.lower() not in LITTER:
                others[kind or "without a suffix"] += 1
    kinds = [f"{count:,} {kind}" for kind, count in sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))]
    unread = ", ".join(kinds[:8]) + (f", and {len(kinds) - 8} other kinds" if len(kinds) > 8 else "")
    if others and not found:
        raise UserError(f"no images under {directory}, but {unread}; {CONVERT}")
    if others:
        remark(f"{directory}: {len(found):,} images; not read: {unread}")
    return sorted(found)


def find_images(paths: list[str]) -> list[str]:
    """These files, and all images under these folders, in the order of --predict; UserError when one does not exist or none is there."""
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"--predict {path} does not exist; give files or folders of images")
        found += list_images(path) if os.path.isdir(path) else [path]
    if not found:
        raise UserError(f"no images under {', '.join(paths)}; give others with --predict")
    return found


def same_images(one: tuple[str, str | None], other: tuple[str, str | None]) -> bool:
    """Whether two data sets, each with the place where it lies, are the same."""
    return one[0] == other[0] and os.path.realpath(one[1] or "") == os.path.realpath(other[1] or "")


def choose_data_set(data_set: str | None, data_path: str | None) -> str:
    """The data set that --data_set and --data_path mean together; UserError when they contradict each other."""
    if data_set == "folder" and not data_path:
        raise UserError("--data_set folder needs --data_path DIR")
    if data_set == "embedded" and data_path:
        raise UserError(f"--data_set embedded takes no --data_path {data_path}; leave one of the two out")
    return data_set or ("folder" if data_path else "embedded")


def split_folder(directory: str | Path, split: str) -> Path | None:
    """DIR/train or DIR/val, None where there is none. Beside DIR/train, DIR/validation and DIR/valid are taken for DIR/val."""
    root = Path(directory)
    names = VALIDATION[: None if os.path.isdir(root / "train") else 1] if split == "val" else (split,)
    found = next((name for name in names if os.path.isdir(root / name)), None)
    if found not in (None, split):
        remark(f"{root / found} is taken for {root / split}, which is not there")
    return found and root / found


def load_images(data_set: str, data_path: str | None, split: str, transform, seed: int = 0, count: int | None = None) -> Images:
    """The "train" or "val" images of a data set, `count` if they are drawn; UserError when there are none, or none of a few can be read.

    A folder with neither DIR/train nor DIR/val (`split_folder`) is taken whole, for both splits. Labels are the first folder below
    the split's, and None when an image lies in no such folder.
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
            raise UserError(
                f"{data_set} is not in {root} and could not be downloaded ({error}); give its folder as --data_path"
            ) from None
        return Images(cifar.data, cifar.targets, cifar.classes, transform, statistics, seed)

    root = Path(data_path)
    if not os.path.isdir(root):  # unlike Path's, never raises
        raise UserError(
            f"the folder {root} {'is not a directory' if os.path.exists(root) else 'does not exist'}; give a folder of images, "
            f"as by --data_path DIR"
        )
    splits = {name: folder for name in ("train", "val") if (folder := split_folder(root, name))}
    if splits and split not in splits:
        test = f" {root / 'test'}" if os.path.isdir(root / "test") else ""
        others = f"name other images by --eval_data_path{test}, or train with --holdout 0.2, a share of the training images"
        fix = others if split == "val" else "or give another folder"
        raise UserError(f"{root} has a folder {next(iter(splits))} and none named {split}; add {root / split}, {fix}")
    root = splits.get(split, root)
    paths = list_images(root)
    if not paths:
        raise UserError(f"no images under {root}; {CONVERT}")
    parts = [os.path.relpath(path, root).split(os.sep) for path in paths]
    labels = classes = None
    if all(len(part) > 1 for part in parts):
        classes = sorted({part[0] for part in parts})
        number = {name: k for k, name in enumerate(classes)}
        labels = [number[part[0]] for part in parts]
    images = Images(paths, labels, classes, transform, statistics, seed)
    check_readable(images, root)
    return images


def check_readable(images: Images, where: str | Path) -> None:
    """UserError if none of up to eight files, spread over the data set, can be read."""
    tried = range(0, len(images), -(-len(images) // 8))
    if all(images._open(index) is None for index in tried):
        others = f", nor the {len(tried) - 1} others tried under {where}" if len(tried) > 1 else ""
        raise UserError(f"cannot read the image {images.items[0]} ({images.why(0)}){others}; check files and permissions")


# --- labels ---------------------------------------------------------------------------------------------------------------


def check_labels(images: Images) -> None:
    """UserError unless every image lies in a class folder."""
    if images.labels is None:
        loose = min(images.items, key=lambda path: path.count(os.sep))
        raise UserError(
            f"{loose} lies in no class folder, and labels are needed; arrange images as train/<class>/ and val/<class>/"
        )


def check_classes(expected: list[str], found: list[str]) -> None:
    """UserError unless the validation images have exactly the classes that were trained."""
    for words, names in (("lack the class", set(expected) - set(found)), ("have an unknown class", set(found) - set(expected))):
        if names:
            some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(
                f"the validation images {words} {some} ({len(names)} in all); training and validation folders must agree"
            )


def shuffled_by_class(images: Images, seed: int) -> dict[int, list[int]]:
    """The indices of every class's images, in random order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    found = {label: [] for label in range(len(images.classes))}
    for index in order:
        found[int(images.labels[index])].append(index)
    return found


def split_holdout(images: Images, share: float) -> tuple[Images, Images]:
    """The images without a `share` of every class, and that share: always the same ones, whatever the run's seed."""
    held = [
        i for indices in shuffled_by_class(images, mix_seed("holdout")).values() for i in indices[: round(share * len(indices))]
    ]
    if not held:
        raise UserError(f"--holdout {share} of {counted(len(images), 'image')} is none of any class; hold out more")
    return images.subset(sorted(set(range(len(images))) - set(held))), images.subset(sorted(held))


def few_labels(images: Images, count: int, seed: int) -> Images:
    """`count` images of every class: the same ones for the same seed, and a part of those for a larger count."""
    chosen = shuffled_by_class(images, mix_seed("labels", seed))
    small = min(chosen, key=lambda label: len(chosen[label]))
    if len(chosen[small]) < count:
        raise UserError(
            f"--labels_per_class {count} is more than the {len(chosen[small])} images of class {images.classes[small]}; lower it"
        )
    return images.subset(sorted(index for indices in chosen.values() for index in indices[:count]))


# --- transforms ----------------------------------------------------------------------------------------------------------


def pretrain_transform(size: int) -> v2.Transform:
    """Random crop of 20 to 100% of the area and horizontal flip, the only augmentation of FCMAE (paper Tab. 8)."""
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])


def training_transform(
    size: int, statistics: tuple, min_crop: float = 0.08, interpolation: str = "bicubic", aa: str | None = None,
    color_jitter: float | None = None, reprob: float = 0.0, remode: str = "pixel", recount: int = 1,
) -> v2.Transform:  # fmt: skip
    """Augmentation for classification; the arguments are finetune.py's flags."""
    mode = v2.InterpolationMode(interpolation)
    if size <= 32:  # as the authors do: crops of so small an image would leave little
        steps = [v2.Resize((size, size), interpolation=mode), v2.RandomCrop(size, padding=4)]
    else:
        steps = [v2.RandomResizedCrop(size, scale=(min_crop, 1.0), interpolation=mode)]
    steps.append(v2.RandomHorizontalFlip())
    if aa:
        steps.append(automatic_augmentation(aa, statistics[0], mode))
    elif color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    steps.append(v2.PILToTensor())
    if reprob:
        steps.append(v2.RandomApply([EraseBytes(statistics, remode, recount)] * recount, p=reprob))
    return v2.Compose(steps)


def automatic_augmentation(name: str, mean: tuple, interpolation: v2.InterpolationMode) -> v2.Transform:
    """timm's names for automatic augmentation -> torchvision's transforms; UserError for one that torchvision lacks.

    "rand-m9-mstd0.5-inc1" is RandAugment, where m is the magnitude of 10 and n the number of operations (2), each applied with
    probability 0.5. timm also draws the magnitude around m with deviation mstd, which torchvision does not. As in timm, images are
    resampled by `interpolation`, and what they leave bare when they move takes the colour `mean`, in [0, 1].
    """
    moved = dict(interpolation=interpolation, fill=[round(255 * value) for value in mean])
    kind = name.split("-")[0]
    if re.fullmatch(r"rand(-(m|n|mstd|inc)\d+(\.\d+)?)*", name):
        values = {key: float(value) for key, value in re.findall(r"-([a-z]+)([\d.]+)", name)}
        magnitude, count = values.get("m", 9), values.get("n", 2)
        if magnitude > 10 or not 1 <= count <= 10:
            found = f"m (magnitude) {magnitude:g} and n (operations) {count:g}"
            raise UserError(f"--aa {name} has {found}; both end at 10, and n begins at 1")
        # torchvision counts to 30 where timm counts to 10
        operation = v2.RandAugment(num_ops=1, magnitude=round(3 * magnitude), num_magnitude_bins=31, **moved)
        return v2.Compose([v2.RandomApply([operation], p=0.5)] * int(count))
    if kind in ("original", "v0"):
        return v2.AutoAugment(**moved)
    if kind == "trivial":
        return v2.TrivialAugmentWide(**moved)
    raise UserError(f"no automatic augmentation --aa {name}; choose rand-m9-mstd0.5-inc1 (any m and n), original, trivial or none")


class EraseBytes(v2.RandomErasing):
    """torchvision's RandomErasing on images that are still bytes: what it fills in is drawn on the normalised scale."""

    def __init__(self, statistics: tuple, mode: str, count: int):
        # timm divides the erased area among `count` rectangles.
        super().__init__(p=1.0, scale=(0.02 / count, 1 / 3 / count), value=0 if mode == "const" else "random")
        self.mode, (self.mean, self.std) = mode, (torch.tensor(values).view(3, 1, 1) for values in statistics)

    def make_params(self, flat_inputs: list) -> dict:
        """As torchvision's, with the values converted to bytes."""
        params = super().make_params(flat_inputs)
        if params["v"] is not None:
            v = params["v"].float()
            if self.mode == "rand":  # one colour for the whole rectangle
                v = torch.randn(3, 1, 1)
            params["v"] = ((v * self.std + self.mean) * 255).clamp(0, 255).to(torch.uint8)
        return params


def mixing(args: argparse.Namespace, classes: int) -> v2.Transform:
    """MixUp and CutMix: a batch (N, 3, S, S) with labels (N,) -> mixed images, and (N, classes) shares for targets, where mixed."""
    kinds = [(v2.MixUp, args.mixup, 1 - args.mixup_switch_prob), (v2.CutMix, args.cutmix, args.mixup_switch_prob)]
    kinds = [(kind(alpha=alpha, num_classes=classes), chance) for kind, alpha, chance in kinds if alpha > 0]
    if not kinds:
        return v2.Identity()
    transforms, chances = zip(*kinds)
    either = transforms[0] if len(kinds) == 1 else v2.RandomChoice(list(transforms), p=list(chances))
    return v2.RandomApply([either], p=args.mixup_prob) if args.mixup_prob < 1 else either


def evaluation_transform(size: int, crop_pct: float | None = None) -> v2.Transform:
    """Short side to size / crop_pct (by default 224 / 256), then the central square.

    By default the whole image is warped to the square from 384 pixels on, and up to 32, as in training: both as the authors do.
    """
    if side := short_side(size, crop_pct):
        return center_transform(size, side)
    return v2.Compose([v2.Resize((size, size), interpolation=BICUBIC), v2.PILToTensor()])


def short_side(size: int, crop_pct: float | None) -> int | None:
    """What evaluation scales the short side to; None where it warps the whole image."""
    return None if crop_pct is None and not 32 < size < 384 else int(size / (crop_pct or 224 / 256))


def describe_evaluation(size: int, crop_pct: float | None, data_set: str) -> str:
    """What `evaluation_transform` does, and whose statistics normalise the images, in words."""
    side = short_side(size, crop_pct)
    shape = f"the centre of a short side of {side}" if side else "whole, warped to the square"
    return f"at {size} px ({shape}), normalised as {data_set}"


def center_transform(size: int, short_side: int | None = None) -> v2.Transform:
    """Short side to `short_side` (by default `size`), then the central square of `size`: nothing random."""
    resize = v2.Resize(short_side or size, interpolation=BICUBIC)
    return v2.Compose([v2.Lambda(trim), resize, v2.CenterCrop(size), v2.PILToTensor()])


def trim(image: Image.Image) -> Image.Image:
    """The central part of a strip, at most 16 times as long as wide: enlarged whole, a line of pixels would fill the memory."""
    longest = 16 * min(image.size)
    return v2.functional.center_crop(image, [min(image.height, longest), min(image.width, longest)])


def normalise(images: torch.Tensor, statistics: tuple, device: torch.device) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> float32 on `device`, zero mean and unit variance. Bytes travel; floats are made on arrival."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in statistics)
    return (images.to(device, non_blocking=True).float() / 255 - mean) / std


def denormalise(images: torch.Tensor, statistics: tuple) -> torch.Tensor:
    """The inverse of `normalise`, as floats in [0, 1]."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in statistics)
    return (images.float() * std + mean).clamp(0, 1)
