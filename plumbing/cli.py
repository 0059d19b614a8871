"""The command line: groups of flags that scripts share, and defaults that follow from other flags."""

import argparse
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from plumbing import dist
from plumbing.files import UserError

NONE = MappingProxyType({})
# Flags that a beginner needs, which `--help` shows first.
FIRST = ("data_path", "finetune", "init_weight", "recipe", "model", "input_size", "epochs", "batch_size")
FIRST += ("output_dir", "resume", "eval", "predict", "checkpoint", "images")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that can parse again with defaults that flags imply (`take`, weakest first).

    by_data: data set -> its defaults, also shown by `--help`.
    """

    def __init__(self, by_data: Mapping[str, dict] = NONE, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=lambda prog: Help(prog, by_data), **kwargs)
        self.by_data, self.origins = by_data, {}

    def parse_args(self, argv: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parse as argparse does, but expand ~ in --flag=~/path, which shells do not."""
        words = [word.replace("=~", "=\0~").split("\0") for word in (sys.argv[1:] if argv is None else argv)]
        return super().parse_args(["".join(map(os.path.expanduser, parts)) for parts in words], namespace)

    def error(self, message: str) -> None:
        """End the script with one line, without the usage."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n" if dist.local_rank() == 0 else None)

    def format_help(self) -> str:
        """Show the description and a line per flag, the most needed ones first."""
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        groups = {"to begin with": [action for action in self._actions if action.dest in FIRST]}
        for group in self._action_groups:
            groups[group.title] = [a for a in group._group_actions if a.dest not in (*FIRST, "help")]
        for title, actions in groups.items():
            formatter.start_section(title)  # empty sections are not shown
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text("In parentheses: the default, and that of data sets which have their own.")
        return formatter.format_help()

    def refuse_both(self, args: argparse.Namespace, one: str, other: str) -> None:
        """End with an error where two flags contradict each other."""
        if getattr(args, one) and getattr(args, other):
            self.error(f"--{one} contradicts --{other}; leave one of the two out")

    def take(self, origin: str, values: Mapping) -> None:
        """Make `values`, flag -> value, the defaults of the next `parse_args`."""
        self.set_defaults(**values)
        self.origins |= dict.fromkeys(values, origin)

    def report(self, args: argparse.Namespace) -> None:
        """Print a line for each origin: the values taken from it that the command line does not override."""
        taken = {}
        for name, origin in self.origins.items():
            if getattr(args, name) == self.get_default(name) is not None:
                taken.setdefault(origin, []).append(f"{name} {getattr(args, name)}")
        for origin, values in taken.items():
            dist.say(f"from {origin}: {', '.join(values)}")


class Help(argparse.HelpFormatter):
    """Show each flag in one line: its choices, its default, and data sets' defaults."""

    def __init__(self, prog: str, by_data: Mapping[str, dict]):
        super().__init__(prog, max_help_position=30, width=max(100, shutil.get_terminal_size().columns - 2))
        self.by_data = by_data

    def _format_action_invocation(self, action):
        if isinstance(action, BoolFlag) or not action.option_strings:
            return (action.option_strings or [action.metavar])[0]
        kind = getattr(action.type, "__name__", "str")
        value = action.metavar or {"int": "N", "float": "X"}.get(kind, "NAME")
        values = f"{value} ..." if action.nargs == "+" else " ".join([value] * (action.nargs or 1))
        return f"{action.option_strings[0]} {values}"

    def _get_help_string(self, action):
        def text(value):
            return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

        words = [] if action.default in (None, False, argparse.SUPPRESS) else [text(action.default)]
        if action.default is True:
            words = [f"on; off by --no-{action.dest}"]
        for name, defaults in self.by_data.items():
            if action.dest in defaults and name != "cifar100":  # cifar10's are the same
                words.append(f"{name} {text(defaults[action.dest])}")
        choices = f": {', '.join(map(str, action.choices))}" if action.choices and not action.metavar else ""
        shown = f" ({', '.join(words)})" if words else ""
        return f"{action.help}{choices}{shown}".replace("%", "%%")  # argparse would expand a single %


class BoolFlag(argparse.BooleanOptionalAction):
    """`--flag`, `--no-flag`, `--flag true` and `--flag false`, as in the authors' commands."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, **kwargs)
        self.nargs, self.metavar = "?", "true|false"

    def __call__(self, parser, namespace, value, option_string=None):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        negated = option_string.startswith("--no-")
        if value is not None and (value.lower() not in words or negated):
            parser.error(f"{option_string} {value}: expected true or false, as in {self.option_strings[0]} true")
        setattr(namespace, self.dest, not negated if value is None else words[value.lower()])


class BaseRate(argparse.Action):
    """--blr, which also clears an --lr that a data set or recipe implies."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.blr, namespace.lr = value, None


def number(kind: type, low: float, high: float | None = None, above: bool = False) -> Callable[[str], float]:
    """Make an argparse type for an int or float in [low, high], excluding `low` if `above`."""
    high = high if high is not None else 2**63 - 1 if kind is int else math.inf

    def check(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or value == math.inf or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not in {'(' if above else '['}{low:g}, {high:g}]")
        return value

    check.__name__ = kind.__name__  # for "invalid int value"
    return check


count, fraction = number(int, 1, 10**9), number(float, 0, 1)
nonnegative, positive = number(float, 0), number(float, 0, above=True)


# --- groups of flags --------------------------------------------------------------------------------------------------


def add_model_flags(parser: Parser, models: Mapping, finetune: str | None = None) -> Callable:
    """Add the network's flags; `finetune` is the help of --finetune."""
    add = parser.add_argument_group("model").add_argument
    sizes = ", ".join(dict.fromkeys(name.split("_")[1] for name in models))
    add("--model", choices=models, default="convnextv2_atto", metavar="NAME", help=f"convnextv2_ or convnext_ {sizes}")
    if finetune:
        add("--finetune", metavar="PATH", help=finetune)
        add("--drop_path", type=fraction, default=0.0, help="stochastic depth rate of the last block")
    add("--stem_stride", type=int, choices=(4, 2, 1), default=4, help="stride of the stem; a patch is 8 times as wide")
    return add


def add_data_flags(
    parser: Parser, data_sets: Sequence[str], data_path: str, drawn: tuple[int, int], input_size: int = 224,
    synonyms: Mapping[str, str] = NONE,
) -> Callable:  # fmt: skip
    """Add the images' flags; `data_path` is the help of --data_path, `drawn` the default number of drawn images."""

    def data_set(name: str) -> str:
        return synonyms.get(name, name)

    add = parser.add_argument_group("data").add_argument
    add("--data_path", metavar="DIR", help=data_path)
    add("--data_set", type=data_set, choices=data_sets, metavar="NAME", help=", ".join(data_sets))
    drawn_help = "drawn images for training and for validation"
    add("--embedded_images", type=count, default=drawn, nargs=2, metavar="N", help=drawn_help)
    add("--input_size", type=number(int, 8, 4096), default=input_size, help="pixels per side of the input")
    add("--image_max", type=positive, help="white in 16-bit and floating-point images (65535, or 1)")
    workers = "loading processes per training process (up to 8 for folders, else 0)"
    add("--num_workers", type=number(int, 0, 1024), help=workers)
    return add


def add_optimisation_flags(parser: Parser, epochs: int, blr: float, min_lr: float, warmup: int | None) -> Callable:
    """Add batches, epochs and the learning rate; `warmup` is None for scripts that count it in updates."""
    group = parser.add_argument_group("optimisation")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--batch_size", type=count, default=64, help="images per process and forward pass")
    add("--update_freq", type=count, default=1, help="forward passes per update: gradient accumulation")
    add("--epochs", type=count, default=epochs, help="passes over the data")
    if warmup is not None:
        add("--warmup_epochs", type=nonnegative, help=f"epochs of linear warm-up ({warmup}, or 5% of short runs)")
    rate = "learning rate per 256 images of an update"
    either("--blr", type=positive, action=BaseRate, default=blr, help=rate)
    either("--lr", type=positive, help="learning rate, whatever the batch size")
    add("--min_lr", type=nonnegative, default=min_lr, help="learning rate at the end")
    add("--weight_decay", type=nonnegative, default=0.05, help="weight decay of kernels and matrices")
    add("--clip_grad", type=positive, help="clip the gradient's norm to this")
    return add


def add_run_flags(parser: Parser, output_dir: str, compile: bool = True) -> None:
    """Add the run's flags: precision, output, checkpoints, log; `compile` if the network can be compiled."""
    add = parser.add_argument_group("run").add_argument
    add("--amp", choices=("none", "bf16", "fp16"), help="autocast type, by default the fastest safe one")
    parser.set_defaults(compile=False)
    if compile:
        add("--compile", action=BoolFlag, help="torch.compile the network: a slow start for faster steps")
    add("--checkpoint_activations", action=BoolFlag, default=False, help="less memory, slower steps")
    add("--output_dir", default=output_dir, metavar="DIR", help="where everything is written")
    add("--log_dir", metavar="DIR", help="also log for TensorBoard here; needs its package")
    add("--device", help="cuda, cpu or mps (cuda if there is one, else cpu)")
    seed = "seed of weights, order, crops, masks, mixing"
    add("--seed", type=number(int, 0), default=0, help=seed)
    resume = "checkpoint or run's folder to continue, evaluate or predict with"
    add("--resume", metavar="PATH", help=resume)
    add("--save_ckpt", action=BoolFlag, default=True, help="write checkpoints")
    add("--save_ckpt_freq", type=count, default=1, help="epochs between checkpoints")
    add("--save_ckpt_num", type=count, default=3, help="newest checkpoints to keep")
    add("--save_every_steps", type=count, metavar="N", help="also save every N updates within an epoch")
    add("--log_every", type=count, default=20, help="updates between lines of the log")
    deterministic = "bitwise reproducible on a GPU too"
    add("--deterministic", action=BoolFlag, default=False, help=deterministic)


# --- defaults that follow from other values ---------------------------------------------------------------------------


def choose_data_set(args: argparse.Namespace, enough: Sequence[str] = ("data_path",)) -> str:
    """Choose the data set that --data_set and paths (`enough`) imply; UserError if they contradict each other."""
    place = any(getattr(args, name) for name in enough)
    if args.data_set == "folder" and not place:
        raise UserError("--data_set folder needs --data_path DIR")
    if args.data_set == "embedded" and place:
        raise UserError("--data_set embedded draws its images; leave out either it or --data_path")
    return args.data_set or ("folder" if place else "embedded")


def derive(args: argparse.Namespace, warmup: int | None = None) -> None:
    """Fill in defaults that follow from other values: warm-up, workers, precision."""
    if warmup is not None and args.warmup_epochs is None:
        args.warmup_epochs = min(float(warmup), 0.05 * args.epochs)
    if args.num_workers is None:
        per_process = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.num_workers = min(8, max(1, per_process)) if args.data_set == "folder" else 0
    use_amp = getattr(args, "use_amp", None)
    if use_amp is not None and args.amp is None:
        args.amp = "none" if not use_amp else None if torch.cuda.is_available() else "bf16"
