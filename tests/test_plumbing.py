"""Claims about plumbing, and about several processes that train together."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stress
import torch
from helpers import ALONE, Code, stop
from test_trust import contents

import finetune
import pretrain
from fcmae import FCMAE
from model import MODELS, ConvNeXt
from plumbing.devices import autocast_dtype
from plumbing.files import find_checkpoints, load_file, prune_checkpoints, save_json, save_tensors, write_atomically
from plumbing.flags import BoolFlag, Parser, number, one_of
from plumbing.log import Meters, RunLog, duration, read_log, stop_if_diverging
from plumbing.optim import learning_rate, parameter_groups
from plumbing.processes import TORCHRUN_VARIABLES, setup_processes
from plumbing.script import UserError
from plumbing.seeds import mix_seed

HERE = Path(__file__).parent


def test_learning_rate_at_its_corners():
    schedule = dict(peak=2.0, min_lr=0.5, warmup_epochs=4, epochs=20)
    assert learning_rate(0, **schedule) == 0
    assert learning_rate(1, **schedule) == 0.5
    assert learning_rate(4, **schedule) == 2.0
    assert learning_rate(12, **schedule) == pytest.approx(1.25)  # half way down, half the height
    assert learning_rate(8, **schedule) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(20, **schedule) == 0.5
    assert learning_rate(21, **schedule) == 0.5


def test_learning_rate_without_warmup_and_with_nothing_but_warmup():
    assert learning_rate(0, peak=1.0, min_lr=0.0, warmup_epochs=0, epochs=5) == 1.0
    assert learning_rate(2.5, peak=1.0, min_lr=0.0, warmup_epochs=5, epochs=5) == 0.5
    assert learning_rate(4.9, peak=1.0, min_lr=0.25, warmup_epochs=5, epochs=5) == pytest.approx(0.98)
    assert learning_rate(5, peak=1.0, min_lr=0.25, warmup_epochs=5, epochs=5) == 1.0  # the top of the ramp, at which training ends


@pytest.mark.parametrize("notebook", [True, False])
def test_progress_is_a_bar_in_a_notebook_and_plain_lines_in_a_file(tmp_path, monkeypatch, capsys, notebook):
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", None)
    log = RunLog(tmp_path, 5, 10, 0, "", ALONE)
    log.write({"loss": 0.5}, "loss 0.5")
    log.close()
    printed = capsys.readouterr()
    assert ("loss 0.5" in printed.err) == notebook and ("loss 0.5" in printed.out) != notebook


@pytest.mark.parametrize("version", [1, 2])
def test_only_kernels_and_matrices_decay(version):
    with torch.device("meta"):
        mae = FCMAE(MODELS[f"convnext{'v2' if version == 2 else ''}_atto"](num_classes=0))
    decayed, free = parameter_groups(mae, 0.05)
    names = {id(p): name for name, p in mae.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    modules = {name.split(".")[-2] for name in map(names.get, map(id, decayed["params"]))}
    assert modules == {"0", "1", "dwconv", "pwconv1", "pwconv2", "proj", "pred"}
    kinds = {name.split(".")[-1] for name in map(names.get, map(id, free["params"]))}
    assert kinds == {"weight", "bias", "gamma", "mask_token", "beta"}
    assert all(p.ndim == 1 for p in free["params"] if names[id(p)].endswith("weight"))
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_frozen_parameters_are_left_out():
    net = ConvNeXt((1, 1, 1, 1), (8, 8, 8, 8))
    net.stages.requires_grad_(False)
    assert all(p.requires_grad for group in parameter_groups(net, 0.1) for p in group["params"])


@pytest.mark.parametrize(
    ("words", "value"),
    [([], True), (["--x"], True), (["--no-x"], False), (["--x", "true"], True), (["--x", "False"], False), (["--x", "0"], False)],
)
def test_booleans_take_all_three_forms(words, value):
    parser = Parser()
    parser.add_argument("--x", action=BoolFlag, default=True)
    assert parser.parse_args(words).x is value


@pytest.mark.parametrize("words", [["--x", "maybe"], ["--no-x", "true"], ["--n", "0"], ["--n", "1.5"], ["--n", "nan"], ["--p", "nan"],
                                   ["--p", "1.5"], ["--p", "0"], ["--kind", "appel"], ["--ki", "apple"], ["--unknown", "1"]])  # fmt: skip
def test_a_wrong_flag_is_one_line_and_status_2(words, capsys):
    parser = Parser()
    parser.add_argument("--x", action=BoolFlag, default=True)
    parser.add_argument("--n", type=number(int, 1))
    parser.add_argument("--p", type=number(float, 0, 1, above=True))
    parser.add_argument("--kind", type=one_of("fruit", ["apple", "pear"]))
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(words)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and words[-2].removeprefix("--no").strip("-") in error


def test_a_typo_suggests_the_nearest_name():
    with pytest.raises(argparse.ArgumentTypeError, match="did you mean convnextv2_tiny"):
        one_of("model", MODELS)("convnextv2-tiny")
    with pytest.raises(argparse.ArgumentTypeError, match="choose from .*convnextv2_huge"):
        one_of("model", MODELS)("resnet")


def test_seeds_are_fixed_and_differ_with_purpose_place_and_length():
    assert mix_seed("crop", 0, 1, 2) == 6809723051403476792  # on every machine
    seeds = {mix_seed("crop", a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    seeds |= {mix_seed("crop", a, b) for a in range(10) for b in range(10)} | {
        mix_seed("mask", a, b) for a in range(10) for b in range(10)
    }
    assert len(seeds) == 1200


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for place in ("11", "9-100", "10-3", "9", "10-20", "10"):
        save_tensors(tmp_path / f"checkpoint-{place}.pth", {"place": place})
    (tmp_path / "checkpoint-best.pth").write_bytes(b"")
    names = [f"checkpoint-{place}.pth" for place in ("9", "9-100", "10", "10-3", "10-20", "11")]
    assert [path.name for path in find_checkpoints(tmp_path)] == names
    prune_checkpoints(tmp_path, keep=2, newest=tmp_path / "checkpoint-9.pth")
    assert [path.name for path in find_checkpoints(tmp_path)] == [names[0], *names[-2:]]
    assert load_file(tmp_path / "checkpoint-11.pth") == {"place": "11"}


def test_files_that_are_no_checkpoints_are_named_and_no_code_runs(tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    torch.save({"a": Code()}, tmp_path / "code")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole")
    (tmp_path / "truncated").write_bytes((tmp_path / "whole").read_bytes()[:1000])
    for name in ("text", "empty", "code", "list", "truncated", "missing", "."):
        with pytest.raises(UserError, match=str(tmp_path / name)):
            load_file(tmp_path / name)
    with pytest.raises(pytest.fail.Exception, match="the code ran"):  # were it not for load_file
        torch.load(tmp_path / "code", weights_only=False)


def test_the_log_drops_lines_that_the_checkpoint_does_not_know(tmp_path):
    log = RunLog(tmp_path, 5, 10, 0, "", ALONE)
    for step in range(4):
        log.write({"step": step}, f"step {step}")
    log = RunLog(tmp_path, 5, 10, 2, "".join(log.lines[:2]), ALONE)
    log.write({"step": "two"}, "")
    assert read_log(tmp_path) == log.records() == [{"step": 0}, {"step": 1}, {"step": "two"}]
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # cut short by a kill
    assert len(read_log(tmp_path)) == 3


def test_meters_average_finite_updates_and_count_the_others():
    meters = Meters(torch.device("cpu"))
    for loss, norm in ((1.0, 1.0), (float("nan"), 1.0), (3.0, 2.0), (5.0, float("inf"))):
        meters.add_loss(torch.tensor(loss) / 2, {})
        meters.add_loss(torch.tensor(loss) / 2, {})
        meters.end_update(torch.tensor(norm))
    assert meters.read(ALONE) == {"loss": 2.0, "grad_norm": None, "skipped_updates": 2, "skipped_in_row": 1}
    meters.end_update(torch.tensor(float("nan")))
    assert meters.read(ALONE)["loss"] is None
    meters.end_update(torch.tensor(float("nan")))
    assert meters.read(ALONE)["skipped_in_row"] == 3


def test_ten_skipped_updates_in_a_row_end_the_run_and_name_the_checkpoint(tmp_path):
    stop_if_diverging({"skipped_in_row": 9}, tmp_path)
    save_tensors(tmp_path / "checkpoint-7.pth", {})
    with pytest.raises(UserError, match="checkpoint-7.pth"):
        stop_if_diverging({"skipped_in_row": 10}, tmp_path)


def test_an_unusable_device_is_named():
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}"):
            setup_processes(name)


def test_processes_wait_for_each_other_as_long_as_they_are_told(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, timeout: asked.append(timeout) or iter([(None, 1, 2)]))
    monkeypatch.setattr(torch.distributed, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, timeout, **__: asked.append(timeout) or stop())
    for name, value in zip(TORCHRUN_VARIABLES, ("1", "2", "1", "29500", "localhost")):
        monkeypatch.setenv(name, value)
    for script in (pretrain, finetune):
        with pytest.raises(KeyboardInterrupt):
            script.main(script.get_args(["--timeout_minutes", "0.5", "--output_dir", str(tmp_path), "--device", "cpu"]))
    assert [timeout.total_seconds() for timeout in asked] == [30] * 4


def test_json_and_durations(tmp_path):
    save_json(tmp_path / "a.json", {"a": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None}
    assert [duration(s) for s in (4.6, 65, 3725)] == ["5s", "1m05s", "1h02m"]


def test_half_precision_on_a_cpu_that_only_emulates_it_is_warned_of(monkeypatch, capsys):
    cpu = torch.device("cpu")
    for capability, warned in (("AVX2", True), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert autocast_dtype("bf16", cpu) == torch.bfloat16
        assert ("--amp bf16 takes far longer than float32" in capsys.readouterr().err) == warned
        assert autocast_dtype(None, cpu) is None and not capsys.readouterr().err


# --- several processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> dict:
    """What happened in the scenarios of processes.py."""
    folder = str(tmp_path_factory.mktemp("processes"))
    result = subprocess.run([sys.executable, HERE / "processes.py"], capture_output=True, text=True, cwd=HERE.parent,
                            env=os.environ | {"PYTHONPATH": str(HERE.parent), "TMPDIR": folder})  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_loss_that_is_not_finite_in_one_process_skips_the_update_in_both(processes):
    assert processes["nan"] == {"statuses": [0, 0], "skipped": [0, 1, 0, 0, 0, 0], "finite": True}


def test_a_signal_to_one_process_ends_both_after_the_same_update(processes):
    found = processes["signal to one"]
    assert found["statuses"] == [138, 138] and found["checkpoints"] == ["checkpoint-0-2.pth"]
    assert "SIGUSR1: ended after update 2; the same command continues from run/checkpoint-0-2.pth" in found["output"]


def test_a_process_that_dies_ends_the_other_with_one_line(processes):
    assert processes["lost"]["statuses"] == [1, 9]
    assert "train.py: process 0 lost contact with another one" in processes["lost"]["output"]
    assert "Traceback" not in processes["lost"]["output"]


def test_a_signal_to_all_spares_the_loaders_workers(processes):
    found = processes["signal to all"]
    assert found["statuses"] == [143] and found["checkpoints"] == ["checkpoint-0-2.pth"] and "Error" not in found["output"]


def test_a_run_continues_with_other_numbers_of_processes_and_workers(processes):
    found = processes["other division"]
    assert found["statuses"] == [0, 0] and found["farthest"] < 2e-5
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-4)
    assert found["grad_norm"][0] == pytest.approx(found["grad_norm"][1], rel=1e-3)
    assert "had 1 process, 4 images per forward pass, 12 per epoch; now 2 processes, 4 images" in found["output"]
    unlike = "--batch_size 2 --update_freq 1 in 2 processes (now --batch_size 4 --update_freq 1 in 2 processes)"
    assert found["unlike"][0] == [2, 2] and unlike in found["unlike"][1]


def test_four_processes_evaluate_each_of_six_images_once_and_one_of_them_reports(processes):
    found = processes["evaluation"]
    assert found["trained"] == [0] and found["by_one"][0] == [0] and found["by_four"][0] == [0] * 4
    assert found["by_four"][1] == found["by_one"][1] and found["by_one"][1].count("on 6 images") == 2  # and its moving average


@pytest.mark.slow
def test_torchrun_restarts_exactly_after_a_kill_and_passes_signals_on(processes, tmp_path):
    two = Path(processes["two"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*torchrun, HERE.parent / "pretrain.py", *processes["flags of two"], "--num_workers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in processes.py: two threads round otherwise

    def log_reaches(lines):
        end = time.monotonic() + 240
        while not (log := tmp_path / "run/log.jsonl").exists() or log.read_text().count("\n") < lines:
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.01)

    with open(tmp_path / "output.txt", "w") as output:
        run = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output, env=environment)
        log_reaches(2)
        os.kill(int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[-1]), signal.SIGKILL)
        log_reaches(6)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=100)
    text = (tmp_path / "output.txt").read_text()
    assert "exitcode: -9" in text or "exitcode  : -9" in text or "Signal 9" in text, text
    assert text.count("continuing from") == 1 and "SIGTERM: ended after update" in text and "Grad strides" not in text, text
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "continuing from" in result.stdout, result.stderr
    assert stress.difference(contents(two), contents(tmp_path)) is None
