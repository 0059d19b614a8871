"""What else could stand in GRN's place, between GELU and the second layer of the MLP (paper Sec. 4, Tab. 2 and 3).

Every candidate maps channels-last features (N, H, W, C) to the same shape, C = 4 * dim, and pools over the sites of one image at
most; batch normalisation alone looks at all images. So they run as they are on the dense maps of fine-tuning and on the
visible sites of the sparse encoder, (N, 1, A / N, C). `MLP_NORMS` names them, for `--mlp_norm`.

"none" in a V2 block is neither V1 nor V2: no GRN, and no LayerScale either. The paper's "nothing" is V1, which has LayerScale.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from model import GRN, ConvNeXt, LayerNorm, init_weights


class Affine(nn.Module):
    """gamma * layer(x) + beta, as GRN has them, around a layer without parameters. gamma starts at one, beta at zero."""

    def __init__(self, dim: int, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.gamma = nn.Parameter(torch.ones(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.beta, self.gamma, self.layer(x))


class ResponseNorm(nn.Module):
    """GRN with one of its parts exchanged (paper Tab. 2): gamma * x * N(G(x)) + beta + x.

    aggregate: G, one number per image and channel: "l2" as in GRN, "l1", or the "average" of the map.
    normalise: N, over the channels: "share", G / mean |G|, as in GRN; "standardise", (G - mean) / deviation; "inverse",
        1 / mean |G|. With averages, which have a sign, the mean of their magnitudes keeps the divisor from zero.
    skip: whether x is added. Without it gamma starts at one, since the block would begin as zero otherwise.
    """

    def __init__(self, dim: int, aggregate: str = "l2", normalise: str = "share", skip: bool = True, eps: float = 1e-6):
        super().__init__()
        self.aggregate, self.normalise, self.skip, self.eps = aggregate, normalise, skip, eps
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
            n = (g - mean) / (std + self.eps)
        else:
            numerator = g if self.normalise == "share" else 1.0
            n = (numerator / (g.abs().mean(dim=-1, keepdim=True) + self.eps)).expand_as(g)
        return torch.addcmul(self.beta.to(x.dtype), x, (self.gamma * n + float(self.skip)).to(x.dtype))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over all sites of all images; in the sparse encoder over the visible ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 2)).view(x.shape)


class LocalResponseNorm(nn.LocalResponseNorm):
    """AlexNet's local response normalisation over neighbouring channels, with its constants."""

    def __init__(self):
        super().__init__(size=5, alpha=1e-4, beta=0.75, k=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, 2)[..., None]).view(x.shape)  # (N, H, W, C) -> (N * H * W, C, 1)


class SqueezeExcite(nn.Module):
    """Channels gated by their averages over the image (Hu et al. 2018). A reduction of 16 gives the paper's 109M parameters."""

    def __init__(self, dim: int, reduction: int = 16):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim // reduction), nn.Linear(dim // reduction, dim)

    def weigh(self, pooled: torch.Tensor) -> torch.Tensor:
        """(N, 1, 1, C) -> (N, 1, 1, C), before the sigmoid."""
        return self.fc2(self.fc1(pooled).relu())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weigh(x.mean(dim=(1, 2), keepdim=True)).sigmoid()


class CBAM(SqueezeExcite):
    """Channels, then sites, gated by their averages and maxima (Woo et al. 2018).

    A simplification: a site is weighed by itself alone, through a 1x1 convolution of its mean and maximum over channels, where
    CBAM has a 7x7 one. So it needs no neighbours.
    """

    def __init__(self, dim: int, reduction: int = 16):
        super().__init__(dim, reduction)
        self.site = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = (x.mean(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True))
        x = x * sum(self.weigh(part) for part in pooled).sigmoid()
        return x * self.site(torch.stack([x.mean(dim=-1), x.amax(dim=-1)], dim=-1)).sigmoid()  # (N, H, W, 2) -> (N, H, W, 1)


def _named(name: str, make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """`make` under a name that shows in the state dict, as `stages.0.0.grn.<name>.*`: no two variants' weights look alike."""
    return lambda dim: nn.Sequential(OrderedDict([(name, make(dim))]))


class Nothing(nn.Identity):
    """The identity, but seen in the state dict: weights without GRN are known from weights that have lost it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("marker", torch.zeros(()))


_VARIANTS = {
    "none": lambda dim: Nothing(),
    "grn_average": lambda dim: ResponseNorm(dim, aggregate="average"),
    "grn_l1": lambda dim: ResponseNorm(dim, aggregate="l1"),
    "grn_standardise": lambda dim: ResponseNorm(dim, normalise="standardise"),
    "grn_inverse": lambda dim: ResponseNorm(dim, normalise="inverse"),
    "grn_no_skip": lambda dim: ResponseNorm(dim, skip=False),
    "lrn": lambda dim: Affine(dim, LocalResponseNorm()),
    "bn": BatchNorm,
    "ln": LayerNorm,
    "se": SqueezeExcite,
    "cbam": CBAM,
}
MLP_NORMS = {"grn": GRN} | {name: _named(name, make) for name, make in _VARIANTS.items()}


def exchange_norm(net: ConvNeXt, name: str) -> ConvNeXt:
    """Put what `name` makes in GRN's place, with its initial values, in every block of `net`, which is returned.

    Raises ValueError for a V1 network, which has no GRN, and for batch normalisation in blocks that are computed twice: its
    running statistics would count every image twice.
    """
    if name == "bn" and any(block.checkpoint_activations for stage in net.stages for block in stage):
        raise ValueError("--mlp_norm bn counts every image twice with --checkpoint_activations; leave one of the two out")
    if net.version != 2:
        raise ValueError(f"--mlp_norm {name} takes GRN's place, and ConvNeXt V1 has none; use --model convnextv2_*")
    for stage, dim in zip(net.stages, net.dims):
        for block in stage:
            block.grn = MLP_NORMS[name](4 * dim).apply(init_weights)
    return net
