"""Alternatives to GRN, between GELU and the second layer of the MLP (paper Sec. 4, Tab. 2 and 3), for `--mlp_norm`.

Each maps channels-last features (N, H, W, C) to the same shape, C = 4 * dim, and all but batch normalisation pool over
the sites of one image at most. So they run unchanged on dense maps and on visible sites, (N, 1, A / N, C).

"none" in a V2 block is neither V1 nor V2: no GRN, and no LayerScale. The paper's "nothing" is V1 with LayerScale.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import GRN, ConvNeXt, LayerNorm, init_weights

EPS = 1e-6  # as in GRN


class ResponseNorm(nn.Module):
    """GRN with one part replaced (paper Tab. 2): gamma * x * N(G(x)) + beta + x.

    aggregate: G, one number per image and channel: "l2" as in GRN, "l1", or "average" over the map.
    normalise: N, over channels: "relative", G / mean |G|, as in GRN; "standardise", (G - mean) / std; "inverse",
        1 / mean |G|. Averages have a sign, so the mean of their magnitudes keeps the divisor from zero.
    skip: whether x is added. Without it gamma starts at one, since the block would start at zero otherwise.
    """

    def __init__(self, dim: int, aggregate: str = "l2", normalise: str = "relative", skip: bool = True):
        super().__init__()
        self.aggregate, self.normalise, self.skip = aggregate, normalise, skip
        self.gamma = nn.Parameter(torch.full((1, 1, 1, dim), 0.0 if skip else 1.0))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.aggregate == "average":
            g = x.mean(dim=(1, 2), keepdim=True, dtype=wide)  # (N, H, W, C) -> (N, 1, 1, C)
        else:
            g = torch.linalg.vector_norm(x, int(self.aggregate[1]), dim=(1, 2), keepdim=True, dtype=wide)
        if self.normalise == "standardise":
            std, mean = torch.std_mean(g, dim=-1, keepdim=True, correction=0)
            n = (g - mean) / (std + EPS)
        else:
            numerator = g if self.normalise == "relative" else 1.0
            n = numerator / (g.abs().mean(dim=-1, keepdim=True) + EPS)
        return torch.addcmul(self.beta.to(x.dtype), x, (self.gamma * n + float(self.skip)).to(x.dtype))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over all sites of all images; in the sparse encoder over the visible ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 2)).view(x.shape)


class LocalResponseNorm(nn.Module):
    """AlexNet's local response normalisation over neighbouring channels, with its constants; then gamma and beta."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 2)[..., None]  # (N, H, W, C) -> (N * H * W, C, 1)
        y = F.local_response_norm(rows, size=5, alpha=1e-4, beta=0.75, k=2.0).view(x.shape)
        return torch.addcmul(self.beta, self.gamma, y)


class SqueezeExcite(nn.Module):
    """Channels gated by their means over the image (Hu et al. 2018). Reduction 16 gives the paper's 109M parameters."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim // 16), nn.Linear(dim // 16, dim)

    def gate(self, pooled: torch.Tensor) -> torch.Tensor:
        """(N, 1, 1, C) -> (N, 1, 1, C), before the sigmoid."""
        return self.fc2(self.fc1(pooled).relu())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(x.mean(dim=(1, 2), keepdim=True)).sigmoid()


class CBAM(SqueezeExcite):
    """Channels, then sites, gated by their means and maxima (Woo et al. 2018); a 1x1 kernel replaces CBAM's 7x7."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.site = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, maximum = x.mean(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
        x = x * (self.gate(mean) + self.gate(maximum)).sigmoid()
        pooled = torch.stack([x.mean(dim=-1), x.amax(dim=-1)], dim=-1)  # (N, H, W, C) -> (N, H, W, 2)
        return x * self.site(pooled).sigmoid()


class Nothing(nn.Identity):
    """The identity, but visible in the state dict, to tell weights without GRN from weights that have lost it."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("marker", torch.zeros(()))


def _under(name: str, make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """Give `make` the state-dict keys `stages.0.0.grn.<name>.*`, by which its weights are recognised."""
    return lambda dim: nn.Sequential(OrderedDict([(name, make(dim))]))


_ALTERNATIVES = {
    "none": Nothing,
    "grn_average": partial(ResponseNorm, aggregate="average"),
    "grn_l1": partial(ResponseNorm, aggregate="l1"),
    "grn_standardise": partial(ResponseNorm, normalise="standardise"),
    "grn_inverse": partial(ResponseNorm, normalise="inverse"),
    "grn_no_skip": partial(ResponseNorm, skip=False),
    "lrn": LocalResponseNorm,
    "bn": BatchNorm,
    "ln": LayerNorm,
    "se": SqueezeExcite,
    "cbam": CBAM,
}
MLP_NORMS = {"grn": GRN} | {name: _under(name, make) for name, make in _ALTERNATIVES.items()}


def replace_norm(net: ConvNeXt, name: str) -> ConvNeXt:
    """Replace GRN by `MLP_NORMS[name]`, with its initial values, in every block of `net`, which is returned.

    Raises ValueError for an unknown name, for a V1 network, and for batch normalisation with activation checkpointing.
    """
    if name not in MLP_NORMS:
        raise ValueError(f"--mlp_norm {name} is not one of {', '.join(MLP_NORMS)}")
    if net.version != 2:
        raise ValueError(f"--mlp_norm {name} replaces GRN, and ConvNeXt V1 has none; use --model convnextv2_*")
    if name == "bn" and any(block.checkpoint_activations for stage in net.stages for block in stage):
        raise ValueError("--mlp_norm bn counts every image twice with --checkpoint_activations; leave one of them out")
    for stage, dim in zip(net.stages, net.dims):
        for block in stage:
            block.grn = MLP_NORMS[name](4 * dim).apply(init_weights)
    return net
