"""COCO's format and COCO's evaluation: annotations in, checked; detections out; the twelve numbers, by pycocotools.

A data set is a dictionary with "images", "annotations" and "categories", as in an annotation file. Boxes are (left, top, width,
height) there, and corners (x1, y1, x2, y2) in tensors. Labels are 1 .. K, in the order of category ids; 0 is the background.
"""

import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

from plumbing.script import UserError, one_line

# COCO's twelve numbers, in the order of pycocotools: average precision and recall over IoU .5 to .95, at one IoU, by size of
# object, and by the number of detections an image.
NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NUMBERS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def _pycocotools():
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError:
        raise UserError("detection needs the package pycocotools: pip install pycocotools") from None
    return pycocotools


# --- annotations in ---------------------------------------------------------------------------------------------------


def read_annotations(path: str | Path) -> tuple[dict, list[str]]:
    """A COCO file, checked, its annotations numbered anew; and lines that say what was left out. UserError if it is none.

    Left out are boxes without area, or outside of their image.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read the annotations {path} ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON file of annotations ({error})") from None
    needed = {"images": ("id", "file_name", "width", "height"), "annotations": ("image_id", "category_id", "bbox")}
    for name, fields in (needed | {"categories": ("id", "name")}).items():
        rows = found.get(name) if isinstance(found, dict) else None
        if not isinstance(rows, list):
            raise UserError(f'{path} has no list "{name}"; annotations in COCO\'s format have images, annotations and categories')
        for row in rows:
            if missing := [field for field in fields if not isinstance(row, dict) or field not in row]:
                raise UserError(f'{path}: an entry of "{name}" lacks {", ".join(missing)}: {_short(row)}')
    if not found["images"] or not found["categories"]:
        raise UserError(f"{path} has {len(found['images'])} images and {len(found['categories'])} categories; both are needed")
    for name in ("images", "categories"):
        ids = [row["id"] for row in found[name]]
        if len(set(ids)) < len(ids):
            twice = next(each for each in ids if ids.count(each) > 1)
            raise UserError(f'{path}: the id {twice} stands more than once in "{name}"; ids must differ')

    images, categories = ({row["id"]: row for row in found[name]} for name in ("images", "categories"))
    kept, lines = [], []
    for row in found["annotations"]:
        for kind, known in (("image", images), ("category", categories)):
            if row[f"{kind}_id"] not in known:
                raise UserError(f"{path}: an annotation's {kind}_id {row[f'{kind}_id']} is no id of the file's: {_short(row)}")
        box = row["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) and math.isfinite(x) for x in box)):
            raise UserError(f"{path}: a bbox is not four numbers, left, top, width, height: {_short(row)}")
        image, (x, y, width, height) = images[row["image_id"]], box
        if min(x + width, image["width"]) - max(x, 0) >= 1e-2 and min(y + height, image["height"]) - max(y, 0) >= 1e-2:
            row = row | {"iscrowd": int(row.get("iscrowd", 0))}
            if row["iscrowd"] and not row.get("segmentation"):
                row["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
            if "area" not in row:
                code = row.get("segmentation")
                row["area"] = int(decode_mask(code, image["height"], image["width"]).sum()) if code else width * height
            # Counted from 1: the evaluation never matches an annotation of id 0, and ids may be missing or stand twice.
            kept.append(row | {"id": len(kept) + 1})
    if len(kept) < len(found["annotations"]):
        lines.append(f"{path}: {len(found['annotations']) - len(kept)} boxes without area, or outside of their image, are left out")
    if not kept:
        raise UserError(f"{path} has no box of any object; give annotated images")
    return {"images": found["images"], "annotations": kept, "categories": sorted(found["categories"], key=_id)}, lines


def _id(row: dict):
    return row["id"]


def _short(row) -> str:
    text = one_line(str(row))
    return text if len(text) < 100 else f"{text[:100]}..."


def has_masks(data_set: dict) -> bool:
    """Whether every object (crowds aside) has a polygon or a run-length code."""
    return all(row.get("segmentation") for row in data_set["annotations"] if not row["iscrowd"])


class Annotations:
    """The objects of each image of a data set, as tensors."""

    def __init__(self, data_set: dict, masks: bool):
        self.data_set, self.masks = data_set, masks
        self.labels = {row["id"]: label for label, row in enumerate(data_set["categories"], start=1)}
        self.of_image = {row["id"]: [] for row in data_set["images"]}
        for row in data_set["annotations"]:
            if not row["iscrowd"]:
                self.of_image[row["image_id"]].append(row)

    def target(self, index: int) -> dict[str, torch.Tensor]:
        """boxes (n, 4) float32, labels (n,) int64 and, of data with masks, masks (n, H, W) uint8, of image number `index`.

        Crowds are left out: they are regions that hold many objects. UserError for a mask that is none.
        """
        image = self.data_set["images"][index]
        rows, height, width = self.of_image[image["id"]], image["height"], image["width"]
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # left, top, width, height -> corners
        boxes = boxes.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
        target = {"boxes": boxes, "labels": torch.tensor([self.labels[row["category_id"]] for row in rows], dtype=torch.int64)}
        if self.masks:
            masks = [decode_mask(row["segmentation"], height, width) for row in rows]
            target["masks"] = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
        return target


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Polygons, or a run-length code of either kind -> uint8 (height, width)."""
    mask = _pycocotools().mask
    try:
        if isinstance(segmentation, list):
            code = mask.merge(mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            code = mask.frPyObjects(segmentation, height, width)
        else:
            code = segmentation
        decoded = mask.decode(code)
        if decoded.shape != (height, width):
            raise ValueError(f"it is {decoded.shape[1]} x {decoded.shape[0]} pixels, its image {width} x {height}")
    except Exception as error:  # pycocotools raises many types for what is no mask
        raise UserError(
            f"an annotation's segmentation is no polygon and no run-length code ({error}): {_short(segmentation)}"
        ) from None
    return decoded


def encode_mask(mask: np.ndarray) -> dict:
    """A mask (H, W) -> a run-length code that JSON can hold."""
    code = _pycocotools().mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return code | {"counts": code["counts"].decode()}


# --- detections out, and what they are worth ----------------------------------------------------------------------------


def as_results(found: dict[str, torch.Tensor], image_id: int, category_ids: list[int]) -> list[dict]:
    """One image's detections (boxes, labels, scores, and masks as probabilities (n, 1, H, W)) in COCO's format of results."""
    boxes = found["boxes"].float().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    rows = []
    for k, (box, label, score) in enumerate(zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist())):
        row = {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": [round(x, 3) for x in box], "score": score}
        if "masks" in found:
            row["segmentation"] = encode_mask((found["masks"][k, 0] > 0.5).cpu().numpy())
        rows.append(row)
    return rows


def score(data_set: dict, found: dict[int, list[dict]], kinds: tuple[str, ...]) -> dict:
    """What detections, by index of the image, are worth on these images: {"images": number, "box": COCO's twelve numbers,
    "box_AP_by_class": by category} and the same for "mask", as `kinds` say. They are shares of one, and None where there is no such object.
    """
    ids = [data_set["images"][index]["id"] for index in found]
    results, content = [row for index in sorted(found) for row in found[index]], {"images": len(found)}
    for kind in kinds:
        content[kind], content[f"{kind}_AP_by_class"] = score_one(data_set, results, ids, {"box": "bbox", "mask": "segm"}[kind])
    return content


def score_one(
    data_set: dict, results: list[dict], image_ids: list[int], kind: str
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """COCO's twelve numbers of `results` on these images, and AP by category; kind: "bbox" or "segm". None: there is no such object."""
    tools = _pycocotools()
    with redirect_stdout(io.StringIO()):  # it prints what it does
        truth = tools.coco.COCO()
        # It writes into what it is given.
        truth.dataset = {name: [dict(row) for row in rows] for name, rows in data_set.items()}
        truth.createIndex()
        # With a box at hand pycocotools would sort masks by the size of their box.
        results = [{name: value for name, value in row.items() if kind == "bbox" or name != "bbox"} for row in results]
        found = truth.loadRes(results) if results else tools.coco.COCO()
        evaluation = tools.cocoeval.COCOeval(truth, found, kind)
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.params.catIds = [row["id"] for row in data_set["categories"]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = {name: _number(value) for name, value in zip(NUMBERS, evaluation.stats.tolist())}
    precision = evaluation.eval["precision"][..., 0, -1]  # (IoU, recall, category), of all sizes, 100 detections
    by_category = {}
    for k, row in enumerate(data_set["categories"]):
        values = precision[:, :, k][precision[:, :, k] > -1]
        by_category[row["name"]] = float(values.mean()) if values.size else None
    return numbers, by_category


def _number(value: float) -> float | None:
    return None if value == -1 else value  # which JSON has a word for


def embedded_annotations(kinds: np.ndarray, masks: np.ndarray, names: tuple[str, ...], visible: float) -> dict:
    """Drawn shapes, kinds (n, k) and masks (n, k, S, S), as a data set; what hides below `visible` pixels is left out."""
    size, rows = masks.shape[-1], []
    for image, (kinds_here, masks_here) in enumerate(zip(kinds, masks)):
        for kind, mask in zip(kinds_here.tolist(), masks_here):
            if mask.sum() >= visible:
                ys, xs = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
                box = [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)]
                rows.append({"id": len(rows) + 1, "image_id": image, "category_id": kind + 1, "bbox": box, "iscrowd": 0})
                rows[-1] |= {"area": int(mask.sum()), "segmentation": encode_mask(mask)}
    images = [{"id": k, "file_name": f"drawn {k}", "width": size, "height": size} for k in range(len(kinds))]
    return {"images": images, "annotations": rows, "categories": [{"id": k + 1, "name": name} for k, name in enumerate(names)]}
