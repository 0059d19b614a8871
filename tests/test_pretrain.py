"""Claims about pretrain.py, by running it; and about interrupted runs of all four stages."""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import stress
import torch
from helpers import Killed, call_at, image_folder, log_of, read_log, read_table, small, words
from helpers import run as run_script
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

import analyze
import data
import pretrain
from model import MODELS
from plumbing.files import load_file
from plumbing.loading import mix_seed
from plumbing.run import Run


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """24 images to train on and 12 to validate, in class folders."""
    return image_folder(tmp_path_factory.mktemp("labelled"), size=48, train=24, val=12)


run = partial(run_script, pretrain)


@pytest.mark.parametrize("stage", stress.STAGES)
def test_a_killed_run_of_any_stage_continues_as_if_nothing_had_happened(tmp_path, monkeypatch, stage):
    script, images = importlib.import_module(stage), stress.images_in(tmp_path / "images")
    line = stress.STAGES[stage].split() + words(data_path=images, batch_size=4, save_ckpt_num=9)

    def train(name):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        script.main(script.get_args(line))
        return stress.contents(tmp_path / name)

    whole = train("whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        call_at(patch, Run, "backward", 6)  # the last update, two after a checkpoint inside the second epoch
        train("parts")
    assert "checkpoint-2.pth" in whole and len(whole) >= 9
    assert stress.difference(whole, train("parts")) is None


def test_a_run_writes_what_the_readme_says(labelled, tmp_path, capsys, drawn):
    state = run(labelled / "val", tmp_path, epochs=4, save_ckpt_num=2)
    names = "checkpoint-3.pth checkpoint-4.pth encoder.pth log.jsonl config.json progress.png reconstructions.png"
    assert {path.name for path in tmp_path.iterdir()} == set(names.split())
    encoder = MODELS["convnextv2_atto"](num_classes=0, stem_stride=1)
    encoder.load_state_dict(load_file(tmp_path / "encoder.pth")["model"])
    assert state["config"]["model"] == "convnextv2_atto" and "torch" in state["versions"]
    assert log_of(tmp_path, "update") == [*range(1, 13)] and 0.8 < log_of(tmp_path, "loss")[0] < 1.2
    assert state["config"].items() <= json.loads((tmp_path / "config.json").read_text()).items()
    assert "encoder.pth" in capsys.readouterr().out
    assert all(min(Image.open(tmp_path / name).size) > 300 for name in ("progress.png", "reconstructions.png"))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_as_float32_does(labelled, tmp_path, amp):
    flags = dict(model="convnextv2_yocto", clip_grad=1.0, input_size=16)
    states = [run(labelled / "val", tmp_path / name, **flags, amp=name)["model"] for name in ("none", amp)]
    losses = [log_of(tmp_path / name, "loss") for name in ("none", amp)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and stress.difference(*states)


def test_a_run_in_poor_surroundings_draws_its_plots(tmp_path):
    """One image, no display, an unknown matplotlib backend, no encoding but ASCII, a folder whose name is not UTF-8."""
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment |= dict(MPLBACKEND="nonsense", LC_ALL="C", PYTHONIOENCODING="ascii")
    environment |= dict(PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    (tmp_path / "images").symlink_to(image_folder(tmp_path / "one", train=1))
    output_dir = tmp_path / os.fsdecode(b"\xff") / "new\nline $^{$"
    line = small(pretrain, tmp_path / "images", output_dir, epochs=1, warmup_epochs=None, model="convnextv2_yocto")
    result = subprocess.run([sys.executable, pretrain.__file__, *line], capture_output=True, env=environment)
    assert result.returncode == 0 and result.stderr == b"", result.stderr
    assert {"progress.png", "reconstructions.png", "encoder.pth"} < {path.name for path in output_dir.iterdir()}


@pytest.mark.parametrize(("images", "epochs", "lr"), [(200, 800, 3e-4), (5000, 200, 3e-4), (30_000, 800, 3.75e-5)])
def test_defaults_follow_the_data_and_flags_win(monkeypatch, capsys, images, epochs, lr):
    """Small folders get a schedule of their own, and others the paper's."""
    names = [*(f"{k}.JPG" for k in range(images)), "a.txt"]
    monkeypatch.setattr(pretrain.os, "walk", lambda folder, followlinks: [(folder, [], names)])
    args = pretrain.get_args(["--data_path", "x"])
    assert (args.epochs, args.blr * args.batch_size / 256) == (epochs, pytest.approx(lr))
    assert ("few for the paper's schedule" in capsys.readouterr().out) == (images < pretrain.SMALL)
    paper = dict(data_set="folder", input_size=224, stem_stride=4, blr=1.5e-4, epochs=800, warmup_epochs=40, min_lr=0)
    paper |= dict(weight_decay=0.05, mask_ratio=0.6, decoder_depth=1, decoder_embed_dim=512, norm_pix_loss=True)
    assert paper.items() <= vars(pretrain.get_args(["--data_path", "x", "--recipe", "paper"])).items()
    cifar = pretrain.get_args(["--data_set", "cifar10", "--epochs", "3"])
    assert (cifar.input_size, cifar.stem_stride, cifar.epochs) == (32, 1, 3)


EVALUATED = dict(disable_eval=False, model="convnextv2_yocto", epochs=3, lr=1e-2, save_every_steps=4)


def test_evaluation_changes_no_weights_and_tensorboard_shows_the_log(labelled, tmp_path, monkeypatch, drawn):
    flags = EVALUATED | dict(epochs=2, log_dir=tmp_path / "events")
    without = run(labelled, tmp_path / "without", **flags | dict(disable_eval=True, log_dir=None))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        call_at(patch, Run, "backward", 5)
        run(labelled, tmp_path / "run", **flags)
    assert (tmp_path / "run/reconstructions.png").exists()  # in the first epoch, from before the first update
    state = run(labelled, tmp_path / "run", **flags)
    assert all(stress.difference(state[name], without[name]) is None for name in ("model", "optimizer"))
    records = read_log(tmp_path / "run")
    assert [record["epoch"] for record in records if "probe" in record] == [0, 1, 2]
    board = event_accumulator.EventAccumulator(str(tmp_path / "events"), {"images": 0, "scalars": 0}).Reload()
    assert set(board.Tags()["images"]) == {"progress", "reconstructions"}
    assert {*board.Tags()["scalars"], "update"} == {key for record in records for key in record}
    for key in board.Tags()["scalars"]:
        events = [(event.step, pytest.approx(event.value)) for event in board.Scalars(key)]
        assert [(record["update"], record[key]) for record in records if key in record] == events


def test_evaluation_is_by_fixed_masks_and_equals_analyze(labelled, tmp_path):
    """8 of the 12 images, and 12 of the 24: what a run of seconds evaluates."""
    run(labelled, tmp_path, **EVALUATED)
    records = [record for record in read_log(tmp_path) if "probe" in record]
    images = data.load_images("folder", labelled, "val", data.center_transform(32))
    chosen = torch.randperm(12, generator=torch.Generator().manual_seed(mix_seed("images", 0)))[:8].sort().values
    imgs = data.normalise(torch.stack([images[0, i][0] for i in chosen.tolist()]), images.statistics, "cpu")
    generator = torch.Generator().manual_seed(mix_seed("evaluation"))
    loss, _, _ = analyze.load_mae(tmp_path / "checkpoint-3.pth")(imgs, generator=generator)
    assert records[-1]["val_loss"] == pytest.approx(loss.item(), rel=1e-5)
    flags = words(checkpoint=tmp_path, output_dir=tmp_path, num_images=8, bank_images=12, untrained=True)
    analyze.main(analyze.get_args(["probe", *flags]))
    table = read_table(tmp_path / "probe.csv")
    rows = {(row["checkpoint"], row["features"]): float(row["accuracy"]) for row in table}
    for record, name in ((records[0], "untrained"), (records[-1], tmp_path.name)):
        assert [record["probe"], record["knn"]] == [rows[name, "stages 3, 4"], rows[name, "10 nearest"]]


def test_what_is_evaluated_follows_the_data(labelled, tmp_path, monkeypatch):
    """Without val/: the loss of training images alone, or of those that --holdout keeps from training, by class too."""
    flags = EVALUATED | dict(eval_freq=2)
    for name, more, keys in (("a", {}, {"train_loss"}), ("b", dict(holdout=0.25), {"val_loss", "probe", "knn"})):
        state = run(labelled / "val", tmp_path / name, **flags, **more)
        assert state["config"]["images"] == (9 if more else 12)
        records = [record for record in read_log(tmp_path / name) if "eval_seconds" in record]
        assert [record["epoch"] for record in records] == [0, 2, 3]
        assert all(record.keys() == keys | {"epoch", "update", "eval_seconds"} for record in records)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        run(labelled, tmp_path / "c", log_dir=tmp_path)


COMMANDS = """
pretrain --model convnextv2_base --batch_size 64 --update_freq 8 --blr 1.5e-4 --epochs 1600 --warmup_epochs 40
finetune --model convnextv2_base --batch_size 32 --update_freq 4 --blr 6.25e-4 --epochs 100 --warmup_epochs 20 \
 --layer_decay_type group --layer_decay 0.6 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 \
 --smoothing 0.1 --model_ema True --model_ema_eval True --use_amp True --scratch --data_set image_folder
finetune --model convnextv2_atto --batch_size 32 --update_freq 4 --blr 2e-4 --epochs 600 --warmup_epochs 0 \
 --layer_decay_type single --layer_decay 0.9 --weight_decay 0.3 --drop_path 0.1 --reprob 0.25 --mixup 0. --cutmix 0. \
 --smoothing 0.2 --model_ema True --model_ema_eval True --use_amp True --scratch
finetune --model convnextv2_large --batch_size 32 --update_freq 4 --blr 6.25e-4 --epochs 100 --warmup_epochs 20 \
 --layer_decay_type group --layer_decay 0.6 --drop_path 0.2 --head_init_scale 0.001 --data_set IMNET --nb_classes 1000 \
 --scratch
"""


@pytest.mark.parametrize("command", COMMANDS.replace("\\\n", "").strip().splitlines())
def test_the_authors_commands_are_understood(command):
    """Commands as their documentation has them, and every flag takes its value."""
    script, *line = [*command.split(), "--data_path", "/path/to/imagenet-1k", "--output_dir", "/path/to/results"]
    args = importlib.import_module(script).get_args(line)
    for name, value in re.findall(r"--(\w+) ([^-\s]\S*)", " ".join(line)):
        expected = {"True": True, "IMNET": "folder", "image_folder": "folder"}.get(value, value)
        assert getattr(args, name) == type(getattr(args, name))(expected), name
