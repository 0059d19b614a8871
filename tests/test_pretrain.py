"""Claims about pretrain.py, by running it."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_equal, call_at, picture_folder, small
from helpers import run as run_script
from PIL import Image
from stress import difference, untimed

import data
import pretrain
from data import STATISTICS, Images, draw_images
from model import MODELS
from plumbing.files import find_checkpoints, load_file
from plumbing.log import read_log
from plumbing.script import UserError


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder of 12 images."""
    return picture_folder(tmp_path_factory.mktemp("images"), size=48, train=12)


run = partial(run_script, pretrain)


def test_a_run_writes_what_the_readme_says(photographs, tmp_path, capsys, drawn):
    state = run(photographs, tmp_path, epochs=4, save_ckpt_num=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock", "checkpoint-3.pth", "checkpoint-4.pth", "encoder.pth", "log.jsonl", "config.json", "loss.png", "reconstructions.png",
    }  # fmt: skip
    encoder = MODELS["convnextv2_atto"](num_classes=0, stem_stride=1)
    encoder.load_state_dict(load_file(tmp_path / "encoder.pth")["model"], strict=True)
    assert state["config"]["model"] == "convnextv2_atto" and "torch" in state["versions"]
    records = read_log(tmp_path)
    assert [record["update"] for record in records] == list(range(1, 13)) and records[-1]["epoch"] == 4
    assert 0.8 < records[0]["loss"] < 1.2
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mask_ratio"] == 0.6 and config["seed"] == 0
    assert "encoder.pth" in capsys.readouterr().out
    for name in ("loss.png", "reconstructions.png"):
        assert min(Image.open(tmp_path / name).size) > 300


def test_the_loss_falls_below_that_of_predicting_the_mean(photographs, tmp_path):
    run(
        photographs,
        tmp_path,
        epochs=40,
        batch_size=6,
        lr=2e-3,
        warmup_epochs=4,
        decoder_embed_dim=64,
        save_ckpt_freq=40,
        log_every=20,
    )
    losses = [record["loss"] for record in read_log(tmp_path)[-10:]]
    assert sum(losses) / len(losses) < 0.93  # the mean of each normalised patch, 0, has a loss of 1


def test_a_resumed_run_equals_an_uninterrupted_one(photographs, tmp_path, monkeypatch):
    whole = run(photographs, tmp_path / "whole", epochs=3, update_freq=2)

    with monkeypatch.context() as patch:  # stop once the second epoch has begun, when its log lines are written
        call_at(patch, data, "normalise", 7)
        with pytest.raises(KeyboardInterrupt):
            run(photographs, tmp_path / "parts", epochs=3, update_freq=2)
    parts = run(photographs, tmp_path / "parts", epochs=3, update_freq=2)

    assert_equal(parts["model"], whole["model"])
    for key, moments in whole["optimizer"]["state"].items():
        assert_equal(parts["optimizer"]["state"][key], moments)
    assert untimed(read_log(tmp_path / "parts")) == untimed(read_log(tmp_path / "whole"))


def test_a_named_checkpoint_is_continued_in_another_directory(photographs, tmp_path):
    whole = run(photographs, tmp_path / "whole", epochs=3)
    more = dict(epochs=3, resume=tmp_path / "whole/checkpoint-1.pth")
    parts = run(photographs, tmp_path / "parts", **more)
    assert not (tmp_path / "parts/checkpoint-1.pth").exists()
    assert_equal(parts["model"], whole["model"])
    assert untimed(read_log(tmp_path / "parts")) == untimed(read_log(tmp_path / "whole"))


def test_a_finished_run_stays_as_it_is(photographs, tmp_path, capsys):
    run(photographs, tmp_path, epochs=1)
    before = (tmp_path / "log.jsonl").read_text(), (tmp_path / "encoder.pth").read_bytes()
    run(photographs, tmp_path, epochs=1)
    assert before == ((tmp_path / "log.jsonl").read_text(), (tmp_path / "encoder.pth").read_bytes())
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("freq", [2, 5])
def test_accumulated_batches_give_the_update_of_one_large_batch(photographs, tmp_path, freq):
    """12 images: two updates of 2 x 3; and with freq 5 one incomplete group of four 3-image batches."""
    large = 6 if freq == 2 else 12
    a = run(photographs, tmp_path / "a", batch_size=3, update_freq=freq)
    b = run(photographs, tmp_path / "b", batch_size=large)
    assert_equal(a["model"], b["model"], rtol=1e-4, atol=2e-5)


def test_backends_train_alike(photographs, tmp_path):
    states = {
        backend: run(photographs, tmp_path / backend, backend=backend)["model"] for backend in ("sparse", "reference", "masked")
    }
    assert_equal(states["sparse"], states["masked"], rtol=1e-3, atol=1e-4)
    assert_equal(states["reference"], states["masked"], rtol=1e-3, atol=1e-4)


def test_data_held_on_the_device_train_as_loaded_ones(tmp_path, monkeypatch):
    pictures = draw_images(12, seed=0, size=48)[0]
    monkeypatch.setattr(
        pretrain,
        "load_images",
        lambda _, __, split, transform, seed=0, count=None: Images(pictures, None, None, transform, STATISTICS["embedded"], seed),
    )
    loaded = run("any", tmp_path / "loaded")
    held, again = (run("any", tmp_path / f"held{workers}", hold_data=True, num_workers=workers) for workers in (0, 1))
    assert_equal(again["model"], held["model"])
    assert held["config"]["hold_data"] and not loaded["config"]["hold_data"]
    losses = [[record["loss"] for record in read_log(tmp_path / name)] for name in ("held0", "loaded")]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3) and losses[0] != losses[1]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_as_float32_does_and_resumes_exactly(photographs, tmp_path, monkeypatch, amp):
    more = dict(amp=amp, clip_grad=1.0, save_every_steps=1, input_size=16)  # where it is emulated, it takes its time
    whole = run(photographs, tmp_path / "whole", **more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at(patch, data, "normalise", 5)
        run(photographs, tmp_path / "parts", **more)
    assert find_checkpoints(tmp_path / "parts")[-1].name == "checkpoint-1-1.pth"
    parts = run(photographs, tmp_path / "parts", **more)
    assert all(difference(parts[name], whole[name]) is None for name in ("model", "optimizer", "scaler"))
    assert untimed(read_log(tmp_path / "parts")) == untimed(read_log(tmp_path / "whole"))
    float32 = run(photographs, tmp_path / "float32", clip_grad=1.0, input_size=16)
    losses = [[record["loss"] for record in read_log(tmp_path / name)] for name in ("whole", "float32")]
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and difference(whole["model"], float32["model"])


def test_v1_trains_all_of_its_weights(photographs, tmp_path):
    more = dict(model="convnext_atto", norm_pix_loss=False, epochs=1, warmup_epochs=0, lr=1e-2)
    torch.manual_seed(0)
    start = pretrain.make_autoencoder(pretrain.get_args(small(pretrain, photographs, tmp_path, **more))).state_dict()
    state = run(photographs, tmp_path, **more)["model"]
    assert state.keys() == start.keys() and not any("encoder" in name and "grn" in name for name in state)
    assert [name for name in start if torch.equal(start[name], state[name])] == []


def test_clipping_bounds_the_update(photographs, tmp_path):
    """With a norm bound far below the gradient's, AdamW's first moment after one update is 0.1 x the bound."""
    state = run(photographs, tmp_path, clip_grad=1e-3, batch_size=12, epochs=1)
    norm = torch.cat([moments["exp_avg"].flatten() for moments in state["optimizer"]["state"].values()]).norm()
    assert norm.item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_a_non_finite_loss_skips_the_update_and_ten_in_a_row_stop_the_run(photographs, tmp_path, monkeypatch, capsys):
    good, calls = data.normalise, []

    def spoiled(pixels, *args):
        calls.append(0)
        x = good(pixels, *args)
        return x * float("nan") if len(calls) in bad and len(pixels) == 4 else x

    monkeypatch.setattr(data, "normalise", spoiled)
    bad = {2}
    run(photographs, tmp_path / "one", epochs=1)
    records = read_log(tmp_path / "one")
    assert [record["skipped_updates"] for record in records] == [0, 1, 0] and records[1]["loss"] is None
    assert "1 update" in capsys.readouterr().err

    calls.clear()
    bad = set(range(5, 100))  # the second epoch onwards; its pictures have 8 images
    with pytest.raises(UserError, match="10 updates in a row.*checkpoint-"):
        run(photographs, tmp_path / "many", epochs=8)
    assert all(value.isfinite().all() for value in load_file(find_checkpoints(tmp_path / "many")[-1])["model"].values())


def test_unreadable_files_are_counted_in_the_log_and_too_many_stop_the_run(photographs, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(150):
        (folder / f"{i:03}.png").write_bytes(next(photographs.rglob("*.png")).read_bytes())
    (folder / "000.png").write_text("not an image")
    run(folder, tmp_path / "a", epochs=1, batch_size=50)
    assert read_log(tmp_path / "a")[-1]["unreadable_images"] == 1
    for i in range(1, 11):
        (folder / f"{i:03}.png").write_text("neither is this")
    with pytest.raises(UserError, match="11 of 150 images cannot be read"):
        run(folder, tmp_path / "b", epochs=1, batch_size=50)


@pytest.mark.parametrize(
    ("more", "updates"), [(dict(batch_size=100), 2), (dict(batch_size=1, epochs=1), 12), (dict(num_workers=2), 6)]
)
def test_batches_of_all_images_or_of_one_and_loading_processes_simply_work(photographs, tmp_path, more, updates):
    run(photographs, tmp_path, **more)
    last = read_log(tmp_path)[-1]
    assert last["update"] == updates and last["loss"] == pytest.approx(1, abs=0.2)


def test_one_image_is_enough(photographs, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/one.png").write_bytes(next(photographs.rglob("*.png")).read_bytes())
    run(tmp_path / "images", tmp_path / "out")
    assert [record["loss"] for record in read_log(tmp_path / "out")] == pytest.approx([1, 1], abs=0.2)


def test_defaults_follow_the_data_and_flags_win():
    folder = pretrain.get_args(["--data_path", "x"])
    assert (folder.data_set, folder.input_size, folder.stem_stride, folder.blr, folder.epochs, folder.warmup_epochs) == (
        "folder",
        224,
        4,
        1.5e-4,
        800,
        40,
    )
    assert (folder.weight_decay, folder.mask_ratio, folder.decoder_depth, folder.decoder_embed_dim, folder.norm_pix_loss) == (
        0.05,
        0.6,
        1,
        512,
        True,
    )
    cifar = pretrain.get_args(["--data_set", "cifar10", "--epochs", "3"])
    assert (cifar.input_size, cifar.stem_stride, cifar.epochs) == (32, 1, 3)
    assert pretrain.get_args([]).data_set == "embedded"


def test_the_authors_command_is_understood():
    args = pretrain.get_args(
        [
            "--model",
            "convnextv2_base",
            "--batch_size",
            "64",
            "--update_freq",
            "8",
            "--blr",
            "1.5e-4",
            "--epochs",
            "1600",
            "--warmup_epochs",
            "40",
            "--data_path",
            "/path/to/imagenet-1k",
            "--output_dir",
            "/path/to/save_results",
        ]
    )
    assert (args.model, args.input_size, args.update_freq, args.epochs) == ("convnextv2_base", 224, 8, 1600)


def test_a_checkpoint_of_another_run_is_refused_with_the_differences(photographs, tmp_path):
    run(photographs, tmp_path, epochs=1)
    with pytest.raises(UserError, match=r"--mask_ratio 0.6 \(now 0.5\), --weight_decay 0.05 \(now 0.1\)"):
        run(photographs, tmp_path, epochs=2, mask_ratio=0.5, weight_decay=0.1)
    with pytest.raises(UserError, match="not a checkpoint-<epoch>.pth of pretrain.py"):
        run(photographs, tmp_path / "other", epochs=1, resume=tmp_path / "encoder.pth")


def test_a_new_run_never_mixes_with_an_old_one(photographs, tmp_path):
    run(photographs, tmp_path, epochs=1)
    with pytest.raises(UserError, match="already holds a run"):
        run(photographs, tmp_path, epochs=1, auto_resume="false")
