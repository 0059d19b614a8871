"""Files, written whole or not at all; a run's checkpoints; the user's mistakes."""

import csv
import json
import os
import platform
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import urlopen

import torch
import torchvision


class UserError(SystemExit):
    """A mistake that the user can fix. Uncaught, it ends the script with one line on standard error and no traceback.

    All processes of a machine make the same mistake; one prints it.
    """

    def __init__(self, message: str):
        super().__init__(message if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


@contextmanager
def value_errors_are_the_users() -> Iterator[None]:
    """Turn a ValueError of the method's own checks into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def make_directory(path: str | Path) -> Path:
    """Make a folder, unless it exists; UserError if it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}); choose another --output_dir") from None
    return Path(path)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary file beside `path`, flush it to disk and rename it: no reader sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_json(path: Path, content: dict | list) -> None:
    """Write an indented JSON file."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def save_csv(path: Path, rows: list[dict]) -> None:
    """Write dictionaries with the same keys as a table, floats to six digits."""
    table = [rows[0], *([f"{x:.6g}" if isinstance(x, float) else x for x in row.values()] for row in rows)]

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(table)

    write_atomically(path, write)


def save_tensors(path: Path, content: dict) -> None:
    """Write plain types with `torch.save`."""
    write_atomically(path, lambda file: torch.save(content, file))


# --- reading ----------------------------------------------------------------------------------------------------------


def load_file(path: str | Path) -> dict:
    """Read a `torch.save` file of plain types; no code in it is run. UserError if it is missing or damaged."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist, or is no file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file, or another kind, raises nearly anything
        text = str(error) or type(error).__name__
        reason = (re.search("Unsupported.+?(?= was not|$)", text, re.M) or re.match(".+", text))[0]
        fix = "delete it and get it again, or save its state dict alone"
        raise UserError(f"{path} is damaged, or no file of weights in plain types ({reason}); {fix}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def read_lines(path: str | Path) -> list[str]:
    """Read a text file's lines, such as class names, without blank ones and comments (#). UserError if unreadable."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the classes {path} ({error})") from None
    return [line for line in lines if line and not line.startswith("#")]


def find_checkpoints(directory: Path) -> list[Path]:
    """List a folder's `checkpoint-<epochs done>[-<updates of the next>].pth`, oldest first."""
    positions = {path: path.stem.split("-")[1:] for path in directory.glob("checkpoint-*.pth")}
    numbered = [path for path, position in positions.items() if "".join(position).isdecimal()]
    return sorted(numbered, key=lambda path: [*map(int, positions[path])])


def prune_checkpoints(directory: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints."""
    for old in find_checkpoints(directory)[:-keep]:
        old.unlink()


def download(address: str) -> str:
    """Download a file to torch.hub's cache; return its path. UserError, leaving no file, if it is incomplete."""
    url = urlparse(address)
    folder = Path(torch.hub.get_dir(), "checkpoints", f"{url.hostname}-{zlib.crc32(address.encode()):08x}")
    path = folder / (os.path.basename(url.path) or "weights.pth")

    def write(temporary: Path) -> None:
        with urlopen(address, timeout=60) as response:
            expected = response.length  # torch.hub does not check it
        torch.hub.download_url_to_file(address, str(temporary), progress=sys.stderr.isatty())
        if expected not in (None, temporary.stat().st_size):
            raise OSError(f"{temporary.stat().st_size:,} of {expected:,} bytes came")

    while os.environ.get("LOCAL_RANK", "0") != "0" and not path.exists():  # one process of a machine downloads
        time.sleep(1)
    if not path.exists():
        print(f"downloading {address} to {path}", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, write)
        except (OSError, ValueError, HTTPException) as error:
            raise UserError(f"{address} cannot be downloaded ({error}); try again, or give a file") from None
    return str(path)


def file_of_run(path: str, *order: str) -> str:
    """Return the path of a file, of a download or, in a run's folder, of the first in `order` that exists."""
    if path.startswith(("http://", "https://")):
        return download(path)
    if not os.path.isdir(path):
        return path
    for name in order:
        candidates = find_checkpoints(Path(path))[-1:] if name == "newest" else [Path(path, name)]
        if candidates and candidates[0].exists():
            return str(candidates[0])
    raise UserError(f"the folder {path} has no {' or '.join(order)} checkpoint; name a file, or another run's folder")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, besides this code's."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }
