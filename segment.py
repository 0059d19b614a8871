"""Segment images, a class for each pixel: UPerNet on a ConvNeXt encoder (paper Sec. 5 and App. A.4).

    python segment.py                                                     # drawn images, minutes on a laptop
    python segment.py --data_path DIR --finetune runs/finetune/checkpoint-best.pth
    python segment.py --eval --resume runs/segment/checkpoint-best.pth --test_scales 0.75 1 1.25 --flip
    python segment.py --predict street.jpg holiday/ --resume runs/segment/checkpoint-best.pth

DIR holds images/{training,validation}/ and annotations/{training,validation}/, as ADE20K does. Writes to --output_dir:
checkpoints, log.jsonl, config.json, scores.json, segmentation.png and scores.png.

Shapes: N images, K classes, C channels, H x W pixels.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.nn.functional import all_reduce
from torchvision import tv_tensors
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

import weights
from data import GREY, STATISTICS, Images, find_images, list_images, normalise, split_holdout
from fast import speed_up
from model import MODELS, ConvNeXt, LayerNorm, check_size
from plumbing import cli, dist, maps, tasks
from plumbing.files import UserError, make_directory, save_json, value_errors_are_the_users
from plumbing.loading import divided, make_loader, progress
from plumbing.maps import IGNORED
from plumbing.plots import plot_evaluations
from plumbing.recipes import ADE20K
from plumbing.run import Run
from plumbing.scores import segmentation_scores
from plumbing.shapes import SCENES, SHAPES, SPLITS, draw_scenes

# --- network ----------------------------------------------------------------------------------------------------------


class UPerNet(nn.Module):
    """The paper's segmentation head on the encoder's four stages (Xiao et al., arXiv 1807.10221, Fig. 4).

        stages                    pyramid pooling
        4  (C_4, H/32) -> norm -> 1, 2, 3, 6, bottleneck -------------> resize --+
        3  (C_3, H/16) -> norm -> lateral -> + resized stage 4 -> fpn -> resize -+-> fuse -> classifier -> resize
        2  (C_2, H/8)  -> norm -> lateral -> + resized stage 3 -> fpn -> resize -+
        1  (C_1, H/4)  -> norm -> lateral -> + resized stage 2 -> fpn -----------+

    In training, a second classifier on stage 3 teaches the encoder more directly (arXiv 1612.01105, Sec. 3.3).

    Args:
        encoder: with `num_classes=0`.
        num_classes: K.
        channels, aux_channels: widths of the head and of the auxiliary head.
        dropout: fraction of the channels dropped before the classifiers.
    """

    def __init__(self, encoder: ConvNeXt, num_classes: int, channels: int = 512, aux_channels: int = 256, dropout=0.1):
        super().__init__()
        *lower, top = encoder.dims
        conv = partial(Conv2dNormActivation, norm_layer=BatchNorm)  # inputs, outputs, kernel size; then ReLU
        self.encoder = encoder
        self.norms = nn.ModuleList(LayerNorm(dim, channels_first=True) for dim in encoder.dims)
        self.bins = (1, 2, 3, 6)
        self.ppm = nn.ModuleList(conv(top, channels, 1) for _ in self.bins)
        self.bottleneck = conv(top + len(self.bins) * channels, channels, 3)
        self.lateral = nn.ModuleList(conv(dim, channels, 1) for dim in lower)
        self.fpn = nn.ModuleList(conv(channels, channels, 3) for _ in lower)
        self.fuse = conv(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.auxiliary = nn.Sequential(conv(lower[-1], aux_channels, 3), nn.Conv2d(aux_channels, num_classes, 1))

    def forward(self, imgs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, H, W) -> logits (N, K, H, W); in training also the auxiliary ones. ValueError below one patch."""
        stages = self.encoder.forward_stages(imgs)  # (N, 3, H, W) -> four (N, C_i, H / s_i, W / s_i)
        *lower, top = features = [norm(stage) for norm, stage in zip(self.norms, stages)]
        pooled = [resize(conv(F.adaptive_avg_pool2d(top, n)), top) for n, conv in zip(self.bins, self.ppm)]
        levels = [self.bottleneck(torch.cat([top, *pooled], dim=1))]  # (N, C_4 + 4 C, ...) -> (N, C, H / s_4, W / s_4)
        for lateral, stage in zip(reversed(self.lateral), reversed(lower)):  # top-down; the finest level comes first
            levels.insert(0, lateral(stage) + resize(levels[0], stage))
        levels = [*(smooth(level) for smooth, level in zip(self.fpn, levels)), levels[-1]]
        levels = [resize(level, levels[0]) for level in levels]
        fused = self.fuse(torch.cat(levels, dim=1))  # (N, 4 C, H / s_1, W / s_1) -> (N, C, H / s_1, W / s_1)
        logits = resize(self.classifier(self.dropout(fused)), imgs)  # (N, C, ...) -> (N, K, H, W)
        if not self.training:
            return logits
        conv, classifier = self.auxiliary
        return logits, resize(classifier(self.dropout(conv(features[2]))), imgs)  # (N, C_3, ...) -> (N, K, H, W)


def resize(features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Resize (N, C, h, w) bilinearly to the height and width of `like`."""
    return F.interpolate(features, size=like.shape[2:], mode="bilinear", align_corners=False)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all processes, equally many in each; torch's SyncBatchNorm needs GPUs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> the same shape."""
        world_size = dist.world_size()
        if not self.training or world_size == 1:
            return super().forward(x)
        count, wide = x.numel() // x.shape[1] * world_size, x.float()
        mean = all_reduce(wide.mean(dim=(0, 2, 3))) / world_size  # (N, C, H, W) -> (C,); a differentiable reduction
        centred = wide - mean[:, None, None]
        variance = all_reduce(centred.square().mean(dim=(0, 2, 3))) / world_size
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def segmentation_losses(
    logits: torch.Tensor, auxiliary: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Compute the loss's two terms from logits (N, K, H, W) and labels (N, H, W) in 0 .. K - 1 or 255.

    Each is cross-entropy times the class's weight (K,), averaged over the pixels that count; 0 if there are none.
    """
    labels, count = labels.long(), (labels != IGNORED).sum().clamp(min=1)

    def loss(logits):
        return F.cross_entropy(logits.float(), labels, class_weights, ignore_index=IGNORED, reduction="sum") / count

    return {"loss_head": loss(logits), "loss_auxiliary": 0.4 * loss(auxiliary)}


# --- data -------------------------------------------------------------------------------------------------------------


class LabelledImages(Images):
    """Images with label maps, uint8 (3, H, W) and (H, W).

    Like `Images`, but `labels` are file paths, a uint8 array (n, H, W), or None if no pixel counts. `transform` takes
    image and label map together; without it both come unchanged. Class k is `numbers[k]` in files.
    """

    crop = None  # files are not cropped while decoding
    numbers: Sequence[int] = range(IGNORED)
    pixels: Counter  # pixels of each number; below, a map that has it; both set by `load_images`
    files: dict[int, str]

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Decode an image and its labels (H, W)."""
        image = super().read(index)
        if self.labels is None:
            return image, np.full((image.height, image.width), IGNORED, dtype=np.uint8)
        labels = self.labels[index]
        return image, labels if isinstance(labels, np.ndarray) else maps.read_labels(labels, self.numbers)

    def augment(self, sample: tuple[Image.Image, np.ndarray], index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform an image and its labels."""
        image, labels = sample[0], tv_tensors.Mask(torch.from_numpy(sample[1]))
        if self.transform:
            image, labels = self.transform(image, labels)
        return v2.functional.pil_to_tensor(image), labels.as_subclass(torch.Tensor)


def load_images(args: argparse.Namespace, split: str) -> LabelledImages:
    """Load the "train" or "val" images, with augmentation for training, and count their labels."""
    if args.data_set == "folder":
        name = "training" if split == "train" or args.holdout else args.val_split
        names = [name, *OTHER_NAMES.get(name, ()), *[""] * bool(args.holdout)]
        items, labels = list_pairs(args.data_path or ".", names)
    else:
        salt = SPLITS.index(split)
        items, kinds, masks = draw_scenes(args.embedded_images[salt], salt, args.input_size)
        labels = (masks * (kinds[:, :, None, None] + 1)).sum(axis=1, dtype=np.uint8)  # disjoint masks -> (n, S, S)
    images = LabelledImages(items, labels, None, None, STATISTICS[args.statistics], args.seed)
    if args.holdout:
        images = split_holdout(images, args.holdout)[split == "val"]
    images.transform, images.image_max = Augmentation(args) if split == "train" else None, args.image_max
    if args.data_set == "folder":
        counts = maps.count_labels([*zip(images.items, images.labels)]) if dist.rank() == 0 else None
        images.pixels, images.files = dist.gather(counts)[0]
    else:
        images.pixels, images.files = Counter(images.labels[:: -(-len(images) // 500)].ravel().tolist()), {}
    return images


def list_pairs(root: str, splits: Sequence[str]) -> tuple[list[str], list[str]]:
    """Pair images/ and annotations/ by stem, in the first of `splits` that exists; UserError if any has no partner."""
    names = []
    for kind in ("images", "annotations"):
        folder = next((path for split in splits if (path := Path(root, kind, split)).is_dir()), None)
        if not folder:
            fix = "DIR is laid out as ADE20K is (see --help); without such folders in images/ take --holdout 0.2"
            raise UserError(f"the folder {Path(root, kind, splits[0])} does not exist; {fix}")
        names.append({str(Path(path).relative_to(folder).with_suffix("")): path for path in list_images(folder)})
    images, labels = names
    if lonely := sorted(images.keys() ^ labels.keys()):
        path = (images | labels)[lonely[0]]
        raise UserError(f"{len(lonely)} images or label maps have no partner of the same name, such as {path}")
    return tuple([part[name] for name in sorted(images)] for part in (images, labels))


def listed_classes(args: argparse.Namespace) -> tuple[list[str], list[tuple]] | None:
    """Return names and colours of the data's classes; a folder's come from a file, None without one."""
    if args.data_set == "embedded":
        return ["ground", *SHAPES], [(232, 232, 232), *maps.class_colours(len(SHAPES))]
    names = () if args.nb_classes else ("classes.txt", "objectInfo150.txt")  # the latter is ADE20K's
    path = args.classes or next((path for name in names if (path := Path(args.data_path or ".", name)).is_file()), None)
    return maps.read_classes(path) if path else None


def find_classes(args: argparse.Namespace, labels: Collection[int]) -> maps.Classes:
    """Return the listed classes, or those that label maps with these labels need."""
    names, colours = listed_classes(args) or ([], [])
    labels, first, count = sorted(labels), int(args.reduce_zero_label), len(names) or args.nb_classes
    if len(labels) == 2 and labels[0] == 0 and labels[1] > 1 and not first and (count or 2) <= 2:
        dist.say(f"label maps hold only 0 and {labels[1]}: 0 is the background, {labels[1]} the one class")
        names, numbers = names if len(names) == 2 else ["background", *(names or ["object"])], labels
    else:
        if not count and (len(labels) > 100 or labels[-1] > IGNORED):
            problem = f"the label maps of {args.data_path} have {len(labels)} labels up to {labels[-1]} without names"
            raise UserError(f"{problem}: were they smoothed or compressed? Else give --classes or --nb_classes")
        count = count or max((label for label in labels if label != IGNORED), default=first - 1) + 1 - first
        names, numbers = names or [f"class {k}" for k in range(count)], range(first, first + count)
    if first and names and names[0].strip("_ ").lower() in NOTHING:
        fix = "remove it, or --reduce_zero_label, with which label 0 does not count and label 1 is the first class"
        raise UserError(f"the first class is {names[0]}; {fix}")
    return maps.Classes(names, colours if len(colours) == len(names) else maps.class_colours(len(names)), numbers)


def use_classes(images: LabelledImages, classes: maps.Classes, least: int) -> torch.Tensor:
    """Set the images' classes; count each one's pixels (K,). UserError for other labels, or if too few have pixels."""
    images.classes, images.numbers, count = classes.names, classes.numbers, len(classes.names)
    if unknown := images.pixels.keys() - {*classes.numbers, 0, IGNORED}:
        known = f"the {count} classes have {min(classes.numbers)} to {max(classes.numbers)}"
        fix = "name all classes, or, if label 0 does not count, give --reduce_zero_label"
        raise UserError(f"{images.files[max(unknown)]} has the label {max(unknown)}, but {known}; {fix}")
    pixels = torch.tensor([images.pixels[number] for number in classes.numbers], dtype=torch.float64)
    if (labelled := pixels.count_nonzero()) < least:
        labels, zero = ", ".join(map(str, sorted(images.pixels))), " and 0" * (0 not in classes.numbers)
        problem = f"{labelled} of {count} classes have pixels in {len(images)} label maps of labels {labels}"
        raise UserError(f"{problem}, where 255{zero} does not count; label at least {least}, the background being one")
    return pixels


def describe_pixels(images: LabelledImages, pixels: torch.Tensor) -> str:
    """Describe the classes' fractions of the pixels (K,), and which classes have none."""
    empty = [name for name, count in zip(images.classes, pixels) if not count]
    without = f"; no training pixel of {', '.join(empty[:10])} ({len(empty)} in all)" if empty else ""
    ignored = 1 - pixels.sum().item() / sum(images.pixels.values())
    return f"pixels: {describe_largest(images.classes, pixels, 10)}; {ignored:.1%} do not count{without}"


def describe_largest(names: list[str], pixels: torch.Tensor, most: int) -> str:
    """Name the largest classes, of pixels (K,), and their fractions."""
    order = pixels.argsort(descending=True, stable=True)[:most].tolist()
    return ", ".join(f"{names[k]} {pixels[k] / pixels.sum():.1%}" for k in order if pixels[k])


class Augmentation:
    """The transform of training images and their labels: random size, crop, mirroring and colours."""

    def __init__(self, args: argparse.Namespace):
        self.short, self.scale, self.most = args.test_size, args.scale, args.most
        fill = {Image.Image: GREY, tv_tensors.Mask: IGNORED}
        self.random_crop = v2.RandomCrop(args.input_size, pad_if_needed=True, fill=fill)
        self.transform = v2.Compose([v2.RandomHorizontalFlip(), *[v2.RandomPhotometricDistort()] * args.photometric])

    def __call__(self, image: Image.Image, labels: tv_tensors.Mask) -> tuple[Image.Image, tv_tensors.Mask]:
        """Image and labels (H, W) -> both at --input_size."""
        return self.transform(*self.crop(*self.resize(image, labels)))

    def resize(self, image: Image.Image, labels: tv_tensors.Mask) -> tuple[Image.Image, tv_tensors.Mask]:
        """Resize to a short side of --test_size times a factor drawn uniformly from --scale."""
        low, high = sorted(self.scale)
        short = self.short * (low + (high - low) * torch.rand(()).item())
        size = list(scaled_size(image.height, image.width, short))
        # torchvision would resize a mask by the pixel before each position, which shifts the labels.
        labels = F.interpolate(labels.as_subclass(torch.Tensor)[None, None], size, mode="nearest-exact")[0, 0]
        return v2.functional.resize(image, size, v2.InterpolationMode.BILINEAR), tv_tensors.Mask(labels)

    def crop(self, image: Image.Image, labels: tv_tensors.Mask) -> tuple[Image.Image, tv_tensors.Mask]:
        """Crop at random, up to ten times, until no class exceeds the fraction --most of the pixels that count."""
        for _ in range(10):
            crops = self.random_crop(image, labels)
            counts = crops[1].as_subclass(torch.Tensor).flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
            if counts.max() <= self.most * counts.sum():
                break
        return crops


def scaled_size(height: int, width: int, short: float, least: int = 1) -> tuple[int, int]:
    """Scale a size to a short side of `short` and a long side of at most 4 * short; each side at least `least`."""
    factor = min(short / min(height, width), 4 * short / max(height, width))
    return max(least, round(height * factor)), max(least, round(width * factor))


# --- command line -----------------------------------------------------------------------------------------------------

DEFAULTS = {
    "folder": dict(lr=1e-4, batch_size=8),
    "folder on a CPU": dict(channels=64, aux_channels=32, lr=1e-3, batch_size=8, epochs=12, eval_freq=4),
    "embedded": dict(
        model="convnextv2_yocto", stem_stride=2, input_size=80, test_size=80, channels=16, aux_channels=16,
        scale=(0.9, 1.1), photometric=False, batch_size=4, epochs=6, lr=2e-3,
    ),
}  # fmt: skip
NETWORK = ("model", "stem_stride", "mlp_norm", "channels", "aux_channels", "statistics")
EVALUATION = ("input_size", "test_size", "window", "stride")
EVALUATION += ("reduce_zero_label", "nb_classes", "val_split", "image_max")
PLACES = ("data_path", "holdout")
CPU_SIZES = {4: 96, 2: 64, 1: 48}  # the stem's stride -> --input_size for folders on a CPU
OTHER_NAMES = {"training": ["train"], "validation": ["val", "valid"]}  # other names of a split's folder
NOTHING = ("background", "unlabeled", "unlabelled", "void", "ignore")  # names of label 0 if it does not count


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and fill in defaults (`tasks.settle`)."""
    parser, side = cli.Parser(DEFAULTS, description=__doc__.split("\n\n")[0]), cli.number(int, 8, 4096)
    tasks.add_task_flags(parser, "label", ("ade20k",))
    add = cli.add_model_flags(parser, MODELS, "weights of any layout that weights.py reads, or a run's folder")
    add("--channels", type=cli.count, default=512, help="width of the head")
    add("--aux_channels", type=cli.count, default=256, help="width of the auxiliary head")
    add = cli.add_data_flags(parser, ("embedded", "folder"), "folder in ADE20K's layout", SCENES, input_size=None)
    add("--val_split", default="validation", metavar="NAME", help="folder in images/ and annotations/ to evaluate on")
    add("--holdout", type=cli.fraction, help="evaluate on this fraction of the training images instead")
    add("--classes", metavar="FILE", help="class names, one per line, or names and colours (DIR/classes.txt)")
    add("--nb_classes", type=cli.number(int, 1, 255), help="number of classes, if they have no names")
    add("--reduce_zero_label", action=cli.BoolFlag, default=False, help="ignore label 0; 1 is the first class")
    add("--test_size", type=side, help="short side of images at scale 1; the long one is at most 4 times it")
    add("--scale", type=cli.positive, default=(0.5, 2.0), nargs=2, help="training: range of sizes over --test_size")
    add("--most", type=cli.fraction, default=0.75, help="training: largest fraction of a crop that one class may have")
    add("--photometric", action=cli.BoolFlag, default=True, help="training: distort colours")
    add("--test_scales", type=cli.positive, default=(1.0,), nargs="+", help="evaluation: sizes to average over")
    add("--flip", action=cli.BoolFlag, default=False, help="evaluation: average with the mirrored image")
    add("--window", type=side, help="evaluation: side of sliding windows (default: the whole image at once)")
    add("--stride", type=cli.count, help="evaluation: step of the windows (default: 2/3 of --window)")

    add = cli.add_optimisation_flags(parser, epochs=50, blr=1.6e-3, min_lr=0.0, warmup=None)
    add("--iterations", type=cli.count, help="updates of the whole run, instead of --epochs")
    add("--warmup_updates", type=cli.number(int, 0), help="updates of linear warm-up (1500, or 10% of short runs)")
    add("--power", type=cli.nonnegative, default=1.0, help="power of the polynomial decay of the learning rate")
    add("--class_balance", type=cli.fraction, default=0.0, help="weights of classes: fraction of pixels ** -this")
    add("--layer_decay_type", choices=("single", "group"), default="group", help="a layer is a block, or up to three")
    tasks.add_transfer_flags(add)
    cli.add_run_flags(parser, "runs/segment")

    first = parser.parse_args(argv)
    small = not first.recipe and (first.device == "cpu" or not (first.device or torch.cuda.is_available()))
    parser.by_data = DEFAULTS | ({"folder": DEFAULTS["folder on a CPU"]} if small else {})
    args = tasks.settle(parser, argv, weights.flags_of, NETWORK, EVALUATION, PLACES, {"ade20k": ADE20K})
    parser.refuse_both(args, "classes", "nb_classes")
    factor = 1.5 if small and not args.input_size else 1
    args.input_size = args.input_size or (CPU_SIZES[args.stem_stride] if small else 512)
    args.test_size = args.test_size or int(factor * args.input_size)
    with value_errors_are_the_users():
        for size in filter(None, (args.input_size, args.window)):
            check_size(size, size, 8 * args.stem_stride, whole_patches=False)
    args.stride = args.stride or (args.window and args.window * 2 // 3)
    if args.stride and args.stride > (args.window or 0):
        parser.error(f"--stride {args.stride} is larger than --window {args.window}: it leaves gaps; lower it")
    return args


# --- training ---------------------------------------------------------------------------------------------------------

CURVES = {"mIoU": "val_mIoU", "accuracy": "val_accuracy", "mean accuracy of classes": "val_mean_accuracy"}


@record  # torchrun then reports the error of the process that failed first
def main(args: argparse.Namespace) -> None:
    """Train, evaluate or predict as `args` (from `get_args`) say."""
    device = dist.setup(args.device, args.deterministic)
    (predict if args.predict else evaluate_checkpoint if args.eval else train)(args, device)


def make_segmenter(args: argparse.Namespace, num_classes: int) -> UPerNet:
    """Build the network that the flags describe."""
    return UPerNet(weights.make_encoder(args), num_classes, args.channels, args.aux_channels)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train a segmenter, and evaluate it after every epoch."""
    images, val = load_images(args, "train"), None if args.disable_eval else load_images(args, "val")
    batch_size = min(args.batch_size, len(images) // dist.world_size())
    if batch_size * dist.world_size() < 2:
        fix = "BatchNorm needs at least 2 in an update: raise --batch_size, or add images"
        raise UserError(f"{len(images)} training images and --batch_size {args.batch_size}; {fix}")
    classes = find_classes(args, images.pixels.keys() | (val.pixels.keys() if val else ()))
    pixels = use_classes(images, classes, least=2)
    if val:
        use_classes(val, classes, least=1)
    with torch.device("meta"):  # shapes only
        net, imgs = make_segmenter(args, len(classes.names)).train(), torch.empty(batch_size, 3, *[args.input_size] * 2)
        fix = "lower --batch_size, --input_size or --channels"
        tasks.check_memory(net, lambda: segmentation_losses(*net(imgs), imgs[:, 0]), args.amp, device, fix)

    torch.manual_seed(args.seed)
    net = speed_up(make_segmenter(args, len(classes.names)))
    loaded = weights.load_parts(net, net.encoder, args.finetune, "segmenter") if args.finetune else []
    dist.to_device(net, device)
    class_weights = tasks.class_weights(pixels, args.class_balance).to(device) if args.class_balance else None
    ema = tasks.averaged(net, args.model_ema_decay) if args.model_ema else None
    groups = tasks.layer_groups(net, args.weight_decay, args.layer_decay, args.layer_decay_type, net.encoder.depths)
    optimizer = tasks.make_optimizer(args, groups)

    dist.say("\n".join(loaded or ["random initial weights"]))
    dist.say(f"{args.model} with UPerNet: {sum(p.numel() for p in net.parameters()):,} parameters")
    sizes = f"crops of {args.input_size} px from a short side of {args.test_size}"
    dist.say(f"{args.data_set}: {len(images):,} images, {len(classes.names)} classes; {sizes}")
    dist.say(describe_pixels(images, pixels))
    score, write = partial(evaluate, images=val, args=args, device=device), partial(write_scores, classes=classes)
    options = dict(schedule=make_schedule, iterations=args.iterations)
    origin = dict(classes=classes.names, colours=classes.colours, numbers=list(classes.numbers))
    with Run(args, images, device, net.train(), optimizer, "segment.py", ema, **options, **origin) as run:
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                with run.autocast:
                    logits, auxiliary = run.network(batch.images)  # (N, 3, H, W) -> (N, K, H, W), twice
                    losses = segmentation_losses(logits, auxiliary, batch.targets, class_weights)
                if run.backward(losses):
                    run.update()

            if val and run.evaluation_due(epoch):
                tasks.evaluate(run, epoch, score, "mIoU", describe, write)
                run.write("scores.png", plot_evaluations, run.records, CURVES, "%", "Validation", 100)
            if run.save_due(epoch):
                run.save(epoch + 1)
    best = f"checkpoint-best.pth (mIoU {run.best:.1%}), scores.json, segmentation.png, scores.png"
    run.finish(f"{best if val else 'checkpoints'}, log.jsonl, config.json")


def make_schedule(run: Run) -> Callable[[int], float]:
    """Map updates to learning rates: linear warm-up, then polynomial decay."""
    args = run.args
    warmup = min(1500, run.total // 10) if args.warmup_updates is None else args.warmup_updates

    def schedule(update: int) -> float:
        if update < warmup:
            return run.peak_lr * (update + 1) / (warmup + 1)
        left = (run.total - update) / max(run.total - warmup, 1)
        return args.min_lr + (run.peak_lr - args.min_lr) * left**args.power

    return schedule


# --- evaluation and prediction ----------------------------------------------------------------------------------------

STRIP = 2**24  # probabilities computed at a time, so that large images fit in memory


@torch.no_grad()
def label(net: UPerNet, images: LabelledImages, args: argparse.Namespace, device: torch.device) -> Iterator[tuple]:
    """Label this process's readable images; yield index, image (3, H, W), true and predicted labels (H, W) of each."""
    # One at a time, since GRN would pool over the padding of unequal sizes.
    batches, training = divided(range(dist.rank(), len(images), dist.world_size()), 1), net.training
    net.eval()
    for batch, (image, truth) in zip(batches, progress(make_loader(images, batches, args.num_workers))):
        if images.readable(batch):
            with dist.autocast(args.amp, device):
                strips = [strip.argmax(dim=0).byte() for strip in probabilities(net, image[0].to(device), args)]
            yield batch[0][1], image[0], truth[0].to(device), torch.cat(strips)
    net.train(training)


def probabilities(net: UPerNet, image: torch.Tensor, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """uint8 (3, H, W) -> class probabilities, averaged over scales and flips, in strips (K, h, W)."""
    outputs, (height, width) = [], image.shape[1:]
    for scale, flip in product(args.test_scales, (False, True) if args.flip else (False,)):
        size = list(scaled_size(height, width, args.test_size * scale, least=net.encoder.patch_size))
        view = v2.functional.resize(image, size, v2.InterpolationMode.BILINEAR)  # (3, H, W) -> (3, h, w)
        view = normalise(view.flip(2) if flip else view, STATISTICS[args.statistics], image.device)
        logits = slide(net, view[None], args.window, args.stride)  # (1, 3, h, w) -> (1, K, h, w)
        outputs.append(logits.flip(3) if flip else logits)
    # Bilinear as in `resize`, at the centres of the image's pixels, whose coordinates span -1 to 1.
    y, x = ((2 * torch.arange(side, device=image.device) + 1) / side - 1 for side in (height, width))
    for rows in y.split(max(1, STRIP // (width * outputs[0].shape[1]))):
        grid = torch.stack(torch.meshgrid(x, rows, indexing="xy"), dim=-1)[None]  # (1, h, W, 2)
        strips = (F.grid_sample(logits, grid, padding_mode="border", align_corners=False)[0] for logits in outputs)
        yield sum(strip.softmax(dim=0) for strip in strips) / len(outputs)


def slide(net: UPerNet, imgs: torch.Tensor, window: int | None, stride: int | None) -> torch.Tensor:
    """Average logits over windows: images (N, 3, H, W) -> float32 (N, K, H, W); the last windows end with the image."""
    if window is None:
        return net(imgs).float()
    starts = [sorted({min(k, max(side - window, 0)) for k in range(0, side, stride)}) for side in imgs.shape[2:]]
    total = times = None
    for top, left in product(*starts):
        place = (..., slice(top, top + window), slice(left, left + window))
        logits = net(imgs[place]).float()
        if total is None:
            total, times = (imgs.new_zeros(len(imgs), k, *imgs.shape[2:]) for k in (logits.shape[1], 1))
        total[place] += logits
        times[place] += 1
    return total / times


def evaluate(net: UPerNet, images: LabelledImages, args: argparse.Namespace, device: torch.device) -> tuple:
    """Score a network over all pixels; return scores to log, all scores, and six `maps.Example`s across the set."""
    classes, count, examples = len(images.classes), 0, {}
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    chosen = {k * len(images) // 6 for k in range(6)}
    for index, image, truth, prediction in label(net, images, args, device):
        pairs = classes * truth.long() + prediction
        confusion += pairs[truth != IGNORED].bincount(minlength=classes * classes)
        count += 1
        if index in chosen:
            examples[index] = image, truth.cpu(), prediction.cpu()
    counts, confusions, parts = zip(*dist.gather((count, confusion.cpu(), examples)))
    examples = sorted((index, example) for part in parts for index, example in part.items())
    scores = segmentation_scores(sum(confusions).view(classes, classes), images.classes)
    chief = {name: scores[name] for name in ("mIoU", "accuracy", "mean_accuracy")}
    return chief, ({"images": sum(counts)} | scores, [example for _, example in examples])


def describe(scores: dict) -> str:
    """Put the main scores into words, in percent."""
    return f"mIoU {100 * scores['mIoU']:.1f}, accuracy {100 * scores['accuracy']:.1f}"


def write_scores(folder: Path, results: tuple[dict, list], classes: maps.Classes) -> None:
    """Write scores.json, and draw the examples in segmentation.png."""
    make_directory(folder)
    scores, examples = results
    save_json(folder / "scores.json", scores)
    maps.draw_segmentation(folder / "segmentation.png", examples, classes)


def load_segmenters(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, UPerNet], maps.Classes]:
    """Load the networks of --resume, "model" and perhaps "model_ema"; and their classes."""
    content, path = weights.read_content(args.resume), args.resume
    if not {"model", "classes", "colours", "numbers"} <= content.keys():
        raise UserError(f"{path} is no checkpoint of segment.py; train one with segment.py --finetune {path}")
    classes = maps.Classes(content["classes"], content["colours"], content["numbers"])
    nets = weights.load_saved(content, lambda: speed_up(make_segmenter(args, len(classes.names))), path, device)
    return nets, classes


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device) -> None:
    """Evaluate the --resume checkpoint and its moving average on the validation images."""
    nets, classes = load_segmenters(args, device)
    names, _ = listed_classes(args) or (classes.names, None)
    if classes.names not in (names, ["background", *names]):
        before, now = (f"{', '.join(words[:5])} ({len(words)} in all)" for words in (classes.names, names))
        raise UserError(f"the classes of {args.resume} are {before}, the validation data's {now}; they must agree")
    images, results = load_images(args, "val"), {}
    use_classes(images, classes, least=1)
    scales = f"scales {' '.join(f'{scale:g}' for scale in args.test_scales)}{' and mirrored' * args.flip}"
    for name, net in nets.items():
        scores, (details, _) = results[name] = evaluate(net, images, args, device)
        where = f"{details['images']:,} images of {args.data_path or args.data_set}"
        dist.say(f"{name}: {describe(scores)} on {where}, short side {args.test_size} px, {scales}")
    winner = max(results, key=lambda name: results[name][0]["mIoU"])
    if dist.rank() == 0:
        write_scores(Path(args.output_dir), results[winner][1], classes)
        print(f"in {args.output_dir}: scores.json and segmentation.png, of {winner}")


def predict(args: argparse.Namespace, device: torch.device) -> None:
    """Write a label map for every image, and the image overlaid with the classes' colours."""
    nets, classes = load_segmenters(args, device)
    net, paths = nets.get("model_ema", nets["model"]), find_images(args.predict, image_max=args.image_max)
    images = LabelledImages(paths, None, classes.names, None, STATISTICS[args.statistics])
    images.image_max = args.image_max
    folder = make_directory(Path(args.output_dir, "predictions"))
    for index, image, _, prediction in label(net, images, args, device):
        labels, name = prediction.cpu(), f"{index:05d}-{Path(paths[index]).stem}"
        maps.write_labels(folder / f"{name}.png", labels.numpy(), classes)
        maps.draw_overlay(folder / f"{name}-overlay.png", image, labels, classes)
        print(f"{paths[index]}: {describe_largest(classes.names, labels.flatten().bincount(), 5)}")
    dist.gather(None)  # wait for the other processes' files
    dist.say(f"in {folder}: a label map and an overlay of each image")


if __name__ == "__main__":
    main(get_args())
