"""Claims about the training scripts' loops: each computes what a plain loop of a few lines computes, update by update.

The plain loops share with the scripts the networks, the files of the images, MixUp and CutMix, the learning rates'
formula and the seeds that `mix_seed` documents. All else is their own: no `Run` and no loader, ordinary optimisers,
groups by hand, the masked dense encoder as an oracle. Layers' rates are in detection's and segmentation's plain loops.
"""

import copy
from pathlib import Path

import pytest
import torch
from helpers import image_folder, read_log, run
from PIL import Image
from torchvision.transforms import v2

import finetune
import pretrain
from fcmae import FCMAE, random_mask
from model import MODELS
from plumbing.loading import mix_seed
from plumbing.optim import learning_rate

SEED, EPOCHS, WARMUP, PEAK, MIN_LR = 5, 2, 0.75, 4e-3, 1e-4
# Seven images in passes of two, of which two are an update: an epoch has an update of 4 images and one of 2.
FLAGS = dict(seed=SEED, epochs=EPOCHS, warmup_epochs=WARMUP, lr=None, blr=PEAK * 256 / 4, min_lr=MIN_LR)
FLAGS |= dict(batch_size=2, update_freq=2, input_size=16)
UPDATES = [(epoch, places) for epoch in range(EPOCHS) for places in ([0, 1, 2, 3], [4, 5])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven images of three classes, larger than the network's input; and three to evaluate."""
    return image_folder(tmp_path_factory.mktemp("images"), train=7, val=3, size=24)


def load(folder: Path, epoch: int, places: list[int], *crop: v2.Transform) -> tuple[torch.Tensor, torch.Tensor]:
    """The images in these places of an epoch's order, cropped and flipped, (N, 3, 16, 16), and their labels (N,)."""
    paths = sorted((folder / "train").rglob("*.png"))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(mix_seed("order", SEED, epoch)))
    transform = v2.Compose([*crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    images, labels = [], []
    for index in order[places].tolist():
        torch.manual_seed(mix_seed("crop", SEED, epoch, index))
        images.append((transform(Image.open(paths[index])) / 255 - mean) / std)
        labels.append(["dots", "rings", "stripes"].index(paths[index].parent.name))
    return torch.stack(images), torch.tensor(labels)


def groups_of(net: torch.nn.Module) -> list[dict]:
    """Optimiser groups of one parameter each; matrices and kernels decay."""
    decays = {name: p.ndim > 1 and "grn" not in name and name != "mask_token" for name, p in net.named_parameters()}
    return [dict(params=[p], weight_decay=0.3 if decays[name] else 0.0) for name, p in net.named_parameters()]


def update_weights(optimizer: torch.optim.Optimizer, update: int, clip_grad: float, loss: float) -> dict:
    """Clip, step and clear; what the log has of the update."""
    norm = torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_grad)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(update / 2, PEAK, MIN_LR, WARMUP, EPOCHS)
    optimizer.step()
    optimizer.zero_grad()
    return dict(update=update + 1, lr=group["lr"], loss=loss, grad_norm=norm.item())


def assert_same_run(directory: Path, state: dict, start: dict, expected: dict[str, dict], log: list[dict]) -> None:
    """Every tensor has moved from `start` to the same place, but for a thousandth of its way and float32's rounding."""
    for kind, weights in expected.items():
        assert state[kind].keys() == weights.keys() == start.keys()
        for name, value in weights.items():
            way, error = (value - start[name]).norm(), (state[kind][name] - value).norm()
            assert way > 0 and error < 1e-3 * way + 1e-7 * value.norm(), (kind, name)
    records = [record for record in read_log(directory) if "lr" in record]
    for record, line in zip(records, log, strict=True):
        assert {name: record[name] for name in line} == pytest.approx(line, rel=1e-4)


def pretrain_plainly(folder: Path, norm_pix_loss: bool) -> tuple[dict, dict[str, dict], list[dict]]:
    """The weights before, and after, as in a checkpoint, and the log."""
    torch.manual_seed(SEED)
    encoder = MODELS["convnextv2_atto"](num_classes=0, stem_stride=1)
    mae = FCMAE(encoder, decoder_embed_dim=16, norm_pix_loss=norm_pix_loss, backend="masked")
    start, log = copy.deepcopy(mae.state_dict()), []
    optimizer = torch.optim.AdamW(groups_of(mae), betas=(0.9, 0.95))
    crop = v2.RandomResizedCrop(16, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    for update, (epoch, places) in enumerate(UPDATES):
        imgs, _ = load(folder, epoch, places, crop)  # one batch, as every image has equally many hidden patches
        mask = random_mask(len(imgs), 2, 2, 0.6, torch.Generator().manual_seed(mix_seed("mask", SEED, update)))
        loss, _, _ = mae(imgs, mask)
        loss.backward()
        log.append(update_weights(optimizer, update, 0.05, loss.item()))
    return start, {"model": mae.state_dict()}, log


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pretraining_equals_a_plain_loop(folder, tmp_path, norm_pix_loss):
    start, expected, log = pretrain_plainly(folder, norm_pix_loss)
    state = run(pretrain, folder, tmp_path, norm_pix_loss=norm_pix_loss, weight_decay=0.3, clip_grad=0.05, **FLAGS)
    assert_same_run(tmp_path, state, start, expected, log)
    assert log[0]["grad_norm"] > 0.05  # or else nothing is clipped


TUNING = dict(weight_decay=0.3, opt_betas=(0.8, 0.9), opt_eps=1e-6, clip_grad=20)
TUNING |= dict(model_ema=True, model_ema_decay=0.15, drop_path=0.4, smoothing=0.2)
TUNING |= dict(mixup=0.8, cutmix=1.0, mixup_prob=0.8, mixup_switch_prob=0.4)


def finetune_plainly(folder: Path) -> tuple[dict, dict[str, dict], list[dict]]:
    """The weights before, and after, with their moving average, as in a checkpoint, and the log."""
    torch.manual_seed(SEED)
    net = MODELS["convnextv2_atto"](num_classes=3, stem_stride=1, drop_path_rate=0.4)
    start, log, average = copy.deepcopy(net.state_dict()), [], {}
    optimizer = torch.optim.AdamW(groups_of(net), betas=(0.8, 0.9), eps=1e-6)
    mixing = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=3), v2.CutMix(alpha=1.0, num_classes=3)], p=[0.6, 0.4])
    crop = v2.Resize((16, 16), interpolation=v2.InterpolationMode.BICUBIC), v2.RandomCrop(16, padding=4)
    for update, (epoch, places) in enumerate(UPDATES):
        passes, total = [places[i : i + 2] for i in range(0, len(places), 2)], 0.0
        for chosen in passes:
            imgs, labels = load(folder, epoch, chosen, *crop)
            torch.manual_seed(mix_seed("step", SEED, epoch, chosen[0] // 2, 0))
            targets = torch.eye(3)[labels]  # (N, 3)
            if torch.rand(1) < 0.8:
                imgs, targets = mixing(imgs, labels)
            targets = 0.8 * targets + 0.2 / 3
            loss = -(targets * net(imgs).log_softmax(dim=1)).sum(dim=1).mean() / len(passes)
            loss.backward()
            total += loss.item()
        log.append(update_weights(optimizer, update, 20, total))
        decay = min(0.15, (1 + update) / (10 + update)) if update else 0.0
        average = {name: decay * average.get(name, 0) + (1 - decay) * value for name, value in net.state_dict().items()}
    return start, {"model": net.state_dict(), "model_ema": average}, log


def test_fine_tuning_equals_a_plain_loop(folder, tmp_path):
    start, expected, log = finetune_plainly(folder)
    state = run(finetune, folder, tmp_path, **TUNING, **FLAGS)
    assert_same_run(tmp_path, state, start, expected, log)
    norms = [line["grad_norm"] for line in log]
    assert min(norms) < 20 < max(norms), norms  # some are clipped
