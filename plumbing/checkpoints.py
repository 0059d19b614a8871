"""A run's checkpoints: found, written at the right moments, and continued from; and the signals that ask for one."""

import argparse
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from plumbing.files import DamagedFile, file_of_run, find_checkpoints, load_file, prune_checkpoints, save_tensors
from plumbing.log import Meters, RunLog
from plumbing.processes import Processes
from plumbing.script import UserError, counted
from plumbing.signals import StopRequest

# Flags that may change when a run is continued, because they do not change what it computes (`amp` and `device` only its rounding);
# and how its updates are divided among processes and forward passes.
RUN_FLAGS = {
    "output_dir", "device", "amp", "use_amp", "compile", "resume", "auto_resume", "start_epoch", "save_ckpt", "save_ckpt_freq",
    "save_ckpt_num", "log_every", "num_workers", "pin_mem", "data_path", "batch_size", "dist_eval", "eval_freq",
    "save_every_steps", "save_every_minutes", "resume_anyway", "deterministic", "timeout_minutes", "checkpoint_activations",
    "update_freq", "processes", "images_per_forward", "images_per_epoch", "images_per_update",
}  # fmt: skip
DERIVED = {"images", "images_in_update", "updates_per_epoch"}  # in no flag


def load_run(directory: Path, args: argparse.Namespace, config: dict, stage: str, processes: Processes) -> dict:
    """Where to continue: at the checkpoint of --resume, with --auto_resume the newest sound one in `directory`, or the beginning.

    Of a folder, --resume means the newest checkpoint. The beginning has no "path". UserError if the checkpoint belongs to another stage
    or, without `--resume_anyway`, to a run with other settings (more --epochs, asked for on the command line, are none); or if a new
    run would mix with an old one.
    """
    path = processes.from_main(lambda: file_of_run(args.resume, "newest") if args.resume else _newest_sound(directory, args))
    if path is None:
        return {"path": None, "epoch": args.start_epoch, "update": 0, "log": "", "meters": [], "unreadable": []}
    state = load_file(path)
    if state.get("stage") != stage or not {"meters", "config"} <= state.keys():
        raise UserError(f"{path} is not a checkpoint-<epoch>.pth of {stage}, which could be continued; weights load by --finetune")
    saved = state["config"]
    if saved["epochs"] != args.epochs and (state["epoch"], state["update"]) > (args.epochs, 0):
        done = counted(state["epoch"], "epoch") + (f" and {counted(state['update'], 'update')}" if state["update"] else "")
        raise UserError(f"{path} has {done} behind it, more than --epochs {args.epochs}; give more, or another --output_dir")
    if fields := ", ".join(differences(saved, config, getattr(args, "origins", {}))):
        if not args.resume_anyway:
            fix = "repeat those flags, choose another --output_dir, or mean it: --resume_anyway"
            raise UserError(f"{path} was written with {fields}; {fix}")
        state["update"] = state["update"] * config["updates_per_epoch"] // saved["updates_per_epoch"]
        if processes.is_main:
            print(f"{path} was written with {fields}; continuing all the same")
    if len(state["meters"]) != processes.world_size:
        state["meters"] = [[sum(sums) / len(sums) for sums in zip(*state["meters"])]] * processes.world_size
    if processes.is_main and any(saved[name] != config[name] for name in ("processes", "images_per_forward")):
        drawn = "" if stage == "pretrain.py" else "; mixing and stochastic depth draw other numbers"
        before, now = (
            f"{counted(c['processes'], 'process')}, {counted(c['images_per_forward'], 'image')} per forward pass, "
            f"{c['images_per_epoch']:,} per epoch"
            for c in (saved, config)
        )
        print(f"{path} had {before}; now {now}: the same order of images, but sums round differently{drawn}")
    return state | {"path": str(path)}


def differences(saved: dict, config: dict, origins: dict[str, str]) -> list[str]:
    """What a checkpoint was written with and is otherwise now, as flags: `["--smoothing 0.1 (now 0.3)"]`.

    Without what a continued run may change: RUN_FLAGS, the three backends that compute one function, and more epochs, with the
    warm-up that follows from them, where `origins` (flag -> where its value came from) has them from the command line.
    """
    free = RUN_FLAGS | ({"backend"} if "leaky" not in (saved.get("backend"), config.get("backend")) else set())
    if config["epochs"] > saved["epochs"] and origins.get("epochs") == "the command line":
        free |= {"epochs"}
    if config["epochs"] != saved["epochs"] and origins.get("warmup_epochs") != "the command line":
        free |= {"warmup_epochs"}
    before, now = ({name: list(v) if isinstance(v, tuple) else v for name, v in c.items()} for c in (saved, config))
    differing = [name for name in sorted(before.keys() | now.keys()) if name not in free and before.get(name) != now.get(name)]
    told = [f"--{name} {_shown(saved.get(name))} (now {_shown(config.get(name))})" for name in differing if name not in DERIVED]
    if "images" in differing and not {"data_set", "holdout", "labels_per_class"} & set(differing):  # which tell why
        told.append(f"{counted(saved['images'], 'image')} in --data_path (now {config['images']:,})")
    before, now = (
        f"--batch_size {c['batch_size']} --update_freq {c['update_freq']} in {counted(c['processes'], 'process')}"
        for c in (saved, config)
    )
    if before != now and ("images_in_update" in differing or ("updates_per_epoch" in differing and "images" not in differing)):
        told.append(f"{before} (now {now})")
    return told


def _shown(value) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _newest_sound(directory: Path, args: argparse.Namespace) -> Path | None:
    """The newest checkpoint that can be read; what cannot is set aside under another name."""
    found = find_checkpoints(directory)
    if found and not args.auto_resume:
        raise UserError(f"--output_dir {directory} already holds a run; choose another one, delete it, or use --auto_resume")
    for path in reversed(found):
        try:
            load_file(path)
        except DamagedFile:
            path.rename(path.with_name(path.name + ".damaged"))
            print(f"warning: {path} is damaged and was set aside as {path.name}.damaged", file=sys.stderr)
        else:
            prune_checkpoints(directory, args.save_ckpt_num)
            return path
    if found:
        print(f"warning: no checkpoint in {directory} can be read; starting from the beginning", file=sys.stderr)
    return None


def restore(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take over a checkpoint's weights and moments, but not its optimiser's settings; UserError where shapes do not fit."""
    settings = [{name: group[name] for name in group.keys() - {"params", "lr"}} for group in optimizer.param_groups]
    try:
        model.load_state_dict(state["model"])
        if state["optimizer"]["param_groups"][0].keys() != optimizer.param_groups[0].keys():
            raise ValueError("another optimiser")
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{state['path']} does not fit these settings: {error}; its weights alone load by --finetune") from None
    for group, values in zip(optimizer.param_groups, settings):
        group.update(values)


class Checkpoints:
    """Writes a run's checkpoints, at the ends of epochs and inside them, and ends the run after a signal (`StopRequest`).

    `save` then ends the process with status 128 + the signal's number.
    """

    def __init__(self, directory: Path, args: argparse.Namespace, processes: Processes, log: RunLog, meters: Meters):
        self.directory, self.args, self.processes, self.log, self.meters = directory, args, processes, log, meters
        self.saved_at, self.stop, self.agreed = time.monotonic(), StopRequest(), 0

    def due(self) -> bool:
        """Whether to save after this update, the same in every process; all must ask."""
        steps, minutes = self.args.save_every_steps, self.args.save_every_minutes
        late = self.processes.is_main and minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        self.agreed, late = self.processes.max(self.stop.number, late)
        return bool(self.agreed or late or (steps and self.log.done % steps == 0))

    def due_at_end(self, epoch: int, last: bool) -> bool:
        """Whether to save at the end of `epoch`, perhaps the `last`: the same in every process, and all must ask."""
        (self.agreed,) = self.processes.max(self.stop.number)
        return bool(self.agreed or (epoch + 1) % self.args.save_ckpt_freq == 0 or last)

    def save(self, epoch: int, update: int, state: dict, unreadable: set[int]) -> None:
        """Write `state` and the place in the run, `update` updates after `epoch` epochs. Every process must call it."""
        state |= {"epoch": epoch, "update": update, "log": "".join(self.log.lines)}
        state |= {"meters": self.processes.gather(self.meters.state()), "unreadable": sorted(self.processes.union(unreadable))}
        skipping = any(skipped_in_row for *_, skipped_in_row in state["meters"])
        if self.processes.is_main and self.args.save_ckpt and (self.agreed or not (update and skipping)):  # good ones stay longer
            path = self.directory / (f"checkpoint-{epoch}-{update}.pth" if update else f"checkpoint-{epoch}.pth")
            with self.log.writing("a checkpoint"):
                save_tensors(path, state)
                prune_checkpoints(self.directory, self.args.save_ckpt_num, path)
            self.saved_at = time.monotonic()
        if self.agreed:
            self.log.bar.close()
            self.processes.gather(None)  # nobody leaves before the checkpoint is written
            if self.processes.is_main:
                name, complete = signal.Signals(self.agreed).name, self.log.done == self.log.total and not update
                print(f"{name}: ended after update {self.log.done}; {self._what_is_left(complete)}", flush=True)
            sys.exit(128 + self.agreed)

    def _what_is_left(self, complete: bool) -> str:
        found = find_checkpoints(self.directory)
        if not found:
            return "the same command starts anew, as there is no checkpoint"
        if complete:
            return "the run is complete"
        if self.args.resume or not self.args.auto_resume:
            return f"the same command with --resume {found[-1]} continues"
        return f"the same command continues from {found[-1]}"
