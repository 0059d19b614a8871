"""Loaders whose order and draws are a pure function of the place in the run, and the files that could not be read.

The order of an epoch depends on (seed, epoch), what is drawn for a sample on (seed, epoch, sample index). So any number of workers
gives the same run, and a run can be continued from any update.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from plumbing.processes import Processes
from plumbing.script import UserError, one_line
from plumbing.seeds import mix_seed
from plumbing.signals import STOP_SIGNALS


class EpochSampler:
    """Batches of (epoch, index) for one rank; the global order is a function of (seed, epoch) alone.

    Batch b takes `world_size * batch_size` neighbours of that order, a stretch for each rank. So consecutive batches cover
    consecutive stretches however they are divided among ranks, and `first_batch` continues an epoch. The last incomplete
    batch is left out.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, seed: int):
        self.length, self.batch_size, self.rank, self.world_size, self.seed = length, batch_size, rank, world_size, seed
        self.epoch = self.first_batch = 0

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(mix_seed("order", self.seed, self.epoch)))
        first, self.first_batch = self.first_batch, 0
        for batch in range(first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size].tolist()]


def divided(indices: Sequence[int], batch_size: int) -> list[list[tuple[int, int]]]:
    """Batches of (0, index), in order and the last as small as need be: for evaluation, where every image counts once."""
    return [[(0, index) for index in indices[start : start + batch_size]] for start in range(0, len(indices), batch_size)]


def make_loader(images: Dataset, batches: EpochSampler | list, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """A loader of (images, targets, failed), joined by `images.collate` if there is one, with workers that outlive the epoch."""
    return DataLoader(
        images, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory, persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_the_parent, collate_fn=getattr(images, "collate", None),
    )  # fmt: skip


def count_workers(args: argparse.Namespace, processes: Processes) -> int:
    """--num_workers, or by default up to 8 for folders of files and none for images that are in memory."""
    if args.num_workers is not None or args.data_set != "folder":
        return args.num_workers or 0
    return min(8, max(1, os.cpu_count() // processes.local_world_size))


def _leave_signals_to_the_parent(_):
    """In a worker: a signal that reaches all processes of a run must not end it, before the update that it works for."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def obey_the_parent():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey_the_parent, daemon=True).start()


class Unreadable:
    """The files that could not be read: one warning each, and an end when they exceed ten and 1% of the data set."""

    def __init__(self, images: Dataset, instead: str = "the next image takes its place"):
        self.images, self.indices, self.instead = images, set(), instead

    def note(self, failed: torch.Tensor) -> None:
        """Take a batch's `failed` column: (B,), the index of a file that could not be read, or -1."""
        for index in failed[failed >= 0].tolist():
            if index not in self.indices:
                self.indices.add(index)
                name = one_line(f"{self.images.items[index]} ({self.images.why(index)})")
                tqdm.write(f"warning: cannot read {name}; {self.instead}", file=sys.stderr)

    def check(self, processes: Processes) -> None:
        """Share what every process found; UserError, in all of them, past the limit."""
        self.indices = processes.union(self.indices)
        if len(self.indices) > max(10, 0.01 * len(self.images)):
            some = f"{len(self.indices)} of {len(self.images)} images cannot be read, more than ten and 1%"
            one = f"{self.images.items[min(self.indices)]} ({self.images.why(min(self.indices))})"
            raise UserError(f"{some}; remove or replace them, {one} for one")
