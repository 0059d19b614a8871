"""Detectors of OpenMMLab's mmdetection: Mask R-CNN on a ConvNeXt, under the names of `detect.py`.

Besides the names two things differ. There the background is the last class, here it is the first; and there boxes and masks are
predicted for the classes alone, here for the background too, though nobody reads them.

Shapes: K classes, C channels.
"""

import re

import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

State = dict[str, torch.Tensor]

NAMES = (  # of theirs, and ours; the encoder's own are those of mmpretrain
    (r"backbone\.norm([0-3])\.", r"backbone.norms.\1."),
    (r"neck\.lateral_convs\.([0-3])\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.([0-3])\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"roi_head\.mask_head\.convs\.([0-3])\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
)


def is_detector(state_dict: object) -> bool:
    """Whether these are the tensors of such a detector."""
    return isinstance(state_dict, dict) and {"rpn_head.rpn_cls.weight", "roi_head.bbox_head.fc_cls.weight"} <= state_dict.keys()


def to_detector(state_dict: State) -> State:
    """The tensors under our names and in our order of classes; the encoder's keep mmpretrain's, as `backbone.encoder.*`."""
    found = {}
    for key, value in state_dict.items():
        for theirs, ours in NAMES:
            name, matches = re.subn(f"^{theirs}", ours, key)
            if matches:
                break
        else:
            name = re.sub(r"^backbone\.", "backbone.encoder.", key)
        if ".cls_score." in name:
            value = value.roll(1, dims=0)  # (K + 1, ...): the background from the end to the front
        elif ".box_predictor.bbox_pred." in name:
            value = torch.cat([torch.zeros_like(value[:4]), value])  # (4 K, ...) -> (4 (K + 1), ...)
        elif ".mask_fcn_logits." in name:
            value = torch.cat([torch.zeros_like(value[:1]), value])  # (K, ...) -> (K + 1, ...)
        found[name] = value
    return found


def classes_of(meta: dict, count: int) -> tuple[list[str], list[int]]:
    """Names of the classes, from what a file says of its data set, and their numbers in COCO's files."""
    coco = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    numbers = {name: number for number, name in enumerate(coco) if name not in ("__background__", "N/A")}
    data_set = meta.get("dataset_meta") or meta
    names = list(data_set.get("classes") or data_set.get("CLASSES") or (numbers if count == len(numbers) else ()))
    if len(names) != count:
        names = [f"class {number}" for number in range(1, count + 1)]
    return names, [numbers.get(name, 0) for name in names] if set(names) <= set(numbers) else list(range(1, count + 1))


def settings_of(detector: State) -> dict:
    """Values of detect.py's flags for a detector of `to_detector`, as the released configurations have them."""
    heads = "roi_heads."
    masks = heads + "mask_head.0.0.weight" in detector
    return dict(
        fpn_dim=len(detector["rpn.head.conv.0.0.weight"]), box_dim=len(detector[heads + "box_head.fc6.weight"]),
        mask_dim=len(detector[heads + "mask_head.0.0.weight"]) if masks else 256, masks=masks, anchor_scale=8.0,
        group_norm=False, published_heads=True, nms="soft", proposals=[1000, 1000], statistics="folder", test_size=[800, 1333],
    )  # fmt: skip
