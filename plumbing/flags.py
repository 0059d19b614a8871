"""The command line: flags that check themselves, groups of them that several scripts share, and where each value came from."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable

import torch

from plumbing.script import exit_with

# --- the parser -------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, which never guesses abbreviated flags, and which leaves defaults to `merge`.

    by_data: data set -> its defaults, for `--help`.
    """

    def __init__(self, by_data: dict[str, dict] | None = None, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)
        self.general, self.by_data = {}, by_data or {}  # flag -> its default, where nothing more special has one

    def adder(self, container=None) -> Callable:
        """A function that adds a flag to the parser, or to a group of it: `add("--name", kind, default, "what it does")`.

        kind: bool, a tuple of choices, or an argparse type. More than one name may be given, separated by a space.
        """

        def add(names: str, kind: type | tuple | Callable, default, help: str, **more) -> None:
            if kind is bool:
                more |= dict(action=BoolFlag)
            elif isinstance(kind, tuple):
                more |= dict(choices=kind, type=type(kind[0]))
            else:
                more |= dict(type=kind) | (dict(metavar="NAME") if hasattr(kind, "names") else {})
            dest = names.split()[0].strip("-")
            self.general[dest] = default
            add_argument = (container or self).add_argument
            add_argument(*names.split(), default=argparse.SUPPRESS, help=self._with_defaults(help, dest, default), **more)

        return add

    def _with_defaults(self, help: str, dest: str, default) -> str:
        shown = [] if default is None else [_shown(default)]
        shown += [f"{data_set} {_shown(values[dest])}" for data_set, values in self.by_data.items() if dest in values]
        help = help if "default:" in help or not shown else f"{help} (default: {', '.join(shown)})"
        return help.replace("%", "%%")  # argparse fills in what stands behind a single one

    def error(self, message: str) -> None:
        """End the script with one line and status 2."""
        exit_with(2, f"{message} (see --help)")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; a flag with an empty value is an error."""
        words = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["an argument", *words], words):
            if not word or re.fullmatch("--[a-z_]+=", word):  # where a flag is optional, it would pass for one not given
                self.error(f"{word.rstrip('=') or before} has an empty value; was a shell variable not set?")
        return super().parse_known_args(words, namespace)

    def parse_args(self, args=None, namespace=None):
        """As argparse's; a mistyped flag is met with the nearest that there is."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0].replace("-", "_")
            near = difflib.get_close_matches(name, [option.replace("-", "_") for option in self._option_string_actions], 1)
            hint = f"; did you mean --{near[0].strip('_')}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found


def _shown(value) -> str:
    return (
        f"{value:g}" if isinstance(value, float) else " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    )


class Settings(argparse.Namespace):
    """The value of every flag; `origins`, which is none of them, tells where each came from."""

    __slots__ = ("origins",)  # outside of vars()


def merge(given: argparse.Namespace, general: dict, **sources: dict) -> Settings:
    """The value of every flag of `general`: from the command line, else from the first of `sources` that has it, else the default.

    sources: name -> values of flags, the strongest first.
    """
    settings = Settings()
    settings.origins = {}
    layers = {"the command line": vars(given)} | sources | {"default": general}
    for name in dict.fromkeys([*general, *vars(given)]):
        origin = next(origin for origin, values in layers.items() if name in values)
        setattr(settings, name, layers[origin][name])
        settings.origins[name] = origin
    return settings


def describe_origins(settings: argparse.Namespace) -> list[str]:
    """A line for each source but the command line and the general defaults: what was taken from it."""
    found = {}
    for name, origin in getattr(settings, "origins", {}).items():
        if origin not in ("the command line", "default"):
            found.setdefault(origin, []).append(f"{name} {getattr(settings, name)}")
    return [f"from {origin}: {', '.join(values)}" for origin, values in found.items()]


# --- kinds of values --------------------------------------------------------------------------------------------------


class BoolFlag(argparse.BooleanOptionalAction):
    """`--flag`, `--no-flag`, `--flag true` and `--flag false`."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, **kwargs)
        self.nargs, self.metavar = "?", "true|false"

    def __call__(self, parser, namespace, value, option_string=None):
        words = {None: True, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        key = value.lower() if isinstance(value, str) else None
        if key not in words or (key is not None and option_string.startswith("--no-")):
            parser.error(f"{option_string} {value}: expected true or false, as in {self.option_strings[0]} true")
        setattr(namespace, self.dest, words[key] and not option_string.startswith("--no-"))


def one_of(what: str, names: Iterable[str]) -> Callable[[str], str]:
    """An argparse type that takes one of `names` and suggests the nearest for a typo."""
    names = list(names)

    def check(value: str) -> str:
        if value in names:
            return value
        near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"no {what} {value!r}; {hint}")

    check.names = names
    return check


def number(kind: type, low: float, high: float | None = None, *, above: bool = False, below: bool = False) -> Callable:
    """An argparse type for an int or float in [low, high]; without `low` itself when `above`, without `high` when `below`.

    No `high` is 10**9 for an int, and any finite number for a float.
    """
    high = high if high is not None else 10**9 if kind is int else sys.float_info.max

    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
        if not low <= value <= high or (above and value == low) or (below and value == high):
            lower = f"{'more than' if above else 'at least'} {low}"
            upper = " and finite" if high == sys.float_info.max else f" and {'less than' if below else 'at most'} {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {lower}{upper}")
        return value

    return check


# Larger numbers are slips: they would fill the memory.
image_side, worker_count, class_count = number(int, 8, 4096), number(int, 0, 1024), number(int, 1, 1_000_000)
count, seed_number = number(int, 1), number(int, 0, 2**63 - 1)
positive, not_negative, below_one = number(float, 0, above=True), number(float, 0), number(float, 0, 1, below=True)
crop_share, most_share = number(float, 0.1, 1), number(float, 0, 0.9, above=True)
share, some_share, proper_share = number(float, 0, 1), number(float, 0, 1, above=True), number(float, 0, 1, above=True, below=True)


# --- groups that scripts share ----------------------------------------------------------------------------------------

STRIDES = (4, 2, 1)
DEVICES = "cuda, cpu or mps (default: cuda if there is one, else cpu)"


def add_data_flags(
    parser: Parser, data_sets: Iterable[str], data_path: str, input_size: int = 224, drawn: tuple[int, int] = (4000, 1000)
) -> Callable:
    """What to train on; `data_path` is the help of --data_path, `drawn` how many embedded images there are.

    Returns the function that adds to the group.
    """
    add = parser.adder(parser.add_argument_group("data"))
    add("--data_path", str, None, data_path, metavar="DIR")
    add("--data_set", one_of("data set", data_sets), None, ", ".join(data_sets))
    add("--embedded_images", count, drawn, "embedded data: how many to draw, to train and to validate", nargs=2, metavar="N")
    add("--input_size", image_side, input_size, "pixels per side of the network's input")
    add("--num_workers", worker_count, None, "loading processes per training process (default: up to 8 for folders, else 0)")
    add("--pin_mem", bool, True, "pinned host memory, for faster transfer to a GPU")
    return add


def add_hold_data(add: Callable) -> None:
    """For images that `data.hold_on_device` may hold."""
    add("--hold_data", bool, None, "hold CIFAR or embedded data on the device, crop and flip there (default: on GPUs, if it can)")


def add_optimisation_flags(parser: Parser, epochs: int, blr: float, min_lr: float, warmup: str | None) -> Callable:
    """Batches, epochs and the learning rate. Returns the function that adds more.

    `warmup` tells the default of --warmup_epochs; None where a script counts its warm-up otherwise.
    """
    group = parser.add_argument_group("optimisation")
    add, either = parser.adder(group), parser.adder(group.add_mutually_exclusive_group())
    add("--batch_size", count, 64, "images per process and forward pass")
    add("--update_freq", count, 1, "forward passes per update: gradient accumulation")
    add("--epochs", count, epochs, "passes over the data")
    if warmup:
        add("--warmup_epochs", not_negative, None, f"epochs of linear warm-up (default: {warmup})")
    either("--blr", positive, blr, "base learning rate per 256 images; lr = blr * images per update / 256")
    either("--lr", positive, None, "learning rate itself, instead of --blr")
    add("--min_lr", not_negative, min_lr, "learning rate at the end of the cosine")
    add("--weight_decay", not_negative, 0.05, "weight decay of kernels and matrices")
    add("--clip_grad", positive, None, "clip the gradient's norm to this (default: no clipping)")
    return add


def add_transfer_flags(add: Callable) -> None:
    """How what was pre-trained is trained further: layers' rates, optimiser, moving average."""
    add("--layer_decay", some_share, 1.0, "factor on the learning rate per layer towards the input")
    add("--opt", ("adamw", "adam", "sgd"), "adamw", "optimiser")
    add("--opt_eps", positive, 1e-8, "epsilon of Adam and AdamW")
    add("--opt_betas", below_one, (0.9, 0.999), "betas of Adam and AdamW", nargs=2)
    add("--momentum", below_one, 0.9, "Nesterov momentum of SGD")
    add("--model_ema", bool, False, "keep an exponential moving average of the weights")
    add("--model_ema_decay", share, 0.9999, "its decay; min(this, (1 + t) / (10 + t)) at update t")
    add("--model_ema_eval", bool, True, "evaluate the average too")
    add("--use_amp", bool, None, "mixed precision in bf16, or fp16 on GPUs without it; the authors' flag for --amp")


def add_run_flags(parser: Parser, output_dir: str, compile: bool = True) -> None:
    """The flags about a run itself; `compile` where the network can be compiled."""
    add = parser.adder(parser.add_argument_group("run"))
    add("--amp", ("none", "bf16", "fp16"), None, "autocast type (default: bf16 or fp16 on GPUs, none on CPUs)")
    if compile:
        add("--compile", bool, False, "torch.compile the network: a minute of start-up for faster steps")
    add("--checkpoint_activations", bool, False, "keep only each block's input for backward: less memory, slower steps")
    add("--output_dir", str, output_dir, "where everything is written", metavar="DIR")
    add("--device", str, None, DEVICES)
    add("--seed", seed_number, 0, "of everything random: weights, order, crops, masks, mixing, --labels_per_class")
    add(
        "--resume",
        str,
        None,
        "continue from this checkpoint, or the newest of a run's folder; finetune.py evaluates or predicts with it too",
        metavar="PATH",
    )
    add("--auto_resume", bool, True, "continue from the newest checkpoint in --output_dir, if any")
    add("--start_epoch", number(int, 0), 0, "first epoch, when not resuming")
    add("--save_ckpt", bool, True, "write checkpoints")
    add("--save_ckpt_freq", count, 1, "epochs between checkpoints")
    add("--save_every_steps", count, None, "updates between checkpoints, inside epochs too", metavar="N")
    add("--save_every_minutes", positive, None, "minutes between checkpoints, inside epochs too", metavar="M")
    add("--save_ckpt_num", count, 3, "newest checkpoints to keep")
    add("--resume_anyway", bool, False, "continue a run that was started with other settings")
    add("--log_every", count, 20, "updates between lines of the log")
    add("--deterministic", bool, False, "the same bits from every run on a GPU too, by slower kernels; CPU runs need it not")
    add("--timeout_minutes", positive, 10.0, "how long a process waits for another one that does not answer")


def refuse_both(args: argparse.Namespace, parser: Parser, *pair: str) -> None:
    """A parser error if both of two flags are given."""
    if all(getattr(args, name) for name in pair):
        one, other = (f"--{name}" + f" {getattr(args, name)}" * isinstance(getattr(args, name), str | float) for name in pair)
        parser.error(f"{one} contradicts {other}; leave one of the two out")


def add_layer_scale(add: Callable) -> None:
    """Where ConvNeXt V1's LayerScale starts."""
    add("--layer_scale_init_value", positive, 1e-6, "first value of LayerScale, which only V1 has; 1 suits short runs")


def check_layer_scale(args: Settings, parser: Parser) -> None:
    """A parser error if --layer_scale_init_value is given where it does nothing."""
    if args.origins["layer_scale_init_value"] == "the command line":
        given = f"--layer_scale_init_value {args.layer_scale_init_value:g}"
        if args.model.startswith("convnextv2_"):
            parser.error(f"{given} is for ConvNeXt V1, and {args.model} has no LayerScale; leave it out, or use --model convnext_*")
        if getattr(args, "finetune", None):
            parser.error(f"{given} does nothing to the weights of --finetune {args.finetune}, which hold LayerScale; leave it out")


def settle_amp(args: argparse.Namespace, parser: Parser) -> None:
    """Put the authors' --use_amp into `args.amp`; a parser error where both are given and differ."""
    if args.use_amp is not None and args.amp is not None and args.use_amp != (args.amp != "none"):
        parser.error(f"--amp {args.amp} contradicts --use_amp {str(args.use_amp).lower()}; leave one of the two out")
    if args.use_amp is not None and args.amp is None:
        args.amp = None if args.use_amp and torch.cuda.is_available() else "bf16" if args.use_amp else "none"


def check_run(args: argparse.Namespace, parser: Parser) -> None:
    """A parser error for warm-up or a start beyond the last epoch, and for what only embedded data have."""
    if args.origins["embedded_images"] == "the command line" and args.data_set != "embedded":
        parser.error(f"--embedded_images is of the embedded data, and these are {args.data_set}; leave it out")
    if getattr(args, "warmup_epochs", 0) > args.epochs:
        parser.error(f"--warmup_epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}; lower it, or raise --epochs")
    if args.start_epoch and args.start_epoch >= args.epochs:
        parser.error(f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}; lower it, or raise --epochs")
