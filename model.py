"""ConvNeXt V1 and V2: an ordinary dense network (ConvNeXt V2, arXiv 2301.00808, Sec. 4 and Fig. 5).

`sparse.py` runs the same modules on visible sites only, so pre-training and fine-tuning share one set of parameters.

Shapes: N images, C channels, H x W sites.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels with eps 1e-6, for (..., C) or, with `channels_first`, (N, C, H, W).

    The channels-first form normalises a permuted view, which costs nothing for channels_last tensors.
    """

    def __init__(self, dim: int, channels_first: bool = False):
        super().__init__(dim, eps=1e-6)
        self.channels_first = channels_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.channels_first:
            return super().forward(x)
        x = super().forward(x.permute(0, 2, 3, 1))  # (N, C, H, W) -> (N, H, W, C)
        return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


class GRN(nn.Module):
    """Global Response Normalization of channels-last maps (paper Sec. 4, Alg. 1): (N, H, W, C) -> (N, H, W, C).

    Channels compete within each image: a channel is scaled by its L2 norm over space relative to the mean norm of all
    channels. gamma and beta start at zero, which makes the layer the identity. The norm is in float32 at least, because
    a sum of squares overflows float16.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        g = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)  # (N, H, W, C) -> (N, 1, 1, C)
        n = g / (g.mean(dim=-1, keepdim=True) + self.eps)
        # gamma * (x * n) + beta + x, with the two terms in x merged. The cast keeps float32 parameters from promoting
        # a half-precision x, which would double the memory of the network's widest tensor.
        return torch.addcmul(self.beta.to(x.dtype), x, (self.gamma * n + 1).to(x.dtype))


class Block(nn.Module):
    """ConvNeXt block (N, C, H, W) -> (N, C, H, W): version 2 has GRN, version 1 LayerScale `gamma` (paper Fig. 5)."""

    def __init__(self, dim: int, drop_path: float = 0.0, version: int = 2, layer_scale_init_value: float = 1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)  # depthwise: each channel separately
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)  # a 1x1 convolution, on channels-last maps
        self.act = nn.GELU()
        self.grn = GRN(4 * dim) if version == 2 else nn.Identity()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init_value)) if version == 1 else None
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.checkpoint_activations = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.run(self.branch, x)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the block adds to its input: (N, C, H, W) -> (N, C, H, W)."""
        x = self.dwconv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = self.mlp(x).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        return self.drop_path(x)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Apply everything after `dwconv`: (N, H, W, C) -> (N, H, W, C). Shared with the sparse encoder."""
        x = self.pwconv1(self.norm(x))  # (N, H, W, C) -> (N, H, W, 4C)
        x = self.pwconv2(self.grn(self.act(x)))  # (N, H, W, 4C) -> (N, H, W, C)
        return x if self.gamma is None else self.gamma * x

    def run(self, branch: Callable[..., torch.Tensor], *args) -> torch.Tensor:
        """Call `branch(*args)`; with `checkpoint_activations`, keep only `args` for backward and recompute the rest."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(branch, *args, use_reentrant=False)
        return branch(*args)


class ConvNeXt(nn.Module):
    """ConvNeXt classifier, or with `num_classes=0` the bare encoder that FCMAE pre-trains (no final norm, no head).

    Args:
        depths, dims: numbers of blocks and channels of the four stages.
        version: 2 (GRN) or 1 (LayerScale).
        num_classes: number of logits; 0 for no head.
        in_chans: channels of the input image.
        stem_stride: 4 for photographs; 2 or 1 keeps small images at a useful resolution. A last-stage cell covers
            `patch_size = 8 * stem_stride` pixels on a side.
        drop_path_rate: stochastic depth rate of the last block; the rate grows linearly from 0 at the first.
        head_init_scale: factor on the head's initial weight; its bias is zero.
        layer_scale_init_value: initial LayerScale of version 1; from 1e-6 it takes thousands of updates to grow.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        dims: tuple[int, int, int, int],
        version: int = 2,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem_stride: int = 4,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        layer_scale_init_value: float = 1e-6,
    ):
        super().__init__()
        if stem_stride not in (4, 2, 1):
            raise ValueError(f"stem_stride {stem_stride} is not 4, 2 or 1")
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f"in_chans {in_chans} must be at least 1, and num_classes {num_classes} at least 0")
        self.depths, self.dims, self.version = tuple(depths), tuple(dims), version
        self.num_classes, self.in_chans, self.stem_stride = num_classes, in_chans, stem_stride
        self.patch_size = 8 * stem_stride

        stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], kernel_size=stem_stride, stride=stem_stride),
            LayerNorm(dims[0], channels_first=True),
        )
        self.downsample_layers = nn.ModuleList([stem])
        for i in range(3):
            downsample = nn.Conv2d(dims[i], dims[i + 1], kernel_size=2, stride=2)
            self.downsample_layers.append(nn.Sequential(LayerNorm(dims[i], channels_first=True), downsample))
        rates = iter(drop_path_rate * k / max(sum(depths) - 1, 1) for k in range(sum(depths)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, next(rates), version, layer_scale_init_value) for _ in range(depth)))
            for depth, dim in zip(depths, dims)
        )
        self.norm = LayerNorm(dims[-1]) if num_classes else nn.Identity()
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

        self.apply(init_weights)
        if num_classes:
            self.head.weight.data.mul_(head_init_scale)

    def checkpoint_activations(self, enable: bool = True) -> None:
        """Keep only each block's input for backward: far less memory, for one more forward pass per step."""
        for stage in self.stages:
            for block in stage:
                block.checkpoint_activations = enable

    def forward_stages(self, imgs: torch.Tensor) -> list[torch.Tensor]:
        """(N, in_chans, H, W) -> the stages' maps (N, dims[i], H / s_i, W / s_i), for detection and segmentation."""
        check_images(imgs, self.in_chans)
        check_size(*imgs.shape[2:], self.patch_size, whole_patches=False)
        x, stages = imgs, []
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            stages.append(x)
        return stages

    def forward_features(self, imgs: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, dims[-1]): the last stage, averaged over space, then the final norm."""
        return self.norm(self.forward_stages(imgs)[-1].mean(dim=(2, 3)))

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, num_classes) logits, or pooled features when there is no head."""
        return self.head(self.forward_features(imgs))


def init_weights(module: nn.Module) -> None:
    """Initialise convolutions and linear layers (truncated normal of std 0.02, zero biases); for `Module.apply`."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def check_images(imgs: torch.Tensor, in_chans: int) -> None:
    """Raise ValueError unless `imgs` is a floating-point (N, in_chans, H, W) tensor."""
    if imgs.dim() != 4 or imgs.shape[1] != in_chans:
        raise ValueError(f"images of shape {tuple(imgs.shape)} are not (N, {in_chans}, H, W)")
    if not imgs.is_floating_point():
        raise ValueError(f"images of type {imgs.dtype} are not floating point; scale and normalise them first")


def check_size(height: int, width: int, patch_size: int, whole_patches: bool = True) -> None:
    """Raise ValueError unless an image has room for a patch and, with `whole_patches`, divides into patches."""
    for side in (height, width) if whole_patches else ():
        if side % patch_size or side == 0:
            small = "" if patch_size == 8 else ", or --stem_stride 1 for small images"
            fitting = max(2, round(side / patch_size)) * patch_size  # a single patch leaves nothing to predict from
            size = f"image size {side} is not a multiple of the patch size {patch_size}"
            raise ValueError(f"{size}; try --input_size {fitting}{small}")
    if min(height, width) < patch_size:
        size = f"image size {height} x {width} is below the patch size {patch_size}"
        raise ValueError(f"{size}; enlarge it, or lower --stem_stride")


# Paper App. A.1: name -> (depths, dims). Huge exists as V2 only. Yocto is ours: a fifth of Atto, for quick CPU runs.
SIZES = {
    "yocto": ((1, 1, 3, 1), (24, 48, 96, 192)),
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
MODELS = {f"convnextv2_{size}": partial(ConvNeXt, *shape, version=2) for size, shape in SIZES.items()} | {
    f"convnext_{size}": partial(ConvNeXt, *shape, version=1) for size, shape in SIZES.items() if size != "huge"
}
