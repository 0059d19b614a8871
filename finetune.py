"""Fine-tune a ConvNeXt classifier, from pre-trained weights or from scratch; evaluate; predict (paper App. A.1, Tab. 9-13).

    python finetune.py                                                        # embedded data, minutes on a laptop
    python finetune.py --recipe in1k --model convnextv2_base --finetune encoder.pth --data_path IMAGENET
    python finetune.py --eval --resume runs/finetune/checkpoint-best.pth
    python finetune.py --predict cat.jpg holiday/ --resume runs/finetune/checkpoint-best.pth

Flags follow the authors' release. Writes to --output_dir: checkpoints, log.jsonl, config.json and accuracy.png; of the best evaluation,
or that of --eval, classes.csv, confusion.csv and confusion.png; predictions.csv of --predict.
"""

import plumbing  # isort: skip (first: Ctrl-C then ends the imports below, which take seconds, without a traceback)
import argparse
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from ablations.norms import MLP_NORMS, exchange_norm
from data import Images, check_classes, load_images
from model import MODELS, ConvNeXt, check_size
from plumbing import flags, layouts
from plumbing.devices import autocast_dtype, to_device
from plumbing.files import file_of_run, save_csv, save_tensors, write_files
from plumbing.layouts import load_classifier
from plumbing.loading import Unreadable, count_workers, divided, make_loader
from plumbing.optim import averaged, layer_groups, make_optimizer
from plumbing.plots import plot_curves
from plumbing.processes import Processes, main_process_first
from plumbing.recipes import LINEAR_PROBE, RECIPES, SHORT_PROBE
from plumbing.run import Run, carry_out
from plumbing.scores import better, by_class, describe_prediction, predictions, scores_of
from plumbing.script import UserError, counted, run_script, value_errors_are_the_users

# Defaults of a data set; a recipe's settings come before them, the command line before both.
TIMM_AA = "rand-m9-mstd0.5-inc1"
DEFAULTS = {
    "folder": dict(aa=TIMM_AA, reprob=0.25),
    "cifar10": dict(input_size=32, stem_stride=1, batch_size=128, blr=2e-3, aa=TIMM_AA, reprob=0.25, crop_pct=1.0),
    # In so few updates a head that starts near zero, or lower layers at lower rates, hardly learn.
    "embedded": dict(
        input_size=48, stem_stride=1, batch_size=32, epochs=3, blr=8e-3, crop_pct=1.0, min_crop=0.35, head_init_scale=1.0
    ),
}
DEFAULTS["cifar100"] = DEFAULTS["cifar10"]
SYNONYMS = {"image_folder": "folder", "IMNET": "folder", "CIFAR": "cifar100"}  # the authors' names of data sets
OURS = "runs/pretrain/encoder.pth"  # what `python pretrain.py` leaves


# --- command line -----------------------------------------------------------------------------------------------------


def make_parser() -> flags.Parser:
    """All flags."""
    parser = flags.Parser(DEFAULTS, description=__doc__.split("\n\n")[0])
    add = parser.adder(parser.add_argument_group("task"))
    add("--eval", bool, False, "only evaluate the checkpoint of --resume")
    add("--predict", str, None, "only classify these files or folders with the checkpoint of --resume", nargs="+", metavar="IMAGE")
    add("--topk", flags.count, None, "classes that --predict tells of each image (default: 5, or all of fewer)")
    add("--linear_probe", bool, False, "train the head alone, on frozen features, by MoCo v3's protocol (docs/experiments.md)")
    add("--recipe", tuple(RECIPES), None, "the paper's settings for the model's size; other flags override them")

    add = parser.adder(parser.add_argument_group("model"))
    add("--model", flags.one_of("model", MODELS), "convnextv2_atto", ", ".join(MODELS))
    add("--finetune", str, None, "weights to start from, of any layout that weights.py reads, or a run's folder", metavar="PATH")
    add("--scratch", bool, False, f"start from random weights even if {OURS} exists")
    add("--stem_stride", flags.STRIDES, 4, "stride of the stem")
    flags.add_layer_scale(add)
    add("--nb_classes", flags.class_count, None, "number of classes (default: as many as the data have)")
    add("--mlp_norm", flags.one_of("norm", MLP_NORMS), None, "in GRN's place: grn adds it, none drops it (default: as the weights)")
    add("--drop_path", flags.share, 0.0, "stochastic depth rate of the last block")
    add("--head_init_scale", flags.positive, None, "factor on a new head's weights (default: 0.001 with --finetune, else 1)")

    place = "folder with train/ and val/, or where CIFAR lies; none: embedded data"
    add = flags.add_data_flags(parser, (*data.DATA_SETS, *SYNONYMS), place, drawn=data.DRAWN)
    flags.add_hold_data(add)
    add("--eval_data_path", str, None, "validation images, one folder per class (default: DIR/val)", metavar="DIR")
    add("--holdout", flags.most_share, None, "evaluate on this share of the training images, left out of training: for tuning")
    add("--labels_per_class", flags.count, None, "train on this many images per class, chosen by --seed")
    add("--dist_eval", bool, True, "divide the validation set among processes; else each evaluates all of it")
    add(
        "--crop_pct", flags.crop_share, None, "evaluation: share of the sides kept (default: 224/256; all up to 32 and from 384 px)"
    )

    add = parser.adder(parser.add_argument_group("augmentation"))
    add("--min_crop", flags.some_share, 0.08, "smallest share of the area that a random crop keeps")
    add("--aa", str, None, f"automatic augmentation: {TIMM_AA}, original, trivial, none", metavar="NAME")
    add("--color_jitter", flags.positive, None, "colour jitter when there is no --aa")
    add("--train_interpolation", ("bicubic", "bilinear", "nearest"), "bicubic", "of random crops")
    add("--reprob", flags.share, 0.0, "probability of random erasing")
    add("--remode", ("pixel", "rand", "const"), "pixel", "erase with noise, one random colour, or the mean colour")
    add("--recount", flags.number(int, 1, 100), 1, "rectangles to erase")
    add("--mixup", flags.not_negative, 0.0, "MixUp's alpha; 0: off")
    add("--cutmix", flags.not_negative, 0.0, "CutMix's alpha; 0: off")
    add("--mixup_prob", flags.share, 1.0, "probability of mixing a batch at all")
    add("--mixup_switch_prob", flags.share, 0.5, "probability of CutMix when both are on")
    add("--smoothing", flags.share, 0.1, "label smoothing")

    add = flags.add_optimisation_flags(parser, epochs=100, blr=5e-4, min_lr=1e-6, warmup="20, or 5% of short runs")
    flags.add_transfer_flags(add)
    add("--layer_decay_type", ("single", "group"), "single", "a layer is one block, or a group of three (12 groups)")
    add = parser.adder(parser.add_argument_group("evaluation while training"))
    add("--eval_freq", flags.count, 1, "epochs between evaluations; the last epoch always has one")
    add("--disable_eval", bool, False, "do not evaluate while training")
    flags.add_run_flags(parser, "runs/finetune")
    return parser


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; then come the recipe, the weights' own configuration, the data set, and the general defaults."""
    parser = make_parser()
    given = parser.parse_args(argv)
    plain = flags.merge(given, parser.general)
    data_set = data.choose_data_set(SYNONYMS.get(plain.data_set, plain.data_set), plain.data_path or plain.eval_data_path)
    check_task(plain, data_set, parser)
    only_use = plain.eval or plain.predict
    if only_use:
        given.resume = plain.resume = file_of_run(plain.resume, "checkpoint-best.pth", "newest")
    elif plain.finetune:
        given.finetune = plain.finetune = file_of_run(plain.finetune, "checkpoint-best.pth", "encoder.pth", "newest")
    trained = trained_on(plain.resume) if only_use else None
    if only_use and not (plain.data_set or plain.data_path or plain.eval_data_path):
        data_set, given.data_path = trained
        if plain.eval and data_set == "folder" and not given.data_path:
            parser.error(f"{plain.resume} does not say what it was trained on; give --data_path DIR, images to evaluate it on")
    unsaid = not (plain.finetune or plain.scratch or only_use)
    if unsaid and Path(OURS).exists() and data.same_images(trained_on(OURS), (data_set, plain.data_path)):
        given.finetune = OURS

    as_trained = ("crop_pct",) if only_use else ()  # images are prepared as the training evaluated them
    if plain.eval and data_set == "folder" and not plain.eval_data_path and data.same_images(trained, (data_set, given.data_path)):
        as_trained += () if data.split_folder(given.data_path, "val") else ("holdout",)  # never evaluated on what was trained on
    sources = {"the place of --resume": dict(output_dir=os.path.dirname(plain.resume) or ".")} if only_use else {}
    file = plain.resume if only_use else getattr(given, "finetune", None)
    if file:
        sources[file] = layouts.flags_of(file, *as_trained)
        for name, value in vars(given).items() if only_use else ():
            found = sources[file].get(name, "a size of its own")
            if name in ("model", "stem_stride") and value != found:
                parser.error(f"--{name} {value}, but {file} has {found}; leave --{name} out")
    sources[f"the data set {data_set}"] = DEFAULTS[data_set]
    if plain.recipe:
        size = flags.merge(given, parser.general, **sources).model.split("_")[1]
        if size not in RECIPES[plain.recipe]:
            parser.error(f"--recipe {plain.recipe} has no settings for size {size}; it has {', '.join(RECIPES[plain.recipe])}")
        sources = {f"recipe {plain.recipe}": RECIPES[plain.recipe][size]} | sources
    if plain.linear_probe:
        sources = {"--linear_probe": LINEAR_PROBE | (SHORT_PROBE if data_set == "embedded" else {})} | sources
    args = flags.merge(given, parser.general | {"images_per_update": None}, **sources)  # no flag: what a recipe was made for
    args.data_set = data_set
    derive(args, parser)
    return args


def trained_on(path: str) -> tuple[str, str | None]:
    """The data set that a checkpoint was trained on, and where it lay: a folder of unknown place if the file does not say."""
    config = layouts.read_config(path)
    return (config["data_set"], config.get("data_path")) if config.get("data_set") in data.DATA_SETS else ("folder", None)


def check_task(args: argparse.Namespace, data_set: str, parser: flags.Parser) -> None:
    """A parser error for flags that contradict each other, or lack another."""
    if (args.eval or args.predict) and not args.resume:
        parser.error(f"--{'eval' if args.eval else 'predict'} needs --resume FILE, a checkpoint to use")
    if data_set == "folder" and not (args.data_path or args.eval or args.predict):
        parser.error(f"--eval_data_path {args.eval_data_path} alone has no images to train on; give --data_path DIR, or --eval")
    for pair in (("eval", "predict"), ("holdout", "eval_data_path"), ("scratch", "finetune"), ("linear_probe", "recipe")):
        flags.refuse_both(args, parser, *pair)


def derive(args: argparse.Namespace, parser: flags.Parser) -> None:
    """Defaults that follow from other values."""
    args.aa = None if args.aa in (None, "none") else args.aa
    if args.warmup_epochs is None:
        args.warmup_epochs = min(20.0, 0.05 * args.epochs)
    flags.check_run(args, parser)
    flags.check_layer_scale(args, parser)
    if args.head_init_scale is None:
        args.head_init_scale = 0.001 if args.finetune else 1.0
    flags.settle_amp(args, parser)
    with value_errors_are_the_users():
        check_size(args.input_size, args.input_size, 8 * args.stem_stride, whole_patches=False)
    if args.origins["min_crop"] == "the command line" and args.input_size <= 32 and not (args.eval or args.predict):
        shifted = f"at --input_size {args.input_size}: up to 32 px images are padded and shifted"
        parser.error(f"--min_crop {args.min_crop:g} does nothing {shifted}; leave it out, or raise --input_size")


# --- data and model ---------------------------------------------------------------------------------------------------


def load_labelled(args: argparse.Namespace) -> tuple[Images | None, Images | None]:
    """Training images (None with --eval, but for --holdout) and validation images (None with --disable_eval), of the same classes."""
    train = val = None
    if not args.eval or args.holdout:
        train = load_images(args.data_set, args.data_path, "train", None, args.seed, args.embedded_images[0])
        if args.data_set == "folder" and not data.split_folder(args.data_path, "train"):
            whole = f"{args.data_path} has no train/<class>/ folders"
            if not (args.holdout or args.eval_data_path or args.disable_eval):
                raise UserError(f"--data_path {whole}; if it holds class folders, evaluate on a share of them: --holdout 0.2")
            data.remark(f"{whole}: all of it is taken, and the {len(train.classes or ())} folders in it for classes")
        data.check_labels(train)
        crop = args.min_crop, args.train_interpolation
        erasing = args.reprob, args.remode, args.recount
        train.transform = data.training_transform(args.input_size, train.statistics, *crop, args.aa, args.color_jitter, *erasing)
    if args.holdout:
        train, val = data.split_holdout(train, args.holdout)
        val.transform = data.evaluation_transform(args.input_size, args.crop_pct)
    elif args.eval or not args.disable_eval:
        source = ("folder", args.eval_data_path) if args.eval_data_path else (args.data_set, args.data_path)
        val = load_images(*source, "val", data.evaluation_transform(args.input_size, args.crop_pct), count=args.embedded_images[1])
        data.check_labels(val)
    if train and val:
        check_classes(train.classes, val.classes)
    if train and args.labels_per_class:
        train = data.few_labels(train, args.labels_per_class, args.seed)
    return train, val


def make_classifier(args: argparse.Namespace, classes: list[str]) -> tuple[ConvNeXt, list[str]]:
    """The network to train, with the weights of --finetune; and lines that say what was found there and what was left out."""
    start = dict(drop_path_rate=args.drop_path, head_init_scale=args.head_init_scale)
    start |= dict(layer_scale_init_value=args.layer_scale_init_value)
    net = MODELS[args.model](num_classes=args.nb_classes, stem_stride=args.stem_stride, **start)
    report = ["random initial weights"]
    net.checkpoint_activations(args.checkpoint_activations)
    if args.mlp_norm:
        with value_errors_are_the_users():
            exchange_norm(net, args.mlp_norm)
    if args.finetune:
        found = layouts.read_file(args.finetune)
        native = layouts.to_native(found)
        exchange = args.mlp_norm not in (None, layouts.mlp_norm_of(native))
        if layouts.read_content(args.finetune).get("classes", classes) != classes:  # a head for others is none
            native = {name: value for name, value in native.items() if not name.startswith("head.")}
        report = [f"{args.finetune}: {layouts.describe(found)}", *layouts.load_weights(net, native, exchange)]
    if args.linear_probe:
        net.requires_grad_(False)
        net.head.requires_grad_(True)
    return net, report


# --- the three tasks --------------------------------------------------------------------------------------------------


@torch.no_grad()
def classify(net: nn.Module, images: Images, batches: list, args: argparse.Namespace, processes: Processes) -> Iterator[tuple]:
    """Batch by batch (`divided`), the float32 logits (N, classes) and the labels (N,) of those images that can be read."""
    unreadable, device = Unreadable(images, "it is left out"), processes.device
    amp_dtype = autocast_dtype(args.amp, device)
    for pixels, labels, failed in make_loader(images, batches, count_workers(args, processes)):
        unreadable.note(failed)
        imgs, labels = images.on_device(pixels, labels, device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = net(imgs)
        readable = (failed < 0).to(device)
        yield logits.float()[readable], labels[readable]


def evaluate(net: nn.Module, images: Images, args: argparse.Namespace, processes: Processes) -> dict:
    """The scores (`plumbing.scores.scores_of`) of a network, every image counted once, however many processes there are."""
    rank, world_size = (processes.rank, processes.world_size) if args.dist_eval else (0, 1)
    batches, was_training = divided(range(rank, len(images), world_size), args.batch_size), net.training
    found = scores_of(classify(net.eval(), images, batches, args, processes), processes, args.dist_eval)
    net.train(was_training)
    return found


def evaluate_checkpoint(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Evaluate the checkpoint of --resume on the validation images, its moving average too; by class, the better of the two."""
    networks, classes = load_classifier(args.resume, processes.device)
    _, val = load_labelled(args)
    trained, _ = trained_on(args.resume)
    val.statistics = data.STATISTICS[trained]
    held = f" ({args.holdout:.0%} of each class, held out)" if args.holdout else ""
    prepared = data.describe_evaluation(args.input_size, args.crop_pct, trained)
    where = f"{args.eval_data_path or args.data_path or args.data_set}{held}, {prepared}"
    if classes:
        check_classes(classes, val.classes)
    scores = {}
    for name, net in networks.items():
        if len(val.classes) > net.num_classes:
            found = f"{args.resume} has {counted(net.num_classes, 'class')}, the validation images {len(val.classes)}"
            raise UserError(f"{found}; give others")
        scores[name] = found = evaluate(net, val, args, processes)
        if processes.is_main:
            accuracy = f"top-1 {found['top1']:.2f}%, top-5 {found['top5']:.2f}%"
            print(f"{name}: {accuracy}, loss {found['loss']:.4f} on {counted(found['images'], 'image')} of {where}")
    if processes.is_main:
        winner = better(scores)
        write_files(output_dir, by_class(scores[winner]["outcomes"], val.classes), f" of {winner}" * (len(scores) > 1))


def predict(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Print the likeliest classes of every image, in the order given, and write them to predictions.csv."""
    networks, classes = load_classifier(args.resume, processes.device)
    net = networks.get("model_ema", networks["model"])
    classes = classes or [f"class {k}" for k in range(net.num_classes)]
    topk = args.topk or min(5, len(classes))
    if topk > len(classes):
        raise UserError(f"--topk {topk} is more than the {len(classes)} classes of {args.resume}; lower it")
    paths, (trained, _) = data.find_images(args.predict), trained_on(args.resume)
    transform = data.evaluation_transform(args.input_size, args.crop_pct)
    images = Images(paths, range(len(paths)), None, transform, data.STATISTICS[trained])  # an image's label is its place
    data.check_readable(images, " and ".join(args.predict))
    if processes.is_main:
        print(f"{counted(len(paths), 'image')} {data.describe_evaluation(args.input_size, args.crop_pct, trained)}")
    batches, rows = divided(range(len(paths)), args.batch_size), []
    mine = batches[processes.rank :: processes.world_size]  # so that one batch of each process makes a stretch of the order
    found = classify(net, images, mine, args, processes)
    parts = (predictions([paths[k] for k in places.tolist()], logits, classes, topk) for logits, places in found)
    for _ in range(0, len(batches), processes.world_size):
        for row in chain(*processes.gather(next(parts, []))):
            rows.append(row)
            if processes.is_main:
                print(describe_prediction(row))
    if processes.is_main:
        left_out = f" ({len(paths) - len(rows):,} could not be read)" if len(rows) < len(paths) else ""
        write_files(output_dir, {"predictions.csv": (save_csv, rows)}, f" of {counted(len(rows), 'image')}{left_out}")


def main(args: argparse.Namespace) -> None:
    """Fine-tune, evaluate or predict as `args` (from `get_args`) say."""
    carry_out(args, train, evaluate_checkpoint, predict)


def train(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Train a classifier, evaluating after every epoch."""
    with main_process_first():
        images, val = load_labelled(args)
    images = data.hold_on_device(images, args, processes.device)
    run = Run(args, images, processes, output_dir)
    if args.nb_classes and args.nb_classes < len(images.classes):
        raise UserError(f"--nb_classes {args.nb_classes} is fewer than the {len(images.classes)} classes of the data; leave it out")
    args.nb_classes = args.nb_classes or len(images.classes)

    torch.manual_seed(args.seed)
    net, report = make_classifier(args, list(images.classes))
    to_device(net, run.device)
    ema = averaged(net, args.model_ema_decay) if args.model_ema else None
    optimizer = make_optimizer(args, layer_groups(net, args.weight_decay, args.layer_decay, args.layer_decay_type), run.peak_lr)
    mix = data.mixing(args, args.nb_classes)

    parameters, trained = (sum(p.numel() for p in net.parameters() if p.requires_grad or every) for every in (True, False))
    for line in (*flags.describe_origins(args), *report):
        run.say(line)
    if Path(OURS).exists() and not (args.finetune or args.scratch):
        run.say(f"{OURS} was pre-trained on other data ({' '.join(filter(None, trained_on(OURS)))}); --finetune {OURS} takes it")
    run.say(f"{args.model}: {parameters:,} parameters, {trained:,} of them trained")
    run.say(f"{args.data_set}: {counted(len(images), 'image')} of {counted(len(images.classes), 'class')} at {args.input_size} px")
    network = run.start(
        net.train(not args.linear_probe), optimizer, "finetune.py", ema, extra=lambda: {"best": best}, classes=list(images.classes)
    )
    if network is None:
        return
    if len(images.classes) == 1:
        run.warn(f"all images are of one class, {images.classes[0]}, so there is nothing to learn; add folders train/<class>/")
    best = run.resumed.get("best", -1.0)
    for epoch in run.epochs():
        for batch in run.batches(epoch):
            imgs, targets = mix(batch.images, batch.targets)
            with run.autocast():
                logits = network(imgs)  # (N, classes)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=args.smoothing)
            if run.backward(loss):
                run.update()

        if val and run.is_due(epoch, args.eval_freq):
            candidates = {"model": net} | ({"model_ema": ema.module} if ema and args.model_ema_eval else {})
            scores = {name: evaluate(each, val, args, processes) for name, each in candidates.items()}
            winner = better(scores)
            improved, best = scores[winner]["top1"] > best, max(best, scores[winner]["top1"])
            log_scores(run, epoch + 1, scores, best)
            for name, file in by_class(scores[winner]["outcomes"], val.classes).items() if improved else ():
                run.write(name, *file)
            if improved and args.save_ckpt:
                content = {"model": candidates[winner].state_dict(), "epoch": epoch + 1, "top1": best}
                run.write("checkpoint-best.pth", save_tensors, content | run.origin)
        if run.save_due(epoch):
            run.save(epoch + 1)
    outputs = f"checkpoint-best.pth (top-1 {best:.2f}%), its classes.csv and confusion.png, accuracy.png" if val else "checkpoints"
    run.close(f"{outputs}, log.jsonl, config.json")


def log_scores(run: Run, epoch: int, scores: dict[str, dict], best: float) -> None:
    """A line of the log about an evaluation, and accuracy.png."""
    record = {"epoch": epoch, "update": run.log.done, "best_top1": round(best, 4)}
    for name, score in scores.items():
        prefix = "val" if name == "model" else "val_ema"
        record |= {f"{prefix}_{key}": round(score[key], 4) for key in ("loss", "top1", "top5")}
    shown = "  ".join(f"{name} top-1 {s['top1']:.2f}% top-5 {s['top5']:.2f}% loss {s['loss']:.4f}" for name, s in scores.items())
    run.record(record, f"epoch {epoch}/{run.args.epochs}  {shown}  best {best:.2f}%")
    run.write("accuracy.png", draw, run.log.records())


def draw(path: Path, records: list[dict]) -> None:
    """Write accuracy.png from the log's records."""
    records = [record for record in records if "val_top1" in record]
    curves = {"weights": ([r["epoch"] for r in records], [r["val_top1"] for r in records])}
    if "val_ema_top1" in records[-1]:
        curves["moving average"] = curves["weights"][0], [r["val_ema_top1"] for r in records]
    plot_curves(path, curves, "epoch", "top-1 accuracy, %", "Validation accuracy")


if __name__ == "__main__":
    run_script(main, get_args)
