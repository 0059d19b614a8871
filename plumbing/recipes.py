"""Recipes as flags: the paper's fine-tuning (Tab. 9-13), linear probing, detection and segmentation."""

import ast


def by_size(table: str) -> dict[str, dict]:
    """Read the flags of each size from a table: sizes in the first line, a flag's name first in every other."""
    sizes, *rows = (line.split() for line in table.strip().splitlines())
    return {size: {name: _value(values[k]) for name, *values in rows} for k, size in enumerate(sizes)}


def _value(word: str) -> bool | int | float | str:
    return word if word in ("single", "group") else ast.literal_eval(word)


# ImageNet-1K from FCMAE weights, Tab. 9-11. Where Tab. 11 prints a blr of 6.25e-3, the released commands have 6.25e-4.
IN1K = """
                   atto    femto   pico    nano    tiny    base     large    huge
blr                2e-4    2e-4    2e-4    2e-4    8e-4    6.25e-4  6.25e-4  1.25e-3
epochs             600     600     600     600     300     100      100      50
warmup_epochs      0       0       0       0       40      20       20       10
weight_decay       0.3     0.05    0.3     0.3     0.05    0.05     0.05     0.05
layer_decay        0.9     0.9     0.9     0.9     0.9     0.6      0.6      0.75
layer_decay_type   single  single  single  single  single  group    group    single
drop_path          0.1     0.0     0.0     0.1     0.2     0.1      0.2      0.3
mixup              0.0     0.3     0.3     0.5     0.8     0.8      0.8      0.8
cutmix             0.0     0.3     0.3     0.5     1.0     1.0      1.0      1.0
smoothing          0.2     0.2     0.2     0.2     0.1     0.1      0.1      0.1
model_ema          True    True    True    True    True    True     True     True
images_per_update  1024    1024    1024    1024    1024    1024     1024     1024
"""

# ImageNet-22K from FCMAE weights, Tab. 12.
IN22K = """
                   nano    tiny    base    large   huge
blr                2.5e-4  2.5e-4  2.5e-4  2.5e-4  2.5e-4
epochs             90      90      90      90      90
warmup_epochs      5       5       5       5       5
weight_decay       0.05    0.05    0.05    0.05    0.05
layer_decay        0.9     0.9     0.8     0.8     0.8
drop_path          0.0     0.0     0.1     0.1     0.3
mixup              0.8     0.8     0.8     0.8     0.8
cutmix             1.0     1.0     1.0     1.0     1.0
smoothing          0.1     0.1     0.1     0.1     0.1
model_ema          False   False   False   False   False
images_per_update  4096    4096    4096    4096    4096
"""

# ImageNet-1K after ImageNet-22K, Tab. 13.
IN22K_TO_IN1K = """
                   nano    tiny    base    large   huge
blr                2.5e-5  2.5e-5  2.5e-5  2.5e-5  2.5e-5
epochs             90      90      30      30      30
warmup_epochs      0       0       0       0       0
weight_decay       1e-8    1e-8    1e-8    1e-8    1e-8
layer_decay        0.9     0.9     0.8     0.8     0.85
drop_path          0.1     0.1     0.2     0.3     0.5
mixup              0.0     0.0     0.0     0.0     0.0
cutmix             0.0     0.0     0.0     0.0     0.0
smoothing          0.1     0.1     0.1     0.1     0.1
model_ema          True    True    True    True    False
images_per_update  512     512     512     512     512
"""

# A few hundred to a few thousand images, from pre-trained weights; docs/weights.md says what it was compared with.
FEW = dict(batch_size=16, blr=8e-3, epochs=30, head_init_scale=1.0, aa="none", reprob=0.0, eval_freq=5)
# name -> size -> flag -> value
SIZES = "yocto", "atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"
RECIPES = {
    "few": dict.fromkeys(SIZES, FEW),
    "in1k": by_size(IN1K),
    "in22k": by_size(IN22K),
    "in22k_to_in1k": by_size(IN22K_TO_IN1K),
}

# Linear probing as in MoCo v3's released code (arXiv 2104.02057): random crops and flips, and no regularisation.
LINEAR_PROBE = dict(
    opt="sgd", blr=0.1, min_lr=0.0, epochs=90, warmup_epochs=0.0, weight_decay=0.0, layer_decay=1.0, model_ema=False,
    aa=None, color_jitter=None, reprob=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0, drop_path=0.0,
)  # fmt: skip
# For drawn images, all of which are used: few updates need a higher learning rate.
SHORT_PROBE = dict(embedded_images=(4000, 1000), batch_size=32, epochs=3, blr=1.0, clip_grad=None)

# Mask R-CNN on COCO. Base is the published detector's. For Large and Huge the paper gives search ranges only (layer
# decay .9 or .95, drop path .2 to .5, App. A.3); the choice is ours.
COCO = by_size("""
                   base     large    huge
lr                 None     None     None
blr                8e-4     8e-4     8e-4
images_per_update  32       32       32
epochs             36       36       36
weight_decay       0.05     0.05     0.05
layer_decay        0.95     0.95     0.95
drop_path          0.4      0.5      0.5
warmup_updates     1000     1000     1000
published_heads    True     True     True
""")
for settings in COCO.values():
    settings |= dict(
        nms="soft", proposals=(1000, 1000), steps=[27, 33], schedule="steps", augmentation="jitter", jitter=(0.1, 2.0)
    )
    settings |= dict(input_size=1024, test_size=(800, 1333))

# UPerNet on ADE20K: 160,000 iterations of 16 images, from the fine-tuned classifier. The paper gives search ranges only
# (App. A.4: learning rate 1, 2 or 3e-4, layer decay .8 or .9, drop path .1 to .4); within them the choice is ours, near
# ConvNeXt V1's published code.
ADE20K = by_size("""
                   tiny     base     large    huge
lr                 None     None     None     None
blr                1.6e-3   1.6e-3   1.6e-3   1.6e-3
weight_decay       0.05     0.05     0.05     0.05
layer_decay        0.9      0.9      0.8      0.8
drop_path          0.2      0.3      0.4      0.4
input_size         512      512      512      512
images_per_update  16       16       16       16
""")
for settings in ADE20K.values():
    settings |= dict(iterations=160_000, warmup_updates=1500, power=1.0, scale=(0.5, 2.0), most=0.75, photometric=True)
    settings |= dict(reduce_zero_label=True, channels=512, aux_channels=256, batch_size=2, layer_decay_type="group")
