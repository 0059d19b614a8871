"""Plumbing that the training scripts share: command line, processes, schedule, parameter groups, checkpoints, logs, plots."""

import argparse
import ctypes
import difflib
import json
import math
import os
import platform
import re
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        _exit_with(
            2, "out of memory; lower --batch_size (--update_freq keeps the update as it is), --input_size or the model's size"
        )
    except KeyboardInterrupt:
        _exit_with(130, "interrupted; the same command continues from the last checkpoint")
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        for directory in _made_directories:
            with suppress(OSError):  # it is in use
                directory.rmdir()


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
    add("--save_ckpt_num", type=count, default=3, help="newest checkpoints to keep")
    add("--log_every", type=count, default=20, help="updates between lines of the log")


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

    def union(self, members: set) -> set:
        """The union of every process's set."""
        if self.world_size == 1:
            return members
        gathered = [None] * self.world_size
        distributed.all_gather_object(gathered, members)
        return set().union(*gathered)


def setup_processes(device: str | None) -> Processes:
    """Choose the device (CUDA when there is one, or as asked) and join the process group that torchrun describes."""
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
    try:
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
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


def autocast_dtype(amp: str | None, device: torch.device) -> torch.dtype | None:
    """The autocast type of `--amp`; by default bfloat16 on GPUs that have it, float16 on older ones, none on CPUs."""
    if amp is None:
        amp = "none" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
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


# --- output directory: checkpoints and log ----------------------------------------------------------------------------


_made_directories: list[Path] = []  # by this process for output, the deepest first; `run_script` removes those still empty


def prepare_output_dir(path: str) -> Path:
    """Create the output directory and make sure that files can be written there."""
    directory = Path(path)
    try:
        _made_directories[:] = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {directory} ({error.strerror}); choose another --output_dir") from None
    return directory


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


def save_tensors(path: Path, content: dict) -> None:
    """`torch.save` of plain types, atomically."""
    write_atomically(path, lambda file: torch.save(content, file))


def save_checkpoint(directory: Path, epoch: int, state: dict, keep: int) -> None:
    """Write `checkpoint-<epoch>.pth` and delete all but the newest `keep`."""
    save_tensors(directory / f"checkpoint-{epoch}.pth", state)
    for old in find_checkpoints(directory)[:-keep]:
        old.unlink()


def find_checkpoints(directory: Path) -> list[Path]:
    """The directory's checkpoints, oldest first."""
    numbered = [(path.stem.removeprefix("checkpoint-"), path) for path in directory.glob("checkpoint-*.pth")]
    return [path for _, path in sorted((int(n), path) for n, path in numbered if n.isdecimal())]


def load_file(path: str | Path) -> dict:
    """Read a `torch.save` file of plain types; UserError for anything else. Code in the file is never run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged and foreign files
        if isinstance(error, OSError) and error.filename:  # it could not be opened
            raise UserError(f"cannot read {path} ({error.strerror})") from None
        raise UserError(
            f"{path} is not a readable checkpoint: damaged, not written by torch.save, or holding code, which is never run"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


# Flags that may change when a run is continued, because they do not change what it computes (`amp` and `device` only its rounding).
RUN_FLAGS = {
    "output_dir", "device", "amp", "use_amp", "compile", "resume", "auto_resume", "start_epoch", "save_ckpt", "save_ckpt_freq",
    "save_ckpt_num", "log_every", "num_workers", "pin_mem", "data_path", "batch_size", "backend", "dist_eval", "eval_freq",
}  # fmt: skip


def load_run(directory: Path, args: argparse.Namespace, config: dict, stage: str) -> dict | None:
    """The checkpoint to continue from: `--resume`, or with `--auto_resume` the newest one in `directory`; None for a new run.

    UserError if it belongs to another stage or to a run with other settings, or if a new run would mix with an old one.
    """
    found = find_checkpoints(directory)
    if found and not args.resume and not args.auto_resume:
        raise UserError(f"--output_dir {directory} already holds a run; choose another one, delete it, or use --auto_resume")
    path = args.resume or (found[-1] if found else None)
    if path is None:
        return None
    state = load_file(path)
    if state.get("stage") != stage:
        raise UserError(
            f"{path} is not a checkpoint-<epoch>.pth of {stage}, which alone can be continued; its weights load by --finetune"
        )
    saved = state["config"]
    differing = [
        name for name in sorted(config.keys() | saved.keys()) if name not in RUN_FLAGS and saved.get(name) != config.get(name)
    ]
    if differing:
        fields = ", ".join(f"--{name} {saved.get(name)} (now {config.get(name)})" for name in differing)
        raise UserError(f"{path} was written with {fields}; repeat those flags, or choose another --output_dir")
    return state | {"path": str(path)}


class RunLog:
    """`log.jsonl` and the progress line, written by the main process only.

    Args:
        updates: updates per epoch.
        done: updates that earlier parts of the run have made.
        lines: lines of the log that they wrote; what follows them, a resumed run writes again.
    """

    def __init__(self, directory: Path, updates: int, epochs: int, done: int, lines: int, processes: Processes):
        self.path, self.updates, self.epochs, self.processes = directory / "log.jsonl", updates, epochs, processes
        self.done = self.first_done = done
        self.start, self.lines, quiet = time.perf_counter(), 0, not (processes.is_main and sys.stderr.isatty())
        self.bar = tqdm(total=updates * epochs, initial=done, unit="update", disable=quiet, smoothing=0.05)
        if processes.is_main:
            kept = self.path.read_text().splitlines(keepends=True)[:lines] if self.path.exists() else []
            write_atomically(self.path, lambda file: file.write_text("".join(kept)))
            self.lines = len(kept)

    def advance(self) -> None:
        """Count one update."""
        self.done += 1
        self.bar.update()

    def report(self, meters: "Meters", loader: "TimedLoader", images_per_update: int, lr: float, unreadable_images: int) -> dict:
        """Log the updates since the last report. Every process must call it; it is where the host waits for the device."""
        seconds, waited = loader.lap()
        speed = round(meters.updates * images_per_update / seconds, 1)
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
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.lines += 1
        if self.bar.disable:
            print(line, flush=True)
        else:
            self.bar.set_description_str(line)

    def close(self) -> str:
        """End the progress bar; how long this part of the run took, in words."""
        self.bar.close()
        return duration(time.perf_counter() - self.start)


def read_log(directory: Path) -> list[dict]:
    """The records of a run's `log.jsonl`."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


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
    """Sums over updates, kept on the device: adding never waits for it, `read` does."""

    def __init__(self, device: torch.device):
        self.zero = torch.zeros((), device=device)
        self.skipped_in_row = self.zero
        self._reset()

    def _reset(self):
        self.updates, self.update_loss, self.loss, self.skipped, self.grad_norm = 0, self.zero, self.zero, self.zero, self.zero

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


def plot_curves(path: Path, curves: dict[str, tuple], x_label: str, y_label: str, title: str) -> None:
    """One line per entry of `curves`: label -> (x, y); a single line needs no legend."""
    figure, axes = new_figure(1, 1, 6, 3.6)
    for (label, (x, y)), colour in zip(curves.items(), COLOURS):
        axes[0, 0].plot(x, y, color=colour, linewidth=1.5, marker="o" if len(x) < 3 else None, label=label)
    axes[0, 0].set(xlabel=x_label, ylabel=y_label, title=title)
    axes[0, 0].grid(alpha=0.3)
    if len(curves) > 1:
        axes[0, 0].legend()
    save_figure(figure, path)
