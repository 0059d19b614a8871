"""Claims about how a script ends: by an error under torchrun, by Ctrl-C, and as a run that is made longer."""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import call_at, picture_folder, run, small, stop
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import finetune
import pretrain
from plumbing import torchrun
from plumbing.files import find_checkpoints
from plumbing.log import read_log
from plumbing.script import UserError, counted, exit_with, run_script
from plumbing.signals import STOP_SIGNALS, StopRequest

ROOT = Path(__file__).parents[1]
SCRIPTS = [path for path in ROOT.glob("*.py") if "run_script(main" in path.read_text()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"), train=12, val=6)


# --- errors under torchrun --------------------------------------------------------------------------------------------


@pytest.fixture
def under_torchrun(tmp_path, monkeypatch, at_a_terminal):
    """As torchrun starts a process: a function that sets its rank."""
    monkeypatch.setenv(torchrun.ERROR_FILE, str(tmp_path / "error.json"))
    monkeypatch.setattr(StopRequest, "last", 0)
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    return lambda rank: monkeypatch.setenv("LOCAL_RANK", str(rank))


def test_torchruns_report_ends_with_the_line_of_the_process_that_failed(under_torchrun, tmp_path, capsys):
    under_torchrun(0)
    with pytest.raises(SystemExit) as exit:
        exit_with(2, "no folder;\n give another")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=exit.value.code, error_file=str(tmp_path / "error.json"))
    report = ChildFailedError("train.py", {0: failure}).format_msg()
    assert report.splitlines()[-2] == "  traceback : train.py: no folder; give another"
    assert abs(failure.timestamp - time.time()) < 5
    assert capsys.readouterr().err == "train.py: no folder; give another\n"


def ended_by_torchrun(monkeypatch) -> None:
    """In the first sleep of whoever waits, SIGTERM arrives."""
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))


@pytest.mark.parametrize(
    "error", [UserError("no folder"), RuntimeError("a bug"), RuntimeError("[gloo/pair.cc] Connection closed by peer")]
)
def test_what_another_process_says_is_not_said_again(error, under_torchrun, tmp_path, monkeypatch, capsys):
    under_torchrun(1)
    ended_by_torchrun(monkeypatch)
    with pytest.raises(SystemExit) as exit:
        run_script(lambda _: (_ for _ in ()).throw(error), lambda: None)
    assert exit.value.code == 0  # which torchrun does not report
    assert capsys.readouterr().err == "" and not (tmp_path / "error.json").exists()


def test_the_first_process_too_is_silent_when_it_only_lost_another(under_torchrun, monkeypatch, capsys):
    under_torchrun(0)
    ended_by_torchrun(monkeypatch)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with pytest.raises(SystemExit) as exit:
        run_script(lambda _: (_ for _ in ()).throw(RuntimeError("[gloo/pair.cc] Connection closed by peer")), lambda: None)
    assert exit.value.code == 0 and capsys.readouterr().err == ""


def test_a_process_that_torchrun_has_told_to_end_loses_the_others_in_silence(under_torchrun, monkeypatch, capsys):
    under_torchrun(0)
    monkeypatch.setattr(StopRequest, "last", int(signal.SIGTERM))
    with pytest.raises(SystemExit) as exit:
        exit_with(1, "process 0 lost contact with another one", of_another=True)
    assert exit.value.code == 0 and capsys.readouterr().err == ""


def test_an_error_of_one_process_alone_is_said_by_that_one(under_torchrun, tmp_path, monkeypatch, capsys):
    under_torchrun(1)
    monkeypatch.setattr(torchrun, "PATIENCE", 0.1)
    with pytest.raises(SystemExit) as exit:
        exit_with(2, "no folder on this machine")
    assert exit.value.code == 2 and capsys.readouterr().err == "train.py: no folder on this machine\n"
    assert "no folder on this machine" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


HARNESS = """
import os, signal, sys
sys.path.insert(0, {root!r})
import data, finetune
from plumbing.script import UserError, run_script
normalise, calls = data.normalise, []
def failing(*args):
    calls.append(0)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        {act}
    return normalise(*args)
data.normalise = failing
run_script(finetune.main, finetune.get_args)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "more", "rank", "line"),
    [
        ("pass", ["--modle", "x"], 0, "train.py: unrecognized arguments: --modle x; did you mean --model? (see --help)"),
        ("pass", ["--data_path", "/nowhere"], 0, "train.py: the folder /nowhere does not exist"),
        ("raise UserError('this one is spoilt')", [], 1, "train.py: this one is spoilt"),
        ("raise KeyError('a bug')", [], 1, "KeyError: 'a bug'"),
        ("os.kill(os.getpid(), signal.SIGKILL)", [], 1, "Signal 9 (SIGKILL) received by PID"),
    ],
)
def test_torchrun_reports_one_failure_and_its_line_last(act, more, rank, line, pictures, tmp_path):
    (tmp_path / "train.py").write_text(HARNESS.format(root=str(ROOT), act=act))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [*small(finetune, pictures, tmp_path / "run"), *more]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode == 1 and "<NO_OTHER_FAILURES>" in output, output
    assert f"rank      : {rank} " in output and "lost contact" not in output
    assert output.splitlines()[-2].startswith(f"  traceback : {line}")
    said = [text for text in output.split("Traceback (most recent call last):\n  File")[0].splitlines() if line in text]
    assert len(said) == ("SIGKILL" not in act), output


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------

PROGRAM = "import plumbing\nimport signal\nprint(signal.getsignal(signal.SIGINT) == signal.SIG_DFL)"


def hear_ctrl_c() -> None:
    """In a child, before its program: in the background of a shell's script SIGINT would be ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_every_script_imports_plumbing_before_all_else():
    assert {path.stem for path in SCRIPTS} >= {"pretrain", "finetune", "analyze", "bench", "reproduce", "weights"}
    for path in SCRIPTS:
        first = ast.parse(path.read_text()).body[1]
        assert isinstance(first, ast.Import) and first.names[0].name == "plumbing", path


@pytest.mark.parametrize(("place", "silenced"), [("", "True"), ("elsewhere", "False")])
def test_importing_plumbing_silences_ctrl_c_in_the_scripts_beside_it_alone(place, silenced, tmp_path):
    (tmp_path / "plumbing").mkdir()
    (tmp_path / "plumbing/__init__.py").write_text((ROOT / "plumbing/__init__.py").read_text())
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "script.py").write_text(PROGRAM)
    result = subprocess.run([sys.executable, tmp_path / place / "script.py"], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(tmp_path)}, preexec_fn=hear_ctrl_c)  # fmt: skip
    assert result.stdout.strip() == silenced, result


def test_a_script_hears_ctrl_c_again_once_it_runs(at_a_terminal):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as plumbing/__init__.py leaves it
    heard = []
    run_script(lambda _: heard.append(signal.getsignal(signal.SIGINT)), lambda: None)
    assert heard == [signal.default_int_handler]


def interrupt(script, argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run_script(script.main, lambda: script.get_args(argv))
    assert exit.value.code == 130


def test_ctrl_c_outside_of_a_run_promises_no_checkpoint(capsys, at_a_terminal):
    with pytest.raises(SystemExit) as exit:
        run_script(lambda _: stop(), lambda: None)
    assert exit.value.code == 130 and capsys.readouterr().err.endswith(": interrupted\n")


def test_ctrl_c_before_the_first_update_names_the_last_checkpoint_if_there_is_one(
    pictures, tmp_path, monkeypatch, capsys, at_a_terminal
):
    argv = small(pretrain, pictures, tmp_path / "run", epochs=1)
    with monkeypatch.context() as patch:
        call_at(patch, pretrain, "make_autoencoder", 1)
        interrupt(pretrain, argv)
    assert capsys.readouterr().err.endswith(": interrupted\n")
    pretrain.main(pretrain.get_args(argv))
    with monkeypatch.context() as patch:
        call_at(patch, pretrain, "make_autoencoder", 1)
        interrupt(pretrain, argv)
    assert capsys.readouterr().err.endswith(f": interrupted; the last checkpoint is {tmp_path / 'run/checkpoint-1.pth'}\n")


def test_ctrl_c_in_the_last_evaluation_leaves_a_complete_run(pictures, tmp_path, monkeypatch, capsys, at_a_terminal):
    argv = small(finetune, pictures, tmp_path / "run", epochs=1)
    call_at(monkeypatch, finetune, "evaluate", 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupt(finetune, argv)
    assert "SIGINT: ended after update 3; the run is complete\n" in capsys.readouterr().out
    finetune.main(finetune.get_args(argv))
    assert "has already finished its 1 epoch;" in capsys.readouterr().out


def test_ctrl_c_says_which_command_continues(pictures, tmp_path, monkeypatch, capsys, at_a_terminal):
    argv = [*small(finetune, pictures, tmp_path / "run"), "--no-auto_resume"]
    with monkeypatch.context() as patch:
        call_at(patch, finetune.F, "cross_entropy", 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        interrupt(finetune, argv)
    said = re.search(r"the same command with (--resume) (\S+) continues\n", capsys.readouterr().out)
    finetune.main(finetune.get_args([*argv, *said.groups()]))
    assert [record["update"] for record in read_log(tmp_path / "run") if "lr" in record] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("seconds", [0.5, 1.5])
def test_ctrl_c_during_the_imports_leaves_no_traceback(script, seconds):
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=hear_ctrl_c)  # fmt: skip
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in output, output


# --- longer runs, and other settings ----------------------------------------------------------------------------------


def test_a_finished_run_that_is_made_longer_follows_the_longer_schedule_from_there(pictures, tmp_path, capsys):
    run(finetune, pictures, tmp_path / "run", epochs=2, warmup_epochs=1)
    capsys.readouterr()
    run(finetune, pictures, tmp_path / "run", epochs=4, warmup_epochs=1)
    rates = [record["lr"] for record in read_log(tmp_path / "run") if "lr" in record]

    def cosine(update, epochs):
        done = (update / 3 - 1) / (epochs - 1)
        return 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * done)) / 2

    assert rates[3:] == pytest.approx([cosine(u, 2) for u in range(3, 6)] + [cosine(u, 4) for u in range(6, 12)])
    output = capsys.readouterr().out
    said = f"--epochs 2 before, now 4: from here on the learning rate is the longer run's, {cosine(6, 4):.2e} instead of 1.00e-06"
    assert f"{said}; 4 epochs from the beginning would give another result\n" in output
    assert re.search(r"finished 4 epochs; \d+s since it was continued; in ", output)


def test_a_longer_run_at_a_constant_rate_is_the_one_from_the_beginning(pictures, tmp_path, capsys):
    constant = dict(lr=1e-3, min_lr=1e-3, warmup_epochs=0)
    run(pretrain, pictures, tmp_path / "parts", epochs=1, **constant)
    assert re.search(r"finished 1 epoch in \d+s; in ", capsys.readouterr().out)
    parts = run(pretrain, pictures, tmp_path / "parts", epochs=2, **constant)
    assert "--epochs 1 before, now 2: the learning rate has been the longer run's so far\n" in capsys.readouterr().out
    whole = run(pretrain, pictures, tmp_path / "whole", epochs=2, **constant)
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())


def test_a_warm_up_that_follows_from_epochs_does_not_keep_a_run_from_being_made_longer(pictures, tmp_path):
    run(pretrain, pictures, tmp_path / "run", epochs=1, warmup_epochs=None)
    assert run(pretrain, pictures, tmp_path / "run", epochs=2, warmup_epochs=None)["epoch"] == 2
    with pytest.raises(UserError, match=r"checkpoint-2.pth was written with --warmup_epochs 0.1 \(now 1\); repeat"):
        run(pretrain, pictures, tmp_path / "run", epochs=3, warmup_epochs=1)


def test_more_epochs_by_default_are_no_wish_for_them(pictures, tmp_path):
    run(finetune, pictures, tmp_path / "run", epochs=1, warmup_epochs=0)
    with pytest.raises(UserError, match=r"was written with --epochs 1 \(now 100\); repeat those flags"):
        run(finetune, pictures, tmp_path / "run", epochs=None, warmup_epochs=0)


def test_fewer_epochs_than_are_done_are_refused_in_one_line(pictures, tmp_path):
    run(finetune, pictures, tmp_path / "run", epochs=2)
    for more in (dict(), dict(resume_anyway=True)):
        with pytest.raises(
            UserError, match=r"checkpoint-2.pth has 2 epochs behind it, more than --epochs 1; give more, or another"
        ):
            run(finetune, pictures, tmp_path / "run", epochs=1, **more)
    assert len(find_checkpoints(tmp_path / "run")) == 2


def test_a_refusal_to_continue_names_flags_that_can_be_given(pictures, tmp_path):
    run(finetune, pictures, tmp_path / "run", batch_size=4, warmup_epochs=None)
    changed = dict(batch_size=3, update_freq=2, warmup_epochs=None, clip_grad=1, opt_betas=(0.8, 0.9), model_ema=True)
    with pytest.raises(UserError) as error:
        run(finetune, pictures, tmp_path / "run", **changed)
    said = str(error.value)
    assert "--batch_size 4 --update_freq 1 in 1 process (now --batch_size 3 --update_freq 2 in 1 process)" in said
    assert "--clip_grad none (now 1), --model_ema false (now true), --opt_betas 0.9 0.999 (now 0.8 0.9)" in said
    known = {option for action in finetune.make_parser()._actions for option in action.option_strings}
    assert set(re.findall(r"--\w+", said)) <= known and "_in_update" not in said and "per_epoch" not in said
    with pytest.raises(UserError, match=r"was written with --labels_per_class none \(now 2\); repeat"):
        run(finetune, pictures, tmp_path / "run", warmup_epochs=None, labels_per_class=2)
    fewer = picture_folder(tmp_path / "fewer", train=9, val=3)
    with pytest.raises(UserError, match=r"was written with 12 images in --data_path \(now 9\); repeat"):
        run(finetune, fewer, tmp_path / "run", warmup_epochs=None)


def test_one_is_singular():
    assert [counted(1, "image"), counted(0, "class"), counted(1, "process"), counted(1234, "class")] == [
        "1 image", "0 classes", "1 process", "1,234 classes"]  # fmt: skip
