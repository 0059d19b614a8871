"""Detect and segment objects: Mask R-CNN on a ConvNeXt encoder (paper Sec. 5 and App. A.3).

    python detect.py                                                     # embedded pictures, minutes on a laptop
    python detect.py --data_path DIR --finetune runs/pretrain/encoder.pth
    python detect.py --eval --resume runs/detect/checkpoint-best.pth
    python detect.py --predict street.jpg holiday/ --resume runs/detect/checkpoint-best.pth

DIR holds annotations/instances_{train,val}2017.json, train2017/ and val2017/, as COCO does. Writes checkpoints, log.jsonl,
config.json, detections.json, scores.json, detections.png and scores.png to --output_dir.
"""

import plumbing  # isort: skip (first: Ctrl-C then ends the imports below, which take seconds, without a traceback)
import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data import SCENES, SPLITS, STATISTICS, find_images
from detector import MaskRCNN
from plumbing import coco, flags, layouts
from plumbing.devices import autocast_dtype, to_device
from plumbing.files import save_json, save_tensors
from plumbing.loading import Unreadable, count_workers, divided, make_loader
from plumbing.optim import averaged, layer_groups, learning_rate, make_optimizer
from plumbing.plots import draw_objects, plot_curves, write_png
from plumbing.processes import Processes, main_process_first
from plumbing.recipes import COCO
from plumbing.run import Run, carry_out
from plumbing.script import UserError, one_line, run_script, value_errors_are_the_users
from plumbing.settings import add_evaluation_flags, add_task_flags, match_classes, settle
from scenes import Scenes, augmentation, draw_detections, embedded_scenes, folder_scenes, pictures_alone

DEFAULTS = {
    "folder": dict(lr=1e-4),
    "embedded": dict(
        model="convnextv2_yocto", stem_stride=2, input_size=80, test_size=(80, 80), augmentation="none", anchor_scale=4, fpn_dim=32,
        box_dim=256, mask_dim=16, regions=32, group_norm=True, proposals=(100, 100), batch_size=8, epochs=5, eval_freq=5, lr=2e-3,
    ),
}  # fmt: skip
LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
NETWORK = (
    "model", "stem_stride", "mlp_norm", "anchor_scale", "fpn_dim", "box_dim", "mask_dim", "masks", "group_norm", "published_heads", "statistics",
)  # fmt: skip
TEST = ("input_size", "test_size", "nms", "proposals")  # how a detector was evaluated; to be changed as one likes


# --- command line -----------------------------------------------------------------------------------------------------


def make_parser() -> flags.Parser:
    """All flags."""
    parser = flags.Parser(DEFAULTS, description=__doc__.split("\n\n")[0])
    files = "an encoder, classifier or detector, of any layout that weights.py reads"
    add = add_task_flags(parser, "search", "coco", files)
    add("--fpn_dim", flags.number(int, 1, 8192), 256, "channels of the feature pyramid")
    add("--box_dim", flags.number(int, 1, 8192), 1024, "width of the box head")
    add("--mask_dim", flags.number(int, 1, 8192), 256, "channels of the mask head")
    add("--anchor_scale", flags.positive, 8.0, "side of the anchors, in strides of their level, which follow the stem's")
    add("--masks", bool, None, "predict masks; without, a Faster R-CNN (default: where the training objects have masks)")
    add("--group_norm", bool, False, "GroupNorm in pyramid and mask head: random weights learn much sooner with it")
    add("--regions", flags.count, 512, "regions an image that the heads learn from, a quarter of them objects")
    add("--proposals", flags.count, (2000, 1000), "proposals an image, in training and in evaluation", nargs=2)
    add("--nms", ("hard", "soft"), "hard", "hard removes overlapping boxes, soft (the paper's) lowers their scores")
    add("--published_heads", bool, False, "RoIAlign, anchors and first weights as of the published detector, not torchvision's")

    place = "folder in COCO's layout; none: embedded data"
    add = flags.add_data_flags(parser, ("embedded", "folder"), place, input_size=1024, drawn=SCENES)
    add(
        "--test_size",
        flags.image_side,
        None,
        "evaluation: short side, and most of the long one (default: 25/32 and 1.3 x --input_size)",
        nargs=2,
    )
    for split in ("train", "val"):
        add(f"--{split}_annotations", str, None, f"instead of DIR/annotations/instances_{split}2017.json", metavar="FILE")
        add(f"--{split}_images", str, None, f"instead of DIR/{split}2017", metavar="DIR")
    add("--val_limit", flags.count, None, "evaluate on the first so many images")
    add("--score_threshold", flags.share, None, "lowest score of a detection (default: 0.05; 0.5 to predict)")
    add(
        "--augmentation",
        ("jitter", "multiscale", "none"),
        "jitter",
        "large-scale jitter, a random short side, or neither; all flip",
    )
    add("--jitter", flags.positive, (0.1, 2.0), "jitter: least and most size of a picture, relative to the input", nargs=2)
    add("--color_jitter", flags.positive, None, "brightness, contrast and saturation too")

    add = flags.add_optimisation_flags(parser, epochs=36, blr=8e-4, min_lr=0.0, warmup=None)
    add("--warmup_updates", flags.number(int, 0), None, "updates of linear warm-up (default: 1000, or 10% of short runs)")
    add("--schedule", ("steps", "cosine"), "steps", "a tenth of the rate from each of --steps on, or half a cosine to --min_lr")
    add("--steps", flags.not_negative, None, "epochs after which the rate falls (default: 3/4 and 11/12 of --epochs)", nargs="+")
    flags.add_transfer_flags(add)
    add_evaluation_flags(parser)
    flags.add_run_flags(parser, "runs/detect", compile=False)
    return parser


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; then come the recipe, the weights' own configuration, the data set, and the general defaults."""
    parser = make_parser()
    places = ("data_path", *(f"{split}_{what}" for split in ("train", "val") for what in ("annotations", "images")))
    enough = ("data_path", "train_annotations", "val_annotations")
    args = settle(parser, argv, NETWORK, places, TEST, DEFAULTS, {"coco": COCO}, enough, "COCO's layout")
    args.test_size = list(args.test_size or (round(args.input_size * 25 / 32), round(args.input_size * 1.3)))
    args.score_threshold = (0.5 if args.predict else 0.05) if args.score_threshold is None else args.score_threshold
    if args.test_size[0] > args.test_size[1]:
        parser.error(f"--test_size {args.test_size[0]} {args.test_size[1]}: the long side comes second and is no shorter")
    if args.jitter[0] > args.jitter[1]:
        parser.error(f"--jitter {args.jitter[0]:g} {args.jitter[1]:g}: the larger factor comes second")
    return args


# --- data and model ---------------------------------------------------------------------------------------------------


def load_scenes(args: argparse.Namespace, split: str) -> tuple[Scenes, list[str]]:
    """The "train" or "val" pictures, and lines about what was left out."""
    transform = None
    if split == "train":
        transform = augmentation(args.augmentation, args.input_size, args.test_size, args.jitter, args.color_jitter)
    if args.data_set == "embedded":
        count = args.embedded_images[SPLITS.index(split)]
        return embedded_scenes(split, args.input_size, transform, args.seed, count), []
    annotations, images = getattr(args, f"{split}_annotations"), getattr(args, f"{split}_images")
    if not args.data_path and not (annotations and images):
        raise UserError(f"no --data_path; give it, or both --{split}_annotations FILE and --{split}_images DIR")
    root = Path(args.data_path or ".")
    annotations = annotations or root / "annotations" / f"instances_{split}2017.json"
    scenes, lines = folder_scenes(annotations, images or root / f"{split}2017", transform, args.seed)
    return scenes.first(args.val_limit) if split == "val" and args.val_limit else scenes, lines


def make_detector(args: argparse.Namespace, num_classes: int) -> MaskRCNN:
    """The network that the flags describe."""
    with value_errors_are_the_users():
        mean, std = STATISTICS[args.statistics]
        train, test = args.proposals
        return MaskRCNN(
            layouts.make_encoder(args), num_classes, args.fpn_dim, args.box_dim, args.mask_dim, args.anchor_scale, args.masks,
            args.group_norm, args.nms, args.published_heads,
            min_size=args.test_size[0], max_size=args.test_size[1], image_mean=mean, image_std=std,
            rpn_pre_nms_top_n_train=train, rpn_post_nms_top_n_train=train, rpn_pre_nms_top_n_test=test,
            rpn_post_nms_top_n_test=test, box_batch_size_per_image=args.regions, box_score_thresh=args.score_threshold,
        )  # fmt: skip


def load_detector(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, MaskRCNN], list[str], list[int]]:
    """The detectors of --resume, "model" and where there is one "model_ema", ready to evaluate; class names; category ids."""
    content = layouts.read_content(args.resume)
    if not {"classes", "category_ids", "model"} <= content.keys() or not any(name.startswith("rpn.") for name in content["model"]):
        raise UserError(f"{args.resume} holds no detector of detect.py; train one with detect.py --finetune {args.resume}")
    make = partial(make_detector, args, len(content["classes"]))
    return layouts.load_saved(content, make, args.resume, device), content["classes"], content["category_ids"]


# --- the three tasks --------------------------------------------------------------------------------------------------


@torch.no_grad()
def detect(detector: MaskRCNN, scenes: Scenes, args: argparse.Namespace, processes: Processes) -> dict[int, list[dict]]:
    """What is found in every picture that can be read, in COCO's format of results; each is searched by one process, alone.

    Alone, because GRN pools over the padding that pictures of unequal sizes need in a batch.
    """
    unreadable, device, found = Unreadable(scenes, "it is left out"), processes.device, {}
    mine = divided(range(processes.rank, len(scenes), processes.world_size), 1)
    amp_dtype, was_training = autocast_dtype(args.amp, device), detector.training
    detector.eval()
    for (_, index), (pictures, _, failed) in zip(
        (batch[0] for batch in mine), make_loader(scenes, mine, count_workers(args, processes))
    ):
        unreadable.note(failed)
        if failed[0] < 0:
            pictures, _ = scenes.on_device(pictures, [], device)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                result = detector(pictures)[0]
            found[index] = coco.as_results(result, scenes.data_set["images"][index]["id"], scenes.category_ids)
    detector.train(was_training)
    return {index: rows for part in processes.gather(found) for index, rows in part.items()}


def evaluate(
    detectors: dict[str, MaskRCNN], scenes: Scenes, args: argparse.Namespace, processes: Processes
) -> tuple[dict[str, dict], dict[str, dict[int, list[dict]]], str]:
    """COCO's numbers for boxes and masks, all and by class, and the detections, of each detector; and the name of the better one."""
    found = {name: detect(detector, scenes, args, processes) for name, detector in detectors.items()}
    kinds = ("box", "mask") if args.masks and scenes.masks else ("box",)
    scores = processes.from_main(
        lambda: {name: coco.score(scenes.data_set, detections, kinds) for name, detections in found.items()}
    )
    return scores, found, max(scores, key=lambda name: scores[name]["box"]["AP"])


def describe(scores: dict) -> str:
    """The chief numbers, in percent."""
    found = {kind: scores[kind] for kind in ("box", "mask") if kind in scores}
    return ", ".join(f"{kind} AP {100 * each['AP']:.1f} AP50 {100 * each['AP50']:.1f}" for kind, each in found.items())


def evaluate_checkpoint(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Evaluate the checkpoint of --resume on the validation pictures, its moving average too."""
    detectors, classes, _ = load_detector(args, processes.device)
    scenes, lines = load_scenes(args, "val")
    match_classes(classes, scenes.classes)
    scores, found, better = evaluate(detectors, scenes, args, processes)
    if processes.is_main:
        where = f"{args.val_annotations or args.data_path or args.data_set}, short side {args.test_size[0]} px"
        for name, each in scores.items():
            lines.append(f"{name}: {describe(each)} on {each['images']:,} images of {where}")
        print(*lines, sep="\n")
        write_scores(output_dir / "scores.json", scenes, scores[better], found[better])
        print(f"in {output_dir}: scores.json, detections.json and detections.png, of {better}")


def predict(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Draw what is found in every picture, and write it to predictions.json."""
    detectors, classes, category_ids = load_detector(args, processes.device)
    detector = detectors.get("model_ema", detectors["model"])
    paths = find_images(args.predict)
    scenes = pictures_alone(paths, classes, category_ids)
    found = detect(detector, scenes, args, processes)
    if not processes.is_main:
        return
    names, files, folder = dict(zip(category_ids, classes)), [], output_dir / "predictions"
    folder.mkdir(exist_ok=True)
    for index, rows in sorted(found.items()):
        picture = folder / f"{index:05d}-{Path(paths[index]).stem}.png"
        write_png(picture, draw_objects(scenes.open(index), rows, names))
        objects = [{"class": names[row["category_id"]], "score": row["score"], "box": row["bbox"]} for row in rows]
        for each, row in zip(objects, rows):
            each |= {"mask": row["segmentation"]} if "segmentation" in row else {}
        files.append({"file": paths[index], "picture": str(picture), "objects": objects})
        counts = Counter(each["class"] for each in objects)
        print(one_line(f"{paths[index]}: {', '.join(f'{n} {name}' for name, n in counts.most_common()) or 'nothing'}"))
    save_json(output_dir / "predictions.json", files)
    print(f"in {output_dir}: predictions.json (boxes as left, top, width, height), predictions/")


def main(args: argparse.Namespace) -> None:
    """Train, evaluate or predict as `args` (from `get_args`) say."""
    carry_out(args, train, evaluate_checkpoint, predict)


def train(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Train a detector, evaluating after every epoch."""
    with main_process_first():
        scenes, lines = load_scenes(args, "train")
        val, more = (None, []) if args.disable_eval else load_scenes(args, "val")
    if val:
        match_classes(scenes.classes, val.classes)
    args.masks = scenes.masks if args.masks is None else args.masks
    scenes.learn_masks(args.masks)
    run = Run(args, scenes, processes, output_dir)

    torch.manual_seed(args.seed)
    detector = make_detector(args, len(scenes.classes))
    lines += [*more, *flags.describe_origins(args)]
    lines += (
        layouts.load_parts(detector, detector.backbone.encoder, args.finetune, "detector")
        if args.finetune
        else ["random initial weights"]
    )
    to_device(detector, run.device)
    ema = averaged(detector, args.model_ema_decay) if args.model_ema else None
    groups = layer_groups(detector, args.weight_decay, args.layer_decay, "group", detector.backbone.encoder.depths)
    optimizer = make_optimizer(args, groups, run.peak_lr)
    for line in lines:
        run.say(line)
    run.say(
        f"{args.model} with {'masks' if args.masks else 'boxes alone'}: {sum(p.numel() for p in detector.parameters()):,} parameters"
    )
    run.say(f"{args.data_set}: {len(scenes):,} pictures, {scenes.objects:,} objects of {len(scenes.classes)} classes")
    network = run.start(
        detector.train(), optimizer, "detect.py", ema, extra=lambda: {"best": best}, schedule=make_schedule(args, run),
        losses=LOSSES if args.masks else LOSSES[:-1], classes=scenes.classes, category_ids=scenes.category_ids,
    )  # fmt: skip
    if network is None:
        return
    best = run.resumed.get("best", -1.0)
    for epoch in run.epochs():
        for batch in run.batches(epoch):
            with run.autocast():
                losses = network(batch.images, batch.targets)
            if run.backward(losses):
                run.update()

        if val and run.is_due(epoch, args.eval_freq):
            candidates = {"model": detector} | ({"model_ema": ema.module} if ema and args.model_ema_eval else {})
            scores, found, winner = evaluate(candidates, val, args, processes)
            ap = 100 * scores[winner]["box"]["AP"]
            improved, best = ap > best, max(best, ap)
            log_scores(run, epoch + 1, scores, best)
            if improved:
                run.write("scores.json", write_scores, val, scores[winner], found[winner])
                if args.save_ckpt:
                    content = {"model": candidates[winner].state_dict(), "epoch": epoch + 1, "box_AP": best}
                    run.write("checkpoint-best.pth", save_tensors, content | run.origin)
        if run.save_due(epoch):
            run.save(epoch + 1)
    outputs = (
        f"checkpoint-best.pth (box AP {best:.1f}), scores.json, detections.json, detections.png, scores.png"
        if val
        else "checkpoints"
    )
    run.close(f"{outputs}, log.jsonl, config.json")


def make_schedule(args: argparse.Namespace, run: Run) -> Callable[[int], float]:
    """Update -> learning rate: linear from a thousandth of it, by the update; then steps or half a cosine."""
    warmup = min(1000, run.total // 10) if args.warmup_updates is None else args.warmup_updates
    steps = args.steps or [args.epochs * 3 / 4, args.epochs * 11 / 12]

    def rate(update: int) -> float:
        if args.schedule == "steps":
            rate = run.peak_lr * 0.1 ** sum(update >= step * run.updates for step in steps)
        else:
            rate = learning_rate(max(update - warmup, 0), run.peak_lr, args.min_lr, 0, run.total - warmup)
        return rate * min(1, 0.001 + 0.999 * update / warmup) if warmup else rate

    return rate


def log_scores(run: Run, epoch: int, scores: dict[str, dict], best: float) -> None:
    """A line of the log about an evaluation, and scores.png."""
    record = {"epoch": epoch, "update": run.log.done, "best_box_AP": round(best, 4)}
    for name, found in scores.items():
        prefix = "val" if name == "model" else "val_ema"
        record |= {
            f"{prefix}_{kind}_{number}": found[kind][number]
            for kind in ("box", "mask")
            if kind in found
            for number in ("AP", "AP50", "AP75")
        }
    shown = "  ".join(f"{name} {describe(found)}" for name, found in scores.items())
    run.record(record, f"epoch {epoch}/{run.args.epochs}  {shown}  best {best:.1f}")
    run.write("scores.png", draw, run.log.records())


def draw(path: Path, records: list[dict]) -> None:
    """Write scores.png from the log's records."""
    records = [record for record in records if "val_box_AP" in record]
    names = {"box AP": "box_AP", "box AP50": "box_AP50", "mask AP": "mask_AP", "mask AP50": "mask_AP50"}
    curves = {
        title: ([r["epoch"] for r in records], [100 * r[f"val_{name}"] for r in records])
        for title, name in names.items() if f"val_{name}" in records[0]
    }  # fmt: skip
    plot_curves(path, curves, "epoch", "average precision, %", "Validation")


def write_scores(path: Path, scenes: Scenes, scores: dict, found: dict[int, list[dict]]) -> None:
    """scores.json (`path`), and beside it detections.json in COCO's format of results, and detections.png."""
    save_json(path, scores)
    save_json(path.with_name("detections.json"), [row for index in sorted(found) for row in found[index]])
    draw_detections(path.with_name("detections.png"), scenes, found)


if __name__ == "__main__":
    run_script(main, get_args)
