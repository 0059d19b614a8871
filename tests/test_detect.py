"""Claims about detect.py, scenes.py and plumbing/coco.py, each against something independent."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ALONE, TINY, assert_equal, call_at, randomised, save_noise, words, write_coco
from PIL import Image
from stress import fork, wait
from torchvision import tv_tensors
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, roi_align

import detect
import scenes
from data import SHAPES, STATISTICS, draw_images, draw_scenes
from detect import MaskRCNN
from detector import AlignedRoIAlign, AnchorGenerator, FineAnchors, soft_nms
from model import MODELS, ConvNeXt
from plumbing import coco, layouts
from plumbing.files import find_checkpoints, load_file, save_tensors
from plumbing.layouts import from_native, to_native
from plumbing.log import read_log
from plumbing.optim import layer_groups
from plumbing.plots import draw_objects
from plumbing.script import UserError
from plumbing.seeds import mix_seed

pytestmark = pytest.mark.usefixtures("small_models")
SMALL = dict(
    input_size=48, stem_stride=2, fpn_dim=8, box_dim=16, mask_dim=8, regions=8, proposals=(20, 10), anchor_scale=4, batch_size=2, epochs=2,
    num_workers=0, log_every=1, device="cpu", lr=1e-3, jitter=(0.7, 1.4),
)  # fmt: skip


def small_network(**kwargs) -> ConvNeXt:
    return ConvNeXt(**TINY, **kwargs)


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, count in (("train", 6), ("val", 3)):
        write_coco(tmp_path / "coco", split, count, seed=len(split))
    return tmp_path / "coco"


def run(data_path, output_dir, **flags) -> dict:
    """A run of seconds; its last checkpoint."""
    detect.main(detect.get_args(words(data_path=data_path, output_dir=output_dir, **SMALL | flags)))
    return load_file(find_checkpoints(output_dir)[-1])


# --- annotations and scores ------------------------------------------------------------------------------------------


def as_polygons(data_set):
    """Squares and triangles, because a polygon cannot tell a drawn mask exactly."""
    for row in data_set["annotations"]:
        x, y, w, h = row["bbox"]
        row["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]] if row["id"] % 2 else [[x, y, x + w, y, x, y + h]]


def as_counts(data_set):
    """Run lengths as lists of numbers."""
    for row in data_set["annotations"]:
        mask = coco.decode_mask(row["segmentation"], 48, 48).flatten(order="F")
        ends = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
        runs = np.diff(ends).tolist()
        row["segmentation"] = {"size": [48, 48], "counts": [0, *runs] if mask[0] else runs}


def with_gaps(data_set):
    """Ids from 0, with gaps, and in no order; an image without objects; names that COCO has not."""
    for row in data_set["annotations"]:
        row["id"], row["category_id"], row["image_id"] = 7 * (row["id"] - 1), 1000 - 3 * row["category_id"], 5 * row["image_id"]
    for row in data_set["images"]:
        row["id"] *= 5
    for row in data_set["categories"]:
        row["id"] = 1000 - 3 * row["id"]
    first = data_set["images"][1]["id"]
    data_set["annotations"] = [row for row in reversed(data_set["annotations"]) if row["image_id"] != first]
    data_set["categories"].reverse()


def with_crowds(data_set):
    """The first object of each image is a crowd."""
    seen = set()
    for row in data_set["annotations"]:
        row["iscrowd"] = int(row["image_id"] not in seen)
        seen.add(row["image_id"])


def without_masks(data_set):
    for row in data_set["annotations"]:
        del row["segmentation"]


def without_areas(data_set):
    for row in data_set["annotations"]:
        del row["area"]


@pytest.mark.parametrize("change", [dict.keys, as_polygons, as_counts, with_gaps, with_crowds, without_masks, without_areas])
def test_ground_truth_given_as_detections_scores_one(tmp_path, change):
    write_coco(tmp_path, "val", 5, 0, change=change)
    found, _ = scenes.folder_scenes(tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017", None)
    kinds = ("box", "mask") if found.masks else ("box",)
    results = {}
    for index, image in enumerate(found.data_set["images"]):
        target = found.annotations.target(index) | {"scores": torch.ones(len(found.annotations.of_image[image["id"]]))}
        target |= {"masks": target["masks"][:, None].float()} if found.masks else {}
        results[index] = coco.as_results(target, image["id"], found.category_ids)
    scores = coco.score(found.data_set, results, kinds)
    assert (change is without_masks) == (kinds == ("box",))
    for kind in kinds:
        assert scores[kind]["AP"] == pytest.approx(1) == scores[kind]["AP75"]
        assert all(value in (None, pytest.approx(1)) for value in scores[f"{kind}_AP_by_class"].values())


def test_scores_equal_those_of_another_implementation(tmp_path):
    faster_coco_eval = pytest.importorskip("faster_coco_eval")
    write_coco(tmp_path, "val", 12, 3, size=128, change=with_crowds)
    found, _ = scenes.folder_scenes(tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017", None)
    generator, results = torch.Generator().manual_seed(0), {}
    for index, image in enumerate(found.data_set["images"]):
        target = found.annotations.target(index)
        n = len(target["labels"])
        moved = (target["boxes"] + 4 * torch.randn(n, 4, generator=generator)).clamp(0, 128)
        moved[:, 2:] = moved[:, 2:].maximum(moved[:, :2] + 1)
        labels = torch.where(torch.rand(n, generator=generator) < 0.8, target["labels"], 1)
        masks = target["masks"].roll(2, 1)[:, None].float()
        result = {"boxes": moved, "labels": labels, "scores": torch.rand(n, generator=generator), "masks": masks}
        results[index] = coco.as_results(result, image["id"], found.category_ids)
    ours = coco.score(found.data_set, results, ("box", "mask"))
    for kind, theirs in (("box", "bbox"), ("mask", "segm")):
        truth = faster_coco_eval.COCO(found.data_set)
        rows = [{k: v for k, v in row.items() if kind == "box" or k != "bbox"} for rows in results.values() for row in rows]
        evaluation = faster_coco_eval.COCOeval_faster(truth, truth.loadRes(rows), theirs)
        evaluation.run()
        expected = [None if x == -1 else pytest.approx(x, abs=1e-12) for x in evaluation.stats[:12]]
        assert list(ours[kind].values()) == expected and 0.1 < ours[kind]["AP50"] < 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), 'has no list "categories"'),
        (lambda d: d["annotations"][0].pop("bbox"), 'an entry of "annotations" lacks bbox'),
        (lambda d: d["annotations"][0].update(category_id=77), "category_id 77 is no id of the file's"),
        (lambda d: d["annotations"][0].update(image_id=77), "image_id 77 is no id of the file's"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "a bbox is not four numbers"),
        (lambda d: d["images"].append(d["images"][0]), 'the id 0 stands more than once in "images"'),
        (lambda d: d.update(annotations=[]), "has no box of any object"),
        (
            lambda d: d["annotations"][0].update(segmentation={"size": [4, 4], "counts": [16]}),
            "it is 4 x 4 pixels, its image 48 x 48",
        ),
    ],
)
def test_annotations_that_are_wrong_are_named(tmp_path, change, message):
    write_coco(tmp_path, "train", 3, 0, change=change)
    with pytest.raises(UserError, match=message):
        found, _ = scenes.folder_scenes(
            tmp_path / "annotations/instances_train2017.json", tmp_path / "train2017", scenes.v2.Identity()
        )
        for index in range(3):
            found[0, index]


def test_boxes_without_area_are_left_out_and_said(tmp_path):
    def change(data_set):
        data_set["annotations"][0]["bbox"][2], data_set["annotations"][1]["bbox"][0] = 0, 60

    rows = write_coco(tmp_path, "train", 3, 0, change=change)["annotations"]
    data_set, (line,) = coco.read_annotations(tmp_path / "annotations/instances_train2017.json")
    assert len(data_set["annotations"]) == len(rows) - 2 and "2 boxes without area, or outside of their image" in line


# --- pictures and their objects --------------------------------------------------------------------------------------


def test_drawn_masks_are_where_the_picture_differs_from_its_ground():
    pictures, kinds, masks = draw_scenes(50, 0, 64)
    assert (pictures == draw_images(50, 0, 64)[0]).all() and kinds.shape == (50, 3) and masks.shape == (50, 3, 64, 64)
    assert masks.sum(axis=1).max() == 1  # a pixel belongs to one object at most
    data_set = coco.embedded_annotations(kinds, masks, SHAPES, 20)
    edges = np.abs(np.diff(pictures.astype(int), axis=2)).sum(axis=-1)  # (n, S, S - 1): colours jump where objects end
    borders = np.diff(masks.any(axis=1).astype(int), axis=2) != 0
    assert edges[borders].mean() > 2 * edges[~borders].mean()
    for row in data_set["annotations"]:
        mask = coco.decode_mask(row["segmentation"], 64, 64)
        x, y, w, h = row["bbox"]
        assert mask.sum() == mask[y : y + h, x : x + w].sum() == row["area"] >= 20 and mask[y].any() and mask[:, x + w - 1].any()


@pytest.mark.parametrize("name", ["jitter", "multiscale", "none"])
def test_boxes_and_masks_follow_their_picture(name):
    """A white rectangle on black: wherever it comes to lie, mask and box say so."""
    picture = np.zeros((60, 80, 3), dtype=np.uint8)
    picture[20:50, 10:40] = 255
    mask = torch.from_numpy(picture[..., 0] > 0).to(torch.uint8)[None]
    transform = scenes.augmentation(name, 64, (50, 70), (0.6, 1.6), None)
    sizes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        boxes = tv_tensors.BoundingBoxes([[10.0, 20, 40, 50]], format="XYXY", canvas_size=(60, 80))
        target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": tv_tensors.Mask(mask)}
        found, target = transform(Image.fromarray(picture), target)
        sizes.add(tuple(found.shape[1:]))
        if len(target["boxes"]):
            white = found.amin(dim=0) > 150
            assert (white != target["masks"][0].bool()).float().mean() < 0.05
            ys, xs = target["masks"][0].nonzero().unbind(1)
            assert target["boxes"][0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert len(sizes) == {"jitter": 1, "multiscale": 6, "none": 1}[name] or (name == "multiscale" and len(sizes) > 3)


def test_what_is_drawn_for_a_sample_depends_on_its_place_alone(folder):
    def load():
        transform = scenes.augmentation("jitter", 32, (32, 32), (0.7, 1.4), 0.3)
        return scenes.folder_scenes(folder / "annotations/instances_train2017.json", folder / "train2017", transform, 3)[0]

    first, second = load(), load()
    first[0, 1]
    for (a, x, _), (b, y, _) in [(first[1, 2], second[1, 2])]:
        assert torch.equal(a, b) and all(torch.equal(x[name], y[name]) for name in x)
    assert not torch.equal(first[1, 2][0], first[2, 2][0])


def test_an_unreadable_picture_is_replaced_and_named(folder, tmp_path, capsys):
    (folder / "train2017/001.png").write_text("no picture")
    (folder / "val2017/002.png").unlink()
    run(folder, tmp_path / "run", epochs=1)
    errors = capsys.readouterr().err
    assert "001.png" in errors and "002.png" in errors
    assert json.loads((tmp_path / "run/scores.json").read_text())["images"] == 2
    assert read_log(tmp_path / "run")[-2]["unreadable_images"] == 1


# --- the network ----------------------------------------------------------------------------------------------------


def test_soft_nms_is_the_papers_loop():
    generator = torch.Generator().manual_seed(0)
    corners = 30 * torch.rand(40, 2, generator=generator)
    boxes = torch.cat([corners, corners + 5 + 15 * torch.rand(40, 2, generator=generator)], dim=1)
    scores, labels = torch.rand(40, generator=generator), torch.randint(1, 3, (40,), generator=generator)
    left, expected = list(range(40)), []
    now = scores.tolist()
    while left:  # arXiv 1704.04503, Fig. 3, with the linear rule
        best = max(left, key=lambda k: now[k])
        left.remove(best)
        if now[best] >= 1e-3:
            expected.append((best, now[best]))
        for k in left:
            iou = float(box_iou(boxes[best][None], boxes[k][None]))
            if labels[k] == labels[best] and iou > 0.5:
                now[k] *= 1 - iou
    chosen, kept = soft_nms(boxes, scores, labels, most=25)
    assert chosen.tolist() == [k for k, _ in expected[:25]]
    assert kept.tolist() == pytest.approx([score for _, score in expected[:25]])


def test_aligned_pooling_is_torchvisions_on_the_level_that_fits():
    maps = {str(k): torch.randn(2, 3, 32 >> k, 32 >> k, generator=torch.Generator().manual_seed(k)) for k in range(4)}
    boxes = [torch.tensor([[3.0, 5, 40, 31], [0, 0, 128, 128]]), torch.tensor([[10.0, 10, 12, 90]])]
    pooled = AlignedRoIAlign(["0", "1", "2", "3"], 7, 0)(maps, boxes, [(128, 128), (128, 128)])
    for row, (image, box, level) in enumerate([(0, boxes[0][0], 0), (0, boxes[0][1], 1), (1, boxes[1][0], 0)]):
        rois = torch.cat([torch.tensor([image]), box])[None]
        expected = roi_align(maps[str(level)], rois, 7, 1 / (4 << level), 0, aligned=True)
        torch.testing.assert_close(pooled[row], expected[0])


def test_anchors_follow_the_stem_and_are_rounded_unless_published():
    detector = MaskRCNN(small_network(num_classes=0, stem_stride=2), 3, 8, 8, 8)
    assert detector.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))
    rounded, fine = (kind(((8.0,),), ((0.5, 1.0, 2.0),)).cell_anchors[0] for kind in (AnchorGenerator, FineAnchors))
    assert (rounded - fine).abs().max() <= 0.5 and not torch.equal(rounded, fine)
    width, height = (fine[:, 2:] - fine[:, :2]).unbind(1)
    torch.testing.assert_close(width * height, torch.full((3,), 64.0))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1.0, 2.0]))


def test_published_anchors_stand_at_the_strides_of_their_levels():
    """A picture of 800 x 1088 has 13 x 17 cells on the fifth level: 64 pixels apart, by division 61 and 64."""
    sizes = [(800 // stride + (stride == 64), 1088 // stride) for stride in (4, 8, 16, 32, 64)]
    anchors = FineAnchors(((8.0,),) * 5, ((1.0,),) * 5)
    place = ImageList(torch.zeros(1, 3, 800, 1088), [(800, 1088)])
    found = anchors(place, [torch.zeros(1, 1, *size) for size in sizes])[0].split([h * w for h, w in sizes])
    for (height, width), stride, boxes in zip(sizes, (4, 8, 16, 32, 64), found):
        expected = [(x * stride - 4, y * stride - 4, x * stride + 4, y * stride + 4) for y in range(height) for x in range(width)]
        assert boxes.tolist() == [pytest.approx(row) for row in expected]


def mmdetections(classes: int) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes that mmdetection gives its Mask R-CNN on the network of `small_models`."""
    encoder = from_native(small_models_encoder().state_dict(), "mmpretrain")
    dims, fpn, box, mask = (8, 8, 16, 16), 6, 10, 5
    shapes = {}
    for i, width in enumerate(dims):
        shapes |= {
            f"backbone.norm{i}": (width,),
            f"neck.lateral_convs.{i}.conv": (fpn, width, 1, 1),
            f"neck.fpn_convs.{i}.conv": (fpn, fpn, 3, 3),
        }
    shapes |= {"rpn_head.rpn_conv": (fpn, fpn, 3, 3), "rpn_head.rpn_cls": (3, fpn, 1, 1), "rpn_head.rpn_reg": (12, fpn, 1, 1)}
    head = "roi_head.bbox_head."
    shapes |= {head + "shared_fcs.0": (box, fpn * 49), head + "shared_fcs.1": (box, box)}
    shapes |= {head + "fc_cls": (classes + 1, box), head + "fc_reg": (4 * classes, box)}
    head = "roi_head.mask_head."
    shapes |= {f"{head}convs.{i}.conv": (mask, fpn if i == 0 else mask, 3, 3) for i in range(4)}
    shapes |= {head + "upsample": (mask, mask, 2, 2), head + "conv_logits": (classes, mask, 1, 1)}
    random = torch.Generator().manual_seed(0)
    rest = {f"{name}.weight": torch.randn(shape, generator=random) / 4 for name, shape in shapes.items()}
    return encoder | rest | {f"{name}.bias": torch.randn(shape[0], generator=random) / 4 for name, shape in shapes.items()}


def small_models_encoder() -> ConvNeXt:
    return randomised(MODELS["convnextv2_atto"](num_classes=0))


@torch.no_grad()
def test_a_detector_of_mmdetection_computes_what_it_does_there(folder, tmp_path):
    theirs = mmdetections(classes=3)
    save_tensors(tmp_path / "theirs.pth", {"state_dict": theirs, "meta": {"dataset_meta": {"classes": ("dog", "cat", "zebra")}}})
    args = detect.get_args(["--eval", "--resume", str(tmp_path / "theirs.pth"), "--output_dir", str(tmp_path / "out")])
    assert (args.nms, args.proposals, args.test_size, args.published_heads, args.fpn_dim) == (
        "soft",
        [1000, 1000],
        [800, 1333],
        True,
        6,
    )
    detectors, classes, numbers = detect.load_detector(args, torch.device("cpu"))
    assert (classes, numbers) == (["dog", "cat", "zebra"], [18, 17, 24])  # COCO's numbers

    ours, f = detectors["model"], torch.nn.functional

    def at(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return theirs[f"{name}.weight"], theirs[f"{name}.bias"]

    images = torch.randn(1, 3, 64, 96)
    stages = ours.backbone.encoder.forward_stages(images)
    encoder = {name: value for name, value in theirs.items() if re.match(r"backbone\.(stages|downsample)", name)}
    alone = small_models_encoder()
    alone.load_state_dict(to_native(encoder))
    for stage, expected in zip(stages, alone.forward_stages(images)):
        torch.testing.assert_close(stage, expected)
    laterals = []
    for i, stage in enumerate(stages):
        normal = f.layer_norm(stage.permute(0, 2, 3, 1), stage.shape[1:2], *at(f"backbone.norm{i}"), eps=1e-6).permute(0, 3, 1, 2)
        laterals.append(f.conv2d(normal, *at(f"neck.lateral_convs.{i}.conv")))
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + f.interpolate(laterals[i + 1], size=laterals[i].shape[2:], mode="nearest")
    levels = [f.conv2d(lateral, *at(f"neck.fpn_convs.{i}.conv"), padding=1) for i, lateral in enumerate(laterals)]
    levels.append(levels[-1][:, :, ::2, ::2])
    found = list(ours.backbone(images).values())
    for level, expected in zip(found, levels, strict=True):
        torch.testing.assert_close(level, expected)

    hidden = f.conv2d(levels[0], *at("rpn_head.rpn_conv"), padding=1).relu()
    objectness, deltas = ours.rpn.head(found[:1])
    torch.testing.assert_close(objectness[0], f.conv2d(hidden, *at("rpn_head.rpn_cls")))
    torch.testing.assert_close(deltas[0], f.conv2d(hidden, *at("rpn_head.rpn_reg")))

    regions, head = torch.randn(5, 6, 7, 7), "roi_head.bbox_head."
    hidden = f.linear(f.linear(regions.flatten(1), *at(head + "shared_fcs.0")).relu(), *at(head + "shared_fcs.1")).relu()
    logits, boxes = ours.roi_heads.box_predictor(ours.roi_heads.box_head(regions))
    scores = f.linear(hidden, *at(head + "fc_cls")).softmax(1)  # the three classes, then the background
    torch.testing.assert_close(logits.softmax(1), torch.cat([scores[:, 3:], scores[:, :3]], dim=1))
    torch.testing.assert_close(boxes[:, 4:], f.linear(hidden, *at(head + "fc_reg")))

    regions, head = torch.randn(2, 6, 14, 14), "roi_head.mask_head."
    hidden = regions
    for i in range(4):
        hidden = f.conv2d(hidden, *at(f"{head}convs.{i}.conv"), padding=1).relu()
    hidden = f.conv_transpose2d(hidden, *at(head + "upsample"), stride=2).relu()
    masks = ours.roi_heads.mask_predictor(ours.roi_heads.mask_head(regions))
    torch.testing.assert_close(masks[:, 1:], f.conv2d(hidden, *at(head + "conv_logits")))

    another = detect.make_detector(args, 3)
    lines = layouts.load_parts(another, another.backbone.encoder, tmp_path / "theirs.pth", "detector")  # --finetune takes all of it
    assert lines[-1] == f"loaded {len(ours.state_dict()) - len(encoder)} of the detector's other tensors"


def test_parameters_are_those_of_the_published_detector():
    """48.15 million for Tiny and COCO's 80 classes (REFERENCE: with torchvision's heads); names as documented."""
    with torch.device("meta"):
        encoder = ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), num_classes=0)
    detector = MaskRCNN(encoder, 80)
    assert sum(p.numel() for p in detector.parameters()) == pytest.approx(48.15e6, abs=0.01e6)
    outer = {".".join(name.split(".")[:2]) for name in detector.state_dict()}
    assert {"backbone.encoder", "backbone.norms", "backbone.fpn", "rpn.head", "roi_heads.mask_head"} <= outer


@pytest.mark.parametrize(("depths", "last"), [((3, 3, 9, 3), 6), ((3, 3, 27, 3), 12), ((2, 2, 6, 2), 5)])
def test_layers_have_the_published_rates(depths, last):
    detector = MaskRCNN(ConvNeXt(depths, (4, 4, 4, 4), num_classes=0), 2, 4, 4, 4)
    groups = layer_groups(detector, 0.05, 0.9, "group", depths)
    rate = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    layers = {"downsample_layers.0": 0, "stages.0": 1, "downsample_layers.1": 2, "stages.1": 2, "downsample_layers.2": 3}
    layers |= {f"stages.2.{j}": 3 + j // 3 for j in range(depths[2])} | {"downsample_layers.3": last, "stages.3": last}
    for name, parameter in detector.named_parameters():
        inner = name.removeprefix("backbone.encoder.")
        layer = next((layer for start, layer in layers.items() if f"{inner}.".startswith(f"{start}.")), last + 1)
        decays = parameter.ndim > 1 and not name.endswith((".gamma", ".beta"))
        assert rate[id(parameter)] == (pytest.approx(0.9 ** (last + 1 - layer)), 0.05 if decays else 0), name


def test_boxes_are_computed_in_float32_under_autocast():
    detector = randomised(MaskRCNN(small_network(num_classes=0), 3, 8, 8, 8, min_size=64, max_size=64, box_score_thresh=0)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = detector([torch.rand(3, 64, 64)])[0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32 and len(found["boxes"])


def test_padding_beside_a_smaller_picture_changes_its_features_through_grn():
    """Why evaluation takes pictures one by one. Without GRN, at its start the identity, only the border of the padding is felt."""
    net, picture = randomised(small_network(num_classes=0)), torch.rand(1, 3, 64, 64)
    gammas = [parameter for name, parameter in net.named_parameters() if name.endswith("grn.gamma")]
    padded = torch.nn.functional.pad(picture, (0, 192))

    def difference():
        alone, beside = (net.forward_stages(imgs)[0][..., :4] for imgs in (picture, padded))  # far from the border
        return ((alone - beside).norm() / alone.norm()).item()

    with torch.no_grad():
        for gamma in gammas:
            gamma.zero_()
        assert difference() < 1e-5
        for gamma in gammas:
            gamma.fill_(1)
        assert difference() > 0.01


def test_torchvisions_own_detector_goes_through_the_same_evaluation(folder, tmp_path):
    args = detect.get_args(words(data_path=folder, **SMALL))
    args.masks = True
    val, _ = detect.load_scenes(args, "val")
    theirs = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=11, min_size=48, max_size=48, box_score_thresh=0.0
    )
    scores, found, _ = detect.evaluate({"model": theirs}, val, args, ALONE)
    assert scores["model"]["images"] == 3 and sum(map(len, found["model"].values())) > 0


# --- training -------------------------------------------------------------------------------------------------------


def test_training_is_a_plain_loop(folder, tmp_path):
    """Three updates of two pictures: torchvision's losses, AdamW, a rate that rises by the update and falls by the epoch."""
    flags = dict(seed=5, epochs=1, lr=2e-3, warmup_updates=2, steps=[0.5], layer_decay=0.8, weight_decay=0.1)
    found = run(folder, tmp_path / "run", disable_eval=True, **flags)

    args = detect.get_args(words(data_path=folder, **SMALL | flags))
    args.masks = True
    transform = scenes.augmentation("jitter", 48, args.test_size, (0.7, 1.4), None)
    data = scenes.folder_scenes(folder / "annotations/instances_train2017.json", folder / "train2017", transform, 5)[0]
    torch.manual_seed(5)
    net = detect.make_detector(args, 10).train().to(memory_format=torch.channels_last)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    moments = {}
    order = torch.randperm(6, generator=torch.Generator().manual_seed(mix_seed("order", 5, 0))).tolist()
    losses = []
    for update in range(3):
        items = [data[0, index] for index in order[2 * update : 2 * update + 2]]
        torch.manual_seed(mix_seed("step", 5, 0, update, 0))
        parts = net([picture / 255 for picture, _, _ in items], [target for _, target, _ in items])
        losses.append({name: value.item() for name, value in parts.items()})
        rate = 2e-3 * (0.1 if update / 3 >= 0.5 else 1) * min(1, 0.001 + 0.999 * update / 2)
        gradients = dict(zip(net.state_dict(), torch.autograd.grad(sum(parts.values()), list(net.parameters()))))
        for name, parameter in net.named_parameters():
            inner = name.removeprefix("backbone.encoder.").split(".")
            layer = {"downsample_layers": (0, 2, 3, 4), "stages": (1, 2, 3, 4)}.get(inner[0], [5] * 4)[
                int(inner[1]) if inner[1].isdigit() else 0
            ]
            lr = rate * 0.8 ** (5 - layer)
            m, v = moments.get(name, (0, 0))
            m, v = 0.9 * m + 0.1 * gradients[name], 0.999 * v + 0.001 * gradients[name] ** 2
            moments[name] = m, v
            with torch.no_grad():
                if parameter.ndim > 1 and not name.endswith((".gamma", ".beta")):
                    parameter *= 1 - lr * 0.1
                parameter -= lr * (m / (1 - 0.9 ** (update + 1))) / ((v / (1 - 0.999 ** (update + 1))).sqrt() + 1e-8)
    log = read_log(tmp_path / "run")
    for record, expected in zip(log, losses):
        assert {name: record[name] for name in expected} == pytest.approx(expected, abs=2e-5)
        assert record["loss"] == pytest.approx(sum(expected.values()), abs=1e-4)
    moved = {name: value - start[name] for name, value in net.state_dict().items()}
    trained = {name: value - start[name] for name, value in found["model"].items()}
    far = sum((moved[name] - trained[name]).norm() ** 2 for name in moved).sqrt()
    assert far < 0.01 * sum(value.norm() ** 2 for value in moved.values()).sqrt()


def test_a_stopped_run_continues_bit_for_bit(folder, tmp_path, monkeypatch):
    flags = dict(save_every_steps=1, model_ema=True, color_jitter=0.3, drop_path=0.3, amp="none")
    whole = run(folder, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        call_at(patch, detect.Run, "backward", 5)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "parts", **flags)
    parts = run(folder, tmp_path / "parts", **flags)
    assert_equal(parts["model"], whole["model"])
    assert_equal(parts["model_ema"], whole["model_ema"])
    untimed = [[{k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "data_wait")} for row in read_log(tmp_path / name)] for name in ("whole", "parts")]  # fmt: skip
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize(("masks", "near"), [(False, 1e-4), (True, 0.1)])
def test_two_processes_equal_one_with_twice_the_batch_but_for_the_sampling(folder, tmp_path, monkeypatch, masks, near):
    """With a fixed choice of regions. The masks' loss is a mean over a process's objects, of which one may have more than the other."""

    def first(sampler, labels) -> tuple[list, list]:
        chosen = []
        for each in labels:
            objects = (each >= 1) & ((each >= 1).cumsum(0) <= sampler.batch_size_per_image * sampler.positive_fraction)
            ground = (each == 0) & ((each == 0).cumsum(0) <= sampler.batch_size_per_image - int(objects.sum()))
            chosen.append((objects.to(torch.uint8), ground.to(torch.uint8)))
        return tuple(map(list, zip(*chosen)))

    monkeypatch.setattr(BalancedPositiveNegativeSampler, "__call__", first)
    flags = dict(masks=masks, epochs=1, disable_eval=True, opt="sgd", momentum=0, weight_decay=0, lr=1e-2, warmup_updates=0)
    flags |= dict(update_freq=3, proposals=(100, 20))
    args = detect.get_args(words(data_path=folder, output_dir=tmp_path / "two", **SMALL | flags | dict(batch_size=1)))
    wait(fork(lambda: detect.main(args), tmp_path, 2))
    one = run(folder, tmp_path / "one", **flags)["model"]
    two = load_file(find_checkpoints(tmp_path / "two")[-1])["model"]
    torch.manual_seed(args.seed)
    args.masks = masks
    start = detect.make_detector(args, 10).state_dict()
    moved, apart = (sum((a[name] - b[name]).norm() ** 2 for name in one).sqrt() for a, b in ((one, start), (one, two)))
    assert moved > 0 and apart < near * moved


def test_boxes_without_masks_train_a_faster_rcnn(tmp_path, capsys):
    for split in ("train", "val"):
        write_coco(tmp_path / "coco", split, 4, len(split), change=without_masks)
    found = run(tmp_path / "coco", tmp_path / "run", epochs=1)
    assert not any("mask" in name for name in found["model"]) and "boxes alone" in capsys.readouterr().out
    assert "loss_mask" not in read_log(tmp_path / "run")[0] and "loss_box_reg" in read_log(tmp_path / "run")[0]
    assert "mask" not in json.loads((tmp_path / "run/scores.json").read_text())


def test_weights_come_from_encoders_classifiers_and_detectors(folder, tmp_path, capsys):
    classifier = randomised(MODELS["convnextv2_atto"](num_classes=7, stem_stride=2))
    save_tensors(tmp_path / "classifier.pth", {"model": classifier.state_dict()})
    args = detect.get_args(words(data_path=folder, **SMALL | dict(stem_stride=None), finetune=tmp_path / "classifier.pth"))
    assert args.stem_stride == 2 and args.model.startswith("convnextv2")
    args.masks = True
    detector = detect.make_detector(args, 10)
    lines = "\n".join(layouts.load_parts(detector, detector.backbone.encoder, args.finetune, "detector"))
    assert "left out norm.weight, norm.bias, head.weight, head.bias" in lines
    encoder = {name: value for name, value in classifier.state_dict().items() if not name.startswith(("norm.", "head."))}
    assert_equal(detector.backbone.encoder.state_dict(), encoder)

    save_tensors(tmp_path / "detector.pth", {"model": randomised(detector).state_dict()})
    another = detect.make_detector(args, 4)
    lines = "\n".join(layouts.load_parts(another, another.backbone.encoder, tmp_path / "detector.pth", "detector"))
    assert "at their initial values: roi_heads.box_predictor.bbox_pred, roi_heads.box_predictor.cls_score" in lines
    kept = {name: value for name, value in detector.state_dict().items() if "predictor" not in name}
    assert_equal({name: another.state_dict()[name] for name in kept}, kept)


def test_evaluation_and_prediction_take_the_network_from_the_checkpoint(folder, tmp_path, capsys):
    run(folder, tmp_path / "run", epochs=1, nms="soft")
    best, where = tmp_path / "run/checkpoint-best.pth", dict(output_dir=tmp_path / "again", device="cpu")
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    detect.main(detect.get_args(["--eval", *words(resume=best, nms="soft", proposals=(20, 10), num_workers=0, **where)]))
    again = json.loads((tmp_path / "again/scores.json").read_text())
    assert again == scores and "3 images of" in capsys.readouterr().out
    assert (tmp_path / "again/detections.json").read_text() == (tmp_path / "run/detections.json").read_text()

    save_noise(tmp_path / "pictures/a.png", (70, 50))
    save_noise(tmp_path / "pictures/sub/b.jpg", (50, 70))
    (tmp_path / "pictures/c.png").write_text("no picture")
    flags = words(resume=best, score_threshold=0, num_workers=0, **where)
    detect.main(detect.get_args(["--predict", str(tmp_path / "pictures"), *flags]))
    rows = json.loads((tmp_path / "again/predictions.json").read_text())
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.jpg"] and rows[0]["objects"]
    for row in rows:
        width, height = Image.open(row["file"]).size
        assert Image.open(row["picture"]).size == (width, height)
        for each in row["objects"]:
            x, y, w, h = each["box"]
            assert 0 <= x <= x + w <= width + 0.01 and 0 <= y <= y + h <= height + 0.01
            assert each["class"] in SHAPES and coco.decode_mask(each["mask"], height, width).shape == (height, width)


def test_where_drawn_masks_overlap_the_better_ones_colour_is_seen():
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[10:30, 10:30] = 1
    rows = [{"category_id": 1 + k, "bbox": [0, 0, 40, 40], "score": 0.5 + k / 10} for k in range(2)]
    for row in rows:
        row["segmentation"] = coco.encode_mask(mask)
    white = Image.new("RGB", (40, 40), "white")
    both, better = draw_objects(white, rows, {1: "a", 2: "b"}), draw_objects(white, rows[1:], {1: "a", 2: "b"})
    assert torch.equal(both[:, 20:29, 20:29], better[:, 20:29, 20:29]) and both[:, 25, 25].float().mean() < 250


def test_flags_of_evaluation_reach_it(folder, tmp_path):
    run(folder, tmp_path / "run", epochs=1)
    write_coco(tmp_path / "other", "val", 3, seed=9)
    best = tmp_path / "run/checkpoint-best.pth"

    def found(**flags) -> str:
        where = dict(output_dir=tmp_path / "again", device="cpu", num_workers=0, proposals=(20, 10))
        detect.main(detect.get_args(["--eval", *words(resume=best, **where | flags)]))
        return (tmp_path / "again/detections.json").read_text()

    plain, val = found(), tmp_path / "other"
    for flags in (
        dict(nms="soft"), dict(test_size=(64, 64)), dict(val_limit=2), dict(score_threshold=0.095), dict(val_images=val / "val2017"),
        dict(val_annotations=val / "annotations/instances_val2017.json", val_images=val / "val2017"), dict(data_path=val),
    ):  # fmt: skip
        assert found(**flags) != plain, flags
    assert found() == plain


def test_the_embedded_pictures_are_detected(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "draw_scenes", lambda count, seed, size: draw_scenes(count // 100, seed, size))
    run(None, tmp_path / "run", epochs=1, data_set="embedded")
    assert json.loads((tmp_path / "run/config.json").read_text())["images"] == scenes.SCENES[0] // 100
    for more in ([], ["--data_path", "coco"]):  # other pictures are normalised as the training's were
        args = detect.get_args(["--eval", "--resume", str(tmp_path / "run"), *more])
        assert detect.make_detector(args, 10).transform.image_mean == STATISTICS["embedded"][0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval"], "--eval needs --resume FILE"),
        (["--predict", "a.png"], "--predict needs --resume FILE"),
        (["--data_set", "folder"], "--data_set folder needs --data_path DIR"),
        (["--recipe", "coco"], "has no settings for size atto"),
        (["--test_size", "100", "50"], "the long side comes second"),
        (["--jitter", "2", "1"], "the larger factor comes second"),
        (["--data_path", "nowhere"], "cannot read the annotations nowhere/annotations/instances_train2017.json"),
    ],
)
def test_mistakes_get_one_line(flags, message, capsys, tmp_path):
    with pytest.raises((UserError, SystemExit)) as caught:
        detect.main(detect.get_args([*flags, "--output_dir", str(tmp_path / "run"), "--device", "cpu"]))
    said = str(caught.value) if caught.type is UserError else capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_a_classifiers_checkpoint_is_no_detector(tmp_path):
    save_tensors(tmp_path / "c.pth", {"model": MODELS["convnextv2_atto"](num_classes=3).state_dict()})
    with pytest.raises(UserError, match="holds no detector"):
        detect.main(
            detect.get_args(["--predict", str(tmp_path), "--resume", str(tmp_path / "c.pth"), "--output_dir", str(tmp_path / "o")])
        )


def test_the_recipe_is_the_published_one():
    args = detect.get_args(["--recipe", "coco", "--model", "convnextv2_base", "--data_path", "coco"])
    expected = dict(blr=8e-4, lr=None, epochs=36, steps=[27, 33], layer_decay=0.95, drop_path=0.4, warmup_updates=1000, nms="soft")
    expected |= dict(input_size=1024, test_size=[800, 1333], jitter=(0.1, 2.0), weight_decay=0.05, published_heads=True)
    assert {name: getattr(args, name) for name in expected} == expected and math.isclose(args.blr * 32 / 256, 1e-4)


@pytest.mark.slow
def test_eight_pictures_are_learned_by_heart(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path / "coco", split, 8, 0, size=96)
    flags = dict(
        input_size=96, test_size=(96, 96), fpn_dim=32, box_dim=64, mask_dim=16, regions=32, proposals=(100, 50), batch_size=4
    )
    more = dict(epochs=240, eval_freq=240, augmentation="none", lr=2e-3, schedule="cosine", log_every=20, save_ckpt_freq=240)
    run(tmp_path / "coco", tmp_path / "run", **flags, **more)
    assert json.loads((tmp_path / "run/scores.json").read_text())["box"]["AP"] > 0.9
