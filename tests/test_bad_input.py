"""Claims about wrong input: one line that names the value and the fix, status 1 or 2, and nothing left behind.

A row of `TABLE` is a command line, run in the folder `things`, and what its line must have, parts divided by " ... ".
"""

import argparse
import importlib
import os
import shlex
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import TINY, Code, save_noise

import data
import pretrain
from fcmae import FCMAE
from model import MODELS, ConvNeXt

RUN = "--device cpu --output_dir new/out"
SMALL = f"{RUN} --input_size 16 --stem_stride 1 --epochs 2 --num_workers 0"
BASE = {"detect": RUN, "segment": RUN, "analyze": "", "weights": ""}  # what rows need not say; later flags win
BASE["pretrain"] = f"{SMALL} --data_path images --model convnextv2_yocto --decoder_embed_dim 16"
BASE["finetune"] = f"{SMALL} --data_path labelled --model convnextv2_atto"

TABLE = {
    # --- paths and folders
    "pretrain --data_path nowhere": "nowhere does not exist; give a folder",
    "pretrain --data_path image.png": "image.png is not a directory; give a folder",
    "pretrain --data_path other": "no images under other, but 2 .heic, 1 .mov; files must end in ... to JPEG",
    "pretrain --data_path onlyval": "onlyval has a folder val and none named train; add it",
    "pretrain --output_dir image.png": "cannot write to image.png ... choose another --output_dir",
    "finetune --data_set folder --data_path ''": "--data_set folder needs --data_path DIR",
    "finetune --data_path '' --eval_data_path labelled/val": "alone has no images to train on; give --data_path",
    "finetune --data_path '' --eval --resume stride4.pth": "--data_set folder needs --data_path DIR",
    "finetune --data_path images": "images has no train/<class>/ folders ... --holdout 0.2",
    "finetune --data_path images --holdout 0.4": "lies in no class folder, and labels",
    "finetune --holdout 0.4 --eval_data_path labelled/val": "--holdout contradicts --eval_data_path",
    "finetune --data_path stray": "stray/train/loose.png lies in no class folder ... <class>",
    "finetune --data_path onlytrain": "none named val ... --eval_data_path, or train with --holdout 0.2",
    "finetune --data_path lacking": "lack the class b (1 in all); training and validation folders",
    "finetune --data_path extra": "have an unknown class c (1 in all)",
    "finetune --predict nowhere.jpg --resume tiny.pth": "--predict nowhere.jpg does not exist",
    "analyze reconstruct --checkpoint run --images nowhere.png": "nowhere.png",
    "analyze curves images": "no log.jsonl in images",
    "pretrain --data_path damaged": "none of 5 images tried can be read, such as damaged/dangling.png",
    "finetune --predict damaged --resume tiny.pth": "damaged",
    # --- values
    "pretrain --mask_ratio 0": "mask_ratio 0.0 hides no patch of 2 x 2",
    "pretrain --input_size 8": "leaves no patch visible of 1 x 1; choose a ratio such as 0.6, larger images, or a",
    "pretrain --stem_stride 4": "image size 16 is not a multiple ... --input_size 64, or --stem_stride 1",
    "pretrain --blr 0": "--blr: 0 is not in (0, inf]",
    "finetune --aa rand-m11-n2": "--aa rand-m11-n2 has m (magnitude) 11 ... both end at 10",
    "finetune --aa rand-n0": "n (operations) 0 ... n begins at 1",
    "finetune --aa rand-x9": "no automatic augmentation --aa rand-x9; choose rand-m9",
    "finetune --holdout 0.1": "--holdout 0.1 of 6 images is 0; hold out some, and not all",
    "finetune --holdout 1": "--holdout 1.0 of 6 images is 6; hold out some, and not all",
    "finetune --labels_per_class 7": "--labels_per_class 7 is more than the 3 images of class a; lower it",
    "finetune --nb_classes 1": "--nb_classes 1 is fewer than the data's 2 classes; leave it out",
    "finetune --stem_stride 4": "image size 16 x 16 is below the patch size 32; enlarge it",
    "analyze collapse --checkpoint run --input_size 50": "50 is not a multiple of ... 8; try --input_size 48",
    "analyze reconstruct --checkpoint run --mask_ratio 0.9": "leaves no patch visible of 2 x 2",
    "analyze collapse --checkpoint run --label A B": "2 --label for 1",
    "analyze collapse --checkpoint run --num_images 7": "--num_images 7, but folder (val) has 6",
    "analyze collapse --checkpoint grey.pth": "1 channels",
    "analyze activations --checkpoint run --layer stages.9.0": "no layer 'stages.9.0'",
    "analyze activations --checkpoint run --layer grn": "not a single layer",
    "analyze reconstruct --checkpoint run --mask_ratios 0.5,1.5": "1.5 is not in [0, 1]",
    "analyze grn --checkpoint v1.pth": "no GRN",
    "analyze selectivity --checkpoint run --data_path lacking": "selectivity compares classes",
    "analyze probe --checkpoint run --data_path labelled/val": "has no val",
    "analyze probe --checkpoint run --data_path lacking": "lack the class",
    # --- names, and flags that contradict each other
    "pretrain --epoch 3": "unrecognized arguments: --epoch 3",
    "pretrain --norm_pix_loss maybe": "--norm_pix_loss maybe: expected true or false",
    "pretrain --no-norm_pix_loss true": "--no-norm_pix_loss true: expected true or false",
    "pretrain --lr 1e-3 --blr 1e-3": "--blr: not allowed with argument --lr",
    "pretrain --data_set embedded --data_path images": "--data_set embedded draws its images; leave out",
    "pretrain --data_set cifar10 --data_path nowhere": "cifar10 is not in nowhere and could not be downloaded (no net",
    "pretrain --mlp_norm gnr": "gnr",
    "pretrain --mlp_norm bn --model convnext_atto": "V1 ... convnextv2_",
    "pretrain --mlp_norm bn --checkpoint_activations": "counts every image twice",
    "finetune --eval": "--eval needs --resume FILE",
    "finetune --eval --predict image.png --resume tiny.pth": "--predict: not allowed with argument --eval",
    "finetune --scratch --finetune tiny.pth": "--scratch contradicts --finetune; leave one",
    "finetune --recipe in22k": "--recipe in22k has no settings for size atto; it has nano",
    "finetune --linear_probe --recipe in1k": "--linear_probe contradicts --recipe",
    # --- checkpoints
    "pretrain --resume nowhere.pth": "nowhere.pth does not exist",
    "pretrain --resume encoder.pth": "encoder.pth is no checkpoint of a run of pretrain.py",
    "finetune --resume run/checkpoint-3.pth": "no checkpoint of a run of finetune.py",
    "finetune --finetune images": "the folder images has no checkpoint-best.pth or encoder.pth ... name a file",
    "finetune --finetune damaged/truncated.pth": "damaged/truncated.pth is damaged",
    "finetune --finetune code.pth": "code.pth is damaged, or no file of weights in plain types",
    "finetune --finetune list.pth": "list.pth holds a list, not a dictionary",
    "finetune --finetune detector.pth": "no part of a ConvNeXt ... rpn_head ... give a classifier or encoder",
    "finetune --finetune stride4.pth": "--stem_stride 4, do not fit the model, convnextv2_atto with --stem_stride 1",
    "finetune --eval --resume tuned.pth": "the validation images have an unknown class b (1 in all)",
    "finetune --eval --resume encoder.pth --data_path labelled": "encoder.pth holds no classifier",
    "finetune --eval --resume ten.pth": "ten.pth has 10 outputs, and there are 2 names of classes; ... --class_names",
    "finetune --eval --resume ten.pth --class_names eleven.txt": "10 outputs, and there are 11 names",
    "finetune --eval --resume ten.pth --class_names nowhere.txt": "cannot read the classes nowhere.txt",
    "detect --data_path labelled": "labelled/annotations/instances_train2017.json",
    "detect --eval --resume tuned.pth": "tuned.pth holds no detector",
    "segment --eval --resume tuned.pth": "tuned.pth is no checkpoint of segment.py; train one",
    "analyze reconstruct --checkpoint encoder.pth": "encoder.pth holds no decoder",
    "weights incomplete.pth new.pth --to timm": "norm.bias",
    "weights tiny.pth new.pth --to timm --model_ema": "tiny.pth holds no averaged weights",
    "weights tiny.pth ./tiny.pth --to timm": "OUT tiny.pth is IN itself",
    "pretrain --device tpu9": "--device tpu9 cannot be used here ... try --device cpu",
}


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
    for folder in ("other", "damaged", "run"):
        (root / folder).mkdir()
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
    contents = {
        "run/checkpoint-3.pth": {"model": mae, "stage": "pretrain.py", "optimizer": {}, "config": config},
        "encoder.pth": {"model": encoder.state_dict(), "config": config},
        "tiny.pth": {"model": state, "config": {"data_set": "somebody's", "input_size": [3, 16, 16]}},
        "tuned.pth": {"model": state, "stage": "finetune.py", "config": config, "classes": ["a", "x"]},
        "stride4.pth": ConvNeXt(**TINY, num_classes=2, stem_stride=4).state_dict(),
        "incomplete.pth": {key: value for key, value in state.items() if key != "norm.bias"},
        "detector.pth": state | {"rpn_head.weight": torch.ones(1)},
        "list.pth": [1, 2],
        "grey.pth": ConvNeXt(**TINY, num_classes=0, in_chans=1).state_dict(),
        "v1.pth": ConvNeXt(**TINY, num_classes=0, version=1, stem_stride=1).state_dict(),
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

    def files():
        return {path: path.lstat().st_mtime_ns for path in things.rglob("*") if not path.is_dir()}

    monkeypatch.chdir(things)
    monkeypatch.setattr(data.datasets.CIFAR10, "download", Mock(side_effect=OSError("no network")))
    before = files()
    yield things
    assert files() == before


@pytest.mark.parametrize("row", TABLE)
def test_wrong_input_is_one_line(row, place, capsys):
    name, *line = shlex.split(row)
    known = {"--eval", "--predict"} & {*line}  # which take the network's flags from the checkpoint
    script, base = importlib.import_module(name), f"{RUN} --data_path labelled" if known else BASE[name]
    with pytest.raises(SystemExit) as exit:
        script.main(script.get_args([*base.split(), *line]))
    printed = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err.strip()
    assert exit.value.code in (2, printed) and "\n" not in printed
    assert all(part in printed for part in TABLE[row].split(" ... ")), printed


@pytest.mark.parametrize("script", ["pretrain", "finetune", "detect", "segment"])
def test_numeric_flags_refuse_what_is_no_number_of_theirs(script, monkeypatch, capsys):
    get_args = importlib.import_module(script).get_args
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, *_: sys.exit(parser))
        get_args([])
    for action in stopped.value.code._actions:
        numeric = getattr(action.type, "__name__", "") in ("int", "float") and not action.choices
        for value in ("nan", "-1", "inf", "many", "") if numeric else ():
            with pytest.raises(SystemExit, match="2"):
                get_args([action.option_strings[0], value, value])  # of two, the first is refused already
            error = capsys.readouterr().err
            assert action.option_strings[0] in error and error.count("\n") == 1, value
