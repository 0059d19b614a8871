"""Learning rates, parameter groups, and one update."""

import math

import torch
from torch import nn

# --- learning rates ---------------------------------------------------------------------------------------------------


def learning_rate(epoch: float, peak: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Warm up linearly from 0, then follow half a cosine to `min_lr`; `epoch` may be fractional."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


# --- parameter groups -------------------------------------------------------------------------------------------------


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels decay; biases, norms, LayerScale, GRN's gamma and beta, and the mask token do not."""
    return parameter.ndim > 1 and name.split(".")[-1] not in ("bias", "gamma", "beta", "mask_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Divide parameters into two groups for the optimiser: with weight decay and without."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if has_weight_decay(name, parameter) else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


# --- one update -------------------------------------------------------------------------------------------------------


def apply_update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad: float | None):
    """Clip the accumulated gradient, step (in float16 only if finite), clear it; return its norm before clipping."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return grad_norm
