"""Kill training at random instants, start it again, and compare its outputs with an uninterrupted run's, bit for bit.

    python tests/stress.py --kills 50 --processes 2 --stage finetune

SIGKILL goes to all processes of a run, uniformly over the time that it takes; a run is killed one to three times.
"""

import argparse
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import matplotlib.figure  # noqa: F401 imported before runs are forked, which then start at once
from helpers import image_folder, read_log, write_coco, write_maps

from plumbing.files import load_file

TIMES = {"seconds", "eval_seconds", "images_per_second", "data_wait"}  # what differs between equal runs
COMMON = "--device cpu --model convnextv2_atto --epochs 2 --lr 1e-3 --num_workers 0 "
COMMON += "--save_every_steps 2 --save_ckpt_num 2 --log_every 3 --output_dir run "
SMALL = COMMON + "--input_size 16 --stem_stride 1 --warmup_epochs 1 "
LARGE = COMMON + "--input_size 32 --model_ema --drop_path 0.2 "
HEADS = "--fpn_dim 16 --box_dim 8 --mask_dim 16 --regions 8 --proposals 20 5 --anchor_scale 2"
STAGES = {
    "pretrain": SMALL + "--decoder_embed_dim 16",
    "detect": LARGE + HEADS + " --color_jitter 0.3",
    "segment": LARGE + "--channels 8 --aux_channels 8",
    "finetune": SMALL + "--model_ema --mixup 0.8 --cutmix 1 --drop_path 0.2 --aa none --reprob 0.25 --amp fp16",
}


def images_in(root: Path, seed: int = 0, size: int = 32) -> Path:
    """Images in `root` for every stage: class folders (of `size`), objects as in COCO, maps of labels as in ADE20K."""
    for coco, ade20k, count in (("train", "training", 12), ("val", "validation", 3)):
        write_coco(root, coco, count, seed=seed + count, size=32)
        write_maps(root, ade20k, count, seed=seed + count, size=32)
    return image_folder(root, train=12, val=6, size=size)


def fork(work: Callable[[], None], directory: Path, processes: int) -> list[BaseProcess]:
    """Call `work` as a script in `directory`, in processes forked from this one, in a group led by the first."""
    with socket.create_server(("localhost", 0)) as server:
        names = dict(WORLD_SIZE=processes, MASTER_ADDR="localhost", MASTER_PORT=server.getsockname()[1])
    started = []

    def script(rank):
        os.setpgid(0, started[0].pid if started else 0)
        os.chdir(directory)
        sys.stdout = sys.stderr = output = open("output.txt", "a", buffering=1)  # noqa: SIM115 until the end
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        if processes > 1:
            os.environ |= {name: str(value) for name, value in dict(names, RANK=rank, LOCAL_RANK=rank).items()}
        work()

    for rank in range(processes):
        process = multiprocessing.get_context("fork").Process(target=script, args=[rank])
        process.start()
        started.append(process)
        os.setpgid(process.pid, started[0].pid)
    return started


def wait(processes: list[BaseProcess], seconds: float = float("inf")) -> bool:
    """Whether all processes ended within `seconds`; otherwise kill them. AssertionError when one failed."""
    end, codes = time.monotonic() + seconds, [None]
    while None in codes and not any(codes) and time.monotonic() < end:
        time.sleep(0.002)
        codes = [process.exitcode for process in processes]
    if None in codes:
        os.killpg(processes[0].pid, signal.SIGKILL)
        for process in processes:
            process.join()
    assert not any(codes), f"the processes ended with status {codes}"
    return None not in codes


def untimed(records: Iterable[dict]) -> list[dict]:
    """A log's records without what differs from run to run."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def contents(directory: Path) -> dict:
    """All outputs of a run, without times: weights, moments and logs as Python objects, the others as bytes."""
    readers = {".pth": load_file, ".jsonl": lambda path: untimed(read_log(path.parent))}
    return {path.name: readers.get(path.suffix, Path.read_bytes)(path) for path in (directory / "run").iterdir()}


def difference(a, b, place: str = "") -> str | None:
    """Where two nests of plain types and tensors differ, if anywhere."""
    if type(a) is not type(b):
        return place
    if isinstance(a, dict | list | tuple):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        if len(a) != len(b) or (isinstance(a, dict) and keys != b.keys()):
            return f"{place}: {sorted(map(str, a))[:20]} and {sorted(map(str, b))[:20]}"
        return next((other for key in keys if (other := difference(a[key], b[key], f"{place}/{key}"))), None)
    return None if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else place


def stress(stage: str, kills: int, processes: int) -> None:
    """Print how many interrupted runs equal the uninterrupted one. AssertionError at the first that differs."""
    rng, root, module = random.Random(0), Path(tempfile.mkdtemp()), importlib.import_module(stage)
    line = [*STAGES[stage].split(), "--data_path", str(images_in(root / "images")), "--batch_size", str(4 // processes)]

    def start(directory: Path) -> list[BaseProcess]:
        directory.mkdir(exist_ok=True)
        return fork(lambda: module.main(module.get_args(line)), directory, processes)

    began = time.monotonic()
    wait(start(root / "whole"))
    whole, lasts = contents(root / "whole"), time.monotonic() - began
    done = runs = 0
    while done < kills:
        directory, runs = root / str(runs), runs + 1
        for _ in range(min(rng.randint(1, 3), kills - done)):
            if wait(start(directory), rng.uniform(0, lasts)):
                break
            done += 1
        wait(start(directory))
        place = difference(whole, contents(directory))
        assert place is None, f"{directory} differs from {root / 'whole'} in {place}"
        shutil.rmtree(directory)
    counts = f"{runs} runs identical, killed {done} times, {(time.monotonic() - began) / 60:.1f} min"
    print(f"{stage}, {processes} process(es): {counts}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kills of each stage")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="processes of each run")
    parser.add_argument("--stage", choices=STAGES, help="stage to kill (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for stage in [args.stage] if args.stage else STAGES:
        stress(stage, args.kills, args.processes)
