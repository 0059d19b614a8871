"""ConvNeXt V1 and V2: an ordinary dense network (ConvNeXt V2, arXiv 2301.00808, Sec. 4 and Fig. 5).

`sparse.py` runs the very same modules on visible sites only, so pre-trained and fine-tuned weights are one set of tensors.

Shapes: N images, C channels, H x W sites.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels with eps 1e-6: of (..., C), or of (N, C, H, W) when `channels_first`.

    Both read the same memory: the channels-first form is a permuted view, free for channels_last tensors.
    """

    def __init__(self, dim: int, channels_first: bool = False):
        super().__init__(dim, eps=1e-6)
        self.channels_first = channels_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.channels_first:
            return super().forward(x)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (N, C, H, W) -> (N, H, W, C) -> (N, C, H, W)


class GRN(nn.Module):
    """Global Response Normalization of channels-last maps (paper Sec. 4, Alg. 1): (N, H, W, C) -> (N, H, W, C).

    Channels compete within each image: a channel is scaled by its L2 norm over space relative to the mean norm of all
    channels. gamma and beta start at zero, which makes the layer the identity. The norm is taken in float32 at least,
    because a sum of squares overflows float16.
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
        # gamma * (x * n) + beta + x, with the two products by x taken as one. The cast keeps a half-precision x from
        # being promoted by float32 parameters, which would double the memory of the widest tensor of the network.
        return torch.addcmul(self.beta.to(x.dtype), x, (self.gamma * n + 1).to(x.dtype))


class Block(nn.Module):
    """ConvNeXt block (N, C, H, W) -> (N, C, H, W): version 2 has GRN, version 1 has LayerScale `gamma` (paper Fig. 5).

    `mlp_norm` puts something else in GRN's place, for comparison; the candidates stand in `variants.py`.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, version: int = 2, mlp_norm: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.dwconv = DepthwiseConv(dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)  # a 1x1 convolution, on channels-last maps
        self.act = nn.GELU()
        self.grn = (mlp_norm or (GRN if version == 2 else nn.Identity))(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6)) if version == 1 else None
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.checkpoint_activations = False

    def mlp(self, x: torch.Tensor, fused: bool = True) -> torch.Tensor:
        """Everything after the depthwise convolution: (N, H, W, C) -> (N, H, W, C). Shared with the sparse encoder.

        fused: while training, take GELU, GRN and the second layer as one function instead of three modules.
        """
        fused = fused and self.training and self._is_plain()
        x = self.pwconv1(self.norm(x))  # (N, H, W, C) -> (N, H, W, 4C)
        x = gelu_grn_linear(x, self.grn, self.pwconv2) if fused else self.pwconv2(self.grn(self.act(x)))  # -> (N, H, W, C)
        return x if self.gamma is None else self.gamma * x

    def _is_plain(self) -> bool:
        """Whether `gelu_grn_linear` can stand for the modules: none was exchanged (for ReLU, LoRA, ...), no hook waits for a call."""
        parts = ((self.act, nn.GELU), (self.grn, GRN), (self.pwconv2, nn.Linear))
        hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        plain = all(type(part) is kind and not any(getattr(part, name) for name in hooks) for part, kind in parts)
        return plain and self.act.approximate == "none" and self.pwconv2.bias is not None

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """What the block adds to its input: (N, C, H, W) -> (N, C, H, W)."""
        y = self.dwconv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        y = self.mlp(y).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        return self.drop_path(y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.run(self.branch, x)

    def run(self, branch: Callable[..., torch.Tensor], *args) -> torch.Tensor:
        """`branch(*args)`; with `checkpoint_activations` only `args` are kept for backward, which computes the rest again."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(branch, *args, use_reentrant=False)
        return branch(*args)


class ConvNeXt(nn.Module):
    """ConvNeXt classifier, or with `num_classes=0` the bare encoder that FCMAE pre-trains (no final norm, no head).

    Args:
        depths, dims: blocks and channels of the four stages.
        version: 2 (GRN) or 1 (LayerScale).
        num_classes: logits; 0 for none.
        in_chans: channels of the input image.
        stem_stride: 4 for photographs; 2 or 1 keeps small images at a useful resolution. One last-stage cell then covers
            `patch_size = 8 * stem_stride` pixels on a side.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        head_init_scale: factor on the head's initial weight and bias.
        mlp_norm: makes what stands in GRN's place, from its number of channels; None: GRN in version 2, nothing in version 1.
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
        mlp_norm: Callable[[int], nn.Module] | None = None,
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
            self.downsample_layers.append(
                nn.Sequential(
                    LayerNorm(dims[i], channels_first=True),
                    nn.Conv2d(dims[i], dims[i + 1], kernel_size=2, stride=2),
                )
            )
        rates = iter(drop_path_rate * k / max(sum(depths) - 1, 1) for k in range(sum(depths)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, next(rates), version, mlp_norm) for _ in range(depth))) for depth, dim in zip(depths, dims)
        )
        self.norm = LayerNorm(dims[-1]) if num_classes else nn.Identity()
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

        self.apply(init_weights)
        if num_classes:
            self.head.weight.data.mul_(head_init_scale)
            self.head.bias.data.mul_(head_init_scale)

    def checkpoint_activations(self, enable: bool = True) -> None:
        """Keep only each block's input for backward: far less memory, for one more forward pass per step."""
        for stage in self.stages:
            for block in stage:
                block.checkpoint_activations = enable

    def forward_stages(self, imgs: torch.Tensor) -> list[torch.Tensor]:
        """(N, in_chans, H, W) -> the four stages' maps, (N, dims[i], H / s_i, W / s_i), for detection and segmentation."""
        check_images(imgs, self.in_chans)
        if min(imgs.shape[2:]) < self.patch_size:
            height, width = imgs.shape[2:]
            raise ValueError(
                f"image size {height} x {width} is below the {self.patch_size} pixels that stem_stride {self.stem_stride} "
                f"needs; use larger images or a smaller stem_stride"
            )
        x, maps = imgs, []
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            maps.append(x)
        return maps

    def forward_features(self, imgs: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, dims[-1]): the last stage, averaged over space, then the final norm."""
        return self.norm(self.forward_stages(imgs)[-1].mean(dim=(2, 3)))

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, num_classes) logits, or pooled features when there is no head."""
        return self.head(self.forward_features(imgs))


# --- the same functions with a faster backward --------------------------------------------------------------------------


class DepthwiseConv(nn.Conv2d):
    """7x7 depthwise convolution with zero padding, (N, C, H, W) -> (N, C, H, W): `nn.Conv2d` with a faster backward on CPUs."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, kernel_size=7, padding=3, groups=dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or x.dtype == torch.float64 or not torch.is_grad_enabled():
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return _DepthwiseConv.apply(*(t.to(dtype) for t in (x, self.weight, self.bias)))


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return depthwise_conv(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = depthwise_conv(grad, weight.flip(2, 3)) if ctx.needs_input_grad[0] else None
        return grad_x, depthwise_weight_grad(x, grad), grad.sum(dim=(0, 2, 3))


def depthwise_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, padding: int = 3) -> torch.Tensor:
    """(N, C, H, W) and (C, 1, 7, 7) -> (N, C, H, W), less 6 on a side without padding, in the type of x whatever autocast says.

    With the kernel turned by 180 degrees, `weight.flip(2, 3)`, it takes the gradient of the output to that of the input.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])


def depthwise_weight_grad(x: torch.Tensor, grad: torch.Tensor, padding: int = 3) -> torch.Tensor:
    """The gradient (C, 1, 7, 7) of a 7x7 depthwise convolution's weight, from its input (N, C, H, W) and its output's gradient.

    On CPUs by exchanged roles: the output's gradient slides over the input as if it were the kernel, one group per image
    and channel. PyTorch's own takes several times as long there, and is a large part of the whole backward pass.
    """
    n, channels, height, width = x.shape
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return torch.nn.grad.conv2d_weight(x, (channels, 1, 7, 7), grad, padding=padding, groups=channels)
    groups = n * channels
    image, kernel = x.reshape(1, groups, height, width), grad.reshape(groups, 1, *grad.shape[2:])
    with torch.autocast("cpu", enabled=False):
        y = F.conv2d(image, kernel, padding=padding, groups=groups)  # (1, N * C, 7, 7)
    return y.view(n, channels, 7, 7).sum(dim=0)[:, None]  # (1, N * C, 7, 7) -> (C, 1, 7, 7)


class _GeluGRNLinear(torch.autograd.Function):
    """GELU, GRN and a linear layer of (N, S, 4C) hidden activations, S sites per image, with the gradient written out.

    These activations are the widest of the network, so keeping them and passing over them is what counts. Of all that stands
    between the two linear layers only `h` is kept for backward, which computes the rest again. And with many sites per image
    GRN itself touches no activations but for its norm: the scale it gives to an image's channels goes into the weight instead,
    linear(x * scale + beta) = x @ (weight * scale).T + (bias + weight @ beta), one weight for each image.
    """

    @staticmethod
    def forward(ctx, h, gamma, beta, eps, weight, bias):
        x = F.gelu(h)
        g = _sum_of_products(x, x).sqrt()  # (N, S, 4C) -> (N, 1, 4C)
        ctx.save_for_backward(h, g, gamma, beta, weight)
        ctx.eps = eps
        ctx.fold = h.shape[1] >= 2 * weight.shape[0]  # then the images' weights are at most half as large as h
        n = g / (g.mean(dim=-1, keepdim=True) + eps)
        scale, beta = (gamma * n + 1).to(h.dtype), beta.to(h.dtype)
        if ctx.fold:
            return torch.baddbmm(bias + weight @ beta, x, (weight * scale).mT)  # (N, S, 4C) and (N, 4C, C) -> (N, S, C)
        return F.linear(torch.addcmul(beta, x, scale), weight, bias)  # (N, S, 4C) -> (N, S, C)

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # the types of forward, whatever is in force now
    @torch.autocast("cuda", enabled=False)
    def backward(ctx, grad):
        h, g, gamma, beta, weight = ctx.saved_tensors
        x = F.gelu(h)
        spread = g.mean(dim=-1, keepdim=True) + ctx.eps  # (N, 1, 1)
        n = g / spread
        scale, beta = (gamma * n + 1).to(x.dtype), beta.to(x.dtype)
        grad_bias = grad.sum(dim=(0, 1))
        # With y = x * scale + beta and out = y @ weight.T + bias:
        if ctx.fold:
            products = grad.mT @ x  # (N, C, S) and (N, S, 4C) -> (N, C, 4C)
            grad_weight = torch.addr((products * scale).sum(dim=0), grad_bias, beta)
            grad_scale = _sum_of_products(products, weight)  # (N, C, 4C) -> (N, 1, 4C)
        else:
            grad_weight = grad.flatten(0, 1).mT @ torch.addcmul(beta, x, scale).flatten(0, 1)  # -> (C, 4C)
            grad_y = grad @ weight  # (N, S, C) -> (N, S, 4C)
            grad_scale = _sum_of_products(grad_y, x)  # (N, S, 4C) -> (N, 1, 4C)
        # With scale = gamma * n + 1, n_i = g_i / (mean_j g_j + eps), g_i = |x_i|:
        grad_n = grad_scale * gamma
        grad_g = (grad_n - (grad_n * n).mean(dim=-1, keepdim=True)) / spread
        through_norm = torch.where(g > 0, grad_g / g, 0)  # d g / d x = x / g, and 0 where a channel is zero
        grad_x = x.mul_(through_norm.to(x.dtype))
        grad_x = grad_x.baddbmm_(grad, weight * scale) if ctx.fold else grad_x.addcmul_(grad_y, scale)
        grad_h = torch.ops.aten.gelu_backward(grad_x, h)
        return grad_h, (grad_scale * n).sum(dim=(0, 1)), grad_bias @ weight, None, grad_weight, grad_bias


def _sum_of_products(a, b):
    """Over dim 1, (N, S, 4C) -> (N, 1, 4C), in float32 at least. The addends keep the type of `a` where its range allows."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == torch.float16:  # whose products may overflow
        a = a.to(wide)
    return (a * b).sum(dim=1, keepdim=True).to(wide)


def gelu_grn_linear(h: torch.Tensor, grn: GRN, linear: nn.Linear) -> torch.Tensor:
    """`linear(grn(gelu(h)))` for channels-last h (N, ..., 4C): the same function as the modules', which keeps a third as much."""
    weight, bias = linear.weight.to(h.dtype), linear.bias.to(h.dtype)
    y = _GeluGRNLinear.apply(h.flatten(1, -2), grn.gamma.flatten(), grn.beta.flatten(), grn.eps, weight, bias)
    return y.view(*h.shape[:-1], y.shape[-1])  # (N, S, C) -> (N, ..., C)


def init_weights(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for convolutions and linear layers, zero for their biases; for `Module.apply`."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def check_images(imgs: torch.Tensor, in_chans: int) -> None:
    """Raise ValueError unless `imgs` is a floating-point (N, in_chans, H, W) tensor."""
    if imgs.dim() != 4 or imgs.shape[1] != in_chans:
        raise ValueError(f"images of shape {tuple(imgs.shape)} are not (N, {in_chans}, H, W)")
    if not imgs.is_floating_point():
        raise ValueError(f"images of type {imgs.dtype} are not floating point; scale and normalise them first")


# Paper App. A.1: name -> (depths, dims). Huge exists as V2 only.
SIZES = {
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
