"""Claims about every flag of the training scripts: it does what its row says, and no flag lacks a row.

A row runs its script with the flag and without, on a network of a few thousand weights, and compares the outputs.
"""

from functools import cache, partial

import pytest
import stress
import torch
from helpers import read_log, words

import detect
import finetune
import model
import pretrain
import segment
from model import MODELS, ConvNeXt
from plumbing.files import save_tensors
from plumbing.run import Run

COMMON = dict(data_path="images", stem_stride=1, batch_size=4, epochs=2, lr=1e-2, num_workers=0, log_every=1)
COMMON |= dict(save_ckpt=False)
LABELLED = COMMON | dict(input_size=32, warmup_updates=1, eval_freq=2)
HEADS = dict(fpn_dim=8, box_dim=8, mask_dim=8, regions=8, proposals=(20, 5), anchor_scale=4)
HEADS |= dict(group_norm=False, schedule="steps")
BASE = {
    pretrain: COMMON | dict(input_size=16, warmup_epochs=1, decoder_embed_dim=8, eval_freq=2),
    finetune: COMMON | dict(input_size=16, warmup_epochs=1, model="convnextv2_atto", aa="none", reprob=0, eval_freq=2),
    detect: LABELLED | HEADS | dict(test_size=(32, 32), val_limit=1),
    segment: LABELLED | dict(test_size=32, channels=8, aux_channels=8),
}
MIXED = dict(mixup=0.8, cutmix=1.0)

# flag: value and the other flags that it needs, if any. Several rows in a list.

TRAINING = {  # other weights, in both scripts
    "model": "convnext_atto", "stem_stride": (2, dict(input_size=32)), "mlp_norm": "none", "data_path": "others",
    "layer_scale_init_value": (1.0, dict(model="convnext_atto")), "input_size": 24,
    "batch_size": 6, "update_freq": 2, "epochs": 3, "warmup_epochs": 0.5, "blr": (1.0, dict(lr=None)), "lr": 1e-3,
    "min_lr": 5e-3, "weight_decay": 0.5, "clip_grad": 1e-3, "amp": "bf16", "seed": 1,
}  # fmt: skip
WEIGHTS = {
    pretrain: TRAINING | {
        "init_weight": "encoder.pth", "mask_ratio": 0.3, "norm_pix_loss": False, "decoder": "unet", "decoder_depth": 2,
        "decoder_embed_dim": 12, "backend": "leaky", "holdout": 0.4,
    },
    finetune: TRAINING | {
        "finetune": "encoder.pth", "linear_probe": True, "recipe": "in1k", "nb_classes": 5, "drop_path": 0.5,
        "head_init_scale": 0.1, "holdout": 0.4, "labels_per_class": 2, "min_crop": (0.9, dict(input_size=40)),
        "aa": "trivial", "color_jitter": 0.5, "train_interpolation": "bilinear", "reprob": 1,
        "remode": ("rand", dict(reprob=1)), "recount": (3, dict(reprob=1)), "mixup": 0.8, "cutmix": 1.0,
        "mixup_prob": (0.1, MIXED), "mixup_switch_prob": [(0, MIXED), (1, MIXED)], "smoothing": 0.3,
        "layer_decay": 0.5, "layer_decay_type": ("group", dict(model="convnextv2_base", layer_decay=0.5, mixup=0)),
        "opt": ["adam", "sgd"], "opt_eps": 1e-2, "opt_betas": [(0.5, 0.999), (0.9, 0.9)],
        "momentum": (0.5, dict(opt="sgd")), "model_ema": True, "model_ema_decay": (0.01, dict(model_ema=True)),
        "use_amp": True,
    },
}  # fmt: skip

COSINE = dict(schedule="cosine")
TRANSFER = """model data_path batch_size update_freq epochs blr lr weight_decay clip_grad amp seed opt opt_eps opt_betas
    momentum model_ema model_ema_decay use_amp layer_decay drop_path finetune"""
TRANSFERRED = {flag: WEIGHTS[finetune][flag] for flag in TRANSFER.split()}
TRANSFERRED |= {"stem_stride": 2, "input_size": 40, "warmup_updates": 3, "holdout": 0.4}
WEIGHTS[detect] = TRANSFERRED | {
    "fpn_dim": 4, "box_dim": 4, "mask_dim": 4, "anchor_scale": 8, "masks": False, "group_norm": True, "regions": 4,
    "proposals": (5, 5), "published_heads": True, "recipe": ("coco", dict(model="convnextv2_base")),
    "train_annotations": "others/annotations/instances_train2017.json", "train_images": "others/train2017",
    "augmentation": "none", "jitter": (1, 1.01), "color_jitter": 0.5, "schedule": "cosine", "min_lr": (5e-3, COSINE),
    "steps": (0.5, 1),
}  # fmt: skip
WEIGHTS[segment] = TRANSFERRED | {
    "channels": 4, "aux_channels": 4, "min_lr": 5e-3, "power": 3.0, "iterations": 4, "class_balance": 0.5,
    "recipe": ("ade20k", dict(model="convnextv2_base", iterations=6)), "test_size": 40, "scale": (1, 1.01),
    "layer_decay_type": ("single", dict(layer_decay=0.5)), "most": 0.4, "photometric": False, "nb_classes": 20,
    "classes": "names.txt", "reduce_zero_label": True,
}  # fmt: skip

AVERAGE = {"model_ema_eval": (False, dict(model_ema=True))}
EVALUATION = {"log_every": 2, "eval_freq": 1, "disable_eval": True}
LOG = {  # the same weights, another log
    pretrain: EVALUATION,
    finetune: EVALUATION | AVERAGE | {"eval_data_path": "others/val", "crop_pct": 0.5, "best_by": "balanced"},
    detect: EVALUATION | AVERAGE,
    segment: EVALUATION | AVERAGE | {
        "val_split": "training", "test_scales": (0.5, 1), "flip": True, "window": 16, "stride": (4, dict(window=16)),
    },
}  # fmt: skip

SAVING = dict(save_ckpt=True)
SAVES = SAVING | {flag: (k, SAVING) for flag, k in dict(save_ckpt_freq=2, save_every_steps=1, save_ckpt_num=1).items()}
FILES = dict.fromkeys(BASE, SAVES)  # the same weights and log, other files

MEMORY = {script: {"checkpoint_activations": True} for script in BASE}  # the same, every block computed twice
SPEED = {"num_workers": 1, "deterministic": True, "device": "cpu"}
# The same weights, log and files, bit for bit.
NOTHING = {pretrain: SPEED, finetune: SPEED | {"dist_eval": False}, detect: SPEED, segment: SPEED}

# Flags whose effect two short runs in one process cannot show, though tests elsewhere do; and what is no flag.
ELSEWHERE = """embedded_images output_dir log_dir resume compile scratch data_set nms test_size val_limit val_images
    val_annotations score_threshold eval predict topk class_names class_balance image_max mlp_norm recipe statistics"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Make `train(script, **flags)` -> weights, log, files; it runs among what the rows name, and equal runs once."""
    root = tmp_path_factory.mktemp("flags")
    stress.images_in(root / "images")
    stress.images_in(root / "others", seed=5, size=36)
    (root / "names.txt").write_text("\n".join(f"class {k}" for k in range(15)))
    small = {name: partial(ConvNeXt, (1, 1, 1, 1), (8, 8, 16, 16), version=2 - ("v2" not in name)) for name in MODELS}
    small["convnextv2_base"] = partial(ConvNeXt, (3, 3, 27, 3), (4, 4, 4, 4), version=2)
    torch.manual_seed(7)
    encoder = small["convnextv2_atto"](num_classes=0, stem_stride=1)
    save_tensors(root / "encoder.pth", {"model": encoder.state_dict(), "config": {"model": "convnextv2_atto"}})

    networks, recomputed, checkpoint = [], [], model.checkpoint

    @cache
    def train(script, flags) -> dict:
        directory = root / f"run{len(list(root.iterdir()))}"
        recomputed.clear()
        script.main(script.get_args(words(**BASE[script] | dict(flags), output_dir=directory)))
        torch.use_deterministic_algorithms(False)
        log, names = stress.untimed(read_log(directory)), sorted(path.name for path in directory.iterdir())
        weights = [net.state_dict() for net in networks.pop() if net]
        return {"weights": weights, "log": log, "files": names, "memory": len(recomputed)}

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(Run, "finish", lambda run, _: networks.append((run.net, run.ema)))
        patch.setattr(model, "checkpoint", lambda *args, **more: recomputed.append(0) or checkpoint(*args, **more))
        for name, network in small.items():
            patch.setitem(MODELS, name, network)
        yield lambda script, **flags: train(script, tuple(flags.items()))


def rows():
    for kind, tables in dict(weights=WEIGHTS, log=LOG, files=FILES, memory=MEMORY, nothing=NOTHING).items():
        for script, table in tables.items():
            for flag, values in table.items():
                for row in values if isinstance(values, list) else [values]:
                    value, base = row if isinstance(row, tuple) and isinstance(row[-1], dict) else (row, {})
                    yield pytest.param(script, flag, value, base, kind, id=f"{script.__name__}-{flag}-{value}")


@pytest.mark.parametrize(("script", "flag", "value", "base", "kind"), [*rows()])
def test_every_flag_does_what_its_row_says(train, script, flag, value, base, kind):
    before, after = train(script, **base), train(script, **base, **{flag: value})
    changes = [part for part in before if stress.difference(before[part], after[part]) is not None]
    assert [*changes, "nothing"][0] == kind


@pytest.mark.parametrize("script", [pretrain, finetune, detect, segment])
def test_every_flag_has_a_row(script):
    flags = set(vars(script.get_args(["--data_path", "images"])))
    listed = [flag for tables in (WEIGHTS, LOG, FILES, MEMORY, NOTHING) for flag in tables[script]]
    assert len(listed) == len(set(listed)) and flags >= set(listed)
    assert flags - set(listed) <= set(ELSEWHERE.split())
