"""Pictures of many objects, for detection: what they hold, and how picture, boxes and masks are transformed together.

The embedded ones are `data.py`'s drawings, whose shapes in front are the objects. What is drawn for a sample depends on
(seed, epoch, sample index), as everywhere here.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from data import GREY, SCENES, SHAPES, SPLITS, draw_scenes, open_rgb, why_unreadable
from plumbing.coco import Annotations, embedded_annotations, has_masks, read_annotations
from plumbing.plots import draw_objects, plot_panels
from plumbing.script import UserError
from plumbing.seeds import mix_seed


class Scenes(Dataset):
    """Pictures with boxes, labels and perhaps masks, indexed by (epoch, index).

    Args:
        items: file paths, or a uint8 array (n, H, W, 3).
        data_set: in COCO's format, its images in the order of `items`.
        transform: of picture and target together; its draws are a function of (seed, epoch, index). Without one, pictures come
            as they are, and without targets.
        masks: whether targets have masks.

    An item is (uint8 picture (3, H, W), target, failed); target: boxes (n, 4), labels (n,), masks (n, H, W). `failed` is -1, or
    the index of a file that could not be read, in whose place stands the next readable one of a hundred, else nothing at all:
    a grey picture without objects.
    """

    def __init__(self, items, data_set: dict, transform: v2.Transform, masks: bool, seed: int = 0):
        self.items, self.data_set, self.transform, self.seed = items, data_set, transform, seed
        self.masks, self.annotations = masks, Annotations(data_set, masks)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def classes(self) -> list[str]:
        """Names, of label 1 first."""
        return [row["name"] for row in self.data_set["categories"]]

    @property
    def category_ids(self) -> list[int]:
        """The data's own numbers of the classes."""
        return [row["id"] for row in self.data_set["categories"]]

    @property
    def objects(self) -> int:
        """How many there are, crowds aside."""
        return sum(map(len, self.annotations.of_image.values()))

    def learn_masks(self, masks: bool) -> None:
        """Whether targets shall have masks; UserError if there are none."""
        if masks and not self.masks:
            raise UserError("--masks, but not all objects of the training data have one; leave it out, or take --no-masks")
        self.masks = self.annotations.masks = masks

    def first(self, count: int) -> "Scenes":
        """The same with at most `count` pictures."""
        images = self.data_set["images"][:count]
        ids = {row["id"] for row in images}
        kept = [row for row in self.data_set["annotations"] if row["image_id"] in ids]
        return Scenes(
            self.items[:count], self.data_set | {"images": images, "annotations": kept}, self.transform, self.masks, self.seed
        )

    def __getitem__(self, place: tuple[int, int]) -> tuple[torch.Tensor, dict, int]:
        epoch, index = place
        for k in range(min(100, len(self))):
            at = (index + k) % len(self)
            if (picture := self.open(at)) is not None:
                break
        else:
            grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
            target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
            return grey, target | ({"masks": torch.zeros(0, 64, 64, dtype=torch.uint8)} if self.masks else {}), index
        failed = index if at != index else -1
        if self.transform is None:
            return v2.functional.pil_to_tensor(picture), {}, failed
        target = self.annotations.target(at)
        size = picture.height, picture.width
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        if self.masks:
            if target["masks"].shape[1:] != size:
                said = " x ".join(map(str, reversed(target["masks"].shape[1:])))
                raise UserError(f"{self.items[at]} is {size[1]} x {size[0]} pixels, and {said} in its annotations; correct them")
            target["masks"] = tv_tensors.Mask(target["masks"])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: lend it one of our own
            torch.default_generator.manual_seed(mix_seed("crop", self.seed, epoch, index))
            picture, target = self.transform(picture, target)
        return picture, {name: value.as_subclass(torch.Tensor) for name, value in target.items()}, failed

    def open(self, index: int) -> Image.Image | None:
        """A picture; None if it cannot be read."""
        item = self.items[index]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        try:
            return open_rgb(item)
        except Exception:  # damaged files raise nearly anything, depending on the decoder
            return None

    def why(self, index: int) -> str:
        """Why a picture cannot be read."""
        return why_unreadable(self.items[index])

    def collate(self, items: list) -> tuple[list, list, torch.Tensor]:
        """Pictures and targets differ in size: they stay lists."""
        pictures, targets, failed = zip(*items)
        return list(pictures), list(targets), torch.tensor(failed)

    def on_device(self, pictures: list, targets: list, device: torch.device) -> tuple[list, list]:
        """What a loader gave -> float pictures in [0, 1], and targets, on `device`."""
        pictures = [picture.to(device, non_blocking=True).float() / 255 for picture in pictures]
        return pictures, [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in targets]


# --- where they come from ---------------------------------------------------------------------------------------------


def embedded_scenes(split: str, size: int, transform: v2.Transform, seed: int = 0, count: int | None = None) -> Scenes:
    """The drawn pictures: 5,000 to train on, 200 to evaluate, or `count`; three shapes each, of ten kinds, later ones hiding earlier ones."""
    salt = SPLITS.index(split)
    pictures, kinds, masks = draw_scenes(count or SCENES[salt], salt, size)
    data_set = embedded_annotations(kinds, masks, SHAPES, visible=size * size // 400)
    return Scenes(pictures, data_set, transform, True, seed)


def folder_scenes(annotations: str, directory: str, transform: v2.Transform, seed: int = 0) -> tuple[Scenes, list[str]]:
    """Pictures with annotations in COCO's format, and lines about what was left out; UserError if there are none."""
    data_set, lines = read_annotations(annotations)
    if not Path(directory).is_dir():
        raise UserError(f"{directory}, the folder of the images of {annotations}, does not exist")
    items = [str(Path(directory) / row["file_name"]) for row in data_set["images"]]
    scenes = Scenes(items, data_set, transform, has_masks(data_set), seed)
    tried = range(0, len(items), -(-len(items) // 8))
    if all(scenes.open(index) is None for index in tried):
        raise UserError(f"cannot read the image {items[0]}, nor any other tried of {annotations}; is {directory} their folder?")
    if not scenes.masks and any(row.get("segmentation") for row in data_set["annotations"]):
        without = sum(not row.get("segmentation") for row in data_set["annotations"])
        lines.append(f"{annotations}: {without} objects have no mask; so boxes alone are learned")
    return scenes, lines


def pictures_alone(paths: list[str], classes: list[str], category_ids: list[int]) -> Scenes:
    """Pictures of which nothing is known, to search for these classes."""
    images = [{"id": index, "file_name": path, "width": 1, "height": 1} for index, path in enumerate(paths)]
    categories = [{"id": number, "name": name} for name, number in zip(classes, category_ids)]
    return Scenes(paths, {"images": images, "annotations": [], "categories": categories}, None, False)


# --- transforms ---------------------------------------------------------------------------------------------------------


class CleanTargets(v2.Transform):
    """Boxes as tight as what is left of their masks, without objects that a crop left nothing of."""

    def __init__(self, min_size: float = 1.0):
        super().__init__()
        self.sanitize = v2.SanitizeBoundingBoxes(min_size=min_size)

    def forward(self, picture: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
        """picture (3, H, W); target as of `Scenes`."""
        if "masks" in target:
            seen = target["masks"].as_subclass(torch.Tensor).bool().flatten(1).any(dim=1)
            target = {name: tv_tensors.wrap(value[seen], like=value) for name, value in target.items()}
            if seen.any():
                boxes = masks_to_boxes(target["masks"])
                boxes[:, 2:] += 1  # of the last pixel; a box ends behind it
                target["boxes"] = tv_tensors.wrap(boxes, like=target["boxes"])
        return self.sanitize(picture, target)


def augmentation(
    name: str, size: int, test_size: tuple[int, int], scale: tuple[float, float], color_jitter: float | None
) -> v2.Transform:
    """What is done to a training picture and its objects; the arguments are detect.py's flags.

    "jitter" is large-scale jitter (Simple Copy-Paste, arXiv 2012.07177): the picture is resized by a factor drawn from `scale`,
    relative to a square of `size`, and cropped or padded to that square. "multiscale" draws the short side between .6 and 1 of
    the test's; "none" resizes as for the test.
    """
    short, long = test_size
    steps = {
        "jitter": [
            v2.ScaleJitter((size, size), scale_range=scale),
            v2.RandomCrop((size, size), pad_if_needed=True, fill={Image.Image: GREY, tv_tensors.Mask: 0, "others": 0}),
        ],
        "multiscale": [v2.RandomShortestSize([round(short * (0.6 + 0.05 * k)) for k in range(9)], long)],
        "none": [v2.RandomShortestSize([short], long)],
    }[name]
    steps = [*steps, v2.RandomHorizontalFlip()]
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    return v2.Compose([*steps, v2.PILToTensor(), v2.ClampBoundingBoxes(), CleanTargets()])


# --- pictures -----------------------------------------------------------------------------------------------------------


def draw_detections(path: Path, scenes: Scenes, found: dict[int, list[dict]], count: int = 8, least: float = 0.3) -> None:
    """Ground truth beside what was found with a score of at least `least`, of up to `count` pictures spread over the set."""
    indices, side = sorted(found), 512
    indices = [indices[k * len(indices) // count] for k in range(count)] if len(indices) > count else indices
    names, columns = dict(zip(scenes.category_ids, scenes.classes)), {"ground truth": [], "found": []}
    for index in indices:
        picture, truth = scenes.open(index), scenes.annotations.of_image[scenes.data_set["images"][index]["id"]]
        for title, rows in (("ground truth", truth), ("found", [row for row in found[index] if row["score"] >= least])):
            columns[title].append(draw_objects(picture, rows, names, square=side))
    columns = {title: torch.stack(pictures) / 255 for title, pictures in columns.items()}
    plot_panels(path, columns, f"found: with a score of at least {least:g}", inches=3)
