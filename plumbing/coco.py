"""COCO's format and COCO's evaluation: annotations in, detections out, and their twelve numbers, by pycocotools.

A data set is a dictionary with "images", "annotations" and "categories", as in an annotation file. Boxes are (left,
top, width, height) there, and corners (x1, y1, x2, y2) in tensors. Labels are 1 .. K in the order of category ids; 0 is
the background. Shapes: n objects of an image, H x W its pixels.
"""

import io
import itertools
import json
import math
from collections import Counter
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import coco, cocoeval
from pycocotools import mask as rle
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor

from plumbing import dist, maps
from plumbing.files import UserError
from plumbing.loading import opened, upright_size

# COCO's twelve numbers, in the order of pycocotools: average precision and recall over IoU .5 to .95, at one IoU, by
# size of object, and by the number of detections per image.
NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NUMBERS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
FIELDS = {"images": ("id", "file_name"), "annotations": (), "categories": ("id", "name")}
ELSEWHERE = "give --train_annotations, --train_images and the same of val, or --holdout 0.2 to split one file; "
ELSEWHERE += "the package supervision converts YOLO's and VOC's boxes (DetectionDataset)"
SCREEN = 1600  # pixels of the long side of a picture


# --- annotations in ---------------------------------------------------------------------------------------------------


def read_annotations(path: str | Path, folders: list[Path], masks: bool | None = None) -> tuple[dict, list[str]]:
    """Read a COCO file, look at it as a whole, and return the data set and its images' paths.

    Types become COCO's; ids too, numbers or else text; annotations are numbered anew, and their segmentations become
    compressed run-length codes. An annotation that cannot be used is left out and counted by reason. UserError for
    another format, boxes in other units, images of another size than annotated, and where nothing is left.

    folders: where the images may lie; the first that holds one. masks: False leaves segmentations unread.
    """
    try:
        data_set = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the annotations {path} ({error}); {ELSEWHERE}") from None
    known = {}
    for name, fields in FIELDS.items():
        rows = data_set.get(name) if isinstance(data_set, dict) else None
        if not isinstance(rows, list):
            raise UserError(f'{path} has no list "{name}"; COCO\'s format has {", ".join(FIELDS)}')
        for (k, row), field in itertools.product(enumerate(rows), fields):
            if not (isinstance(row, dict) and isinstance(row.get(field), str | int | float)):
                raise UserError(f"{path}: {name}[{k}] has no {field} that is text or a number: {row}")
        ids = [_key(row["id"]) for row in rows if fields]
        if repeated := [number for number, times in Counter(ids).items() if times > 1]:
            raise UserError(f'{path}: the id {repeated[0]} stands more than once in "{name}"; ids must differ')
        numbers = all(number.lstrip("-").isdecimal() for number in ids)
        known[name] = {number: row | {"id": int(number) if numbers else number} for number, row in zip(ids, rows)}

    images, categories = known["images"], known["categories"]
    paths, annotations, boxes, left_out = _measure(path, images, folders), [], [], {}
    for k, row in enumerate(data_set["annotations"]):
        try:
            image, category = images[_key(row["image_id"])], categories[_key(row["category_id"])]
            # Counted from 1: pycocotools never matches an annotation of id 0, and ids may be missing or stand twice.
            ids = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category["id"]}
            annotations.append(ids | _annotation(row, image["width"], image["height"], masks, boxes))
        except (KeyError, TypeError):
            left_out.setdefault("lack a bbox, or have an image_id or category_id that the file lacks", []).append(k)
        except ValueError as error:
            left_out.setdefault(str(error), []).append(k)
    x, y, right, bottom, width, height = np.array(boxes or [[0] * 6], dtype=float).T  # if they are corners
    beyond = (x + right > width + 1) | (y + bottom > height + 1)
    if beyond.mean() > 0.1 and ((x < right) & (y < bottom) & (right <= width) & (bottom <= height)).all():
        raise UserError(f"{path}: each bbox seems to be corners, x1, y1, x2, y2; COCO's is left, top, width, height")
    reasons = "; ".join(f"{len(rows):,} {why} (first: annotations[{rows[0]}])" for why, rows in left_out.items())
    reasons = reasons and f"of {len(data_set['annotations']):,} annotations, left out are {reasons}"
    if all(row["iscrowd"] for row in annotations):
        fix = reasons or "annotate single objects, with iscrowd 0"
        raise UserError(f"{path} has no box of any object, {len(annotations):,} crowds aside; {fix}")
    if reasons:
        dist.say(f"{path}: {reasons}")
    rows = sorted(categories.values(), key=lambda row: row["id"])
    categories = [{"id": row["id"], "name": str(row["name"])} for row in rows]
    return {"images": list(images.values()), "annotations": annotations, "categories": categories}, paths


def _key(number) -> str:
    return str(number).removesuffix(".0")


def _number(value, default: float = 0.0) -> float:
    try:
        return float(value) if math.isfinite(float(value)) else default
    except (TypeError, ValueError):
        return default


def _measure(path: str | Path, images: dict[str, dict], folders: list[Path]) -> list[str]:
    """Write the upright size of images into their entries, and return their files. UserError for another size there."""
    names = [str(row["file_name"]).replace("\\", "/") for row in images.values()]
    folder = next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)
    if not folder:
        raise UserError(f"{folders[0]} has no image of {path}, such as {names[:1]}; {ELSEWHERE}")
    files, unlike = [folder / name for name in names], []
    for row, file in zip(images.values(), files):
        size = annotated = round(_number(row.get("width"))), round(_number(row.get("height")))
        with suppress(Exception), opened(file) as image:  # where it is damaged, the run names and counts it
            size = upright_size(image)
        if min(annotated) > 0 and size != annotated:
            unlike.append(f"{file} is {size[0]} x {size[1]} pixels, and {annotated[0]} x {annotated[1]} there")
        row["width"], row["height"] = size
    if unlike:
        why = "was it scaled, or annotated without its EXIF orientation?"
        raise UserError(f"{path}: {len(unlike):,} of {len(names):,} images differ in size; {unlike[0]}: {why}")
    return [str(file) for file in files]


def _annotation(row: dict, width: int, height: int, masks: bool | None, boxes: list) -> dict:
    """An annotation's box, mask and area, in COCO's types; ValueError, with the reason, for one that cannot be used."""
    box = [_number(value, math.nan) for value in row["bbox"]] if isinstance(row["bbox"], list) else []
    if len(box) != 4 or math.isnan(sum(box)):
        raise ValueError("whose bbox is not four numbers, left, top, width, height")
    x, y, w, h = box
    boxes.append([*box, width, height])
    inside_x, inside_y = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
    if inside_x < 1e-2 or inside_y < 1e-2:
        raise ValueError("whose bbox has no area, or none inside its image")
    if max(box) <= 1:
        raise ValueError("whose bbox is in fractions of the image; multiply by its width and height")
    if inside_x * inside_y < w * h / 2:
        raise ValueError("whose bbox is mostly outside of its image; are these corners?")
    crowd = bool(_number(row.get("iscrowd")))
    code = row.get("segmentation") or ([[x, y, x + w, y, x + w, y + h, x, y + h]] if crowd else None)
    code = _encoded(code, height, width) if code and (crowd or masks is not False) else None
    area = max(0, _number(row.get("area"))) or float(rle.area(code) if code else w * h)
    return {"bbox": box, "iscrowd": int(crowd), "area": area} | ({"segmentation": code} if code else {})


def _encoded(code: list | dict, height: int, width: int) -> dict:
    """Polygons or a run-length code, encoded; ValueError if it does not fit the image: pycocotools notices little."""
    try:
        if isinstance(code, dict):
            counts = _run_lengths(code["counts"]) if isinstance(code["counts"], str) else [*map(int, code["counts"])]
            fits = [*map(int, code["size"])] == [height, width] and min(counts) >= 0 and sum(counts) == height * width
            code = {"size": [height, width], "counts": counts}
        else:
            polygons = code if isinstance(code[0], list) else [code]
            code = [[float(value) for value in polygon] for polygon in polygons if len(polygon) >= 6]
            far = 2 * max(width, height)
            fits = code and all(len(part) % 2 == 0 and all(-far < x < far for x in part) for part in code)
    except (IndexError, KeyError, TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError("whose segmentation is no polygon and no run-length code of the image; or try --no-masks")
    codes = rle.frPyObjects(code, height, width)
    return rle.merge(codes) if isinstance(codes, list) else codes


def _run_lengths(text: str) -> list[int]:
    """The counts of a compressed run-length code: six bits a character; from the fourth count on differences."""
    counts, number, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        number, shift = number | (bits & 31) << shift, shift + 5
        if not bits & 32:
            number -= (bits & 16) << (shift - 4)  # the sign
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    return counts if text.isascii() and not shift else []


def to_target(rows: list[dict], labels: dict[int, int], height: int, width: int, masks: bool) -> dict:
    """Convert annotations to boxes (n, 4) float32, labels (n,) int64 and, if asked for, masks (n, H, W) uint8.

    labels: of category ids. Boxes and masks are tv_tensors, which torchvision's transforms move with their image.
    """
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # left, top, width, height -> corners
    boxes = boxes.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
    target = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))}
    target["labels"] = torch.tensor([labels[row["category_id"]] for row in rows], dtype=torch.int64)
    if masks:
        stacked = np.zeros((len(rows), height, width), dtype=np.uint8)
        for mask, row in zip(stacked, rows):
            mask[:] = rle.decode(row["segmentation"])
        target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
    return target


def encode_mask(mask: np.ndarray) -> dict:
    """Encode a mask (H, W) as a compressed run-length code that JSON can hold."""
    code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return code | {"counts": code["counts"].decode()}


def embedded_annotations(kinds: np.ndarray, masks: np.ndarray, names: tuple[str, ...], visible: float) -> dict:
    """Drawn shapes, kinds (N, k) and masks (N, k, S, S), as a data set; those below `visible` pixels are left out."""
    rows, size = [], masks.shape[-1]
    for image, layer in np.argwhere(masks.sum(axis=(2, 3)) >= visible).tolist():
        code = encode_mask(masks[image, layer])
        row = {"id": len(rows) + 1, "image_id": image, "category_id": int(kinds[image, layer]) + 1, "iscrowd": 0}
        box, area = [int(x) for x in rle.toBbox(code)], int(rle.area(code))
        rows.append(row | {"bbox": box, "area": area, "segmentation": code})
    images = [{"id": k, "file_name": f"drawn {k}", "width": size, "height": size} for k in range(len(kinds))]
    categories = [{"id": k, "name": name} for k, name in enumerate(names, start=1)]
    return {"images": images, "annotations": rows, "categories": categories}


# --- detections out, their scores and their pictures ------------------------------------------------------------------


def as_results(output: dict, image_id: int, category_ids: list[int]) -> list[dict]:
    """Put an image's boxes, labels, scores and masks, probabilities (n, 1, H, W), into COCO's format of results."""
    boxes, rows = box_convert(output["boxes"].float(), "xyxy", "xywh"), []
    for box, label, score in zip(*(values.tolist() for values in (boxes, output["labels"], output["scores"]))):
        box = [round(x, 3) for x in box]
        rows.append({"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score})
    for row, mask in zip(rows, output.get("masks", ())):
        row["segmentation"] = encode_mask((mask[0] > 0.5).cpu().numpy())
    return rows


def evaluate(data_set: dict, detections: dict[int, list[dict]], kinds: tuple[str, ...]) -> dict:
    """Compute COCO's numbers for detections, given by index of the image, on these images alone.

    Returns {"images": number, "box": the twelve numbers, "box_AP_by_class": by category}, and the same for "mask", as
    `kinds` say. Numbers are fractions of one, and None where there is no such object.
    """
    scores, truth = {"images": len(detections)}, coco.COCO()
    truth.dataset = data_set
    with redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        truth.createIndex()
        for kind in kinds:
            # It writes into detections; and with a box at hand it would sort masks by the size of their box.
            names = "image_id", "category_id", "score", "bbox" if kind == "box" else "segmentation"
            rows = [{name: row[name] for name in names} for index in sorted(detections) for row in detections[index]]
            results = truth.loadRes(rows) if rows else coco.COCO()
            evaluation = cocoeval.COCOeval(truth, results, {"box": "bbox", "mask": "segm"}[kind])
            evaluation.params.imgIds = sorted(data_set["images"][index]["id"] for index in detections)
            evaluation.params.catIds = [row["id"] for row in data_set["categories"]]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores[kind] = {name: None if x == -1 else x for name, x in zip(NUMBERS, evaluation.stats.tolist())}
            precision = evaluation.eval["precision"][..., 0, -1]  # (IoU, recall, class), of all sizes, 100 detections
            means = np.ma.masked_equal(precision, -1).mean(axis=(0, 1)).tolist()  # None for classes without objects
            scores[f"{kind}_AP_by_class"] = {row["name"]: mean for row, mean in zip(data_set["categories"], means)}
    return scores


def draw_objects(image: Image.Image, rows: list[dict], names: dict[int, str], square: int | None = None):
    """Draw objects' boxes, masks and, of several classes, names and scores on an image, uint8 (3, H, W).

    rows: annotations or results; names: of category ids; square: side of a white square that the image is scaled to;
    without it, larger images are scaled to a screen.
    """
    from matplotlib import font_manager

    scale = square / max(image.size) if square else min(1, SCREEN / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    picture, colours = image.resize((width, height)), dict(zip(names, maps.class_colours(len(names))))
    painted = picture.copy()
    rows = sorted(rows, key=lambda row: row.get("score", 1))  # the best comes last, above the others
    for row in rows:
        if "segmentation" in row:
            mask = Image.fromarray(255 * rle.decode(row["segmentation"]))
            painted.paste(colours[row["category_id"]], None, mask.resize(picture.size, Image.Resampling.NEAREST))
    picture = Image.blend(picture, painted, 0.45)
    pen, font = ImageDraw.Draw(picture, "RGBA"), font_manager.findfont("DejaVu Sans")
    for row in rows:
        left, top, w, h = (x * scale for x in row["bbox"])
        colour, size = colours[row["category_id"]], max(width, height) // 40
        pen.rectangle([left, top, left + max(1, w), top + max(1, h)], outline=colour, width=max(1, size // 6))
        if len(names) > 1:
            text = " ".join(names[row["category_id"]].split()) + (f" {row['score']:.2f}" if "score" in row else "")
            size = max(9, min(size, int(h / 3), int(1.6 * w / max(1, len(text)))))  # legible, below the object's
            below = top + h if top + h + 1.3 * size < height else max(0, top)
            corner = min(max(0, left), width - 0.65 * size * len(text)), top - 1.3 * size if top > 1.3 * size else below
            style = dict(font=ImageFont.truetype(font, size), anchor="lt")
            x1, y1, x2, y2 = pen.textbbox(corner, text, **style)
            pen.rectangle([x1 - 1, y1 - 1, x2 + 1, y2 + 1], fill=(*colour, 128))
            pen.text(corner, text, fill="black" if sum(colour) > 380 else "white", **style)
    padding = (0, square - width, 0, square - height) if square else (0, 0)
    return torch.nn.functional.pad(pil_to_tensor(picture), padding, value=255)
