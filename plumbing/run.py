"""Shared by all training scripts: a run's batches, updates, log and checkpoints. Each script keeps its own loop.

A run is a function of (flags, seed, update). So it may stop at any time, and the same command continues it exactly.
"""

import argparse
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from plumbing import dist, files, optim
from plumbing.files import UserError
from plumbing.loading import STOP_SIGNALS, EpochSampler, Samples, make_loader, mix_seed

# Flags that may differ when a run continues, because they change its result only by floating-point error.
FREE = (
    "output_dir", "resume", "device", "amp", "use_amp", "compile", "checkpoint_activations", "deterministic",
    "num_workers", "data_path", "batch_size", "update_freq", "scratch", "save_ckpt", "save_ckpt_freq", "save_ckpt_num",
    "save_every_steps", "log_every", "log_dir", "eval_freq", "disable_eval", "dist_eval",
)  # fmt: skip
DERIVED = {"images": "the number of images", "images_in_update": "--batch_size x --update_freq x processes"}
DERIVED["updates_per_epoch"] = DERIVED["images_in_update"]


class Batch(NamedTuple):
    """One forward pass: a loaded batch after `images.on_device`, and its position in the run."""

    images: Any  # (N, 3, S, S), normalised; for detection a list of such images
    targets: Any  # (N,) labels, -1 without; for segmentation maps of labels, for detection a list of dictionaries
    update: int  # the update that it belongs to, counted from the beginning of the run
    part: slice  # of the update's images, which other forward passes and processes share
    images_in_update: int


class Run:
    """A run in its output directory, continuing from where the last one stopped.

        with Run(args, images, device, net, optimizer, "stage.py") as run:
            for epoch in run.epochs():
                for batch in run.batches(epoch):
                    if run.backward(... run.network(batch.images) ...):
                        run.update()
                if run.save_due(epoch):
                    run.save(epoch + 1)
        run.finish("files in the output directory")

    Args:
        images: samples, with `on_device(images, targets, device)`, which turns a loaded batch into the network's input.
        stage: the script; only its own checkpoints can be continued.
        schedule: run -> (update -> learning rate); by default half a cosine after a linear warm-up.
        iterations: updates of the whole run, if it is not counted in epochs; its last epoch may end early.
        origin: entries to write into every file of weights, besides configuration and versions.
    """

    def __init__(
        self, args: argparse.Namespace, images: Samples, device: torch.device, net: nn.Module,
        optimizer: torch.optim.Optimizer, stage: str, ema: AveragedModel | None = None,
        schedule: Callable | None = None, iterations: int | None = None, **origin,
    ):  # fmt: skip
        self.args, self.images, self.device, self.net, self.ema = args, images, device, net, ema
        self.optimizer, self.stage, self.output_dir = optimizer, stage, Path(args.output_dir)
        world_size = dist.world_size()
        self.batch_size = min(args.batch_size, len(images) // world_size)
        if self.batch_size < 1:
            fix = "lower torchrun's --nproc_per_node"
            raise UserError(f"{len(images)} images are too few for {world_size} processes; {fix}")
        self.sampler = EpochSampler(len(images), self.batch_size, dist.rank(), world_size, args.seed)
        self.loader = make_loader(images, self.sampler, args.num_workers, pin_memory=device.type == "cuda")
        self.passes = len(self.sampler)  # forward passes per epoch
        self.updates = math.ceil(self.passes / args.update_freq)  # per epoch
        self.total = iterations or args.epochs * self.updates
        self.last_epoch = math.ceil(self.total / self.updates) - 1
        self.images_per_update = self.batch_size * min(args.update_freq, self.passes) * world_size
        self.peak_lr = args.lr if args.lr is not None else args.blr * self.images_per_update / 256
        self.schedule = (schedule or cosine)(self)
        self.autocast = dist.autocast(args.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.autocast.fast_dtype == torch.float16)
        flags = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}
        self.config = flags | {"images": len(images), "images_in_update": self.images_per_update}
        self.config["updates_per_epoch"] = self.updates
        self.origin = origin | {"config": self.config, "versions": files.versions()}

        self.first_epoch = self.first_update = 0
        self.best, self.records = -math.inf, []  # the best evaluation's score; log.jsonl's records
        path = self._resume()
        self.done = self.first_done = self.first_epoch * self.updates + self.first_update
        files.make_directory(self.output_dir)
        self.write("config.json", files.save_json, self.config | {"versions": files.versions()})
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        self.write("log.jsonl", files.write_atomically, lambda file: file.write_text(lines))
        self.board = self._open_board() if args.log_dir and dist.rank() == 0 else None
        self.network = torch.compile(net) if args.compile else net
        if world_size > 1:
            self.network = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
        epochs = f"{self.updates} updates per epoch, {self.total / self.updates:g} epochs"
        dist.say(f"{self.images_per_update} images per update, {epochs}, learning rate {self.peak_lr:.2e}")
        dist.say(f"{world_size} x {device.type}, {args.amp or self.autocast.fast_dtype}, into {self.output_dir}")
        if path:
            dist.say(f"continuing from {path} at epoch {self.first_epoch}, update {self.first_update}")
        self.signal = self.ending = 0  # the signals that asked this process, and any process, to end
        self.handlers = {}

    def _resume(self) -> str | None:
        """Load the newest checkpoint in the output directory, whose settings must match; else --resume's."""
        own, resume = next(reversed(files.find_checkpoints(self.output_dir)), None), self.args.resume
        own, path = dist.gather((own, own or (resume and files.file_of_run(resume, "newest"))))[0]
        if path is None:
            return None
        state = files.load_file(path)
        if state.get("stage") != self.stage or "optimizer" not in state:
            start = "init_weight" if self.stage == "pretrain.py" else "finetune"
            line = f"{path} is no checkpoint of a run of {self.stage}, which --resume continues"
            raise UserError(f"{line}; start from its weights with --{start}")
        before, now = state["config"], self.config
        if own and now["epochs"] > before["epochs"]:  # the same run, made longer
            longer = f"--epochs {before['epochs']} before, now {now['epochs']}"
            dist.say(f"{longer}: from here the longer run's learning rates")
            before = before | {name: now[name] for name in ("epochs", "warmup_epochs") if name in now}
        names = [name for name in before | now if name not in FREE and before.get(name) != now.get(name)]
        if names:
            changes = [f"{DERIVED.get(name, f'--{name}')} {before.get(name)} (now {now.get(name)})" for name in names]
            line = f"{path} was written with {', '.join(changes)}"
            if own:
                fix = f"repeat these to continue it, or start anew with --output_dir NEW, from there by --resume {path}"
                raise UserError(f"{line}; {fix}")
            dist.say(line)
        self.net.load_state_dict(state["model"])
        # Only the state: the groups' hyperparameters come from the flags.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(state["model_ema"])
            self.ema.n_averaged.fill_(state["ema_updates"])
        self.first_epoch, self.first_update, self.best = state["epoch"], state["update"], state["best"]
        log = Path(path).with_name("log.jsonl")
        lines = log.read_text().splitlines() if log.exists() else []
        self.records = [json.loads(line) for line in lines[: state["records"]]]  # later updates run again
        return str(path)

    # --- the loop's calls ---------------------------------------------------------------------------------------------

    def __enter__(self) -> "Run":
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
            numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.handlers = {number: signal.signal(number, self._receive) for number in numbers}
        watched = dist.rank() == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.bar = tqdm(total=self.total, initial=self.done, unit="update", disable=not watched, smoothing=0.05)
        self.start = time.perf_counter()
        self._reset()
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.board:
            self.board.flush()
        self.loader = None  # its workers end at once
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def epochs(self) -> range:
        """Return the remaining epochs."""
        return range(self.first_epoch, self.last_epoch + 1)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the epoch's remaining forward passes, with learning rate and random generator set for each."""
        freq, size, world_size, rank = self.args.update_freq, self.batch_size, dist.world_size(), dist.rank()
        self.sampler.epoch, self.sampler.first_batch = epoch, self.first_update * freq
        asked = time.perf_counter()
        for number, (images, targets) in enumerate(self.loader, self.sampler.first_batch):
            if self.done == self.total:
                break
            self.waited += time.perf_counter() - asked
            update, turn = divmod(number, freq)
            self.turns = min(freq, self.passes - update * freq)  # an epoch's last update may have fewer
            self.epoch, self.update_in_epoch, self.completes_update = epoch, update, turn == self.turns - 1
            self.lr = self.schedule(self.done)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * group.get("lr_scale", 1.0)
            if world_size > 1:
                self.network.require_backward_grad_sync = self.completes_update  # as `no_sync` does
            torch.manual_seed(mix_seed("step", self.args.seed, epoch, number, rank))  # mixing, stochastic depth
            first = (turn * world_size + rank) * size
            position = self.done, slice(first, first + size), self.turns * world_size * size
            yield Batch(*self.images.on_device(images, targets, self.device), *position)
            asked = time.perf_counter()
        self.first_update = 0

    def backward(self, loss: torch.Tensor | dict[str, torch.Tensor]) -> bool:
        """Add the gradient of a forward pass's mean loss to the update's; return whether that completes the update.

        Named losses are summed, and each is logged.
        """
        losses = loss if isinstance(loss, dict) else {}
        loss = sum(losses.values()) if losses else loss
        self.scaler.scale(loss / self.turns).backward()
        finite, self.names = loss.detach().isfinite(), ["loss", *losses]
        values = torch.stack([value.detach().float() for value in (loss, *losses.values())])
        self.sums = self.sums + torch.cat([torch.where(finite, values, 0), finite[None]]) / self.turns
        return self.completes_update

    def update(self) -> None:
        """Clip, step and average; log and save when due; after a signal, end."""
        args, self.grad_norm = self.args, optim.apply_update(self.optimizer, self.scaler, self.args.clip_grad)
        if self.ema:
            self.ema.update_parameters(self.net)
        self.done += 1
        self.bar.update()
        self.ending = dist.maximum(self.signal)
        ends_epoch = self.update_in_epoch + 1 == self.updates or self.done == self.total
        save = self.ending or (args.save_every_steps and self.done % args.save_every_steps == 0)
        if self.done == self.first_done + 1:
            self.second = time.perf_counter()  # when the second update begins: the first waits for loaders
        elif self.done == self.first_done + 2 and self.bar.disable:
            seconds = time.perf_counter() - self.second
            left = tqdm.format_interval(seconds * (self.total - self.done))
            dist.say(f"{seconds:.1f} s an update; at that pace {left} left, without evaluations")
        # Log lines divide the epoch evenly, so that each averages equally many updates.
        lines, update = max(1, round(self.updates / args.log_every)), self.update_in_epoch
        if save or ends_epoch or (update + 1) * lines // self.updates > update * lines // self.updates:
            self._report()  # before every checkpoint, so that none is written with non-finite weights
            if save:
                self.save(self.epoch, self.update_in_epoch + 1)

    def evaluation_due(self, epoch: int) -> bool:
        """Tell whether --eval_freq asks for an evaluation after `epoch`; the last epoch always has one."""
        return (epoch + 1) % self.args.eval_freq == 0 or epoch == self.last_epoch

    def save_due(self, epoch: int) -> bool:
        """Tell whether to save after `epoch`. Write other outputs before `save`: the process may be killed after it."""
        self.ending = dist.maximum(self.signal)
        return bool(self.ending) or (epoch + 1) % self.args.save_ckpt_freq == 0 or epoch == self.last_epoch

    def save(self, epoch: int, update: int = 0) -> None:
        """Write a checkpoint for `epoch` epochs plus `update` updates; after a signal, end."""
        # Without the optimiser's hyperparameters: flags and schedule set them.
        state = {"model": self.net.state_dict(), "optimizer": {"state": self.optimizer.state_dict()["state"]}}
        state |= {"scaler": self.scaler.state_dict(), "stage": self.stage, "epoch": epoch, "update": update}
        state |= {"records": len(self.records), "best": self.best}
        if self.ema:
            state |= {"model_ema": self.ema.module.state_dict(), "ema_updates": int(self.ema.n_averaged)}
        if self.args.save_ckpt:
            name = f"checkpoint-{epoch}-{update}.pth" if update else f"checkpoint-{epoch}.pth"
            self.write(name, files.save_tensors, state | self.origin)
            self.write("", files.prune_checkpoints, self.args.save_ckpt_num)
        if self.ending:
            dist.gather(None)  # no process leaves before the checkpoint is written
            again = "continues" if self.args.save_ckpt else "begins again, since --no-save_ckpt"
            dist.say(f"ended by signal {self.ending} after update {self.done}; the same command {again}")
            sys.exit(128 + self.ending)

    def finish(self, outputs: str) -> None:
        """Report that the run has ended, and what it wrote."""
        took = tqdm.format_interval(time.perf_counter() - self.start)
        state = f"finished {self.last_epoch + 1} epochs in {took}"
        state = state if self.first_done < self.done else "had finished before"
        if self.device.type == "cuda":
            state += f", with at most {self._peak_memory()} GiB of GPU memory"
        dist.say(f"{state}; in {self.output_dir}:\n  {outputs}")
        if self.board:
            for path in sorted(self.output_dir.glob("*.png")):
                pixels = np.asarray(Image.open(path).convert("RGB"))
                self.board.add_image(path.stem, pixels, self.done, dataformats="HWC")
            self.board.close()

    # --- files, log and signals ---------------------------------------------------------------------------------------

    def write(self, name: str, write: Callable, *args) -> None:
        """In the main process, call `write(path, *args)` for an output file of this name."""
        if dist.rank() == 0:
            write(self.output_dir / name, *args)

    def record(self, record: dict, line: str) -> None:
        """Append to the log, and show `line` in the progress bar, or print it without one. Restart the clock."""
        self.records.append(record)
        if dist.rank() == 0:
            with open(self.output_dir / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        if self.board:
            self._show(record)
        self.bar.set_description_str(line) if not self.bar.disable else dist.say(line)
        self._reset()

    def _report(self) -> None:
        """Log the updates since the last report. Every process must call it; here the host waits for the device."""
        fp16, updates, now = self.scaler.is_enabled(), self.done - self.reported, time.perf_counter()
        *sums, finite, norm = (value / dist.world_size() for value in dist.total([*self.sums, self.grad_norm]))
        # In float16 the scaler skips updates whose gradient overflows.
        if finite < (1e-3 if fp16 else updates - 1e-3) or not (fp16 or math.isfinite(norm)):
            fix = "try a lower --blr, --clip_grad 1 or --amp none, with --resume a checkpoint and another --output_dir"
            raise UserError(f"the loss or its gradient was not finite before update {self.done}; {fix}")
        unreadable = set().union(*dist.gather(self.images.unreadable.nonzero().flatten().tolist()))
        if len(unreadable) > max(10, len(self.images) // 100):
            fix = "fix or remove the files named above"
            images = f"{len(unreadable)} of {len(self.images)} images"
            raise UserError(f"{images} cannot be read, over 1% and over 10; {fix}")
        seconds = now - self.lap
        speed = updates * self.images_per_update / seconds
        record = {"epoch": round(self.done / self.updates, 4), "update": self.done, "lr": self.lr}
        record |= {name: round(value / finite, 6) for name, value in zip(self.names, sums)}
        record |= {"grad_norm": round(norm, 6) if math.isfinite(norm) else None}
        record |= {"skipped_updates": round(updates - finite), "images_per_second": round(speed, 1)}
        record |= {"data_wait": round(self.waited / seconds, 3), "unreadable_images": len(unreadable)}
        record |= {"seconds": round(now - self.start, 1)}
        record |= {"gpu_memory": self._peak_memory()} if self.device.type == "cuda" else {}
        left = (now - self.start) / (self.done - self.first_done) * (self.total - self.done)
        where = f"epoch {record['epoch']:.2f}/{self.total / self.updates:g}  loss {record['loss']:.4f}"
        self.record(record, f"{where}  lr {self.lr:.2e}  {speed:.0f} images/s  {tqdm.format_interval(left)} left")

    def _peak_memory(self) -> float:
        return round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)  # GiB

    def _open_board(self):
        """Open TensorBoard's writer with the records so far in place of this run's older files: it equals the log."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--log_dir needs a package; run `pip install tensorboard`, or leave it out") from None
        suffix = f".{self.output_dir.resolve().name}"
        for path in Path(self.args.log_dir).glob("events.out.tfevents.*"):
            if path.name.endswith(suffix):
                path.unlink()
        self.board = SummaryWriter(self.args.log_dir, filename_suffix=suffix)
        for record in self.records:
            self._show(record)
        return self.board

    def _show(self, record: dict) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "update":
                self.board.add_scalar(name, value, record["update"])

    def _reset(self) -> None:
        self.sums, self.waited, self.lap, self.reported = 0.0, 0.0, time.perf_counter(), self.done

    def _receive(self, number: int, _) -> None:
        if self.signal and time.monotonic() > self.received + 1:  # a second request, not torchrun's copy of the first
            sys.exit(128 + number)
        self.signal, self.received = number, time.monotonic()


def cosine(run: Run) -> Callable[[int], float]:
    """Map updates to learning rates: linear warm-up over --warmup_epochs, then half a cosine to --min_lr."""
    warmup, epochs = run.args.warmup_epochs, run.total / run.updates
    return lambda update: optim.learning_rate(update / run.updates, run.peak_lr, run.args.min_lr, warmup, epochs)
