"""How fast is it? Interleaved measurements in one process, so that a noisy machine disturbs all candidates alike.

    python bench.py                    # encoder, forward and backward: sparse, masked, leaky, dense unmasked
    python bench.py step               # the whole pre-training step, optimiser included
    python bench.py sweep              # time against the share of visible patches
    python bench.py data               # the input pipeline, images per second and worker
    python bench.py finetune           # the dense training step against timm's model
    python bench.py detect             # Mask R-CNN, training and evaluation, against torchvision's on a ResNet-50
    python bench.py segment            # UPerNet, training and evaluation, against transformers' on the same weights
    python bench.py heap               # what keeping the heap mapped buys on a CPU

Prints a table and writes CSV, and pictures where there is something to see, to --output_dir.
"""

import plumbing  # isort: skip (first: Ctrl-C then ends the imports below, which take seconds, without a traceback)
import argparse
import csv
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from data import HeldImages, load_images, pretrain_transform
from detector import MaskRCNN
from fcmae import BACKENDS, FCMAE, random_mask
from model import MODELS, check_size
from plumbing import flags
from plumbing.devices import emulates_half
from plumbing.files import prepare_output_dir, save_csv
from plumbing.layouts import upernet_names
from plumbing.loading import EpochSampler, make_loader
from plumbing.optim import parameter_groups
from plumbing.plots import COLOURS, new_figure, plot_curves, save_figure
from plumbing.processes import setup_processes
from plumbing.script import UserError, run_script, value_errors_are_the_users
from scenes import augmentation, embedded_scenes
from segmenter import UPerNet, segmentation_losses

try:
    import timm  # only to compare with
except ImportError:
    timm = None

SWEEP = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.05)  # shares of hidden patches


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = flags.Parser(description=__doc__.split("\n\n")[0])
    summaries = "; ".join(f"{name}: {measure.__doc__.splitlines()[0]}" for name, measure in TASKS.items())
    parser.add_argument("task", nargs="?", choices=TASKS, default="encoder", help=summaries)
    add = parser.adder()
    add("--model", flags.one_of("model", MODELS), ["convnextv2_atto", "convnextv2_tiny"], "sizes", nargs="+")
    add("--batch_size", flags.count, [16, 8], "images, one number for all models or one for each", nargs="+")
    add("--input_size", flags.image_side, 224, "pixels per side")
    add("--stem_stride", flags.STRIDES, 4, "stride of the stem")
    add("--mask_ratio", flags.proper_share, 0.6, "share of the patches to hide")
    add("--amp", ("none", "bf16", "fp16"), None, "autocast types (default: none and bf16, but on CPUs without AVX-512)", nargs="+")
    add("--backend", flags.one_of("backend", BACKENDS), ("sparse", "masked", "leaky"), "of `encoder` and `step`", nargs="+")
    add("--compile", bool, False, "torch.compile every candidate")
    add("--checkpoint_activations", bool, False, "of all candidates but timm's")
    add("--repeats", flags.count, 9, "interleaved rounds; medians are reported")
    add("--data_path", str, None, "folder of images for `data` (default: the embedded data, loaded and held)", metavar="DIR")
    add("--num_workers", flags.worker_count, [0, 1, 2], "loading processes to try in `data`", nargs="+")
    add("--device", str, None, flags.DEVICES)
    add("--output_dir", str, "runs/bench", "where CSV and pictures go", metavar="DIR")
    args = flags.merge(parser.parse_args(argv), parser.general)
    if len(args.batch_size) not in (1, len(args.model)):
        parser.error(f"--batch_size has {len(args.batch_size)} numbers for {len(args.model)} models; give one, or one for each")
    if args.task != "data":
        with value_errors_are_the_users():
            check_size(args.input_size, args.input_size, 8 * args.stem_stride)
    args.batch_size = args.batch_size * (len(args.model) if len(args.batch_size) == 1 else 1)
    return args


# --- measuring --------------------------------------------------------------------------------------------------------


def interleaved(candidates: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each candidate, over rounds in which every candidate runs once, in random order."""

    # bench_heap's processes cannot be interleaved: CPU time depends less on what else the machine does meanwhile.
    clock = time.process_time if "HEAP" in os.environ else time.perf_counter

    def seconds(call):
        wait_for(device)
        start = clock()
        call()
        wait_for(device)
        return clock() - start

    for call in candidates.values():  # warm-up: allocations, kernel choice, compilation
        seconds(call)
        seconds(call)
    rounds = [
        {name: seconds(candidates[name]) for name in random.sample(list(candidates), len(candidates))} for _ in range(repeats)
    ]
    return {name: statistics.median(r[name] for r in rounds) for name in candidates}


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def device_name(device: torch.device) -> str:
    """What was measured on, in words."""
    names = {"cuda": torch.cuda.get_device_name, "mps": lambda: "MPS"}
    return names.get(device.type, lambda: f"{torch.get_num_threads()} CPU threads")()


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


def settings(args: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """Every model with its batch size, in every type."""
    for (name, batch), amp in product(zip(args.model, args.batch_size), args.amp):
        yield name, batch, amp


def table(candidates: dict[str, Callable[[], None]], args, device: torch.device, base: str, batch: int, **what) -> list[dict]:
    """A row for each candidate: `what` it is, time, throughput, time relative to the candidate `base`, and memory."""
    seconds = interleaved(candidates, args.repeats, device)
    rows = []
    for name, call in candidates.items():
        row = what | {
            "batch": batch,
            "candidate": name,
            "ms": round(1e3 * seconds[name], 1),
            "images/s": round(batch / seconds[name], 1),
        }
        ratio = {f"of {base}": round(seconds[name] / seconds[base], 3)} if base in seconds else {}
        rows.append(row | ratio | {"MiB": round(memory(call, device))})
    return rows


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
    visible = visible_share(args, args.mask_ratio)
    backends = [*args.backend, "dense"] + ["timm"] * (timm is not None and args.stem_stride == 4)
    rows = []
    for name, batch, amp in settings(args):
        candidates = encoder_candidates(name, batch, args, amp, device, args.mask_ratio, backends)
        rows += table(candidates, args, device, "masked", batch, model=name, amp=amp)
        limit = visible * rows[-1]["ms"]
        for row in rows[-len(candidates) :]:
            row["of limit"] = round(row["ms"] / limit, 3)
    return rows


def visible_share(args: argparse.Namespace, mask_ratio: float) -> float:
    """The share of patches that a mask leaves, whole patches counted."""
    cells = (args.input_size // (8 * args.stem_stride)) ** 2
    return int(cells * (1 - mask_ratio)) / cells


def bench_step(args, device) -> list[dict]:
    """The whole FCMAE step: masking, encoder, decoder, loss, backward, AdamW."""
    rows = []
    for name, batch, amp in settings(args):
        imgs = torch.randn(batch, 3, args.input_size, args.input_size, device=device)
        candidates = {}
        for backend in args.backend:
            encoder = MODELS[name](num_classes=0, stem_stride=args.stem_stride)
            encoder.checkpoint_activations(args.checkpoint_activations)
            mae = FCMAE(encoder, args.mask_ratio, backend=backend).to(device, memory_format=torch.channels_last)
            run = torch.compile(mae) if args.compile else mae
            candidates[backend] = trainer(lambda run=run, imgs=imgs: run(imgs)[0], updates(mae), amp, device)
        rows += table(candidates, args, device, "masked", batch, model=name, amp=amp)
    return rows


def bench_sweep(args, device) -> list[dict]:
    """Sparse encoder time against the share of visible patches, beside masked and dense."""
    rows = []
    name, batch, amp = next(settings(args))
    for hidden in SWEEP:
        candidates = encoder_candidates(name, batch, args, amp, device, hidden, ("sparse", "masked", "dense"))
        seconds, visible = interleaved(candidates, args.repeats, device), round(visible_share(args, hidden), 3)
        rows += [dict(model=name, amp=amp, visible=visible, candidate=b, ms=round(1e3 * s, 1)) for b, s in seconds.items()]
    return rows


def bench_data(args, device) -> list[dict]:
    """Images per second of the pre-training pipeline, by worker count, loaded or held on the device; 10 s at most for each."""
    rows = []
    kind = "folder" if args.data_path else "embedded"
    for held, workers in product((False,) if args.data_path else (False, True), args.num_workers):
        images = load_images(kind, args.data_path, "train", pretrain_transform(args.input_size))
        images = HeldImages(images, device) if held else images
        loader = make_loader(images, EpochSampler(len(images), min(32, len(images)), 0, 1, 0), workers)
        seen, start = 0, time.perf_counter()
        for batch, _, _ in loader:
            seen += len(images.render(batch))
            wait_for(device)
            seconds = time.perf_counter() - start
            if seconds > 10:
                break
        row = {"images": seen, "held": held, "size": args.input_size, "workers": workers, "images/s": round(seen / seconds, 1)}
        rows.append(row | {"per worker": round(seen / seconds / max(workers, 1), 1)})
    return rows


def bench_finetune(args, device) -> list[dict]:
    """Forward, backward and AdamW of the classifier, beside timm's model of the same size, both in channels_last."""
    if timm is None:
        raise UserError("bench.py finetune compares with timm, which is not installed; pip install timm")
    rows = []
    for name, batch, amp in settings(args):
        imgs = torch.randn(batch, 3, args.input_size, args.input_size, device=device)
        imgs, labels = imgs.contiguous(memory_format=torch.channels_last), torch.arange(batch, device=device) % 1000
        candidates = {}
        for library, make in (("ours", MODELS[name]), ("timm", lambda name=name: timm.create_model(name))):
            net = make().to(device, memory_format=torch.channels_last).train()
            if library == "ours":
                net.checkpoint_activations(args.checkpoint_activations)
            run = torch.compile(net) if args.compile else net
            loss = lambda run=run, imgs=imgs, labels=labels: nn.functional.cross_entropy(run(imgs).float(), labels)  # noqa: E731
            candidates[library] = trainer(loss, updates(net), amp, device)
        rows += table(candidates, args, device, "timm", batch, model=name, amp=amp)
    return rows


def bench_detect(args, device) -> list[dict]:
    """Mask R-CNN beside torchvision's on a ResNet-50: an update, how much of it encoder and pyramid take, and an evaluation."""
    rows = []
    for name, batch, amp in settings(args):
        jitter = augmentation("none", args.input_size, (args.input_size, args.input_size), (1, 1), None)
        scenes = embedded_scenes("val", args.input_size, jitter, count=batch)
        pictures, targets, _ = scenes.collate([scenes[0, k] for k in range(batch)])
        pictures, targets = scenes.on_device(pictures, targets, device)
        size, classes = dict(min_size=args.input_size, max_size=args.input_size), len(scenes.classes)
        encoder = MODELS[name](num_classes=0, stem_stride=args.stem_stride)
        encoder.checkpoint_activations(args.checkpoint_activations)
        detectors = {"ours": MaskRCNN(encoder, classes, **size)}
        detectors["torchvision"] = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=classes + 1, **size)
        for each in detectors.values():
            each.to(device, memory_format=torch.channels_last)
        ours, imgs = detectors["ours"].backbone, torch.stack(pictures).contiguous(memory_format=torch.channels_last)
        training = {
            library: trainer(partial(total, each, pictures, targets), updates(each), amp, device)
            for library, each in detectors.items()
        }
        parts = {"our encoder": (ours.encoder.forward_stages, imgs), "our encoder and pyramid": (ours, imgs)}
        training |= {name: trainer(partial(total, *part), ours.zero_grad, amp, device) for name, part in parts.items()}
        rows += table(training, args, device, "torchvision", batch, model=name, amp=amp, task="update")
        evaluation = {
            library: partial(find, each.eval(), [[picture] for picture in pictures], amp, device)
            for library, each in detectors.items()
        }
        rows += table(evaluation, args, device, "torchvision", batch, model=name, amp=amp, task="evaluation")
    return rows


def bench_segment(args, device) -> list[dict]:
    """UPerNet beside transformers' on the same weights, 150 classes: an update, and an evaluation."""
    try:
        from transformers import ConvNextV2Config, UperNetConfig, UperNetForSemanticSegmentation  # only here: it takes seconds
    except ImportError:
        raise UserError("bench.py segment compares with transformers, which is not installed; pip install transformers") from None
    rows = []
    for name, batch, amp in settings(args):
        encoder = MODELS[name](num_classes=0, stem_stride=args.stem_stride)
        if encoder.version != 2 or batch < 2:
            which = f"networks of version 2 on batches of at least 2 images, not {name} on {batch}"
            raise UserError(f"bench.py segment compares {which}; choose another --model or --batch_size")
        encoder.checkpoint_activations(args.checkpoint_activations)
        backbone = ConvNextV2Config(
            patch_size=args.stem_stride,
            depths=encoder.depths,
            hidden_sizes=list(encoder.dims),
            out_features=[f"stage{i}" for i in range(1, 5)],
        )
        config = UperNetConfig(backbone_config=backbone, auxiliary_in_channels=encoder.dims[2], num_labels=150)
        segmenters = {"ours": UPerNet(encoder, 150), "transformers": UperNetForSemanticSegmentation(config)}
        segmenters["ours"].load_state_dict(upernet_names(segmenters["transformers"].state_dict()))
        for each in segmenters.values():
            each.to(device, memory_format=torch.channels_last)
        imgs = torch.randn(batch, 3, args.input_size, args.input_size, device=device).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(150, (batch, args.input_size, args.input_size), device=device)
        losses = {
            "ours": lambda net=segmenters["ours"], imgs=imgs, labels=labels: sum(segmentation_losses(*net(imgs), labels).values()),
            "transformers": lambda net=segmenters["transformers"], imgs=imgs, labels=labels: net(imgs, labels=labels).loss,
        }
        training = {library: trainer(loss, updates(segmenters[library].train()), amp, device) for library, loss in losses.items()}
        rows += table(training, args, device, "transformers", batch, model=name, amp=amp, task="update")
        evaluation = {library: partial(find, each.eval(), [imgs], amp, device) for library, each in segmenters.items()}
        rows += table(evaluation, args, device, "transformers", batch, model=name, amp=amp, task="evaluation")
    return rows


def total(network: Callable, *inputs) -> torch.Tensor:
    """The sum of the means of a network's outputs: of losses it is their sum."""
    outputs = network(*inputs)
    return sum(each.float().mean() for each in (outputs.values() if isinstance(outputs, dict) else outputs))


@torch.no_grad()
def find(network: nn.Module, inputs: list, amp: str, device: torch.device) -> None:
    """Give `network` one input after the other, as evaluation does."""
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        for each in inputs:
            network(each)


def bench_heap(args, device) -> list[dict]:
    """The encoder with glibc's defaults and with `keep_heap_mapped`, in processes of their own, taken in turn; in CPU time."""
    rows = []
    for name, batch in zip(args.model, args.batch_size):
        times = {}
        command = [sys.executable, __file__, "encoder", "--model", name, "--batch_size", str(batch), "--device", "cpu"]
        command += ["--input_size", str(args.input_size), "--stem_stride", str(args.stem_stride), "--backend", "sparse"]
        for heap in ("kept", "default") * 3:
            with tempfile.TemporaryDirectory() as folder:
                words = [*command, "--amp", "none", "--repeats", str(args.repeats), "--output_dir", folder]
                subprocess.run(words, env=os.environ | {"HEAP": heap}, stdout=subprocess.DEVNULL, check=True)
                with open(f"{folder}/encoder.csv", newline="") as file:
                    for row in csv.DictReader(file):
                        times.setdefault(row["candidate"], {}).setdefault(heap, []).append(float(row["ms"]))
        for candidate, found in times.items():
            kept, default = (statistics.median(found[heap]) for heap in ("kept", "default"))
            row = {"model": name, "batch": batch, "candidate": candidate, "default ms": round(default), "kept ms": round(kept)}
            rows.append(row | {"ratio": round(default / kept, 2)})
    return rows


TASKS = {"encoder": bench_encoder, "step": bench_step, "sweep": bench_sweep}
TASKS |= {"data": bench_data, "finetune": bench_finetune, "detect": bench_detect, "segment": bench_segment, "heap": bench_heap}


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
    backends = list(dict.fromkeys(row["candidate"] for row in rows))
    labels = {"dense": "dense, unmasked", "timm": "timm, unmasked"}
    kept = "peak memory, MiB" if device.type == "cuda" else "memory kept for backward, MiB"
    figure, axes = new_figure(1, 2, 11, 4)
    for axis, value, label in ((axes[0, 0], "images/s", "images per second"), (axes[0, 1], "MiB", kept)):
        for k, (backend, colour) in enumerate(zip(backends, COLOURS)):
            heights = [row[value] for row in rows if row["candidate"] == backend]
            places = [g + k * 0.8 / len(backends) for g in range(len(groups))]
            axis.bar(places, heights, 0.8 / len(backends), color=colour, label=labels.get(backend, backend))
        names = [f"{model.removeprefix('convnextv2_')}\n{amp.replace('none', 'fp32')}" for model, amp in groups]
        axis.set_xticks([g + 0.4 - 0.4 / len(backends) for g in range(len(groups))], names)
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"Encoder, forward and backward, {device_name(device)}")
    save_figure(figure, path)


def draw_sweep(path: Path, rows: list[dict]) -> None:
    """Milliseconds against the share of visible patches, a line per backend."""
    curves = {}
    for row in rows:
        x, y = curves.setdefault(row["candidate"], ([], []))
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
    for ratio in {"sweep": SWEEP, "data": (), "segment": ()}.get(args.task, (args.mask_ratio,)):
        with value_errors_are_the_users():
            random_mask(1, grid, grid, ratio)
    rows = TASKS[args.task](args, processes.device)
    print_table(rows)
    path = output_dir / f"{args.task}.csv"
    save_csv(path, rows)
    if args.task == "encoder":
        draw_bars(path.with_suffix(".png"), rows, processes.device)
    elif args.task == "sweep":
        draw_sweep(path.with_suffix(".png"), rows)
    rounds = "" if args.task in ("data", "heap") else f"; median of {args.repeats} rounds"
    print(f"{device_name(processes.device)}, torch {torch.__version__}{rounds}; {path}")


if __name__ == "__main__":
    run_script(main, get_args)
