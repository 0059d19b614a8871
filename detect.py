"""Detect and segment objects: Mask R-CNN on a ConvNeXt encoder (paper Sec. 5 and App. A.3).

    python detect.py                                                     # drawn images, minutes on a laptop
    python detect.py --data_path DIR --finetune runs/pretrain/encoder.pth
    python detect.py --eval --resume runs/detect/checkpoint-best.pth
    python detect.py --predict street.jpg holiday/ --resume runs/detect/checkpoint-best.pth

DIR holds annotations/instances_{train,val}2017.json, train2017/ and val2017/, as COCO does. Writes to --output_dir:
checkpoints, log.jsonl, config.json, detections.json, scores.json, detections.png and scores.png.

Shapes: N images, C channels, H x W pixels; n boxes or objects of an image.
"""

import argparse
import math
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils._pytree import tree_map
from torchvision import ops, tv_tensors
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes
from torchvision.transforms import v2

import weights
from data import GREY, STATISTICS, find_images, open_rgb
from fast import speed_up
from model import MODELS, ConvNeXt, LayerNorm
from plumbing import cli, coco, dist, tasks
from plumbing.files import UserError, make_directory, save_json
from plumbing.loading import Samples, divided, make_loader, mix_seed, progress
from plumbing.optim import learning_rate
from plumbing.plots import plot_evaluations, plot_panels
from plumbing.recipes import COCO
from plumbing.run import Run
from plumbing.shapes import SCENES, SHAPES, SPLITS, draw_scenes

# --- the network ------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """The encoder's four stages, each normalised, and a feature pyramid of five levels over them.

    Images (N, 3, H, W) -> maps (N, dim, H / s, W / s), "0" to "3" at the stages' strides s, "pool" at twice the last.
    """

    def __init__(self, encoder: ConvNeXt, dim: int, norm_layer: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.encoder, self.out_channels = encoder, dim
        self.norms = nn.ModuleList([LayerNorm(width, channels_first=True) for width in encoder.dims])
        top = ops.feature_pyramid_network.LastLevelMaxPool()
        self.fpn = ops.FeaturePyramidNetwork(list(encoder.dims), dim, top, norm_layer)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        stages = self.encoder.forward_stages(images)  # (N, 3, H, W) -> four (N, C_i, H / s_i, W / s_i)
        return self.fpn({str(i): norm(stage) for i, (norm, stage) in enumerate(zip(self.norms, stages))})


class MaskRCNN(detection.MaskRCNN):
    """torchvision's Mask R-CNN (arXiv 1703.06870) on a ConvNeXt encoder, in its calling convention.

    In training, (images, targets) -> a dictionary of losses; images are not resized. In evaluation, images -> a
    dictionary of boxes, labels, scores and masks for each, at the image's size; `min_size` and `max_size` set the size
    inside the network. Images are (3, H, W), in [0, 1]; labels 1 .. num_classes.

    Args:
        encoder: with `num_classes=0`.
        fpn_dim, box_dim, mask_dim: widths of the pyramid, the box head's two layers and the mask head's four.
        anchor_scale: side of the anchors, in strides of their level; strides scale with the encoder's stem.
        masks: predict masks; without them it is a Faster R-CNN.
        group_norm: GroupNorm in pyramid and mask head, which learn much sooner from random weights (arXiv 1811.08883).
        nms: "hard", or "soft", which lowers the scores of overlapping boxes (the paper's).
        published_heads: aligned RoIAlign, unrounded anchors and initial weights as in the published detector.
    """

    def __init__(
        self, encoder: ConvNeXt, num_classes: int, fpn_dim: int = 256, box_dim: int = 1024, mask_dim: int = 256,
        anchor_scale: float = 8, masks: bool = True, group_norm: bool = False, nms: str = "hard",
        published_heads: bool = False, **settings,
    ):  # fmt: skip
        # Eight groups, or the largest divisor of eight that divides the width.
        norm_layer = (lambda width: nn.GroupNorm(math.gcd(8, width), width)) if group_norm else None
        strides = [encoder.stem_stride * 2**level for level in range(5)]
        anchors, pool = (FineAnchors, AlignedRoIAlign) if published_heads else (AnchorGenerator, ops.MultiScaleRoIAlign)
        # The level from which a region is pooled follows the anchors: with anchors of 8 strides, regions span 14 to 28
        # cells there, as published. torchvision samples a bin twice per side; for smaller anchors once is as dense.
        sampling = 0 if published_heads else max(1, round(anchor_scale / 4))
        pool = partial(pool, ["0", "1", "2", "3"], sampling_ratio=sampling, canonical_scale=28 * anchor_scale)
        super().__init__(
            Pyramid(encoder, fpn_dim, norm_layer),
            rpn_anchor_generator=anchors(tuple((anchor_scale * s,) for s in strides), ((0.5, 1.0, 2.0),) * 5),
            box_roi_pool=pool(7),
            box_head=detection.faster_rcnn.TwoMLPHead(7 * 7 * fpn_dim, box_dim),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(box_dim, num_classes + 1),
            mask_roi_pool=pool(14),
            mask_head=detection.mask_rcnn.MaskRCNNHeads(fpn_dim, (mask_dim,) * 4, 1, norm_layer),
            mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(mask_dim, mask_dim, num_classes + 1),
            size_divisible=encoder.patch_size, _skip_resize=True, **settings,
        )  # fmt: skip
        heads = self.roi_heads
        if not masks:
            heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = None
        if nms == "soft":
            heads.__class__ = SoftNMSHeads  # torchvision builds its heads itself
            heads.nms_thresh, heads.detections_per_img, heads.limit = 1.0, 10**6, heads.detections_per_img
        if published_heads:
            for block in (*self.backbone.fpn.inner_blocks, *self.backbone.fpn.layer_blocks):
                nn.init.xavier_uniform_(block[0].weight)
        for head in filter(None, (self.rpn.head, heads.box_predictor, heads.mask_predictor)):
            # Boxes need more than half precision.
            head.register_forward_hook(lambda head, inputs, output: tree_map(torch.Tensor.float, output))


class SoftNMSHeads(RoIHeads):
    """Heads that apply soft-NMS to their detections; torchvision's NMS lets everything pass, in order of score."""

    def postprocess_detections(self, *args) -> tuple[list, list, list]:
        """As torchvision's: boxes, scores and labels of each image."""
        kept = []
        for boxes, scores, labels in zip(*super().postprocess_detections(*args)):
            chosen, scores = soft_nms(boxes, scores, labels, self.limit)
            kept.append((boxes[chosen], scores, labels[chosen]))
        return tuple(map(list, zip(*kept)))


def soft_nms(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, limit: int) -> tuple:
    """Apply linear soft-NMS (arXiv 1704.04503): overlapping a better box of its class scales a box's score by 1 - IoU.

    boxes (n, 4), scores and labels (n,) -> indices (m,) of at most `limit` boxes, best first, and new scores (m,).
    Only an IoU above .5 counts; boxes whose score falls below .001 are dropped.
    """
    device, iou = boxes.device, (ops.box_iou(boxes, boxes) * (labels[:, None] == labels)).cpu()  # (n, n)
    left, chosen, kept = scores.cpu().clone(), [], []
    while len(chosen) < min(limit, len(boxes)):
        best = int(left.argmax())
        if left[best] < 1e-3:
            break
        chosen.append(best)
        kept.append(float(left[best]))
        left[best] = 0
        left = torch.where(iou[best] > 0.5, left * (1 - iou[best]), left)
    return torch.tensor(chosen, dtype=torch.int64, device=device), torch.tensor(kept, dtype=scores.dtype, device=device)


class FineAnchors(AnchorGenerator):
    """Anchors whose sides are not rounded to pixels, and whose spacing doubles from level to level.

    torchvision divides the image's side by the map's: 61 instead of 64 for the fifth map (13 cells) of 800 pixels.
    """

    def grid_anchors(self, grid_sizes: list, strides: list) -> list[torch.Tensor]:
        """Map sizes and spacings -> each map's anchors (cells x anchors, 4)."""
        doubled = [[side * 2**level for side in strides[0]] for level in range(len(strides))]
        return super().grid_anchors(grid_sizes, doubled)

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu") -> torch.Tensor:
        """Anchors of these sizes and ratios (height / width), around the origin: (sizes x ratios, 4)."""
        sizes = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in aspect_ratios for size in scales]
        corners = torch.tensor(sizes, dtype=dtype, device=device) / 2  # (sizes x ratios, 2): x and y
        return torch.cat([-corners, corners], dim=1)


class AlignedRoIAlign(ops.MultiScaleRoIAlign):
    """RoIAlign whose samples lie at the pixels' centres, one per cell of a bin."""

    def forward(self, x: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list) -> torch.Tensor:
        """Maps (N, C, H_i, W_i) and boxes (n_k, 4) of each image -> (sum of n_k, C, size, size)."""
        maps, height = [x[name] for name in self.featmap_names], max(shape[0] for shape in image_shapes)
        scales = [2.0 ** round(math.log2(features.shape[2] / height)) for features in maps]
        rois = torch.cat([nn.functional.pad(rows, (1, 0), value=k) for k, rows in enumerate(boxes)])  # (sum of n_k, 5)
        side = (rois[:, 3:] - rois[:, 1:3]).prod(dim=1).sqrt()
        # With a canonical scale of 224, boxes of up to 28 cells are read from the finest map, up to 56 from the next.
        levels = (side * scales[0] * 16 / self.canonical_scale + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, (features, scale) in enumerate(zip(maps, scales)):
            chosen = (levels == level).nonzero()[:, 0]
            regions = ops.roi_align(features, rois[chosen], self.output_size, scale, self.sampling_ratio, aligned=True)
            pooled = pooled.index_put((chosen,), regions.to(pooled.dtype))
        return pooled


# --- data -------------------------------------------------------------------------------------------------------------


class Scenes(Samples):
    """Images of different sizes, with boxes, labels and perhaps masks; batches are lists.

    A sample is a uint8 image (3, H, W) and its target: boxes (n, 4), labels (n,) and, with masks, masks (n, H, W).

    `items` are file paths, or a uint8 array (N, H, W, 3); `data_set` has their annotations, in COCO's format and in the
    same order. `transform` takes image and target together; without it, images come unchanged and without targets.
    """

    def __init__(self, items, data_set: dict, transform=None, seed: int = 0, image_max: float | None = None):
        super().__init__(items, seed)
        self.data_set, self.transform, self.image_max = data_set, transform, image_max
        objects = {row["id"]: [] for row in data_set["images"]}
        for row in data_set["annotations"]:
            if not row["iscrowd"] and row["image_id"] in objects:  # a crowd is a region of many objects
                objects[row["image_id"]].append(row)
        self.objects = list(objects.values())
        self.masks = all("segmentation" in row for rows in self.objects for row in rows)
        self.names = {row["id"]: row["name"] for row in data_set["categories"]}
        self.category_ids, self.classes = [*self.names], [*self.names.values()]  # label 1 first

    def read(self, index: int) -> tuple[Image.Image, dict]:
        """Read an image and, with a transform, its target; raises nearly anything for a damaged file."""
        item, rows = self.items[index], self.objects[index]
        image = Image.fromarray(item) if isinstance(item, np.ndarray) else open_rgb(item, image_max=self.image_max)
        target = coco.to_target(rows, self.category_ids, image.size, self.masks) if self.transform else {}
        return image, target

    def augment(self, sample: tuple[Image.Image, dict], index: int) -> tuple[torch.Tensor, dict]:
        """Transform image and target; shrink boxes to their masks, and drop objects that a crop removed."""
        image, target = sample
        if not self.transform:
            return v2.functional.pil_to_tensor(image), target
        image, target = self.transform(*pad_strip(image, target))
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        visible = target["masks"].bool().flatten(1).any(dim=1) if self.masks else (sides >= 1).all(dim=1)
        target = {name: value.as_subclass(torch.Tensor)[visible] for name, value in target.items()}
        if self.masks:  # masks_to_boxes gives a box's last pixel, not the border after it
            target["boxes"] = ops.masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
        return image, target

    def collate(self, samples: list[tuple]) -> tuple[list, list]:
        """Samples -> lists of images and targets."""
        return tuple(map(list, zip(*samples)))

    def on_device(self, images: list, targets: list, device: torch.device) -> tuple[list, list]:
        """Loaded images and targets -> float images in [0, 1], and targets, on `device`."""
        images, targets = tree_map(lambda tensor: tensor.to(device, non_blocking=True), (images, targets))
        return [image.float() / 255 for image in images], targets


def pad_strip(image, *target: dict):
    """Pad a strip, with its target, to a sixth of its length, so that resizing leaves some of its width."""
    height, width = v2.functional.get_size(image)
    least = max(height, width) // 6
    return v2.Pad([0, 0, max(0, least - width), max(0, least - height)])(image, *target)


def load_scenes(args: argparse.Namespace, split: str, classes: list[str] | None = None) -> Scenes:
    """Load the "train" or "val" images; UserError without objects, or if their classes are not `classes`, in order."""
    if args.data_set == "embedded":
        salt, size = SPLITS.index(split), args.input_size
        items, kinds, masks = draw_scenes(args.embedded_images[salt], salt, size)
        data_set = coco.embedded_annotations(kinds, masks, SHAPES, visible=size * size // 400)  # pixels of an object
    else:
        data_set, items = coco.read_annotations(*find_data(args, split), args.masks)
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(mix_seed("holdout"))).tolist()
        held = round((args.holdout or 0) * len(items))
        chosen = sorted(order[:held] if split == "val" and args.holdout else order[held:])
        chosen = chosen[: args.val_limit if split == "val" else None]
        items, data_set["images"] = ([rows[k] for k in chosen] for rows in (items, data_set["images"]))
    transform = augmentation(args) if split == "train" else None
    scenes = Scenes(items, data_set, transform, args.seed, args.image_max)
    counts = Counter(scenes.names[row["category_id"]] for rows in scenes.objects for row in rows)
    largest = ", ".join(f"{count:,} {name}" for name, count in counts.most_common(12))
    dist.say(f"{split}: {len(items):,} images, {counts.total():,} objects of {len(scenes.names)} classes: {largest}")
    if not counts.total():
        raise UserError(f"these {len(items)} images show no object; use more (--val_limit, --holdout)")
    if classes not in (None, scenes.classes):
        before, now = (f"{', '.join(part[:5])} ({len(part)} in all)" for part in (classes, scenes.classes))
        raise UserError(f"the training data's classes are {before}, the validation data's {now}; they must agree")
    return scenes


def find_data(args: argparse.Namespace, split: str) -> tuple[Path, list[Path]]:
    """Find a split's annotations, and folders that may hold its images, in COCO's, Roboflow's or CVAT's layout."""
    root, split = Path(args.data_path or "."), "train" if args.holdout else split
    names = ("train",) if split == "train" else ("val", "valid", "validation")
    layouts = "annotations/instances_{}2017.json", "annotations/instances_{}.json", "{}/_annotations.coco.json"
    files = [root / layout.format(name) for layout in layouts for name in names]
    files += [root / "annotations/instances_default.json"] if args.holdout else []
    file = Path(getattr(args, f"{split}_annotations") or next(filter(os.path.isfile, files), files[0]))
    layouts = "{}2017", "images/{}2017", "images/{}", "{}"
    folders = [root / layout.format(name) for layout in layouts for name in names]
    folders += [root / "images/default", root / "images", file.parent, root]
    images = getattr(args, f"{split}_images")
    return file, [Path(images)] if images else folders


def augmentation(args: argparse.Namespace) -> v2.Transform:
    """Make the transform of a training image and its objects, as the flags say.

    "jitter" is large-scale jitter (Simple Copy-Paste, arXiv 2012.07177): the image is resized by a factor from --jitter
    relative to a square of --input_size, and cropped or padded to that square. "none" resizes as for evaluation.
    """
    size, (short, long) = (args.input_size, args.input_size), args.test_size
    fill = {Image.Image: GREY, tv_tensors.Mask: 0, "others": 0}
    steps = {
        "jitter": [v2.ScaleJitter(size, scale_range=args.jitter), v2.RandomCrop(size, pad_if_needed=True, fill=fill)],
        "none": [v2.RandomShortestSize([short], long)],
    }[args.augmentation]
    colours = [v2.ColorJitter(*[args.color_jitter] * 3)] if args.color_jitter else []
    return v2.Compose([*steps, v2.RandomHorizontalFlip(), *colours, v2.PILToTensor(), v2.ClampBoundingBoxes()])


# --- command line -----------------------------------------------------------------------------------------------------

DEFAULTS = {
    "folder": dict(lr=1e-4),
    "folder on a CPU": dict(
        input_size=160, jitter=(0.5, 1.5), fpn_dim=64, box_dim=256, mask_dim=64, regions=64,
        proposals=(300, 100), group_norm=True, lr=1e-3, schedule="cosine", clip_grad=1.0,
    ),
    "embedded": dict(
        model="convnextv2_yocto", stem_stride=2, input_size=80, test_size=(80, 80), augmentation="none", anchor_scale=4,
        fpn_dim=32, box_dim=256, mask_dim=16, regions=32, group_norm=True, proposals=(100, 100), batch_size=4, epochs=3,
        schedule="cosine", lr=1.5e-3,
    ),
}  # fmt: skip
NETWORK = (
    "model", "stem_stride", "mlp_norm", "anchor_scale", "fpn_dim", "box_dim", "mask_dim", "masks", "group_norm",
    "published_heads", "statistics",
)  # fmt: skip
EVALUATION = ("input_size", "test_size", "nms", "proposals", "image_max")
PLACES = ("data_path", "holdout", "train_annotations", "train_images", "val_annotations", "val_images")
CURVES = {f"{kind} {name}": f"val_{kind}_{name}" for kind in ("box", "mask") for name in ("AP", "AP50")}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; defaults come from the recipe, the weights' own settings, then the data set."""
    parser, width = cli.Parser(DEFAULTS, description=__doc__.split("\n\n")[0]), cli.number(int, 1, 8192)
    tasks.add_task_flags(parser, "search", ["coco"])
    add = cli.add_model_flags(parser, MODELS, "weights of an encoder, classifier or detector, or a run's folder")
    add("--fpn_dim", type=width, default=256, help="channels of the feature pyramid")
    add("--box_dim", type=width, default=1024, help="width of the box head")
    add("--mask_dim", type=width, default=256, help="channels of the mask head")
    add("--anchor_scale", type=cli.positive, default=8.0, help="side of the anchors, in strides of their level")
    add("--masks", action=cli.BoolFlag, help="predict masks too (if all training objects have them)")
    add("--group_norm", action=cli.BoolFlag, default=False, help="GroupNorm in pyramid and mask head: learns sooner")
    add("--regions", type=cli.count, default=512, help="regions per image to learn from, a quarter of them objects")
    add("--proposals", type=cli.count, default=(2000, 1000), nargs=2, help="kept per image in training and evaluation")
    add("--nms", choices=("hard", "soft"), default="hard", help="remove overlapping boxes, or lower their scores")
    add("--published_heads", action=cli.BoolFlag, default=False, help="the published detector's pooling and anchors")

    add = cli.add_data_flags(parser, ("embedded", "folder"), "folder in COCO's layout", SCENES, 1024)
    add("--test_size", type=width, nargs=2, help="evaluation: short side and longest long side (25/32, 1.3 x input)")
    for split in SPLITS:
        add(f"--{split}_annotations", metavar="FILE", help=f"instead of DIR/annotations/instances_{split}2017.json")
        add(f"--{split}_images", metavar="DIR", help=f"instead of DIR/{split}2017")
    add("--holdout", type=cli.fraction, help="hold out this fraction of the training images")
    add("--val_limit", type=cli.count, help="evaluate on the first N images")
    add("--score_threshold", type=cli.fraction, help="lowest score of a detection (0.05; 0.5 to predict)")
    add("--augmentation", choices=("jitter", "none"), default="jitter", help="of sizes; flips are always on")
    add("--jitter", type=cli.positive, default=(0.1, 2.0), nargs=2, help="range of jittered sizes over the input size")
    add("--color_jitter", type=cli.positive, help="also jitter brightness, contrast and saturation")

    add = cli.add_optimisation_flags(parser, epochs=None, blr=8e-4, min_lr=0.0, warmup=None)
    parser.set_defaults(batch_size=2)
    add("--warmup_updates", type=cli.number(int, 0), help="linear warm-up (1000, or 10% of short runs)")
    add("--schedule", choices=("steps", "cosine"), default="steps", help="lr / 10 at --steps, or a cosine to --min_lr")
    add("--steps", type=cli.nonnegative, nargs="+", help="epochs at which it drops (3/4 and 11/12 of all)")
    tasks.add_transfer_flags(add)
    cli.add_run_flags(parser, "runs/detect", compile=False)

    first = parser.parse_args(argv)
    if not first.recipe and (first.device == "cpu" or not (first.device or torch.cuda.is_available())):
        parser.by_data = DEFAULTS | {"folder": DEFAULTS["folder on a CPU"]}
    args = tasks.settle(parser, argv, weights.flags_of, NETWORK, EVALUATION, PLACES, {"coco": COCO})
    args.test_size = list(args.test_size or (round(args.input_size * 25 / 32), round(args.input_size * 1.3)))
    if args.score_threshold is None:
        args.score_threshold = 0.5 if args.predict else 0.05
    return args


# --- training ---------------------------------------------------------------------------------------------------------


def make_detector(args: argparse.Namespace, num_classes: int) -> MaskRCNN:
    """Build the network that the flags describe."""
    (mean, std), (in_training, in_evaluation) = STATISTICS[args.statistics], args.proposals
    return MaskRCNN(
        weights.make_encoder(args), num_classes, args.fpn_dim, args.box_dim, args.mask_dim, args.anchor_scale,
        args.masks, args.group_norm, args.nms, args.published_heads,
        min_size=args.test_size[0], max_size=args.test_size[1], image_mean=mean, image_std=std,
        rpn_pre_nms_top_n_train=in_training, rpn_post_nms_top_n_train=in_training,
        rpn_pre_nms_top_n_test=in_evaluation, rpn_post_nms_top_n_test=in_evaluation,
        box_batch_size_per_image=args.regions, box_score_thresh=args.score_threshold,
    )  # fmt: skip


def check_memory(args: argparse.Namespace, num_classes: int, images: int, device: torch.device) -> None:
    """Raise UserError if an update of this many images needs more memory than there is."""
    sides = [args.input_size] * 2 if args.augmentation == "jitter" else args.test_size

    def step() -> None:
        heads, regions = detector.roi_heads, images * args.regions
        detector.rpn.head([*detector.backbone(torch.empty(images, 3, *sides)).values()])
        heads.box_predictor(heads.box_head(torch.empty(regions, args.fpn_dim, 7, 7)))
        if args.masks:
            heads.mask_predictor(heads.mask_head(torch.empty(regions // 4, args.fpn_dim, 14, 14)))

    with torch.device("meta"):  # shapes only
        detector = make_detector(args, num_classes).train()
        tasks.check_memory(detector, step, args.amp, device, "lower --batch_size, --input_size, --regions or --fpn_dim")


@record  # torchrun then reports the error of the process that failed first
def main(args: argparse.Namespace) -> None:
    """Train, evaluate or predict as `args` (from `get_args`) say."""
    device = dist.setup(args.device, args.deterministic)
    (predict if args.predict else evaluate_checkpoint if args.eval else train)(args, device)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train a detector, evaluating after every epoch."""
    scenes = load_scenes(args, "train")
    val = None if args.disable_eval else load_scenes(args, "val", scenes.classes)
    if args.masks and not scenes.masks:
        raise UserError("--masks, but not all objects of the training data have one; try --no-masks")
    args.masks = scenes.masks = scenes.masks if args.masks is None else args.masks
    if args.epochs is None:
        args.epochs = max(12, math.ceil(1000 * args.batch_size * args.update_freq * dist.world_size() / len(scenes)))
        args.eval_freq = max(args.eval_freq, args.epochs // 4)
    check_memory(args, len(scenes.classes), min(args.batch_size, len(scenes)), device)
    torch.manual_seed(args.seed)
    detector = make_detector(args, len(scenes.classes))
    encoder = detector.backbone.encoder
    report = weights.load_parts(detector, encoder, args.finetune, "detector") if args.finetune else ["random weights"]
    dist.to_device(speed_up(detector), device)
    ema = tasks.averaged(detector, args.model_ema_decay) if args.model_ema else None
    groups = tasks.layer_groups(detector, args.weight_decay, args.layer_decay, "group", encoder.depths)
    optimizer = tasks.make_optimizer(args, groups)

    kind = "masks" if args.masks else "boxes alone, since not all training objects have masks or --no-masks"
    report.append(f"{args.model} with {kind}: {sum(p.numel() for p in detector.parameters()):,} parameters")
    dist.say("\n".join(report))
    origin = dict(schedule=make_schedule, classes=scenes.classes, category_ids=scenes.category_ids)
    score, write = partial(evaluate, scenes=val, args=args, device=device), partial(write_scores, scenes=val)
    with Run(args, scenes, device, detector.train(), optimizer, "detect.py", ema, **origin) as run:
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                with run.autocast:
                    losses = run.network(batch.images, batch.targets)
                if run.backward(losses):
                    run.update()

            if val and run.evaluation_due(epoch):
                tasks.evaluate(run, epoch, score, "box_AP", describe, write)
                run.write("scores.png", plot_evaluations, run.records, CURVES, "average precision", "Validation")
            if run.save_due(epoch):
                run.save(epoch + 1)
    best = f"checkpoint-best.pth (box AP {run.best:.3f}), scores.json, detections.json, detections.png"
    run.finish(f"{best}, scores.png, log.jsonl, config.json" if val else "checkpoints, log.jsonl, config.json")


def make_schedule(run: Run) -> Callable[[int], float]:
    """Map updates to learning rates: linear warm-up from a thousandth, then steps or half a cosine."""
    args = run.args
    warmup = min(1000, run.total // 10) if args.warmup_updates is None else args.warmup_updates
    steps = args.steps or [args.epochs * 3 / 4, args.epochs * 11 / 12]

    def schedule(update: int) -> float:
        lr = learning_rate(max(update - warmup, 0), run.peak_lr, args.min_lr, 0, run.total - warmup)
        if args.schedule == "steps":
            lr = run.peak_lr * 0.1 ** sum(update >= step * run.updates for step in steps)
        return lr * min(1, 0.001 + 0.999 * update / warmup) if warmup else lr

    return schedule


# --- evaluation and prediction ----------------------------------------------------------------------------------------


@torch.no_grad()
def detect(detector: nn.Module, scenes: Scenes, args: argparse.Namespace, device: torch.device) -> dict[int, list]:
    """Detect objects in every readable image: image index -> results in COCO's format.

    Images go through the network one by one, because GRN pools over the padding that unequal sizes need in a batch.
    """
    indices, training = range(dist.rank(), len(scenes), dist.world_size()), detector.training
    loader, detections = make_loader(scenes, divided(indices, 1), args.num_workers), {}
    detector.eval()
    for index, (images, targets) in zip(indices, progress(loader)):
        if not scenes.unreadable[index]:
            (image,), _ = scenes.on_device(images, targets, device)
            with dist.autocast(args.amp, device):
                output = search(detector, image)
            number = scenes.data_set["images"][index]["id"]
            detections[index] = coco.as_results(output, number, scenes.category_ids)
    detector.train(training)
    detections = {index: rows for part in dist.gather(detections) for index, rows in part.items()}
    if not detections:
        raise UserError(f"none of the {len(scenes)} images can be read; check the files named above")
    return detections


def search(detector: MaskRCNN, image: torch.Tensor) -> dict:
    """Run the detector on an image (3, H, W); to save memory, masks (1, H, W) come one by one from a generator."""
    size, padded = image.shape[1:], pad_strip(image)
    images, _ = detector.transform([padded])
    maps = detector.backbone(images.tensors)
    (output,), _ = detector.roi_heads(maps, detector.rpn(images, maps)[0], images.image_sizes)
    boxes = resize_boxes(output["boxes"], images.image_sizes[0], padded.shape[1:])
    output["boxes"] = boxes = ops.clip_boxes_to_image(boxes, size)
    if "masks" in output:
        pairs = zip(output["masks"], boxes)  # (1, 28, 28) inside its box, (4,)
        output["masks"] = (paste_masks_in_image(mask[None], box[None], size)[0] for mask, box in pairs)
    return output


def evaluate(detector: nn.Module, scenes: Scenes, args: argparse.Namespace, device: torch.device) -> tuple[dict, tuple]:
    """Return COCO's main numbers by name, such as "box_AP", then all of them (`coco.evaluate`) with the detections."""
    detections = detect(detector, scenes, args, device)
    kinds = ("box", "mask") if args.masks and scenes.masks else ("box",)
    scores = dist.gather(coco.evaluate(scenes.data_set, detections, kinds) if dist.rank() == 0 else None)[0]
    chief = {f"{kind}_{name}": scores[kind][name] for kind in kinds for name in ("AP", "AP50", "AP75")}
    return chief, (scores, detections)


def describe(chief: dict[str, float | None]) -> str:
    """Put the main numbers, except AP75, into words."""
    words = {name: "none" if value is None else f"{value:.3f}" for name, value in chief.items() if name[-2:] != "75"}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in words.items())


def load_detector(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, MaskRCNN], list[str], list[int]]:
    """Load the detectors of --resume, "model" and perhaps "model_ema"; class names; category ids."""
    content = weights.read_content(args.resume)
    if not {"classes", "category_ids"} <= content.keys():
        raise UserError(f"{args.resume} holds no detector of detect.py; train one: detect.py --finetune {args.resume}")
    make = partial(make_detector, args, len(content["classes"]))
    return weights.load_saved(content, make, args.resume, device), content["classes"], content["category_ids"]


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device) -> None:
    """Evaluate the --resume checkpoint and its moving average on the validation images."""
    detectors, classes, _ = load_detector(args, device)
    scenes = load_scenes(args, "val", classes)
    results = {name: evaluate(detector, scenes, args, device) for name, detector in detectors.items()}
    where = f"{args.val_annotations or args.data_path or args.data_set}, short side {args.test_size[0]} px"
    for name, (chief, (scores, _)) in results.items():
        dist.say(f"{name}: {describe(chief)} on {scores['images']:,} images of {where}")
    if dist.rank() == 0:
        better = max(results, key=lambda name: results[name][0]["box_AP"] or 0)
        write_scores(Path(args.output_dir), results[better][1], scenes)
        print(f"in {args.output_dir}: scores.json, detections.json and detections.png, of {better}")


def write_scores(directory: Path, results: tuple[dict, dict[int, list[dict]]], scenes: Scenes) -> None:
    """Write scores.json, detections.json in COCO's results format, and detections.png of eight images."""
    make_directory(directory)
    scores, detections = results
    save_json(directory / "scores.json", scores)
    save_json(directory / "detections.json", [row for index in sorted(detections) for row in detections[index]])
    shown = sorted(detections)[:: -(-len(detections) // 8)]
    likely = {index: [row for row in detections[index] if row["score"] >= 0.5] for index in shown}

    def draw(objects: list | dict) -> torch.Tensor:
        pictures = [coco.draw_objects(scenes.read(index)[0], objects[index], scenes.names, 512) for index in shown]
        squares = [ImageOps.pad(picture, (512, 512), color="white", centering=(0, 0)) for picture in pictures]
        return torch.stack([v2.functional.pil_to_tensor(square) / 255 for square in squares])  # (8, 3, 512, 512)

    columns = {"ground truth": draw(scenes.objects), "detections": draw(likely)}
    plot_panels(directory / "detections.png", columns, "detections: with a score of at least 0.5", inches=3)


def predict(args: argparse.Namespace, device: torch.device) -> None:
    """Draw the detections in every image, and write them to predictions.json."""
    detectors, classes, category_ids = load_detector(args, device)
    paths = find_images(args.predict, image_max=args.image_max)
    folder, files = make_directory(Path(args.output_dir, "predictions")), []
    data_set = {"images": [{"id": k} for k in range(len(paths))], "annotations": []}
    data_set["categories"] = [{"id": number, "name": name} for number, name in zip(category_ids, classes)]
    scenes = Scenes(paths, data_set, image_max=args.image_max)
    detections = detect(detectors.get("model_ema", detectors["model"]), scenes, args, device)
    if dist.rank() > 0:
        return
    for index, rows in sorted(detections.items()):
        picture = folder / f"{index:05d}-{Path(paths[index]).stem}.png"
        coco.draw_objects(scenes.read(index)[0], rows, scenes.names).save(picture)
        keys = {"class": "category_id", "score": "score", "box": "bbox", "mask": "segmentation"}
        objects = [{key: row[theirs] for key, theirs in keys.items() if theirs in row} for row in rows]
        objects = [item | {"class": scenes.names[item["class"]]} for item in objects]
        files.append({"file": paths[index], "picture": str(picture), "objects": objects})
        counts = Counter(item["class"] for item in objects).most_common()
        print(f"{paths[index]}: {', '.join(f'{count} {name}' for name, count in counts) or 'nothing'}")
    save_json(Path(args.output_dir, "predictions.json"), files)
    print(f"in {args.output_dir}: predictions.json (boxes as left, top, width, height), predictions/")


if __name__ == "__main__":
    main(get_args())
