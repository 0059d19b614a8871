"""Claims about folders as users have them, files that are not read, folders of runs in a file's place, and devices without float64."""

import re
import traceback
from pathlib import Path

import pytest
import torch
from helpers import call_at, picture_folder, run, save_noise, small
from PIL import features
from test_bad_input import bomb
from torch.utils._python_dispatch import TorchDispatchMode

import analyze
import data
import finetune
import pretrain
from plumbing.devices import choose_device
from plumbing.files import load_file
from plumbing.loading import Unreadable
from plumbing.log import read_log
from plumbing.processes import TORCHRUN_VARIABLES, setup_processes
from plumbing.script import UserError, remark


@pytest.fixture(autouse=True)
def said_anew():
    """As in a process of its own, where no line has been said yet."""
    remark.cache_clear()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three classes, 12 pictures to train with and 6 to validate with."""
    return picture_folder(tmp_path_factory.mktemp("pictures"), train=12, val=6)


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory) -> Path:
    """Folders of two runs: pre, and tuned from it."""
    root = tmp_path_factory.mktemp("runs")
    run(pretrain, pictures, root / "pre")
    run(finetune, pictures, root / "tuned", finetune=root / "pre/encoder.pth", stem_stride=None, input_size=None)
    return root


def call(script, *argv) -> None:
    script.main(script.get_args([*map(str, argv), "--device", "cpu"]))


# --- files that are not read


def test_files_of_other_kinds_are_counted_in_one_line_and_litter_is_not(tmp_path, capsys):
    for name in ("a.jpg", "b.PNG"):
        save_noise(tmp_path / name)
    for name in (
        "1.heic",
        "2.HEIC",
        "deep/3.heic",
        "c.mov",
        "README",
        ".DS_Store",
        ".hidden.txt",
        "._a.jpg",
        "Thumbs.db",
        "desktop.ini",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    for _ in range(2):  # once to train with and once to draw, say
        assert len(data.list_images(tmp_path)) == 2
    assert capsys.readouterr().out == f"{tmp_path}: 2 images; not read: 3 .heic, 1 .mov, 1 without a suffix\n"
    for k in range(1200):
        (tmp_path / f"{k}.{k % 12}").touch()
    data.list_images(tmp_path)
    assert re.search(r"not read: 100 \.\d+, .* and 7 other kinds\n", capsys.readouterr().out)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path):
    save_noise(tmp_path / "a.avif", quality=95)
    save_noise(tmp_path / "b.png")
    images = data.load_images("folder", tmp_path, "train", data.center_transform(16))
    (avif, _, failed), (png, _, _) = images[0, 0], images[0, 1]
    assert len(images) == 2 and failed == -1 and (avif.float() - png.float()).abs().mean() < 20


def damage(path: Path, how: str) -> None:
    save_noise(path)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:700])
    elif how == "not an image, or of a format that is not supported":
        path.write_text("hello")
    elif how == "no such file":
        path.unlink()
    else:
        bomb(path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("how", ["empty", "truncated", "not an image, or of a format that is not supported", "no such file",
                                 "more than 178,956,970 pixels"])  # fmt: skip
def test_a_warning_tells_why_a_file_cannot_be_read(tmp_path, capsys, how, suffix):
    path = tmp_path / f"a.{suffix}"
    if how.startswith("more") and suffix == "jpg":
        bomb(tmp_path / "a.png")
        (tmp_path / "a.png").rename(path)
    else:
        damage(path, how)
    images = data.Images([str(path)], None, None, data.pretrain_transform(16), data.STATISTICS["folder"])
    Unreadable(images).note(torch.tensor([images[0, 0][2]]))
    assert capsys.readouterr().err == f"warning: cannot read {path} ({how}); the next image takes its place\n"


def test_every_task_tells_why(runs, tmp_path, capsys):
    folder = picture_folder(tmp_path / "data", train=12, val=12)
    for split in ("train", "val"):
        (folder / split / "dots/empty.png").touch()
    best = runs / "tuned/checkpoint-best.pth"
    tasks = {
        "next image": [(pretrain, small(pretrain, folder, tmp_path / "pre", epochs=1, batch_size=13, log_every=1)),
                       (analyze, ["collapse", "--checkpoint", best, "--data_path", folder, "--output_dir", tmp_path])],
        "left out": [(finetune, ["--eval", "--resume", best, "--data_path", folder]),
                     (finetune, ["--predict", folder / "val", "--resume", best])],
    }  # fmt: skip
    for consequence, calls in tasks.items():
        for script, argv in calls:
            call(script, *argv)
            error = capsys.readouterr().err
            assert error.count("cannot read") == 1 and "empty.png (empty); " in error and consequence in error


# --- folders of other names


@pytest.mark.parametrize("name", ["validation", "valid"])
def test_validation_beside_train_is_taken_for_val_and_said(pictures, runs, tmp_path, capsys, name):
    (tmp_path / "train").symlink_to(pictures / "train")
    (tmp_path / name).symlink_to(pictures / "val")
    assert len(data.load_images("folder", tmp_path, "val", None)) == 6
    said = f"{tmp_path / name} is taken for {tmp_path / 'val'}"
    assert said in capsys.readouterr().out
    call(
        analyze,
        "embed",
        "--checkpoint",
        runs / "tuned",
        "--data_path",
        tmp_path,
        "--output_dir",
        tmp_path / "out",
        "--neighbours",
        1,
    )
    assert "6 of 6 images of folder (val)" in capsys.readouterr().out
    (tmp_path / "val").mkdir()
    save_noise(tmp_path / "val/dots/a.png")
    assert len(data.load_images("folder", tmp_path, "val", None)) == 1


def test_a_class_named_valid_and_a_test_set_are_no_validation_set(pictures, tmp_path):
    for name in ("valid", "broken"):
        save_noise(tmp_path / f"classes/{name}/a.png")
    assert data.load_images("folder", tmp_path / "classes", "val", None).classes == ["broken", "valid"]
    (tmp_path / "train").symlink_to(pictures / "train")
    (tmp_path / "test").symlink_to(pictures / "val")
    with pytest.raises(UserError, match=f"--eval_data_path {tmp_path}/test, or train with --holdout"):
        data.load_images("folder", tmp_path, "val", None)


def test_class_folders_alone_are_trained_on_and_evaluated_on_what_was_held_out(pictures, tmp_path, capsys):
    folder = pictures / "train"
    state = run(finetune, folder, tmp_path / "run", holdout=0.5)
    assert state["classes"] == ["dots", "rings", "stripes"] and state["config"]["images"] == 6
    assert (
        f"{folder} has no train/<class>/ folders: all of it is taken, and the 3 folders in it for classes"
        in capsys.readouterr().out
    )
    last = [record for record in read_log(tmp_path / "run") if "val_loss" in record][-1]
    for where in ((), ("--data_path", folder)):
        call(finetune, "--eval", "--resume", tmp_path / "run/checkpoint-2.pth", *where)
        printed = capsys.readouterr().out
        assert f"loss {last['val_loss']:.4f} on 6 images of {folder} (50% of each class, held out)" in printed
    call(finetune, "--eval", "--resume", tmp_path / "run/checkpoint-2.pth", "--eval_data_path", folder)
    assert f"on 12 images of {folder}, at" in capsys.readouterr().out  # named as images to evaluate on, they are


def test_what_was_held_out_for_tuning_does_not_replace_a_validation_set(pictures, tmp_path, capsys):
    run(finetune, pictures, tmp_path, holdout=0.5, epochs=1)
    capsys.readouterr()
    call(finetune, "--eval", "--resume", tmp_path)
    assert f"on 6 images of {pictures}, at" in capsys.readouterr().out


# --- a run's folder in a file's place


def test_finetune_and_resume_take_a_runs_folder_and_say_what_they_took(pictures, runs, tmp_path, capsys):
    def taken(*argv):
        args = finetune.get_args([*map(str, argv), "--data_path", str(pictures)])
        return Path(args.resume or args.finetune).relative_to(runs).as_posix(), capsys.readouterr().out

    pre, tuned = runs / "pre", runs / "tuned"
    assert taken("--finetune", pre) == ("pre/encoder.pth", f"{pre}: taking encoder.pth\n")
    assert taken("--finetune", tuned) == ("tuned/checkpoint-best.pth", f"{tuned}: taking checkpoint-best.pth\n")
    remark.cache_clear()
    assert taken("--eval", "--resume", tuned) == ("tuned/checkpoint-best.pth", f"{tuned}: taking checkpoint-best.pth\n")
    assert taken("--eval", "--resume", tuned / "checkpoint-1.pth") == ("tuned/checkpoint-1.pth", "")
    best = (tuned / "checkpoint-best.pth").rename(runs / "elsewhere.pth")
    try:
        assert taken("--predict", "x.jpg", "--resume", tuned)[0] == taken("--finetune", tuned)[0] == "tuned/checkpoint-2.pth"
    finally:
        best.rename(tuned / "checkpoint-best.pth")


def test_a_runs_folder_is_continued_from_its_newest_checkpoint(pictures, runs, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at(patch, data, "normalise", 5)  # in the second epoch
        run(pretrain, pictures, tmp_path / "part")
    more = run(pretrain, pictures, tmp_path / "rest", resume=tmp_path / "part")
    assert f"continuing from {tmp_path / 'part/checkpoint-1.pth'} at epoch 1" in capsys.readouterr().out
    whole = load_file(runs / "pre/checkpoint-2.pth")
    assert all(torch.equal(more["model"][name], value) for name, value in whole["model"].items())


def test_curves_takes_checkpoints_as_the_other_commands_do(runs, tmp_path):
    tables = []
    for argv in ([runs / "pre", runs / "tuned"], ["--checkpoint", runs / "pre", runs / "tuned/checkpoint-best.pth"]):
        analyze.main(analyze.get_args(["curves", *map(str, argv), "--output_dir", str(tmp_path)]))
        tables.append((tmp_path / "curves.csv").read_text())
    assert tables[0] == tables[1] and tables[0].count("val_top1") == 2


def test_titles_lie_within_the_picture(runs, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(analyze, "save_figure", lambda figure, path: figures.append(figure))
    monkeypatch.setattr(analyze, "print", lambda *_: None, raising=False)
    for command in ("embed", "selectivity", "grn"):
        call(analyze, command, "--checkpoint", runs / "tuned", "--output_dir", tmp_path)
        figures[-1].draw_without_rendering()
        box, whole = figures[-1]._suptitle.get_window_extent(), figures[-1].bbox
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, command


# --- devices


class NoFloat64(TorchDispatchMode):
    """As on MPS: making a tensor of float64 is an error, but in torch's GradScaler, which does without one there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                assert any(frame.filename.endswith("grad_scaler.py") for frame in traceback.extract_stack()), func
        return found


def test_no_task_needs_float64_on_its_device(pictures, tmp_path):
    more = dict(mixup=0.8, cutmix=1.0, drop_path=0.1, model_ema=True, clip_grad=1.0, layer_decay=0.9)
    with NoFloat64():
        run(pretrain, pictures, tmp_path / "pre", epochs=1)
        run(finetune, pictures, tmp_path / "tuned", epochs=1, **more)
        call(finetune, "--eval", "--resume", tmp_path / "tuned")
        call(finetune, "--predict", pictures / "val", "--resume", tmp_path / "tuned")
        for command in ("reconstruct", "collapse", "selectivity", "grn"):  # the others measure on the CPU
            call(analyze, command, "--checkpoint", tmp_path / "pre", "--num_images", 4, "--output_dir", tmp_path)
        place = torch.tensor([0, 3]), torch.tensor([20, 16]), torch.tensor([0, 1])
        assert data.resize_matrices(*place, 8, 20).shape == (2, 8, 20)  # of images held on the device


def test_mps_is_taken_when_asked_for_and_said_to_be_untested(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # as if there were an MPS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None).type == "cpu" and not capsys.readouterr().out
    assert choose_device("mps").type == "mps"
    assert "--device mps: never run by us" in capsys.readouterr().out
    for name, value in zip(TORCHRUN_VARIABLES, ("1", "2", "1", "29500", "localhost")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device mps is for one process, not 2"):
        setup_processes("mps")
