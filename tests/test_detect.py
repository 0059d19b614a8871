"""Claims about detect.py and plumbing/coco.py, each against something independent."""

import argparse
import json
import math
import os
import re
from collections import Counter, OrderedDict
from copy import deepcopy
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import CPU, TINY, Killed, layer_groups, log_of, randomised, read_log, save_noise, words, write_coco
from PIL import Image
from stress import fork, wait
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, roi_align

import detect
import weights
from data import STATISTICS
from detect import FineAnchors, MaskRCNN, soft_nms
from model import MODELS, ConvNeXt
from plumbing import coco, tasks
from plumbing.files import UserError, find_checkpoints, load_file, save_tensors
from plumbing.loading import mix_seed
from plumbing.shapes import SHAPES, draw_scenes

pytestmark = pytest.mark.usefixtures("small_models")
SMALL = dict(input_size=48, stem_stride=2, fpn_dim=8, box_dim=16, mask_dim=8, regions=8, proposals=(20, 10), epochs=2)
SMALL |= dict(anchor_scale=4, batch_size=2, num_workers=0, log_every=1, device="cpu", lr=1e-3, jitter=(0.7, 1.4))
helpers.FLAGS[detect] = SMALL | dict(group_norm=False, schedule="steps", clip_grad=1e9)
run = partial(helpers.run, detect)
encoder = partial(ConvNeXt, **TINY, num_classes=0)


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, count in (("train", 6), ("val", 3)):
        write_coco(tmp_path / "coco", split, count, seed=len(split))
    return tmp_path / "coco"


def get_args(data_path=None, **flags) -> argparse.Namespace:
    return detect.get_args(words(data_path=data_path, **helpers.FLAGS[detect] | flags))


def load(data_path, split="train", **flags) -> detect.Scenes:
    return detect.load_scenes(get_args(data_path, **flags), split)


def read_json(path: Path):
    return json.loads(path.read_text())


# --- annotations, images and scores -----------------------------------------------------------------------------------


def each(kind, **values):  # of the images, categories or annotations; a function takes the row
    def change(data_set):
        for row in data_set[kind]:
            row.update({key: value(row) if callable(value) else value for key, value in values.items()})

    return change


def as_counts(row):  # run lengths as a list of numbers, the first of zeros
    mask = np.append(0, coco.rle.decode(row["segmentation"]).flatten(order="F"))
    ends = np.append(np.flatnonzero(np.diff(mask)), 48 * 48)
    return {"size": [48, 48], "counts": np.diff(ends, prepend=0).tolist()}


def around(row):  # the box as a polygon
    x, y, w, h = row["bbox"]
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def write_rectangle(root: Path, box: list[int], size: tuple[int, int]) -> None:
    """One image to train on, black but for a white rectangle, its only object; turned, and upright by its EXIF."""
    row = {"id": 1, "category_id": 1, "image_id": 0, "iscrowd": 0, "bbox": box}
    data_set = {"images": [{"id": 0, "file_name": "000.png"}], "annotations": [row | {"segmentation": around(row)}]}
    write_coco(root, "train", 1, 0, change=lambda drawn: drawn.update(data_set))
    image, exif = Image.new("RGB", size), Image.Exif()
    image.paste("white", (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(root / "train2017/000.png", exif=exif)


def test_scores_equal_those_of_another_implementation(tmp_path):
    faster_coco_eval = pytest.importorskip("faster_coco_eval")
    write_coco(tmp_path, "val", 12, 3, size=128, change=CHANGES["crowds"])
    scenes, detections = load(tmp_path, "val"), {}
    torch.manual_seed(0)
    for index, rows in enumerate(scenes.objects):
        target, n = coco.to_target(rows, scenes.category_ids, (128, 128), True), len(rows)
        target["boxes"][:, 2:] += 12 * torch.rand(n, 2)
        target["labels"] = torch.where(torch.rand(n) < 0.8, target["labels"], 1)
        output = target | {"scores": torch.rand(n), "masks": target["masks"].roll(2, 1)[:, None]}
        detections[index] = coco.as_results(output, index, scenes.category_ids)
    scores = coco.evaluate(scenes.data_set, detections, ("box", "mask"))
    for kind, name, unused in (("box", "bbox", None), ("mask", "segm", "bbox")):
        rows = [{k: v for k, v in row.items() if k != unused} for rows in detections.values() for row in rows]
        truth = faster_coco_eval.COCO(scenes.data_set)
        evaluation = faster_coco_eval.COCOeval_faster(truth, truth.loadRes(rows), name)
        evaluation.run()
        expected = [None if x == -1 else pytest.approx(x, abs=1e-12) for x in evaluation.stats[:12]]
        assert list(scores[kind].values()) == expected and 0.1 < scores[kind]["AP75"] < scores[kind]["AP50"] < 0.99


WRONG = [  # what is wrong with the whole file
    (lambda d: d.pop("categories"), "is not in COCO's format: it lacks 'categories'; give --train_annotations"),
    (lambda d: d["images"][2].update(id=[1]), "cannot read the annotations .*, not 'list'"),
    (lambda d: d["images"].append(d["images"][0]), "4 images have 3 different ids"),
    (lambda d: d["categories"].append({"id": "3", "name": "x"}), "6 categories have 5 different ids"),
    (each("annotations", iscrowd=1), "no object to learn from, only \\d crowds"),
    (each("images", file_name="x"), "val2017 has no image of"),
    (each("annotations", bbox=lambda row: [x / 48 for x in row["bbox"]]), "\\d whose bbox is in fractions"),
    (each("annotations", bbox=lambda row: around(row)[0][:2] + around(row)[0][4:6]), "each bbox seems to be corners"),
    (each("annotations", segmentation=[[1, 2, 3, 4]]), "segmentation .* try --no-masks"),
    (lambda d: d["images"][0].update(width=50), "000.png is 48 x 48 pixels, and 50 x 48 there; was it scaled"),
    (lambda d: d.update(annotations=d["annotations"][-1:]), "these 2 images show no object; use more \\(--val_limit"),
]
COUNTS = [100, 200], [48**2, 9], [48**2 + 9, -9], [0.5, 48**2 - 0.5], "PPP", "T3X6", "", "é"  # of 48 x 48 pixels
NO_MASKS = [{"size": [48, 48], "counts": counts} for counts in COUNTS]
NO_MASKS += [{"size": [4, 4], "counts": [16]}, {"counts": "T3X6"}, "mask", [1] * 6, [[1]], [[1, 2, 3, 4, 5, 6, 7]]]
NO_MASKS += [[[1, 2, 30, math.nan, 5, 6]], [[1, 2, 1e9, 40, 5, 6]], [["a"] * 6]]
UNKNOWN = "without a bbox, or of an image_id or category_id that the file lacks"
LEFT_OUT = {  # what is wrong with one annotation
    UNKNOWN: [dict(bbox=None), dict(category_id=77), dict(image_id=[0])],
    "whose bbox is not": [dict(bbox=[1]), dict(bbox=[1, 2, 3, math.nan]), dict(bbox="12")],
    "whose bbox has no area, or none inside": [dict(bbox=[9, 9, 0, 9]), dict(bbox=[60, 1, 9, 9])],
    "whose bbox is mostly outside": [dict(bbox=[9, 9, 500, 9])],
    "whose segmentation is no": [dict(segmentation=code) for code in NO_MASKS],
}


@pytest.mark.parametrize(("change", "reason"), WRONG)
def test_a_file_that_cannot_be_meant_is_refused_in_evaluation_too(tmp_path, change, reason):
    write_coco(tmp_path, "val", 3, 0, change=change)
    with pytest.raises(UserError, match=reason) as caught:
        load(tmp_path, "val", val_limit=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("reason", "change"), [(reason, change) for reason in LEFT_OUT for change in LEFT_OUT[reason]])
def test_an_annotation_that_cannot_be_used_is_left_out_and_counted(tmp_path, capsys, change, reason):
    data_set = write_coco(tmp_path, "train", 3, 0, change=lambda data_set: data_set["annotations"][0].update(change))
    rows = data_set["annotations"]
    scenes, lines, counts = load(tmp_path), capsys.readouterr().out, Counter(row["category_id"] for row in rows[1:])
    assert f"left out of {len(rows)} annotations: 1 {reason}" in lines and "first: annotations[0]" in lines
    assert f"train: 3 images, {len(rows) - 1} objects of {len(SHAPES)} classes: " in lines and scenes.masks
    assert all(f" {count} {SHAPES[number - 1]}" in lines for number, count in counts.items())
    boxes = torch.cat([scenes.read(index)[1]["boxes"] for index in range(3)])
    assert boxes[:, :2].tolist() == [row["bbox"][:2] for row in rows[1:]]


CHANGES = {"crowds": each("annotations", iscrowd=lambda row: row["id"] % 3 == 0)}
CHANGES |= {f"{name} masks": each("annotations", segmentation=code) for name, code in (("no", None), ("box", around))}
TYPES = {f"iscrowd {value!r}": each("annotations", iscrowd=value) for value in (None, "", "0", False)}
TYPES |= {f"area {value!r}": each("annotations", area=value) for value in (None, -1, "", math.nan)}
TYPES |= {f"size {value!r}": each("images", width=value, height=value) for value in (None, 48.0, 0, -1, "48")}
TYPES |= {"ids of two types": each("annotations", image_id=lambda row: str(row["image_id"]))}
TYPES |= {"text": each("annotations", bbox=lambda row: [*map(str, row["bbox"])], area=lambda row: str(row["area"]))}
TYPES |= {"counts": each("annotations", segmentation=as_counts)}
TYPES |= {"ids from 0": each("annotations", id=lambda row: row["id"] - 1)}
TYPES |= {"back slashes": each("images", file_name=lambda row: ".\\" + row["file_name"])}


@pytest.mark.parametrize("name", [*CHANGES, *TYPES])
def test_types_that_tools_write_become_cocos_and_the_truth_scores_one(tmp_path, name):
    write_coco(tmp_path / "plain", "val", 3, 0)
    write_coco(tmp_path / "other", "val", 3, 0, change=(CHANGES | TYPES)[name])
    path = tmp_path / "other/annotations/instances_val2017.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as Windows does
    plain, other = load(tmp_path / "plain", "val"), load(tmp_path / "other", "val")
    assert other.objects == plain.objects or name in CHANGES
    detections, kinds = {}, ("box", "mask") if other.masks else ("box",)
    for index, rows in enumerate(other.objects):
        target = coco.to_target(rows, other.category_ids, (48, 48), other.masks) | {"scores": torch.ones(len(rows))}
        target |= {"masks": 0.4 + 0.2 * target["masks"][:, None]} if other.masks else {}  # probabilities
        detections[index] = coco.as_results(target, other.data_set["images"][index]["id"], other.category_ids)
    assert (name == "no masks") == (kinds == ("box",))
    for searched in (detections, {1: detections[1]}):  # images that were not searched do not count
        scores = coco.evaluate(other.data_set, searched, kinds)
        assert scores["images"] == len(searched)
        for kind in kinds:
            assert scores[kind]["AP"] == pytest.approx(1) == scores[kind]["AP75"]
            assert all(value in (None, pytest.approx(1)) for value in scores[f"{kind}_AP_by_class"].values())


LAYOUTS = [  # annotations, folder and name of images
    ("{}/_annotations.coco.json", "{}", "{}"),  # Roboflow
    ("annotations/instances_{}.json", "images/{}", "{}"),
    ("annotations/instances_{}2017.json", "images/{}2017", "{}"),
    ("annotations/instances_default.json", "images", "{}"),  # CVAT
    ("annotations/instances_default.json", "images/default/sub", "sub/{}"),  # CVAT, with folders
]


@pytest.mark.parametrize(("annotations", "images", "name"), LAYOUTS)
def test_layouts_of_annotation_tools_are_found(tmp_path, annotations, images, name):
    single, root = "default" in annotations, tmp_path / "data"
    for split, count in (dict(train=10) if single else dict(train=4, valid=3)).items():
        write_coco(tmp_path, split, count, 0, 48, each("images", file_name=lambda row: name.format(row["file_name"])))
        for source, target in (f"{split}2017", images), (f"annotations/instances_{split}2017.json", annotations):
            os.renames(tmp_path / source, root / target.format(split))
    parts = [load(root, split, holdout=0.3 if single else None) for split in ("train", "val")]
    assert [len(part) for part in parts] == ([7, 3] if single else [4, 3])
    assert not single or len({*parts[0].items, *parts[1].items}) == 10
    assert all(part.objects[0] and part.read(0)[0].size == (48, 48) for part in parts)


def test_crowds_get_masks_and_are_no_targets_and_labels_follow_ids(tmp_path):
    def change(data_set: dict) -> None:
        data_set["annotations"][0].update(iscrowd=1, segmentation=None, area=None)
        data_set["categories"].reverse()

    rows, scenes = write_coco(tmp_path, "train", 3, 0, change=change)["annotations"], load(tmp_path)
    crowd, labels = scenes.data_set["annotations"][0], [scenes.read(index)[1]["labels"] for index in range(3)]
    assert crowd["area"] == math.prod(crowd["bbox"][2:]) == coco.rle.area(crowd["segmentation"]) and scenes.masks
    assert torch.cat(labels).tolist() == [row["category_id"] for row in rows[1:]] and scenes.classes == list(SHAPES)


def test_drawn_objects_have_tight_boxes_and_the_better_ones_colour_where_they_overlap():
    _, kinds, masks = draw_scenes(50, 0, 160)
    rows = coco.embedded_annotations(kinds, masks, SHAPES, 20)["annotations"]
    assert len(rows) == (masks.sum(axis=(2, 3)) >= 20).sum()
    for row in rows:
        ys, xs = coco.rle.decode(row["segmentation"]).nonzero()
        assert row["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1] and row["area"] == len(xs) >= 20
    largest = max(rows, key=lambda row: row["area"])  # most of which no name covers
    rows = [largest | {"category_id": 1 + k, "score": 0.5 + k / 10} for k in range(2)]
    white, inside = Image.new("RGB", (160, 160), "white"), coco.rle.decode(largest["segmentation"]).astype(bool)
    drawings = (rows, "ab"), (rows[1:], "ab"), (rows[:1], "ab"), (rows[:1], "a")  # the last one of one class
    pictures = [coco.draw_objects(white, part, dict(enumerate(names, start=1))) for part, names in drawings]
    both, better, other, unnamed = map(np.asarray, pictures)
    same = (both == better).all(axis=2)[inside].mean(), (both == other).all(axis=2)[inside].mean()
    (x, y, w, h), name = largest["bbox"], unnamed != other
    assert same[0] > 0.5 > same[1] and name.any() and not name[y : y + h, x : x + w].any()
    assert coco.draw_objects(Image.new("RGB", (4000, 3000)), [], {}).size == (1600, 1200)
    assert coco.draw_objects(Image.new("RGB", (40, 20)), [], {}, side=80).size == (80, 40)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("name", ["jitter", "none"])
def test_boxes_and_masks_follow_their_image(tmp_path, name, masks):
    """Wherever a white rectangle comes to lie, mask and box agree; half of the images are mirrored."""
    write_rectangle(tmp_path, [10, 20, 30, 30], (80, 60))
    scenes = load(tmp_path, input_size=64, test_size=(45, 70), jitter=(0.6, 1.6), augmentation=name, masks=masks)
    mirrored = 0
    for seen, target in (scenes[epoch, 0] for epoch in range(24)):
        assert seen.shape == ((3, 64, 64) if name == "jitter" else (3, 45, 60)) and ("masks" in target) == masks
        for box in target["boxes"].tolist():  # none where a crop left nothing
            assert box == pytest.approx(Image.fromarray((seen.amin(dim=0) > 127).numpy()).getbbox(), abs=1.5)
            assert target["labels"].tolist() == [1] and box[2] - box[0] >= 1 <= box[3] - box[1]
            mirrored += box[0] > seen.shape[2] - box[2]
            if masks:
                (mask,) = target["masks"]
                assert ((seen.amin(dim=0) > 150) != mask.bool()).float().mean() < 0.05
                assert tuple(box) == Image.fromarray(mask.numpy()).getbbox()
    assert name == "jitter" or 6 <= mirrored <= 18


# --- the network ------------------------------------------------------------------------------------------------------


def test_soft_nms_is_the_papers_loop_over_all_boxes():
    torch.manual_seed(0)
    corners, scores, labels = 30 * torch.rand(40, 2), torch.rand(40), torch.randint(1, 3, (40,))
    boxes = torch.cat([corners, corners + 5 + 15 * torch.rand(40, 2)], dim=1)
    left, now, expected = set(range(40)), scores.tolist(), []
    while left:  # arXiv 1704.04503, Fig. 3, with the linear rule
        best = max(left, key=lambda k: now[k])
        left.remove(best)
        expected += [(best, now[best])] if now[best] >= 1e-3 else []
        for k in left:
            iou = float(box_iou(boxes[best][None], boxes[k][None]))
            now[k] *= 1 - iou if labels[k] == labels[best] and iou > 0.5 else 1
    chosen, kept = soft_nms(boxes, scores, labels, limit=25)
    assert chosen.tolist() == [k for k, _ in expected[:25]]
    assert kept.tolist() == pytest.approx([score for _, score in expected[:25]])

    heads = MaskRCNN(encoder(), 1, 8, 8, 8, nms="soft", box_score_thresh=0.0).roi_heads
    boxes = torch.tensor([[8.0, 8, 40, 40]] * 150 + [[60.0, 60, 90, 90]])  # the worst is kept, since it overlaps none
    logits = torch.stack([torch.zeros(151), torch.linspace(3, -3, 151)], dim=1)
    (kept,), *_ = heads.postprocess_detections(logits, torch.zeros(151, 8), [boxes], [(100, 100)])
    assert len(kept) <= 100 and [60.0, 60, 90, 90] in kept.tolist()


@torch.no_grad()
@pytest.mark.parametrize("size", [(60, 90), (4, 400), (400, 4)])
def test_masks_are_pasted_one_by_one_and_strips_are_searched(size):
    detector = randomised(MaskRCNN(encoder(), 3, 8, 8, 8, min_size=48, max_size=64, box_score_thresh=0)).eval()
    image = torch.rand(3, *size)
    rows = coco.as_results(detect.search(detector, image), 0, [1, 2, 3])
    if min(size) > 4:
        assert rows == coco.as_results(detector([image])[0], 0, [1, 2, 3]) and len(rows) == 100
    for row in rows:
        (x, y, w, h), mask = row["bbox"], coco.rle.decode(row["segmentation"])
        assert 0 <= x <= x + w <= size[1] + 0.01 and 0 <= y <= y + h <= size[0] + 0.01 and mask.shape == size


def test_strips_are_trained_on(tmp_path):
    write_rectangle(tmp_path, [100, 1, 60, 10], (1200, 12))
    scenes = load(tmp_path, input_size=64, jitter=(0.1, 8))
    samples = [scenes[epoch, 0] for epoch in range(40)]
    assert {image.shape for image, _ in samples} == {(3, 64, 64)} and not scenes.unreadable.any()
    assert sum(len(target["boxes"]) for _, target in samples) >= 2


def test_memory_is_estimated_before_the_first_update(folder, tmp_path, monkeypatch):
    def measure(net, step, *_):  # what is kept for the backward pass
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            step()
        sizes.append(sum(kept))

    with pytest.raises(UserError, match="needs .* GiB of memory, and there are .*; lower --batch_size"):
        run(folder, tmp_path, regions=10**7)
    args, sizes = get_args(folder, masks=True, input_size=96), []
    monkeypatch.setattr(tasks, "check_memory", measure)
    detect.check_memory(args, len(SHAPES), 2, CPU)
    images, targets = zip(*(load(folder, input_size=96, jitter=(1, 1.01))[0, index] for index in range(2)))
    detector = detect.make_detector(args, len(SHAPES))
    measure(detector, lambda: detector([image / 255 for image in images], list(targets)))
    assert 0.5 * sizes[1] < sizes[0] < 2 * sizes[1]


@pytest.mark.parametrize("published", [False, True])
def test_levels_follow_the_anchors(published):
    """With anchors of 4 strides, a box of up to 14 cells comes from the finest map, one of up to 28 from the next."""
    pool = MaskRCNN(encoder(), 2, 8, 8, 8, anchor_scale=4, published_heads=published).roi_heads.box_roi_pool
    maps = {str(k): torch.randn(1, 8, 64 >> k, 64 >> k) for k in range(4)}
    for side, level in ((20, 0), (50, 0), (60, 1), (100, 1), (115, 2), (220, 2), (250, 3)):
        box = torch.tensor([[3.0, 5, 3 + side, 5 + side]])
        expected = roi_align(maps[str(level)], [box], 7, 0.25 / 2**level, 0 if published else 1, aligned=published)
        torch.testing.assert_close(pool(maps, [box], [(256, 256)]), expected)


def test_published_heads_differ_from_torchvisions_as_documented():
    plain, published = (MaskRCNN(encoder(stem_stride=2), 3, 64, 8, 8, published_heads=value) for value in (0, 1))
    assert plain.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (128,), (256,))
    for width, block in zip((8, 16, 32), published.backbone.fpn.inner_blocks):  # Glorot's, not torchvision's
        assert block[0].weight.std().item() == pytest.approx(math.sqrt(2 / (width + 64)), rel=0.1)

    # An image of 800 x 1088 has 13 x 17 cells on the fifth level: 64 pixels apart, by division 61 and 64.
    sizes = [(800 // stride + (stride == 64), 1088 // stride) for stride in (4, 8, 16, 32, 64)]
    images, maps = ImageList(torch.zeros(1, 3, 800, 1088), [(800, 1088)]), [torch.zeros(1, 1, *size) for size in sizes]
    (anchors,) = FineAnchors(((8.0,),) * 5, ((0.5, 1.0, 2.0),) * 5)(images, maps)
    half = torch.tensor([[4 / math.sqrt(ratio), 4 * math.sqrt(ratio)] for ratio in (0.5, 1, 2)])  # height / width
    cells = [torch.cartesian_prod(torch.arange(height), torch.arange(width)) for height, width in sizes]
    centres = torch.cat([stride * yx.flip(1) for stride, yx in zip((4, 8, 16, 32, 64), cells)])[:, None]  # x, y
    torch.testing.assert_close(anchors, torch.cat([centres - half, centres + half], dim=2).reshape(-1, 4))


@torch.no_grad()
def test_boxes_are_computed_in_float32_and_parameters_are_as_many_as_documented():
    detector = randomised(MaskRCNN(encoder(), 3, 8, 8, 8, min_size=64, max_size=64, box_score_thresh=0)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        (output,) = detector([torch.rand(3, 64, 64)])
        objectness, deltas = detector.rpn.head([torch.rand(1, 8, 4, 4)])
    tensors = output["boxes"], output["scores"], output["masks"], objectness[0], deltas[0]
    assert {tensor.dtype for tensor in tensors} == {torch.float32} and len(output["boxes"])

    with torch.device("meta"):  # 48.15 million for Tiny and COCO's 80 classes (REFERENCE: with torchvision's heads)
        detector = MaskRCNN(ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), num_classes=0), 80)
    assert sum(p.numel() for p in detector.parameters()) == pytest.approx(48.15e6, abs=0.01e6)


# --- training ---------------------------------------------------------------------------------------------------------


def distance(a: dict, b: dict) -> float:
    return sum((a[name] - b[name]).norm().item() ** 2 for name in a) ** 0.5


def test_training_is_a_plain_loop(folder, tmp_path):
    """From a classifier, three updates of two images: torchvision's losses, AdamW, a warm-up by the update, a step."""
    classifier = randomised(MODELS["convnextv2_atto"](num_classes=7, stem_stride=2)).state_dict()
    save_tensors(tmp_path / "classifier.pth", {"model": classifier})
    flags = dict(seed=5, epochs=1, lr=2e-3, warmup_updates=2, steps=[0.5], layer_decay=0.8, weight_decay=0.1)
    flags |= dict(finetune=tmp_path / "classifier.pth")
    trained, scenes = run(folder, tmp_path, disable_eval=True, **flags)["model"], load(folder, **flags)
    torch.manual_seed(5)
    net = detect.make_detector(get_args(folder, masks=True, **flags), len(SHAPES)).train()
    net.to(memory_format=torch.channels_last)
    net.backbone.encoder.load_state_dict(classifier, strict=False)  # without its last norm and its head
    start, optimizer = deepcopy(net.state_dict()), torch.optim.AdamW(layer_groups(net, 0.8, 0.1), fused=True)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(mix_seed("order", 5, 0))).tolist()
    rates = 2e-3 * 0.001, 2e-3 * (0.001 + 0.999 / 2), 2e-3 * 0.1
    for update, (row, rate) in enumerate(zip(read_log(tmp_path), rates, strict=True)):
        images, targets = zip(*(scenes[0, index] for index in order[2 * update : 2 * update + 2]))
        torch.manual_seed(mix_seed("step", 5, 0, update, 0))
        losses = net([image / 255 for image in images], list(targets))
        assert {name: row[name] for name in losses} == pytest.approx({k: v.item() for k, v in losses.items()}, abs=2e-5)
        assert row["loss"] == pytest.approx(sum(losses.values()).item(), abs=1e-4)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.step()
    assert 0 < distance(net.state_dict(), trained) < 0.01 * distance(net.state_dict(), start)


def test_two_processes_equal_one_with_twice_the_batch_but_for_the_sampling(folder, tmp_path, monkeypatch):
    """With a fixed choice of regions, and boxes alone: the masks' loss is a mean over one process's objects."""
    randperm = torch.randperm  # of the sampler; the order of images has a generator
    monkeypatch.setattr(torch, "randperm", lambda n, **k: randperm(n, **k) if "generator" in k else torch.arange(n))
    flags = dict(masks=False, epochs=1, opt="sgd", lr=1e-2, update_freq=3, proposals=(100, 20))  # one update
    args = get_args(folder, output_dir=tmp_path / "two", **flags | dict(batch_size=1))
    wait(fork(lambda: detect.main(args), tmp_path, 2))
    one, two = run(folder, tmp_path / "one", **flags), load_file(find_checkpoints(tmp_path / "two")[-1])
    torch.manual_seed(0)
    start = detect.make_detector(get_args(folder, **flags), len(SHAPES)).state_dict()
    assert distance(one["model"], two["model"]) < 1e-4 * distance(one["model"], start)
    assert read_json(tmp_path / "two/scores.json")["images"] == 3  # each evaluated once, by one of the two


def test_the_best_has_the_highest_ap_and_one_that_does_not_exist_is_none(folder, tmp_path, monkeypatch):
    """Though AP50 disagrees; test_run.py tells which of weights and average are the best in general."""
    scores = [{"AP": None, "AP50": None}, {"AP": 0.6, "AP50": 0.1}, {"AP": 0.5, "AP50": 0.9}]
    results = iter([{"images": 3, "box": dict.fromkeys(coco.NUMBERS, 0.0) | row} for row in scores])
    monkeypatch.setattr(coco, "evaluate", lambda *_: next(results))
    run(folder, tmp_path, masks=False, epochs=3, batch_size=6)
    best = load_file(tmp_path / "checkpoint-best.pth")
    assert (best["epoch"], best["box_AP"], read_json(tmp_path / "scores.json")["box"]["AP"]) == (2, 0.6, 0.6)
    assert log_of(tmp_path, "val_box_AP") == [None, 0.6, 0.5]


def test_few_images_are_seen_in_more_epochs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(detect, "Run", lambda args, *_, **__: (_ for _ in ()).throw(Killed(args.epochs)))
    for batch_size, epochs in ((2, 334), (1, 167)):
        with pytest.raises(Killed, match=str(epochs)):
            run(folder, tmp_path, epochs=None, batch_size=batch_size)


def test_the_learning_rate_follows_its_schedule():
    def rates(**flags):
        args = argparse.Namespace(**dict(schedule="steps", steps=None, epochs=6, warmup_updates=0, min_lr=0.1) | flags)
        schedule = detect.make_schedule(argparse.Namespace(args=args, peak_lr=1.0, total=60, updates=10))
        return [schedule(update) for update in range(60)]

    assert rates() == pytest.approx([1.0] * 45 + [0.1] * 10 + [0.01] * 5)  # from 3/4 and 11/12 on
    stairs = [*np.linspace(0.001, 1, 6, endpoint=False), *[1.0] * 14, *[0.1] * 20, *[0.01] * 20]
    assert rates(warmup_updates=None, steps=[2, 4]) == pytest.approx(stairs)  # for 10% of the run
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * k / 40)) for k in range(40)]
    ramp = np.linspace(0.001, 1, 20, endpoint=False)
    assert rates(schedule="cosine", warmup_updates=20) == pytest.approx([*ramp, *cosine])


def test_boxes_without_masks_train_a_faster_rcnn_and_unreadable_images_are_named(tmp_path, capsys):
    for split in ("train", "val"):
        write_coco(tmp_path / "coco", split, 4, len(split), change=CHANGES["no masks"])
    (tmp_path / "coco/train2017/001.png").write_text("no image")
    (tmp_path / "coco/val2017/002.png").unlink()
    trained, output = run(tmp_path / "coco", tmp_path / "run", epochs=1), capsys.readouterr()
    assert {"001.png", "002.png"} <= set(re.findall(r"\d+\.png", output.err)) and "boxes alone" in output.out
    first, *_, last, _ = read_log(tmp_path / "run")
    assert "loss_box_reg" in first and "loss_mask" not in first and last["unreadable_images"] == 1
    scores = read_json(tmp_path / "run/scores.json")
    assert scores["images"] == 3 and "mask" not in scores and not any("mask" in name for name in trained["model"])
    with pytest.raises(UserError, match="--masks, but not all objects"):
        run(tmp_path / "coco", tmp_path / "other", masks=True)


def test_the_drawn_images_are_detected(tmp_path):
    run(None, tmp_path, epochs=1, embedded_images=(10, 3))
    assert read_json(tmp_path / "config.json")["images"] == 10 and read_json(tmp_path / "scores.json")["images"] == 3


# --- weights, evaluation and prediction -------------------------------------------------------------------------------


def only_use(task, path, directory, **flags) -> Path:
    """Evaluate or predict with a checkpoint; the output directory."""
    flags = dict(resume=path, output_dir=directory, device="cpu", num_workers=0) | flags
    detect.main(detect.get_args([*task, *words(**flags)]))
    return directory


def test_evaluation_and_prediction_take_the_network_from_the_checkpoint(folder, tmp_path):
    content = run(folder, tmp_path / "run", nms="soft", score_threshold=0, model_ema=True, lr=1e-2, epochs=1)
    again = only_use(["--eval"], tmp_path / "run", tmp_path / "again", score_threshold=0)
    for name in ("scores.json", "detections.json"):
        assert (again / name).read_text() == (tmp_path / "run" / name).read_text()

    save_noise(tmp_path / "images/a.png", (70, 50))
    save_noise(tmp_path / "images/sub/b.jpg", (50, 70))
    (tmp_path / "images/c.png").write_text("no image")
    average, objects = content["model_ema"], []
    for states in ({}, {"model": average, "model_ema": None}, {"model_ema": None}):
        save_tensors(tmp_path / "c.pth", content | states)
        only_use(["--predict", str(tmp_path / "images")], tmp_path / "c.pth", tmp_path, score_threshold=0)
        rows = read_json(tmp_path / "predictions.json")
        objects.append([row["objects"] for row in rows])
    assert objects[0] == objects[1] != objects[2]  # the average's, if there is one
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.jpg"] and rows[0]["objects"]
    for row in rows:
        masks = {coco.rle.decode(item["mask"]).shape[::-1] for item in row["objects"]}
        assert masks | {Image.open(row["picture"]).size} == {Image.open(row["file"]).size}
        assert {item["class"] for item in row["objects"]} <= {*SHAPES}


def test_flags_of_evaluation_reach_it(folder, tmp_path):
    run(folder, tmp_path / "run", epochs=1)
    write_coco(tmp_path / "other", "val", 3, seed=9, change=each("images", id=lambda row: 2 - row["id"]))
    other, seen = tmp_path / "other", set()
    for flags in (
        {}, dict(nms="soft"), dict(test_size=(64, 64)), dict(val_limit=2), dict(score_threshold=0.095),
        dict(proposals=(5, 2)), dict(data_path=other), dict(val_images=other / "val2017", nms="soft"),
        dict(val_annotations=other / "annotations/instances_val2017.json", val_images=other / "val2017", nms="soft"),
    ):  # fmt: skip
        detections = (only_use(["--eval"], tmp_path / "run", tmp_path, **flags) / "detections.json").read_text()
        assert detections not in seen, flags
        seen.add(detections)


@torch.no_grad()
def test_a_detector_of_mmdetection_computes_what_it_does_there(tmp_path):
    def block(inputs, outputs, size, activate=nn.Identity):  # mmcv's ConvModule
        conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)
        return nn.Sequential(OrderedDict(conv=conv, activate=activate()))

    widths = 8, 8, 16, 16  # of the encoder; 6 of the pyramid, 10 and 5 of the heads
    norms = {f"norm{i}": nn.LayerNorm(width, eps=1e-6) for i, width in enumerate(widths)}
    laterals, smooth = [block(width, 6, 1) for width in widths], [block(6, 6, 3) for _ in widths]
    neck = dict(lateral_convs=nn.ModuleList(laterals), fpn_convs=nn.ModuleList(smooth))
    rpn = dict(rpn_conv=nn.Conv2d(6, 6, 3, padding=1), rpn_cls=nn.Conv2d(6, 3, 1), rpn_reg=nn.Conv2d(6, 12, 1))
    layers = nn.ModuleList([nn.Linear(6 * 7 * 7, 10), nn.Linear(10, 10)])
    box = dict(shared_fcs=layers, fc_cls=nn.Linear(10, 4), fc_reg=nn.Linear(10, 12))
    convs = nn.Sequential(*(block(width, 5, 3, nn.ReLU) for width in (6, 5, 5, 5)))
    mask = dict(convs=convs, upsample=nn.ConvTranspose2d(5, 5, 2, 2), conv_logits=nn.Conv2d(5, 3, 1))
    theirs = {"backbone": norms, "neck": neck, "rpn_head": rpn, "roi_head.bbox_head": box, "roi_head.mask_head": mask}
    tensors = weights.from_native(randomised(MODELS["convnextv2_atto"](num_classes=0)).state_dict(), "mmpretrain")
    for part, modules in theirs.items():
        tensors |= {f"{part}.{name}": x for name, x in randomised(nn.ModuleDict(modules)).state_dict().items()}
    meta = {"dataset_meta": {"classes": ("dog", "cat", "zebra")}}
    save_tensors(tmp_path / "theirs.pth", {"state_dict": tensors, "meta": meta})
    args = detect.get_args(["--eval", *words(resume=tmp_path / "theirs.pth")])
    assert (args.nms, args.proposals, args.test_size, args.published_heads) == ("soft", [1000, 1000], [800, 1333], True)
    ours = detect.load_detector(args, CPU)[0]["model"]
    heads, images, close = ours.roi_heads, torch.randn(1, 3, 64, 96), torch.testing.assert_close

    stages = [stage.movedim(1, 3) for stage in ours.backbone.encoder.forward_stages(images)]
    maps = [conv(norm(x).movedim(3, 1)) for conv, norm, x in zip(laterals, norms.values(), stages)]
    for i in (2, 1, 0):
        maps[i] = maps[i] + nn.functional.interpolate(maps[i + 1], scale_factor=2, mode="nearest")
    levels = [conv(x) for conv, x in zip(smooth, maps)]
    close(list(ours.backbone(images).values()), [*levels, levels[-1][:, :, ::2, ::2]])

    x = rpn["rpn_conv"](levels[0]).relu()
    close(list(ours.rpn.head(levels[:1])), [[rpn["rpn_cls"](x)], [rpn["rpn_reg"](x)]])

    regions = torch.randn(5, 6, 7, 7)
    x = layers[1](layers[0](regions.flatten(1)).relu()).relu()
    logits, deltas = heads.box_predictor(heads.box_head(regions))
    close(logits.roll(-1, dims=1), box["fc_cls"](x))  # the background comes last there
    close(deltas[:, 4:], box["fc_reg"](x))

    regions = torch.randn(2, 6, 14, 14)
    logits = mask["conv_logits"](mask["upsample"](convs(regions)).relu())
    close(heads.mask_predictor(heads.mask_head(regions))[:, 1:], logits)


def test_values_come_from_command_line_recipe_checkpoint_and_data_set_in_this_order(folder, tmp_path, capsys):
    run(folder, tmp_path / "run", epochs=1, nms="soft", group_norm=True)
    best = ["--resume", str(tmp_path / "run")]
    args = detect.get_args(["--eval", *best])
    expected = dict(nms="soft", group_norm=True, fpn_dim=8, score_threshold=0.05, test_size=[38, 62], lr=1e-3)
    expected |= dict(data_path=str(folder), data_set="folder", output_dir=str(tmp_path / "run"), batch_size=2)
    assert expected.items() <= vars(args).items() and list(args.proposals) == [20, 10]
    assert detect.get_args(["--predict", "x.png", *best]).score_threshold == 0.5
    args = detect.get_args(["--eval", *best, "--data_set", "embedded", "--nms", "hard"])
    assert (args.data_path, args.data_set, args.nms) == (None, "embedded", "hard")
    assert detect.make_detector(args, 5).transform.image_mean == STATISTICS["folder"][0]  # as in training

    args = detect.get_args(["--recipe", "coco", "--model", "convnextv2_base", "--data_path", "coco", "--epochs", "12"])
    expected = dict(blr=8e-4, lr=None, epochs=12, steps=[27, 33], layer_decay=0.95, drop_path=0.4, warmup_updates=1000)
    expected |= dict(input_size=1024, test_size=[800, 1333], jitter=(0.1, 2.0), weight_decay=0.05, published_heads=True)
    assert expected.items() <= vars(args).items() and math.isclose(args.blr * 32 / 256, 1e-4)

    with pytest.raises(SystemExit):
        detect.get_args(["--eval", *best, "--fpn_dim", "9"])
    assert re.search("--fpn_dim 9, but .* has 8; leave --fpn_dim out", capsys.readouterr().err)
