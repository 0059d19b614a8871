"""Files that are whole or not there: the output directory and its lock, atomic writes, sealed checkpoints."""

import csv
import fcntl
import json
import os
import platform
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torchvision

from plumbing.processes import Processes
from plumbing.script import UserError, call_at_end, one_line, remark
from plumbing.signals import signals_restored


def prepare_output_dir(path: str) -> Path:
    """Create the output directory and make sure that files can be written there; left empty, it goes when the script ends."""
    directory = Path(path)
    try:
        missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        for folder in reversed(missing):
            call_at_end(folder.rmdir)  # which fails unless it is still empty
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-test.{os.getpid()}.tmp"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {directory} ({error.strerror}); choose another --output_dir") from None
    return directory


@contextmanager
def run_directory(path: str, processes: Processes) -> Iterator[Path]:
    """The output directory, kept from other runs until the block ends; signals then mean what they did before.

    What ends the block before its time, an interrupt for one, carries the last `checkpoint` along, which `run_script` names.
    """
    with ExitStack() as stack:
        processes.from_main(lambda: _lock(prepare_output_dir(path), stack))
        stack.enter_context(signals_restored())
        try:
            yield Path(path)
        except (KeyboardInterrupt, RuntimeError) as error:
            error.checkpoint = next(reversed(find_checkpoints(Path(path))), None)
            raise


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


def save_csv(path: Path, rows: list[dict]) -> None:
    """Write dictionaries with the same keys as a table, floats to six digits, atomically."""

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)

    write_atomically(path, write)


def write_files(directory: Path, files: dict[str, tuple], of: str = "") -> None:
    """For each entry of `files`, name -> (save, content), call save(directory / name, content); print what was written, and `of` what.

    UserError where that fails, as on a full disk.
    """
    earlier = any((directory / name).exists() for name in files)
    try:
        for name, (save, content) in files.items():
            save(directory / name, content)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {name} to --output_dir {directory} ({why}); choose another --output_dir") from None
    print(one_line(f"wrote {', '.join(files)}{of} to {directory}{', replacing earlier ones' * earlier}"))


def versions() -> dict[str, str]:
    """What a result depends on besides this code."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}


def save_tensors(path: Path, content: dict) -> None:
    """`torch.save` of plain types, atomically."""

    def write(file):
        try:
            torch.save(content, file)
        except RuntimeError as error:  # so torch reports a full disk
            raise OSError(f"torch.save failed: {str(error).splitlines()[0]}") from error

    write_atomically(path, write)


def find_checkpoints(directory: Path) -> list[Path]:
    """The directory's `checkpoint-<epochs done>.pth` and `checkpoint-<epochs done>-<updates of the next>.pth`, oldest first."""
    named = [(path.stem.split("-")[1:], path) for path in directory.glob("checkpoint-*.pth")]
    return [path for _, path in sorted((list(map(int, place)), path) for place, path in named if all(n.isdecimal() for n in place))]


def file_of_run(path: str, *order: str) -> str:
    """A file as it is; of a run's folder the first that it has of `order`, where "newest" stands for the newest checkpoint.

    A line tells which; UserError if there is none.
    """
    if not os.path.isdir(path):
        return path
    folder = Path(path)
    files = [file for name in order for file in (find_checkpoints(folder)[-1:] if name == "newest" else [folder / name])]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        wanted = " or ".join(name.replace("newest", "checkpoint-<epoch>.pth") for name in order)
        raise UserError(f"no {wanted} in the folder {path}; name a file, or the folder of another run")
    remark(f"{path}: taking {found.name}")
    return str(found)


def prune_checkpoints(directory: Path, keep: int, newest: Path | None = None) -> None:
    """Delete all but the last `keep` checkpoints, and never `newest`."""
    for old in find_checkpoints(directory)[:-keep]:
        if old != newest:
            old.unlink()


class DamagedFile(UserError):
    """A file that is not what was written."""


def load_file(path: str | Path) -> dict:
    """Read a `torch.save` file of plain types; UserError for what cannot be opened, DamagedFile for all else. No code is run."""
    try:
        if zipfile.is_zipfile(
            path
        ):  # as torch.save writes since 2020: with a checksum for every part, which torch does not look at
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    raise ValueError(f"{part} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged and foreign files
        if isinstance(error, OSError) and error.filename:  # it could not be opened
            raise UserError(f"cannot read {path} ({error.strerror})") from None
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        why = "damaged, not written by torch.save, or holding code, which is never run"
        raise DamagedFile(f"{path} is not a readable checkpoint: {why}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content
