"""Segment pictures, a class for each pixel: UPerNet on a ConvNeXt encoder (paper Sec. 5 and App. A.4).

    python segment.py                                                     # embedded pictures, minutes on a laptop
    python segment.py --data_path DIR --finetune runs/finetune/checkpoint-best.pth
    python segment.py --eval --resume runs/segment/checkpoint-best.pth --test_scales 0.75 1 1.25 --flip
    python segment.py --predict street.jpg holiday/ --resume runs/segment/checkpoint-best.pth

DIR holds images/{training,validation}/ and annotations/{training,validation}/, as ADE20K does. Writes checkpoints, log.jsonl,
config.json, scores.json, segmentation.png and scores.png to --output_dir.
"""

import plumbing  # isort: skip (first: Ctrl-C then ends the imports below, which take seconds, without a traceback)
import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2

from data import SCENES, SPLITS, STATISTICS, find_images
from maps import (
    LabelMaps,
    augmentation,
    blended,
    class_file,
    class_weights,
    draw_segmentation,
    draw_with_legend,
    embedded_maps,
    enlarged,
    find_classes,
    folder_maps,
    read_classes,
    scaled_size,
    write_labels,
)
from model import check_size
from plumbing import flags, layouts
from plumbing.devices import autocast_dtype, to_device
from plumbing.files import save_json, save_tensors
from plumbing.loading import Unreadable, count_workers, divided, make_loader
from plumbing.optim import averaged, layer_groups, make_optimizer
from plumbing.plots import plot_curves
from plumbing.processes import Processes, main_process_first
from plumbing.recipes import ADE20K
from plumbing.run import Run, carry_out
from plumbing.scores import segmentation_scores
from plumbing.script import UserError, one_line, run_script, value_errors_are_the_users
from plumbing.settings import add_evaluation_flags, add_task_flags, match_classes, settle
from segmenter import IGNORED, UPerNet, resize, segmentation_losses

DEFAULTS = {
    "folder": dict(lr=1e-4, batch_size=16),
    "embedded": dict(
        model="convnextv2_yocto", stem_stride=2, input_size=80, test_size=80, channels=16, aux_channels=16, scale=(0.9, 1.1),
        photometric=False, class_balance=0.5, batch_size=8, epochs=8, lr=4e-3,
    ),
}  # fmt: skip
NETWORK = ("model", "stem_stride", "mlp_norm", "channels", "aux_channels", "statistics")
LOSSES = ("loss_head", "loss_auxiliary")


# --- command line -----------------------------------------------------------------------------------------------------


def make_parser() -> flags.Parser:
    """All flags."""
    parser = flags.Parser(DEFAULTS, description=__doc__.split("\n\n")[0])
    files = "an encoder, classifier, detector or segmenter, of any layout that weights.py reads, transformers' UPerNet too"
    add = add_task_flags(parser, "label", "ade20k", files)
    add("--channels", flags.number(int, 1, 8192), 512, "width of the head")
    add("--aux_channels", flags.number(int, 1, 8192), 256, "width of the auxiliary head")

    place = "folder in ADE20K's layout; none: embedded data"
    add = flags.add_data_flags(parser, ("embedded", "folder"), place, input_size=512, drawn=SCENES)
    add("--val_split", str, "validation", "the folder below images/ and annotations/ that is evaluated", metavar="NAME")
    add("--classes", str, None, "class names, one a line, with colours or without (default: DIR/classes.txt)", metavar="FILE")
    add(
        "--nb_classes",
        flags.number(int, 1, 255),
        None,
        "number of classes, without names (default: of --classes, else as the maps have)",
    )
    add("--reduce_zero_label", bool, False, "in files, label 0 is not counted and 1 is the first class, as in ADE20K")
    add(
        "--test_size", flags.image_side, None, "short side of pictures at scale 1; the long one at most 4 times it (default: input)"
    )
    add("--scale", flags.positive, (0.5, 2.0), "training: least and most size of a picture, relative to --test_size", nargs=2)
    add("--most", flags.some_share, 0.75, "training: largest share of a crop that one class may have")
    add("--photometric", bool, True, "training: distort brightness, contrast, saturation and hue")
    add("--test_scales", flags.positive, (1.0,), "evaluation: sizes whose probabilities are averaged", nargs="+")
    add("--flip", bool, False, "evaluation: average with the mirrored picture's")
    add("--window", flags.image_side, None, "evaluation: side of sliding windows (default: the whole picture at once)")
    add("--stride", flags.count, None, "evaluation: step of the windows (default: 2/3 of --window)")

    add = flags.add_optimisation_flags(parser, epochs=50, blr=1.6e-3, min_lr=0.0, warmup=None)
    add("--iterations", flags.count, None, "updates of the whole run, instead of --epochs")
    add("--warmup_updates", flags.number(int, 0), None, "updates of linear warm-up (default: 1500, or 10% of short runs)")
    add("--power", flags.not_negative, 1.0, "of the polynomial by which the learning rate falls to --min_lr")
    flags.add_transfer_flags(add)
    add("--class_balance", flags.share, 0.0, "weights of classes in the loss: their share of the pixels to the power of minus this")
    add("--layer_decay_type", ("single", "group"), "group", "a layer is one block, or a stage (of stage 3, three blocks)")
    add_evaluation_flags(parser)
    flags.add_run_flags(parser, "runs/segment", compile=False)
    return parser


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; then come the recipe, the weights' own configuration, the data set, and the general defaults."""
    parser = make_parser()
    places, prepared = (
        ("data_path", "val_split"),
        ("input_size", "test_size", "window", "stride", "reduce_zero_label", "nb_classes"),
    )
    args = settle(parser, argv, NETWORK, places, prepared, DEFAULTS, {"ade20k": ADE20K}, ("data_path",), "the layout of ADE20K")
    flags.refuse_both(args, parser, "classes", "nb_classes")
    args.test_size = args.test_size or args.input_size
    patch = 8 * args.stem_stride
    for name in ("input_size", "window"):
        if getattr(args, name):
            with value_errors_are_the_users():
                check_size(getattr(args, name), getattr(args, name), patch, whole_patches=False)
    if args.window:
        args.stride = args.stride or max(1, args.window * 2 // 3)
        if args.stride > args.window:
            parser.error(f"--stride {args.stride} leaves gaps between windows of --window {args.window}; lower it")
    elif args.stride:
        parser.error(f"--stride {args.stride} is of sliding windows; give --window too")
    if args.scale[0] > args.scale[1]:
        parser.error(f"--scale {args.scale[0]:g} {args.scale[1]:g}: the larger factor comes second")
    return args


# --- data and model ---------------------------------------------------------------------------------------------------


def load_maps(args: argparse.Namespace, split: str, classes: tuple[list[str], list[tuple]] | None) -> LabelMaps:
    """The "train" or "val" pictures, of these `classes`, their names and colours."""
    transform = None
    if split == "train":
        transform = augmentation(args.input_size, args.test_size, args.scale, args.most, args.photometric)
    if args.data_set == "embedded":
        count = args.embedded_images[SPLITS.index(split)]
        return embedded_maps(split, args.input_size, transform, args.seed, count)
    folder = "training" if split == "train" else args.val_split
    found = folder_maps(args.data_path, folder, classes, transform, args.seed, args.reduce_zero_label)
    found.statistics = args.statistics
    return found


def make_segmenter(args: argparse.Namespace, num_classes: int) -> UPerNet:
    """The network that the flags describe."""
    with value_errors_are_the_users():
        return UPerNet(layouts.make_encoder(args), num_classes, args.channels, args.aux_channels)


def load_segmenters(path: str, args: argparse.Namespace, device: torch.device) -> tuple[dict[str, UPerNet], list, list]:
    """The segmenters of a checkpoint, "model" and where there is one "model_ema", ready to evaluate; names and colours of classes."""
    content = layouts.read_content(path)
    if not {"classes", "colours", "model"} <= content.keys() or "fuse.0.weight" not in content["model"]:
        raise UserError(f"{path} holds no segmenter of segment.py; train one with segment.py --finetune {path}")
    make = partial(make_segmenter, args, len(content["classes"]))
    return layouts.load_saved(content, make, path, device), content["classes"], [tuple(colour) for colour in content["colours"]]


# --- what a picture shows ---------------------------------------------------------------------------------------------


def probabilities(segmenter: UPerNet, picture: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """uint8 (3, H, W) -> (K, H, W), the mean over --test_scales and --flip of the probability of each class."""
    height, width = picture.shape[1:]
    mean, std = (torch.tensor(values, device=picture.device).view(3, 1, 1) for values in STATISTICS[args.statistics])
    views = list(product(args.test_scales, (False, True) if args.flip else (False,)))
    total = 0
    for scale, flip in views:
        size = list(scaled_size(height, width, args.test_size * scale, least=segmenter.encoder.patch_size))
        view = v2.functional.resize(picture, size, v2.InterpolationMode.BILINEAR)  # (3, H, W) -> (3, h, w)
        view = ((view.flip(2) if flip else view) / 255 - mean) / std
        logits = slide(segmenter, view[None], args.window, args.stride)  # (1, 3, h, w) -> (1, K, h, w)
        logits = logits.flip(3) if flip else logits
        total = total + resize(logits, picture[None])[0].softmax(dim=0)  # (1, K, h, w) -> (K, H, W)
    return total / len(views)


def slide(segmenter: UPerNet, imgs: torch.Tensor, window: int | None, stride: int | None) -> torch.Tensor:
    """Images (N, 3, H, W) -> float32 logits (N, K, H, W), the mean of those of windows; of the whole image without a window.

    The last window of a row or column ends with the image.
    """
    if window is None:
        return segmenter(imgs).float()
    starts = [sorted({min(k, max(side - window, 0)) for k in range(0, side, stride)}) for side in imgs.shape[2:]]
    total, times = 0, imgs.new_zeros(imgs.shape[2:])
    for top, left in product(*starts):
        place = (..., slice(top, top + window), slice(left, left + window))
        logits = segmenter(imgs[place]).float()
        total = imgs.new_zeros(len(imgs), logits.shape[1], *imgs.shape[2:]) if times.max() == 0 else total
        total[place] += logits
        times[place] += 1
    return total / times


@torch.no_grad()
def label(segmenter: UPerNet, maps: LabelMaps, args: argparse.Namespace, processes: Processes, use: Callable) -> None:
    """Call `use(index, prediction (H, W), truth (H, W))`, on the device, for every picture of this process that can be read.

    Each picture is labelled by one process, alone: GRN pools over the padding that unequal sizes would need.
    """
    unreadable, device = Unreadable(maps, "it is left out"), processes.device
    mine = divided(range(processes.rank, len(maps), processes.world_size), 1)
    amp_dtype, was_training = autocast_dtype(args.amp, device), segmenter.training
    segmenter.eval()
    for ((_, index),), (pictures, truth, failed) in zip(mine, make_loader(maps, mine, count_workers(args, processes))):
        unreadable.note(failed)
        if failed[0] < 0:
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                found = probabilities(segmenter, pictures[0].to(device), args)
            use(index, found.argmax(dim=0), truth[0].to(device).long())
    segmenter.train(was_training)


def evaluate(segmenter: UPerNet, maps: LabelMaps, args: argparse.Namespace, processes: Processes) -> tuple[dict, dict]:
    """Scores of all pixels of all pictures, each counted once, and the predictions for up to six pictures, spread over the set."""
    classes, shown, seen = len(maps.classes), {}, 0
    chosen = {k * len(maps) // min(6, len(maps)) for k in range(6)}
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=processes.device)

    def use(index, prediction, truth):
        nonlocal seen
        counted = truth != IGNORED
        confusion.add_((classes * truth + prediction)[counted].bincount(minlength=classes * classes))
        seen += 1
        if index in chosen:
            shown[index] = prediction.to(torch.uint8).cpu().numpy()

    label(segmenter, maps, args, processes, use)
    parts = processes.gather((seen, confusion.cpu(), shown))
    confusion = sum(part[1] for part in parts).view(classes, classes)
    scores = {"images": sum(part[0] for part in parts)} | segmentation_scores(confusion, maps.classes)
    return scores, {index: found for part in parts for index, found in part[2].items()}


# --- the three tasks --------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    """Train, evaluate or predict as `args` (from `get_args`) say."""
    carry_out(args, train, evaluate_checkpoint, predict)


def train(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Train a segmenter, evaluating after every epoch."""
    lines, classes = [], None
    with main_process_first():
        if args.data_set == "folder":
            *classes, line = find_classes(args.data_path, args.classes, args.nb_classes, args.reduce_zero_label)
            lines.append(line)
        maps = load_maps(args, "train", classes)
        val = None if args.disable_eval else load_maps(args, "val", classes)
    run = Run(args, maps, processes, output_dir, args.iterations)
    if run.batch_size * processes.world_size == 1:
        raise UserError("--batch_size 1 in one process: BatchNorm after the 1 x 1 pool has a single value; take at least 2")

    torch.manual_seed(args.seed)
    segmenter = make_segmenter(args, len(maps.classes))
    lines += flags.describe_origins(args)
    if args.finetune:
        lines += layouts.load_parts(segmenter, segmenter.encoder, args.finetune, "segmenter")
    else:
        lines.append("random initial weights")
    to_device(segmenter, run.device)
    weights = class_weights(maps, args.class_balance).to(run.device) if args.class_balance else None
    ema = averaged(segmenter, args.model_ema_decay) if args.model_ema else None
    groups = layer_groups(segmenter, args.weight_decay, args.layer_decay, args.layer_decay_type, segmenter.encoder.depths)
    optimizer = make_optimizer(args, groups, run.peak_lr)
    for line in lines:
        run.say(line)
    run.say(f"{args.model} with UPerNet: {sum(p.numel() for p in segmenter.parameters()):,} parameters")
    run.say(f"{args.data_set}: {len(maps):,} pictures, {len(maps.classes)} classes")
    network = run.start(
        segmenter.train(), optimizer, "segment.py", ema, extra=lambda: {"best": best}, schedule=make_schedule(args, run), losses=LOSSES,
        classes=maps.classes, colours=[list(colour) for colour in maps.colours],
    )  # fmt: skip
    if network is None:
        return
    best = run.resumed.get("best", -1.0)
    for epoch in run.epochs():
        for batch in run.batches(epoch):
            with run.autocast():
                losses = segmentation_losses(*network(batch.images), batch.targets, weights)
            if run.backward(losses):
                run.update()

        if val and run.is_due(epoch, args.eval_freq):
            candidates = {"model": segmenter} | ({"model_ema": ema.module} if ema and args.model_ema_eval else {})
            found = {name: evaluate(each, val, args, processes) for name, each in candidates.items()}
            winner = max(found, key=lambda name: found[name][0]["mIoU"])
            scores, shown = found[winner]
            improved, best = scores["mIoU"] > best, max(best, scores["mIoU"])
            log_scores(run, epoch + 1, {name: each[0] for name, each in found.items()}, best)
            if improved:
                run.write("scores.json", write_scores, val, scores, shown)
                if args.save_ckpt:
                    content = {"model": candidates[winner].state_dict(), "epoch": epoch + 1, "mIoU": best}
                    run.write("checkpoint-best.pth", save_tensors, content | run.origin)
        if run.save_due(epoch):
            run.save(epoch + 1)
    outputs = f"checkpoint-best.pth (mIoU {100 * best:.1f}), scores.json, segmentation.png, scores.png" if val else "checkpoints"
    run.close(f"{outputs}, log.jsonl, config.json")


def make_schedule(args: argparse.Namespace, run: Run) -> Callable[[int], float]:
    """Update -> learning rate: linear warm-up, then a polynomial of what is left."""
    warmup = min(1500, run.total // 10) if args.warmup_updates is None else args.warmup_updates

    def rate(update: int) -> float:
        if update < warmup:
            return run.peak_lr * (update + 1) / (warmup + 1)
        left = (run.total - update) / max(run.total - warmup, 1)
        return args.min_lr + (run.peak_lr - args.min_lr) * left**args.power

    return rate


def log_scores(run: Run, epoch: int, scores: dict[str, dict], best: float) -> None:
    """A line of the log about an evaluation, and scores.png."""
    record = {"epoch": epoch, "update": run.log.done, "best_mIoU": round(best, 6)}
    for name, found in scores.items():
        prefix = "val" if name == "model" else "val_ema"
        record |= {f"{prefix}_{number}": found[number] for number in ("mIoU", "accuracy", "mean_accuracy")}
    shown = "  ".join(f"{name} {describe(found)}" for name, found in scores.items())
    run.record(record, f"epoch {epoch}/{run.last_epoch + 1}  {shown}  best {100 * best:.1f}")
    run.write("scores.png", draw, run.log.records())


def describe(scores: dict) -> str:
    """The chief numbers, in percent."""
    return f"mIoU {100 * scores['mIoU']:.1f}, accuracy {100 * scores['accuracy']:.1f}"


def draw(path: Path, records: list[dict]) -> None:
    """Write scores.png from the log's records."""
    records = [record for record in records if "val_mIoU" in record]
    names = {"mIoU": "mIoU", "accuracy": "accuracy", "mean accuracy of classes": "mean_accuracy"}
    epochs = [record["epoch"] for record in records]
    curves = {title: (epochs, [100 * record[f"val_{name}"] for record in records]) for title, name in names.items()}
    plot_curves(path, curves, "epoch", "%", "Validation")


def write_scores(path: Path, maps: LabelMaps, scores: dict, shown: dict[int, np.ndarray]) -> None:
    """scores.json (`path`), and beside it segmentation.png."""
    save_json(path, scores)
    draw_segmentation(path.with_name("segmentation.png"), maps, shown)


def evaluate_checkpoint(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Evaluate the checkpoint of --resume on the validation pictures, its moving average too."""
    segmenters, classes, colours = load_segmenters(args.resume, args, processes.device)
    if args.data_set == "folder" and not args.nb_classes and (file := class_file(args.data_path, args.classes)):
        match_classes(classes, read_classes(file)[0])
    maps = load_maps(args, "val", (classes, colours))
    match_classes(classes, maps.classes)  # the embedded ones have their own
    found = {name: evaluate(segmenter, maps, args, processes) for name, segmenter in segmenters.items()}
    if processes.is_main:
        how = f"scales {' '.join(f'{scale:g}' for scale in args.test_scales)}{' and mirrored' * args.flip}"
        for name, (scores, _) in found.items():
            where = f"{scores['images']:,} images of {args.data_path or args.data_set}"
            print(one_line(f"{name}: {describe(scores)} on {where}, short side {args.test_size} px, {how}"))
        winner = max(found, key=lambda name: found[name][0]["mIoU"])
        write_scores(output_dir / "scores.json", maps, *found[winner])
        print(f"in {output_dir}: scores.json and segmentation.png, of {winner}")


def predict(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Write a map of labels for every picture, and the picture with the classes' colours laid over it."""
    segmenters, classes, colours = load_segmenters(args.resume, args, processes.device)
    paths = find_images(args.predict)
    maps = LabelMaps(paths, None, classes, colours, args.statistics)
    folder = output_dir / "predictions"
    folder.mkdir(exist_ok=True)

    def use(index, prediction, _):
        labels, name = prediction.to(torch.uint8).cpu(), f"{index:05d}-{Path(paths[index]).stem}"
        write_labels(folder / f"{name}.png", labels.numpy(), colours, args.reduce_zero_label)
        picture = v2.functional.pil_to_tensor(maps.open(index)[0])
        columns = {"picture": [enlarged(picture, 480)], "labels": [enlarged(blended(picture, labels, colours), 480)]}
        counts = labels.flatten().bincount(minlength=len(classes))
        draw_with_legend(folder / f"{name}-overlay.png", columns, set(counts.nonzero()[:, 0].tolist()), maps, 4)
        largest = counts.argsort(descending=True)[:5].tolist()
        shares = ", ".join(f"{classes[k]} {counts[k] / labels.numel():.1%}" for k in largest if counts[k])
        print(one_line(f"{paths[index]}: {shares}"))

    label(segmenters.get("model_ema", segmenters["model"]), maps, args, processes, use)
    processes.gather(None)  # the other processes' files are there too
    if processes.is_main:
        print(f"in {folder}: a label map and an overlay of each picture")


if __name__ == "__main__":
    run_script(main, get_args)
