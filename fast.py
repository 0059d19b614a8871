"""Faster training in less memory: `speed_up(network)`. The method does not depend on this file; read it last.

The network computes the same function with the same weights. Its blocks and their depthwise convolutions get classes
with hand-written backward passes, because autograd's are slow or keep too much. Evaluation does not change.

Shapes: N images, S sites of an image, A active (visible) sites, C channels of a block, H x W sites.
"""

import torch
import torch.nn.functional as F
from torch import nn

import sparse
from model import GRN, Block, ConvNeXt


def speed_up(network: nn.Module) -> nn.Module:
    """Replace the classes of all ConvNeXt blocks in `network`, and return it. Parameters and their names do not change.

    Second derivatives, torch.func and forward-mode differentiation of a sped-up network raise RuntimeError.
    """
    for module in network.modules():
        if isinstance(module, ConvNeXt):
            module.sparse_conv = submanifold_conv
        if type(module) is Block:
            module.__class__ = FastBlock
            if type(module.dwconv) is nn.Conv2d:
                module.dwconv.__class__ = FastDepthwiseConv
    return network


class FastBlock(Block):
    """A block that, in training, keeps a third as much of its MLP for backward."""

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        if not (self.training and torch.is_grad_enabled() and self.as_built()):
            return super().mlp(x)
        return gelu_grn_linear(self.act, self.grn, self.pwconv2, self.pwconv1(self.norm(x)))

    def as_built(self) -> bool:
        """Tell whether the submodules that `gelu_grn_linear` reads without calling are `Block`'s own and unhooked."""
        parts = self.act, self.grn, self.pwconv2
        return [type(part) for part in parts] == [nn.GELU, GRN, nn.Linear] and all(map(unhooked, parts))


def unhooked(module: nn.Module) -> bool:
    """Tell whether `module` has no hooks, so that it may be read instead of called."""
    return not any(
        getattr(module, f"_{hooks}")
        for hooks in ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    )


def first_derivative_only() -> None:
    """Raise RuntimeError in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("fast modules have first derivatives only; leave out fast.speed_up for second ones")


# --- depthwise convolution --------------------------------------------------------------------------------------------


class FastDepthwiseConv(nn.Conv2d):
    """A block's 7x7 depthwise convolution, (N, C, H, W) -> (N, C, H, W); PyTorch's own on GPUs and in float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype != torch.float64):
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
        first_derivative_only()
        x, weight = ctx.saved_tensors
        grad_x = depthwise_conv(grad, weight.flip(2, 3)) if ctx.needs_input_grad[0] else None
        return grad_x, depthwise_weight_grad(x, grad), grad.sum(dim=(0, 2, 3))


def depthwise_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, padding: int = 3
) -> torch.Tensor:
    """(N, C, H, W) and a kernel (C, 1, 7, 7) -> (N, C, H, W), in x's type, whatever autocast says.

    With the kernel rotated by 180 degrees, `weight.flip(2, 3)`, it maps the output's gradient to the input's.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])


def depthwise_weight_grad(x: torch.Tensor, grad: torch.Tensor, padding: int = 3) -> torch.Tensor:
    """Compute the weight's gradient (C, 1, 7, 7) from the input and the output's gradient, both (N, C, H, W).

    On CPUs the roles are swapped: the output's gradient slides over the input like a kernel, one group per image and
    channel. PyTorch's own function takes several times as long there, a large part of the backward pass.
    """
    n, channels = x.shape[:2]
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return torch.nn.grad.conv2d_weight(x, (channels, 1, 7, 7), grad, padding=padding, groups=channels)
    groups = n * channels
    image, kernel = x.reshape(1, groups, *x.shape[2:]), grad.reshape(groups, 1, *grad.shape[2:])
    with torch.autocast("cpu", enabled=False):
        y = F.conv2d(image, kernel, padding=padding, groups=groups)  # (1, N * C, 7, 7)
    return y.view(n, channels, 7, 7).sum(dim=0)[:, None]  # (1, N * C, 7, 7) -> (C, 1, 7, 7)


# --- submanifold depthwise convolution --------------------------------------------------------------------------------


def submanifold_conv(x: torch.Tensor, dwconv: nn.Module, sites: sparse.Sites) -> torch.Tensor:
    """Compute `sparse.submanifold_conv`, (A, C) -> (A, C), keeping only the visible rows for backward."""
    fits = type(dwconv) is FastDepthwiseConv and dwconv.training and torch.is_grad_enabled() and unhooked(dwconv)
    if not fits or torch.compiler.is_compiling():
        return sparse.submanifold_conv(x, dwconv, sites)
    weight, bias, device = dwconv.weight, dwconv.bias, x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        x, weight, bias = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight, bias))
    if not hasattr(sites, "tiles"):
        sites.tiles = tiles(sites)
    return _SubmanifoldConv.apply(x, weight, *sites.tiles) + bias


def tiles(sites: sparse.Sites) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the grids to convolve: rows (T, H, W), A where hidden; each row's place (A,) in the output; the padding.

    Grids are whole images; on a CPU, if patches have many sites, they are single patches with a border of three sites,
    which stay in the cache.
    """
    side, (n, height, width) = sites.side, sites.grid
    if sites.cell.device.type != "cpu" or not 0 < len(sites.cell) * (1 + 6 / side) ** 2 < 1.5 * n * height * width:
        return sites.rows, sites.cell, 3
    windows = F.pad(sites.rows, (3, 3, 3, 3), value=len(sites.cell)).unfold(1, side + 6, side).unfold(2, side + 6, side)
    image, y, x = torch.unravel_index(sites.cell[:: side**2], sites.grid)  # each patch's first row
    rows = windows[image, y // side, x // side]  # (T, side + 6, side + 6)
    return rows, rows[:, 3:-3, 3:-3].flatten().argsort(), 0


class _SubmanifoldConv(torch.autograd.Function):
    """Rows (A, C) -> (A, C) through zero-filled grids (T, C, H, W), by the tables of `tiles`.

    Neighbourhood is symmetric: if a is tap k of b, then b is tap 48 - k of a. So the input's gradient is the same
    convolution with the kernel rotated by 180 degrees: only gathers, no atomic additions, hence deterministic.
    """

    @staticmethod
    def forward(ctx, x, weight, rows, place, padding):
        ctx.save_for_backward(x, weight, rows, place)
        ctx.padding = padding
        return _to_rows(depthwise_conv(_to_grid(x, rows), weight, padding=padding), place)

    @staticmethod
    def backward(ctx, grad):
        first_derivative_only()
        x, weight, rows, place = ctx.saved_tensors
        grad = _to_grid(grad, rows)  # (A, C) -> (T, C, H, W)
        grad_x = _to_rows(depthwise_conv(grad, weight.flip(2, 3), padding=ctx.padding), place)
        grad = grad if ctx.padding else grad[:, :, 3:-3, 3:-3]
        return grad_x, depthwise_weight_grad(_to_grid(x, rows), grad, ctx.padding), None, None, None


def _to_grid(x, rows):  # (A, C) -> (T, C, H, W)
    x = sparse.with_zero_row(x).index_select(0, rows.flatten())
    return x.view(*rows.shape, -1).permute(0, 3, 1, 2)


def _to_rows(x, place):  # (T, C, H, W) -> (T * H * W, C) -> (A, C)
    return x.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, place)


# --- GELU, GRN and linear layer ---------------------------------------------------------------------------------------


def gelu_grn_linear(act: nn.GELU, grn: GRN, linear: nn.Linear, h: torch.Tensor) -> torch.Tensor:
    """Compute `linear(grn(act(h)))` of channels-last h (N, ..., 4C), keeping only h for backward."""
    weight = linear.weight.to(h.dtype)
    bias = h.new_zeros(len(weight)) if linear.bias is None else linear.bias.to(h.dtype)
    y = _GeluGRNLinear.apply(
        h.flatten(1, -2), grn.gamma.flatten(), grn.beta.flatten(), grn.eps, weight, bias, act.approximate
    )
    return y.view(*h.shape[:-1], y.shape[-1])  # (N, S, C) -> (N, ..., C)


class _GeluGRNLinear(torch.autograd.Function):
    """GELU, GRN and a linear layer on hidden activations (N, S, 4C), the network's widest: only these are kept.

    With many sites per image, GRN's scale multiplies not the activations but the weight, one per image:
    linear(x * scale + beta) = x @ (weight * scale).T + (bias + weight @ beta).
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
    @torch.autocast("cpu", enabled=False)  # the types of forward, whatever autocast is on now
    @torch.autocast("cuda", enabled=False)
    def backward(ctx, grad):
        first_derivative_only()
        h, g, gamma, beta, weight = ctx.saved_tensors
        x = F.gelu(h, approximate=ctx.approximate)
        mean = g.mean(dim=-1, keepdim=True) + ctx.eps  # (N, 1, 1)
        n = g / mean
        scale, beta = (gamma * n + 1).to(x.dtype), beta.to(x.dtype)
        # With y = x * scale + beta and out = y @ weight.T + bias:
        grad_bias = grad.sum(dim=(0, 1))
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


def _sum_of_products(a, b):
    """Sum over dim 1, (N, S, 4C) -> (N, 1, 4C), in float32 at least; products have the type of `a`, unless float16."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == torch.float16:  # its products may overflow
        a = a.to(wide)
    return (a * b).sum(dim=1, keepdim=True).to(wide)
