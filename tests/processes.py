"""What several processes and signals to them do, as scenarios that test_plumbing.py makes claims about.

Prints one JSON object. The processes are forked from this one, so that torch is imported once for all of them.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import stress
import torch
from helpers import image_folder, read_log

import data
import pretrain
from plumbing.files import find_checkpoints, load_file

ROOT = Path(tempfile.mkdtemp())
FLAGS = stress.STAGES["pretrain"].replace("--save_every_steps 2", "").split()


def run(name: str, processes: int, *flags: str, at: int = 0, then=None) -> tuple[list[int], str]:
    """Pre-train in ROOT/name; in every process call `then(pixels)` before forward pass `at`. Statuses and output."""
    normalise, calls = data.normalise, []

    def work():
        def patched(pixels, *args):
            calls.append(0)
            return normalise(then(pixels) if len(calls) == at and then else pixels, *args)

        data.normalise = patched
        words = [*FLAGS, "--data_path", str(ROOT / "images"), "--batch_size", str(4 // processes), *flags]
        pretrain.main(pretrain.get_args(words))

    return forked(work, name, processes)


def forked(work: Callable[[], None], name: str, processes: int) -> tuple[list[int], str]:
    """Call `work` in ROOT/name; exit statuses and output."""
    (ROOT / name).mkdir(exist_ok=True)
    pids = stress.fork(work, ROOT / name, processes)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    output = (ROOT / name / "output.txt").read_text()
    (ROOT / name / "output.txt").unlink()
    return statuses, output


def checkpoints(name: str) -> list[str]:
    return [path.name for path in find_checkpoints(ROOT / name / "run")]


def log(name: str, key: str) -> list:
    return [value for (value,) in read_log(ROOT / name / "run", key) if value is not None]


def weights(name: str) -> dict:
    return load_file(ROOT / name / "run" / checkpoints(name)[-1])["model"]


def on_rank_1(act: Callable) -> Callable:
    return lambda pixels: act(pixels) if os.environ.get("RANK") == "1" else pixels


def signal_all(pixels):
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.1)
    return pixels


def main() -> None:
    torch.set_num_threads(1)
    image_folder(ROOT / "images", train=12, val=6)
    results = {}
    assert run("whole", 1)[0] == [0]

    statuses, output = run("nan", 2, "--log_every", "1", at=2, then=on_rank_1(lambda pixels: pixels * float("nan")))
    results["nan"] = dict(statuses=statuses, output=output, checkpoints=checkpoints("nan"))

    quiet = on_rank_1(lambda pixels: os.kill(os.getpid(), signal.SIGUSR1) or pixels)
    statuses, output = run("usr1", 2, at=2, then=quiet)
    results["signal to one"] = dict(statuses=statuses, output=output, checkpoints=checkpoints("usr1"))

    statuses, output = run("mistake", 2, "--mask_ratio", "0.99")
    results["mistake"] = dict(statuses=statuses, output=output)

    # One process with a loader's worker, signalled with all of its group in mid-epoch; then two without workers.
    statuses, output = run("parts", 1, "--num_workers", "1", at=2, then=signal_all)
    results["signal to all"] = dict(statuses=statuses, output=output, checkpoints=checkpoints("parts"))
    statuses, output = run("parts", 2)
    parts, whole = weights("parts"), weights("whole")
    farthest = max((parts[key] - whole[key]).abs().max().item() for key in whole)
    results["other division"] = dict(statuses=statuses, output=output, farthest=farthest)
    results["other division"]["losses"] = [log(name, "loss") for name in ("parts", "whole")]
    results["other division"]["unlike"] = run("parts", 2, "--batch_size", "4", "--num_workers", "0")

    flags = ["--epochs", "3", "--save_every_steps", "1", "--log_every", "1"]
    run("two", 2, *flags)
    results["two"], results["images"] = str(ROOT / "two"), str(ROOT / "images")
    results["flags of two"] = [*FLAGS, *flags, "--data_path", results["images"], "--batch_size", "2"]

    print(json.dumps(results))


if __name__ == "__main__":
    main()
