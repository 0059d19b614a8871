"""Mask R-CNN on a ConvNeXt encoder (paper Sec. 5): torchvision's parts, fitted to the encoder's four stages.

What torchvision lacks and the published detector has stands here too: soft-NMS, aligned pooling, anchors that are not rounded.

Shapes: N images, C channels, n boxes.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from model import ConvNeXt, LayerNorm


class Pyramid(nn.Module):
    """The encoder's four stages, each normalised, and a feature pyramid of five levels over them.

    images (N, 3, H, W) -> maps (N, dim, H / s, W / s) named "0" to "3", for s the strides of the stages, and "pool" at twice the last.
    """

    def __init__(self, encoder: ConvNeXt, dim: int, norm_layer: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.encoder, self.out_channels = encoder, dim
        self.norms = nn.ModuleList([LayerNorm(width, channels_first=True) for width in encoder.dims])
        self.fpn = FeaturePyramidNetwork(list(encoder.dims), dim, LastLevelMaxPool(), norm_layer)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        stages = self.encoder.forward_stages(images)  # (N, 3, H, W) -> four (N, C_i, H / s_i, W / s_i)
        return self.fpn({str(i): norm(stage) for i, (norm, stage) in enumerate(zip(self.norms, stages))})


class MaskRCNN(detection.MaskRCNN):
    """torchvision's Mask R-CNN (arXiv 1703.06870) on a ConvNeXt encoder; its calling convention too.

    In training, (pictures, targets) -> a dictionary of losses, the pictures taken at their size. In evaluation, pictures -> for each a
    dictionary of boxes, labels, scores and masks, at the picture's size; within, it is resized as `min_size` and `max_size` say.
    Pictures are (3, H, W), in [0, 1]; labels 1 .. num_classes.

    Args:
        encoder: with `num_classes=0`.
        num_classes: without the background.
        fpn_dim, box_dim, mask_dim: widths of the pyramid, of the box head's two layers, of the mask head's four.
        anchor_scale: side of the anchors, in strides of their level: they follow the encoder's stem.
        masks: without them it is a Faster R-CNN.
        group_norm: GroupNorm in pyramid and mask head; from random weights they learn much sooner (arXiv 1811.08883).
        nms: "hard", or "soft", which lowers the scores of overlapping boxes (the paper's).
        published_heads: RoIAlign aligned to pixels, anchors not rounded, the pyramid's initial weights, as in the published detector.
        settings: torchvision's own arguments.
    """

    def __init__(
        self, encoder: ConvNeXt, num_classes: int, fpn_dim: int = 256, box_dim: int = 1024, mask_dim: int = 256,
        anchor_scale: float = 8, masks: bool = True, group_norm: bool = False, nms: str = "hard", published_heads: bool = False,
        **settings,
    ):  # fmt: skip
        if num_classes < 1 or nms not in ("hard", "soft"):
            raise ValueError(f"num_classes {num_classes} must be at least 1, and nms {nms!r} hard or soft")
        norm_layer = eight_groups if group_norm else None
        strides = [encoder.stem_stride * 2**level for level in range(5)]
        anchors, pool = (FineAnchors, AlignedRoIAlign) if published_heads else (AnchorGenerator, MultiScaleRoIAlign)
        # The level that a region is read from follows the anchors: for those of 8 strides it has 14 to 28 cells a side, as published.
        # torchvision takes two samples a bin and side there, as many for each cell as one for anchors of 4; sampling is what pooling costs.
        sampling = 0 if published_heads else max(1, round(anchor_scale / 4))
        pool = partial(pool, ["0", "1", "2", "3"], sampling_ratio=sampling, canonical_scale=28 * anchor_scale)
        box_features = 7 * 7 * fpn_dim
        super().__init__(
            Pyramid(encoder, fpn_dim, norm_layer),
            rpn_anchor_generator=anchors(tuple((anchor_scale * s,) for s in strides), ((0.5, 1.0, 2.0),) * 5),
            box_roi_pool=pool(7),
            box_head=detection.faster_rcnn.TwoMLPHead(box_features, box_dim),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(box_dim, num_classes + 1),
            mask_roi_pool=pool(14),
            mask_head=detection.mask_rcnn.MaskRCNNHeads(fpn_dim, (mask_dim,) * 4, 1, norm_layer),
            mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(mask_dim, mask_dim, num_classes + 1),
            size_divisible=encoder.patch_size, _skip_resize=True, **settings,
        )  # fmt: skip
        heads = self.roi_heads
        if not masks:
            heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = None
        if nms == "soft":
            heads.__class__ = SoftNMSHeads  # torchvision builds its heads itself
            heads.nms_thresh, heads.detections_per_img, heads.most = 1.0, 10**6, heads.detections_per_img
        if published_heads:
            for module in self.backbone.fpn.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight)
        for head in (self.rpn.head, heads.box_predictor, heads.mask_predictor):
            if head is not None:  # boxes have no meaning in half precision
                head.register_forward_hook(lambda head, inputs, output: as_float32(output))


def eight_groups(width: int) -> nn.GroupNorm:
    """GroupNorm of eight groups, or of as many as divide so many channels."""
    return nn.GroupNorm(math.gcd(8, width), width)


def as_float32(output):
    """A tensor, or a nest of lists and tuples of tensors, in float32."""
    return output.float() if isinstance(output, torch.Tensor) else [as_float32(each) for each in output]


class SoftNMSHeads(RoIHeads):
    """Heads whose detections go through soft-NMS; their own NMS lets everything pass, in order of score."""

    def postprocess_detections(self, *args) -> tuple[list, list, list]:
        """As torchvision's: boxes, scores and labels of each image."""
        kept = []
        for boxes, scores, labels in zip(*super().postprocess_detections(*args)):
            chosen, scores = soft_nms(boxes, scores, labels, self.most)
            kept.append((boxes[chosen], scores, labels[chosen]))
        return tuple(map(list, zip(*kept)))


def soft_nms(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, most: int, threshold: float = 0.5, least: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear soft-NMS (arXiv 1704.04503): a box that overlaps a better one of its class keeps 1 - IoU of its score.

    boxes (n, 4), scores and labels (n,) -> the indices (m,) of at most `most` boxes, best first, and their new scores (m,). An
    overlap counts beyond `threshold`; what falls below a score of `least` is left out.
    """
    device, iou = boxes.device, (box_iou(boxes, boxes) * (labels[:, None] == labels)).cpu()  # (n, n)
    left, chosen, kept = scores.cpu().clone(), [], []
    while len(chosen) < min(most, len(boxes)):
        best = int(left.argmax())
        if left[best] < least:
            break
        chosen.append(best)
        kept.append(float(left[best]))
        left[best] = 0
        left = torch.where(iou[best] > threshold, left * (1 - iou[best]), left)
    return torch.tensor(chosen, dtype=torch.int64, device=device), torch.tensor(kept, dtype=scores.dtype, device=device)


class FineAnchors(AnchorGenerator):
    """Anchors whose sides are not rounded to pixels, and whose distance doubles from level to level.

    torchvision divides the picture's side by the map's, which is 61 and not 64 for the fifth map (13 cells) of 800 pixels.
    """

    def grid_anchors(self, grid_sizes: list, strides: list) -> list[torch.Tensor]:
        """Maps' sizes and distances -> for each map (cells x anchors, 4)."""
        return super().grid_anchors(grid_sizes, [[side * 2**level for side in strides[0]] for level in range(len(strides))])

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu") -> torch.Tensor:
        """Of these sizes and ratios (height / width), around the origin: (sizes x ratios, 4)."""
        sizes = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in aspect_ratios for size in scales]
        return torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in sizes], dtype=dtype, device=device)


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign whose samples lie where pixels' centres are, as many in each bin as it is wide."""

    def forward(self, x: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list) -> torch.Tensor:
        """Maps (N, C, H_i, W_i) and boxes (n_k, 4) of each image -> (sum of n_k, C, size, size)."""
        maps, height = [x[name] for name in self.featmap_names], max(shape[0] for shape in image_shapes)
        scales = [2.0 ** round(math.log2(each.shape[2] / height)) for each in maps]
        image = torch.cat([torch.full_like(each[:, :1], k) for k, each in enumerate(boxes)])
        rois = torch.cat([image, torch.cat(boxes)], dim=1)  # (sum of n_k, 5)
        side = (rois[:, 3:] - rois[:, 1:3]).prod(dim=1).sqrt()
        # With a canonical scale of 224, a box of up to 28 cells is read from the finest map, one of up to twice as many from the next.
        levels = (side * scales[0] * 16 / self.canonical_scale + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], *self.output_size)
        for level, (each, scale) in enumerate(zip(maps, scales)):
            chosen = (levels == level).nonzero()[:, 0]
            found = roi_align(each, rois[chosen], self.output_size, scale, self.sampling_ratio, aligned=True)
            pooled = pooled.index_put((chosen,), found.to(pooled.dtype))
        return pooled
