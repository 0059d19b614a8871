"""Kill training at random instants, start it again, and compare all that it leaves with an uninterrupted run, bit for bit.

    python tests/stress.py --kills 50 --processes 2 --stage finetune
    python tests/stress.py --kills 50 --torchrun

SIGKILL goes to all processes of a run at once, uniformly over the time that it takes; runs are killed one to three times. With
--torchrun it goes to one process of two, and torchrun itself starts both again.
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import matplotlib.figure  # noqa: F401 imported before runs are forked, which then start at once
from helpers import image_folder, write_coco, write_maps

from plumbing.files import load_file

ROOT = Path(__file__).parent.parent
TIMES = {"seconds", "eval_seconds", "images_per_second", "data_wait"}  # what differs between equal runs
COMMON = "--device cpu --model convnextv2_atto --epochs 2 --lr 1e-3 --num_workers 0 "
COMMON += "--save_every_steps 2 --save_ckpt_num 2 --log_every 3 --output_dir run "
DETECT = COMMON + "--input_size 32 --fpn_dim 8 --box_dim 8 --mask_dim 8 --regions 8 --proposals 20 5 --anchor_scale 2 "
SEGMENT = COMMON + "--input_size 32 --channels 8 --aux_channels 8 "
COMMON += "--input_size 16 --stem_stride 1 --warmup_epochs 1 "
STAGES = {
    "pretrain": COMMON + "--decoder_embed_dim 16",
    "detect": DETECT + "--model_ema --drop_path 0.2 --color_jitter 0.3",
    "segment": SEGMENT + "--model_ema --drop_path 0.2",
    "finetune": COMMON + "--model_ema --mixup 0.8 --cutmix 1 --drop_path 0.2 --aa none --reprob 0.25",
}


def images_in(root: Path) -> Path:
    """Pictures in `root` for every stage: in class folders, with objects in COCO's layout, and with maps of labels in ADE20K's."""
    for split, count in (("train", 12), ("val", 3)):
        write_coco(root, split, count, seed=count, size=32)
        write_maps(root, {"train": "training", "val": "validation"}[split], count, seed=count, size=32)
    return image_folder(root, train=12, val=6)


def fork(work: Callable[[], None], directory: Path, processes: int) -> list[int]:
    """Call `work` as a script in `directory`, in processes forked from this one, in a process group led by the first."""
    with socket.create_server(("localhost", 0)) as server:
        names = dict(WORLD_SIZE=processes, MASTER_ADDR="localhost", MASTER_PORT=server.getsockname()[1])
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.setpgid(0, pids[0] if pids else 0)
                os.chdir(directory)
                output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                if processes > 1:
                    os.environ |= {name: str(value) for name, value in dict(names, RANK=rank, LOCAL_RANK=rank).items()}
                work()
                status = 0
            except SystemExit as exit:
                status = exit.code if isinstance(exit.code, int) else 1
                print(exit.code)
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        pids.append(pid)
        os.setpgid(pid, pids[0])
    return pids


def flags(stage: str, images: Path, processes: int) -> list[str]:
    return [*STAGES[stage].split(), "--data_path", str(images), "--batch_size", str(4 // processes)]


def start(stage: str, images: Path, directory: Path, processes: int) -> list[int]:
    """Start a run in `directory`."""
    module = importlib.import_module(stage)
    return fork(lambda: module.main(module.get_args(flags(stage, images, processes))), directory, processes)


def under_torchrun(stage: str, images: Path, directory: Path, kills: int, rng: random.Random, lasts: float) -> int:
    """Run to the end under torchrun with up to `kills` kills of one process; their number. AssertionError when the run failed."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts={kills} {ROOT / stage}.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in the uninterrupted run: more threads round otherwise
    killed = 0
    with open(directory / "output.txt", "w") as output:
        command = [sys.executable, *torchrun.split(), *flags(stage, images, 2)]
        run = subprocess.Popen(command, cwd=directory, stdout=output, stderr=output, env=environment)
        while killed < kills:
            try:
                run.wait(rng.uniform(0, lasts))
                break
            except subprocess.TimeoutExpired:
                children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
                with suppress(IndexError, ProcessLookupError):  # it is starting or ending
                    os.kill(int(rng.choice(children)), signal.SIGKILL)
                    killed += 1
        assert run.wait() == 0, f"torchrun ended with status {run.returncode}: {directory / 'output.txt'}"
    return killed


def wait(pids: list[int], seconds: float = float("inf")) -> bool:
    """Whether all processes ended by themselves within `seconds`; otherwise they are killed. AssertionError when one failed."""
    end, running = time.monotonic() + seconds, set(pids)
    while running and time.monotonic() < end:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                assert status == 0, f"a process ended with status {os.waitstatus_to_exitcode(status)}"
                running.remove(pid)
        time.sleep(0.002)
    if running:
        os.killpg(pids[0], signal.SIGKILL)
        for pid in running:
            os.waitpid(pid, 0)
    return not running


def untimed(records: Iterable[dict]) -> list[dict]:
    """A log's records without what differs from run to run."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def contents(directory: Path) -> dict:
    """All that a run left, without times: weights, moments, logs and settings as Python objects, pictures as bytes."""

    def parse(text):
        return untimed(map(json.loads, text.splitlines()))

    readers = {".pth": load_file, ".jsonl": lambda path: parse(path.read_text())}
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


def stress(stage: str, kills: int, processes: int, seed: int, torchrun: bool = False) -> bool:
    """Print how many interrupted runs equal the uninterrupted one; whether all do."""
    rng, root = random.Random(seed), Path(tempfile.mkdtemp())
    images = images_in(root / "images")

    def run(name: str, times: int) -> int:
        """Run in `name`, killed up to `times` times; how often it was."""
        (root / name).mkdir()
        if torchrun and name != "whole":
            return under_torchrun(stage, images, root / name, times, rng, lasts)
        for kills in range(times):
            if wait(start(stage, images, root / name, processes), rng.uniform(0, lasts)):
                return kills
        wait(start(stage, images, root / name, processes))
        return times

    lasts = 0.0
    for name in ("whole", "timed") if torchrun else ("whole",):
        began = time.monotonic()
        run(name, 0)
        lasts = time.monotonic() - began
    whole, done, runs, identical = contents(root / "whole"), 0, 0, 0
    while done < kills:
        done += run(str(runs), min(rng.randint(1, 3), kills - done))
        place = difference(whole, contents(root / str(runs)))
        if place is None:
            identical += 1
            shutil.rmtree(root / str(runs))
        else:
            print(f"{root / str(runs)} differs from {root / 'whole'} in {place}")
        runs += 1
    minutes, under = (time.monotonic() - began) / 60, " under torchrun" if torchrun else ""
    counts = f"{identical} of {runs} runs identical, killed {done} times, {minutes:.1f} min"
    print(f"{stage}, {processes} process(es){under}: {counts}")
    if identical == runs:
        shutil.rmtree(root)
    return identical == runs


def main() -> None:
    """Stress the stages that the command line names; exit status 1 when a run differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kills of each stage")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="processes of each run")
    parser.add_argument("--torchrun", action="store_true", help="kill one process of two under torchrun")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="stage to kill")
    parser.add_argument("--seed", type=int, default=0, help="seed of the instants")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.processes = 2 if args.torchrun else args.processes
    stages = STAGES if args.stage == "all" else [args.stage]
    if not all([stress(stage, args.kills, args.processes, args.seed, args.torchrun) for stage in stages]):
        sys.exit(1)


if __name__ == "__main__":
    main()
