"""What every training script does alike: a run's data, updates, log and checkpoints. Each script keeps its own loop."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset
from tqdm import tqdm

from plumbing import optim
from plumbing.checkpoints import Checkpoints, load_run, restore
from plumbing.devices import autocast_dtype, set_determinism
from plumbing.files import prepare_output_dir, run_directory, save_json, versions
from plumbing.loading import EpochSampler, Unreadable, count_workers, make_loader
from plumbing.log import Meters, RunLog, TimedLoader, stop_if_diverging
from plumbing.processes import Processes, setup_processes
from plumbing.script import UserError, counted
from plumbing.seeds import mix_seed


def carry_out(args: argparse.Namespace, train: Callable, evaluate: Callable | None = None, predict: Callable | None = None) -> None:
    """Join the other processes and call `task(args, processes, output_dir)`, the task that --eval and --predict choose.

    Training has the output directory to itself; the other tasks only add files to it.
    """
    processes = setup_processes(args.device, args.timeout_minutes)
    set_determinism(args.deterministic)
    if use := predict if predict and args.predict else evaluate if evaluate and args.eval else None:
        use(args, processes, processes.from_main(lambda: prepare_output_dir(args.output_dir)))
    else:
        with run_directory(args.output_dir, processes) as output_dir:
            train(args, processes, output_dir)


class Batch(NamedTuple):
    """One forward pass: what `images.on_device` gives of a loaded batch, and where in the run it is."""

    images: Any  # (N, 3, S, S), normalised; for detection a list of such images
    targets: Any  # (N,) labels, -1 without; for segmentation maps of labels, for detection a list of dictionaries
    number: int  # of this forward pass, in its epoch
    update: int  # of the update that it belongs to, since the beginning of the run
    part: slice  # the place of these images among the update's, which other forward passes and processes share
    images_in_update: int


class Run:
    """A run in its output directory, from wherever the last one stopped.

        run = Run(args, images, processes, output_dir)     # the loader, and what follows from the flags
        network = run.start(net, optimizer, "stage.py")    # resume, compile, distribute; None when the run has already finished
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                with run.autocast():
                    loss = ...
                if run.backward(loss):
                    run.update()
            if run.save_due(epoch):
                run.save(epoch + 1)
        run.close("what lies in the output directory")

    Args:
        images: a data set of (image, target, failed) items, indexed by (epoch, index). Its `on_device(images, targets, device)`
            makes of a loaded batch what the network takes; its `items` are named when they cannot be read, and `why(index)`.
        iterations: updates of the whole run, for one that is not counted in epochs. Its last epoch may end early.

    Attributes that scripts read: device, images_per_update, updates (per epoch), total (updates of the run), peak_lr, config,
    resumed (the state of the checkpoint that the run continues from), log.
    """

    def __init__(
        self, args: argparse.Namespace, images: Dataset, processes: Processes, output_dir: Path, iterations: int | None = None
    ):
        self.args, self.images, self.processes, self.output_dir, self.device = args, images, processes, output_dir, processes.device
        self.lines = []  # said before the start
        self.amp_dtype = autocast_dtype(args.amp, self.device)
        world_size = processes.world_size
        self.batch_size = min(args.batch_size, len(images) // world_size)
        if self.batch_size == 0:
            raise UserError(
                f"{counted(len(images), 'image')} are too few for {world_size} processes; lower torchrun's --nproc_per_node"
            )
        self.sampler = EpochSampler(len(images), self.batch_size, processes.rank, world_size, args.seed)
        pin_memory = args.pin_mem and self.device.type == "cuda"
        self.loader = TimedLoader(make_loader(images, self.sampler, count_workers(args, processes), pin_memory))
        self.unreadable = Unreadable(images)
        self.passes = len(self.sampler)  # forward passes per epoch
        self.updates = math.ceil(self.passes / args.update_freq)  # per epoch
        self.total = iterations or args.epochs * self.updates
        self.last_epoch = math.ceil(self.total / self.updates) - 1
        self.images_per_update = self.batch_size * min(args.update_freq, self.passes) * world_size
        self.peak_lr = optim.peak_learning_rate(args, self.images_per_update)
        updates, epochs, rates = self.updates, self.total / self.updates, (self.peak_lr, args.min_lr)
        self.schedule = lambda update: optim.learning_rate(update / updates, *rates, args.warmup_epochs, epochs)

    def start(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, stage: str, ema: AveragedModel | None = None,
        extra: Callable[[], dict] = dict, schedule: Callable[[int], float] | None = None, losses: Sequence[str] = (), **origin,
    ) -> nn.Module | None:  # fmt: skip
        """Continue the run if there is one; the network to call, compiled and distributed as asked. None if it has finished.

        stage: the script, whose checkpoints alone can be continued.
        ema: a moving average of `net`, to be updated and saved with it.
        extra: what else to save with every checkpoint, and to find again in `resumed`.
        schedule: update, since the beginning of the run -> learning rate; half a cosine after a linear warm-up by default.
        losses: names of the losses that add up to the loss, where `backward` is given several.
        origin: what to write into every file of weights, besides configuration and versions.
        """
        args, processes = self.args, self.processes
        self.net, self.optimizer, self.ema, self.extra = net, optimizer, ema, extra
        self.schedule = schedule or self.schedule
        self.scaler = optim.make_scaler(self.device, self.amp_dtype)
        per_forward = self.batch_size * processes.world_size
        self.config = vars(args) | {"images": len(self.images), "images_in_update": self.images_per_update}
        self.config |= {"updates_per_epoch": self.updates, "processes": processes.world_size}
        self.config |= {"images_per_forward": per_forward, "images_per_epoch": self.passes * per_forward}
        self.stage, self.origin = stage, origin | {"config": self.config, "versions": versions()}
        self.resumed = state = load_run(self.output_dir, args, self.config, stage, processes)
        if state["path"]:
            restore(state, net, optimizer)
            if self.amp_dtype == torch.float16 and state["scaler"]["scale"] != 1:  # which is that of the other types
                self.scaler.load_state_dict(state["scaler"])
            if ema and "model_ema" in state:
                ema.module.load_state_dict(state["model_ema"])
                ema.n_averaged.fill_(state["ema_updates"])
        self.first_epoch, self.first_update = state["epoch"], state["update"]
        lines, self.lines = self.lines, None
        if self.first_epoch > self.last_epoch:
            finished = f"{self.output_dir} has already finished its {counted(self.last_epoch + 1, 'epoch')}"
            self.say(f"{finished}; choose another --output_dir for a new run")
            return None
        per_epoch = f"{counted(self.updates, 'update')} per epoch, {counted(self.last_epoch + 1, 'epoch')}"
        precision = "float32" if self.amp_dtype is None else args.amp or self.amp_dtype
        for line in lines:
            self.say(line)
        if getattr(args, "images_per_update", None) not in (None, self.images_per_update):  # a recipe's
            rule = f"; the learning rate follows {self.images_per_update}" if args.lr is None else ""
            self.say(f"the recipe is for {args.images_per_update} images per update{rule}")
        self.say(f"{counted(self.images_per_update, 'image')} per update, {per_epoch}, lr {self.peak_lr:.2e}")
        self.say(f"{processes.world_size} x {self.device.type}, {precision}, into {self.output_dir}")
        if self.peak_lr < 1e-5 and args.lr is None:
            rule = f"--blr {args.blr:g} x {self.images_per_update} images per update / 256"
            self.warn(f"the learning rate {self.peak_lr:.2g} = {rule} teaches very slowly; raise --blr, or give --lr")
        if state["path"]:
            self.say(f"continuing from {state['path']} at epoch {self.first_epoch}, update {self.first_update}")
        done = self.updates * self.first_epoch + self.first_update
        if state["path"] and not schedule and self.total == args.epochs * self.updates and args.epochs > state["config"]["epochs"]:
            self._say_that_it_is_longer(argparse.Namespace(**state["config"]), done)
        self.log = RunLog(self.output_dir, self.updates, self.total, done, state["log"], processes)
        self.meters = Meters(self.device, state["meters"], processes.rank, losses)
        self.unreadable.indices = set(state["unreadable"])
        self.checkpoints = Checkpoints(self.output_dir, args, processes, self.log, self.meters)
        self.write("config.json", save_json, self.config | {"versions": versions()})

        self.network = torch.compile(net) if args.compile else net
        if processes.world_size > 1:
            self.network = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
        return self.network

    def _say_that_it_is_longer(self, saved: argparse.Namespace, done: int) -> None:
        rates = optim.peak_learning_rate(saved, saved.images_in_update), saved.min_lr, saved.warmup_epochs, saved.epochs

        def before(update: int) -> float:
            return optim.learning_rate(update / self.updates, *rates)

        line = f"--epochs {saved.epochs} before, now {self.args.epochs}: "
        if all(before(update) == self.schedule(update) for update in range(done)):
            self.say(f"{line}the learning rate has been the longer run's so far")
        else:
            rate = f"{self.schedule(done):.2e} instead of {before(done):.2e}"
            unlike = f"{self.args.epochs} epochs from the beginning would give another result"
            self.say(f"{line}from here on the learning rate is the longer run's, {rate}; {unlike}")

    def epochs(self) -> range:
        """The epochs that are left."""
        return range(self.first_epoch, self.last_epoch + 1)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The forward passes that are left of an epoch, with the learning rate set for each."""
        args, size, world_size, rank = self.args, self.batch_size, self.processes.world_size, self.processes.rank
        self.sampler.epoch, self.sampler.first_batch = epoch, self.first_update * args.update_freq
        for number, (images, targets, failed) in enumerate(self.loader, self.sampler.first_batch):
            self.unreadable.note(failed)
            update, turn = divmod(number, args.update_freq)
            step = epoch * self.updates + update
            if step == self.total:
                break
            self.turns = min(args.update_freq, self.passes - update * args.update_freq)  # an epoch's last update may have fewer
            self.epoch, self.update_in_epoch, self.completes_update = epoch, update, turn == self.turns - 1
            self.lr = self.schedule(step)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * group.get("lr_scale", 1.0)
            if world_size > 1:
                self.network.require_backward_grad_sync = self.completes_update  # as `no_sync` does
            torch.manual_seed(mix_seed("step", args.seed, epoch, number, rank))  # of mixing, stochastic depth, sampled regions
            images, targets = self.images.on_device(images, targets, self.device)
            first = (turn * world_size + rank) * size
            yield Batch(images, targets, number, step, slice(first, first + size), self.turns * world_size * size)
        self.first_update = 0

    def autocast(self) -> torch.autocast:
        """The precision of --amp, for a forward pass."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def backward(self, loss: torch.Tensor | dict[str, torch.Tensor]) -> bool:
        """Add the gradient of a forward pass's mean loss to the update's; whether that completes it.

        A dictionary of losses, those that `start` was told of, is summed, and each is logged.
        """
        losses = loss if isinstance(loss, dict) else {}
        loss = sum(losses.values()) if losses else loss
        self.scaler.scale(optim.nan_gradient_unless_finite(loss) / self.turns).backward()
        self.meters.add_loss(loss / self.turns, {name: part / self.turns for name, part in losses.items()})
        return self.completes_update

    def update(self) -> None:
        """Clip, step, average, log and save what is due; after a signal, end."""
        self.meters.end_update(optim.apply_update(self.optimizer, self.scaler, self.args.clip_grad, self.amp_dtype))
        if self.ema:
            self.ema.update_parameters(self.net)
        self.log.advance()
        if self.device.type == "cpu" and (days := self.log.days_left()) > 3:  # on GPUs the paper's schedules do take days
            self.warn(f"at this speed the run takes {days:.0f} days more; lower --epochs or --input_size, or use a GPU")
        ends_epoch = self.update_in_epoch + 1 == self.updates or self.log.done == self.total
        if self.log.done % self.args.log_every == 0 or ends_epoch:
            self.unreadable.check(self.processes)
            record = self.log.report(self.meters, self.loader, self.images_per_update, self.lr, len(self.unreadable.indices))
            stop_if_diverging(record, self.output_dir)
        if self.checkpoints.due():
            self.save(self.epoch, self.update_in_epoch + 1)

    def is_due(self, epoch: int, every: int) -> bool:
        """Whether something that happens every so many epochs, and after the last one, follows `epoch`."""
        return (epoch + 1) % every == 0 or epoch == self.last_epoch

    def save_due(self, epoch: int) -> bool:
        """Whether to save at the end of `epoch`. Whatever else the epoch leaves is written before: a kill may follow `save`."""
        return self.checkpoints.due_at_end(epoch, epoch == self.last_epoch)

    def save(self, epoch: int, update: int = 0) -> None:
        """Write a checkpoint of the place `update` updates after `epoch` epochs; after a signal, end."""
        state = {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        state |= {"stage": self.stage}
        if self.ema:
            state |= {"model_ema": self.ema.module.state_dict(), "ema_updates": int(self.ema.n_averaged)}
        self.checkpoints.save(epoch, update, state | self.origin | self.extra(), self.unreadable.indices)

    def write(self, name: str, write: Callable, *args) -> None:
        """In the main process, `write(path, *args)` for an output file of this name; a full disk costs a warning."""
        if self.processes.is_main:
            with self.log.writing(name):
                write(self.output_dir / name, *args)

    def record(self, record: dict, line: str) -> None:
        """Log an evaluation: what has passed since the last line is no training time."""
        self.log.write(record, line)
        self.loader.lap()

    def say(self, line: str) -> None:
        """Print in the main process; before `start` knows that there will be a run, keep the line for then."""
        if self.lines is not None:
            self.lines.append(line)
        elif self.processes.is_main:
            print(line)

    def warn(self, line: str) -> None:
        """In the main process, a warning that does not break the progress bar."""
        if self.processes.is_main:
            tqdm.write(f"warning: {line}", file=sys.stderr)

    def close(self, outputs: str) -> None:
        """End the run."""
        self.loader = None  # its workers end at once; the garbage collector would wait five seconds for them
        took = self.log.close()
        took = f"; {took} since it was continued" if self.resumed["path"] else f" in {took}"
        self.say(f"finished {counted(self.last_epoch + 1, 'epoch')}{took}; in {self.output_dir}:\n  {outputs}")
