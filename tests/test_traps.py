"""Claims about mistakes that once gave a wrong result without a word."""

import re

import pytest
import torch
from helpers import call_at, picture_folder, randomised, run

import data
import finetune
import pretrain
from data import center_transform
from fast import gelu_grn_linear
from fcmae import FCMAE, reconstruction_panels
from model import GRN, MODELS, ConvNeXt
from plumbing.checkpoints import find_checkpoints
from plumbing.files import load_file
from plumbing.log import read_log
from plumbing.script import UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes, 12 pictures to train with and 6 to validate with."""
    return picture_folder(tmp_path_factory.mktemp("pictures"), train=12, val=6)


@pytest.mark.parametrize("opt", ["sgd", "adamw", "adam"])
def test_a_skipped_first_update_leaves_the_weights_sound(pictures, tmp_path, monkeypatch, opt):
    good, calls = data.normalise, []

    def spoiled(*args):
        calls.append(0)
        return good(*args) * (float("nan") if len(calls) == 1 else 1)

    monkeypatch.setattr(data, "normalise", spoiled)
    state = run(finetune, pictures, tmp_path, opt=opt, epochs=1, warmup_epochs=0, disable_eval=True)
    assert max(value.abs().max().item() for value in state["model"].values()) < 10


def test_backends_of_one_function_may_be_exchanged_and_the_leaky_one_not(pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at(patch, data, "normalise", 5)  # in the second epoch
        run(pretrain, pictures, tmp_path)
    with pytest.raises(UserError, match=r"--backend sparse \(now leaky\)"):
        run(pretrain, pictures, tmp_path, backend="leaky")
    run(pretrain, pictures, tmp_path, backend="masked")


def test_a_loss_scale_belongs_to_float16_alone(pictures, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at(patch, data, "normalise", 5)
        run(pretrain, pictures, tmp_path, amp="none")
    assert load_file(find_checkpoints(tmp_path)[-1])["scaler"]["scale"] == 1
    assert run(pretrain, pictures, tmp_path, amp="fp16")["scaler"]["scale"] > 1000


@pytest.mark.parametrize("sites", [4, 12])  # GRN on the activations, and folded into the weight
def test_a_nearly_dead_channel_does_not_overflow_float16(sites):
    torch.manual_seed(0)
    grn, linear = randomised(GRN(6)), torch.nn.Linear(6, 4)
    h = torch.randn(1, 1, sites, 6)
    h[..., 0] = 6e-6 * torch.randn(sites)  # its norm is near 1e-5, the gradient of the norm far beyond 65504
    gradients = []
    for dtype in (torch.float16, torch.float64):
        leaf = h.to(dtype).requires_grad_()
        layers = [torch.nn.GELU(), GRN(6).to(torch.float64), torch.nn.Linear(6, 4).to(torch.float64)]
        layers[1].load_state_dict(grn.state_dict())
        layers[2].load_state_dict(linear.state_dict())
        y = gelu_grn_linear(torch.nn.GELU(), grn, linear, leaf) if dtype == torch.float16 else torch.nn.Sequential(*layers)(leaf)
        (1000 * y.double().sum()).backward()
        gradients.append(leaf.grad.double())
    assert gradients[0].isfinite().all()
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def test_a_head_for_as_many_classes_of_other_names_starts_anew(pictures, tmp_path, capsys):
    first = run(finetune, pictures, tmp_path / "first", epochs=1)
    others = picture_folder(tmp_path / "others", classes=("waves", "grid", "rays"), train=12, val=6)
    flags = dict(epochs=1, lr=1e-12, min_lr=0, finetune=tmp_path / "first/checkpoint-1.pth")
    again, other = (run(finetune, folder, tmp_path / folder.name, **flags) for folder in (pictures, others))
    assert torch.allclose(again["model"]["head.weight"], first["model"]["head.weight"], atol=1e-6)
    assert not torch.allclose(other["model"]["head.weight"], first["model"]["head.weight"], atol=1e-3)
    assert "at their initial values: head.weight, head.bias" in capsys.readouterr().out


# --- what images are prepared as


def test_evaluation_and_prediction_take_data_and_preparation_from_the_checkpoint(pictures, tmp_path, capsys):
    state = run(finetune, pictures, tmp_path, input_size=40, epochs=1)
    checkpoint = ["--resume", str(tmp_path / "checkpoint-1.pth"), "--device", "cpu"]
    finetune.main(finetune.get_args(["--eval", *checkpoint]))
    assert f"on 6 images of {pictures}, at 40 px (the centre of a short side of 45)" in capsys.readouterr().out
    path = next((pictures / "val").rglob("*.png"))
    finetune.main(finetune.get_args(["--predict", str(path), *checkpoint]))
    printed = capsys.readouterr().out.splitlines()[1]

    net = MODELS["convnextv2_atto"](num_classes=3, stem_stride=1).eval()
    net.load_state_dict(state["model"])
    pixels = center_transform(40, 45)(data.open_rgb(path))  # 40 / (224 / 256) = 45.7
    imagenets = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        best, k = net(((pixels / 255 - imagenets[0]) / imagenets[1])[None]).softmax(dim=1).max(dim=1)
    assert f"{path}: {state['classes'][k]} {best.item():.1%}" in printed


def test_weights_that_do_not_say_their_data_are_evaluated_on_named_data_only(tmp_path, capsys):
    torch.save(ConvNeXt((1, 1, 1, 1), (8, 8, 8, 8), num_classes=10).state_dict(), tmp_path / "foreign.pth")
    with pytest.raises(SystemExit):
        finetune.get_args(["--eval", "--resume", str(tmp_path / "foreign.pth")])
    assert "does not say what it was trained on; give --data_path DIR" in capsys.readouterr().err
    args = finetune.get_args(["--predict", "x.jpg", "--resume", str(tmp_path / "foreign.pth")])
    assert (args.input_size, args.crop_pct, args.data_set) == (224, None, "folder")


def test_fine_tuning_starts_from_what_was_pre_trained_on_the_same_folder(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finetune.get_args(["--data_path", str(pictures)]).model == pretrain.get_args(["--data_path", "x"]).model
    run(pretrain, pictures, tmp_path / "runs/pretrain", epochs=1)
    args = finetune.get_args(["--data_path", str(pictures)])
    assert (args.finetune, args.input_size, args.stem_stride) == (finetune.OURS, 32, 1)
    assert finetune.get_args(["--data_path", str(pictures), "--scratch"]).finetune is None
    assert finetune.get_args(["--data_path", str(tmp_path)]).finetune is None and finetune.get_args([]).finetune is None


def test_what_macos_leaves_beside_files_is_no_image(tmp_path):
    picture_folder(tmp_path, train=3)
    (tmp_path / "train/rings/._000.png").write_bytes(b"no image")
    assert len(data.list_images(tmp_path)) == 3


def test_predictions_are_shown_where_patches_are_hidden_only():
    torch.manual_seed(0)
    mae = FCMAE(ConvNeXt((1, 1, 1, 1), (8, 8, 8, 8), num_classes=0, stem_stride=1), decoder_embed_dim=8)
    imgs = torch.randn(2, 3, 32, 32)
    panels = reconstruction_panels(mae, imgs, torch.Generator().manual_seed(0))
    visible = panels["visible"] != 0
    assert not panels["prediction"][visible].any() and panels["prediction"][~visible].all()


@pytest.mark.parametrize("mistyped", ["--epoch", "--batchsize", "--data-path", "--mask-ratio"])
def test_a_mistyped_flag_is_met_with_the_nearest(mistyped, capsys):
    with pytest.raises(SystemExit):
        pretrain.get_args([mistyped, "5"])
    meant = {"--epoch": "--epochs", "--batchsize": "--batch_size"}.get(mistyped, mistyped[:2] + mistyped[2:].replace("-", "_"))
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_a_run_that_would_take_days_on_a_cpu_says_so_after_four_updates_and_once(pictures, tmp_path, monkeypatch, capsys):
    run(pretrain, pictures, tmp_path / "short", epochs=3)
    assert "days" not in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at(patch, data, "normalise", 8)
        run(pretrain, pictures, tmp_path / "long", epochs=10**9, save_ckpt="false")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and re.fullmatch(
        r"warning: at this speed the run takes \d+ days more; lower --epochs .*", warnings[0]
    )
    days, seconds = int(re.search(r"\d+", warnings[0])[0]), read_log(tmp_path / "long")[-1]["seconds"]
    assert 0 < days < seconds * 3e9 / 86400  # three updates an epoch, each of less than what all took


@pytest.mark.parametrize(("flags", "warned"), [(dict(lr=None), True), (dict(lr=None, blr=1e-2), False), (dict(lr=1e-6), False)])
def test_a_learning_rate_that_the_batch_makes_hopeless_is_told(pictures, tmp_path, capsys, flags, warned):
    run(pretrain, pictures, tmp_path, epochs=1, **flags)
    line = "warning: the learning rate 2.3e-06 = --blr 0.00015 x 4 images per update / 256 teaches very slowly; raise --blr"
    assert (line in capsys.readouterr().err) == warned


@pytest.mark.parametrize("classes", [("rings",), ("rings", "dots")])
def test_a_single_class_is_nothing_to_learn(tmp_path, capsys, classes):
    run(finetune, picture_folder(tmp_path / "pictures", classes, train=4, val=2), tmp_path / "out", epochs=1)
    assert ("warning: all images are of one class, rings" in capsys.readouterr().err) == (len(classes) == 1)
