"""COCO's format and COCO's evaluation: annotations in, detections out, and their twelve numbers, by pycocotools.

A data set is a dictionary with "images", "annotations" and "categories", as in an annotation file. Boxes are (left,
top, width, height) there, and corners (x1, y1, x2, y2) in tensors. Labels are 1 .. K in the order of category ids; 0 is
the background. Shapes: n objects of an image, H x W its pixels.
"""

import io
import json
import math
import re
from collections.abc import Collection
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import coco, cocoeval
from pycocotools import mask as rle
from torchvision import tv_tensors
from torchvision.ops import box_convert

from plumbing import dist, maps
from plumbing.files import UserError
from plumbing.loading import opened, upright_size

# COCO's twelve numbers, in the order of pycocotools: average precision and recall over IoU .5 to .95, at one IoU, by
# size of object, and by the number of detections per image.
NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NUMBERS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
ELSEWHERE = "give --train_annotations, --train_images and the same of val, or --holdout 0.2 to split one file; "
ELSEWHERE += "the package supervision converts YOLO's and VOC's boxes (DetectionDataset)"
SCREEN = 1600  # pixels of the long side of a drawn image


# --- annotations in ---------------------------------------------------------------------------------------------------


def read_annotations(path: str | Path, folders: list[Path], masks: bool | None = None) -> tuple[dict, list[str]]:
    """Read and check a COCO file; return the data set and its images' paths.

    Annotations are renumbered, and their segmentations become compressed run-length codes; unusable ones are left out
    and counted by reason. UserError for another format, boxes in other units, images of another size than annotated,
    and if nothing is left.

    folders: where the images may lie; the first that holds one is used. masks: False leaves segmentations unread.
    """
    try:
        data_set = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        images, categories = ({int(row["id"]): row for row in data_set[name]} for name in ("images", "categories"))
        for row in images.values():  # some tools write text, or -1 for unknown sizes
            row |= {side: max(0.0, float(row.get(side) or 0)) for side in ("width", "height")}
        names = [str(row["file_name"]).replace("\\", "/") for row in images.values()]
        classes = [{"id": number, "name": str(categories[number]["name"])} for number in sorted(categories)]
        rows = list(data_set["annotations"])
    except KeyError as error:
        raise UserError(f"{path} is not in COCO's format: it lacks {error}; {ELSEWHERE}") from None
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"cannot read the annotations {path} ({error}); {ELSEWHERE}") from None
    for name, by_id in {"images": images, "categories": categories}.items():
        if len(by_id) < len(data_set[name]):
            raise UserError(f"{path}: {len(data_set[name])} {name} have {len(by_id)} different ids; make all differ")
    paths, annotations, boxes, left_out = _measure(path, images.values(), names, folders), [], [], {}
    for k, row in enumerate(rows):
        try:
            # Counted from 1: pycocotools never matches an annotation of id 0, and ids may be missing or repeated.
            ids = {"id": len(annotations) + 1} | {key: int(row[key]) for key in ("image_id", "category_id")}
            image, _ = images[ids["image_id"]], categories[ids["category_id"]]
            annotations.append(ids | _annotation(row, image["width"], image["height"], masks, boxes))
        except (KeyError, TypeError):
            left_out.setdefault("without a bbox, or of an image_id or category_id that the file lacks", []).append(k)
        except ValueError as error:
            left_out.setdefault(str(error), []).append(k)
    x, y, right, bottom, width, height = np.array(boxes or [[0] * 6], dtype=float).T  # as if they were corners
    beyond = (x + right > width + 1) | (y + bottom > height + 1)
    if beyond.mean() > 0.1 and ((x < right) & (y < bottom) & (right <= width) & (bottom <= height)).all():
        raise UserError(f"{path}: each bbox seems to be corners, x1, y1, x2, y2; COCO's is left, top, width, height")
    reasons = "; ".join(f"{len(where):,} {why} (first: annotations[{where[0]}])" for why, where in left_out.items())
    reasons = reasons and f"left out of {len(rows):,} annotations: {reasons}"
    if all(row["iscrowd"] for row in annotations):
        fix = reasons or "annotate single objects, with iscrowd 0"
        raise UserError(f"{path} has no object to learn from, only {len(annotations):,} crowds; {fix}")
    if reasons:
        dist.say(f"{path}: {reasons}")
    entries = [row | {"id": number} for number, row in images.items()]
    return {"images": entries, "annotations": annotations, "categories": classes}, paths


def _measure(path: str | Path, images: Collection[dict], names: list[str], folders: list[Path]) -> list[str]:
    """Record each image's upright size in its entry; return the files. UserError if an entry gives another size."""
    folder = next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)
    if not folder:
        raise UserError(f"{folders[0]} has no image of {path}, such as {names[:1]}; {ELSEWHERE}")
    files = [folder / name for name in names]
    for row, file in zip(images, files):
        size = annotated = row["width"], row["height"]
        with suppress(Exception), opened(file) as image:  # if it is damaged, the run names and counts it
            size = upright_size(image)
        if all(annotated) and annotated != size:
            sizes = f"{file} is {size[0]} x {size[1]} pixels, and {annotated[0]:g} x {annotated[1]:g} there"
            raise UserError(f"{path}: {sizes}; was it scaled, or annotated without its EXIF orientation?")
        row["width"], row["height"] = size
    return [str(file) for file in files]


def _annotation(row: dict, width: int, height: int, masks: bool | None, boxes: list) -> dict:
    """Return an annotation's box, mask and area, in COCO's types; ValueError, with the reason, if it is unusable."""
    box = [float(value) for value in row["bbox"]]
    if len(box) != 4 or not all(map(math.isfinite, box)):
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
    crowd = int(row.get("iscrowd") or 0)
    code = row.get("segmentation") or ([[x, y, x + w, y, x + w, y + h, x, y + h]] if crowd else None)
    code = _encoded(code, height, width) if code and (crowd or masks is not False) else None
    area = max(0.0, float(row.get("area") or 0)) or float(rle.area(code) if code else w * h)
    return {"bbox": box, "iscrowd": crowd, "area": area} | ({"segmentation": code} if code else {})


def _encoded(code: list | dict, height: int, width: int) -> dict:
    """Encode polygons or run lengths; ValueError if they do not fit the image, which pycocotools hardly checks."""
    with suppress(KeyError, TypeError, ValueError):
        if isinstance(code, dict):
            counts = _run_lengths(code["counts"]) if isinstance(code["counts"], str) else [*map(int, code["counts"])]
            if code["size"] == [height, width] and min(counts) >= 0 and sum(counts) == height * width:
                return rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        else:
            polygons = [[float(value) for value in part] for part in code if len(part) >= 6]
            far = 2 * max(width, height)
            if polygons and all(len(part) % 2 == 0 and all(-far < x < far for x in part) for part in polygons):
                return rle.merge(rle.frPyObjects(polygons, height, width))
    raise ValueError("whose segmentation is no polygon and no run-length code of the image; or try --no-masks")


def _run_lengths(text: str) -> list[int]:
    """Decode a compressed run-length code's counts: five bits a character; differences from the fourth count on."""
    counts = []
    for digits in re.findall("[P-o]*[0-O]", text):  # from P on, another character of the count follows
        number = sum((ord(digit) - 48 & 31) << 5 * k for k, digit in enumerate(digits))
        number -= (digits[-1] >= "@") << 5 * len(digits)  # two's complement
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
    return counts


def to_target(rows: list[dict], category_ids: list[int], size: tuple[int, int], masks: bool) -> dict:
    """Convert annotations to boxes (n, 4) float32, labels (n,) int64 and, if asked for, masks (n, H, W) uint8.

    size: width and height. Boxes and masks are tv_tensors, which torchvision's transforms move with their image.
    """
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # left, top, width, height -> corners
    boxes = boxes.minimum(torch.tensor(size).repeat(2)).clamp(min=0)
    target = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size[::-1])}
    target["labels"] = torch.tensor([1 + category_ids.index(row["category_id"]) for row in rows], dtype=torch.int64)
    if masks:
        stacked = np.zeros((len(rows), *size[::-1]), dtype=np.uint8)
        for mask, row in zip(stacked, rows):
            mask[:] = rle.decode(row["segmentation"])
        target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
    return target


def encode_mask(mask: np.ndarray) -> dict:
    """Encode a mask (H, W) as a compressed run-length code that JSON can hold."""
    code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return code | {"counts": code["counts"].decode()}


def embedded_annotations(kinds: np.ndarray, masks: np.ndarray, names: tuple[str, ...], visible: float) -> dict:
    """Convert drawn shapes, kinds (N, k) and masks (N, k, S, S), to a data set; drop those below `visible` pixels."""
    rows, size = [], masks.shape[-1]
    for image, layer in np.argwhere(masks.sum(axis=(2, 3)) >= visible).tolist():
        code = encode_mask(masks[image, layer])
        row = {"id": len(rows) + 1, "image_id": image, "category_id": int(kinds[image, layer]) + 1, "iscrowd": 0}
        box, area = [int(x) for x in rle.toBbox(code)], int(rle.area(code))
        rows.append(row | {"bbox": box, "area": area, "segmentation": code})
    images = [{"id": k, "file_name": f"drawn {k}", "width": size, "height": size} for k in range(len(kinds))]
    categories = [{"id": k, "name": name} for k, name in enumerate(names, start=1)]
    return {"images": images, "annotations": rows, "categories": categories}


# --- detections out, their scores and drawings ------------------------------------------------------------------------


def as_results(output: dict, image_id: int, category_ids: list[int]) -> list[dict]:
    """Convert an image's boxes, labels, scores and mask probabilities (n, 1, H, W) to COCO's results format."""
    boxes, rows = box_convert(output["boxes"].float(), "xyxy", "xywh"), []
    for box, label, score in zip(*(values.tolist() for values in (boxes, output["labels"], output["scores"]))):
        box = [round(x, 3) for x in box]
        rows.append({"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score})
    for row, mask in zip(rows, output.get("masks", ())):
        row["segmentation"] = encode_mask((mask[0] > 0.5).cpu().numpy())
    return rows


def evaluate(data_set: dict, detections: dict[int, list[dict]], kinds: tuple[str, ...]) -> dict:
    """Compute COCO's numbers for detections, by image index, on these images only.

    Returns {"images": number, "box": the twelve numbers, "box_AP_by_class": by category}, and the same for "mask", as
    `kinds` say. Numbers are fractions of one, or None if there is no such object.
    """
    scores, truth = {"images": len(detections)}, coco.COCO()
    truth.dataset = data_set
    with redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        truth.createIndex()
        for kind in kinds:
            # pycocotools writes into detections, and, given a box too, would measure a mask's size by its box.
            names = "image_id", "category_id", "score", "bbox" if kind == "box" else "segmentation"
            rows = [{name: row[name] for name in names} for index in sorted(detections) for row in detections[index]]
            results = truth.loadRes(rows) if rows else coco.COCO()
            evaluation = cocoeval.COCOeval(truth, results, {"box": "bbox", "mask": "segm"}[kind])
            evaluation.params.imgIds = sorted(data_set["images"][index]["id"] for index in detections)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores[kind] = {name: None if x == -1 else x for name, x in zip(NUMBERS, evaluation.stats.tolist())}
            precision = evaluation.eval["precision"][..., 0, -1]  # (IoU, recall, class), of all sizes, 100 detections
            means = np.ma.masked_equal(precision, -1).mean(axis=(0, 1)).tolist()  # None for classes without objects
            scores[f"{kind}_AP_by_class"] = {row["name"]: mean for row, mean in zip(data_set["categories"], means)}
    return scores


def draw_objects(image: Image.Image, rows: list[dict], names: dict[int, str], side: int | None = None) -> Image.Image:
    """Draw objects' boxes and masks on an image and, if there are several classes, names and scores.

    rows: annotations or results; names: by category id; side: long side that the image is scaled to; without it, images
    larger than a screen are scaled down.
    """
    from matplotlib import font_manager

    scale = side / max(image.size) if side else min(1, SCREEN / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    picture, colours = image.resize((width, height)), dict(zip(names, maps.class_colours(len(names))))
    painted = picture.copy()
    rows = sorted(rows, key=lambda row: row.get("score", 1))  # the best comes last, on top of the others
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
            size = max(9, min(size, int(h / 3), int(1.6 * w / max(1, len(text)))))  # legible, within the object
            corner = min(max(0, left), width - 0.65 * size * len(text)), max(1, top - 1.3 * size)
            style = dict(font=ImageFont.truetype(font, size), anchor="lt")
            x1, y1, x2, y2 = pen.textbbox(corner, text, **style)
            pen.rectangle([x1 - 1, y1 - 1, x2 + 1, y2 + 1], fill=(*(value // 2 for value in colour), 160))
            pen.text(corner, text, "white", **style)
    return picture
