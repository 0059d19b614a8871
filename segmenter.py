"""UPerNet on a ConvNeXt encoder (paper Sec. 5; Xiao et al., arXiv 1807.10221, Fig. 4): which class each pixel belongs to.

Shapes: N images, K classes, C channels.
"""

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce

from model import ConvNeXt, LayerNorm

IGNORED = 255  # the label of pixels that are not counted


class UPerNet(nn.Module):
    """The head of the paper's segmentation, on the encoder's four stages.

        stages                    pyramid pooling
        4  (C_4, H/32) -> norm -> 1, 2, 3, 6, bottleneck -------------> resize --+
        3  (C_3, H/16) -> norm -> lateral -> + resized stage 4 -> fpn -> resize -+-> fuse -> classifier -> resize
        2  (C_2, H/8)  -> norm -> lateral -> + resized stage 3 -> fpn -> resize -+
        1  (C_1, H/4)  -> norm -> lateral -> + resized stage 2 -> fpn -----------+

    In evaluation, images (N, 3, H, W) -> logits (N, K, H, W). In training, a pair of such logits: the head's, and those of the
    auxiliary head on stage 3, which teaches the encoder more directly (arXiv 1612.01105, Sec. 3.3).

    Args:
        encoder: with `num_classes=0`.
        num_classes: K.
        channels, aux_channels: widths of the head and of the auxiliary head.
        dropout: share of the channels dropped before the classifiers.
    """

    def __init__(self, encoder: ConvNeXt, num_classes: int, channels: int = 512, aux_channels: int = 256, dropout: float = 0.1):
        if min(num_classes, channels, aux_channels) < 1:
            raise ValueError(f"num_classes {num_classes}, channels {channels} and aux_channels {aux_channels} must be at least 1")
        super().__init__()
        *lower, top = encoder.dims
        self.encoder = encoder
        self.norms = nn.ModuleList(LayerNorm(dim, channels_first=True) for dim in encoder.dims)
        self.bins = (1, 2, 3, 6)
        self.ppm = nn.ModuleList(conv(top, channels, 1) for _ in self.bins)
        self.bottleneck = conv(top + len(self.bins) * channels, channels, 3)
        self.lateral = nn.ModuleList(conv(dim, channels, 1) for dim in lower)
        self.fpn = nn.ModuleList(conv(channels, channels, 3) for _ in lower)
        self.fuse = conv(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.auxiliary = nn.Sequential(conv(lower[-1], aux_channels, 3), nn.Conv2d(aux_channels, num_classes, 1))

    def forward(self, imgs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, H, W) -> logits (N, K, H, W); in training a pair of them. ValueError for images below one patch."""
        stages = self.encoder.forward_stages(imgs)  # (N, 3, H, W) -> four (N, C_i, H / s_i, W / s_i)
        maps = [norm(stage) for norm, stage in zip(self.norms, stages)]
        logits = resize(self.classifier(self.dropout(self.head(maps))), imgs)  # (N, C, H / s_1, W / s_1) -> (N, K, H, W)
        if not self.training:
            return logits
        features, classifier = self.auxiliary
        return logits, resize(classifier(self.dropout(features(maps[2]))), imgs)  # (N, C_3, H / s_3, W / s_3) -> (N, K, H, W)

    def head(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Four maps, (N, C_i, H / s_i, W / s_i) -> (N, C, H / s_1, W / s_1)."""
        *lower, top = maps
        pooled = [project(F.adaptive_avg_pool2d(top, n)) for n, project in zip(self.bins, self.ppm)]  # each (N, C, n, n)
        pooled = [resize(each, top) for each in pooled]
        levels = [self.bottleneck(torch.cat([top, *pooled], dim=1))]  # (N, C_4 + 4 C, ...) -> (N, C, H / s_4, W / s_4)
        for lateral, stage in zip(reversed(self.lateral), reversed(lower)):  # from above to below, the finest comes first
            levels.insert(0, lateral(stage) + resize(levels[0], stage))
        *lower, top = levels
        levels = [*(smooth(level) for smooth, level in zip(self.fpn, lower)), top]
        return self.fuse(torch.cat([resize(level, levels[0]) for level in levels], dim=1))  # (N, 4 C, ...) -> (N, C, ...)


def resize(maps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Maps (N, C, h, w) -> (N, C, H, W), as large as `like`, bilinearly."""
    return F.interpolate(maps, size=like.shape[2:], mode="bilinear", align_corners=False)


def conv(inputs: int, outputs: int, size: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU: (N, inputs, H, W) -> (N, outputs, H, W)."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), BatchNorm(outputs), nn.ReLU())


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics, in training, are those of the images of all processes, each of which has as many.

    torch's SyncBatchNorm does so on GPUs only. The mean of an image alone has no variance: a single 1 x 1 map is a ValueError.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> the same shape."""
        world_size = distributed.get_world_size() if distributed.is_initialized() else 1
        if not self.training or world_size == 1:
            return super().forward(x)
        count, wide = x.numel() // x.shape[1] * world_size, x.float()
        mean = all_reduce(wide.mean(dim=(0, 2, 3))) / world_size  # (N, C, H, W) -> (C,); differentiable, unlike distributed's
        centred = wide - mean[:, None, None]
        variance = all_reduce(centred.square().mean(dim=(0, 2, 3))) / world_size
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def segmentation_losses(
    logits: torch.Tensor, auxiliary: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The two losses that add up to the objective, from logits (N, K, H, W) and labels (N, H, W) in 0 .. K - 1 or 255.

    Each is the mean over the pixels that are counted, zero where there are none, of the cross-entropy times the weight (K,) of the
    pixel's class; the auxiliary one weighs 0.4.
    """
    counted = (labels != IGNORED).sum().clamp(min=1)

    def loss(logits):
        return F.cross_entropy(logits.float(), labels, weights, ignore_index=IGNORED, reduction="sum") / counted

    return {"loss_head": loss(logits), "loss_auxiliary": 0.4 * loss(auxiliary)}
