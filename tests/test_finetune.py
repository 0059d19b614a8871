"""Claims about finetune.py."""

import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_equal, call_at, picture_folder, small
from helpers import run as run_script
from PIL import Image
from stress import fork, untimed, wait
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode

import data
import finetune
from data import (
    STATISTICS,
    Images,
    automatic_augmentation,
    draw_images,
    evaluation_transform,
    few_labels,
    training_transform,
)
from model import MODELS, ConvNeXt
from plumbing.files import load_file, save_tensors
from plumbing.log import RunLog, read_log
from plumbing.optim import averaged, layer_groups, layer_id
from plumbing.script import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Three classes: 12 training images and 7 validation images in class folders."""
    return picture_folder(tmp_path_factory.mktemp("shapes"), train=12, val=7)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A pre-trained encoder, as pretrain.py writes it."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    net = MODELS["convnextv2_atto"](num_classes=0, stem_stride=1)
    save_tensors(path, {"model": net.state_dict(), "config": {"input_size": 16, "data_set": "embedded"}})
    return path


run = partial(run_script, finetune)


# --- recipes, layers, optimiser

# The published table, column by column as it is printed: A F P N T B L H.
IN1K = """
blr 2e-4 2e-4 2e-4 2e-4 8e-4 6.25e-4 6.25e-4 1.25e-3
epochs 600 600 600 600 300 100 100 50
warmup_epochs 0 0 0 0 40 20 20 10
weight_decay .3 .05 .3 .3 .05 .05 .05 .05
layer_decay .9 .9 .9 .9 .9 .6 .6 .75
drop_path .1 0 0 .1 .2 .1 .2 .3
mixup 0 .3 .3 .5 .8 .8 .8 .8
cutmix 0 .3 .3 .5 1 1 1 1
smoothing .2 .2 .2 .2 .1 .1 .1 .1
"""
IN22K_TO_IN1K = """
layer_decay .9 .9 .8 .8 .85
drop_path .1 .1 .2 .3 .5
epochs 90 90 30 30 30
"""


@pytest.mark.parametrize(
    ("recipe", "sizes", "table"),
    [
        ("in1k", "atto femto pico nano tiny base large huge", IN1K),
        ("in22k_to_in1k", "nano tiny base large huge", IN22K_TO_IN1K),
        (
            "in22k",
            "nano tiny base large huge",
            "layer_decay .9 .9 .8 .8 .8\ndrop_path 0 0 .1 .1 .3\nblr 2.5e-4 2.5e-4 2.5e-4 2.5e-4 2.5e-4",
        ),
    ],
)
def test_recipes_equal_the_published_tables(recipe, sizes, table):
    for line in table.strip().splitlines():
        name, *values = line.split()
        for size, value in zip(sizes.split(), values):
            args = finetune.get_args(["--recipe", recipe, "--model", f"convnextv2_{size}", "--data_path", "x"])
            assert getattr(args, name) == float(value), (size, name)


def test_a_recipe_is_complete_and_flags_win():
    args = finetune.get_args(
        [
            "--recipe",
            "in1k",
            "--model",
            "convnextv2_base",
            "--data_path",
            "x",
            "--mixup",
            "0.1",
            "--epochs",
            "7",
            "--warmup_epochs",
            "1",
        ]
    )
    assert (args.mixup, args.epochs, args.cutmix, args.layer_decay_type, args.model_ema) == (0.1, 7, 1.0, "group", True)
    assert (args.reprob, args.aa, args.min_lr, args.model_ema_decay, args.opt_betas) == (
        0.25,
        "rand-m9-mstd0.5-inc1",
        1e-6,
        0.9999,
        (0.9, 0.999),
    )


def test_head_scale_follows_the_start():
    assert finetune.get_args(["--data_path", "x"]).head_init_scale == 1.0
    assert finetune.get_args(["--data_path", "x", "--head_init_scale", "0.5"]).head_init_scale == 0.5


# Written out by hand from the rule: id of downsample layer i, then of the blocks of stage i.
SINGLE = {
    "atto": ([1, 3, 5, 11], [[1, 2], [3, 4], [5, 6, 7, 8, 9, 10], [11, 12]], 13),
    "tiny": ([1, 4, 7, 16], [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18]], 19),
    "base": ([1, 4, 7, 34], [[1, 2, 3], [4, 5, 6], list(range(7, 34)), [34, 35, 36]], 37),
}
GROUP = ([0, 2, 3, 12], [[1] * 3, [2] * 3, [3 + j // 3 for j in range(27)], [12] * 3], 13)


@pytest.mark.parametrize(("size", "kind"), [("atto", "single"), ("tiny", "single"), ("base", "single"), ("base", "group")])
def test_layer_ids_and_learning_rates_equal_the_written_tables(size, kind):
    downsample, blocks, last = GROUP if kind == "group" else SINGLE[size]
    with torch.device("meta"):
        net = MODELS[f"convnextv2_{size}"]()
    expected = {}
    for name, _ in net.named_parameters():
        part, i, j, *_ = [*name.split("."), 0, 0]
        expected[name] = downsample[int(i)] if part == "downsample_layers" else blocks[int(i)][int(j)] if part == "stages" else last
        assert layer_id(name, net.depths, kind) == expected[name], name
    names = {id(p): name for name, p in net.named_parameters()}
    seen = set()
    for group in layer_groups(net, 0.05, 0.9, kind):
        for p in group["params"]:
            name = names[id(p)]
            seen.add(name)
            assert group["lr_scale"] == pytest.approx(0.9 ** (last - expected[name]))
            assert group["weight_decay"] == (0.05 if p.ndim > 1 and "grn" not in name else 0.0)
    assert seen == set(expected)


def test_the_moving_average_equals_a_loop():
    net = ConvNeXt((1, 1, 1, 1), (4, 4, 4, 4), num_classes=2)
    ema = averaged(net, decay=0.3)
    generator, expected = torch.Generator().manual_seed(0), None
    for t in range(6):
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        weight = net.head.weight.detach().clone()
        decay = min(0.3, (1 + t) / (10 + t))
        expected = weight if t == 0 else decay * expected + (1 - decay) * weight
        ema.update_parameters(net)
    torch.testing.assert_close(ema.module.head.weight, expected)


@pytest.mark.parametrize(("mixup", "cutmix", "prob"), [(0.8, 0, 1), (0, 1, 1), (0.8, 1, 1), (0.8, 1, 0.5)])
def test_mixed_targets_sum_to_one_and_match_the_pixels(mixup, cutmix, prob):
    args = finetune.get_args(["--data_path", "x", "--mixup", str(mixup), "--cutmix", str(cutmix), "--mixup_prob", str(prob)])
    mix = data.mixing(args, classes=4)
    labels = torch.arange(4)
    imgs = torch.eye(4)[:, :, None, None].expand(4, 4, 16, 16).contiguous()  # channel c is the share of image c
    mixed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = mix(imgs, labels)
        if y.ndim == 1:
            continue
        mixed += 1
        torch.testing.assert_close(y.sum(dim=1), torch.ones(4))
        torch.testing.assert_close(x.mean(dim=(2, 3)), y, atol=1e-5, rtol=0)
    assert mixed == 20 if prob == 1 else 0 < mixed < 20


def test_no_mixing_without_alphas():
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    mixed = data.mixing(finetune.get_args(["--data_path", "x"]), 4)(*batch)
    assert all(torch.equal(a, b) for a, b in zip(mixed, batch))


# --- data


def test_few_labels_are_balanced_seeded_and_nested():
    images = Images(np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1), [k % 3 for k in range(60)], ["a", "b", "c"], None, None)

    def chosen(n, seed):
        subset = few_labels(images, n, seed)
        assert [subset.labels.count(k) for k in range(3)] == [n] * 3
        assert [int(item.item()) % 3 for item in subset.items] == subset.labels
        return {int(item.item()) for item in subset.items}

    assert chosen(4, 0) == chosen(4, 0) < chosen(9, 0)
    assert chosen(4, 1) != chosen(4, 0)
    with pytest.raises(UserError, match="--labels_per_class 21 is more than the 20"):
        few_labels(images, 21, 0)


@pytest.mark.parametrize("aa", [None, "rand-m9-mstd0.5-inc1", "rand-m5-n1", "original", "trivial"])
def test_training_augmentation_makes_bytes_of_the_right_size(aa):
    statistics = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    for size in (32, 40):
        for remode in ("pixel", "rand", "const"):
            transform = training_transform(size, statistics, aa=aa, color_jitter=0.4, reprob=1.0, remode=remode, recount=2)
            x = transform(Image.fromarray(np.full((50, 60, 3), 7, dtype=np.uint8)))
            assert x.shape == (3, size, size) and x.dtype == torch.uint8
            assert (x != x[:, :1, :1]).any()


def test_evaluation_crops_below_384_and_warps_from_there_on():
    picture = np.zeros((256, 512, 3), dtype=np.uint8)
    picture[:, :64] = 255  # seen only when the whole image is warped
    small, large = (evaluation_transform(size)(Image.fromarray(picture)) for size in (224, 384))
    assert small.shape == (3, 224, 224) and not small.any() and large.shape == (3, 384, 384) and large[:, :, :40].all()
    assert not evaluation_transform(224, crop_pct=1.0)(Image.fromarray(picture)).any()  # no wider than high, whatever the share
    assert evaluation_transform(32)(Image.fromarray(picture))[:, :, :3].all()  # as training at that size


@pytest.mark.parametrize(("size", "crop_pct"), [(224, None), (224, 1.0), (224, 0.95), (96, None), (48, 1.0)])
def test_evaluation_keeps_the_aspect_below_384_as_the_authors_code_does(size, crop_pct):
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(300, 451, 3), dtype=np.uint8))
    short = int(size / (crop_pct or 224 / 256))
    resized = picture.resize((int(short * 451 / 300), short), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((short - size) / 2)
    expected = np.asarray(resized.crop((left, top, left + size, top + size)))
    assert np.array_equal(evaluation_transform(size, crop_pct)(picture).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "original", "trivial"])
def test_automatic_augmentation_fills_with_the_mean_colour_and_resamples_as_crops_are(name):
    """A picture of the mean colour has one colour whatever moves it; stripes of two colours, nearest, stay of two."""
    mean = STATISTICS["folder"][0]
    flat = Image.new("RGB", (24, 24), tuple(round(255 * value) for value in mean))
    stripes = Image.fromarray(np.repeat((np.arange(24) % 2 * 255).astype(np.uint8)[None, :, None], 24, 0).repeat(3, 2))
    differ = 0
    for seed in range(60):
        found = []
        for mode, picture in (("bicubic", flat), ("bicubic", stripes), ("nearest", stripes)):
            torch.manual_seed(seed)
            transform = automatic_augmentation(name, mean, InterpolationMode(mode))
            found.append(np.asarray(transform(picture)).reshape(-1, 3))
        assert len(np.unique(found[0], axis=0)) == 1
        differ += not np.array_equal(found[1], found[2])
    assert differ > 5


def test_randaugment_leaves_as_many_images_alone_as_timms():
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 200, size=(24, 24, 3), dtype=np.uint8))
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    name, mean = "rand-m9-n2-mstd0-inc1", STATISTICS["folder"][0]  # timm fails where a deviation posterises to no bits at all
    theirs = auto_augment.rand_augment_transform(name, dict(translate_const=10, img_mean=(124, 116, 104)))
    ours = automatic_augmentation(name, mean, InterpolationMode.BICUBIC)
    share = {each: sum(each(picture) == picture for _ in range(400)) / 400 for each in (ours, theirs)}
    assert share[theirs] == pytest.approx(0.25, abs=0.06) and share[ours] == pytest.approx(share[theirs], abs=0.1)


# --- training


def test_a_resumed_run_equals_an_uninterrupted_one(shapes, tmp_path, monkeypatch):
    more = dict(update_freq=2, mixup=0.8, cutmix=1.0, drop_path=0.3, model_ema="true", aa="rand-m9")
    whole = run(shapes, tmp_path / "whole", epochs=3, **more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at(patch, RunLog, "report", 5)
        run(shapes, tmp_path / "parts", epochs=3, **more)
    parts = run(shapes, tmp_path / "parts", epochs=3, **more)
    for name in ("model", "model_ema"):
        assert_equal(parts[name], whole[name])
    assert untimed(read_log(tmp_path / "parts")) == untimed(read_log(tmp_path / "whole"))


def test_data_held_on_the_device_train_as_loaded_ones(tmp_path, monkeypatch):
    pictures, labels = draw_images(50, seed=0, size=32)
    monkeypatch.setattr(
        finetune, "load_images", lambda *args: Images(pictures, labels, tuple("abcdefghij"), None, STATISTICS["embedded"])
    )
    losses = {}
    for hold in (True, False):
        output_dir = tmp_path / str(hold)
        run("any", output_dir, hold_data=hold, labels_per_class=1, data_set="cifar10", disable_eval=True)
        losses[hold] = [record["loss"] for record in read_log(output_dir)]
    assert losses[True] == pytest.approx(losses[False], rel=5e-3) and losses[True] != losses[False]


def test_outputs_evaluation_and_prediction(shapes, tmp_path, capsys, drawn):
    state = run(shapes, tmp_path, epochs=2, model_ema="true")
    names = {".lock", "checkpoint-1.pth", "checkpoint-2.pth", "checkpoint-best.pth", "log.jsonl", "config.json", "accuracy.png"}
    names |= {"classes.csv", "confusion.csv", "confusion.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert min(Image.open(tmp_path / "accuracy.png").size) > 300
    assert state["classes"] == ["dots", "rings", "stripes"] and state["config"]["nb_classes"] == 3
    last = [record for record in read_log(tmp_path) if "val_top1" in record][-1]

    finetune.main(finetune.get_args(["--eval", "--resume", str(tmp_path / "checkpoint-2.pth"), "--data_path", str(shapes)]))
    out = capsys.readouterr().out
    for name, key in (("model", "val"), ("model_ema", "val_ema")):
        top1, top5, loss = map(
            float, re.search(rf"^{name}: top-1 ([\d.]+)%, top-5 ([\d.]+)%, loss ([\d.]+) on 7 images", out, re.M).groups()
        )
        assert (top1, loss) == pytest.approx((last[f"{key}_top1"], last[f"{key}_loss"]), abs=0.006) and top5 == 100

    picture = next((shapes / "val/stripes").iterdir())
    finetune.main(
        finetune.get_args(["--predict", str(picture), str(shapes / "val/rings"), "--resume", str(tmp_path / "checkpoint-best.pth")])
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert len(lines) == 3 and lines[0].startswith(f"{picture}: ")
    shares = [float(share) for share in re.findall(r"(?:stripes|rings|dots) ([\d.]+)%", lines[0])]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)


def test_pretrained_weights_are_loaded_and_named(shapes, encoder, tmp_path, capsys):
    args = finetune.get_args(["--data_path", str(shapes), "--finetune", str(encoder)])
    assert (args.model, args.stem_stride, args.input_size, args.head_init_scale) == ("convnextv2_atto", 1, 16, 0.001)
    state = run(shapes, tmp_path, finetune=encoder, epochs=1, lr=1e-12, min_lr=0)
    before = load_file(encoder)["model"]
    for key, value in before.items():
        torch.testing.assert_close(state["model"][key], value, rtol=0, atol=1e-6)
    assert str(encoder) in capsys.readouterr().out


def test_a_head_of_matching_shape_is_kept(shapes, tmp_path):
    first = run(shapes, tmp_path / "first", epochs=1)
    second = run(shapes, tmp_path / "second", epochs=1, lr=1e-12, min_lr=0, finetune=tmp_path / "first/checkpoint-1.pth")
    torch.testing.assert_close(second["model"]["head.weight"], first["model"]["head.weight"], rtol=0, atol=1e-6)


def test_a_linear_probe_is_moco_v3s_and_flags_win():
    """Its released main_lincls.py: SGD at 0.1 per 256 images for 90 epochs, a cosine to zero, crops and flips alone."""
    theirs = dict(opt="sgd", blr=0.1, momentum=0.9, weight_decay=0, epochs=90, warmup_epochs=0, min_lr=0, min_crop=0.08)
    none = dict(aa=None, color_jitter=None, reprob=0, mixup=0, cutmix=0, smoothing=0, drop_path=0, clip_grad=None, model_ema=False)
    line = ["--linear_probe", "--data_path", "x"]
    args = vars(finetune.get_args(line))
    assert {name: args[name] for name in theirs | none} == theirs | none
    args = vars(finetune.get_args([*line, "--opt", "adamw", "--smoothing", "0.2", "--epochs", "5", "--aa", "trivial"]))
    assert (args["opt"], args["smoothing"], args["epochs"], args["aa"], args["blr"]) == ("adamw", 0.2, 5, "trivial", 0.1)
    assert finetune.get_args(["--linear_probe", "--scratch"]).epochs == 3  # the embedded data stay a matter of minutes


def test_a_linear_probe_trains_the_head_alone(shapes, encoder, tmp_path):
    state = run(shapes, tmp_path, finetune=encoder, linear_probe="true", epochs=2, lr=1e-2)
    before = load_file(encoder)["model"]
    assert all(torch.equal(state["model"][key], value) for key, value in before.items())
    assert len(state["optimizer"]["state"]) == 2


def test_two_processes_train_and_evaluate_as_one_with_twice_the_batch(shapes, tmp_path):
    """Of the 7 images to evaluate on one process gets 4 and the other 3."""
    args = finetune.get_args(small(finetune, shapes, tmp_path / "two", batch_size=2))
    wait(fork(lambda: finetune.main(args), tmp_path, 2))
    one, two = run(shapes, tmp_path / "one", batch_size=4)["model"], load_file(tmp_path / "two/checkpoint-2.pth")["model"]
    assert_equal(two, one, rtol=1e-4, atol=2e-5)
    for a, b in zip(*(untimed(read_log(tmp_path / name)) for name in ("two", "one")), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_v1_trains_all_of_its_weights_by_sgd(shapes, tmp_path):
    state = run(shapes, tmp_path, model="convnext_atto", opt="sgd", epochs=1)
    moments = state["optimizer"]["state"].values()
    assert len(moments) == len(state["model"]) and all(found["momentum_buffer"].any() for found in moments)


@pytest.mark.parametrize("opt", ["adam", "adamw"])
def test_half_precision_trains_as_float32_does(shapes, tmp_path, opt):
    for amp in (True, False):
        run(shapes, tmp_path / str(amp), use_amp=amp, epochs=1, opt=opt)
    half, full = ([record["loss"] for record in read_log(tmp_path / name) if "loss" in record] for name in ("True", "False"))
    assert half == pytest.approx(full, rel=0.03) and half != full


def test_scratch_leaves_encoders_of_earlier_runs_alone(encoder, monkeypatch):
    monkeypatch.setattr(finetune, "OURS", str(encoder))
    args, scratch = finetune.get_args([]), finetune.get_args(["--scratch"])
    assert (args.finetune, scratch.finetune) == (str(encoder), None)
    assert (args.layer_decay, args.head_init_scale) == (scratch.layer_decay, scratch.head_init_scale) == (1.0, 1.0)
    assert finetune.get_args(["--data_path", "x"]).finetune is None  # only the embedded data go on from the embedded data


def test_the_authors_documented_flags_run(shapes, encoder, tmp_path):
    words = f"""--model convnextv2_atto --batch_size 4 --update_freq 2 --blr 6.25e-4 --epochs 1 --warmup_epochs 0 --layer_decay_type single
        --layer_decay 0.6 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --model_ema True
        --model_ema_eval True --use_amp True --finetune {encoder} --data_path {shapes} --output_dir {tmp_path} --data_set image_folder
        --nb_classes 3 --auto_resume true --dist_eval true --num_workers 0 --input_size 16 --stem_stride 1""".split()
    finetune.main(finetune.get_args(words))
    assert "val_ema_top1" in read_log(tmp_path)[-1]
