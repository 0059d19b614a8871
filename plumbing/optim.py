"""Learning rates, parameter groups, optimisers, moving averages, and one update."""

import argparse
import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from plumbing.script import UserError

# --- learning rates ---------------------------------------------------------------------------------------------------


def learning_rate(epoch: float, peak: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Linear warm-up from 0, then half a cosine to `min_lr`; `epoch` is fractional, so the rate changes every step."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def peak_learning_rate(args: argparse.Namespace, images_per_update: int) -> float:
    """--lr, or --blr for this many images; UserError if --min_lr is above it."""
    peak = args.lr if args.lr is not None else args.blr * images_per_update / 256
    if args.min_lr > peak:
        raise UserError(f"--min_lr {args.min_lr:g} is more than the learning rate {peak:g}, which is to fall to it; lower --min_lr")
    return peak


# --- parameter groups -------------------------------------------------------------------------------------------------


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels decay; biases, norms, LayerScale, GRN's gamma and beta, and the mask token do not."""
    return parameter.ndim > 1 and name.split(".")[-1] not in ("bias", "gamma", "beta", "mask_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for the optimiser: with weight decay and without."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if has_weight_decay(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not has_weight_decay(name, p)], "weight_decay": 0.0},
    ]


def layer_id(name: str, depths: tuple[int, ...], kind: str = "single") -> int:
    """The layer that a parameter belongs to, 0 nearest to the input.

    "single" counts every block; "group" takes the blocks of stage 3 by threes, as the authors' fine-tuning of depths 3, 3, 27, 3
    and ConvNeXt's detection and segmentation code do. What is built on the encoder comes after all of its layers.
    """
    last = last_layer(depths, kind)
    part, *place = name.removeprefix("backbone.").removeprefix("encoder.").split(".")
    if part not in ("downsample_layers", "stages"):
        return last + 1
    i, first = int(place[0]), sum(depths[: int(place[0])])
    if kind == "single":
        return first + 1 + (int(place[1]) if part == "stages" else 0)
    if part == "downsample_layers":
        return (0, 2, 3, last)[i]
    return (1, 2, 3 + int(place[1]) // 3, last)[i]


def last_layer(depths: tuple[int, ...], kind: str) -> int:
    """The encoder's last layer; for "group" and depths 3, 3, 27, 3 it is 12."""
    return sum(depths) if kind == "single" else 3 + math.ceil(depths[2] / 3)


def layer_groups(
    net: nn.Module, weight_decay: float, layer_decay: float, kind: str, depths: tuple[int, ...] | None = None
) -> list[dict]:
    """Optimiser groups with `lr_scale` = layer_decay ** (layers above); `depths` are the encoder's, by default `net`'s own."""
    depths, groups = depths or net.depths, {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            scale = layer_decay ** (last_layer(depths, kind) + 1 - layer_id(name, depths, kind))
            decay = weight_decay if has_weight_decay(name, parameter) else 0.0
            group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


# --- optimisers and averages ------------------------------------------------------------------------------------------


def make_optimizer(args: argparse.Namespace, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """The optimiser of --opt."""
    if args.opt == "sgd":
        # Not fused: torch's fused SGD leaves its momentum uninitialised if the first update is skipped.
        return torch.optim.SGD(groups, lr=lr, momentum=args.momentum, nesterov=args.momentum > 0, foreach=True)
    kind = torch.optim.AdamW if args.opt == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=tuple(args.opt_betas), eps=args.opt_eps, fused=True)


def averaged(net: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `net` whose decay warms up: min(decay, (1 + t) / (10 + t)) at its update t.

    BatchNorm's statistics are averaged too, so that they are those of averaged weights; what only counts is copied.
    """
    ema = AveragedModel(net, use_buffers=True)

    def update(averages, currents, _):
        t = int(ema.n_averaged)  # on the CPU, unlike the copy that is passed in: reading it does not wait for a GPU
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + t) / (10 + t)))
        else:
            torch._foreach_copy_(averages, currents)

    ema.multi_avg_fn = update
    return ema


# --- one update -------------------------------------------------------------------------------------------------------


def make_scaler(device: torch.device, amp_dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """A gradient scaler that also skips non-finite updates, on a GPU without waiting; only float16 needs its scale."""
    return torch.amp.GradScaler(device.type, init_scale=2.0**16 if amp_dtype == torch.float16 else 1.0)


def nan_gradient_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, whose gradient is NaN where the loss is not finite: gradients are shared, so all processes skip the update."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def apply_update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None, amp_dtype: torch.dtype | None
) -> torch.Tensor:
    """Clip the accumulated gradient, step unless it is not finite, and clear it; returns its norm before clipping."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, grad_norm)
    scaler.step(optimizer)
    scaler.update(None if amp_dtype == torch.float16 else 1.0)
    optimizer.zero_grad()
    return grad_norm
