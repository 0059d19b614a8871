"""Shared by fine-tuning, detection and segmentation: flags and their defaults, optimisers, evaluation."""

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from plumbing import cli, dist, optim
from plumbing.files import UserError, file_of_run, save_tensors
from plumbing.run import Run

# --- flags ------------------------------------------------------------------------------------------------------------


def add_task_flags(parser: cli.Parser, predicts: str, recipes: Sequence[str]) -> Callable:
    """Add --eval, --predict and --recipe; return the function that adds to their group."""
    group = parser.add_argument_group("task")
    either = group.add_mutually_exclusive_group().add_argument
    either("--eval", action=cli.BoolFlag, default=False, help="only evaluate --resume")
    either("--predict", nargs="+", metavar="IMAGE", help=f"only {predicts} these files or folders with --resume")
    group.add_argument("--recipe", choices=recipes, help="published settings for the model's size")
    return group.add_argument


def add_transfer_flags(add: Callable) -> None:
    """Add flags for training pre-trained weights: layers' learning rates, optimiser, moving average, evaluation."""
    add("--layer_decay", type=cli.fraction, default=1.0, help="learning rate's factor per layer towards the input")
    add("--opt", choices=("adamw", "adam", "sgd"), default="adamw", help="optimiser")
    add("--opt_eps", type=cli.positive, default=1e-8, help="epsilon of Adam and AdamW")
    add("--opt_betas", type=cli.fraction, default=(0.9, 0.999), nargs=2, help="betas of Adam and AdamW")
    add("--momentum", type=cli.fraction, default=0.9, help="Nesterov momentum of SGD")
    add("--model_ema", action=cli.BoolFlag, default=False, help="keep an exponential moving average of the weights")
    add("--model_ema_decay", type=cli.fraction, default=0.9999, help="decay; at most (1 + t) / (10 + t) at update t")
    add("--model_ema_eval", action=cli.BoolFlag, default=True, help="evaluate the average too")
    add("--use_amp", action=cli.BoolFlag, help="the authors' flag for --amp")
    add("--eval_freq", type=cli.count, default=1, help="epochs between evaluations")
    add("--disable_eval", action=cli.BoolFlag, default=False, help="do not evaluate while training")


def start_of(args: argparse.Namespace, parser: cli.Parser) -> str | None:
    """Find the weights that --eval, --predict or --finetune start from; of a run's folder, the best checkpoint."""
    if not (args.eval or args.predict):
        return args.finetune and file_of_run(args.finetune, "checkpoint-best.pth", "encoder.pth", "newest")
    if not args.resume:
        parser.error(f"--{'eval' if args.eval else 'predict'} needs --resume FILE, a checkpoint to use")
    return file_of_run(args.resume, "checkpoint-best.pth", "newest")


def take_recipe(parser: cli.Parser, args: argparse.Namespace, recipes: Mapping[str, Mapping[str, dict]]) -> None:
    """Take the settings of --recipe for the model's size, if one is asked for."""
    if args.recipe:
        by_size, size = recipes[args.recipe], args.model.split("_")[1]
        if size not in by_size:
            parser.error(f"--recipe {args.recipe} has no settings for size {size}; it has {', '.join(by_size)}")
        parser.take(f"recipe {args.recipe}", by_size[size])


def settle(
    parser: cli.Parser, argv: Sequence[str] | None, flags_of: Callable[..., dict], network: Sequence[str],
    evaluation: Sequence[str], places: Sequence[str], recipes: Mapping[str, Mapping[str, dict]],
) -> argparse.Namespace:  # fmt: skip
    """Parse the command line of detection or segmentation; defaults come from recipe, weights and data set.

    Args:
        flags_of: (file, *names) -> flags that fit its weights, and these names' values in the run that wrote it.
        network: flags that describe the network, which --eval and --predict take only from the checkpoint.
        evaluation: flags that --eval and --predict take from the checkpoint too, but that a command line may change.
        places: paths of the data; --eval and --predict take them as well, unless the command line names other data.
        recipes: name -> size of the model -> flags.
    """
    parser.set_defaults(mlp_norm=None, statistics=None)  # not flags, but in configurations
    args, config = parser.parse_args(argv), {}
    start, only_use = start_of(args, parser), bool(args.eval or args.predict)
    if start:
        data = places if only_use and not (args.data_set or args.data_path) else ()
        names = (*network, *evaluation, *data) if only_use else ("image_max",)
        config = {name: value for name, value in flags_of(start, *names).items() if value is not None}
        beside = {"output_dir": os.path.dirname(start) or "."} if only_use and "://" not in args.resume else {}
        parser.take(start, config | beside)
        args = parser.parse_args(argv)
    data_set = cli.choose_data_set(args, places)
    implied = {name: value for name, value in parser.by_data[data_set].items() if name not in config}
    parser.take(f"the data set {data_set}", implied)
    take_recipe(parser, args, recipes)
    args = parser.parse_args(argv)
    parser.report(args)
    for name in network if only_use else ():
        if name in config and getattr(args, name) != config[name]:
            parser.error(f"--{name} {getattr(args, name)}, but {start} has {config[name]}; leave --{name} out")
    args.data_set, args.statistics = data_set, args.statistics or data_set  # a checkpoint keeps those of its training
    args.resume, args.finetune = (start, args.finetune) if only_use else (args.resume, start)
    cli.derive(args)
    return args


# --- training: layer-wise learning rates, optimisers, averages, memory ------------------------------------------------


def layer_id(name: str, depths: tuple[int, ...], kind: str = "single") -> int:
    """Return the layer that a parameter belongs to, 0 nearest to the input.

    "single" counts every block; "group" joins the blocks of stage 3 in threes, as the authors' fine-tuning of Base and
    ConvNeXt's detection and segmentation code do. Modules on top of the encoder come after all of its layers.
    """
    last = sum(depths) if kind == "single" else 3 + math.ceil(depths[2] / 3)
    part, *place = name.removeprefix("backbone.").removeprefix("encoder.").split(".")
    if part not in ("downsample_layers", "stages"):
        return last + 1
    stage, block = int(place[0]), int(place[1]) if part == "stages" else 0
    if kind == "single":
        return sum(depths[:stage]) + 1 + block
    if part == "downsample_layers":
        return (0, 2, 3, last)[stage]
    return (1, 2, 3 + block // 3, last)[stage]


def layer_groups(
    net: nn.Module, weight_decay: float, layer_decay: float, kind: str, depths: tuple[int, ...] | None = None
) -> list[dict]:
    """Make optimiser groups, `lr_scale` = layer_decay ** (layers above); `depths`: the encoder's, if not `net`'s."""
    depths, groups = depths or net.depths, {}
    head = layer_id("head", depths, kind)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (head - layer_id(name, depths, kind))
            decay = weight_decay if optim.has_weight_decay(name, parameter) else 0.0
            group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(args: argparse.Namespace, groups: list[dict]) -> torch.optim.Optimizer:
    """Make the optimiser of --opt; `Run` sets its learning rate before each update."""
    if args.opt == "sgd":
        # Not fused: torch's fused SGD leaves its momentum uninitialised if the first update is skipped.
        return torch.optim.SGD(groups, momentum=args.momentum, nesterov=args.momentum > 0, foreach=True)
    kind = torch.optim.AdamW if args.opt == "adamw" else torch.optim.Adam
    return kind(groups, betas=tuple(args.opt_betas), eps=args.opt_eps, fused=True)


def averaged(net: nn.Module, decay: float) -> AveragedModel:
    """Make a moving average of `net` whose decay warms up: min(decay, (1 + t) / (10 + t)) at its update t.

    BatchNorm's statistics are averaged too, to suit the averaged weights; counters are copied.
    """
    ema = AveragedModel(net, use_buffers=True)

    def update(averages, currents, _):
        t = int(ema.n_averaged)  # on the CPU, unlike the copy that is passed in: reading it does not wait for a GPU
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + t) / (10 + t)))
        else:
            torch._foreach_copy_(averages, currents)

    ema.multi_avg_fn = update
    return ema


def class_weights(counts: torch.Tensor, balance: float) -> torch.Tensor:
    """Compute classes' loss weights (K,) from counts: fractions (at least .01%) to the power of `-balance`.

    Their mean over everything counted is 1.
    """
    fractions = (counts / counts.sum().clamp(min=1)).clamp(min=1e-4)
    powers = fractions**-balance
    return (powers / (powers * fractions).sum()).float()


def check_memory(net: nn.Module, step: Callable, amp: str | None, device: torch.device, fix: str) -> None:
    """Raise UserError if training needs more memory than the device, or the machine or container, has.

    Training needs what `step` (forward pass and loss) keeps for the backward pass, halved by mixed precision, plus four
    times the weights. On the meta device this takes no computation.
    """
    storages, limits = {}, [math.inf]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    if device.type == "cuda":
        limits.append(torch.cuda.mem_get_info(device)[0])
    elif hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        with suppress(ValueError, OSError):  # no container, or one without a limit
            limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    activations = sum(storage.nbytes() for storage in storages.values())
    activations *= dist.autocast(amp, device).fast_dtype.itemsize / 4
    needed, available = activations + 16 * sum(p.numel() for p in net.parameters()), min(limits)
    if needed > available:
        memory = f"{needed / 2**30:.1f} GiB of memory, and there are {available / 2**30:.1f}"
        raise UserError(f"training needs {memory}; {fix}")


# --- evaluation while training ----------------------------------------------------------------------------------------


def evaluate(run: Run, epoch: int, evaluate: Callable, metric: str, describe: Callable, write: Callable) -> None:
    """Evaluate the weights, and their moving average; log both, and save the better one if it is the best so far.

    Args:
        evaluate: network -> its scores, by name, and details for `write`.
        metric: the score that decides.
        describe: scores -> words for the log's line.
        write: (output directory, details), called for a new best evaluation before checkpoint-best.pth is written.
    """
    networks = {"model": run.net}
    if run.ema and run.args.model_ema_eval:
        networks["model_ema"] = run.ema.module
    results = {name: evaluate(network) for name, network in networks.items()}
    values = {name: scores[metric] for name, (scores, _) in results.items()}
    ranks = {name: x if x is not None and x > -math.inf else -math.inf for name, x in values.items()}  # NaN never wins
    winner = max(ranks, key=ranks.get)
    improved, run.best = ranks[winner] > run.best, max(run.best, ranks[winner])
    record = {"epoch": epoch + 1, "update": run.done, f"best_{metric}": run.best}
    for name, (scores, _) in results.items():
        record |= {f"{'val' if name == 'model' else 'val_ema'}_{key}": value for key, value in scores.items()}
    words = "  ".join(f"{name} {describe(scores)}" for name, (scores, _) in results.items())
    run.record(record, f"epoch {epoch + 1}/{run.last_epoch + 1}  {words}  best {run.best:.4g}")
    if improved:
        run.write("", write, results[winner][1])
        if run.args.save_ckpt:
            best = {"model": networks[winner].state_dict(), "epoch": epoch + 1, metric: run.best}
            run.write("checkpoint-best.pth", save_tensors, best | run.origin)
