"""Claims about interrupted, damaged and competing runs: nothing is lost, and nothing changes."""

import fcntl
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stress
import torch
from helpers import ALONE, call_at, stop
from helpers import words as command_line

import data
import pretrain
from plumbing import checkpoints
from plumbing.checkpoints import Checkpoints
from plumbing.devices import set_determinism
from plumbing.files import DamagedFile, find_checkpoints, load_file, save_tensors
from plumbing.loading import EpochSampler
from plumbing.log import Meters, RunLog, read_log
from plumbing.optim import nan_gradient_unless_finite
from plumbing.script import UserError, run_script
from plumbing.signals import STOP_SIGNALS, StopRequest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return stress.pictures_in(tmp_path_factory.mktemp("pictures"))


def words(stage: str, pictures: Path, output_dir: Path, **more) -> list[str]:
    flags = [*stress.STAGES[stage][1].split(), "--data_path", str(pictures), "--batch_size", "4", "--save_ckpt_num", "9"]
    flags += ["--output_dir", str(output_dir / "run")]
    return flags + command_line(**more)


def run(stage: str, pictures: Path, output_dir: Path, **more) -> dict:
    """Train in this process; what the run leaves."""
    module = stress.STAGES[stage][0]
    module.main(module.get_args(words(stage, pictures, output_dir, **more)))
    return contents(output_dir)


def contents(output_dir: Path) -> dict:
    """What the run left, without the settings, in which the directories' names differ."""
    found = stress.contents(output_dir)
    found.pop("config.json", None)
    for content in found.values():
        if isinstance(content, dict):
            content.pop("config")
    return found


def end_state(found: dict) -> dict:
    """Without the checkpoints that an interrupted run has more of."""
    return {name: content for name, content in found.items() if not re.match(r"checkpoint-\d+-", name)}


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> dict[str, dict]:
    """What uninterrupted runs leave."""
    return {stage: run(stage, pictures, tmp_path_factory.mktemp(stage), save_every_steps=100) for stage in stress.STAGES}


# --- kills and signals


@pytest.mark.slow
def test_runs_killed_at_random_instants_equal_uninterrupted_ones():
    result = subprocess.run([sys.executable, HERE / "stress.py", "--kills", "2"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("killed 2 times") == len(stress.STAGES)


@pytest.mark.parametrize(
    ("stage", "number", "turn", "name"),
    [
        ("pretrain", signal.SIGTERM, 2, "checkpoint-0-2.pth"),
        ("pretrain", signal.SIGUSR1, 4, "checkpoint-1-1.pth"),
        ("finetune", signal.SIGINT, 2, "checkpoint-0-2.pth"),
        ("finetune", signal.SIGTERM, 3, "checkpoint-0-3.pth"),  # before the evaluation
        ("finetune", signal.SIGTERM, 4, "checkpoint-1.pth"),  # during it
    ],
)
def test_a_signal_ends_a_run_after_a_checkpoint_from_which_it_continues_exactly(
    stage, number, turn, name, pictures, whole, tmp_path, monkeypatch, capsys, at_a_terminal
):
    module, more = stress.STAGES[stage][0], dict(save_every_steps=100, save_ckpt_freq=2)
    argv = words(stage, pictures, tmp_path, **more)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        call_at(patch, data, "normalise", turn, lambda: os.kill(os.getpid(), number))
        run_script(module.main, lambda: module.get_args(argv))
    assert exit.value.code == 128 + number
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == [name]
    assert name in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    found = end_state(run(stage, pictures, tmp_path, **more))
    expected = {key: value for key, value in whole[stage].items() if key in found}
    assert {"checkpoint-2.pth", "log.jsonl"} <= expected.keys() and stress.difference(expected, found) is None


def test_a_second_signal_ends_the_process_at_once(tmp_path, at_a_terminal):
    args = pretrain.get_args(["--output_dir", str(tmp_path)])
    log = RunLog(tmp_path, 5, 10, 0, "", ALONE)
    child = os.fork()
    if not child:
        saver = Checkpoints(tmp_path, args, ALONE, log, Meters(ALONE.device))
        os.kill(os.getpid(), signal.SIGTERM)
        if saver.due():
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(pictures, whole, tmp_path, monkeypatch, capsys, at_a_terminal):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    call_at(monkeypatch, data, "normalise", 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    found = run("pretrain", pictures, tmp_path, save_every_steps=100)
    assert stress.difference(found, whole["pretrain"]) is None and "SIGINT" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_signal_that_was_ignored_at_the_start_is_not_heeded_after_another_one_either(at_a_terminal):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = StopRequest()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert request.number == signal.SIGUSR1
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == [signal.SIG_DFL, signal.SIG_IGN, signal.SIG_DFL]


def test_checkpoints_every_few_minutes_and_none_without_save_ckpt(pictures, tmp_path):
    found = run("pretrain", pictures, tmp_path / "a", save_every_minutes=1e-9, epochs=1, save_every_steps=100)
    assert {f"checkpoint-{place}.pth" for place in ("0-1", "0-2", "0-3", "1")} <= found.keys()
    found = run("pretrain", pictures, tmp_path / "b", save_every_minutes=1e-9, epochs=1, save_ckpt="false")
    assert not [name for name in found if name.startswith("checkpoint")] and "encoder.pth" in found


def test_what_an_epoch_leaves_is_there_when_a_kill_follows_its_checkpoint(pictures, whole, tmp_path, monkeypatch, at_a_terminal):
    for stage in stress.STAGES:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # the last file written before this is a checkpoint
            call_at(patch, checkpoints, "prune_checkpoints", 1, lambda: signal.raise_signal(signal.SIGINT) or stop())
            run(stage, pictures, tmp_path / stage, save_every_steps=100, epochs=1)
        names = {path.name for path in (tmp_path / stage / "run").iterdir()}
        assert names >= {name for name in whole[stage] if not name.startswith("checkpoint-2")}


def test_unreadable_images_found_before_a_kill_are_counted_after_it(pictures, tmp_path, monkeypatch):
    folder, order = tmp_path / "images", EpochSampler(150, 50, 0, 1, 0)
    folder.mkdir()
    for i in range(150):
        shutil.copy(next(pictures.rglob("*.png")), folder / f"{i:03}.png")
    (folder / f"{next(iter(order))[0][1]:03}.png").write_text("not an image")
    more = dict(batch_size=50, epochs=1, save_every_steps=2, log_every=100)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at(patch, data, "normalise", 3)
        run("pretrain", folder, tmp_path, **more)
    assert run("pretrain", folder, tmp_path, **more)["log.jsonl"][-1]["unreadable_images"] == 1
    assert len(read_log(tmp_path / "run")) == 1


# --- files


def test_every_damage_is_detected_or_harmless(tmp_path):
    generator, rng, path = torch.Generator().manual_seed(0), random.Random(0), tmp_path / "checkpoint-1.pth"
    content = {"model": {"a": torch.randn(40, generator=generator), "b": torch.arange(7)}, "name": "x", "epoch": 3}
    save_tensors(path, content)
    assert stress.difference(torch.load(path, weights_only=True), content) is None  # the seal does not disturb torch
    whole, detected = path.read_bytes(), 0
    damaged = []
    for _ in range(300):
        at = rng.randrange(8 * len(whole))
        damaged.append(whole[: at // 8] + bytes([whole[at // 8] ^ (1 << at % 8)]) + whole[at // 8 + 1 :])
    damaged += [whole[: rng.randrange(len(whole))] for _ in range(100)] + [whole[:-k] for k in range(1, 100)]
    for _ in range(100):
        start = rng.randrange(len(whole))
        damaged.append(whole[:start] + bytes(min(64, len(whole) - start)) + whole[start + 64 :])
    for raw in damaged:
        path.write_bytes(raw)
        try:
            assert stress.difference(load_file(path), content) is None
        except DamagedFile:
            detected += 1
    assert len(damaged) == 599 and detected > 450  # what is left hits padding, or what nobody reads


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_used(pictures, whole, tmp_path, capsys):
    run("pretrain", pictures, tmp_path)
    run_dir = tmp_path / "run"
    for path in find_checkpoints(run_dir)[-2:]:
        flip_a_bit(path)
    with pytest.raises(UserError, match=r"checkpoint-2.pth is not a readable checkpoint: damaged"):
        run("pretrain", pictures, tmp_path, resume=run_dir / "checkpoint-2.pth")
    found = run("pretrain", pictures, tmp_path)
    output = capsys.readouterr()
    assert "checkpoint-2.pth is damaged" in output.err and "checkpoint-1-1.pth at epoch 1, update 1" in output.out
    assert (run_dir / "checkpoint-2.pth.damaged").exists() and (run_dir / "checkpoint-1-3.pth.damaged").exists()
    for name in ("checkpoint-2.pth", "log.jsonl", "encoder.pth"):
        assert stress.difference(found[name], whole["pretrain"][name]) is None

    for path in find_checkpoints(run_dir):
        path.write_bytes(path.read_bytes()[:1000])
    found = run("pretrain", pictures, tmp_path)
    assert "starting from the beginning" in capsys.readouterr().err
    assert stress.difference(found["log.jsonl"], whole["pretrain"]["log.jsonl"]) is None


def test_a_full_disk_costs_a_warning_and_the_next_save_succeeds(pictures, whole, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        call_at(monkeypatch, data, "normalise", 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1])))
        call_at(monkeypatch, data, "normalise", 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
        found = run("pretrain", pictures, tmp_path, save_every_steps=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert all(f"warning: cannot write {name}" in error for name in ("a checkpoint", "log.jsonl", "encoder.pth", "pictures"))
    names = [path.name for path in find_checkpoints(tmp_path / "run")]
    assert names == ["checkpoint-0-1.pth", "checkpoint-1-2.pth", "checkpoint-1-3.pth", "checkpoint-2.pth"]
    assert not list((tmp_path / "run").glob(".*.tmp"))
    for name in ("checkpoint-2.pth", "log.jsonl", "encoder.pth", "loss.png"):
        assert stress.difference(found[name], whole["pretrain"][name]) is None


def test_what_could_not_be_written_to_the_end_is_an_error(tmp_path, monkeypatch, pictures):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("file write failed")))
    with pytest.raises(UserError, match=r"could not write a checkpoint, encoder.pth to .*; make room"):
        run("pretrain", pictures, tmp_path, epochs=1)


def test_a_directory_that_vanishes_is_made_anew_with_the_whole_log(pictures, whole, tmp_path, monkeypatch, capsys):
    call_at(monkeypatch, data, "normalise", 3, lambda: shutil.rmtree(tmp_path / "run"))
    found = run("finetune", pictures, tmp_path, save_every_steps=100)
    assert "has vanished" in capsys.readouterr().err
    assert stress.difference(found["log.jsonl"], whole["finetune"]["log.jsonl"]) is None
    assert stress.difference(found["checkpoint-2.pth"], whole["finetune"]["checkpoint-2.pth"]) is None


def test_a_file_system_that_vanishes_for_a_while_costs_no_line_of_the_log(tmp_path, capsys):
    (tmp_path / "mount/run").mkdir(parents=True)
    log = RunLog(tmp_path / "mount/run", 5, 10, 0, "", ALONE)
    log.write({"step": 0}, "")
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    log.write({"step": 1}, "")
    assert "cannot write log.jsonl" in capsys.readouterr().err
    (tmp_path / "elsewhere").rename(tmp_path / "mount")
    log.write({"step": 2}, "")
    assert [record["step"] for record in read_log(tmp_path / "mount/run")] == [0, 1, 2]
    assert isinstance(log.close(), str)


def test_the_log_survives_a_small_disk_that_is_full_for_a_while(tmp_path, capsys):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        log = RunLog(tmp_path, 5, 10, 0, "", ALONE)
        for step in range(300):
            log.write({"step": step, "text": 100 * "x"}, "")
            if step == 100:
                (tmp_path / "filler").write_bytes(bytes(40000))
            elif step == 250:
                (tmp_path / "filler").unlink()
        assert "warning: cannot write log.jsonl" in capsys.readouterr().err
        assert [record["step"] for record in read_log(tmp_path)] == list(range(300))
        with pytest.raises(OSError, match=r"torch.save failed|No space"):
            save_tensors(tmp_path / "large.pth", {"a": torch.zeros(100000)})
        assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl"}
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_two_runs_never_share_a_directory_and_a_killed_one_leaves_it_free(pictures, tmp_path):
    (tmp_path / "run").mkdir()
    left_behind = tmp_path / "run/.checkpoint-1.pth.1.tmp"
    left_behind.write_text("half")
    read, write = os.pipe()
    child = os.fork()
    if not child:
        file = open(tmp_path / "run/.lock", "w")  # noqa: SIM115
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.write(write, b".")
        time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    try:
        with pytest.raises(UserError, match="another run is writing to --output_dir"):
            run("pretrain", pictures, tmp_path, epochs=1)
        assert left_behind.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run("pretrain", pictures, tmp_path, epochs=1)
    assert not left_behind.exists()


# --- settings


def test_a_run_continues_with_other_settings_when_that_is_meant(pictures, tmp_path, capsys):
    run("finetune", pictures, tmp_path, epochs=1)
    changed = dict(epochs=2, weight_decay=0.2, smoothing=0.3, batch_size=6)
    with pytest.raises(UserError, match=r"--smoothing 0.1 \(now 0.3\), .*--batch_size 4 --update_freq 1.*--resume_anyway"):
        run("finetune", pictures, tmp_path, **changed)
    found = run("finetune", pictures, tmp_path, resume_anyway="true", **changed)
    output = capsys.readouterr().out
    assert "--weight_decay 0.05 (now 0.2), " in output and "continuing all the same" in output
    groups = found["checkpoint-2.pth"]["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
    assert [line["update"] for line in found["log.jsonl"] if "lr" in line] == [3, 3, 4]  # an epoch has two updates now
    for more in (dict(stem_stride=2), dict(opt="sgd")):
        with pytest.raises(UserError, match="does not fit these settings"):
            run("finetune", pictures, tmp_path, resume_anyway="true", **changed | more)


@pytest.mark.parametrize("stage", stress.STAGES)
def test_deterministic_runs_need_no_more_than_the_flag(stage, pictures, whole, tmp_path):
    try:
        found = run(stage, pictures, tmp_path, deterministic="true", save_every_steps=100)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        set_determinism(False)
    assert stress.difference(found, whole[stage]) is None


# --- numbers


def test_an_infinite_loss_has_no_finite_gradient():
    x = torch.tensor([1e30, 1.0], requires_grad=True)
    (x * x).mean().backward()
    assert x.grad.isfinite().all()  # so that it would pass for a good one
    x.grad = None
    nan_gradient_unless_finite((x * x).mean()).backward()
    assert x.grad.isnan().all()
    y = torch.tensor([3.0, 1.0], requires_grad=True)
    loss = (y * y).mean()
    assert torch.equal(nan_gradient_unless_finite(loss), loss)


def test_no_checkpoint_inside_an_epoch_replaces_a_good_one_while_updates_are_skipped(pictures, tmp_path, monkeypatch):
    good, calls = data.normalise, []
    monkeypatch.setattr(data, "normalise", lambda *args: calls.append(0) or good(*args) * (float("nan") if len(calls) > 2 else 1))
    with pytest.raises(UserError, match=r"in 10 updates in a row; the last checkpoint is .*checkpoint-0-2.pth"):
        run("pretrain", pictures, tmp_path, batch_size=1, epochs=1, save_every_steps=1, log_every=12, save_ckpt_num=2)
