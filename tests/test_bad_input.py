"""Claims about wrong input: one line that names the value and the fix, status 1 or 2, and nothing left behind.

A row of `TABLE` is script and name -> the command line, run in the folder `things`, and words that its line must have.
"""

import argparse
import os
import shlex
from pathlib import Path

import pytest
import torch
from helpers import TINY, Code, save_noise

import analyze
import data
import detect
import finetune
import pretrain
import segment
import weights
from fcmae import FCMAE
from model import MODELS, ConvNeXt

SCRIPTS = {"pretrain": pretrain, "finetune": finetune, "detect": detect, "segment": segment}
SCRIPTS |= {"analyze": analyze, "weights": weights}
SMALL = "--input_size 16 --stem_stride 1 --epochs 2 --num_workers 0"
BASE = {
    "pretrain": f"{SMALL} --data_path images --model convnextv2_yocto --decoder_embed_dim 16",
    "finetune": f"{SMALL} --data_path labelled --model convnextv2_atto",
}

TABLE = {
    # --- paths and folders
    "pretrain: folder missing": ("--data_path nowhere", "nowhere does not exist; give a folder"),
    "pretrain: folder is a file": ("--data_path image.png", "image.png is not a directory; give a folder"),
    "pretrain: folder without images": ("--data_path empty", "no images under empty; files must end in", "to JPEG"),
    "pretrain: folder of other files": ("--data_path other", "no images under other, but 2 .heic, 1 .mov; files must"),
    "pretrain: val without train": ("--data_path onlyval", "onlyval has a folder val and none named train; add it"),
    "pretrain: output is a file":
        ("--output_dir image.png", "cannot write to image.png", "choose another --output_dir"),
    "finetune: no folder": ("--data_set folder --data_path ''", "--data_set folder needs --data_path DIR"),
    "finetune: folder without classes": ("--data_path images", "images has no train/<class>/ folders", "--holdout 0.2"),
    "finetune: no classes held out": ("--data_path images --holdout 0.4", "lies in no class folder, and labels"),
    "finetune: two validations":
        ("--holdout 0.4 --eval_data_path labelled/val", "--holdout contradicts --eval_data_path"),
    "finetune: images beside classes":
        ("--data_path stray", "stray/train/loose.png lies in no class folder", "<class>"),
    "finetune: train without val":
        ("--data_path onlytrain", "none named val", "--eval_data_path, or train with --holdout 0.2"),
    "finetune: class lacks in val":
        ("--data_path lacking", "lack the class b (1 in all); training and validation folders"),
    "finetune: class unknown in train": ("--data_path extra", "have an unknown class c (1 in all)"),
    "finetune: predict nothing there":
        ("--predict nowhere.jpg --resume tiny.pth", "--predict nowhere.jpg does not exist"),
    "analyze: no such image": ("reconstruct --checkpoint run --images nowhere.png", "nowhere.png"),
    "analyze: run without log": ("curves images", "no log.jsonl in images"),
    # --- images
    "pretrain: nothing readable":
        ("--data_path damaged", "none of 5 images tried can be read, such as damaged/dangling.png"),
    "finetune: predict nothing readable": ("--predict damaged --resume tiny.pth", "damaged"),
    # --- values
    "pretrain: ratio zero": ("--mask_ratio 0", "mask_ratio 0.0 hides no patch of 2 x 2"),
    "pretrain: ratio above one": ("--mask_ratio 1.5", "--mask_ratio: 1.5 is not in [0, 1]"),
    "pretrain: one patch":
        ("--input_size 8", "leaves no patch visible of 1 x 1; choose a ratio such as 0.6, larger images, or a smaller"),
    "pretrain: size off the grid":
        ("--input_size 50", "image size 50 is not a multiple of the patch size 8; try --input_size 48"),
    "pretrain: wide stem":
        ("--stem_stride 4", "image size 16 is not a multiple", "--input_size 64, or --stem_stride 1"),
    "pretrain: learning rate zero": ("--blr 0", "--blr: 0 is not in (0, inf]"),
    "finetune: magnitude": ("--aa rand-m11-n2", "--aa rand-m11-n2 has m (magnitude) 11", "both end at 10"),
    "finetune: no operation": ("--aa rand-n0", "n (operations) 0", "n begins at 1"),
    "finetune: augmentation misspelt": ("--aa rand-x9", "no automatic augmentation --aa rand-x9; choose rand-m9"),
    "finetune: nothing held out": ("--holdout 0.1", "--holdout 0.1 of 6 images is 0; hold out some, and not all"),
    "finetune: all held out": ("--holdout 1", "--holdout 1.0 of 6 images is 6; hold out some, and not all"),
    "finetune: labels": ("--labels_per_class 7", "--labels_per_class 7 is more than the 3 images of class a; lower it"),
    "finetune: classes": ("--nb_classes 1", "--nb_classes 1 is fewer than the data's 2 classes; leave it out"),
    "finetune: image below the patch": ("--stem_stride 4", "image size 16 x 16 is below the patch size 32; enlarge it"),
    "analyze: size off the grid":
        ("collapse --checkpoint run --input_size 20", "image size 20 is not a multiple of the patch size 8"),
    "analyze: nothing visible": ("reconstruct --checkpoint run --mask_ratio 0.9", "leaves no patch visible of 2 x 2"),
    # --- names, and flags that contradict each other
    "pretrain: flag misspelt": ("--epoch 3", "unrecognized arguments: --epoch 3"),
    "pretrain: switch": ("--norm_pix_loss maybe", "--norm_pix_loss maybe: expected true or false"),
    "pretrain: switch twice": ("--no-norm_pix_loss true", "--no-norm_pix_loss true: expected true or false"),
    "pretrain: two learning rates": ("--lr 1e-3 --blr 1e-3", "--blr: not allowed with argument --lr"),
    "pretrain: folder and drawn":
        ("--data_set embedded --data_path images", "--data_set embedded draws its images; leave out"),
    "pretrain: no CIFAR there":
        ("--data_set cifar10 --data_path images", "cifar10 is not in images and could not be downloaded (no network)"),
    "pretrain: norm misspelt": ("--mlp_norm gnr", "gnr"),
    "pretrain: norm of V1": ("--mlp_norm bn --model convnext_atto", "V1", "convnextv2_"),
    "pretrain: batch statistics twice": ("--mlp_norm bn --checkpoint_activations", "counts every image twice"),
    "finetune: evaluate without weights": ("--eval", "--eval needs --resume FILE"),
    "finetune: evaluate and predict":
        ("--eval --predict image.png --resume tiny.pth", "--predict: not allowed with argument --eval"),
    "finetune: scratch and weights": ("--scratch --finetune tiny.pth", "--scratch contradicts --finetune; leave one"),
    "finetune: recipe without that size":
        ("--recipe in22k", "--recipe in22k has no settings for size atto; it has nano"),
    "finetune: probe by a recipe": ("--linear_probe --recipe in1k", "--linear_probe contradicts --recipe"),
    # --- checkpoints
    "pretrain: resume nothing": ("--resume nowhere.pth", "nowhere.pth does not exist"),
    "pretrain: resume an encoder": ("--resume encoder.pth", "encoder.pth is no checkpoint of a run of pretrain.py"),
    "finetune: resume the other stage": ("--resume run/checkpoint-3.pth", "no checkpoint of a run of finetune.py"),
    "finetune: weights are a folder":
        ("--finetune images", "the folder images has no checkpoint-best.pth or encoder.pth", "name a file"),
    "finetune: weights are truncated": ("--finetune damaged/truncated.pth", "damaged/truncated.pth is damaged"),
    "finetune: weights hold code": ("--finetune code.pth", "code.pth is damaged, or no file of weights in plain types"),
    "finetune: weights are a list": ("--finetune list.pth", "list.pth holds a list, not a dictionary"),
    "finetune: weights of a detector":
        ("--finetune detector.pth", "no part of a ConvNeXt", "rpn_head", "give a classifier or encoder"),
    "finetune: weights of no known layout": ("--finetune resnet.pth", "conv1.weight, fc.weight"),
    "finetune: weights of another size":
        ("--finetune tiny.pth --model convnextv2_atto", "do not fit", "convnextv2_atto"),
    "finetune: weights of another stem":
        ("--finetune stride4.pth", "with --stem_stride 4, do not fit the model, convnextv2_atto with --stem_stride 1"),
    "finetune: evaluate other names":
        ("--eval --resume tuned.pth", "the validation images have an unknown class b (1 in all)"),
    "finetune: evaluate an encoder":
        ("--eval --resume encoder.pth --data_path labelled", "encoder.pth holds no classifier"),
    "finetune: evaluate fewer classes without names":
        ("--eval --resume ten.pth", "ten.pth has 10 outputs, and there are 2 names of classes; name the outputs",
         "--class_names"),
    "finetune: evaluate more classes":
        ("--eval --resume ten.pth --class_names eleven.txt", "10 outputs, and there are 11 names"),
    "finetune: names nowhere":
        ("--eval --resume ten.pth --class_names nowhere.txt", "cannot read the classes nowhere.txt"),
    "detect: no annotations": ("--data_path labelled", "labelled/annotations/instances_train2017.json"),
    "detect: evaluate a classifier": ("--eval --resume tuned.pth --data_path labelled", "tuned.pth holds no detector"),
    "segment: no label maps": ("--data_path labelled", "labelled/images/training"),
    "segment: evaluate a classifier":
        ("--eval --resume tuned.pth --data_path labelled", "tuned.pth is no checkpoint of segment.py; train one"),
    "analyze: no decoder": ("reconstruct --checkpoint encoder.pth", "encoder.pth holds no decoder"),
    "weights: nothing to read": ("nowhere.pth new.pth --to timm", "nowhere.pth does not exist"),
    "weights: incomplete": ("incomplete.pth new.pth --to timm", "norm.bias"),
    "weights: no average": ("tiny.pth new.pth --to timm --model_ema", "tiny.pth holds no averaged weights"),
    "weights: onto itself": ("tiny.pth ./tiny.pth --to timm", "OUT tiny.pth is IN itself"),
    # --- devices
    "pretrain: no such device": ("--device tpu9", "--device tpu9 cannot be used here", "try --device cpu"),
}  # fmt: skip


@pytest.fixture(scope="session")
def things(tmp_path_factory) -> Path:
    """Folders, images and checkpoints, good and bad."""
    root = tmp_path_factory.mktemp("things")
    folders = """images labelled/train/a labelled/train/b labelled/val/a labelled/val/b onlyval/val/a onlytrain/train/a
    stray/train/a lacking/train/a lacking/train/b lacking/val/a extra/train/a extra/val/a extra/val/c"""
    for folder in folders.split():
        for k, size in enumerate((16, 20, 16)):
            save_noise(root / folder / f"{k}.png", (size, size))
    save_noise(root / "image.png", (16, 16))
    save_noise(root / "stray/train/loose.png", (16, 16))
    for folder in ("empty", "other", "damaged"):
        (root / folder).mkdir(parents=True)
    os.mkfifo(root / "damaged/pipe.png")
    (root / "damaged/dangling.png").symlink_to(root / "nowhere.png")
    (root / "damaged/zero.jpg").write_bytes(b"")
    (root / "damaged/text.jpg").write_text("hello")
    (root / "damaged/truncated.png").write_bytes((root / "image.png").read_bytes()[:200])
    for name in ("a.heic", "b.HEIC", "c.mov", ".hidden", "Thumbs.db", "._a.jpg"):
        (root / "other" / name).write_text("no image")

    torch.manual_seed(0)
    config = vars(pretrain.get_args(BASE["pretrain"].replace("images", "labelled").split())) | dict(images=6)
    encoder = MODELS["convnextv2_yocto"](num_classes=0, stem_stride=1)
    tiny = ConvNeXt(**TINY, num_classes=2, stem_stride=1)
    state, mae = tiny.state_dict(), FCMAE(encoder, decoder_embed_dim=16).state_dict()
    (root / "run").mkdir()
    outer = {f"backbone.{key}": value for key, value in encoder.state_dict().items()}
    contents = {
        "run/checkpoint-3.pth": {"model": mae, "stage": "pretrain.py", "config": config},
        "encoder.pth": {"model": encoder.state_dict(), "config": config},
        "tiny.pth": {"model": state, "config": {"data_set": "somebody's", "input_size": [3, 16, 16]}},
        "tuned.pth": {"model": state, "stage": "finetune.py", "config": config, "classes": ["a", "x"]},
        "stride4.pth": ConvNeXt(**TINY, num_classes=2, stem_stride=4).state_dict(),
        "incomplete.pth": {key: value for key, value in state.items() if key != "norm.bias"},
        "detector.pth": outer | {"rpn_head.conv.weight": torch.ones(1)},
        "resnet.pth": {"conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)},
        "list.pth": [1, 2],
        "ten.pth": ConvNeXt(**TINY, num_classes=10, stem_stride=1).state_dict(),
        "code.pth": {"model": state, "code": Code()},
    }
    for name, content in contents.items():
        torch.save(content, root / name)
    (root / "eleven.txt").write_text("\n".join("abcdefghijk"))
    (root / "damaged/truncated.pth").write_bytes((root / "tiny.pth").read_bytes()[:5000])
    return root


@pytest.fixture
def place(things, monkeypatch) -> Path:
    """The folder `things`, as the working directory; nothing in it may change, and no download succeeds."""
    monkeypatch.chdir(things)

    def refuse(self):
        raise OSError("no network")

    def files():
        return {path: path.lstat().st_mtime_ns for path in things.rglob("*") if not path.is_dir()}

    monkeypatch.setattr(data.datasets.CIFAR10, "download", refuse)
    before = files()
    yield things
    assert files() == before


def command(script: str, row: str) -> list[str]:
    """The row's words, after flags that it needs and does not have itself: later ones win."""
    line, base = shlex.split(row), BASE.get(script, "")
    if script in ("analyze", "weights"):
        return line
    if {"--eval", "--predict"} & set(line):  # which take the network's flags from the checkpoint
        base = "--data_path labelled" if script == "finetune" else ""
    return [*f"--device cpu --output_dir new/out {base}".split(), *line]


@pytest.mark.parametrize("name", TABLE)
def test_wrong_input_is_one_line(name, place, capsys):
    script, (row, *words) = name.split(":")[0], TABLE[name]
    with pytest.raises(SystemExit) as exit:
        SCRIPTS[script].main(SCRIPTS[script].get_args(command(script, row)))
    line = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err.strip()
    assert exit.value.code == 2 or isinstance(exit.value.code, str)
    assert line.count("\n") == 0 and all(part in line for part in words), line


def numeric_flags():
    def stop(parser, *_):
        raise StopIteration(parser)

    for name in ("pretrain", "finetune", "detect", "segment"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration) as stopped:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            SCRIPTS[name].get_args([])
        for action in stopped.value.value._actions:
            if getattr(action.type, "__name__", "") in ("int", "float") and not action.choices:
                yield name, action.option_strings[0], (action.nargs if isinstance(action.nargs, int) else 1)


@pytest.mark.parametrize(("script", "flag", "count"), [*numeric_flags()])
def test_numeric_flags_refuse_what_is_no_number_of_theirs(script, flag, count, capsys):
    for value in ("nan", "-1", "inf", "many", ""):
        with pytest.raises(SystemExit) as exit:
            SCRIPTS[script].get_args([f"{flag}={value}"] if count == 1 else [flag, *[value] * count])
        error = capsys.readouterr().err
        assert exit.value.code == 2 and flag in error and error.count("\n") == 1, value
