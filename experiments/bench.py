"""Time and memory. Every round runs each candidate once, in random order, so that a noisy machine disturbs all alike.

    python -m experiments.bench                 # encoder, forward and backward: sparse, masked, leaky, dense unmasked
    python -m experiments.bench step            # the whole pre-training step, optimiser included
    python -m experiments.bench finetune        # the dense training step against timm's model

Prints a table, and writes it to --output_dir, for `encoder` with a figure.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fast import speed_up
from fcmae import BACKENDS, FCMAE, random_mask
from model import MODELS, ConvNeXt
from plumbing import cli, dist
from plumbing.files import save_csv, value_errors_are_the_users
from plumbing.optim import parameter_groups
from plumbing.plots import COLOURS, new_figure, save_figure

try:
    import timm  # only to compare with
except ImportError:
    timm = None


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    add, models = parser.add_argument, ["convnextv2_atto", "convnextv2_tiny"]
    add("task", nargs="?", choices=TASKS, default="encoder", help="what to measure")
    add("--model", choices=MODELS, default=models, nargs="+", metavar="NAME", help=", ".join(MODELS))
    add("--batch_size", type=cli.count, default=[16, 8], nargs="+", help="images, for all models or for each")
    add("--input_size", type=cli.count, default=224, help="pixels per side")
    add("--stem_stride", type=int, choices=(4, 2, 1), default=4, help="stride of the stem")
    add("--mask_ratio", type=cli.fraction, default=0.6, help="fraction of the patches to hide")
    add("--amp", choices=("none", "bf16", "fp16"), default=["none", "bf16"], nargs="+", help="autocast types")
    backends = ["sparse", "masked", "leaky"]
    add("--backend", choices=BACKENDS, default=backends, nargs="+", help="how the encoder runs (unused by finetune)")
    add("--plain", action=cli.BoolFlag, default=False, help="leave our networks without fast.speed_up")
    add("--compile", action=cli.BoolFlag, default=False, help="torch.compile encoders, autoencoders and classifiers")
    add("--checkpoint_activations", action=cli.BoolFlag, default=False, help="in our networks")
    add("--repeats", type=cli.count, default=9, help="interleaved rounds, of which medians are reported")
    add("--device", help="cuda, cpu or mps (default: cuda if there is one, else cpu)")
    add("--output_dir", default="runs/bench", metavar="DIR", help="where table and figure go")
    return parser.parse_args(argv)


# --- measuring --------------------------------------------------------------------------------------------------------


def run(amp: str, device: torch.device, forward: Callable, *after: Callable) -> None:
    """Call `forward` with this autocast type; if calls that use or clear gradients follow, run backward first."""
    with torch.set_grad_enabled(bool(after)), dist.autocast(amp, device):
        loss = forward()
    if after:
        loss.backward()
    for call in after:
        call()


def interleaved(calls: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Measure each call's median seconds over rounds that run every call once, in random order."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None

    def seconds(call):
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    for call in calls.values():  # warm-up: allocations, kernel choice, compilation
        seconds(call)
        seconds(call)
    orders = [random.sample(list(calls), len(calls)) for _ in range(repeats)]
    rounds = [{name: seconds(calls[name]) for name in order} for order in orders]
    return {name: statistics.median(times[name] for times in rounds) for name in calls}


def memory(call: Callable[[], None], device: torch.device) -> float:
    """Measure MiB: on a GPU, the peak above what was allocated; elsewhere, what autograd keeps for backward."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storages.values()) / 2**20


def measure(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure each candidate of the task: time, throughput, time relative to the task's base, and memory, a row each.

    With a mask, also time relative to the limit: the fraction of visible patches times the unmasked network's time.
    """
    rows, (task, base) = [], TASKS[args.task]
    models = zip(args.model, args.batch_size * len(args.model))
    for (model, batch), amp in product(models, args.amp):
        candidates = task(args, device, model, batch)
        calls = {name: partial(run, amp, device, *functions) for name, functions in candidates.items()}
        seconds = interleaved(calls, args.repeats, device)
        if args.task == "encoder":
            visible = (~draw_masks(args, batch)).double().mean().item()
            limit = visible * seconds.get("timm", seconds["dense"])
        for name, call in calls.items():
            row = {"model": model, "amp": amp, "batch": batch, "candidate": name}
            row |= {"ms": round(1e3 * seconds[name], 1), "images/s": round(batch / seconds[name], 1)}
            if base in seconds:
                row[f"of {base}"] = round(seconds[name] / seconds[base], 3)
            if args.task == "encoder":
                row["of limit"] = round(seconds[name] / limit, 3)
            rows.append(row | {"MiB": round(memory(call, device))})
    return rows


# --- tasks: name of a candidate -> arguments of `run` -----------------------------------------------------------------

Task = dict[str, tuple[Callable, ...]]


def encoder(args: argparse.Namespace, device: torch.device, model: str, batch: int) -> Task:
    """Forward and backward of the encoder with each backend, and unmasked: "dense", the same network, and timm's."""
    imgs, mask, candidates = noise(args, device, batch), draw_masks(args, batch), {}
    networks = {name: FCMAE(ours(args, model), args.mask_ratio, backend=name) for name in args.backend}
    networks["dense"] = ours(args, model)
    if timm and args.stem_stride == 4:
        networks["timm"] = timm.create_model(model, num_classes=0, global_pool="")
    for name, net in networks.items():
        prepare(args, device, net)
        forward, inputs = (net.forward_encoder, (imgs, mask)) if name in BACKENDS else (net, (imgs,))
        forward = torch.compile(forward) if args.compile else forward
        candidates[name] = partial(mean_square, forward, *inputs), net.zero_grad
    return candidates


def step(args: argparse.Namespace, device: torch.device, model: str, batch: int) -> Task:
    """The whole FCMAE step: mask, encoder, decoder, loss, backward, AdamW."""
    imgs, candidates = noise(args, device, batch), {}
    for name in args.backend:
        mae = prepare(args, device, FCMAE(ours(args, model), args.mask_ratio, backend=name))
        forward = torch.compile(mae) if args.compile else mae
        candidates[name] = lambda forward=forward: forward(imgs)[0], *adamw(mae)
    return candidates


def finetune(args: argparse.Namespace, device: torch.device, model: str, batch: int) -> Task:
    """Forward, backward and AdamW of the classifier."""
    imgs, labels, candidates = noise(args, device, batch), torch.arange(batch, device=device) % 1000, {}
    networks = {"ours": ours(args, model, 1000)} | ({"timm": timm.create_model(model)} if timm else {})
    for name, net in networks.items():
        prepare(args, device, net)
        forward = torch.compile(net) if args.compile else net
        candidates[name] = lambda forward=forward: F.cross_entropy(forward(imgs).float(), labels), *adamw(net)
    return candidates


# Each task's function, and the candidate whose time divides the others'.
TASKS = {"encoder": (encoder, "masked"), "step": (step, "masked"), "finetune": (finetune, "timm")}


def ours(args: argparse.Namespace, model: str, num_classes: int = 0) -> ConvNeXt:
    """Build our encoder or classifier, always with the same weights."""
    torch.manual_seed(0)
    net = MODELS[model](num_classes=num_classes, stem_stride=args.stem_stride)
    net.checkpoint_activations(args.checkpoint_activations)
    return net


def prepare(args: argparse.Namespace, device: torch.device, net: nn.Module) -> nn.Module:
    """Move the network to its device, in training mode, as the scripts do."""
    return dist.to_device(net if args.plain else speed_up(net), device).train()


def noise(args: argparse.Namespace, device: torch.device, batch: int) -> torch.Tensor:
    """Draw images (N, 3, S, S), channels_last."""
    imgs = torch.rand(batch, 3, args.input_size, args.input_size, device=device)
    return imgs.contiguous(memory_format=torch.channels_last)


def draw_masks(args: argparse.Namespace, batch: int) -> torch.Tensor:
    """Draw masks (N, h, w), True = hidden."""
    grid = args.input_size // (8 * args.stem_stride)
    return random_mask(batch, grid, grid, args.mask_ratio)


def mean_square(net: Callable, *inputs) -> torch.Tensor:
    """Reduce a network's output to a scalar to differentiate."""
    return net(*inputs).float().square().mean()


def adamw(net: nn.Module) -> tuple[Callable, Callable]:
    """Return the calls that update the weights and clear the gradients."""
    optimizer = torch.optim.AdamW(parameter_groups(net, 0.05), fused=True)
    return optimizer.step, optimizer.zero_grad


# --- output -----------------------------------------------------------------------------------------------------------


def print_table(rows: list[dict]) -> None:
    """Print the rows, aligned under their column names."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def draw_bars(path: Path, rows: list[dict], title: str) -> None:
    """Draw the paper's Figure 6: throughput and memory of each candidate, by model and type."""
    candidates = list(dict.fromkeys(row["candidate"] for row in rows))
    width = 0.8 / len(candidates)
    figure, axes = new_figure(1, 2, 11, 4)
    for axis, column in zip(axes.flat, ("images/s", "MiB")):
        for k, (name, colour) in enumerate(zip(candidates, COLOURS)):
            group = [row for row in rows if row["candidate"] == name]
            x, heights = [g + k * width for g in range(len(group))], [row[column] for row in group]
            axis.bar(x, heights, width, color=colour, label=f"{name}, unmasked" if name in ("dense", "timm") else name)
        names = [f"{row['model'].removeprefix('convnextv2_')}\n{row['amp'].replace('none', 'fp32')}" for row in group]
        axis.set_xticks([g + 0.4 - width / 2 for g in range(len(group))], names)
        axis.set_ylabel({"images/s": "images per second", "MiB": "memory, MiB"}[column])
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path)


def main(args: argparse.Namespace) -> None:
    """Measure what `args` (from `get_args`) ask for."""
    device = dist.setup(args.device)
    with value_errors_are_the_users():
        rows = measure(args, device)
    print_table(rows)
    path = Path(args.output_dir, f"{args.task}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_csv(path, rows)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    if args.task == "encoder":
        draw_bars(path.with_suffix(".png"), rows, f"Encoder, forward and backward, {hardware}")
    print(f"{hardware}, torch {torch.__version__}; medians of {args.repeats} rounds; {path}")


if __name__ == "__main__":
    main(get_args())
