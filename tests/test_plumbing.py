"""Claims about plumbing: command line, files, learning rates; several processes; and systems without Unix's signals."""

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import stress
import torch
from helpers import assert_equal, call_at, image_folder, log_of

import data
import pretrain
from plumbing import cli, dist, files
from plumbing.files import find_checkpoints, load_file
from plumbing.loading import mix_seed
from plumbing.optim import learning_rate

HERE = Path(__file__).parent


def test_imports_point_inwards():
    names, imports = {path.stem for path in HERE.parent.glob("*.py")} | {"plumbing", "experiments"}, {}
    for path in [*HERE.parent.glob("*.py"), *HERE.parent.glob("plumbing/*.py")]:
        modules = set(re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
        room = path.stem if path.parent == HERE.parent else "plumbing"
        imports[room] = imports.get(room, set()) | modules & names - {room}
    method = dict(model=set(), sparse={"model"}, fcmae={"model", "sparse"}, fast={"model", "sparse"})
    assert method.items() <= imports.items()
    assert dict(plumbing=set(), data={"plumbing"}, weights={"model", "plumbing"}).items() <= imports.items()
    assert "experiments" not in set.union(*imports.values())  # scripts import them when a flag asks for one


def test_learning_rate_at_its_corners():
    schedule = dict(peak=2.0, min_lr=0.5, warmup_epochs=4, epochs=20)
    expected = {0: 0, 1: 0.5, 4: 2.0, 12: 1.25, 8: 0.5 + 0.75 * (1 + math.cos(math.pi / 4)), 20: 0.5, 21: 0.5}
    assert {epoch: learning_rate(epoch, **schedule) for epoch in expected} == pytest.approx(expected)
    assert learning_rate(0, peak=1.0, min_lr=0.0, warmup_epochs=0, epochs=5) == 1.0
    assert learning_rate(2.5, peak=1.0, min_lr=0.0, warmup_epochs=5, epochs=5) == 0.5  # nothing but warm-up
    assert learning_rate(5, peak=1.0, min_lr=0.25, warmup_epochs=5, epochs=5) == 1.0


def test_seeds_are_fixed_and_differ_with_purpose_position_and_length():
    assert mix_seed("crop", 0, 1, 2) == 6809723051403476792  # on every machine
    seeds = {mix_seed("crop", a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    seeds |= {mix_seed(purpose, a, b) for purpose in ("crop", "mask") for a in range(10) for b in range(10)}
    assert len(seeds) == 1200


def test_booleans_take_three_forms_defaults_come_weakest_first_and_help_shows_them(capsys):
    parser = cli.Parser({"folder": dict(p=0.5)})
    parser.add_argument("--x", action=cli.BoolFlag, default=True, help="x")
    parser.add_argument("--p", type=cli.fraction, default=0.25, help="100% of p")
    parser.add_argument("--kind", choices=["apple", "pear"], help="kind")
    booleans = {"": True, "--x": True, "--no-x": False, "--x true": True, "--x False": False, "--x 0": False}
    assert {line: parser.parse_args(line.split()).x for line in booleans} == booleans
    parser.take("the data set", dict(p=0.5, kind="apple"))
    parser.take("the recipe", dict(kind="pear", derived=3))
    args = parser.parse_args(["--p", "0.125"])
    assert (args.p, args.kind, args.derived) == (0.125, "pear", 3)
    parser.report(args)
    assert capsys.readouterr().out == "from the recipe: kind pear, derived 3\n"
    assert "100% of p (0.5, folder 0.5)" in parser.format_help()


def test_warm_up_workers_and_precision_are_derived(monkeypatch):
    def derive(**more):
        flags = dict(warmup_epochs=None, num_workers=None, amp=None, epochs=100, data_set="folder")
        args = argparse.Namespace(**flags | more)
        cli.derive(args, warmup=20)
        return args

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert [derive(**more).warmup_epochs for more in ({}, dict(epochs=800), dict(warmup_epochs=1))] == [5, 20, 1]
    assert derive().num_workers == 4 and derive(data_set="cifar10").num_workers == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert derive().num_workers == 2
    assert [derive(use_amp=on).amp for on in (None, False)] == [None, "none"]
    assert derive(use_amp=True).amp == (None if torch.cuda.is_available() else "bf16")
    assert derive(use_amp=True, amp="fp16").amp == "fp16"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    files.save_tensors(tmp_path / "a.pth", {"a": 1})
    with pytest.raises(TypeError, match="cannot pickle"):
        files.save_tensors(tmp_path / "a.pth", {"a": 2, "b": (i for i in range(3))})
    assert load_file(tmp_path / "a.pth") == {"a": 1}


def test_only_the_newest_checkpoints_are_kept_and_found(tmp_path):
    names = [f"checkpoint-{position}.pth" for position in ("9", "9-100", "10", "10-3", "10-20", "11")]
    for name in (*sorted(names), "checkpoint-best.pth"):
        files.save_tensors(tmp_path / name, {"name": name})
    assert [path.name for path in find_checkpoints(tmp_path)] == names
    assert files.file_of_run(str(tmp_path), "encoder.pth", "newest") == str(tmp_path / "checkpoint-11.pth")
    assert files.file_of_run(str(tmp_path), "checkpoint-best.pth", "newest") == str(tmp_path / "checkpoint-best.pth")
    files.prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == names[-2:]
    assert load_file(tmp_path / names[-1]) == {"name": names[-1]}


FLAGS = stress.STAGES["pretrain"].replace("--save_every_steps 2", "")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), train=12, val=6)


def train(images: Path, directory: Path, processes: int, flags: str = "", act: Callable | None = None) -> tuple:
    """Pre-train in processes, the last of which calls `act()` in its first pass: exit statuses, checkpoints, output."""

    def work():
        if act and dist.rank() == processes - 1:
            call_at(pytest.MonkeyPatch(), data, "normalise", 1, act)
        line = f"{FLAGS} --batch_size {4 // processes} {flags}".split()
        pretrain.main(pretrain.get_args([*line, "--data_path", str(images)]))

    directory.mkdir(exist_ok=True)
    started, output = stress.fork(work, directory, processes), directory / "output.txt"
    for process in started:
        process.join()
    text = output.read_text()
    output.unlink()
    return [process.exitcode for process in started], [path.name for path in find_checkpoints(directory / "run")], text


def signal_all() -> None:
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.1)


NO_NUMBERS = partial(setattr, data, "normalise", lambda pixels, *_: pixels * math.nan)  # from here on
ENDED = "after update 1; the same command continues"
ENDS = [  # flags, what one of two processes meets; exit statuses, checkpoints, and the line that one process prints
    ("--mask_ratio 0.99", None, 1, [], "mask_ratio 0.99 leaves no patch visible"),
    ("--save_every_steps 1", NO_NUMBERS, 1, ["checkpoint-0-1.pth"], "not finite before update 2; try a lower --blr"),
    ("", partial(signal.raise_signal, signal.SIGUSR1), 128 + signal.SIGUSR1, ["checkpoint-0-1.pth"], ENDED),
]


@pytest.mark.parametrize(("flags", "act", "status", "checkpoints", "line"), ENDS)
def test_what_meets_one_process_ends_both_with_one_line(images, tmp_path, flags, act, status, checkpoints, line):
    *ends, output = train(images, tmp_path, 2, flags, act)
    assert ends == [[status] * 2, checkpoints] and output.count(line) == 1 and "Error" not in output, output


def test_a_run_continues_with_other_numbers_of_processes_and_workers(images, tmp_path):
    """A run that is signalled with its loader's worker, and then continues in two processes without workers."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    *ends, output = train(images, parts, 1, "--num_workers 1", signal_all)
    assert ends == [[128 + signal.SIGTERM], ["checkpoint-0-1.pth"]] and output.count(ENDED) == 1, output
    assert train(images, whole, 1)[0] == [0] and train(images, parts, 2)[0] == [0, 0]
    states = [load_file(directory / "run/checkpoint-2.pth") for directory in (parts, whole)]
    assert_equal(*(state["model"] for state in states), rtol=0, atol=2e-5)
    assert log_of(parts / "run", "loss")[-1] == pytest.approx(log_of(whole / "run", "loss")[-1], rel=1e-4)
    statuses, _, output = train(images, parts, 2, "--batch_size 4")
    assert statuses == [1, 1] and output.count("update_freq x processes 4 (now 8)") == 1, output


@pytest.mark.slow
def test_torchrun_restarts_exactly_after_a_kill_and_passes_signals_on(images, tmp_path):
    flags = "--epochs 3 --save_every_steps 1 --log_every 1"
    assert train(images, tmp_path / "two", 2, flags)[0] == [0, 0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    line = f"{FLAGS} --batch_size 2 {flags} --num_workers 1".split()
    command = [*torchrun, HERE.parent / "pretrain.py", *line, "--data_path", images]

    def log_reaches(lines):
        log, end = tmp_path / "run/log.jsonl", time.monotonic() + 240
        while not log.exists() or log.read_text().count("\n") < lines:
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.01)

    with open(tmp_path / "output.txt", "w") as output:
        run = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
        log_reaches(2)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        log_reaches(6)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=100)
    text = (tmp_path / "output.txt").read_text()
    assert text.count("continuing from") == 1 and "ended by signal 15 after update" in text, text
    assert "Grad strides" not in text, text
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "continuing from" in result.stdout, result.stderr
    states = [load_file(tmp_path / name / "checkpoint-3.pth") for name in ("two/run", "run")]
    assert all(stress.difference(*(state[name] for state in states)) is None for name in ("model", "optimizer"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--processes 2 --stage finetune"])
def test_runs_killed_at_random_instants_equal_uninterrupted_ones(flags):
    command = [sys.executable, HERE / "stress.py", "--kills", "2", *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


ELSEWHERE = """
import multiprocessing, os, signal, sys
start, *words = sys.argv[1:]
multiprocessing.set_start_method(start)
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("SIGUSR1", "sigwaitinfo", "sigtimedwait", "pthread_sigmask", "SIGKILL"):
    delattr(signal, name)
import data, pretrain

def stop(pixels, *args, normalise=data.normalise):
    os.kill(os.getpid(), signal.SIGTERM)
    return normalise(pixels, *args)

data.normalise, pretrain.draw = stop if start == "fork" else data.normalise, lambda *_: None
pretrain.main(pretrain.get_args(words))
"""


def test_a_run_stops_and_continues_without_what_windows_lacks(images, tmp_path):
    """No fcntl, SIGUSR1, sigwaitinfo or pthread_sigmask; two workers, at last started afresh."""
    line = f"{FLAGS} --epochs 1 --batch_size 4 --num_workers 2 --disable_eval --data_path {images}".split()
    command, env = [sys.executable, "-c", ELSEWHERE], os.environ | {"PYTHONPATH": str(HERE.parent)}
    options = dict(cwd=tmp_path, capture_output=True, text=True, env=env)
    stopped, continued = [subprocess.run([*command, start, *line], **options) for start in ("fork", "spawn")]
    assert (stopped.returncode, stopped.stderr) == (128 + signal.SIGTERM, "")
    assert (continued.returncode, continued.stderr) == (0, "") and "at epoch 0, update 1" in continued.stdout
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-0-1.pth", "checkpoint-1.pth"]
