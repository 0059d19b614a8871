"""Fine-tune a ConvNeXt classifier, from pre-trained weights or from scratch; evaluate; predict (paper App. A.1, Tab. 9-13).

    python finetune.py                                                        # embedded data, minutes on a laptop
    python finetune.py --recipe in1k --model convnextv2_base --finetune encoder.pth --data_path IMAGENET
    python finetune.py --eval --resume runs/finetune/checkpoint-best.pth
    python finetune.py --predict cat.jpg holiday/ --resume runs/finetune/checkpoint-best.pth

Flags follow the authors' release. Writes checkpoints, log.jsonl, config.json and accuracy.png to --output_dir.
"""

import argparse
import math
import os
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2

import common
import weights
from common import BoolFlag, Parser, Processes, UserError, mix_seed, number, one_line, one_of
from data import (
    DATA_SETS,
    STATISTICS,
    EpochSampler,
    HeldImages,
    Images,
    ShardSampler,
    Unreadable,
    check_readable,
    choose_data_set,
    evaluation_transform,
    hold,
    list_images,
    load_images,
    make_loader,
    normalise,
    training_transform,
)
from model import MODELS, ConvNeXt
from variants import MLP_NORMS, choose_mlp_norm


def _by_size(sizes: str, **rows) -> dict[str, dict]:
    """A table with a column for each of `sizes` -> the settings of each size."""
    return {size: {name: row[k] for name, row in rows.items()} for k, size in enumerate(sizes.split())}


# The paper's settings (Tab. 9-13), with the released commands' 6.25e-4 where Tab. 11 prints 6.25e-3.
RECIPES = {
    "in1k": _by_size(
        "atto femto pico nano tiny base large huge",
        blr=(2e-4, 2e-4, 2e-4, 2e-4, 8e-4, 6.25e-4, 6.25e-4, 1.25e-3),
        epochs=(600, 600, 600, 600, 300, 100, 100, 50),
        warmup_epochs=(0, 0, 0, 0, 40, 20, 20, 10),
        weight_decay=(0.3, 0.05, 0.3, 0.3, 0.05, 0.05, 0.05, 0.05),
        layer_decay=(0.9, 0.9, 0.9, 0.9, 0.9, 0.6, 0.6, 0.75),
        layer_decay_type=("single", "single", "single", "single", "single", "group", "group", "single"),
        drop_path=(0.1, 0.0, 0.0, 0.1, 0.2, 0.1, 0.2, 0.3),
        mixup=(0.0, 0.3, 0.3, 0.5, 0.8, 0.8, 0.8, 0.8),
        cutmix=(0.0, 0.3, 0.3, 0.5, 1.0, 1.0, 1.0, 1.0),
        smoothing=(0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1),
        model_ema=(True,) * 8,
        images_per_update=(1024,) * 8,
    ),
    "in22k": _by_size(
        "nano tiny base large huge",
        blr=(2.5e-4,) * 5,
        epochs=(90,) * 5,
        warmup_epochs=(5,) * 5,
        weight_decay=(0.05,) * 5,
        layer_decay=(0.9, 0.9, 0.8, 0.8, 0.8),
        drop_path=(0.0, 0.0, 0.1, 0.1, 0.3),
        mixup=(0.8,) * 5,
        cutmix=(1.0,) * 5,
        smoothing=(0.1,) * 5,
        model_ema=(False,) * 5,
        images_per_update=(4096,) * 5,
    ),
    "in22k_to_in1k": _by_size(
        "nano tiny base large huge",
        blr=(2.5e-5,) * 5,
        epochs=(90, 90, 30, 30, 30),
        warmup_epochs=(0,) * 5,
        weight_decay=(1e-8,) * 5,
        layer_decay=(0.9, 0.9, 0.8, 0.8, 0.85),
        drop_path=(0.1, 0.1, 0.2, 0.3, 0.5),
        mixup=(0.0,) * 5,
        cutmix=(0.0,) * 5,
        smoothing=(0.1,) * 5,
        model_ema=(True, True, True, True, False),
        images_per_update=(512,) * 5,
    ),
}

# Defaults that depend on the data; a recipe's settings come before them, the command line before both.
DEFAULTS = {
    "folder": dict(
        model="convnextv2_base", input_size=224, stem_stride=4, batch_size=64, epochs=100, blr=5e-4, aa="rand-m9-mstd0.5-inc1", reprob=0.25
    ),
    "cifar10": dict(
        model="convnextv2_atto", input_size=32, stem_stride=1, batch_size=128, epochs=100, blr=2e-3, aa="rand-m9-mstd0.5-inc1", reprob=0.25,
        crop_pct=1.0,
    ),
    "embedded": dict(
        model="convnextv2_atto", input_size=48, stem_stride=1, batch_size=32, epochs=3, blr=8e-3, aa=None, reprob=0.0,
        crop_pct=1.0, min_crop=0.35,
    ),
}  # fmt: skip
DEFAULTS["cifar100"] = DEFAULTS["cifar10"]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; flags come before the recipe's settings, and those before the defaults of the data set."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    count, positive, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1)
    later = argparse.SUPPRESS  # filled in below, from the recipe or the data set

    add = parser.add_argument_group("task").add_argument
    add("--eval", action=BoolFlag, default=False, help="only evaluate the checkpoint of --resume")
    add(
        "--predict",
        nargs="+",
        default=None,
        metavar="IMAGE",
        help="only classify these files or folders with the checkpoint of --resume",
    )
    add("--linear_probe", action=BoolFlag, default=False, help="train the head alone, on frozen features")
    add(
        "--recipe",
        choices=tuple(RECIPES),
        default=None,
        help="the paper's settings for the model's size; other flags override them",
    )

    add = parser.add_argument_group("model").add_argument
    add("--model", type=one_of("model", MODELS), default=later, metavar="NAME", help=", ".join(MODELS))
    add("--finetune", default=None, metavar="FILE", help="weights to start from, of any layout that weights.py reads")
    add("--scratch", action=BoolFlag, default=False, help="start from random weights even if runs/pretrain/encoder.pth exists")
    add("--stem_stride", type=int, choices=(4, 2, 1), default=later, help="stride of the stem")
    add("--nb_classes", type=number(int, 1, 1_000_000), default=None, help="number of classes (default: as many as the data have)")
    add(
        "--mlp_norm",
        type=one_of("norm", MLP_NORMS),
        default=later,
        metavar="NAME",
        help="in GRN's place, also when the weights have another there: grn to add it, none to drop it (default: as the weights)",
    )
    add("--drop_path", type=share, default=later, help="stochastic depth rate of the last block")
    add(
        "--head_init_scale",
        type=positive,
        default=None,
        help="factor on a new head's weights (default: 0.001 with --finetune, else 1)",
    )

    add = parser.add_argument_group("data").add_argument
    add(
        "--data_path", default=None, metavar="DIR", help="folder with train/ and val/, or where CIFAR lies; none: the embedded data"
    )
    add("--eval_data_path", default=None, metavar="DIR", help="validation images, one folder per class (default: DIR/val)")
    add(
        "--data_set",
        type=one_of("data set", (*DATA_SETS, "image_folder", "IMNET", "CIFAR")),
        default=None,
        metavar="NAME",
        help=", ".join(DATA_SETS),
    )
    add(
        "--holdout",
        type=number(float, 0, 0.9, above=True),
        default=None,
        help="evaluate on this share of the training images, left out of training, and never on the validation images: for tuning",
    )
    add("--labels_per_class", type=count, default=None, help="train on this many images per class, chosen by --seed")
    add("--input_size", type=common.image_side, default=later, help="pixels per side of the network's input")
    add(
        "--num_workers",
        type=common.worker_count,
        default=None,
        help="loading processes per training process (default: up to 8 for folders, else 0)",
    )
    add("--pin_mem", action=BoolFlag, default=True, help="pinned host memory for faster transfer to a GPU")
    add(
        "--hold_data",
        action=BoolFlag,
        default=None,
        help="hold CIFAR or the embedded data on the device and crop and flip there (default: on GPUs, if nothing else is drawn)",
    )
    add(
        "--dist_eval",
        action=BoolFlag,
        default=True,
        help="divide the validation set among processes; else each evaluates all of it",
    )
    add(
        "--crop_pct",
        type=number(float, 0.1, 1),
        default=later,
        help="evaluation: share of the short side kept (default: 224/256, 1 from 384 px on)",
    )

    add = parser.add_argument_group("augmentation").add_argument
    add(
        "--min_crop",
        type=number(float, 0, 1, above=True),
        default=later,
        help="smallest share of the area that a random crop keeps",
    )
    add("--aa", default=later, metavar="NAME", help="automatic augmentation: rand-m9-mstd0.5-inc1, original, trivial, none")
    add("--color_jitter", type=positive, default=None, help="colour jitter when there is no --aa")
    add("--train_interpolation", choices=("bicubic", "bilinear", "nearest"), default="bicubic", help="of random crops")
    add("--reprob", type=share, default=later, help="probability of random erasing")
    add(
        "--remode",
        choices=("pixel", "rand", "const"),
        default="pixel",
        help="erase with noise, one random colour, or the mean colour",
    )
    add("--recount", type=number(int, 1, 100), default=1, help="rectangles to erase")
    add("--mixup", type=number(float, 0), default=later, help="MixUp's alpha; 0: off")
    add("--cutmix", type=number(float, 0), default=later, help="CutMix's alpha; 0: off")
    add("--mixup_prob", type=share, default=1.0, help="probability of mixing a batch at all")
    add("--mixup_switch_prob", type=share, default=0.5, help="probability of CutMix when both are on")
    add("--smoothing", type=share, default=later, help="label smoothing")

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--batch_size", type=count, default=later, help="images per process and forward pass")
    add("--update_freq", type=count, default=1, help="forward passes per update: gradient accumulation")
    add("--epochs", type=count, default=later, help="passes over the data")
    add("--warmup_epochs", type=number(float, 0), default=later, help="epochs of linear warm-up")
    either = group.add_mutually_exclusive_group().add_argument
    either("--blr", type=positive, default=later, help="base learning rate per 256 images; lr = blr * batch / 256")
    either("--lr", type=positive, default=None, help="learning rate itself, instead of --blr")
    add("--min_lr", type=number(float, 0), default=1e-6, help="learning rate at the end of the cosine")
    add("--weight_decay", type=number(float, 0), default=later, help="weight decay of kernels and matrices")
    add(
        "--layer_decay",
        type=number(float, 0, 1, above=True),
        default=later,
        help="factor on the learning rate per layer towards the input",
    )
    add(
        "--layer_decay_type",
        choices=("single", "group"),
        default=later,
        help="a layer is one block, or a group of three (12 groups)",
    )
    add("--opt", choices=("adamw", "adam", "sgd"), default="adamw", help="optimiser")
    add("--opt_eps", type=positive, default=1e-8, help="epsilon of Adam and AdamW")
    add("--opt_betas", type=number(float, 0, 1, below=True), nargs=2, default=(0.9, 0.999), help="betas of Adam and AdamW")
    add("--momentum", type=number(float, 0, 1, below=True), default=0.9, help="Nesterov momentum of SGD")
    add("--clip_grad", type=positive, default=None, help="clip the gradient's norm to this (default: no clipping)")
    add("--model_ema", action=BoolFlag, default=later, help="keep an exponential moving average of the weights")
    add("--model_ema_decay", type=share, default=0.9999, help="its decay; min(this, (1 + t) / (10 + t)) at update t")
    add("--model_ema_eval", action=BoolFlag, default=True, help="evaluate the average too")
    add(
        "--use_amp", action=BoolFlag, default=None, help="mixed precision in bf16, or fp16 on GPUs without it; as the authors' flag"
    )

    add = parser.add_argument_group("evaluation while training").add_argument
    add("--eval_freq", type=count, default=1, help="epochs between evaluations; the last epoch always has one")
    add("--disable_eval", action=BoolFlag, default=False, help="do not evaluate while training")
    common.add_run_flags(parser, "runs/finetune")

    args = parser.parse_args(argv)
    fill_in_defaults(args, parser)
    return args


# Defaults that neither the data set nor a recipe sets.
GENERAL = dict(
    min_crop=0.08, crop_pct=None, mixup=0.0, cutmix=0.0, smoothing=0.1, drop_path=0.0, weight_decay=0.05, warmup_epochs=None,
    layer_decay=1.0, layer_decay_type="single", model_ema=False, images_per_update=None, mlp_norm=None,
)  # fmt: skip


def fill_in_defaults(args: argparse.Namespace, parser: Parser) -> None:
    """Complete the flags that were not given: from the recipe, the weights' own configuration, the data set, in this order."""
    synonyms = {"image_folder": "folder", "IMNET": "folder", "CIFAR": "cifar100"}
    args.data_set = choose_data_set(synonyms.get(args.data_set, args.data_set), args.data_path or args.eval_data_path)
    if (args.eval or args.predict) and not args.resume:
        parser.error(f"--{'eval' if args.eval else 'predict'} needs --resume FILE, a checkpoint to use")
    if args.eval and args.predict:
        parser.error("--eval contradicts --predict; leave one of the two out")
    if args.data_set == "folder" and not (args.data_path or args.eval or args.predict):
        parser.error(f"--eval_data_path {args.eval_data_path} alone has no images to train on; give --data_path DIR, or --eval")
    if args.scratch and args.finetune:
        parser.error(f"--scratch contradicts --finetune {args.finetune}; leave one of the two out")
    ours = Path("runs/pretrain/encoder.pth")
    if (
        not args.finetune
        and not args.scratch
        and args.data_set == "embedded"
        and ours.exists()
        and not args.eval
        and not args.predict
    ):
        args.finetune = str(ours)

    defaults = GENERAL | DEFAULTS[args.data_set]
    file = args.resume if args.eval or args.predict else args.finetune
    if file:
        found = shape_of_weights(file)
        for name in ("model", "stem_stride") if args.eval or args.predict else ():
            if getattr(args, name, found.get(name)) != found.get(name):
                parser.error(
                    f"--{name} {getattr(args, name)}, but {file} has {found.get(name, 'a size of its own')}; leave --{name} out"
                )
        defaults |= found
    model = getattr(args, "model", defaults["model"])
    if args.recipe:
        size = model.split("_")[1]
        if size not in RECIPES[args.recipe]:
            parser.error(f"--recipe {args.recipe} has no settings for size {size}; it has {', '.join(RECIPES[args.recipe])}")
        defaults |= RECIPES[args.recipe][size]
    if args.linear_probe:
        defaults |= dict(drop_path=0.0, layer_decay=1.0, mixup=0.0, cutmix=0.0)
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name, value))

    args.aa = None if args.aa in (None, "none") else args.aa
    if args.warmup_epochs is None:
        args.warmup_epochs = min(20.0, 0.05 * args.epochs)
    common.check_epochs(args, parser)
    if args.head_init_scale is None:
        args.head_init_scale = 0.001 if args.finetune else 1.0
    if args.amp is not None and args.use_amp is not None and args.use_amp != (args.amp != "none"):
        parser.error(f"--amp {args.amp} contradicts --use_amp {str(args.use_amp).lower()}; leave one of the two out")
    if args.amp is None and args.use_amp is not None:
        args.amp = None if args.use_amp and torch.cuda.is_available() else "bf16" if args.use_amp else "none"
    if args.input_size < 8 * args.stem_stride:
        parser.error(
            f"--input_size {args.input_size} is below the {8 * args.stem_stride} pixels that --stem_stride {args.stem_stride} needs; "
            f"raise it, or lower the stride"
        )


def shape_of_weights(path: str) -> dict:
    """Model name, stem stride, and the input size it was trained with, as far as a weights file tells them."""
    native = weights.to_native(weights.read_file(path))
    shape = weights.architecture(native)
    key = (shape["depths"], shape["dims"]), shape["version"]
    names = [name for name, make in MODELS.items() if (make.args, make.keywords["version"]) == key]
    found = {"stem_stride": shape["stem_stride"]} | ({"model": names[0]} if names else {})
    if "mlp_norm" in shape:
        found["mlp_norm"] = weights.mlp_norm_of(native)
    size = weights.read_config(path).get("input_size")
    return found | ({"input_size": size} if isinstance(size, int) else {})


# --- optimisation -----------------------------------------------------------------------------------------------------


def layer_id(name: str, depths: tuple[int, ...], kind: str = "single") -> int:
    """The layer that a parameter belongs to, 0 nearest to the input.

    "single" counts every block; "group" (made for depths 3, 3, 27, 3) takes the blocks of stage 3 by threes, 12 layers in all.
    Norm and head come after all of them.
    """
    last = sum(depths) if kind == "single" else 12
    part, *place = name.split(".")
    if part not in ("downsample_layers", "stages"):
        return last + 1
    i, first = int(place[0]), sum(depths[: int(place[0])])
    if kind == "single":
        return first + 1 + (int(place[1]) if part == "stages" else 0)
    if part == "downsample_layers":
        return (0, 2, 3, 12)[i]
    return (1, 2, 3 + int(place[1]) // 3, 12)[i]


def layer_groups(net: ConvNeXt, weight_decay: float, layer_decay: float, kind: str) -> list[dict]:
    """Optimiser groups with `lr_scale` = layer_decay ** (layers above); UserError for "group" where it does not fit."""
    if kind == "group" and layer_decay != 1 and net.depths != (3, 3, 27, 3):
        raise UserError(f"--layer_decay_type group was made for depths (3, 3, 27, 3), not {net.depths}; use single")
    last = (sum(net.depths) if kind == "single" else 12) + 1
    groups = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (last - layer_id(name, net.depths, kind))
            decay = weight_decay if common.has_weight_decay(name, parameter) else 0.0
            group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(args: argparse.Namespace, groups: list[dict], lr: float, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of --opt, fused where torch has that."""
    fused = device.type in ("cuda", "cpu")
    if args.opt == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=args.momentum, nesterov=args.momentum > 0, fused=fused)
    kind = torch.optim.AdamW if args.opt == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=tuple(args.opt_betas), eps=args.opt_eps, fused=fused)


def make_mixing(args: argparse.Namespace, classes: int) -> v2.Transform | None:
    """MixUp and CutMix of a batch (N, 3, S, S) with labels (N,) -> targets (N, classes); None when both are off."""
    kinds = [(v2.MixUp, args.mixup, 1 - args.mixup_switch_prob), (v2.CutMix, args.cutmix, args.mixup_switch_prob)]
    kinds = [(kind(alpha=alpha, num_classes=classes), share) for kind, alpha, share in kinds if alpha > 0]
    if not kinds:
        return None
    transforms, shares = zip(*kinds)
    either = transforms[0] if len(kinds) == 1 else v2.RandomChoice(list(transforms), p=list(shares))
    return v2.RandomApply([either], p=args.mixup_prob) if args.mixup_prob < 1 else either


def averaged(net: ConvNeXt, decay: float) -> AveragedModel:
    """An exponential moving average of `net` whose decay warms up: min(decay, (1 + t) / (10 + t)) at its update t."""
    ema = AveragedModel(net)

    def update(averages, currents, _):
        t = int(ema.n_averaged)  # on the CPU, unlike the copy that is passed in: reading it does not wait for a GPU
        torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + t) / (10 + t)))

    ema.multi_avg_fn = update
    return ema


# --- data and model ---------------------------------------------------------------------------------------------------


def load_labelled(args: argparse.Namespace) -> tuple[Images | None, Images | None]:
    """Training images (None with --eval) and validation images (None with --disable_eval), of the same classes."""
    train = val = None
    if not args.eval:
        train = load_images(args.data_set, args.data_path, "train", None, args.seed)
        if args.data_set == "folder" and not (Path(args.data_path) / "train").is_dir():
            raise UserError(f"--data_path {args.data_path} has no train/<class>/ folders; fine-tuning needs labelled images")
        check_labels(train)
        train.transform = training_transform(
            args.input_size, train.statistics, args.min_crop, args.train_interpolation, args.aa, args.color_jitter,
            args.reprob, args.remode, args.recount,
        )  # fmt: skip
    if args.holdout and train:
        train, val = hold_out(train, args.holdout)
        val.transform = evaluation_transform(args.input_size, args.crop_pct)
    elif args.eval or not args.disable_eval:
        transform = evaluation_transform(args.input_size, args.crop_pct)
        if args.eval_data_path:
            val = load_images("folder", args.eval_data_path, "val", transform)
        else:
            val = load_images(args.data_set, args.data_path, "val", transform)
        check_labels(val)
    if train and val:
        check_classes(train.classes, val.classes)
    return train, val


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


def hold_out(images: Images, share: float) -> tuple[Images, Images]:
    """The images without a `share` of every class, and that share: always the same ones, whatever the run's seed."""
    held = [
        i for indices in shuffled_by_class(images, mix_seed("holdout")).values() for i in indices[: round(share * len(indices))]
    ]
    if not held:
        raise UserError(f"--holdout {share} of {len(images)} images is none of any class; hold out more")
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


def load_pretrained(net: ConvNeXt, path: str, mlp_norm: str | None = None) -> list[str]:
    """Copy a weights file of any layout into `net`; lines that say what was found and what was left out.

    mlp_norm: what was asked for in GRN's place, where the file may have another.
    """
    found = weights.read_file(path)
    native = weights.to_native(found)
    exchange = mlp_norm not in (None, weights.mlp_norm_of(native))
    return [f"{path}: {weights.describe(found)}", *weights.load_weights(net, native, exchange)]


def load_classifier(path: str, device: torch.device) -> tuple[dict[str, ConvNeXt], list[str] | None]:
    """The classifiers of a checkpoint, "model" and where there is one "model_ema", ready to evaluate; and their class names."""
    content, networks = weights.read_content(path), {}
    for name in ("model", "model_ema"):
        if name == "model" or content.get(name):
            native = weights.to_native(weights.read_file(path, ema=name == "model_ema"))
            shape = weights.architecture(native)
            if not shape["num_classes"]:
                raise UserError(f"{path} holds no classifier but an encoder; train one with finetune.py --finetune {path}")
            if shape["in_chans"] != 3:
                raise UserError(f"{path} takes images of {shape['in_chans']} channels; images here have 3")
            networks[name] = ConvNeXt(**shape).to(device, memory_format=torch.channels_last).eval()
            weights.load_weights(networks[name], native)
    classes = content.get("classes")
    return networks, classes if isinstance(classes, list) and len(classes) == shape["num_classes"] else None


@torch.no_grad()
def evaluate(net: nn.Module, images: Images, args: argparse.Namespace, processes: Processes) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and the cross-entropy, every image counted once, however many processes there are."""
    rank, world_size = (processes.rank, processes.world_size) if args.dist_eval else (0, 1)
    unreadable = Unreadable(images)
    loader = make_loader(
        images,
        ShardSampler(len(images), args.batch_size, rank, world_size),
        common.count_workers(args.num_workers, args.data_set, processes),
        False,
    )
    amp_dtype, was_training = common.autocast_dtype(args.amp, processes.device), net.training
    net.eval()
    sums = torch.zeros(4, device=processes.device, dtype=torch.float64)
    for pixels, labels, failed in loader:
        unreadable.note(failed)
        labels, readable = labels.to(processes.device), (failed < 0).to(processes.device)
        with torch.autocast(processes.device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = net(normalise(pixels, images.statistics, processes.device))  # (N, classes)
        logits, labels = logits.float()[readable], labels[readable]
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (N, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, best[:, 0].sum(), best.any(dim=1).sum(), readable.sum()]).double()
    loss, top1, top5, count = processes.sum(list(sums)) if args.dist_eval else sums.tolist()
    net.train(was_training)
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "images": int(count)}


# --- the three tasks --------------------------------------------------------------------------------------------------


def predict(args: argparse.Namespace, processes: Processes) -> None:
    """Print the five likeliest classes of every image."""
    networks, classes = load_classifier(args.resume, processes.device)
    net = networks.get("model_ema", networks["model"])
    classes = classes or [f"class {k}" for k in range(net.num_classes)]
    paths = []
    for path in args.predict:
        if not os.path.exists(path):
            raise UserError(f"--predict {path} does not exist; give files or folders of images")
        paths += list_images(path) if os.path.isdir(path) else [path]
    if not paths:
        raise UserError(f"no images under {', '.join(args.predict)}; give others with --predict")
    statistics = STATISTICS.get(weights.read_config(args.resume).get("data_set"), STATISTICS["folder"])
    images = Images(paths, None, None, evaluation_transform(args.input_size, args.crop_pct), statistics)
    check_readable(images, " and ".join(args.predict))
    unreadable = Unreadable(images)
    for index, path in enumerate(paths):
        pixels, _, failed = images[0, index]
        if failed >= 0:
            unreadable.note(torch.tensor([failed]))
            continue
        with torch.no_grad():
            probabilities = net(normalise(pixels[None], statistics, processes.device))[0].softmax(dim=0)
        best = probabilities.topk(min(5, len(classes)))
        likeliest = ", ".join(f"{classes[k]} {p:.1%}" for p, k in zip(best.values.tolist(), best.indices.tolist()))
        print(one_line(f"{path}: {likeliest}"))


def evaluate_checkpoint(args: argparse.Namespace, processes: Processes) -> None:
    """Evaluate the checkpoint of --resume on the validation images, its moving average too."""
    networks, classes = load_classifier(args.resume, processes.device)
    _, val = load_labelled(args)
    if classes:
        check_classes(classes, val.classes)
    for name, net in networks.items():
        if len(val.classes) > net.num_classes:
            raise UserError(f"{args.resume} has {net.num_classes} classes, the validation images {len(val.classes)}; give others")
        result = evaluate(net, val, args, processes)
        if processes.is_main:
            print(
                f"{name}: top-1 {result['top1']:.2f}%, top-5 {result['top5']:.2f}%, loss {result['loss']:.4f} on {result['images']:,} images"
            )


def main(args: argparse.Namespace) -> None:
    """Fine-tune, evaluate or predict as `args` (from `get_args`) say."""
    processes = common.setup_processes(args.device, args.timeout_minutes)
    common.set_determinism(args.deterministic)
    if args.predict:
        predict(args, processes)
    elif args.eval:
        evaluate_checkpoint(args, processes)
    else:
        with common.run_directory(args.output_dir, processes) as output_dir:
            train(args, processes, output_dir)


def train(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Train a classifier, evaluating after every epoch."""
    device, world_size = processes.device, processes.world_size
    amp_dtype = common.autocast_dtype(args.amp, device)

    # --- data
    with common.main_process_first():
        images, val = load_labelled(args)
    if args.labels_per_class:
        images = few_labels(images, args.labels_per_class, args.seed)
    images = hold(images, args.hold_data, device)
    args.hold_data = isinstance(images, HeldImages)
    classes = args.nb_classes or len(images.classes)
    if classes < len(images.classes):
        raise UserError(f"--nb_classes {classes} is fewer than the {len(images.classes)} classes of the data; leave it out")
    batch_size = min(args.batch_size, len(images) // world_size)
    if batch_size == 0:
        raise UserError(f"{len(images)} images are too few for {world_size} processes; lower torchrun's --nproc_per_node")
    sampler = EpochSampler(len(images), batch_size, processes.rank, world_size, args.seed)
    pin = args.pin_mem and device.type == "cuda"
    loader = common.TimedLoader(make_loader(images, sampler, common.count_workers(args.num_workers, args.data_set, processes), pin))
    unreadable = Unreadable(images)
    mix = make_mixing(args, classes)

    # --- model
    torch.manual_seed(args.seed)
    net = MODELS[args.model](
        num_classes=classes, stem_stride=args.stem_stride, drop_path_rate=args.drop_path, head_init_scale=args.head_init_scale,
        mlp_norm=choose_mlp_norm(args.mlp_norm, args.model),
    )  # fmt: skip
    report = load_pretrained(net, args.finetune, args.mlp_norm) if args.finetune else ["random initial weights"]
    if args.linear_probe:
        net.requires_grad_(False)
        net.head.requires_grad_(True)
    net.checkpoint_activations(args.checkpoint_activations)
    common.to_device(net, device)
    parameters = [p for p in net.parameters() if p.requires_grad]
    ema = averaged(net, args.model_ema_decay) if args.model_ema else None

    # --- optimiser
    batches = len(sampler)  # forward passes per epoch
    updates = math.ceil(batches / args.update_freq)  # per epoch
    images_per_update = batch_size * min(args.update_freq, batches) * world_size
    peak_lr = common.peak_learning_rate(args, images_per_update)
    optimizer = make_optimizer(args, layer_groups(net, args.weight_decay, args.layer_decay, args.layer_decay_type), peak_lr, device)
    scaler = common.make_scaler(device, amp_dtype)

    # --- resume
    config = vars(args) | {"images": len(images), "images_in_update": images_per_update, "updates_per_epoch": updates}
    config |= {"processes": world_size, "images_per_forward": batch_size * world_size}
    config |= {"images_per_epoch": batches * batch_size * world_size, "nb_classes": classes}
    state = common.load_run(output_dir, args, config, "finetune.py", processes)
    if state["path"]:
        common.restore(state, net, optimizer, scaler)
        if ema and "model_ema" in state:
            ema.module.load_state_dict(state["model_ema"])
            ema.n_averaged.fill_(state["ema_updates"])
    first_epoch, first_update, best = state["epoch"], state["update"], state.get("best", -1.0)
    if first_epoch >= args.epochs:
        if processes.is_main:
            print(f"{output_dir} has already finished its {args.epochs} epochs; choose another --output_dir for a new run")
        return

    network = torch.compile(net) if args.compile else net
    if world_size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)

    if processes.is_main:
        print(
            f"{args.model}: {sum(p.numel() for p in net.parameters()):,} parameters, {sum(p.numel() for p in parameters):,} of them trained"
        )
        print("\n".join(report))
        print(f"{args.data_set}: {len(images):,} images of {len(images.classes)} classes at {args.input_size} px")
        print(f"{images_per_update} images per update, {updates} updates per epoch, {args.epochs} epochs, lr {peak_lr:.2e}")
        print(f"{world_size} x {device.type}, {'float32' if amp_dtype is None else args.amp or amp_dtype}, into {output_dir}")
        if args.recipe:
            print(
                f"recipe {args.recipe}: "
                + ", ".join(f"{name} {getattr(args, name)}" for name in RECIPES[args.recipe][args.model.split("_")[1]])
            )
            if images_per_update != args.images_per_update:
                print(
                    f"the recipe has {args.images_per_update} images per update; the learning rate follows the {images_per_update} here"
                )
        if state["path"]:
            print(f"continuing from {state['path']} at epoch {first_epoch}, update {first_update}")
    log = common.RunLog(output_dir, updates, args.epochs, updates * first_epoch + first_update, state["log"], processes)
    meters = common.Meters(device, state["meters"], processes.rank)
    unreadable.indices = set(state["unreadable"])
    checkpoints = common.Checkpoints(output_dir, args, processes, log, meters)
    about = {"classes": list(images.classes), "config": config, "versions": common.versions()}
    if processes.is_main:
        with log.writing("config.json"):
            common.save_json(output_dir / "config.json", config | {"versions": common.versions()})

    def save(epoch: int, update: int) -> None:
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()} | about
        state |= {"stage": "finetune.py", "best": best}
        if ema:
            state |= {"model_ema": ema.module.state_dict(), "ema_updates": int(ema.n_averaged)}
        checkpoints.save(epoch, update, state, unreadable.indices)

    # --- train
    network.train(not args.linear_probe)
    for epoch in range(first_epoch, args.epochs):
        sampler.epoch, sampler.first_batch = epoch, first_update * args.update_freq
        for batch, (pixels, labels, failed) in enumerate(loader, sampler.first_batch):
            update, turn = divmod(batch, args.update_freq)
            turns = min(args.update_freq, batches - update * args.update_freq)  # an epoch's last update may have fewer
            if turn == 0:
                position = epoch + update / updates
                lr = common.learning_rate(position, peak_lr, args.min_lr, args.warmup_epochs, args.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_scale"]
            unreadable.note(failed)

            torch.manual_seed(mix_seed("step", args.seed, epoch, batch, processes.rank))  # of mixing and stochastic depth
            imgs, labels = normalise(images.render(pixels), images.statistics, device), labels.to(device)
            if mix:
                imgs, labels = mix(imgs, labels)
            last = turn == turns - 1
            with nullcontext() if last or world_size == 1 else network.no_sync():
                with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                    logits = network(imgs)  # (N, classes)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.smoothing)
                scaler.scale(common.guard(loss) / turns).backward()
            meters.add_loss(loss.detach() / turns)
            if not last:
                continue

            meters.end_update(common.apply_update(optimizer, scaler, args.clip_grad, amp_dtype))
            if ema:
                ema.update_parameters(net)
            log.advance()
            if log.done % args.log_every == 0 or update + 1 == updates:
                unreadable.check(processes)
                record = log.report(meters, loader, images_per_update, lr, len(unreadable.indices))
                common.stop_if_diverging(record, output_dir)
            if checkpoints.due():
                save(epoch, update + 1)

        # --- evaluate and save
        first_update = 0
        improved = False
        if val and ((epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs):
            scores = {"model": evaluate(net, val, args, processes)}
            if ema and args.model_ema_eval:
                scores["model_ema"] = evaluate(ema.module, val, args, processes)
            improved = max(score["top1"] for score in scores.values()) > best
            best = max(best, *(score["top1"] for score in scores.values()))
            record = {"epoch": epoch + 1, "update": log.done, "best_top1": round(best, 4)}
            for name, score in scores.items():
                prefix = "val" if name == "model" else "val_ema"
                record |= {f"{prefix}_{key}": round(score[key], 4) for key in ("loss", "top1", "top5")}
            shown = "  ".join(
                f"{name} top-1 {score['top1']:.2f}% top-5 {score['top5']:.2f}% loss {score['loss']:.4f}"
                for name, score in scores.items()
            )
            log.write(record, f"epoch {epoch + 1}/{args.epochs}  {shown}  best {best:.2f}%")
            loader.lap()  # evaluation is not training time
            if processes.is_main:
                with log.writing("accuracy.png"):
                    draw(output_dir, log.records())
        if improved and processes.is_main and args.save_ckpt:  # before the checkpoint: after it, this is not written again
            winner = max(scores, key=lambda name: scores[name]["top1"])
            chosen = (ema.module if winner == "model_ema" else net).state_dict()
            with log.writing("checkpoint-best.pth"):
                common.save_tensors(output_dir / "checkpoint-best.pth", {"model": chosen, "epoch": epoch + 1, "top1": best} | about)
        if checkpoints.due_at_end(epoch):
            save(epoch + 1, 0)
    took = log.close()
    if processes.is_main:
        print(f"finished {args.epochs} epochs after {took}; in {output_dir}:")
        print(
            f"  checkpoint-best.pth (top-1 {best:.2f}%), accuracy.png, log.jsonl, config.json"
            if val
            else "  checkpoints, log.jsonl, config.json"
        )


def draw(output_dir: Path, records: list[dict]) -> None:
    """Write accuracy.png from the log's records."""
    records = [record for record in records if "val_top1" in record]
    curves = {"weights": ([r["epoch"] for r in records], [r["val_top1"] for r in records])}
    if "val_ema_top1" in records[-1]:
        curves["moving average"] = curves["weights"][0], [r["val_ema_top1"] for r in records]
    common.plot_curves(output_dir / "accuracy.png", curves, "epoch", "top-1 accuracy, %", "Validation accuracy")


if __name__ == "__main__":
    common.run_script(main, get_args)
