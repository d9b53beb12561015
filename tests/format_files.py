"""A few photos with boxes, and files of them as labelling tools write them: each function lays out one format."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 160, 120


@dataclass(frozen=True)
class TrueBox:
    """A box in px: its edges, and an outline where it has one."""

    label: str
    left: int
    top: int
    right: int
    bottom: int
    outline: tuple[int, ...] = ()

    @property
    def edges(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.right, self.bottom


LABELS = ("cat", "big dog")
# Name -> its boxes; the first letter of a name says the split that it has where a format knows splits.
WORLD: dict[str, tuple[TrueBox, ...]] = {
    "t1.jpg": (TrueBox("cat", 8, 12, 60, 80), TrueBox("big dog", 80, 20, 150, 110, (80, 20, 150, 30, 120, 110))),
    "t 2.jpg": (TrueBox("big dog", 0, 0, 100, 120, (0, 0, 100, 0, 100, 120, 0, 120, 20, 60)),),
    "t3.jpg": (),
    "v1.jpg": (TrueBox("cat", 40, 30, 160, 120), TrueBox("cat", 10, 10, 50, 50, (10, 10, 50, 10, 30, 50, 20, 50))),
}
BOXES = sum(map(len, WORLD.values()))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def photo(path: Path, seed: int = 0) -> None:
    """Noise of WIDTH x HEIGHT px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((WIDTH, HEIGHT)).save(path)


def photos_in(folder: Path, names: Sequence[str] = tuple(WORLD)) -> Path:
    for name in names:
        photo(folder / name, seed=list(WORLD).index(name))
    return folder


def yolo_row(box: TrueBox, outlines: bool = True) -> str:
    number = LABELS.index(box.label)
    if box.outline and outlines:
        sides = (WIDTH, HEIGHT) * (len(box.outline) // 2)
        return " ".join([str(number), *(f"{value / side:.6f}" for value, side in zip(box.outline, sides, strict=True))])
    x, y = (box.left + box.right) / 2 / WIDTH, (box.top + box.bottom) / 2 / HEIGHT
    return f"{number} {x:.6f} {y:.6f} {(box.right - box.left) / WIDTH:.6f} {(box.bottom - box.top) / HEIGHT:.6f}"


def _yolo_rows(name: str, outlines: bool = True) -> str:
    return "\n".join(yolo_row(box, outlines) for box in WORLD[name])


def ultralytics(folder: Path) -> tuple[Path, Path]:
    """images/train, labels/train, and names by their numbers. A photo without boxes has no label file."""
    for name, boxes in WORLD.items():
        split = "val" if name[0] == "v" else "train"
        photo(folder / "images" / split / name, list(WORLD).index(name))
        if boxes:
            write(folder / "labels" / split / f"{Path(name).stem}.txt", _yolo_rows(name))
    names = "\n".join(f"  {number}: {label}" for number, label in enumerate(LABELS))
    return write(folder / "set.yaml", f"path: ../datasets/set\ntrain: images/train\nval: images/val\nnames:\n{names}\n"), folder


def roboflow_yolo(folder: Path) -> tuple[Path, Path]:
    """train/images, train/labels, paths that lead out of the folder, names as a list, and its README beside it."""
    for name in WORLD:
        split = "valid" if name[0] == "v" else "train"
        photo(folder / split / "images" / name, list(WORLD).index(name))
        write(folder / split / "labels" / f"{Path(name).stem}.txt", _yolo_rows(name))
    write(folder / "README.roboflow.txt", "My set - v1\n===========\n")
    keys = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\n"
    keys += f"nc: 2\nnames: {list(LABELS)}\n\nroboflow:\n  v: 1\n"
    return write(folder / "data.yaml", keys).parent, folder


def darknet(folder: Path) -> tuple[Path, Path]:
    """As CVAT and datumaro write `YOLO 1.1`: lists whose paths begin with data/, label files beside the photos."""
    for name in WORLD:
        place = folder / ("obj_valid_data" if name[0] == "v" else "obj_train_data")
        photo(place / name, list(WORLD).index(name))
        write(place / f"{Path(name).stem}.txt", _yolo_rows(name, outlines=False))
    for split, letter in (("train", "t"), ("valid", "v")):
        write(folder / f"{split}.txt", "".join(f"data/obj_{split}_data/{name}\n" for name in WORLD if name[0] == letter))
    write(folder / "obj.names", "\n".join(LABELS) + "\n")
    write(
        folder / "obj.data",
        "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n",
    )
    return folder, folder


def labelstudio_yolo(folder: Path) -> tuple[Path, Path]:
    """images/, labels/, classes.txt and notes.json, and no data.yaml."""
    photos_in(folder / "images")
    for name in WORLD:
        write(folder / "labels" / f"{Path(name).stem}.txt", _yolo_rows(name))
    write(folder / "classes.txt", "\n".join(LABELS))
    write(folder / "notes.json", '{"categories": []}')
    return folder, folder / "images"


def voc_xml(name: str, one: int = 0, database: str = "Unknown", size: bool = True, more: str = "") -> str:
    """An XML file; `one` is the number of the first px, with xmax and ymax within the box."""
    objects = "".join(
        f"<object><name>{box.label}</name><pose>Unspecified</pose><truncated>1</truncated><difficult>0</difficult><bndbox>"
        f"<xmin>{box.left + one}</xmin><ymin>{box.top + one}</ymin><xmax>{box.right}</xmax><ymax>{box.bottom}</ymax>"
        f"</bndbox></object>"
        for box in WORLD[name]
    )
    sides = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>" if size else ""
    return (
        f"<annotation><folder>VOC2007</folder><filename>{name}</filename>{more}<source><database>{database}</database></source>"
        f"{sides}<segmented>0</segmented>{objects}</annotation>"
    )


def instance_png(path: Path, name: str) -> None:
    """Px of object n are n, their border is 255, as in VOC's SegmentationObject; objects without an outline have none."""
    from PIL import ImageDraw

    picture = Image.new("P", (WIDTH, HEIGHT))
    picture.putpalette([value for number in range(256) for value in (number, 0, 0)])
    for number, box in enumerate(WORLD[name], start=1):
        if box.outline:
            ImageDraw.Draw(picture).polygon(box.outline, fill=number, outline=255)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def voc(folder: Path) -> tuple[Path, Path]:
    """VOCdevkit/VOC2007 with lists of splits and masks; px count from 1."""
    root = folder / "VOCdevkit" / "VOC2007"
    photos_in(root / "JPEGImages")
    for name, boxes in WORLD.items():
        write(root / "Annotations" / f"{Path(name).stem}.xml", voc_xml(name, 1, "The VOC2007 Database"))
        if any(box.outline for box in boxes):
            instance_png(root / "SegmentationObject" / f"{Path(name).stem}.png", name)
    for split, letter in (("train", "t"), ("val", "v")):
        write(
            root / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{Path(name).stem}\n" for name in WORLD if name[0] == letter)
        )
    return folder / "VOCdevkit", root / "JPEGImages"


def roboflow_voc(folder: Path) -> tuple[Path, Path]:
    """train/a.jpg and train/a.xml side by side."""
    for name in WORLD:
        place = folder / ("valid" if name[0] == "v" else "train")
        photo(place / name, list(WORLD).index(name))
        write(place / f"{Path(name).stem}.xml", voc_xml(name, database="roboflow.com"))
    return folder, folder


def labelimg(folder: Path) -> tuple[Path, Path]:
    """XML in a folder of its own, with the path of the photo on another machine; no size."""
    photos_in(folder / "photos" / "deep")
    for name in WORLD:
        write(folder / "xml" / f"{Path(name).stem}.xml", voc_xml(name, size=False, more=f"<path>C:\\me\\deep\\{name}</path>"))
    return folder / "xml", folder / "photos"


def percent_points(box: TrueBox) -> list[list[float]]:
    return [[x / WIDTH * 100, y / HEIGHT * 100] for x, y in zip(box.outline[::2], box.outline[1::2], strict=True)]


def region(box: TrueBox, number: int = 0) -> dict:
    """A region of Label Studio's JSON."""
    kind, value = "rectanglelabels", {
        "x": box.left / WIDTH * 100, "y": box.top / HEIGHT * 100, "rotation": 0,
        "width": (box.right - box.left) / WIDTH * 100, "height": (box.bottom - box.top) / HEIGHT * 100,
    }  # fmt: skip
    if box.outline:
        kind, value = "polygonlabels", {"points": percent_points(box), "closed": True}
    return {
        "id": f"r{number}", "type": kind, "from_name": "label", "to_name": "image",
        "original_width": WIDTH, "original_height": HEIGHT,
        "image_rotation": 0, "value": {**value, kind: [box.label]},
    }  # fmt: skip


def task(name: str, regions: Sequence[dict], **more: object) -> dict:
    """A task of Label Studio's JSON with one annotation."""
    annotation = {"id": 1, "was_cancelled": False, "ground_truth": False, "result": list(regions), **more}
    return {"id": 7, "data": {"image": f"/data/upload/1/0a1b2c3d-{name}"}, "annotations": [annotation], "predictions": []}


def label_studio(folder: Path) -> tuple[Path, Path]:
    """JSON of photos that were uploaded: their names have a mark before them, the photos do not."""
    photos_in(folder / "photos")
    tasks = [
        {**task(name, [region(box, n) for n, box in enumerate(boxes)]), "id": at}
        for at, (name, boxes) in enumerate(WORLD.items())
    ]
    return write(folder / "project-1-at-2026.json", json.dumps(tasks)), folder / "photos"


def label_studio_min(folder: Path) -> tuple[Path, Path]:
    """JSON-MIN of photos in local storage."""
    photos_in(folder / "photos" / "in")
    rows = []
    for number, (name, boxes) in enumerate(WORLD.items()):
        row: dict = {"image": f"/data/local-files/?d=photos/in/{name.replace(' ', '%20')}", "id": number, "annotator": 1}
        values = [{**region(box)["value"], "original_width": WIDTH, "original_height": HEIGHT} for box in boxes]
        row["label"] = [value for value in values if "points" not in value]
        row["outline"] = [value for value in values if "points" in value]
        rows.append({**row, "updated_at": "2026-01-01T00:00:00Z", "lead_time": 3.5})
    return write(folder / "min.json", json.dumps(rows)), folder / "photos"


def cvat_shape(box: TrueBox) -> str:
    if box.outline:
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in zip(box.outline[::2], box.outline[1::2], strict=True))
        return f'<polygon label="{box.label}" source="manual" occluded="1" points="{points}" z_order="0"></polygon>'
    left, top, right, bottom = box.edges
    where = f'xtl="{left:.2f}" ytl="{top:.2f}" xbr="{right:.2f}" ybr="{bottom:.2f}"'
    return f'<box label="{box.label}" source="manual" occluded="0" {where} z_order="0"></box>'


def cvat_xml(images: str) -> str:
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task/></meta>{images}</annotations>\n'
    )


def cvat(folder: Path) -> tuple[Path, Path]:
    """annotations.xml of a task with subsets, and images/ beside it."""
    photos_in(folder / "images")
    images = "".join(
        f'<image id="{number}" name="{name}" subset="{"Validation" if name[0] == "v" else "Train"}" width="{WIDTH}" '
        f'height="{HEIGHT}">'
        f"{''.join(map(cvat_shape, boxes))}</image>"
        for number, (name, boxes) in enumerate(WORLD.items())
    )
    return write(folder / "annotations.xml", cvat_xml(images)).parent, folder / "images"


def roboflow_coco(folder: Path) -> tuple[Path, Path]:
    """train/_annotations.coco.json beside the photos."""
    for letter, split in (("t", "train"), ("v", "valid")):
        names = [name for name in WORLD if name[0] == letter]
        images, annotations = [], []
        for number, name in enumerate(names):
            photo(folder / split / name, list(WORLD).index(name))
            images.append({"id": number, "license": 1, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for box in WORLD[name]:
                place = [box.left, box.top, box.right - box.left, box.bottom - box.top]
                annotations.append({
                    "id": len(annotations), "image_id": number, "category_id": 1 + LABELS.index(box.label), "bbox": place,
                    "iscrowd": 0,
                    "segmentation": [list(box.outline)] if box.outline else [],
                })  # fmt: skip
        categories = [{"id": 0, "name": "set", "supercategory": "none"}]
        categories += [{"id": 1 + number, "name": label, "supercategory": "set"} for number, label in enumerate(LABELS)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        write(folder / split / "_annotations.coco.json", json.dumps(document))
    return folder, folder


def labelme(folder: Path) -> tuple[Path, Path]:
    """A JSON beside each photo (examples/own_source.py)."""
    photos_in(folder)
    for name, boxes in WORLD.items():
        pairs = [[list(pair) for pair in zip(box.outline[::2], box.outline[1::2], strict=True)] for box in boxes]
        shapes = [
            {"label": box.label, "shape_type": "polygon", "points": points}
            if points
            else {"label": box.label, "shape_type": "rectangle", "points": [[box.right, box.top], [box.left, box.bottom]]}
            for box, points in zip(boxes, pairs, strict=True)
        ]
        content = {
            "version": "5.5.0",
            "shapes": shapes,
            "imagePath": name,
            "imageData": None,
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
        }
        write(folder / f"{Path(name).stem}.json", json.dumps(content))
    return folder, folder
