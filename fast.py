"""The same functions as the plain modules of `model.py` and `sparse.py`, with their backward passes written out: read last.

Nothing here changes what is computed, only how fast and in how much memory; the tests compare each piece with the plain modules.
`in_training` is the one place that chooses between the two.

Shapes: N images, S sites of an image, A active (visible) sites, C channels of a block, H x W sites; T tiles of h x w sites each.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

ENABLED = True  # set to False for the plain modules everywhere, to compare with them
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def enabled() -> bool:
    """Whether a written-out backward pass may be used: torch.func and forward-mode differentiation need the plain operations."""
    return ENABLED and not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def in_training(faster: Callable, **parts: type) -> Callable:
    """Decorate a module's method: in training `faster(module, x)` takes its place, if that computes the same.

    parts: the submodules that `faster` reads instead of calling them, and their types as they are built. If one was exchanged (for
        ReLU, LoRA, another norm, ...) or a hook waits for its call, the method itself runs.
    """

    def as_built(module: nn.Module) -> bool:
        found = ((getattr(module, name), kind) for name, kind in parts.items())
        return all(type(part) is kind and not any(getattr(part, hooks) for hooks in HOOKS) for part, kind in found)

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def choose(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            fits = enabled() and module.training and torch.is_grad_enabled() and as_built(module)
            return faster(module, x) if fits else method(module, x)

        return choose

    return decorate


# --- depthwise convolution --------------------------------------------------------------------------------------------


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


def depthwise(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """`conv(x)` of a 7x7 depthwise convolution, (N, C, H, W) -> (N, C, H, W); on a GPU PyTorch's own is as good."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return F.conv2d(x, conv.weight, conv.bias, padding=3, groups=conv.groups)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return _DepthwiseConv.apply(*(t.to(dtype) for t in (x, conv.weight, conv.bias)))


class DepthwiseConv(nn.Conv2d):
    """`nn.Conv2d` with 7x7 kernels, zero padding and a group for each channel: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, kernel_size=7, padding=3, groups=dim)

    @in_training(depthwise)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


# --- submanifold depthwise convolution --------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Rectangles of sites that a dense convolution runs on, because it is far faster than a sum over 49 taps.

    rows: (T, h, w) int64, the row of each site, or A where none is.
    padding: of zeros around them that the convolution adds; 0 where three sites of surroundings are among `rows`.
    place: (A,) int64, where each row comes out, in the flattened tiles less their surroundings.
    """

    rows: torch.Tensor
    padding: int
    place: torch.Tensor


def choose_tiles(sites) -> Tiles:
    """For `sparse.Sites`: whole images; or on a CPU the visible patches and three sites around them, where these are few.

    Reading up to half as many sites again still pays, as convolutions of small tiles stay in the cache. Not measured on a GPU.
    """
    patches = len(sites.cell) // sites.side**2
    if sites.cell.device.type != "cpu" or not 0 < patches * (sites.side + 6) ** 2 < 1.5 * len(sites.row):
        return Tiles(sites.row.view(sites.grid), 3, sites.cell)
    rows = sites.windows(sites.side)
    place = torch.empty_like(sites.cell)
    place[rows[:, 3:-3, 3:-3].flatten()] = torch.arange(len(sites.cell))
    return Tiles(rows, 0, place)


class _TiledConv(torch.autograd.Function):
    """Rows (A, C) -> (A, C) through zero-filled tiles (T, C, h, w) and a dense convolution, by the tables of `Tiles`.

    Neighbourhood is symmetric: if a is tap k of b, then b is tap 48 - k of a. So the gradient of the input is the same convolution
    with the kernel turned by 180 degrees: gathers only, no atomic additions, and deterministic.
    """

    @staticmethod
    def forward(ctx, x, weight, rows, padding, place):
        ctx.save_for_backward(x, weight, rows, place)
        ctx.padding = padding
        return _tiled_conv(x, weight, rows, padding, place)

    @staticmethod
    def backward(ctx, grad):
        x, weight, rows, place = ctx.saved_tensors
        grad = _to_tiles(grad, rows)  # (A, C) -> (T, C, h, w)
        grad_x = _to_rows(depthwise_conv(grad, weight.flip(2, 3), padding=ctx.padding), place)
        if ctx.padding == 0:
            grad = grad[:, :, 3:-3, 3:-3]
        return grad_x, depthwise_weight_grad(_to_tiles(x, rows), grad, ctx.padding), None, None, None


def tiled_conv(x: torch.Tensor, weight: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Rows (A, C) and weight (C, 1, 7, 7) -> (A, C): the submanifold convolution, without a bias."""
    return (_TiledConv.apply if enabled() else _tiled_conv)(x, weight, *tiles)


def _tiled_conv(x, weight, rows, padding, place):
    return _to_rows(depthwise_conv(_to_tiles(x, rows), weight, padding=padding), place)


def with_zero_row(x: torch.Tensor) -> torch.Tensor:
    """(A, C) -> (A + 1, C): row A is what hidden sites read."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def _to_tiles(x, rows):
    return with_zero_row(x).index_select(0, rows.flatten()).view(*rows.shape, -1).permute(0, 3, 1, 2)  # (A, C) -> (T, C, h, w)


def _to_rows(x, place):
    return x.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, place)  # (T, C, h, w) -> (T * h * w, C) -> (A, C)


# --- GELU, GRN and linear layer ---------------------------------------------------------------------------------------


class _GeluGRNLinear(torch.autograd.Function):
    """GELU, GRN and a linear layer of (N, S, 4C) hidden activations, S sites per image, with the gradient written out.

    These activations are the widest of the network, so keeping them and passing over them is what counts. Of all that stands
    between the two linear layers only `h` is kept for backward, which computes the rest again. And with many sites per image
    GRN itself touches no activations but for its norm: the scale it gives to an image's channels goes into the weight instead,
    linear(x * scale + beta) = x @ (weight * scale).T + (bias + weight @ beta), one weight for each image.
    """

    @staticmethod
    def forward(ctx, h, gamma, beta, eps, weight, bias, approximate):
        x = F.gelu(h, approximate=approximate)
        g = _sum_of_products(x, x).sqrt()  # (N, S, 4C) -> (N, 1, 4C)
        ctx.save_for_backward(h, g, gamma, beta, weight)
        ctx.eps, ctx.approximate = eps, approximate
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
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Under create_graph=True this gradient will be differentiated. To autograd g is a constant and what follows is in place,
            # so it differentiates the definition instead. (The convolutions' backward passes are made of operations that it knows.)
            leaves = [t.view_as(t).requires_grad_() for t in (h, gamma, beta, weight)]
            y = _gelu_grn_linear(*leaves, ctx.eps, ctx.approximate)
            grad_h, grad_gamma, grad_beta, grad_weight = torch.autograd.grad(y, leaves, grad, create_graph=True)
            return grad_h, grad_gamma, grad_beta, None, grad_weight, grad.sum(dim=(0, 1)), None
        x = F.gelu(h, approximate=ctx.approximate)
        mean = g.mean(dim=-1, keepdim=True) + ctx.eps  # (N, 1, 1)
        n = g / mean
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
        grad_g = (grad_n - (grad_n * n).mean(dim=-1, keepdim=True)) / mean
        through_norm = torch.where(g > 0, grad_g / g, 0)  # d g / d x = x / g, and 0 where a channel is zero
        # Where a channel is nearly dead the factor is beyond float16's range, though the product is not.
        grad_x = (x * through_norm).to(x.dtype) if x.dtype == torch.float16 else x.mul_(through_norm.to(x.dtype))
        grad_x = grad_x.baddbmm_(grad, weight * scale) if ctx.fold else grad_x.addcmul_(grad_y, scale)
        grad_h = torch.ops.aten.gelu_backward(grad_x, h, approximate=ctx.approximate)
        return grad_h, (grad_scale * n).sum(dim=(0, 1)), grad_bias @ weight, None, grad_weight, grad_bias, None


def _gelu_grn_linear(h, gamma, beta, weight, eps, approximate):  # the definition; the gradients do not depend on the bias
    x = F.gelu(h, approximate=approximate)
    g = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    n = g / (g.mean(dim=-1, keepdim=True) + eps)
    return F.linear(torch.addcmul(beta.to(x.dtype), x, (gamma * n + 1).to(x.dtype)), weight)


def _sum_of_products(a, b):
    """Over dim 1, (N, S, 4C) -> (N, 1, 4C), in float32 at least. The addends keep the type of `a` where its range allows."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == torch.float16:  # whose products may overflow
        a = a.to(wide)
    return (a * b).sum(dim=1, keepdim=True).to(wide)


def gelu_grn_linear(act: nn.GELU, grn: nn.Module, linear: nn.Linear, h: torch.Tensor) -> torch.Tensor:
    """`linear(grn(act(h)))` of channels-last h (N, ..., 4C), keeping a third as much for backward. grn has gamma, beta and eps."""
    weight = linear.weight.to(h.dtype)
    bias = h.new_zeros(len(weight)) if linear.bias is None else linear.bias.to(h.dtype)
    y = _GeluGRNLinear.apply(h.flatten(1, -2), grn.gamma.flatten(), grn.beta.flatten(), grn.eps, weight, bias, act.approximate)
    return y.view(*h.shape[:-1], y.shape[-1])  # (N, S, C) -> (N, ..., C)


def mlp(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`Block.mlp`, (N, H, W, C) -> (N, H, W, C), its last three modules as one function."""
    x = gelu_grn_linear(block.act, block.grn, block.pwconv2, block.pwconv1(block.norm(x)))
    return x if block.gamma is None else block.gamma * x
