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
from helpers import image_folder

import data
import pretrain
from plumbing.files import find_checkpoints

ROOT = Path(tempfile.mkdtemp())
FLAGS = stress.STAGES["pretrain"].replace("--save_every_steps 2", "").split()


def run(name: str, processes: int, *flags: str, at: int = 0, then: Callable = lambda pixels: pixels) -> dict:
    """Pre-train in ROOT/name, in every process with `then(pixels)` in forward pass `at`: what the run prints and leaves."""
    normalise, calls, directory = data.normalise, [], ROOT / name
    line = [*FLAGS, "--data_path", str(ROOT / "images"), "--batch_size", str(4 // processes), *flags]

    def work():
        def patched(pixels, *args):
            calls.append(0)
            return normalise(then(pixels) if len(calls) == at else pixels, *args)

        data.normalise = patched
        pretrain.main(pretrain.get_args(line))

    directory.mkdir(exist_ok=True)
    pids = stress.fork(work, directory, processes)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    output = (directory / "output.txt").read_text()
    (directory / "output.txt").unlink()
    checkpoints = [path.name for path in find_checkpoints(directory / "run")]
    return dict(statuses=statuses, output=output, checkpoints=checkpoints, run=str(directory / "run"), flags=line)


def on_rank_1(act: Callable) -> Callable:
    return lambda pixels: act(pixels) if os.environ.get("RANK") == "1" else pixels


def signal_all(pixels):
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.1)
    return pixels


def main() -> None:
    torch.set_num_threads(1)
    image_folder(ROOT / "images", train=12, val=6)
    results = {"whole": run("whole", 1), "mistake": run("mistake", 2, "--mask_ratio", "0.99")}
    spoil = on_rank_1(lambda pixels: pixels * float("nan"))
    results["loss of one not finite"] = run("nan", 2, "--log_every", "1", at=2, then=spoil)
    quiet = on_rank_1(lambda pixels: os.kill(os.getpid(), signal.SIGUSR1) or pixels)
    results["signal to one"] = run("usr1", 2, at=2, then=quiet)
    # One process with a loader's worker, signalled with all of its group in mid-epoch; then two without workers.
    results["signal to all"] = run("parts", 1, "--num_workers", "1", at=2, then=signal_all)
    results["other division"] = run("parts", 2)
    results["other batch"] = run("parts", 2, "--batch_size", "4", "--num_workers", "0")
    results["two"] = run("two", 2, "--epochs", "3", "--save_every_steps", "1", "--log_every", "1")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
