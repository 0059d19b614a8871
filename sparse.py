"""Submanifold sparse convolution in pure PyTorch, and the ConvNeXt encoder on visible sites (paper Sec. 3, App. A.2).

A masked image is a sparse set of sites. A submanifold convolution computes its output at visible sites only and reads
hidden sites as zero: exactly a dense convolution with the mask applied before and after it. The weights belong
to the dense modules in `model.py`; nothing here has parameters.

One mask on the last stage's grid fixes the visible sites of every finer stage, because each cell divides into 2 x 2.
Rows are numbered coarse to fine: the four children of row r are rows 4r .. 4r + 3. So a 2x2 downsampling convolution is
a reshape and a matrix product, and the rows of one image are always consecutive.

Shapes: N images, A active (visible) sites, K = 49 kernel taps, C channels, H x W the grid of the current stage,
h x w the grid of the last stage, on which masks are drawn. Masks are boolean, True = hidden.
"""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from model import GRN, Block, ConvNeXt, check_images, check_size


class Sites:
    """The visible sites of one mask at one resolution.

    Attributes:
        grid: (N, H, W), the shape of the full grid.
        cell: (A,) int64, position of each row in the flattened grid.
        counts: visible sites of each image, in order.
        side: sites along a side of a patch; the rows of a patch are consecutive.
    """

    def __init__(self, grid: tuple[int, int, int], cell: torch.Tensor, counts: list[int], side: int = 1):
        self.grid, self.cell, self.counts, self.side = grid, cell, counts, side

    @classmethod
    def from_mask(cls, mask: torch.Tensor, device: torch.device | None = None) -> "Sites":
        """Take the visible cells of a boolean mask (N, h, w), True = hidden. A CPU mask costs no synchronisation."""
        visible = ~mask
        cell = visible.flatten().nonzero().squeeze(1).to(device or mask.device, non_blocking=True)  # (A,)
        return cls(tuple(mask.shape), cell, visible.flatten(1).sum(dim=1).tolist())

    def finer(self) -> "Sites":
        """Divide every cell into 2 x 2: row r becomes rows 4r .. 4r + 3."""
        n, height, width = self.grid
        y, x = self.cell // width, self.cell % width  # y counts through all images: n * H + row
        child = torch.arange(4, device=self.cell.device)
        cell = (2 * y[:, None] + child // 2) * (2 * width) + 2 * x[:, None] + child % 2  # (A, 1) -> (A, 4)
        return Sites((n, 2 * height, 2 * width), cell.flatten(), [4 * count for count in self.counts], 2 * self.side)

    @cached_property
    def rows(self) -> torch.Tensor:
        """(N, H, W) int64: the row of each grid position, or A at hidden ones."""
        rows = self.cell.new_full(self.grid, len(self.cell))
        rows.view(-1)[self.cell] = torch.arange(len(self.cell), device=self.cell.device)
        return rows

    @cached_property
    def neighbours(self) -> torch.Tensor:
        """(A, 49) int64: the row under each tap of a 7x7 window, A where that site is hidden or outside."""
        rows = F.pad(self.rows, (3, 3, 3, 3), value=len(self.cell))
        windows = rows.unfold(1, 7, 1).unfold(2, 7, 1)  # (N, H, W, 7, 7), a view
        return windows[torch.unravel_index(self.cell, self.grid)].flatten(1)


class SparseTensor:
    """Features (A, C) of the visible sites, and where those sites are."""

    def __init__(self, features: torch.Tensor, sites: Sites):
        self.features, self.sites = features, sites

    def dense(self) -> torch.Tensor:
        """Scatter the features into a map (N, C, H, W), zero at hidden sites."""
        n, height, width = self.sites.grid
        channels = self.features.shape[1]
        x = self.features.new_zeros(n * height * width, channels)
        x = x.index_copy(0, self.sites.cell, self.features)  # (A, C) -> (N * H * W, C)
        return x.view(n, height, width, channels).permute(0, 3, 1, 2)


# --- submanifold 7x7 depthwise convolution ----------------------------------------------------------------------------


def reference_conv(x: torch.Tensor, dwconv: nn.Conv2d, sites: Sites) -> torch.Tensor:
    """Convolve by definition: every row sums its visible neighbours, each times its tap. (A, C) -> (A, C).

    dwconv: a block's 7x7 depthwise convolution. Slow, because it stores 49 copies of x; the tests' reference.
    """
    taps = with_zero_row(x)[sites.neighbours]  # (A + 1, C) -> (A, 49, C)
    return torch.einsum("akc,ck->ac", taps, dwconv.weight.flatten(1)) + dwconv.bias


def with_zero_row(x: torch.Tensor) -> torch.Tensor:
    """(A, C) -> (A + 1, C): row A is what hidden sites read."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def submanifold_conv(x: torch.Tensor, dwconv: nn.Module, sites: Sites) -> torch.Tensor:
    """Compute `reference_conv` densely: scatter rows into zeros, convolve, gather the rows. (A, C) -> (A, C)."""
    y = dwconv(SparseTensor(x, sites).dense())  # (A, C) -> (N, C, H, W)
    return y.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, sites.cell)  # (N, C, H, W) -> (N * H * W, C) -> (A, C)


# --- the encoder ------------------------------------------------------------------------------------------------------


def sparse_stages(
    net: ConvNeXt, imgs: torch.Tensor, mask: torch.Tensor, conv: Callable | None = None
) -> list[SparseTensor]:
    """Run `net.forward_stages` on the visible sites of `imgs` (N, in_chans, H, W): four stages' features, finest first.

    mask: (N, H / patch_size, W / patch_size) boolean, True = hidden, any pattern. Hidden pixels are never read.
    conv: the blocks' convolution; by default the network's own if it has one (`fast.py`), else `submanifold_conv`.
    Raises ValueError for images or masks of the wrong shape or type.
    """
    check_mask(net, imgs, mask)
    conv = conv or getattr(net, "sparse_conv", submanifold_conv)
    levels, stages = _levels(mask, imgs.device), []
    x = _stem(net.downsample_layers[0], imgs, levels[0])  # (A, dims[0])
    for i, (stage, sites) in enumerate(zip(net.stages, levels)):
        if i > 0:
            x = _downsample(net.downsample_layers[i], x)  # (4A, dims[i - 1]) -> (A, dims[i])
        for block in stage:
            x = x + block.run(_branch, block, x, sites, conv)
        stages.append(SparseTensor(x, sites))
    return stages


@torch.compiler.disable  # the number of visible sites depends on the mask's values
def _levels(mask: torch.Tensor, device: torch.device) -> list[Sites]:
    """Find the visible sites of every stage, finest first."""
    levels = [Sites.from_mask(mask, device)]
    while len(levels) < 4:
        levels.insert(0, levels[0].finer())
    return levels


def _stem(stem: nn.Sequential, imgs: torch.Tensor, sites: Sites) -> torch.Tensor:
    conv, norm = stem
    k = conv.kernel_size[0]
    windows = imgs.unfold(2, k, k).unfold(3, k, k)  # (N, in_chans, H, W, k, k), a view: no pixel is read yet
    n, y, x = torch.unravel_index(sites.cell, sites.grid)
    pixels = windows.permute(0, 2, 3, 1, 4, 5)[n, y, x].flatten(1)  # (A, in_chans * k * k)
    return _layer_norm(F.linear(pixels, conv.weight.flatten(1), conv.bias), norm)


def _downsample(downsample: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    norm, conv = downsample
    windows = _layer_norm(x, norm).view(len(x) // 4, 4 * x.shape[1])  # (4A, C) -> (A, 4C): children are consecutive
    return F.linear(windows, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def _layer_norm(x, norm):  # `norm` may be a channels-first module, but in rows the channels come last
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _branch(block: Block, x: torch.Tensor, sites: Sites, conv: Callable) -> torch.Tensor:
    y = conv(x, block.dwconv, sites)  # (A, C)
    if len(set(sites.counts)) > 1:
        return _image_by_image(block, y, sites.counts)
    # The only case in FCMAE: images have equally many sites, so the MLP and GRN take them as dense maps of one row.
    y = y.view(len(sites.counts), 1, sites.counts[0], y.shape[1])  # (A, C) -> (N, 1, A / N, C)
    return block.drop_path(block.mlp(y)).view(x.shape)


# --- the same with dense convolutions ---------------------------------------------------------------------------------


def masked_stages(net: ConvNeXt, imgs: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Compute `sparse_stages` with dense convolutions, masked before and after, and GRN over visible sites: the oracle.

    Returns four maps (N, dims[i], H / s_i, W / s_i), zero at hidden sites.
    """
    check_mask(net, imgs, mask)
    mask, stages = mask.to(imgs.device), []
    x = imgs.masked_fill(upsample_mask(mask, net.patch_size)[:, None], 0)
    for i, (downsample, stage) in enumerate(zip(net.downsample_layers, net.stages)):
        hidden = upsample_mask(mask, 8 >> i)[:, None]  # (N, 1, H, W)
        x = downsample(x).masked_fill(hidden, 0)  # (N, dims[i], H, W)
        for block in stage:
            x = x + block.run(_masked_branch, block, x, hidden)
        stages.append(x)
    return stages


def _masked_branch(block: Block, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    y = block.dwconv(x).masked_fill(hidden, 0).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
    y = block.act(block.pwconv1(block.norm(y)))  # (N, H, W, 4C)
    y = y.masked_fill(hidden.permute(0, 2, 3, 1), 0)  # zeros change no norm, so GRN may see them
    y = block.grn(y) if isinstance(block.grn, GRN | nn.Identity) else _over_visible(block.grn, y, ~hidden[:, 0])
    y = block.pwconv2(y)  # (N, H, W, C)
    y = y if block.gamma is None else block.gamma * y
    return block.drop_path(y.permute(0, 3, 1, 2)).masked_fill(hidden, 0)


def leaky_stages(net: ConvNeXt, imgs: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Run `net` on the zero-filled image: not equivalent, but the paper's "without sparse conv." (Sec. 3)."""
    check_mask(net, imgs, mask)
    mask = mask.to(imgs.device)
    stages = net.forward_stages(imgs.masked_fill(upsample_mask(mask, net.patch_size)[:, None], 0))
    return [x.masked_fill(upsample_mask(mask, 8 >> i)[:, None], 0) for i, x in enumerate(stages)]


# --- masks ------------------------------------------------------------------------------------------------------------


def upsample_mask(mask: torch.Tensor, scale: int) -> torch.Tensor:
    """Repeat every cell: (N, h, w) -> (N, h * scale, w * scale)."""
    return mask.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def check_mask(net: ConvNeXt, imgs: torch.Tensor, mask: torch.Tensor) -> None:
    """Raise ValueError unless the images divide into `net`'s patches and `mask` is boolean on their grid."""
    check_images(imgs, net.in_chans)
    n, _, height, width = imgs.shape
    check_size(height, width, net.patch_size)
    expected = (n, height // net.patch_size, width // net.patch_size)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"mask of type {kind} is not a boolean tensor (True = hidden)")
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not match the images' grid of patches {expected}")


# --- not used by FCMAE: images with unequal numbers of visible sites, and other modules in GRN's place ----------------


def _image_by_image(block: Block, y: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Apply the block's MLP to each image as a map of its own, over which GRN takes its norm: (A, C) -> (A, C)."""
    if not isinstance(block.grn, GRN | nn.Identity):
        raise ValueError(UNEQUAL)
    return torch.cat([block.drop_path(block.mlp(image[None, None])).flatten(0, 2) for image in y.split(counts)])


def _over_visible(module: nn.Module, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Apply GRN's replacement to the visible sites of x (N, H, W, C) only: zeros at hidden ones would change a mean."""
    counts = visible.flatten(1).sum(dim=1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(UNEQUAL)
    rows = x[visible].view(len(x), 1, counts[0], -1)  # (N, H, W, C) -> (A, C) -> (N, 1, A / N, C)
    return torch.zeros_like(x).masked_scatter(visible[..., None], module(rows))


UNEQUAL = "the mask leaves unequal numbers of sites visible, which only GRN, or nothing in its place, can take"
