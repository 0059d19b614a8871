"""Fully convolutional masked autoencoder (ConvNeXt V2, arXiv 2301.00808, Sec. 3): mask, encode, decode, loss.

Shapes: N images, C channels, h x w the grid of patches (the encoder's last stage), L = h * w patches of p x p pixels,
D decoder width.
"""

from functools import partial

import torch
from torch import nn

from model import Block, ConvNeXt, check_images, check_size, init_weights
from sparse import SparseTensor, leaky_stages, masked_stages, reference_conv, sparse_stages

# How the encoder runs: (net, imgs, mask) -> the maps of its four stages. All but "leaky" are equivalent.
BACKENDS = {
    "sparse": sparse_stages,  # visible sites only
    "reference": partial(sparse_stages, conv=reference_conv),  # the convolution by its definition; slow
    "masked": masked_stages,  # dense, with the mask before and after each convolution: the tests' oracle
    "leaky": leaky_stages,  # dense, so that hidden and visible sites mix: the paper's "without sparse conv."
}


def random_mask(n: int, h: int, w: int, mask_ratio: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw a mask, boolean (n, h, w), True = hidden; int(h * w * (1 - mask_ratio)) cells of each image stay visible.

    Drawn on the generator's device, by default the CPU. Raises ValueError if it would hide nothing or everything.
    """
    cells = h * w
    keep = int(cells * (1 - mask_ratio))
    if not 0 < keep < cells:
        extreme = "hides no patch" if keep >= cells else "leaves no patch visible"
        fix = "choose a ratio such as 0.6, larger images, or a smaller stem_stride"
        raise ValueError(f"mask_ratio {mask_ratio} {extreme} of {h} x {w}; {fix}")
    device = generator.device if generator is not None else "cpu"
    order = torch.rand(n, cells, generator=generator, device=device).argsort(dim=1)
    mask = torch.ones(n, cells, dtype=torch.bool, device=device)
    return mask.scatter_(1, order[:, :keep], False).view(n, h, w)


@torch.compiler.disable  # the check depends on the mask's values
def check_fraction(mask: torch.Tensor) -> None:
    """Raise ValueError for a mask that hides everything or nothing."""
    if mask.all() or not mask.any():
        extreme = "leaves no patch visible to predict from" if mask.all() else "hides no patch to predict"
        raise ValueError(f"the mask {extreme}")


class FCMAE(nn.Module):
    """Masked autoencoder around a ConvNeXt encoder: `loss, pred, mask = FCMAE(encoder)(imgs)`.

    Args:
        encoder: a ConvNeXt built with `num_classes=0`.
        mask_ratio: fraction of the patches to hide.
        decoder_depth, decoder_embed_dim: number of decoder blocks, and their width D.
        norm_pix_loss: predict each patch's pixels normalised by that patch's own mean and variance.
        backend: how the encoder runs, a name in `BACKENDS`.
    """

    def __init__(
        self,
        encoder: ConvNeXt,
        mask_ratio: float = 0.6,
        decoder_depth: int = 1,
        decoder_embed_dim: int = 512,
        norm_pix_loss: bool = True,
        backend: str = "sparse",
    ):
        super().__init__()
        if encoder.num_classes:
            raise ValueError(f"the encoder has a head of {encoder.num_classes} classes; build it with num_classes=0")
        if backend not in BACKENDS:
            raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio {mask_ratio} is not between 0 and 1")
        if decoder_depth < 0 or decoder_embed_dim < 1:
            size = f"decoder_depth {decoder_depth} is below 0, or decoder_embed_dim {decoder_embed_dim} below 1"
            raise ValueError(size)
        self.encoder, self.backend, self.mask_ratio, self.norm_pix_loss = encoder, backend, mask_ratio, norm_pix_loss
        self.patch_size, self.in_chans = encoder.patch_size, encoder.in_chans

        self.proj = nn.Conv2d(encoder.dims[-1], decoder_embed_dim, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_embed_dim, 1, 1))
        self.decoder = nn.Sequential(*(Block(decoder_embed_dim) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(decoder_embed_dim, self.patch_size**2 * self.in_chans, kernel_size=1)
        for module in (self.proj, self.decoder, self.pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, imgs: torch.Tensor, mask: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mask, encode, decode, and compute the loss.

        imgs: (N, in_chans, H, W), both sides multiples of the patch size.
        mask: (N, h, w) boolean, True = hidden; None draws one from `generator`. A CPU mask costs no synchronisation.
        Returns the loss (a scalar), the predicted patches (N, L, p * p * in_chans), and the mask.
        Raises ValueError for a wrong image size or mask, or a mask that hides nothing or everything.
        """
        if mask is None:
            check_images(imgs, self.in_chans)
            check_size(*imgs.shape[2:], self.patch_size)
            h, w = (side // self.patch_size for side in imgs.shape[2:])
            mask = random_mask(len(imgs), h, w, self.mask_ratio, generator)
        features = self.forward_encoder(imgs, mask)
        check_fraction(mask)
        mask = mask.to(imgs.device, non_blocking=True)
        pred = self.forward_decoder(features, mask)
        return self.forward_loss(imgs, pred, mask), pred, mask

    def forward_encoder(self, imgs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W), mask (N, h, w) -> (N, dims[-1], h, w), zero where hidden. ValueError if unfit."""
        last = BACKENDS[self.backend](self.encoder, imgs, mask)[-1]
        return last.dense() if isinstance(last, SparseTensor) else last

    def forward_decoder(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N, dims[-1], h, w) and mask (N, h, w) -> predicted patches (N, L, p * p * in_chans)."""
        x = self.proj(features)  # (N, D, h, w)
        x = torch.where(mask[:, None], self.mask_token.to(x.dtype), x)
        return self.pred(self.decoder(x)).flatten(2).transpose(1, 2)  # (N, p * p * C, h, w) -> (N, L, p * p * C)

    def forward_loss(self, imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Average the mean squared error to the (normalised) pixels over the hidden patches."""
        wide = torch.promote_types(pred.dtype, torch.float32)
        target = self.patchify(imgs).to(wide)  # (N, L, p * p * C)
        if self.norm_pix_loss:
            mean, std = _patch_statistics(target)
            target = (target - mean) / std
        error = (pred.to(wide) - target).square().mean(dim=-1)  # (N, L)
        hidden = mask.flatten(1)
        return (error * hidden).sum() / hidden.sum()

    def patchify(self, imgs: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, L, p * p * C): patches in row-major order, pixels in (row, column, channel) order."""
        n, c, height, width = imgs.shape
        p = self.patch_size
        x = imgs.view(n, c, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)  # (N, C, h, p, w, p) -> (N, h, w, p, p, C)

    def unpatchify(self, patches: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """(N, h * w, p * p * C) -> (N, C, h * p, w * p), the inverse of `patchify`."""
        n, p = len(patches), self.patch_size
        x = patches.view(n, h, w, p, p, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, h * p, w * p)  # (N, h, w, p, p, C) -> (N, C, h, p, w, p)

    def reconstruct(self, imgs: torch.Tensor, pred: torch.Tensor) -> torch.Tensor:
        """Turn predicted patches (N, L, p * p * C) into images (N, C, H, W) on the scale of `imgs`, for display.

        With `norm_pix_loss` each patch gets the mean and variance of the *true* patch: brightness and contrast are
        given, structure is predicted.
        """
        pred = pred.to(imgs.dtype)
        if self.norm_pix_loss:
            mean, std = _patch_statistics(self.patchify(imgs))
            pred = pred * std + mean
        return self.unpatchify(pred, imgs.shape[2] // self.patch_size, imgs.shape[3] // self.patch_size)


def _patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # (N, L, p * p * C) -> (N, L, 1)
    return mean, (var + 1e-6).sqrt()
