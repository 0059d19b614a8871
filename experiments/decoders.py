"""Alternatives to FCMAE's decoder of ConvNeXt blocks (paper Sec. 3, Tab. 1), for `--decoder`.

The paper gives no details of them; these are simple versions, `decoder_depth` blocks deep.

Shapes: N images, D the decoder's width, h x w the grid of patches, s the stem's stride, p = 8 * s a patch's side.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fcmae import BACKENDS, FCMAE
from model import Block, ConvNeXt, init_weights
from sparse import SparseTensor


class TransformerMAE(FCMAE):
    """Autoencoder with MAE's decoder: patches are tokens that attend to one another."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        dim, depth = self.proj.out_channels, len(self.decoder)
        if dim % 16:
            raise ValueError(f"decoder_embed_dim {dim} is not a multiple of 16, as the transformer needs")
        self.decoder = nn.Sequential(Positions(), *(TransformerBlock(dim) for _ in range(depth))).apply(init_weights)


class Positions(nn.Module):
    """Add sines and cosines of row and column, half of the channels each, since attention ignores positions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, dim, h, w = x.shape
        frequency = 10_000 ** -torch.linspace(0, 1, dim // 4, device=x.device)
        angles = [torch.arange(side, device=x.device)[:, None] * frequency for side in (h, w)]  # (h, D / 4), (w, D / 4)
        rows, columns = (torch.cat([angle.sin(), angle.cos()], dim=1).T for angle in angles)  # (D / 2, h), (D / 2, w)
        grid = torch.cat([rows[:, :, None].expand(-1, -1, w), columns[:, None].expand(-1, h, -1)])  # (D, h, w)
        return x + grid.to(x.dtype)


class TransformerBlock(nn.TransformerEncoderLayer):
    """torch's encoder layer, norm first, on maps (N, D, h, w) -> (N, D, h, w). Heads are up to 32 wide."""

    def __init__(self, dim: int):
        options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6)
        super().__init__(dim, dim // min(32, dim), 4 * dim, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = super().forward(x.flatten(2).transpose(1, 2))  # (N, D, h, w) -> (N, L, D)
        return tokens.transpose(1, 2).view(x.shape)


class UNetMAE(FCMAE):
    """Autoencoder with a U-Net decoder, which predicts on the stem's grid."""

    skip = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.decoder = UNet(self.proj.out_channels, len(self.decoder), self.encoder.dims if self.skip else (0, 0, 0, 0))
        self.pred = nn.Conv2d(self.decoder.dims[-1], self.encoder.stem_stride**2 * self.in_chans, kernel_size=1)
        nn.ModuleList([self.decoder, self.pred]).apply(init_weights)

    def forward_decoder(self, features: torch.Tensor | list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Decode the last stage's map, or with `skip` all four: mask (N, h, w) -> patches (N, L, p * p * in_chans)."""
        *finer, last = features if self.skip else [features]
        x = self.proj(last)  # (N, D, h, w)
        x = torch.where(mask[:, None], self.mask_token.to(x.dtype), x)
        x = self.pred(self.decoder(x, finer))  # (N, D, h, w) -> (N, s * s * C, H / s, W / s)
        return self.patchify(F.pixel_shuffle(x, self.encoder.stem_stride))  # (N, C, H, W) -> (N, L, p * p * C)


class UNetSkipMAE(UNetMAE):
    """The same, but each finer grid also takes the encoder's features at that resolution, zero at hidden sites."""

    skip = True

    def forward_encoder(self, imgs: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """(N, in_chans, H, W) and mask (N, h, w) -> the maps of all four stages, finest first."""
        stages = BACKENDS[self.backend](self.encoder, imgs, mask)
        return [stage.dense() if isinstance(stage, SparseTensor) else stage for stage in stages]


class UNet(nn.Module):
    """Blocks on the grid of patches, then on grids twice as fine, half as wide each time, up to the stem's.

    encoder_dims: channels of the encoder's maps that are concatenated on each grid, finest first; zeros for none.
    """

    def __init__(self, dim: int, depth: int, encoder_dims: tuple[int, ...]):
        super().__init__()
        self.dims = tuple(max(8, dim >> k) for k in range(4))
        self.ups, self.merges, self.levels = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for k, width in enumerate(self.dims):
            if k > 0:
                wider = nn.Conv2d(self.dims[k - 1], 4 * width, kernel_size=1)
                self.ups.append(nn.Sequential(wider, nn.PixelShuffle(2)))
                skip = encoder_dims[3 - k]
                self.merges.append(nn.Conv2d(width + skip, width, kernel_size=1) if skip else nn.Identity())
            self.levels.append(nn.Sequential(*(Block(width) for _ in range(depth))))

    def forward(self, x: torch.Tensor, finer: list[torch.Tensor]) -> torch.Tensor:
        """x (N, D, h, w), and none or three finer maps of the encoder, finest first -> (N, D / 8, 8 * h, 8 * w)."""
        x = self.levels[0](x)
        for k in (1, 2, 3):
            x = self.ups[k - 1](x)  # (N, D, h, w) -> (N, D / 2, 2h, 2w)
            if finer:
                x = torch.cat([x, finer[3 - k].to(x.dtype)], dim=1)
            x = self.levels[k](self.merges[k - 1](x))
        return x


DECODERS = {"convnext": FCMAE, "transformer": TransformerMAE, "unet": UNetMAE, "unet_skip": UNetSkipMAE}


def make_decoder(name: str, encoder: ConvNeXt, *args, **kwargs) -> FCMAE:
    """`FCMAE(encoder, *args, **kwargs)` with this decoder. Raises ValueError for an unknown name, and as FCMAE does."""
    if name not in DECODERS:
        raise ValueError(f"--decoder {name} is not one of {', '.join(DECODERS)}")
    return DECODERS[name](encoder, *args, **kwargs)
