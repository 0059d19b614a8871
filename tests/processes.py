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
from helpers import picture_folder

import data
import finetune
import pretrain
from plumbing.files import find_checkpoints, load_file
from plumbing.log import read_log
from plumbing.processes import setup_processes

ROOT = Path(tempfile.mkdtemp())
FLAGS = stress.STAGES["pretrain"][1].replace("--save_every_steps 2", "").split()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def run(name: str, processes: int, *flags: str, at: int = 0, then=None) -> tuple[list[int], str]:
    """Pre-train in ROOT/name; in every process call `then(pixels)` before forward pass `at`. Exit statuses and output."""
    normalise, calls = data.normalise, []

    def work():
        def patched(pixels, *args):
            calls.append(0)
            return normalise(then(pixels) if len(calls) == at and then else pixels, *args)

        data.normalise = patched
        words = [*FLAGS, "--data_path", str(ROOT / "pictures"), "--batch_size", str(4 // processes), *flags]
        pretrain.main(pretrain.get_args(words))

    return forked(work, name, processes)


def forked(work: Callable[[], None], name: str, processes: int) -> tuple[list[int], str]:
    """Call `work` in ROOT/name; exit statuses and output."""
    (ROOT / name).mkdir(exist_ok=True)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in stress.fork(work, ROOT / name, processes)]
    output = (ROOT / name / "output.txt").read_text()
    (ROOT / name / "output.txt").unlink()
    return statuses, output


def checkpoints(name: str) -> list[str]:
    return [path.name for path in find_checkpoints(ROOT / name / "run")]


def log(name: str) -> list[dict]:
    return stress.untimed(read_log(ROOT / name / "run"))


def weights(name: str) -> dict:
    return load_file(ROOT / name / "run" / checkpoints(name)[-1])["model"]


def farthest(a: dict, b: dict) -> float:
    return max((a[key] - b[key]).abs().max().item() for key in a)


def spoil_on_rank_1(pixels):
    return pixels.float() * float("nan") if rank() == 1 else pixels


def signal_rank_1(pixels):
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return pixels


def signal_all(pixels):
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.1)
    return pixels


def die_on_rank_1(pixels):
    if rank() == 1:
        os._exit(9)
    return pixels


def measure_agreement() -> None:
    group = setup_processes("cpu")
    group.max(0, 0)
    start = time.perf_counter()
    for _ in range(1000):
        group.max(0, 0)
    if group.is_main:
        print(f"{1e3 * (time.perf_counter() - start):.0f} us per agreement")


def main() -> None:
    torch.set_num_threads(1)
    picture_folder(ROOT / "pictures", train=12, val=6)
    found = {}
    whole = run("whole", 1)
    assert whole[0] == [0], whole

    statuses, output = run("nan", 2, "--log_every", "1", at=2, then=spoil_on_rank_1)
    skipped = [line["skipped_updates"] for line in log("nan")]
    found["nan"] = dict(statuses=statuses, skipped=skipped, finite=all(v.isfinite().all().item() for v in weights("nan").values()))

    statuses, output = run("usr1", 2, at=2, then=signal_rank_1)
    found["signal to one"] = dict(statuses=statuses, output=output, checkpoints=checkpoints("usr1"))

    statuses, output = run("lost", 2, at=3, then=die_on_rank_1)
    found["lost"] = dict(statuses=statuses, output=output)

    # One process with a loader's worker, signalled with all of its group in the middle of an epoch; then two without workers.
    statuses, output = run("parts", 1, "--num_workers", "1", at=2, then=signal_all)
    found["signal to all"] = dict(statuses=statuses, output=output, checkpoints=checkpoints("parts"))
    statuses, output = run("parts", 2)
    found["other division"] = dict(statuses=statuses, output=output, farthest=farthest(weights("parts"), weights("whole")))
    for key in ("loss", "grad_norm"):
        found["other division"][key] = [[line[key] for line in log(name)] for name in ("parts", "whole")]
    found["other division"]["unlike"] = run("parts", 2, "--batch_size", "4", "--epochs", "3", "--num_workers", "0")

    flags = ["--epochs", "3", "--save_every_steps", "1", "--log_every", "1"]
    statuses, output = run("two", 2, *flags)
    found["two"], found["flags of two"] = (
        str(ROOT / "two"),
        [*FLAGS, "--data_path", str(ROOT / "pictures"), "--batch_size", "2", *flags],
    )

    pictures = ["--data_path", str(ROOT / "pictures"), "--batch_size", "2"]
    once = [*stress.STAGES["finetune"][1].split(), *pictures, "--epochs", "1"]
    evaluation = ["--eval", "--resume", "run/checkpoint-1.pth", *pictures, "--device", "cpu"]
    train, evaluate = (lambda words=words: finetune.main(finetune.get_args(words)) for words in (once, evaluation))
    trained, _ = forked(train, "classifier", 1)
    found["evaluation"] = dict(trained=trained, by_one=forked(evaluate, "classifier", 1), by_four=forked(evaluate, "classifier", 4))

    group = stress.fork(measure_agreement, ROOT, 2)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in group)
    found["agreement"] = (ROOT / "output.txt").read_text()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
