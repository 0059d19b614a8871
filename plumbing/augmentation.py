"""Augmentation for fine-tuning: the authors' settings (paper App. A.1) in torchvision's transforms."""

import argparse
import re

import torch
from torchvision.transforms import v2

from plumbing.files import UserError


def training_transform(
    size: int, statistics: tuple, min_crop: float = 0.08, interpolation: str = "bicubic", aa: str | None = None,
    color_jitter: float | None = None, reprob: float = 0.0, remode: str = "pixel", recount: int = 1,
) -> v2.Transform:  # fmt: skip
    """Make the augmentation for classification; the arguments are finetune.py's flags."""
    mode = v2.InterpolationMode(interpolation)
    if size <= 32:  # as the authors do: crops of so small an image would leave little
        steps = [v2.Resize((size, size), interpolation=mode), v2.RandomCrop(size, padding=4)]
    else:
        steps = [v2.RandomResizedCrop(size, scale=(min_crop, 1.0), interpolation=mode)]
    steps.append(v2.RandomHorizontalFlip())
    if aa:
        steps.append(automatic_augmentation(aa, statistics[0], mode))
    elif color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    steps.append(v2.PILToTensor())
    if reprob:
        steps.append(v2.RandomApply([EraseBytes(statistics, remode, recount)] * recount, p=reprob))
    return v2.Compose(steps)


def automatic_augmentation(name: str, mean: tuple, interpolation: v2.InterpolationMode) -> v2.Transform:
    """Translate timm's name of an automatic augmentation to torchvision's transform; UserError if there is none.

    "rand-m9-mstd0.5-inc1" is RandAugment: m is the magnitude out of 10 and n the number of operations (2), each
    applied with probability 0.5. timm also draws the magnitude around m with a std of mstd, which torchvision does not.
    As in timm, `interpolation` resamples the images, and uncovered borders get the colour `mean`.
    """
    options = dict(interpolation=interpolation, fill=[round(255 * value) for value in mean])
    if re.fullmatch(r"rand(-(m|n|mstd|inc)\d+(\.\d+)?)*", name):
        values = {key: float(value) for key, value in re.findall(r"-([a-z]+)([\d.]+)", name)}
        magnitude, count = values.get("m", 9), values.get("n", 2)
        if magnitude > 10 or not 1 <= count <= 10:
            problem = f"m (magnitude) {magnitude:g} and n (operations) {count:g}"
            raise UserError(f"--aa {name} has {problem}; both end at 10, and n begins at 1")
        # torchvision's magnitudes end at 30, timm's at 10
        operation = v2.RandAugment(num_ops=1, magnitude=round(3 * magnitude), num_magnitude_bins=31, **options)
        return v2.Compose([v2.RandomApply([operation], p=0.5)] * int(count))
    kinds = {"original": v2.AutoAugment, "v0": v2.AutoAugment, "trivial": v2.TrivialAugmentWide}
    if (kind := name.split("-")[0]) in kinds:
        return kinds[kind](**options)
    choices = "rand-m9-mstd0.5-inc1 (any m and n), original, trivial or none"
    raise UserError(f"no automatic augmentation --aa {name}; choose {choices}")


class EraseBytes(v2.RandomErasing):
    """torchvision's RandomErasing on images that are still bytes; fill values are drawn on the normalised scale."""

    def __init__(self, statistics: tuple, mode: str, count: int):
        # timm divides the erased area among `count` rectangles.
        super().__init__(p=1.0, scale=(0.02 / count, 1 / 3 / count), value=0 if mode == "const" else "random")
        self.mode, (self.mean, self.std) = mode, (torch.tensor(values).view(3, 1, 1) for values in statistics)

    def make_params(self, flat_inputs: list) -> dict:
        """Draw torchvision's parameters, with the fill values converted to bytes."""
        params = super().make_params(flat_inputs)
        if params["v"] is not None:
            v = params["v"].float()
            if self.mode == "rand":  # one colour for the whole rectangle
                v = torch.randn(3, 1, 1)
            params["v"] = ((v * self.std + self.mean) * 255).clamp(0, 255).to(torch.uint8)
        return params


def mixing(args: argparse.Namespace, classes: int) -> v2.Transform:
    """Make MixUp and CutMix: images (N, 3, S, S), labels (N,) -> mixed images and, if mixed, fractions (N, classes)."""
    kinds = [(v2.MixUp, args.mixup, 1 - args.mixup_switch_prob), (v2.CutMix, args.cutmix, args.mixup_switch_prob)]
    kinds = [(kind(alpha=alpha, num_classes=classes), chance) for kind, alpha, chance in kinds if alpha > 0]
    if not kinds:
        return v2.Identity()
    transforms, chances = zip(*kinds)
    either = transforms[0] if len(kinds) == 1 else v2.RandomChoice(list(transforms), p=list(chances))
    return v2.RandomApply([either], p=args.mixup_prob) if args.mixup_prob < 1 else either
