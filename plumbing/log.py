"""What a run tells of itself: `log.jsonl`, the progress line, and the sums behind them."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.files import find_checkpoints, write_atomically
from plumbing.processes import Processes
from plumbing.script import UserError, counted


def shows_bars() -> bool:
    """Whether a progress bar can be seen moving: at a terminal, and in a notebook; elsewhere plain lines take its place."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class RunLog:
    """`log.jsonl` and the progress line, written by the main process only.

    Args:
        updates: updates per epoch.
        total: updates of the whole run.
        done: updates that earlier parts of the run have made.
        text: what they wrote to the log, which it begins with.

    The whole log is kept in `lines`, and goes into checkpoints: what cannot be written now is written with the next line.
    """

    def __init__(self, directory: Path, updates: int, total: int, done: int, text: str, processes: Processes):
        self.path, self.updates, self.total, self.processes = directory / "log.jsonl", updates, total, processes
        self.done = self.first_done = self.reported = done
        self.lines, self.lines_written, self.size, self.unwritten = text.splitlines(keepends=True), 0, -1, set()
        self.start, quiet = time.perf_counter(), not (processes.is_main and shows_bars())
        self.bar = tqdm(total=total, initial=done, unit="update", disable=quiet, smoothing=0.05)
        if processes.is_main:
            self._flush()

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Where writing fails (a full disk, say), warn and go on: the next save tries again, and `close` tells what is missing."""
        directory = self.path.parent
        if not directory.exists():
            tqdm.write(f"warning: {directory} has vanished; making it anew", file=sys.stderr)
            with suppress(OSError):  # the write then fails as well
                directory.mkdir()
        try:
            yield
            self.unwritten.discard(name)
        except OSError as error:
            self.unwritten.add(name)
            why = error.strerror or error
            tqdm.write(f"warning: cannot write {name} to {directory} ({why}); the next save tries again", file=sys.stderr)

    def _flush(self) -> None:
        with self.writing("log.jsonl"):
            if self.path.exists() and self.path.stat().st_size == self.size:
                with open(self.path, "a") as file:
                    file.write("".join(self.lines[self.lines_written :]))
            else:  # lines of an earlier part that it did not live to save, half a line, or nothing
                write_atomically(self.path, lambda file: file.write_text("".join(self.lines)))
            self.lines_written, self.size = len(self.lines), self.path.stat().st_size

    def records(self) -> list[dict]:
        """What has been logged."""
        return [json.loads(line) for line in self.lines]

    def advance(self) -> None:
        """Count one update."""
        self.done += 1
        self.bar.update()
        if self.done == self.first_done + 1:
            self.after_first = time.perf_counter()

    def days_left(self) -> float:
        """After this part's fourth update, the days that the rest takes at the speed since its first; else 0, to tell it once."""
        if self.done != self.first_done + 4:
            return 0.0
        return (time.perf_counter() - self.after_first) / 3 * (self.total - self.done) / 86400

    def report(self, meters: "Meters", loader: "TimedLoader", images_per_update: int, lr: float, unreadable_images: int) -> dict:
        """Log the updates since the last report. Every process must call it; it is where the host waits for the device."""
        seconds, waited = loader.lap()
        speed, self.reported = round((self.done - self.reported) * images_per_update / seconds, 1), self.done
        record = {"epoch": round(self.done / self.updates, 4), "update": self.done, "lr": lr} | meters.read(self.processes)
        elapsed = time.perf_counter() - self.start
        record |= {"images_per_second": speed, "data_wait": round(waited / seconds, 3)}
        record |= {"unreadable_images": unreadable_images, "seconds": round(elapsed, 1)}
        left = elapsed / (self.done - self.first_done) * (self.total - self.done)
        loss = "no finite loss" if record["loss"] is None else f"loss {record['loss']:.4f}"
        self.write(
            record,
            f"epoch {record['epoch']:.2f}/{self.total / self.updates:g}  {loss}  lr {lr:.2e}  {speed:.0f} images/s  "
            f"data wait {record['data_wait']:.0%}  {duration(left)} left",
        )
        return record

    def write(self, record: dict, line: str) -> None:
        """Append `record` to the log, and show `line`: in the progress bar where there is one, printed elsewhere."""
        if not self.processes.is_main:
            return
        self.lines.append(json.dumps(record) + "\n")
        self._flush()
        if self.bar.disable:
            print(line, flush=True)
        else:
            self.bar.set_description_str(line)

    def close(self) -> str:
        """End the progress bar; how long this part of the run took, in words. UserError if a file could not be written."""
        self.bar.close()
        if "log.jsonl" in self.unwritten:
            self._flush()
        if self.unwritten:
            missing, directory = ", ".join(sorted(self.unwritten)), self.path.parent
            raise UserError(f"could not write {missing} to {directory}; make room, and the same command continues from there")
        return duration(time.perf_counter() - self.start)


def read_log(directory: Path) -> list[dict]:
    """The records of a run's `log.jsonl`, without a last line that was cut short."""
    lines = (directory / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class TimedLoader:
    """Iterates a loader and measures the time spent waiting for it."""

    def __init__(self, loader: Iterable):
        self.loader, self.waited, self.lap_start = loader, 0.0, time.perf_counter()

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and how many of them were spent waiting for data."""
        now, waited = time.perf_counter(), self.waited
        seconds, self.lap_start, self.waited = now - self.lap_start, now, 0.0
        return seconds, waited


class Meters:
    """Sums over updates, kept on the device: adding never waits for it, `read` does.

    They continue those of an earlier part of the run, `states`, in which each rank has its own. `names` are those of the losses
    that add up to the loss, where there are several.
    """

    def __init__(self, device: torch.device, states: Sequence[list[float]] = (), rank: int = 0, names: Sequence[str] = ()):
        self.zero, self.names = torch.zeros((), device=device), list(names)
        self.skipped_in_row = self.zero
        self._reset()
        if states:
            self.updates, *sums = states[rank]
            self.loss, self.skipped, self.skipped_in_row, *parts = (self.zero + value for value in sums)
            self.parts = dict(zip(self.names, parts))

    def _reset(self):
        self.updates, self.update_loss, self.loss, self.skipped, self.grad_norm = 0, self.zero, self.zero, self.zero, self.zero
        self.parts, self.update_parts = (dict.fromkeys(self.names, self.zero) for _ in range(2))

    def state(self) -> list[float]:
        """The sums of this process, from which another one can go on."""
        return [self.updates, *torch.stack([self.loss, self.skipped, self.skipped_in_row, *self.parts.values()]).tolist()]

    def add_loss(self, loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
        """Add a forward pass's share of the update's loss, and of the losses that add up to it."""
        self.update_loss = self.update_loss + loss.detach()
        for name, part in parts.items():
            self.update_parts[name] = self.update_parts[name] + part.detach()

    def end_update(self, grad_norm: torch.Tensor) -> None:
        """Close an update; a non-finite loss or gradient norm counts it as skipped."""
        finite = self.update_loss.isfinite() & grad_norm.isfinite()
        self.loss = self.loss + torch.where(finite, self.update_loss, 0)
        self.parts = {name: part + torch.where(finite, self.update_parts[name], 0) for name, part in self.parts.items()}
        self.skipped = self.skipped + ~finite
        self.skipped_in_row = torch.where(finite, 0, self.skipped_in_row + 1)
        self.update_loss, self.grad_norm, self.updates = self.zero, grad_norm, self.updates + 1
        self.update_parts = dict.fromkeys(self.names, self.zero)

    def read(self, processes: Processes) -> dict:
        """Means since the last reading, over updates and processes: loss (None if all were skipped), last gradient norm."""
        sums = processes.sum([self.loss, self.skipped, self.skipped_in_row, self.grad_norm, *self.parts.values()])
        loss, skipped, in_row, norm, *parts = (value / processes.world_size for value in sums)
        used = self.updates - round(skipped)
        self._reset()
        if skipped:
            tqdm.write(f"warning: {counted(round(skipped), 'update')} skipped: no finite loss or gradient", file=sys.stderr)
        losses = {"loss": loss} | dict(zip(self.names, parts))
        return {name: round(value / used, 6) if used else None for name, value in losses.items()} | {
            "grad_norm": round(norm, 6) if math.isfinite(norm) else None,
            "skipped_updates": round(skipped),
            "skipped_in_row": round(in_row),
        }


def stop_if_diverging(record: dict, directory: Path, limit: int = 10) -> None:
    """UserError once `limit` updates in a row were skipped; the weights are still those of the last finite update."""
    if record["skipped_in_row"] >= limit:
        found = find_checkpoints(directory)
        raise UserError(
            f"the loss or its gradient was not finite in {record['skipped_in_row']} updates in a row; the last checkpoint is "
            f"{found[-1] if found else 'not written yet'}; try a lower --blr, --clip_grad 1, or --amp none"
        )


def duration(seconds: float) -> str:
    """3725 -> '1h02m', 65 -> '1m05s', 5 -> '5s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
