"""What turns the encoder's features and the mask tokens into patches: FCMAE's ConvNeXt block, and the paper's alternatives.

The paper compares them in Sec. 3 (Tab. 1) without the alternatives' details; these are plain versions of each, `depth` blocks deep.

Shapes: N images, D the decoder's width, h x w the grid of patches.
"""

import torch
from torch import nn

from model import Block


def convnext(dim: int, depth: int, encoder_dims: tuple[int, ...]) -> nn.Sequential:
    """FCMAE's own: ConvNeXt V2 blocks on the grid of patches, (N, D, h, w) -> (N, D, h, w)."""
    return nn.Sequential(*(Block(dim) for _ in range(depth)))


def transformer(dim: int, depth: int, encoder_dims: tuple[int, ...]) -> nn.Sequential:
    """MAE's: patches are tokens that all see one another, (N, D, h, w) -> (N, D, h, w)."""
    if dim % 16:
        raise ValueError(f"decoder_embed_dim {dim} is not a multiple of 16, which the transformer's heads and positions need")
    return nn.Sequential(Positions(), *(TransformerBlock(dim) for _ in range(depth)))


class Positions(nn.Module):
    """Adds sines and cosines of row and column, half of the channels each, since attention knows no place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, dim, h, w = x.shape
        frequency = 10_000 ** -torch.linspace(0, 1, dim // 4, device=x.device)
        row, column = (torch.arange(side, device=x.device)[:, None] * frequency for side in (h, w))  # (h, D / 4), (w, D / 4)
        rows, columns = (torch.cat([part.sin(), part.cos()], dim=1).T for part in (row, column))  # (D / 2, h), (D / 2, w)
        grid = torch.cat([rows[:, :, None].expand(-1, -1, w), columns[:, None].expand(-1, h, -1)])  # (D, h, w)
        return x + grid.to(x.dtype)


class TransformerBlock(nn.TransformerEncoderLayer):
    """torch's, with the norm first, on a map: (N, D, h, w) -> (N, D, h, w). A head is up to 32 wide."""

    def __init__(self, dim: int):
        super().__init__(
            dim, dim // min(32, dim), 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = super().forward(x.flatten(2).transpose(1, 2))  # (N, D, h, w) -> (N, L, D)
        return tokens.transpose(1, 2).view(x.shape)


class UNet(nn.Module):
    """Blocks on the grid of patches, then on grids twice as fine, half as wide each time, up to the stem's.

    With `skip`, each finer grid also takes the encoder's features of the same resolution, which are zero at hidden sites.
    """

    def __init__(self, dim: int, depth: int, encoder_dims: tuple[int, ...], skip: bool):
        super().__init__()
        self.skip, self.dims = skip, tuple(max(8, dim >> k) for k in range(4))
        self.ups, self.merges, self.levels = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for k, width in enumerate(self.dims):
            if k > 0:
                self.ups.append(nn.Sequential(nn.Conv2d(self.dims[k - 1], 4 * width, kernel_size=1), nn.PixelShuffle(2)))
                self.merges.append(nn.Conv2d(width + encoder_dims[3 - k], width, kernel_size=1) if skip else nn.Identity())
            self.levels.append(nn.Sequential(*(Block(width) for _ in range(depth))))

    def forward(self, x: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
        """x (N, D, h, w), and the encoder's maps, finest first, if `skip` -> (N, D / 8, 8 * h, 8 * w)."""
        x = self.levels[0](x)
        for k in (1, 2, 3):
            x = self.ups[k - 1](x)  # (N, D, h, w) -> (N, D / 2, 2h, 2w)
            if self.skip:
                x = torch.cat([x, maps[3 - k].to(x.dtype)], dim=1)
            x = self.levels[k](self.merges[k - 1](x))
        return x


DECODERS = {
    "convnext": convnext,
    "transformer": transformer,
    "unet": lambda dim, depth, encoder_dims: UNet(dim, depth, encoder_dims, skip=False),
    "unet_skip": lambda dim, depth, encoder_dims: UNet(dim, depth, encoder_dims, skip=True),
}
