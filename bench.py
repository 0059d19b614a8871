"""How fast is it? Interleaved measurements in one process, so that a noisy machine disturbs all candidates alike.

    python bench.py                    # encoder, forward and backward: sparse, masked, leaky, dense unmasked
    python bench.py step               # the whole pre-training step, optimiser included
    python bench.py sweep              # time against the share of visible patches
    python bench.py data               # the input pipeline, images per second and worker
    python bench.py finetune           # the dense training step against timm's model
    python bench.py heap               # what keeping the heap mapped buys on a CPU

Prints a table and writes CSV, and pictures where there is something to see, to --output_dir.
"""

import argparse
import csv
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from data import HeldImages, load_images, pretrain_transform
from fcmae import BACKENDS, FCMAE, random_mask
from model import MODELS, check_size
from plumbing import flags
from plumbing.devices import emulates_half
from plumbing.files import prepare_output_dir
from plumbing.loading import EpochSampler, make_loader
from plumbing.optim import parameter_groups
from plumbing.plots import COLOURS, new_figure, plot_curves, save_figure
from plumbing.processes import setup_processes
from plumbing.script import UserError, run_script

try:
    import timm  # only to compare with
except ImportError:
    timm = None

SWEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.05)  # shares of hidden patches
BACKENDS_TRIED = ("sparse", "masked", "leaky")
TASKS = ("encoder", "step", "sweep", "data", "finetune", "heap")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = flags.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("task", nargs="?", choices=TASKS, default="encoder", help="what to measure")
    add = parser.adder()
    add("--model", flags.one_of("model", MODELS), ["convnextv2_atto", "convnextv2_tiny"], "sizes", nargs="+")
    add("--batch_size", flags.count, [16, 8], "images, one number for all models or one for each", nargs="+")
    add("--input_size", flags.image_side, 224, "pixels per side")
    add("--stem_stride", flags.STRIDES, 4, "stride of the stem")
    add("--mask_ratio", flags.proper_share, 0.6, "share of the patches to hide")
    add("--amp", ("none", "bf16", "fp16"), None, "autocast types (default: none and bf16, but on CPUs without AVX-512)", nargs="+")
    add(
        "--backend", flags.one_of("backend", BACKENDS), BACKENDS_TRIED, f"of `encoder` and `step`: {', '.join(BACKENDS)}", nargs="+"
    )
    add("--compile", bool, False, "torch.compile every candidate")
    add("--checkpoint_activations", bool, False, "of all candidates but timm's")
    add("--repeats", flags.count, 9, "interleaved rounds; medians are reported")
    add("--data_path", str, None, "folder of images for `data` (default: the embedded data, loaded and held)", metavar="DIR")
    add("--num_workers", flags.worker_count, [0, 1, 2], "loading processes to try in `data`", nargs="+")
    add("--device", str, None, "cuda or cpu (default: cuda if there is one)")
    add("--output_dir", str, "runs/bench", "where CSV and pictures go", metavar="DIR")
    args = flags.merge(parser.parse_args(argv), parser.general)
    if len(args.batch_size) not in (1, len(args.model)):
        parser.error(f"--batch_size has {len(args.batch_size)} numbers for {len(args.model)} models; give one, or one for each")
    if args.task != "data":
        try:
            check_size(args.input_size, args.input_size, 8 * args.stem_stride)
        except ValueError as error:
            parser.error(str(error))
    args.batch_size = args.batch_size * (len(args.model) if len(args.batch_size) == 1 else 1)
    return args


# --- measuring --------------------------------------------------------------------------------------------------------


def interleaved(candidates: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each candidate, over rounds in which every candidate runs once."""

    def seconds(call):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for call in candidates.values():  # warm-up: allocations, kernel choice, compilation
        seconds(call)
        seconds(call)
    rounds = [{name: seconds(call) for name, call in candidates.items()} for _ in range(repeats)]
    return {name: statistics.median(r[name] for r in rounds) for name in candidates}


def memory(call: Callable[[], None], device: torch.device) -> float:
    """MiB: on a GPU the peak beyond what was allocated before; elsewhere the tensors that autograd keeps for backward."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values()) / 2**20


def trainer(loss: Callable[[], torch.Tensor], finish: Callable[[], None], amp: str, device: torch.device) -> Callable[[], None]:
    """A call that runs forward under autocast, backward, and `finish`, which clears the gradients."""
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]

    def call():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            value = loss()
        value.backward()
        finish()

    return call


def updates(network: nn.Module) -> Callable[[], None]:
    """A call that updates the weights by AdamW and clears the gradients."""
    optimizer = torch.optim.AdamW(parameter_groups(network, 0.05), fused=True)

    def call():
        optimizer.step()
        optimizer.zero_grad()

    return call


def encoder_candidates(name: str, batch: int, args, amp: str, device: torch.device, mask_ratio: float, backends) -> dict:
    """Forward and backward of the encoder by each backend; "dense" is the same network without a mask, "timm" timm's."""
    imgs = torch.randn(batch, 3, args.input_size, args.input_size, device=device).contiguous(memory_format=torch.channels_last)
    grid = args.input_size // (8 * args.stem_stride)
    mask = random_mask(batch, grid, grid, mask_ratio)
    candidates = {}
    for backend in backends:
        torch.manual_seed(0)
        if backend == "timm":
            encoder = timm.create_model(name, num_classes=0, global_pool="")
        else:
            encoder = MODELS[name](num_classes=0, stem_stride=args.stem_stride)
            encoder.checkpoint_activations(args.checkpoint_activations)
        if backend in ("dense", "timm"):
            network = encoder.to(device, memory_format=torch.channels_last)
            run = torch.compile(network) if args.compile else network
            loss = lambda run=run: run(imgs).float().square().mean()  # noqa: E731
        else:
            network = FCMAE(encoder, mask_ratio, backend=backend).to(device, memory_format=torch.channels_last)
            run = torch.compile(network.forward_encoder) if args.compile else network.forward_encoder
            loss = lambda run=run: run(imgs, mask).float().square().mean()  # noqa: E731
        candidates[backend] = trainer(loss, network.zero_grad, amp, device)
    return candidates


# --- tasks ------------------------------------------------------------------------------------------------------------


def bench_encoder(args, device) -> list[dict]:
    """Time and memory of the encoder by backend. The limit is the unmasked step times the share of visible patches.

    The unmasked step is timm's where timm is installed and has the model, otherwise that of our own dense network.
    """
    grid = args.input_size // (8 * args.stem_stride)
    visible = int(grid * grid * (1 - args.mask_ratio)) / grid**2
    backends = [*args.backend, "dense"] + ["timm"] * (timm is not None and args.stem_stride == 4)
    rows = []
    for name, batch in zip(args.model, args.batch_size):
        for amp in args.amp:
            candidates = encoder_candidates(name, batch, args, amp, device, args.mask_ratio, backends)
            seconds = interleaved(candidates, args.repeats, device)
            for backend, call in candidates.items():
                rows.append(
                    {
                        "model": name,
                        "batch": batch,
                        "amp": amp,
                        "backend": backend,
                        "ms": round(1e3 * seconds[backend], 1),
                        "images/s": round(batch / seconds[backend], 1),
                        "of masked": round(seconds[backend] / seconds.get("masked", math.nan), 3),
                        "of limit": round(seconds[backend] / (visible * seconds[backends[-1]]), 3),
                        "MiB": round(memory(call, device)),
                    }
                )
    return rows


def bench_step(args, device) -> list[dict]:
    """The whole FCMAE step: masking, encoder, decoder, loss, backward, AdamW."""
    rows = []
    for name, batch in zip(args.model, args.batch_size):
        for amp in args.amp:
            imgs = torch.randn(batch, 3, args.input_size, args.input_size, device=device)
            candidates = {}
            for backend in args.backend:
                encoder = MODELS[name](num_classes=0, stem_stride=args.stem_stride)
                encoder.checkpoint_activations(args.checkpoint_activations)
                mae = FCMAE(encoder, args.mask_ratio, backend=backend).to(device, memory_format=torch.channels_last)
                run = torch.compile(mae) if args.compile else mae
                candidates[backend] = trainer(lambda run=run, imgs=imgs: run(imgs)[0], updates(mae), amp, device)
            seconds = interleaved(candidates, args.repeats, device)
            rows += [
                {"model": name, "batch": batch, "amp": amp, "backend": backend, "ms": round(1e3 * s, 1), "images/s": round(batch / s, 1),
                 "of masked": round(s / seconds.get("masked", math.nan), 3), "MiB": round(memory(candidates[backend], device))}
                for backend, s in seconds.items()
            ]  # fmt: skip
    return rows


def bench_sweep(args, device) -> list[dict]:
    """Sparse encoder time against the share of visible patches, beside masked and dense."""
    rows = []
    name, batch, amp = args.model[0], args.batch_size[0], args.amp[0]
    for hidden in SWEEP:
        candidates = encoder_candidates(name, batch, args, amp, device, hidden, ("sparse", "masked", "dense"))
        seconds = interleaved(candidates, args.repeats, device)
        grid = args.input_size // (8 * args.stem_stride)
        visible = int(grid * grid * (1 - hidden)) / grid**2
        rows += [
            {"model": name, "amp": amp, "visible": round(visible, 3), "backend": b, "ms": round(1e3 * s, 1)}
            for b, s in seconds.items()
        ]
    return rows


def bench_data(args, device) -> list[dict]:
    """Images per second that the pre-training pipeline delivers, by worker count and image size, held on the device or not."""
    rows = []
    kind = "folder" if args.data_path else "embedded"
    for size, held in ((size, held) for size in (args.input_size, 2 * args.input_size) for held in (False, True)):
        if held and args.data_path:
            continue
        for workers in args.num_workers:
            images = load_images(kind, args.data_path, "train", pretrain_transform(size))
            images = HeldImages(images, device) if held else images
            sampler = EpochSampler(len(images), min(32, len(images)), 0, 1, 0)
            loader = make_loader(images, sampler, workers, False)
            start = time.perf_counter()
            seen = sum(len(images.render(batch)) for batch, _, _ in loader)
            if device.type == "cuda":
                torch.cuda.synchronize()
            speed = seen / (time.perf_counter() - start)
            rows.append(
                {
                    "images": len(images),
                    "held": held,
                    "size": size,
                    "workers": workers,
                    "images/s": round(speed, 1),
                    "per worker": round(speed / max(workers, 1), 1),
                }
            )
    return rows


def bench_finetune(args, device) -> list[dict]:
    """Forward, backward and AdamW of the classifier, beside timm's model of the same size, both in channels_last."""
    if timm is None:
        raise UserError("bench.py finetune compares with timm, which is not installed; pip install timm")
    rows = []
    for name, batch in zip(args.model, args.batch_size):
        for amp in args.amp:
            imgs = torch.randn(batch, 3, args.input_size, args.input_size, device=device).contiguous(
                memory_format=torch.channels_last
            )
            labels = torch.arange(batch, device=device) % 1000
            candidates = {}
            for library, make in (("ours", MODELS[name]), ("timm", lambda name=name: timm.create_model(name))):
                net = make().to(device, memory_format=torch.channels_last).train()
                if library == "ours":
                    net.checkpoint_activations(args.checkpoint_activations)
                run = torch.compile(net) if args.compile else net
                loss = lambda run=run, imgs=imgs, labels=labels: nn.functional.cross_entropy(run(imgs).float(), labels)  # noqa: E731
                candidates[library] = trainer(loss, updates(net), amp, device)
            seconds = interleaved(candidates, args.repeats, device)
            rows += [
                {"model": name, "batch": batch, "amp": amp, "library": library, "ms": round(1e3 * s, 1),
                 "of timm": round(s / seconds["timm"], 3), "MiB": round(memory(candidates[library], device))}
                for library, s in seconds.items()
            ]  # fmt: skip
    return rows


HEAP = """
import sys, time, torch
sys.path.insert(0, {folder!r})
from fcmae import FCMAE
from model import MODELS
from plumbing.devices import keep_heap_mapped
if {keep}: keep_heap_mapped()
torch.manual_seed(0)
mae = FCMAE(MODELS[{model!r}](num_classes=0), backend={backend!r}).to(memory_format=torch.channels_last)
imgs, times = torch.randn({batch}, 3, 224, 224), []
for _ in range(5):
    start = time.perf_counter()
    mae(imgs)[0].backward()
    mae.zero_grad()
    times.append(time.perf_counter() - start)
print(sorted(times[1:])[1])
"""


def bench_heap(args, device) -> list[dict]:
    """A pre-training step with glibc's defaults and with `keep_heap_mapped`, in processes of their own, taken in turn."""
    rows = []
    for name, batch in zip(args.model, args.batch_size):
        for backend in ("sparse", "masked"):
            times = {True: [], False: []}
            for _ in range(3):
                for keep in times:
                    code = HEAP.format(folder=str(Path(__file__).parent), keep=keep, model=name, batch=batch, backend=backend)
                    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
                    times[keep].append(float(output))
            kept, default = (statistics.median(times[keep]) for keep in (True, False))
            rows.append({"model": name, "batch": batch, "backend": backend, "default ms": round(1e3 * default), "kept ms": round(1e3 * kept),
                         "ratio": round(default / kept, 2)})  # fmt: skip
    return rows


# --- output -----------------------------------------------------------------------------------------------------------


def print_table(rows: list[dict]) -> None:
    """Align the rows under their names."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def draw_bars(path: Path, rows: list[dict], device: torch.device) -> None:
    """The paper's Figure 6: throughput and memory of each backend, by model and type."""
    groups = list(dict.fromkeys((row["model"], row["amp"]) for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    labels = {"dense": "dense, unmasked", "timm": "timm, unmasked"}
    kept = "peak memory, MiB" if device.type == "cuda" else "memory kept for backward, MiB"
    figure, axes = new_figure(1, 2, 11, 4)
    for axis, value, label in ((axes[0, 0], "images/s", "images per second"), (axes[0, 1], "MiB", kept)):
        for k, (backend, colour) in enumerate(zip(backends, COLOURS)):
            heights = [
                next(row[value] for row in rows if (row["model"], row["amp"], row["backend"]) == (*group, backend))
                for group in groups
            ]
            axis.bar(
                [g + k * 0.8 / len(backends) for g in range(len(groups))],
                heights,
                0.8 / len(backends),
                color=colour,
                label=labels.get(backend, backend),
            )
        names = [f"{model.removeprefix('convnextv2_')}\n{amp.replace('none', 'fp32')}" for model, amp in groups]
        axis.set_xticks([g + 0.4 - 0.4 / len(backends) for g in range(len(groups))], names)
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"Encoder, forward and backward, {'GPU' if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'}"
    )
    save_figure(figure, path)


def draw_sweep(path: Path, rows: list[dict]) -> None:
    """Milliseconds against the share of visible patches, a line per backend."""
    curves = {}
    for row in rows:
        x, y = curves.setdefault(row["backend"], ([], []))
        x.append(row["visible"])
        y.append(row["ms"])
    title = f"{rows[0]['model']}, {rows[0]['amp'].replace('none', 'fp32')}: encoder, forward and backward"
    plot_curves(path, curves, "share of visible patches", "milliseconds", title, from_zero=True)


def main(args: argparse.Namespace) -> None:
    """Measure what `args` (from `get_args`) ask for."""
    processes = setup_processes(args.device)
    output_dir = prepare_output_dir(args.output_dir)
    args.amp = args.amp or ["none", "bf16"][: 1 if emulates_half(processes.device) else 2]
    grid = args.input_size // (8 * args.stem_stride)
    for ratio in {"sweep": SWEEP, "data": ()}.get(args.task, (args.mask_ratio,)):
        try:
            random_mask(1, grid, grid, ratio)
        except ValueError as error:
            raise UserError(str(error)) from None
    rows = globals()[f"bench_{args.task}"](args, processes.device)
    print_table(rows)
    path = output_dir / f"{args.task}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if args.task == "encoder":
        draw_bars(path.with_suffix(".png"), rows, processes.device)
    elif args.task == "sweep":
        draw_sweep(path.with_suffix(".png"), rows)
    name = torch.cuda.get_device_name() if processes.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}; median of {args.repeats} rounds; {path}")


if __name__ == "__main__":
    run_script(main, get_args)
