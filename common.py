"""Plumbing that the training scripts share: command line, processes, schedule, parameter groups, checkpoints, logs, plots."""

import argparse
import ctypes
import difflib
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import distributed, nn
from torchvision.utils import make_grid
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend: one line with the value, the constraint and the fix. Scripts exit with status 2."""


def run_script(main: Callable[[argparse.Namespace], None], get_args: Callable[[], argparse.Namespace]) -> None:
    """Call `main(get_args())`; a UserError becomes one line on standard error and exit status 2, an interrupt status 130."""
    with suppress(AttributeError):  # a notebook's standard output has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")  # of file and class names that the terminal's lacks
    try:
        main(get_args())
    except UserError as error:
        _exit_with(2, str(error))
    except KeyboardInterrupt:
        _exit_with(130, "interrupted; the same command continues from the last checkpoint")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            _exit_with(
                2, "out of memory; lower --batch_size (--update_freq keeps the update as it is), --input_size or the model's size"
            )
        if not distributed.is_initialized() or not _tells_of_a_lost_process(error):
            raise
        lines = f"process {distributed.get_rank()} lost contact with another one, which has ended or cannot be reached ({error})"
        _exit_with(1, f"{lines.splitlines()[0]}; the same command continues from the last checkpoint")
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for directory in _made_directories:
            with suppress(OSError):  # it is in use
                directory.rmdir()


def _tells_of_a_lost_process(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()


def _exit_with(status: int, message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {one_line(message.strip())}", file=sys.stderr)
    sys.exit(status)


def one_line(text: str | Path) -> str:
    """A message or a file's name, which may hold line breaks, on one line."""
    return re.sub(r"\s*[\n\r]\s*", " ", str(text))


def mix_seed(purpose: str, *numbers: int) -> int:
    """One well-mixed 63-bit seed from what it is for and where it is used, the same on every machine."""
    entropy = (zlib.crc32(purpose.encode()), len(numbers), *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


# --- command line -----------------------------------------------------------------------------------------------------


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """States a default once, and none where there is none."""

    def _get_help_string(self, action):
        silent = action.default is None or "default:" in action.help
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which never guesses abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str) -> None:
        _exit_with(2, f"{message} (see --help)")

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["an argument", *words], words):
            if not word or re.fullmatch("--[a-z_]+=", word):  # where a flag is optional, it would pass for one not given
                self.error(f"{word.rstrip('=') or before} has an empty value; was a shell variable not set?")
        return super().parse_known_args(words, namespace)


class BoolFlag(argparse.BooleanOptionalAction):
    """`--flag`, `--no-flag`, `--flag true` and `--flag false`."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, **kwargs)
        self.nargs, self.metavar = "?", "true|false"

    def __call__(self, parser, namespace, value, option_string=None):
        words = {None: True, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        key = value.lower() if isinstance(value, str) else None
        if key not in words or (key is not None and option_string.startswith("--no-")):
            parser.error(f"{option_string} {value}: expected true or false, as in {self.option_strings[0]} true")
        setattr(namespace, self.dest, words[key] and not option_string.startswith("--no-"))


def one_of(what: str, names: Iterable[str]) -> Callable[[str], str]:
    """An argparse type that takes one of `names` and suggests the nearest for a typo."""
    names = list(names)

    def check(value: str) -> str:
        if value in names:
            return value
        near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"no {what} {value!r}; {hint}")

    return check


def number(
    kind: type, low: float, high: float | None = None, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """An argparse type for an int or float in [low, high]; without `low` itself when `above`, without `high` when `below`.

    No `high` is 10**9 for an int, and any finite number for a float.
    """
    high = high if high is not None else 10**9 if kind is int else sys.float_info.max

    def check(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
        if not low <= value <= high or (above and value == low) or (below and value == high):
            lower = f"{'more than' if above else 'at least'} {low}"
            upper = " and finite" if high == sys.float_info.max else f" and {'less than' if below else 'at most'} {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {lower}{upper}")
        return value

    return check


# Larger numbers are slips: they would fill the memory.
image_side, worker_count = number(int, 8, 4096), number(int, 0, 1024)


def check_grid(args: argparse.Namespace, parser: Parser) -> None:
    """A parser error unless the image divides into patches."""
    patch = 8 * args.stem_stride
    if args.input_size % patch:
        parser.error(
            f"--input_size {args.input_size} is not a multiple of the patch size {patch} (8 x --stem_stride); "
            f"try --input_size {max(2, round(args.input_size / patch)) * patch}, or --stem_stride 1 for small images"
        )


def check_epochs(args: argparse.Namespace, parser: Parser) -> None:
    """A parser error for warm-up or a start beyond the last epoch."""
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup_epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}; lower it, or raise --epochs")
    if args.start_epoch and args.start_epoch >= args.epochs:
        parser.error(f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}; lower it, or raise --epochs")


def peak_learning_rate(args: argparse.Namespace, images_per_update: int) -> float:
    """--lr, or --blr for this many images; UserError if --min_lr is above it."""
    peak = args.lr if args.lr is not None else args.blr * images_per_update / 256
    if args.min_lr > peak:
        raise UserError(
            f"--min_lr {args.min_lr:g} is more than the learning rate {peak:g}, which should fall to it; lower --min_lr"
        )
    return peak


def count_workers(num_workers: int | None, data_set: str, processes: "Processes") -> int:
    """--num_workers, or by default up to 8 for folders of files and none for images that are in memory."""
    if num_workers is not None or data_set != "folder":
        return num_workers or 0
    return min(8, max(1, os.cpu_count() // processes.local_world_size))


def add_run_flags(parser: Parser, output_dir: str) -> None:
    """The flags about a run itself, the same for both training scripts."""
    count = number(int, 1)
    add = parser.add_argument_group("run").add_argument
    add("--amp", choices=("none", "bf16", "fp16"), default=None, help="autocast type (default: bf16 or fp16 on GPUs, none on CPUs)")
    add("--compile", action=BoolFlag, default=False, help="torch.compile the network: a minute of start-up for faster steps")
    add(
        "--checkpoint_activations",
        action=BoolFlag,
        default=False,
        help="keep each block's input only and compute the rest again in backward: less memory, slower steps",
    )
    add("--output_dir", default=output_dir, metavar="DIR", help="where everything is written")
    add("--device", default=None, help="cuda or cpu (default: cuda if there is one)")
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        help="of everything random: weights, order, crops, masks, mixing, --labels_per_class",
    )
    add(
        "--resume",
        default=None,
        metavar="FILE",
        help="continue from this checkpoint; finetune.py evaluates or predicts with it too",
    )
    add("--auto_resume", action=BoolFlag, default=True, help="continue from the newest checkpoint in --output_dir, if any")
    add("--start_epoch", type=number(int, 0), default=0, help="first epoch, when not resuming")
    add("--save_ckpt", action=BoolFlag, default=True, help="write checkpoints")
    add("--save_ckpt_freq", type=count, default=1, help="epochs between checkpoints")
    add("--save_every_steps", type=count, default=None, metavar="N", help="updates between checkpoints, inside epochs too")
    add(
        "--save_every_minutes",
        type=number(float, 0, above=True),
        default=None,
        metavar="M",
        help="minutes between checkpoints, inside epochs too",
    )
    add("--save_ckpt_num", type=count, default=3, help="newest checkpoints to keep")
    add("--resume_anyway", action=BoolFlag, default=False, help="continue a run that was started with other settings")
    add("--log_every", type=count, default=20, help="updates between lines of the log")
    add(
        "--deterministic",
        action=BoolFlag,
        default=False,
        help="the same bits from every run on a GPU too, by slower kernels (how much slower is not measured); CPU runs need it not",
    )
    add(
        "--timeout_minutes",
        type=number(float, 0, above=True),
        default=10.0,
        help="how long a process waits for another one that does not answer",
    )


# --- processes and devices --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: one with plain `python`, several under `torchrun`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def local_world_size(self) -> int:
        """Processes of this run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def sum(self, values: Sequence[torch.Tensor]) -> list[float]:
        """The sum over processes of a few scalars, with one reduction and one device synchronisation."""
        stacked = torch.stack([value.detach().to(self.device) for value in values])
        if self.world_size > 1:
            distributed.all_reduce(stacked)
        return stacked.tolist()

    def max(self, *values: int) -> list[int]:
        """The largest over processes of each value, through the CPUs: it does not wait for a device."""
        largest = torch.tensor(values)
        if self.world_size > 1:
            distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return largest.tolist()

    def gather(self, value: Any) -> list:
        """Every process's value, in the order of ranks."""
        gathered = [value] * self.world_size
        if self.world_size > 1:
            distributed.all_gather_object(gathered, value)
        return gathered

    def union(self, members: set) -> set:
        """The union of every process's set."""
        return set().union(*self.gather(members))

    def from_main(self, decide: Callable[[], Any]) -> Any:
        """What `decide()` returns in the main process, for all of them; a UserError that it raises there is raised in all."""
        outcome = [None]
        if self.is_main:
            try:
                outcome = [decide()]
            except UserError as error:
                outcome = [error]
        if self.world_size > 1:
            distributed.broadcast_object_list(outcome)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]


def setup_processes(device: str | None, timeout_minutes: float = 10.0) -> Processes:
    """Choose the device (CUDA when there is one, or as asked) and join the process group that torchrun describes.

    A process that waits longer than `timeout_minutes` for another one ends; for one that has died on a CPU run it ends at once.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        if chosen.type not in ("cuda", "cpu"):
            raise RuntimeError("neither cuda nor cpu")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try --device cpu") from None
    if chosen.type == "cpu":
        keep_heap_mapped()
    described = torchrun_variables()
    if described is None:
        return Processes(0, 1, chosen)
    rank, world_size, local_rank = described
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"process {local_rank} has no GPU: {torch.cuda.device_count()} here; lower torchrun's --nproc_per_node")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"  # on GPU runs decisions travel through the CPUs
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store, _, _ = next(distributed.rendezvous("env://", rank, world_size, timeout=timeout))
        # torchrun keeps its store over restarts: without a prefix, a process may wait for one of the earlier attempt.
        store = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"process {rank} cannot meet the others at {where} ({str(error).splitlines()[0]}); see torchrun") from None
    return Processes(rank, world_size, chosen)


TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")


def torchrun_variables() -> tuple[int, int, int] | None:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them, None for a single process; UserError when they are wrong."""
    found = [key for key in TORCHRUN_VARIABLES[:3] if key in os.environ]
    if not found:
        return None
    if missing := [key for key in TORCHRUN_VARIABLES if key not in os.environ]:
        raise UserError(f"{', '.join(missing)} not set though {found[0]} is; unset it, or start several processes with torchrun")
    numbers = {key: os.environ[key] for key in (*TORCHRUN_VARIABLES[:4], "LOCAL_WORLD_SIZE") if key in os.environ}
    for key, text in numbers.items():
        if not text.isdecimal():
            raise UserError(f"{key}={text} is not a whole number; start several processes with torchrun, which sets it")
    rank, world_size, local_rank, port = (int(numbers[key]) for key in TORCHRUN_VARIABLES[:4])
    if rank >= world_size or int(numbers.get("LOCAL_WORLD_SIZE", 1)) < 1:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={world_size}; start several processes with torchrun, which sets both")
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else torchrun listens already
        try:
            socket.create_server(("", port)).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"MASTER_PORT={port} cannot be used ({error}); choose another, as by torchrun --master_port") from None
    return rank, world_size, local_rank


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process do something once, such as a download, before the others do it too."""
    waiting = distributed.is_initialized() and distributed.get_rank() > 0
    if waiting:
        distributed.barrier()
    yield
    if distributed.is_initialized() and not waiting:
        distributed.barrier()


def keep_heap_mapped() -> None:
    """Keep freed memory instead of returning it to the system after every operation.

    With glibc's defaults each large temporary is mapped, zeroed page by page and unmapped again; `python bench.py heap` measures
    what that costs a training step. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, (1 << 31) - 1)


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move a model to its device, in channels_last.

    Where a dimension of size 1 leaves two ways to number the strides, as in a depthwise kernel, parameters keep the plain one, which
    their gradients have too: DDP warns of any difference.
    """
    model.to(device, memory_format=torch.channels_last)
    for parameter in model.parameters():
        if parameter.is_contiguous():
            parameter.data = parameter.data.flatten().view(parameter.shape)


def set_determinism(on: bool) -> None:
    """Have torch choose operations that give the same bits every time, or raise where it has none."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = False


def emulates_half(device: torch.device) -> bool:
    """Whether the device is an x86 CPU without AVX-512, on which half precision saves memory but costs over ten times the time."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def autocast_dtype(amp: str | None, device: torch.device) -> torch.dtype | None:
    """The autocast type of `--amp`; by default bfloat16 on GPUs that have it, float16 on older ones, none on CPUs."""
    if amp is None:
        amp = "none" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp != "none" and emulates_half(device) and os.environ.get("RANK", "0") == "0":
        print(
            f"warning: --amp {amp} takes far longer than float32 on this CPU, which has no AVX-512; leave it out", file=sys.stderr
        )
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


# --- optimisation -----------------------------------------------------------------------------------------------------


def learning_rate(epoch: float, peak: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Linear warm-up from 0, then half a cosine to `min_lr`; `epoch` is fractional, so the rate changes every step."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels decay; biases, norms, LayerScale, GRN's gamma and beta, and the mask token do not."""
    return parameter.ndim > 1 and name.rsplit(".")[-1] not in ("bias", "gamma", "beta", "mask_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for the optimiser: with weight decay and without."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if has_weight_decay(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not has_weight_decay(name, p)], "weight_decay": 0.0},
    ]


def make_scaler(device: torch.device, amp_dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """A gradient scaler that also skips non-finite updates, on a GPU without waiting; only float16 needs its scale."""
    return torch.amp.GradScaler(device.type, init_scale=2.0**16 if amp_dtype == torch.float16 else 1.0)


def guard(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, whose gradient is NaN where the loss is not finite: gradients are shared, so all processes skip the update."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def apply_update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None, amp_dtype: torch.dtype | None
) -> torch.Tensor:
    """Clip the accumulated gradient, step unless it is not finite, and clear it; returns its norm before clipping."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, grad_norm)
    scaler.step(optimizer)
    scaler.update(None if amp_dtype == torch.float16 else 1.0)
    optimizer.zero_grad()
    return grad_norm


# --- output directory: files, checkpoints and log ---------------------------------------------------------------------


_made_directories: list[Path] = []  # by this process for output, the deepest first; `run_script` removes those still empty


def prepare_output_dir(path: str) -> Path:
    """Create the output directory and make sure that files can be written there."""
    directory = Path(path)
    try:
        _made_directories[:] = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-test.{os.getpid()}.tmp"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {directory} ({error.strerror}); choose another --output_dir") from None
    return directory


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def run_directory(path: str, processes: Processes) -> Iterator[Path]:
    """The output directory, kept from other runs until the block ends; signals then mean what they did before."""
    with ExitStack() as stack:
        processes.from_main(lambda: _lock(prepare_output_dir(path), stack))
        for number in STOP_SIGNALS:
            stack.callback(signal.signal, number, signal.getsignal(number))
        yield Path(path)


def _lock(directory: Path, stack: ExitStack) -> None:
    file = os.open(directory / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)
    stack.callback(os.close, file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader workers, which may live longer
    except (BlockingIOError, PermissionError):
        raise UserError(f"another run is writing to --output_dir {directory}; wait for its end, or choose another one") from None
    except OSError as error:
        print(f"warning: cannot lock {directory} ({error.strerror}); start no second run there", file=sys.stderr)
    stack.callback(_leave_no_lock_alone, directory)
    for left_behind in directory.glob(".*.tmp"):
        left_behind.unlink()


def _leave_no_lock_alone(directory: Path) -> None:
    with suppress(OSError):
        if os.listdir(directory) == [".lock"]:  # the run ended before it wrote anything
            os.unlink(directory / ".lock")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file beside `path`, flush it to disk and rename it: no reader sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: Path, content: dict) -> None:
    """Write a dictionary as an indented JSON file, atomically."""
    write_atomically(path, lambda file: file.write_text(json.dumps(content, indent=2) + "\n"))


def versions() -> dict[str, str]:
    """What a result depends on besides this code."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}


_SEAL = b"sha256:"  # and 64 hexadecimal digits: the comment that ends the zip archive which torch.save writes
_SEAL_LENGTH = len(_SEAL) + 64


def save_tensors(path: Path, content: dict) -> None:
    """`torch.save` of plain types, atomically, with the checksum of the file at its end, where torch.load passes over it."""

    def write(file):
        try:
            torch.save(content, file)
        except RuntimeError as error:  # so torch reports a full disk
            raise OSError(f"torch.save failed: {str(error).splitlines()[0]}") from error
        with open(file, "r+b") as archive:
            archive.seek(-2, os.SEEK_END)
            archive.write(_SEAL_LENGTH.to_bytes(2, "little"))  # an archive's last field, the length of its comment
            archive.seek(0)
            archive.write(_seal(archive, os.path.getsize(file)))

    write_atomically(path, write)


def _seal(file, length: int) -> bytes:
    """The seal of the first `length` bytes of an open file, which is left there."""
    checksum = hashlib.sha256()
    while length:
        block = file.read(min(length, 1 << 20))
        checksum.update(block)
        length -= len(block)
    return _SEAL + checksum.hexdigest().encode()


def _is_sealed(path: str | Path) -> bool:
    """Whether a file ends with a checksum, and so is certainly whole; ValueError when it is not that of the file."""
    with open(path, "rb") as file:
        length = max(0, os.path.getsize(path) - _SEAL_LENGTH)
        file.seek(length)
        seal = file.read()
        file.seek(0)
        if seal.startswith(_SEAL) and seal != _seal(file, length):
            raise ValueError("damaged")
    return seal.startswith(_SEAL)


def find_checkpoints(directory: Path) -> list[Path]:
    """The directory's `checkpoint-<epochs done>.pth` and `checkpoint-<epochs done>-<updates of the next>.pth`, oldest first."""
    named = [(path.stem.split("-")[1:], path) for path in directory.glob("checkpoint-*.pth")]
    return [path for _, path in sorted((list(map(int, place)), path) for place, path in named if all(n.isdecimal() for n in place))]


def prune_checkpoints(directory: Path, keep: int, newest: Path | None = None) -> None:
    """Delete all but the last `keep` checkpoints, and never `newest`."""
    for old in find_checkpoints(directory)[:-keep]:
        if old != newest:
            old.unlink()


class DamagedFile(UserError):
    """A file that is not what was written."""


def load_file(path: str | Path) -> dict:
    """Read a `torch.save` file of plain types; UserError for anything else. Code in the file is never run."""
    sealed = False
    try:
        sealed = _is_sealed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged and foreign files
        if isinstance(error, OSError) and error.filename:  # it could not be opened
            raise UserError(f"cannot read {path} ({error.strerror})") from None
        raise (UserError if sealed else DamagedFile)(
            f"{path} is not a readable checkpoint: damaged, not written by torch.save, or holding code, which is never run"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


# Flags that may change when a run is continued, because they do not change what it computes (`amp` and `device` only its rounding);
# and how its updates are divided among processes and forward passes.
RUN_FLAGS = {
    "output_dir", "device", "amp", "use_amp", "compile", "resume", "auto_resume", "start_epoch", "save_ckpt", "save_ckpt_freq",
    "save_ckpt_num", "log_every", "num_workers", "pin_mem", "data_path", "batch_size", "backend", "dist_eval", "eval_freq",
    "save_every_steps", "save_every_minutes", "resume_anyway", "deterministic", "timeout_minutes", "checkpoint_activations",
    "update_freq", "processes", "images_per_forward", "images_per_epoch",
}  # fmt: skip


def load_run(directory: Path, args: argparse.Namespace, config: dict, stage: str, processes: Processes) -> dict:
    """Where to continue: the checkpoint of `--resume`, or with `--auto_resume` the newest sound one in `directory`, or the beginning.

    The beginning has no "path". UserError if the checkpoint belongs to another stage or, without `--resume_anyway`, to a run with
    other settings; or if a new run would mix with an old one.
    """
    path = processes.from_main(lambda: args.resume or _newest_sound(directory, args))
    if path is None:
        return {"path": None, "epoch": args.start_epoch, "update": 0, "log": "", "meters": [], "unreadable": []}
    state = load_file(path)
    if state.get("stage") != stage or not {"meters", "config"} <= state.keys():
        raise UserError(
            f"{path} is not a checkpoint-<epoch>.pth of {stage}, which alone can be continued; its weights load by --finetune"
        )
    saved = state["config"]
    differing = [
        name for name in sorted(config.keys() | saved.keys()) if name not in RUN_FLAGS and saved.get(name) != config.get(name)
    ]
    if differing:
        fields = ", ".join(f"{'--' * hasattr(args, name)}{name} {saved.get(name)} (now {config.get(name)})" for name in differing)
        if not args.resume_anyway:
            raise UserError(
                f"{path} was written with {fields}; repeat those flags, choose another --output_dir, or mean it: --resume_anyway"
            )
        state["update"] = state["update"] * config["updates_per_epoch"] // saved["updates_per_epoch"]
        if processes.is_main:
            print(f"{path} was written with {fields}; continuing all the same")
    if len(state["meters"]) != processes.world_size:
        state["meters"] = [[sum(sums) / len(sums) for sums in zip(*state["meters"])]] * processes.world_size
    if processes.is_main and any(saved[name] != config[name] for name in ("processes", "images_per_forward")):
        drawn = "; mixing and stochastic depth draw other numbers" if stage == "finetune.py" else ""
        before, now = (
            f"{c['processes']} processes, {c['images_per_forward']} images per forward pass, {c['images_per_epoch']} per epoch"
            for c in (saved, config)
        )
        print(f"{path} had {before}; now {now}: the same order of images, but sums round differently{drawn}")
    return state | {"path": str(path)}


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


def restore(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
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
    scaler.load_state_dict(state["scaler"])


class Checkpoints:
    """Writes a run's checkpoints, at the ends of epochs and inside them, and ends the run after a signal.

    SIGTERM, SIGINT and SIGUSR1 let the update in progress finish; `save` then ends the process with status 128 + the signal's
    number. A second signal ends it at once.
    """

    def __init__(self, directory: Path, args: argparse.Namespace, processes: Processes, log: "RunLog", meters: "Meters"):
        self.directory, self.args, self.processes, self.log, self.meters = directory, args, processes, log, meters
        self.saved_at, self.received, self.agreed = time.monotonic(), 0, 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _) -> None:
        if self.received:
            return
        self.received = number
        name = signal.Signals(number).name
        os.write(2, f"{name}: ending after this update and a checkpoint; a second signal ends at once\n".encode())
        time.sleep(0.5)  # a scheduler's signal may also arrive by way of torchrun: that is no second one
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def due(self) -> bool:
        """Whether to save after this update, the same in every process; all must ask."""
        steps, minutes = self.args.save_every_steps, self.args.save_every_minutes
        late = self.processes.is_main and minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        self.agreed, late = self.processes.max(self.received, late)
        return bool(self.agreed or late or (steps and self.log.done % steps == 0))

    def due_at_end(self, epoch: int) -> bool:
        """Whether to save at the end of `epoch`, the same in every process; all must ask."""
        (self.agreed,) = self.processes.max(self.received)
        return bool(self.agreed or (epoch + 1) % self.args.save_ckpt_freq == 0 or epoch + 1 == self.args.epochs)

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
            found = find_checkpoints(self.directory)
            if self.processes.is_main:
                name = signal.Signals(self.agreed).name
                where = f"continues from {found[-1]}" if found else "starts anew, as there is no checkpoint"
                print(f"{name}: ended after update {self.log.done}; the same command {where}", flush=True)
            sys.exit(128 + self.agreed)


class RunLog:
    """`log.jsonl` and the progress line, written by the main process only.

    Args:
        updates: updates per epoch.
        done: updates that earlier parts of the run have made.
        text: what they wrote to the log, which it begins with.

    The whole log is kept in `lines`, and goes into checkpoints: what cannot be written now is written with the next line.
    """

    def __init__(self, directory: Path, updates: int, epochs: int, done: int, text: str, processes: Processes):
        self.path, self.updates, self.epochs, self.processes = directory / "log.jsonl", updates, epochs, processes
        self.done = self.first_done = self.reported = done
        self.lines, self.lines_written, self.size, self.unwritten = text.splitlines(keepends=True), 0, -1, set()
        self.start, quiet = time.perf_counter(), not (processes.is_main and sys.stderr.isatty())
        self.bar = tqdm(total=updates * epochs, initial=done, unit="update", disable=quiet, smoothing=0.05)
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

    def report(self, meters: "Meters", loader: "TimedLoader", images_per_update: int, lr: float, unreadable_images: int) -> dict:
        """Log the updates since the last report. Every process must call it; it is where the host waits for the device."""
        seconds, waited = loader.lap()
        speed, self.reported = round((self.done - self.reported) * images_per_update / seconds, 1), self.done
        record = {"epoch": round(self.done / self.updates, 4), "update": self.done, "lr": lr} | meters.read(self.processes)
        elapsed = time.perf_counter() - self.start
        record |= {"images_per_second": speed, "data_wait": round(waited / seconds, 3)}
        record |= {"unreadable_images": unreadable_images, "seconds": round(elapsed, 1)}
        left = elapsed / (self.done - self.first_done) * (self.updates * self.epochs - self.done)
        loss = "no finite loss" if record["loss"] is None else f"loss {record['loss']:.4f}"
        self.write(
            record,
            f"epoch {record['epoch']:.2f}/{self.epochs}  {loss}  lr {lr:.2e}  {speed:.0f} images/s  "
            f"data wait {record['data_wait']:.0%}  {duration(left)} left",
        )
        return record

    def write(self, record: dict, line: str) -> None:
        """Append `record` to the log, and show `line`: in the progress bar on a terminal, printed elsewhere."""
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
            raise UserError(
                f"could not write {missing} to {directory}; make room, and the same command continues from what is there"
            )
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

    They continue those of an earlier part of the run, `states`, in which each rank has its own.
    """

    def __init__(self, device: torch.device, states: Sequence[list[float]] = (), rank: int = 0):
        self.zero = torch.zeros((), device=device)
        self.skipped_in_row = self.zero
        self._reset()
        if states:
            self.updates, *sums = states[rank]
            self.loss, self.skipped, self.skipped_in_row = (self.zero + value for value in sums)

    def _reset(self):
        self.updates, self.update_loss, self.loss, self.skipped, self.grad_norm = 0, self.zero, self.zero, self.zero, self.zero

    def state(self) -> list[float]:
        """The sums of this process, from which another one can go on."""
        return [self.updates, *torch.stack([self.loss, self.skipped, self.skipped_in_row]).tolist()]

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a forward pass's share of the update's loss."""
        self.update_loss = self.update_loss + loss.detach()

    def end_update(self, grad_norm: torch.Tensor) -> None:
        """Close an update; a non-finite loss or gradient norm counts it as skipped."""
        finite = self.update_loss.isfinite() & grad_norm.isfinite()
        self.loss = self.loss + torch.where(finite, self.update_loss, 0)
        self.skipped = self.skipped + ~finite
        self.skipped_in_row = torch.where(finite, 0, self.skipped_in_row + 1)
        self.update_loss, self.grad_norm, self.updates = self.zero, grad_norm, self.updates + 1

    def read(self, processes: Processes) -> dict:
        """Means since the last reading, over updates and processes: loss (None if all were skipped), last gradient norm."""
        sums = processes.sum([self.loss, self.skipped, self.skipped_in_row, self.grad_norm])
        loss, skipped, in_row, norm = (value / processes.world_size for value in sums)
        used = self.updates - round(skipped)
        self._reset()
        if skipped:
            tqdm.write(f"warning: {round(skipped)} updates skipped, their loss or gradient was not finite", file=sys.stderr)
        return {
            "loss": round(loss / used, 6) if used else None,
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


# --- pictures ---------------------------------------------------------------------------------------------------------


def new_figure(rows: int, columns: int, width: float, height: float):
    """A matplotlib figure and its axes (rows, columns), drawn without a display."""
    if not os.environ.get("MPLBACKEND", "").startswith("module://"):  # a notebook's
        os.environ.pop("MPLBACKEND", None)  # none is used here, and a name unknown to matplotlib would stop its import
    from matplotlib.figure import Figure  # not pyplot: no display, no global state, and imported only when a picture is due

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path: Path) -> None:
    """Write a PNG atomically, its texts as they are."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # folders' and classes' names are no formulas, and may hold what is no Unicode
        text.set_parse_math(False)
        text.set_text(text.get_text().encode(errors="backslashreplace").decode())
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def plot_panels(path: Path, columns: dict[str, torch.Tensor], caption: str, rows: Sequence[str] = ()) -> None:
    """A table of pictures, one column per entry of `columns`: title -> (N, 3, H, W) float images in [0, 1].

    `rows` names the images, one to a row. Without names two stand side by side, to keep the figure from growing tall.
    """
    images = torch.stack(list(columns.values()), dim=1).cpu()  # (N, columns, 3, H, W)
    height, width = images.shape[-2:]
    gap = max(2, width // 24)
    halves = [images] if rows else [half for half in (images[0::2], images[1::2]) if len(half)]
    mosaics, ticks, left = [], [], 0
    for half in halves:
        mosaic = make_grid(half.flatten(0, 1), nrow=len(columns), padding=gap, pad_value=1.0)  # (3, rows, columns)
        mosaic = F.pad(mosaic, (0, 2 * gap, 0, (len(halves[0]) - len(half)) * (height + gap)), value=1.0)
        ticks += [left + gap + width / 2 + k * (width + gap) for k in range(len(columns))]
        left += mosaic.shape[2]
        mosaics.append(mosaic)
    figure, axes = new_figure(1, 1, 1.7 * len(ticks) + 1.4 * bool(rows), 1.7 * len(halves[0]) * height / width + 0.8)
    axes[0, 0].imshow(torch.cat(mosaics, dim=2).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes[0, 0].set_xticks(ticks, list(columns) * len(halves), fontsize=11)
    axes[0, 0].tick_params(length=0, labeltop=True, labelbottom=False)
    axes[0, 0].set_yticks([gap + height / 2 + k * (height + gap) for k in range(len(rows))], rows, fontsize=11)
    axes[0, 0].spines[:].set_visible(False)
    axes[0, 0].set_xlabel(caption, fontsize=11)
    save_figure(figure, path)


COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#f0e442",
)  # Okabe and Ito: colour-blind-safe


def plot_curves(path: Path, curves: dict[str, tuple], x_label: str, y_label: str, title: str, from_zero: bool = False) -> None:
    """One line per entry of `curves`: label -> (x, y); a single line needs no legend. `from_zero` begins both axes at 0."""
    figure, axes = new_figure(1, 1, 6, 3.6)
    for (label, (x, y)), colour in zip(curves.items(), COLOURS):
        axes[0, 0].plot(x, y, color=colour, linewidth=1.5, marker="o" if len(x) < 3 else None, label=label)
    axes[0, 0].set(xlabel=x_label, ylabel=y_label, title=title)
    axes[0, 0].grid(alpha=0.3)
    if from_zero:
        axes[0, 0].set(xlim=(0, None), ylim=(0, None))
    if len(curves) > 1:
        axes[0, 0].legend()
    save_figure(figure, path)
