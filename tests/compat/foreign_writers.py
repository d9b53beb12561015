"""Runs in the environment of one foreign tool, without this project: the tool writes the small dataset in its own formats.

    python -I foreign_writers.py write TOOL FORMAT WORLD OUT         boxes that it is given -> its files in OUT
    python -I foreign_writers.py convert TOOL FORMAT FILES OUT       what another tool wrote -> COCO, in OUT/coco.json

WORLD is a folder of `foreign_world.make_world`. Prints one line of JSON: where the annotations and, if the tool copied them, the
photos are, below OUT. A tool that fails ends this program with its own error.
"""

import csv
import json
import os
import shutil
import sys
from pathlib import Path


def read_world(folder, stored):
    """Labels and photos with their boxes, in the frame of the stored pixels or of viewers; photos get their path."""
    world = json.loads((folder / ("world_stored.json" if stored else "world.json")).read_text(encoding="utf-8"))
    for photo in world["photos"]:
        photo["path"] = str(folder / "photos" / photo["name"])
    return world["labels"], world["photos"]


def size_of(edges):
    """Width and height of a box."""
    return edges[2] - edges[0], edges[3] - edges[1]


# supervision


def write_supervision(format_, world, out):
    """Boxes as viewers show them: it opens photos by OpenCV, which turns them."""
    import numpy
    import supervision

    labels, photos = read_world(world, stored=False)
    given = {}
    for photo in photos:
        edges = numpy.array([box["edges"] for box in photo["boxes"]], numpy.float32).reshape(-1, 4)
        classes = numpy.array([labels.index(box["label"]) for box in photo["boxes"]], int)
        masks = None
        if format_ == "coco, masks" and photo["boxes"]:
            masks = numpy.array([mask_of(box, photo) for box in photo["boxes"]])
        given[photo["path"]] = supervision.Detections(xyxy=edges, class_id=classes, mask=masks)
    dataset = supervision.DetectionDataset(classes=labels, images=[photo["path"] for photo in photos], annotations=given)
    if format_.startswith("coco"):
        dataset.as_coco(images_directory_path=str(out / "photos"), annotations_path=str(out / "coco.json"))
        return {"annotations": "coco.json", "photos": "photos"}
    if format_ == "voc":
        dataset.as_pascal_voc(images_directory_path=str(out / "photos"), annotations_directory_path=str(out / "xml"))
        return {"annotations": "xml"}
    if format_ == "yolo":
        dataset.as_yolo(annotations_directory_path=str(out / "labels"), data_yaml_path=str(out / "data.yaml"))
        return {"annotations": "labels", "labels": labels}
    dataset.as_labelme(annotations_directory_path=str(out / "json"))
    return {"annotations": "json"}


def mask_of(box, photo):
    """The pixels of a box, or of its outline."""
    import numpy
    from PIL import Image, ImageDraw

    mask = Image.new("1", (photo["width"], photo["height"]))
    left, top, right, bottom = box["edges"]
    # Both ends of a line are drawn: its last px is one before the edge.
    corners = box["polygon"] or [(left, top), (right - 1, top), (right - 1, bottom - 1), (left, bottom - 1)]
    ImageDraw.Draw(mask).polygon([(round(x), round(y)) for x, y in corners], fill=1)
    return numpy.array(mask, bool)


def convert_supervision(format_, files, out):
    """Files in the layout of `lay_out` -> COCO."""
    from supervision import DetectionDataset

    photos = str(files / "photos")
    if format_ == "voc":
        dataset = DetectionDataset.from_pascal_voc(photos, str(files / "annotations"))
    elif format_ == "yolo":
        dataset = DetectionDataset.from_yolo(photos, str(files / "annotations"), str(files / "data.yaml"))
    else:
        dataset = DetectionDataset.from_labelme(photos, str(files / "annotations"))
    dataset.as_coco(annotations_path=str(out / "coco.json"))


# datumaro


def write_datumaro(format_, world, out):
    """Boxes on the pixels as stored, the only ones that it knows."""
    from datumaro import Bbox, Dataset, DatasetItem, Image, Polygon

    labels, photos = read_world(world, stored=True)
    items = []
    for photo in photos:
        shapes = []
        for number, box in enumerate(photo["boxes"]):
            label = labels.index(box["label"])
            if format_ == "coco, polygons" and box["polygon"]:
                flat = [value for point in box["polygon"] for value in point]
                shapes.append(Polygon(flat, label=label, id=number, group=number + 1))
            else:
                shapes.append(Bbox(*box["edges"][:2], *size_of(box["edges"]), label=label, id=number, group=number + 1))
        name = str(Path(photo["name"]).with_suffix(""))
        items.append(DatasetItem(id=name, subset="train", media=Image.from_file(path=photo["path"]), annotations=shapes))
    dataset = Dataset.from_iterable(items, categories=labels)
    names = {"voc": "voc_detection", "coco, polygons": "coco_instances", "coco": "coco_instances"}
    more = {"coordinate_mode": "voc-one-based"} if format_ == "voc, one-based" else {}
    dataset.export(str(out), names.get(format_, "voc_detection" if more else format_), save_media=True, **more)
    where = {
        "coco": "annotations/instances_train.json",
        "coco, polygons": "annotations/instances_train.json",
        "voc": "Annotations",
        "voc, one-based": "Annotations",
        "yolo": "obj_train_data",
        "open_images": "annotations",
    }
    photos = {"coco": "images", "coco, polygons": "images", "open_images": "images"}
    return {"annotations": where[format_], "photos": photos.get(format_), "labels": labels}


def convert_datumaro(format_, files, out):
    """Files in the layout of `lay_out` -> COCO."""
    from datumaro import Dataset

    if format_.startswith("voc"):
        lay_out_voc(files, out / "voc")
        more = {"coordinate_mode": "voc-one-based"} if format_ == "voc, one-based" else {}
        dataset = Dataset.import_from(str(out / "voc"), "voc_detection", **more)
    else:
        raise SystemExit(f"{format_}: not tried")
    dataset.export(str(out / "coco"), "coco_instances", save_media=False)
    (made,) = (out / "coco" / "annotations").glob("*.json")
    shutil.copy(made, out / "coco.json")


def lay_out_voc(files, folder):
    """The folders of Pascal VOC: Annotations, JPEGImages and the list of a subset."""
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    shutil.copytree(files / "annotations", folder / "Annotations")
    shutil.copytree(files / "photos", folder / "JPEGImages")
    # A name with a space stands in quotes, as datumaro itself writes it.
    stems = [path.stem for path in sorted((files / "annotations").glob("*.xml"))]
    lines = [f'"{stem}"' if " " in stem else stem for stem in stems]
    (folder / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# globox


def write_globox(format_, world, out):
    """Boxes on the pixels as stored: it reads sizes of photos from their headers."""
    from globox import Annotation, AnnotationSet, BoundingBox, BoxFormat

    labels, photos = read_world(world, stored=True)
    dataset = AnnotationSet()
    for photo in photos:
        boxes = [
            BoundingBox.create(label=box["label"], coords=tuple(box["edges"]), box_format=BoxFormat.LTRB) for box in photo["boxes"]
        ]
        # As its own importers of flat formats name photos: by the file alone.
        name = photo["name"] if format_ in ("coco", "open_images") else Path(photo["name"]).name
        dataset.add(Annotation(name, (photo["width"], photo["height"]), boxes))
    ids = {label: number for number, label in enumerate(labels)}
    if format_ == "coco":
        dataset.save_coco(out / "coco.json", auto_ids=True)
        return {"annotations": "coco.json"}
    if format_ == "open_images":
        dataset.save_openimage(out / "train-annotations-bbox.csv")
        return {"annotations": "."}
    if format_ == "voc":
        dataset.save_pascal_voc(out / "xml")
        return {"annotations": "xml"}
    if format_ == "yolo":
        dataset.save_yolo_v5(out / "labels", label_to_id=ids)
        return {"annotations": "labels", "labels": labels}
    dataset.save_labelme(out / "json")
    return {"annotations": "json"}


def convert_globox(format_, files, out):
    """Files in the layout of `lay_out` -> COCO."""
    from globox import AnnotationSet

    if format_ == "voc":
        dataset = AnnotationSet.from_pascal_voc(files / "annotations")
    elif format_ == "yolo":
        dataset = AnnotationSet.from_yolo_v5(files / "annotations", image_folder=files / "photos")
        labels = (files / "classes.txt").read_text(encoding="utf-8").splitlines()
        dataset = dataset.map_labels({str(number): label for number, label in enumerate(labels)})
    else:
        dataset = AnnotationSet.from_labelme(files / "annotations", include_poly=True)
    dataset.save_coco(out / "coco.json", auto_ids=True)


def main():
    """One tool, one format."""
    task, tool, format_, source, out = sys.argv[1:]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    function = globals()[f"{task}_{tool.replace('-', '_')}"]
    made = function(format_, Path(source), out) or {"annotations": "coco.json"}
    print(f"\n{json.dumps(made)}")


if __name__ == "__main__":
    main()
