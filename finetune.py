"""Fine-tune a ConvNeXt classifier, evaluate it, predict with it (paper App. A.1, Tab. 9-13).

    python finetune.py                                                        # drawn images, minutes on a laptop
    python finetune.py --recipe in1k --model convnextv2_base --finetune encoder.pth --data_path IMAGENET
    python finetune.py --eval --resume runs/finetune/checkpoint-best.pth
    python finetune.py --predict cat.jpg holiday/ --resume runs/finetune/checkpoint-best.pth

Flags follow the authors' release. Writes checkpoints, log.jsonl, config.json and accuracy.png to --output_dir;
classes.csv, confusion.csv and confusion.png for the best evaluation or --eval; predictions.csv for --predict.
"""

import argparse
import os
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

import data
import weights
from data import Images, load_images
from fast import speed_up
from model import MODELS, ConvNeXt, check_size
from plumbing import augmentation, cli, dist, tasks
from plumbing.files import UserError, make_directory, read_lines, save_csv, value_errors_are_the_users
from plumbing.loading import divided, make_loader, progress
from plumbing.plots import plot_evaluations
from plumbing.recipes import LINEAR_PROBE, RECIPES, SHORT_PROBE
from plumbing.run import Run
from plumbing.scores import classification_scores, describe_prediction, predictions, write_by_class
from plumbing.shapes import DRAWN

# Defaults by data set. A recipe's settings override them; the command line overrides both.
TIMM_AA = "rand-m9-mstd0.5-inc1"
DEFAULTS = {
    "folder": dict(aa=TIMM_AA, reprob=0.25),
    "cifar10": dict(input_size=32, stem_stride=1, batch_size=128, blr=2e-3, aa=TIMM_AA, reprob=0.25, crop_pct=1.0),
    # In so few updates, a head near zero or lower layers with reduced learning rates would hardly learn.
    "embedded": dict(
        model="convnextv2_yocto", input_size=32, stem_stride=1, embedded_images=(200, 1000), batch_size=16, epochs=80,
        warmup_epochs=8, eval_freq=20, blr=3.2e-2, clip_grad=1, crop_pct=1.0, min_crop=0.35, head_init_scale=1.0,
    ),
}  # fmt: skip
DEFAULTS["cifar100"] = DEFAULTS["cifar10"]
SYNONYMS = {"image_folder": "folder", "IMNET": "folder", "CIFAR": "cifar100"}  # the authors' names of data sets
OURS = "runs/pretrain/encoder.pth"  # the output of `python pretrain.py`


# --- command line -----------------------------------------------------------------------------------------------------


def make_parser() -> cli.Parser:
    """Make the parser of all flags."""
    parser = cli.Parser(DEFAULTS, description=__doc__.split("\n\n")[0])
    add = tasks.add_task_flags(parser, "classify", RECIPES)
    add("--topk", type=cli.count, default=5, help="classes that --predict prints for each image")
    add("--linear_probe", action=cli.BoolFlag, default=False, help="train only the head, as MoCo v3 does")

    add = cli.add_model_flags(parser, MODELS, "weights in any layout that weights.py reads, or a run's folder")
    add("--scratch", action=cli.BoolFlag, default=False, help=f"start from random weights, not {OURS}")
    add("--nb_classes", type=cli.count, help="number of classes (the data's)")
    add("--head_init_scale", type=cli.nonnegative, help="scale of a new head's weights (0.001 with --finetune, else 1)")
    add("--layer_scale_init_value", type=cli.positive, default=1e-6, help="LayerScale's initial value; only V1 has it")
    add("--mlp_norm", metavar="NAME", help="replacement of GRN, a name in experiments/norms.py")

    data_path = "folder with train/ and val/, or where CIFAR lies"
    add = cli.add_data_flags(parser, data.DATA_SETS, data_path, DRAWN, synonyms=SYNONYMS)
    add("--eval_data_path", metavar="DIR", help="validation images, one folder per class (DIR/val)")
    add("--class_names", metavar="FILE", help="--eval, --predict: names of the outputs, one per line in order")
    add("--holdout", type=cli.fraction, help="hold out this fraction of the training images")
    add("--labels_per_class", type=cli.count, help="train on this many images per class")
    add("--dist_eval", action=cli.BoolFlag, default=True, help="divide validation images among processes")
    add("--crop_pct", type=cli.number(float, 0.1, 1), help="fraction of the short side to evaluate (224/256)")

    add = parser.add_argument_group("augmentation").add_argument
    add("--min_crop", type=cli.fraction, default=0.08, help="smallest area of a random crop")
    add("--aa", metavar="NAME", help=f"original, trivial, none, or as {TIMM_AA}")
    add("--color_jitter", type=cli.positive, help="colour jitter when there is no --aa")
    interpolations = ("bicubic", "bilinear", "nearest")
    add("--train_interpolation", choices=interpolations, default="bicubic", help="interpolation of random crops")
    add("--reprob", type=cli.fraction, default=0.0, help="probability of random erasing")
    add("--remode", choices=("pixel", "rand", "const"), default="pixel", help="fill of erased rectangles")
    add("--recount", type=cli.count, default=1, help="rectangles to erase")
    add("--mixup", type=cli.nonnegative, default=0.0, help="MixUp's alpha; 0: off")
    add("--cutmix", type=cli.nonnegative, default=0.0, help="CutMix's alpha; 0: off")
    add("--mixup_prob", type=cli.fraction, default=1.0, help="probability of mixing a batch at all")
    add("--mixup_switch_prob", type=cli.fraction, default=0.5, help="probability of CutMix when both are on")
    add("--class_balance", type=cli.fraction, default=0.0, help="classes' loss weights: (fraction of images) ** -this")
    add("--smoothing", type=cli.fraction, default=0.1, help="label smoothing")

    add = cli.add_optimisation_flags(parser, epochs=100, blr=5e-4, min_lr=1e-6, warmup=20)
    tasks.add_transfer_flags(add)
    add("--best_by", choices=("top1", "balanced"), default="top1", help="accuracy that decides the best checkpoint")
    add("--layer_decay_type", choices=("single", "group"), default="single", help="a layer is a block, or up to three")
    cli.add_run_flags(parser, "runs/finetune")
    return parser


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; defaults come from the recipe, the weights' own settings, then the data set."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for pair in (("scratch", "finetune"), ("linear_probe", "recipe"), ("holdout", "eval_data_path")):
        parser.refuse_both(args, *pair)
    only_use, places = bool(args.eval or args.predict), ("data_path", "eval_data_path")
    if not (only_use or args.finetune or args.scratch) and Path(OURS).exists():
        same = data.same_images(trained_on(OURS), (cli.choose_data_set(args, places), args.data_path))
        args.finetune = OURS if same else None
    start = tasks.start_of(args, parser)
    if only_use and not (args.data_set or args.data_path or args.eval_data_path):
        args.data_set, args.data_path = trained_on(start)
    data_set = args.data_set or "folder" if args.predict else cli.choose_data_set(args, places)
    data_path = args.data_path
    if data_set == "folder" and not (data_path or only_use):
        parser.error("--eval_data_path alone has no images to train on; give --data_path DIR")
    parser.take(f"the data set {data_set}", DEFAULTS[data_set])
    if start:
        names = ["image_max"] + ["crop_pct"] * only_use + ["holdout"] * is_held_out(args, start, data_set)
        # Drawn images are smaller here than in pre-training, for more epochs in the same time.
        names += ["input_size"] * (data_set != "embedded" or only_use or args.linear_probe)
        values = weights.flags_of(start, *names)
        if only_use and "://" not in args.resume:
            values["output_dir"] = os.path.dirname(start) or "."
        parser.take(start, values)
        args = parser.parse_args(argv)
    if args.linear_probe:
        parser.take("--linear_probe", LINEAR_PROBE | (SHORT_PROBE if data_set == "embedded" else {}))
    tasks.take_recipe(parser, args, RECIPES)
    args = parser.parse_args(argv)
    parser.report(args)

    args.data_set, args.data_path, args.aa = data_set, data_path, None if args.aa == "none" else args.aa
    args.resume, args.finetune = (start, args.finetune) if only_use else (args.resume, start)
    if args.head_init_scale is None:
        args.head_init_scale = 0.001 if args.finetune else 1.0
    cli.derive(args, warmup=20)
    with value_errors_are_the_users():
        check_size(args.input_size, args.input_size, 8 * args.stem_stride, whole_patches=False)
    return args


def trained_on(path: str) -> tuple[str, str | None]:
    """Read a checkpoint's data set and its path; "folder" and None if the file does not say."""
    config = weights.read_config(path)
    known = config.get("data_set") in data.DATA_SETS
    return (config["data_set"], config.get("data_path")) if known else ("folder", None)


def is_held_out(args: argparse.Namespace, path: str, data_set: str) -> bool:
    """Tell whether --eval uses what the checkpoint's training held out: the same folder, which has no val/."""
    if not args.eval or data_set != "folder" or args.eval_data_path or data.split_folder(args.data_path, "val"):
        return False
    return data.same_images(trained_on(path), (data_set, args.data_path))


# --- data and model ---------------------------------------------------------------------------------------------------


def load_labelled(args: argparse.Namespace) -> tuple[Images | None, Images | None]:
    """Load training images (None with --eval, unless --holdout) and validation images (None with --disable_eval)."""
    train = val = None
    size, source = args.input_size, (args.data_set, args.data_path)
    if not args.eval or args.holdout:
        crop, erasing = (args.min_crop, args.train_interpolation), (args.reprob, args.remode, args.recount)
        more = *crop, args.aa, args.color_jitter, *erasing
        transform = augmentation.training_transform(size, data.STATISTICS[args.data_set], *more)
        train = load_images(*source, "train", transform, args.seed, args.embedded_images[0], args.image_max)
        no_split = args.data_set == "folder" and not data.split_folder(args.data_path, "train")
        if no_split and not (args.holdout or args.eval_data_path or args.disable_eval):
            fix = "if it holds class folders, evaluate on a fraction of them: --holdout 0.2"
            raise UserError(f"--data_path {args.data_path} has no train/<class>/ folders; {fix}")
        data.check_labels(train)
    evaluation = data.evaluation_transform(size, args.crop_pct)
    if args.holdout:
        train, val = data.split_holdout(train, args.holdout)
        val.transform = evaluation
    elif args.eval or not args.disable_eval:
        source = ("folder", args.eval_data_path) if args.eval_data_path else source
        val = load_images(*source, "val", evaluation, count=args.embedded_images[1], image_max=args.image_max)
        data.check_labels(val)
    if train and val:
        data.check_classes(train.classes, val.classes)
    if train and args.labels_per_class:
        train = data.few_labels(train, args.labels_per_class, args.seed)
    return train, val


def make_classifier(args: argparse.Namespace, classes: list[str]) -> tuple[ConvNeXt, list[str]]:
    """Build the network to train, with the weights of --finetune; return it and a report of what was loaded."""
    start = dict(drop_path_rate=args.drop_path, head_init_scale=args.head_init_scale)
    start |= dict(layer_scale_init_value=args.layer_scale_init_value)
    net = MODELS[args.model](num_classes=args.nb_classes, stem_stride=args.stem_stride, **start)
    net.checkpoint_activations(args.checkpoint_activations)
    weights.replace_mlp_norm(net, args.mlp_norm)
    report = ["random initial weights"]
    if args.finetune:
        state_dict = weights.read_file(args.finetune)
        native = weights.to_native(state_dict)
        other_norm = args.mlp_norm not in (None, weights.mlp_norm_of(native))
        if weights.read_content(args.finetune).get("classes", classes) != classes:  # drop a head for other classes
            native = {name: value for name, value in native.items() if not name.startswith("head.")}
        report = [f"{args.finetune}: {weights.describe(state_dict)}", *weights.load_weights(net, native, other_norm)]
    if args.linear_probe:
        net.requires_grad_(False)
        net.head.requires_grad_(True)
    return net, report


# --- the three tasks --------------------------------------------------------------------------------------------------


@record  # torchrun then reports the error of the process that failed first
def main(args: argparse.Namespace) -> None:
    """Train, evaluate or predict as `args` (from `get_args`) say."""
    device = dist.setup(args.device, args.deterministic)
    (predict if args.predict else evaluate_checkpoint if args.eval else train)(args, device)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train a classifier, evaluating after every epoch."""
    with dist.main_process_first():
        images, val = load_labelled(args)
    classes = list(images.classes)
    args.nb_classes = args.nb_classes or len(classes)
    if args.nb_classes < len(classes):
        raise UserError(f"--nb_classes {args.nb_classes} is fewer than the data's {len(classes)} classes; leave it out")

    torch.manual_seed(args.seed)
    net, report = make_classifier(args, classes)
    dist.to_device(speed_up(net), device)
    ema = tasks.averaged(net, args.model_ema_decay) if args.model_ema else None
    groups = tasks.layer_groups(net, args.weight_decay, args.layer_decay, args.layer_decay_type)
    optimizer = tasks.make_optimizer(args, groups)
    mix = augmentation.mixing(args, args.nb_classes)

    by_class = torch.tensor(images.labels).bincount(minlength=args.nb_classes).float()
    class_weights = tasks.class_weights(by_class, args.class_balance).to(device) if args.class_balance else None

    parameters, trained = sum(p.numel() for p in net.parameters()), sum(p.numel() for g in groups for p in g["params"])
    dist.say("\n".join([*report, f"{args.model}: {parameters:,} parameters, {trained:,} of them trained"]))
    uneven = f"{by_class[: len(classes)].min():.0f} to {by_class.max():.0f} a class"
    dist.say(f"{args.data_set}: {len(images):,} images of {len(classes)} classes at {args.input_size} px, {uneven}")
    net.train(not args.linear_probe)
    score, write = partial(evaluate, images=val, args=args, device=device), partial(write_by_class, classes=classes)
    with Run(args, images, device, net, optimizer, "finetune.py", ema, classes=classes) as run:
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                imgs, targets = mix(batch.images, batch.targets)
                with run.autocast:
                    logits = run.network(imgs)  # (N, classes)
                loss = F.cross_entropy(logits.float(), targets, class_weights, label_smoothing=args.smoothing)
                if run.backward(loss):
                    run.update()

            if val and run.evaluation_due(epoch):
                tasks.evaluate(run, epoch, score, args.best_by, describe, write)
                curves = {"weights": "val_top1", "moving average": "val_ema_top1"}
                run.write("accuracy.png", plot_evaluations, run.records, curves, "top-1, %", "Validation accuracy")
            if run.save_due(epoch):
                run.save(epoch + 1)
    best = f"checkpoint-best.pth ({args.best_by} {run.best:.2f}%), classes.csv, confusion.png" if val else "checkpoints"
    run.finish(f"{best}, accuracy.png, log.jsonl, config.json")


@torch.no_grad()
def classify(
    net: nn.Module, images: Images, batches: list, args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield float32 logits (N, classes) and labels (N,) of the readable images of each batch of (0, index)."""
    for batch, (pixels, labels) in zip(batches, progress(make_loader(images, batches, args.num_workers))):
        imgs, labels = images.on_device(pixels, labels, device)
        with dist.autocast(args.amp, device):
            logits = net(imgs)
        readable = images.readable(batch).to(device)
        yield logits.float()[readable], labels[readable]


def evaluate(
    net: nn.Module, images: Images, args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, float], torch.Tensor]:
    """Score a network on every image once; return scores and outcomes (`plumbing.scores.classification_scores`)."""
    rank, world_size = (dist.rank(), dist.world_size()) if args.dist_eval else (0, 1)
    batches, training = divided(range(rank, len(images), world_size), args.batch_size), net.training
    results = classify(net.eval(), images, batches, args, device)
    scores, outcomes = classification_scores(results, device, args.dist_eval)
    net.train(training)
    if len(outcomes) < len(images):
        dist.say(f"{len(images) - len(outcomes)} of {len(images)} images cannot be read and are left out")
    return scores, outcomes


def describe(scores: dict[str, float]) -> str:
    """Put scores into words."""
    top1, balanced, top5, loss = (scores[name] for name in ("top1", "balanced", "top5", "loss"))
    return f"top-1 {top1:.2f}%, balanced {balanced:.2f}%, top-5 {top5:.2f}%, loss {loss:.4f}"


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device) -> None:
    """Evaluate the --resume checkpoint and its moving average; write the better one's accuracy by class."""
    networks, names = weights.load_classifier(args.resume, device)
    _, val = load_labelled(args)
    data_set, _ = trained_on(args.resume)
    val.statistics, outputs = data.STATISTICS[data_set], networks["model"].num_classes
    names = read_lines(args.class_names) if args.class_names else names or val.classes
    if len(names) > outputs or (names is val.classes and len(names) < outputs):
        fix = "name the outputs, one per line in their order, in a file for --class_names"
        raise UserError(f"{args.resume} has {outputs} outputs, and there are {len(names)} names of classes; {fix}")
    data.check_classes(names, val.classes, all=False)
    number = {name: k for k, name in enumerate(names)}
    val.labels = [number[val.classes[label]] for label in val.labels]
    if len(val.classes) < len(names):
        dist.say(f"the images have {len(val.classes)} of the {len(names)} classes of {args.resume}")
    held = f" ({args.holdout:.0%} of each class, held out)" if args.holdout else ""
    prepared = data.describe_evaluation(args.input_size, args.crop_pct, data_set)
    where = f"{args.eval_data_path or args.data_path or args.data_set}{held}, {prepared}"
    results = {name: evaluate(net, val, args, device) for name, net in networks.items()}
    for name, (scores, outcomes) in results.items():
        dist.say(f"{name}: {describe(scores)} on {len(outcomes):,} images of {where}")
    if dist.rank() == 0:
        _, outcomes = max(results.values(), key=lambda result: result[0][args.best_by])
        names = [*names, *(f"(output {k})" for k in range(len(names), outputs))]
        used, outcomes = outcomes.unique(return_inverse=True)  # without classes that no image has
        write_by_class(Path(args.output_dir), outcomes, [names[k] for k in used.tolist()])
        print(f"in {args.output_dir}: classes.csv, confusion.csv and confusion.png")


def predict(args: argparse.Namespace, device: torch.device) -> None:
    """Print the most likely classes of every image, and write them to predictions.csv, in the order given."""
    networks, names = weights.load_classifier(args.resume, device)
    net = networks.get("model_ema", networks["model"])
    names = read_lines(args.class_names) if args.class_names else names or []
    classes = [*names, *(f"class {k}" for k in range(len(names), net.num_classes))]
    paths, (data_set, _) = data.find_images(args.predict, image_max=args.image_max), trained_on(args.resume)
    transform = data.evaluation_transform(args.input_size, args.crop_pct)
    images = Images(paths, range(len(paths)), None, transform, data.STATISTICS[data_set])  # labels are positions
    images.image_max = args.image_max
    dist.say(f"{len(paths):,} images {data.describe_evaluation(args.input_size, args.crop_pct, data_set)}")
    part, rows = -(-len(paths) // dist.world_size()), []
    batches = divided(range(len(paths))[dist.rank() * part :][:part], args.batch_size)
    for logits, positions in classify(net, images, batches, args, device):
        rows += predictions([paths[k] for k in positions.tolist()], logits, classes, min(args.topk, len(classes)))
    rows = [*chain(*dist.gather(rows))]
    if dist.rank() == 0:
        make_directory(args.output_dir)
        save_csv(Path(args.output_dir, "predictions.csv"), rows)
        for row in rows:
            print(describe_prediction(row))
        print(f"in {args.output_dir}: predictions.csv of {len(rows):,} images")


if __name__ == "__main__":
    main(get_args())
