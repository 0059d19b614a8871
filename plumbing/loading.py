"""Data sets and loaders whose order and draws depend on the position in the run, not on the number of workers."""

import atexit
import multiprocessing
import os
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from plumbing import dist
from plumbing.files import UserError

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


def mix_seed(purpose: str, *numbers: int) -> int:
    """Mix a 63-bit seed from its purpose and the position in the run, the same on every machine."""
    entropy = (zlib.crc32(purpose.encode()), len(numbers), *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(purpose: str, *numbers: int) -> Iterator[None]:
    """Seed torch's global generator, from which torchvision draws, inside the block; restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed(purpose, *numbers))
        yield


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file and read its header. Raises nearly anything if damaged or over 178 million pixels."""
    if not os.path.isfile(path):  # reading a pipe would wait for ever
        raise FileNotFoundError("no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on large images and odd metadata
        with Image.open(path) as image:
            yield image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height that an opened image will have upright."""
    with suppress(Exception):  # damaged metadata
        if image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # Pillow turns TIFF's
            return image.height, image.width
    return image.size


def upright(image: Image.Image) -> Image.Image:
    """Decode an image and turn it as its EXIF orientation says."""
    image.load()
    with suppress(Exception):  # damaged metadata
        ImageOps.exif_transpose(image, in_place=True)
    return image


class Samples(Dataset):
    """Samples indexed by (epoch, index), which seed the augmentation.

    A subclass has `read(index)`, which decodes one of `items` and may raise anything, and `augment(sample, index)`.
    An unreadable sample is marked in `unreadable` (n,), which workers share, and replaced by the next readable one.
    """

    image_max: float | None = None  # white in images of 16 bits, as --image_max says

    def __init__(self, items: Sequence, seed: int = 0):
        self.items, self.seed = items, seed
        self.unreadable = torch.zeros(len(items), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: tuple[int, int]) -> tuple[Any, Any]:
        """Return the (image, target) of an (epoch, index). OSError if no file at all can be read."""
        epoch, index = position
        for k in range(len(self)):
            at = (index + k) % len(self)
            with seeded("crop", self.seed, epoch, index):
                try:
                    sample = self.read(at)
                except Exception as error:  # damaged files raise nearly anything, depending on the decoder
                    if not self.unreadable[at]:
                        self.unreadable[at] = True
                        tqdm.write(f"warning: cannot read {self.items[at]} ({error})", file=sys.stderr)
                    continue
                return self.augment(sample, at)
        raise OSError(f"none of the {len(self)} images can be read; check the files named above")

    def readable(self, batch: Sequence[tuple[int, int]]) -> torch.Tensor:
        """(N,) bool: which samples of a loaded batch of (epoch, index) are not replacements."""
        return ~self.unreadable[[index for _, index in batch]]


class EpochSampler:
    """Batches of (epoch, index) for one rank, from `first_batch` on; (seed, epoch) determine the order of all ranks.

    `world_size * batch_size` consecutive samples of that order make one batch per rank. The remainder is dropped.
    """

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int, seed: int):
        self.length, self.batch_size, self.rank, self.world_size, self.seed = length, batch_size, rank, world_size, seed
        self.epoch = self.first_batch = 0

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mix_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        first, self.first_batch = self.first_batch, 0
        for batch in range(first, len(self)):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size].tolist()]


def divided(indices: Sequence[int], batch_size: int) -> list[list[tuple[int, int]]]:
    """Divide indices into batches of (0, index), the last one smaller: in evaluation every image counts once."""
    return [[(0, index) for index in indices[k : k + batch_size]] for k in range(0, len(indices), batch_size)]


class Loader(DataLoader):
    """A DataLoader that names the fix if no image can be read, or if workers lack shared memory (Docker)."""

    def __iter__(self) -> Iterator:
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            fix = "take --num_workers 0, or more shared memory: docker run --shm-size 2g"
            raise UserError(f"a loading process ended, perhaps for lack of shared memory (/dev/shm); {fix}") from error
        except OSError as error:
            if "images can be read" not in str(error):
                raise
            # A worker's error has its traceback before the last line.
            raise UserError(str(error).splitlines()[-1].removeprefix("OSError: ")) from None


def make_loader(samples: Samples, batches: EpochSampler | list, workers: int, pin_memory: bool = False) -> DataLoader:
    """Make a loader of (images, targets), joined by `samples.collate` if it has one; workers persist between epochs."""
    more = dict(persistent_workers=True, worker_init_fn=partial(_outlive_signals, _ending())) if workers else {}
    more |= dict(num_workers=workers, pin_memory=pin_memory, collate_fn=getattr(samples, "collate", None))
    return Loader(samples, batch_sampler=batches, **more)


def progress(batches: Collection, every: float = 30) -> Iterator:
    """Yield a loader's batches for evaluation, with a bar or, without a terminal, a line every half minute."""
    start = said = time.perf_counter()
    for done, batch in enumerate(tqdm(batches, unit="batch", disable=None, leave=False), start=1):
        yield batch
        if time.perf_counter() > said + every and not sys.stderr.isatty():
            said = time.perf_counter()
            left = tqdm.format_interval((said - start) / done * (len(batches) - done))
            dist.say(f"evaluated {done} of {len(batches)} batches, {left} left")


@cache
def _ending():
    event = multiprocessing.Event()
    atexit.register(event.set)  # before multiprocessing's own exit, which terminates the workers and waits for them
    return event


def _outlive_signals(ending, _) -> None:
    """Let a worker ignore signals sent to all processes while the parent completes an update, and exit when it ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(0) if ending.is_set() else None)
