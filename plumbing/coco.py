"""COCO's format and COCO's evaluation: annotations in, detections out, and their twelve numbers, by pycocotools.

A data set is a dictionary with "images", "annotations" and "categories", as in an annotation file. Boxes are (left,
top, width, height) there, and corners (x1, y1, x2, y2) in tensors. Labels are 1 .. K in the order of category ids; 0 is
the background.

Shapes: n objects of an image, H x W its pixels.
"""

import io
import json
import math
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from plumbing import dist
from plumbing.files import UserError, value_errors_are_the_users

# COCO's twelve numbers, in the order of pycocotools: average precision and recall over IoU .5 to .95, at one IoU, by
# size of object, and by the number of detections per image.
NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NUMBERS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
FIELDS = {"images": ("id", "file_name", "width", "height"), "annotations": ("image_id", "category_id", "bbox")}
FIELDS |= {"categories": ("id", "name")}


def _pycocotools():
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError:
        raise UserError("detection needs the package pycocotools: pip install pycocotools") from None
    return pycocotools


# --- annotations in ---------------------------------------------------------------------------------------------------


def read_annotations(path: str | Path) -> dict:
    """Read and check a COCO file, sort its categories by id, and number its annotations anew; UserError if it is none.

    Boxes without area, or outside of their image, are left out.
    """
    try:
        data_set = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the annotations {path} ({error})") from None
    for name, fields in FIELDS.items():
        rows = data_set.get(name) if isinstance(data_set, dict) else None
        if not isinstance(rows, list):
            raise UserError(f'{path} has no list "{name}"; COCO\'s format has {", ".join(FIELDS)}')
        for row in rows:
            if missing := [field for field in fields if field not in row]:
                raise UserError(f'{path}: an entry of "{name}" lacks {", ".join(missing)}: {row}')
        repeated = [number for number, times in Counter(row.get("id") for row in rows).items() if times > 1]
        if repeated and name != "annotations":
            raise UserError(f'{path}: the id {repeated[0]} stands more than once in "{name}"; ids must differ')

    images, categories = ({row["id"]: row for row in data_set[name]} for name in ("images", "categories"))
    annotations = []
    for row in data_set["annotations"]:
        for name, known in (("image_id", images), ("category_id", categories)):
            if row[name] not in known:
                raise UserError(f"{path}: an annotation's {name} {row[name]} is no id of the file's: {row}")
        box, image = row["bbox"], images[row["image_id"]]
        if not isinstance(box, list) or [type(x) in (int, float) and math.isfinite(x) for x in box] != [True] * 4:
            raise UserError(f"{path}: a bbox is not four numbers, left, top, width, height: {row}")
        x, y, width, height = box
        if min(x + width, image["width"]) - max(x, 0) < 1e-2 or min(y + height, image["height"]) - max(y, 0) < 1e-2:
            continue
        # Counted from 1: pycocotools never matches an annotation of id 0, and ids may be missing or stand twice.
        row = row | {"id": len(annotations) + 1, "iscrowd": int(row.get("iscrowd", 0))}
        if row["iscrowd"] and not row.get("segmentation"):
            row["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        if "area" not in row:
            code = row.get("segmentation")
            with value_errors_are_the_users():
                area = decode_mask(code, image["height"], image["width"]).sum() if code else width * height
            row["area"] = float(area)
        annotations.append(row)
    if left_out := len(data_set["annotations"]) - len(annotations):
        dist.say(f"{path}: {left_out} boxes without area, or outside of their image, are left out")
    if all(row["iscrowd"] for row in annotations):
        raise UserError(f"{path} has no box of any object; give annotated images")
    categories = sorted(data_set["categories"], key=lambda row: row["id"])
    return {"images": data_set["images"], "annotations": annotations, "categories": categories}


def has_masks(data_set: dict) -> bool:
    """Whether every object (crowds aside) has a polygon or a run-length code."""
    return all(row.get("segmentation") for row in data_set["annotations"] if not row["iscrowd"])


def objects_by_image(data_set: dict) -> list[list[dict]]:
    """The annotations of each image, without crowds, which are regions of many objects."""
    objects = {row["id"]: [] for row in data_set["images"]}
    for row in data_set["annotations"]:
        if not row["iscrowd"] and row["image_id"] in objects:
            objects[row["image_id"]].append(row)
    return list(objects.values())


def to_target(rows: list[dict], labels: dict[int, int], height: int, width: int, masks: bool) -> dict:
    """An image's annotations -> boxes (n, 4) float32, labels (n,) int64 and, if asked for, masks (n, H, W) uint8.

    labels: of category ids. ValueError for a mask that is none.
    """
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # left, top, width, height -> corners
    boxes = boxes.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
    target = {"boxes": boxes, "labels": torch.tensor([labels[row["category_id"]] for row in rows], dtype=torch.int64)}
    if masks:
        stacked = np.zeros((len(rows), height, width), dtype=np.uint8)
        for mask, row in zip(stacked, rows):
            mask[:] = decode_mask(row["segmentation"], height, width)
        target["masks"] = torch.from_numpy(stacked)
    return target


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Polygons, or a run-length code of either kind -> uint8 (H, W); ValueError for anything else."""
    tools = _pycocotools().mask
    try:
        code = segmentation
        if isinstance(segmentation, list):
            code = tools.merge(tools.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            code = tools.frPyObjects(segmentation, height, width)
        mask = tools.decode(code)
    except Exception as error:  # pycocotools raises many types for what is no mask
        raise ValueError(f"no polygon and no run-length code ({error}): {segmentation}") from None
    if mask.shape != (height, width):
        raise ValueError(f"a mask is {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}")
    return mask


def encode_mask(mask: np.ndarray) -> dict:
    """A mask (H, W) -> a run-length code that JSON can hold."""
    code = _pycocotools().mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return code | {"counts": code["counts"].decode()}


def embedded_annotations(kinds: np.ndarray, masks: np.ndarray, names: tuple[str, ...], visible: float) -> dict:
    """Drawn shapes, kinds (N, k) and masks (N, k, S, S), as a data set; those below `visible` pixels are left out."""
    size, rows = masks.shape[-1], []
    for image, layer in np.ndindex(kinds.shape):
        mask = masks[image, layer]
        if mask.sum() >= visible:
            ys, xs = mask.nonzero()
            left, top = int(xs.min()), int(ys.min())
            box = [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top]
            row = {"id": len(rows) + 1, "image_id": image, "category_id": int(kinds[image, layer]) + 1, "bbox": box}
            rows.append(row | {"iscrowd": 0, "area": len(xs), "segmentation": encode_mask(mask)})
    images = [{"id": k, "file_name": f"drawn {k}", "width": size, "height": size} for k in range(len(kinds))]
    categories = [{"id": k, "name": name} for k, name in enumerate(names, start=1)]
    return {"images": images, "annotations": rows, "categories": categories}


# --- detections out, their scores and their pictures ------------------------------------------------------------------


def as_results(output: dict[str, torch.Tensor], image_id: int, category_ids: list[int]) -> list[dict]:
    """One image's boxes, labels, scores, and masks as probabilities (n, 1, H, W), in COCO's format of results."""
    boxes = output["boxes"].float().cpu()
    boxes[:, 2:] -= boxes[:, :2]  # corners -> left, top, width, height
    rows = []
    for k, (box, label, score) in enumerate(zip(boxes.tolist(), output["labels"].tolist(), output["scores"].tolist())):
        box = [round(x, 3) for x in box]
        rows.append({"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score})
        if "masks" in output:
            rows[k]["segmentation"] = encode_mask((output["masks"][k, 0] > 0.5).cpu().numpy())
    return rows


def evaluate(data_set: dict, detections: dict[int, list[dict]], kinds: tuple[str, ...]) -> dict:
    """COCO's numbers for detections, given by index of the image, on these images alone.

    Returns {"images": number, "box": the twelve numbers, "box_AP_by_class": by category}, and the same for "mask", as
    `kinds` say. Numbers are fractions of one, and None where there is no such object.
    """
    tools, scores = _pycocotools(), {"images": len(detections)}
    for kind in kinds:
        # It writes into its arguments; and with a box at hand it would sort masks by the size of their box.
        rows = [dict(row) for index in sorted(detections) for row in detections[index]]
        if kind == "mask":
            rows = [{name: value for name, value in row.items() if name != "bbox"} for row in rows]
        with redirect_stdout(io.StringIO()):  # it prints what it does
            truth = tools.coco.COCO()
            truth.dataset = {name: [dict(row) for row in rows] for name, rows in data_set.items()}
            truth.createIndex()
            results = truth.loadRes(rows) if rows else tools.coco.COCO()
            evaluation = tools.cocoeval.COCOeval(truth, results, {"box": "bbox", "mask": "segm"}[kind])
            evaluation.params.imgIds = sorted(data_set["images"][index]["id"] for index in detections)
            evaluation.params.catIds = [row["id"] for row in data_set["categories"]]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = evaluation.stats.tolist()
        scores[kind] = {name: None if value == -1 else value for name, value in zip(NUMBERS, values)}
        precision = evaluation.eval["precision"][..., 0, -1]  # (IoU, recall, category), of all sizes, 100 detections
        by_class = scores[f"{kind}_AP_by_class"] = {}
        for k, row in enumerate(data_set["categories"]):
            values = precision[:, :, k][precision[:, :, k] > -1]
            by_class[row["name"]] = float(values.mean()) if values.size else None
    return scores


def draw_objects(
    image: Image.Image, rows: list[dict], names: dict[int, str], square: int | None = None
) -> torch.Tensor:
    """An image with its objects' boxes, masks, names and scores, uint8 (3, H, W).

    rows: annotations or results; names: of category ids; square: side of a white square that the image is scaled to.
    """
    import matplotlib.font_manager  # its font, at a legible size
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = square / max(image.size) if square else 1.0
    width, height = (max(1, round(side * scale)) for side in image.size)
    drawn = pil_to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
    colours = {number: to_hex(colormaps["tab20"](k % 20)) for k, number in enumerate(names)}
    rows = sorted(rows, key=lambda row: -row.get("score", 1))
    chosen = [colours[row["category_id"]] for row in rows]
    if rows and all(row.get("segmentation") for row in rows):
        masks = np.stack([decode_mask(row["segmentation"], image.height, image.width) for row in rows])
        masks = torch.nn.functional.interpolate(torch.from_numpy(masks)[None], (height, width))[0].bool()  # (n, H, W)
        masks &= (
            masks.cumsum(dim=0) == 1
        )  # a pixel of several masks is the best one's; torchvision would paint it black
        drawn = draw_segmentation_masks(drawn, masks, alpha=0.45, colors=chosen)
    if rows:
        x, y, w, h = (torch.tensor([row["bbox"] for row in rows], dtype=torch.float32) * scale).unbind(1)
        boxes = torch.stack([x, y, x + w, y + h], dim=1)
        texts = [names[row["category_id"]] + (f" {row['score']:.2f}" if "score" in row else "") for row in rows]
        size = max(10, max(width, height) // 24)
        font = dict(font=matplotlib.font_manager.findfont("DejaVu Sans"), font_size=size, fill_labels=True)
        drawn = draw_bounding_boxes(drawn, boxes, texts, chosen, width=max(1, size // 8), **font)
    if square:
        drawn = torch.nn.functional.pad(drawn, (0, square - width, 0, square - height), value=255)
    return drawn
