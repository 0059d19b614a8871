"""Fine-tune a ConvNeXt classifier, from pre-trained weights or from scratch; evaluate; predict (paper App. A.1, Tab. 9-13).

    python finetune.py                                                        # embedded data, minutes on a laptop
    python finetune.py --recipe in1k --model convnextv2_base --finetune encoder.pth --data_path IMAGENET
    python finetune.py --eval --resume runs/finetune/checkpoint-best.pth
    python finetune.py --predict cat.jpg holiday/ --resume runs/finetune/checkpoint-best.pth

Flags follow the authors' release. Writes checkpoints, log.jsonl, config.json and accuracy.png to --output_dir.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from ablations.norms import MLP_NORMS, exchange_norm
from data import Images, check_classes, load_images
from model import MODELS, ConvNeXt, check_size
from plumbing import flags, layouts
from plumbing.devices import autocast_dtype, set_determinism, to_device
from plumbing.files import run_directory, save_tensors
from plumbing.loading import Unreadable, count_workers, divided, make_loader
from plumbing.optim import averaged, layer_groups, make_optimizer
from plumbing.plots import plot_curves
from plumbing.processes import Processes, main_process_first, setup_processes
from plumbing.recipes import RECIPES
from plumbing.run import Run
from plumbing.script import UserError, one_line, run_script, value_errors_are_the_users

# Defaults of a data set; a recipe's settings come before them, the command line before both.
TIMM_AA = "rand-m9-mstd0.5-inc1"
DEFAULTS = {
    "folder": dict(aa=TIMM_AA, reprob=0.25),
    "cifar10": dict(input_size=32, stem_stride=1, batch_size=128, blr=2e-3, aa=TIMM_AA, reprob=0.25, crop_pct=1.0),
    "embedded": dict(input_size=48, stem_stride=1, batch_size=32, epochs=3, blr=8e-3, crop_pct=1.0, min_crop=0.35),
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
    add("--linear_probe", bool, False, "train the head alone, on frozen features")
    add("--recipe", tuple(RECIPES), None, "the paper's settings for the model's size; other flags override them")

    add = parser.adder(parser.add_argument_group("model"))
    add("--model", flags.one_of("model", MODELS), "convnextv2_atto", ", ".join(MODELS))
    add("--finetune", str, None, "weights to start from, of any layout that weights.py reads", metavar="FILE")
    add("--scratch", bool, False, f"start from random weights even if {OURS} exists")
    add("--stem_stride", flags.STRIDES, 4, "stride of the stem")
    add("--nb_classes", flags.class_count, None, "number of classes (default: as many as the data have)")
    add("--mlp_norm", flags.one_of("norm", MLP_NORMS), None, "in GRN's place: grn adds it, none drops it (default: as the weights)")
    add("--drop_path", flags.share, 0.0, "stochastic depth rate of the last block")
    add("--head_init_scale", flags.positive, None, "factor on a new head's weights (default: 0.001 with --finetune, else 1)")

    place = "folder with train/ and val/, or where CIFAR lies; none: embedded data"
    add = flags.add_data_flags(parser, (*data.DATA_SETS, *SYNONYMS), place)
    flags.add_hold_data(add)
    add("--eval_data_path", str, None, "validation images, one folder per class (default: DIR/val)", metavar="DIR")
    add("--holdout", flags.most_share, None, "evaluate on this share of the training images, left out of training: for tuning")
    add("--labels_per_class", flags.count, None, "train on this many images per class, chosen by --seed")
    add("--dist_eval", bool, True, "divide the validation set among processes; else each evaluates all of it")
    add("--crop_pct", flags.crop_share, None, "evaluation: share of the short side kept (default: 224/256, 1 from 384 px on)")

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
    if only_use and not (plain.data_set or plain.data_path or plain.eval_data_path):
        data_set, given.data_path = trained_on(plain.resume)
        if plain.eval and data_set == "folder" and not given.data_path:
            parser.error(f"{plain.resume} does not say what it was trained on; give --data_path DIR, images to evaluate it on")
    if not (plain.finetune or plain.scratch or only_use) and Path(OURS).exists():
        name, place = trained_on(OURS)
        if name == data_set and os.path.realpath(place or "") == os.path.realpath(plain.data_path or ""):
            given.finetune = OURS

    sources, file = {}, plain.resume if only_use else getattr(given, "finetune", None)
    if file:
        sources[file] = layouts.flags_of(file, *(("crop_pct",) if only_use else ()))  # prepared as the training evaluated them
        for name, value in vars(given).items() if only_use else ():
            found = sources[file].get(name, "a size of its own")
            if name in ("model", "stem_stride") and value != found:
                parser.error(f"--{name} {value}, but {file} has {found}; leave --{name} out")
    if data_set == "embedded" and getattr(given, "finetune", None):  # at the full rate, lower layers lose what they have learned
        sources["the short run from pre-trained weights"] = dict(layer_decay=0.7)
    sources[f"the data set {data_set}"] = DEFAULTS[data_set]
    if plain.recipe:
        size = flags.merge(given, parser.general, **sources).model.split("_")[1]
        if size not in RECIPES[plain.recipe]:
            parser.error(f"--recipe {plain.recipe} has no settings for size {size}; it has {', '.join(RECIPES[plain.recipe])}")
        sources = {f"recipe {plain.recipe}": RECIPES[plain.recipe][size]} | sources
    if plain.linear_probe:
        sources = {"--linear_probe": dict(drop_path=0.0, layer_decay=1.0, mixup=0.0, cutmix=0.0)} | sources
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
    if args.eval and args.predict:
        parser.error("--eval contradicts --predict; leave one of the two out")
    if data_set == "folder" and not (args.data_path or args.eval or args.predict):
        parser.error(f"--eval_data_path {args.eval_data_path} alone has no images to train on; give --data_path DIR, or --eval")
    if args.scratch and args.finetune:
        parser.error(f"--scratch contradicts --finetune {args.finetune}; leave one of the two out")


def derive(args: argparse.Namespace, parser: flags.Parser) -> None:
    """Defaults that follow from other values."""
    args.aa = None if args.aa in (None, "none") else args.aa
    if args.warmup_epochs is None:
        args.warmup_epochs = min(20.0, 0.05 * args.epochs)
    flags.check_epochs(args, parser)
    if args.head_init_scale is None:
        args.head_init_scale = 0.001 if args.finetune else 1.0
    flags.settle_amp(args, parser)
    with value_errors_are_the_users():
        check_size(args.input_size, args.input_size, 8 * args.stem_stride, whole_patches=False)


# --- data and model ---------------------------------------------------------------------------------------------------


def load_labelled(args: argparse.Namespace) -> tuple[Images | None, Images | None]:
    """Training images (None with --eval) and validation images (None with --disable_eval), of the same classes."""
    train = val = None
    if not args.eval:
        train = load_images(args.data_set, args.data_path, "train", None, args.seed)
        if args.data_set == "folder" and not (Path(args.data_path) / "train").is_dir():
            raise UserError(f"--data_path {args.data_path} has no train/<class>/ folders; fine-tuning needs labelled images")
        data.check_labels(train)
        crop = args.min_crop, args.train_interpolation
        erasing = args.reprob, args.remode, args.recount
        train.transform = data.training_transform(args.input_size, train.statistics, *crop, args.aa, args.color_jitter, *erasing)
    if args.holdout and train:
        train, val = data.split_holdout(train, args.holdout)
        val.transform = data.evaluation_transform(args.input_size, args.crop_pct)
    elif args.eval or not args.disable_eval:
        source = ("folder", args.eval_data_path) if args.eval_data_path else (args.data_set, args.data_path)
        val = load_images(*source, "val", data.evaluation_transform(args.input_size, args.crop_pct))
        data.check_labels(val)
    if train and val:
        check_classes(train.classes, val.classes)
    if train and args.labels_per_class:
        train = data.few_labels(train, args.labels_per_class, args.seed)
    return train, val


def make_classifier(args: argparse.Namespace, classes: list[str]) -> tuple[ConvNeXt, list[str]]:
    """The network to train, with the weights of --finetune; and lines that say what was found there and what was left out."""
    start = dict(drop_path_rate=args.drop_path, head_init_scale=args.head_init_scale)
    net = MODELS[args.model](num_classes=args.nb_classes, stem_stride=args.stem_stride, **start)
    report = ["random initial weights"]
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
    net.checkpoint_activations(args.checkpoint_activations)
    return net, report


def load_classifier(path: str, device: torch.device) -> tuple[dict[str, ConvNeXt], list[str] | None]:
    """The classifiers of a checkpoint, "model" and where there is one "model_ema", ready to evaluate; and their class names."""
    content, networks = layouts.read_content(path), {}
    for name in ("model", "model_ema"):
        if name == "model" or content.get(name):
            net = layouts.build(layouts.to_native(layouts.read_file(path, ema=name == "model_ema")))
            if not net.num_classes:
                raise UserError(f"{path} holds no classifier but an encoder; train one with finetune.py --finetune {path}")
            if net.in_chans != 3:
                raise UserError(f"{path} takes images of {net.in_chans} channels; images here have 3")
            networks[name] = net.to(device, memory_format=torch.channels_last).eval()
    classes = content.get("classes")
    return networks, classes if isinstance(classes, list) and len(classes) == net.num_classes else None


# --- the three tasks --------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(net: nn.Module, images: Images, args: argparse.Namespace, processes: Processes) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and the cross-entropy, every image counted once, however many processes there are."""
    rank, world_size = (processes.rank, processes.world_size) if args.dist_eval else (0, 1)
    unreadable, device = Unreadable(images, "it is left out"), processes.device
    loader = make_loader(images, divided(range(rank, len(images), world_size), args.batch_size), count_workers(args, processes))
    amp_dtype, was_training = autocast_dtype(args.amp, device), net.training
    net.eval()
    sums = torch.zeros(4, device=device, dtype=torch.float64)
    for pixels, labels, failed in loader:
        unreadable.note(failed)
        imgs, labels = images.on_device(pixels, labels, device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = net(imgs)  # (N, classes)
        readable = (failed < 0).to(device)
        logits, labels = logits.float()[readable], labels[readable]
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (N, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, best[:, 0].sum(), best.any(dim=1).sum(), readable.sum()]).double()
    loss, top1, top5, count = processes.sum(list(sums)) if args.dist_eval else sums.tolist()
    net.train(was_training)
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "images": int(count)}


def evaluate_checkpoint(args: argparse.Namespace, processes: Processes) -> None:
    """Evaluate the checkpoint of --resume on the validation images, its moving average too."""
    networks, classes = load_classifier(args.resume, processes.device)
    _, val = load_labelled(args)
    trained, _ = trained_on(args.resume)
    val.statistics = data.STATISTICS[trained]
    where = f"{args.eval_data_path or args.data_path or args.data_set}, {describe_input(args, trained)}"
    if classes:
        check_classes(classes, val.classes)
    for name, net in networks.items():
        if len(val.classes) > net.num_classes:
            raise UserError(f"{args.resume} has {net.num_classes} classes, the validation images {len(val.classes)}; give others")
        score = evaluate(net, val, args, processes)
        if processes.is_main:
            accuracy = f"top-1 {score['top1']:.2f}%, top-5 {score['top5']:.2f}%"
            print(f"{name}: {accuracy}, loss {score['loss']:.4f} on {score['images']:,} images of {where}")


def describe_input(args: argparse.Namespace, trained: str) -> str:
    """How images are prepared for a checkpoint that was trained on this data set."""
    side = data.short_side(args.input_size, args.crop_pct)
    shape = f"the centre of a short side of {side}" if side else "whole, warped to the square"
    return f"at {args.input_size} px ({shape}), normalised as {trained}"


def predict(args: argparse.Namespace, processes: Processes) -> None:
    """Print the five likeliest classes of every image."""
    networks, classes = load_classifier(args.resume, processes.device)
    net = networks.get("model_ema", networks["model"])
    classes = classes or [f"class {k}" for k in range(net.num_classes)]
    paths = []
    for path in args.predict:
        if not os.path.exists(path):
            raise UserError(f"--predict {path} does not exist; give files or folders of images")
        paths += data.list_images(path) if os.path.isdir(path) else [path]
    if not paths:
        raise UserError(f"no images under {', '.join(args.predict)}; give others with --predict")
    trained, _ = trained_on(args.resume)
    statistics = data.STATISTICS[trained]
    images = Images(paths, None, None, data.evaluation_transform(args.input_size, args.crop_pct), statistics)
    data.check_readable(images, " and ".join(args.predict))
    print(f"{len(paths):,} images {describe_input(args, trained)}")
    unreadable = Unreadable(images, "it is left out")
    for index, path in enumerate(paths):
        pixels, _, failed = images[0, index]
        if failed >= 0:
            unreadable.note(torch.tensor([failed]))
            continue
        with torch.no_grad():
            probabilities = net(data.normalise(pixels[None], statistics, processes.device))[0].softmax(dim=0)
        best = probabilities.topk(min(5, len(classes)))
        likeliest = ", ".join(f"{classes[k]} {p:.1%}" for p, k in zip(best.values.tolist(), best.indices.tolist()))
        print(one_line(f"{path}: {likeliest}"))


def main(args: argparse.Namespace) -> None:
    """Fine-tune, evaluate or predict as `args` (from `get_args`) say."""
    processes = setup_processes(args.device, args.timeout_minutes)
    set_determinism(args.deterministic)
    if args.predict:
        predict(args, processes)
    elif args.eval:
        evaluate_checkpoint(args, processes)
    else:
        with run_directory(args.output_dir, processes) as output_dir:
            train(args, processes, output_dir)


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
    if args.images_per_update not in (None, run.images_per_update):
        run.say(f"the recipe is for {args.images_per_update} images per update; the learning rate follows {run.images_per_update}")
    run.say(f"{args.model}: {parameters:,} parameters, {trained:,} of them trained")
    run.say(f"{args.data_set}: {len(images):,} images of {len(images.classes)} classes at {args.input_size} px")
    network = run.start(
        net.train(not args.linear_probe), optimizer, "finetune.py", ema, extra=lambda: {"best": best}, classes=list(images.classes)
    )
    if network is None:
        return
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
            winner = max(scores, key=lambda name: scores[name]["top1"])
            improved, best = scores[winner]["top1"] > best, max(best, scores[winner]["top1"])
            log_scores(run, epoch + 1, scores, best)
            if improved and args.save_ckpt:
                content = {"model": candidates[winner].state_dict(), "epoch": epoch + 1, "top1": best}
                run.write("checkpoint-best.pth", save_tensors, content | run.origin)
        if run.save_due(epoch):
            run.save(epoch + 1)
    outputs = f"checkpoint-best.pth (top-1 {best:.2f}%), accuracy.png" if val else "checkpoints"
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
