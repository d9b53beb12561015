"""Runs in the environment of one foreign tool, without this project: the tool writes the small dataset in one of its formats.

    python -I foreign_writers.py TOOL FORMAT WORLD OUT

WORLD is a folder of `foreign_world.make_world`. The last line printed is JSON: where the annotations and, if the tool copied
them, the photos are, below OUT. A tool that fails ends this program with its own error.
"""

import json
import os
import shutil
import sys
from pathlib import Path


def read_world(folder, frame):
    """Labels and photos with their boxes, in frame `exif`, as viewers show photos, or `stored`; photos get their path."""
    world = json.loads((folder / f"world_{frame}.json").read_text(encoding="utf-8"))
    for photo in world["photos"]:
        photo["path"] = str(folder / "photos" / photo["name"])
    return world["labels"], world["photos"]


def place(box):
    """A box as COCO has it: left, top, width, height."""
    left, top, right, bottom = box["edges"]
    return [left, top, right - left, bottom - top]


def flat(polygon):
    """x, y, x, y, ... of an outline."""
    return [value for point in polygon for value in point]


def open_images_id(number):
    """An id as photos of Open Images have it: no name, no folder."""
    return f"{number:016x}"


def write_supervision(format_, world, out):
    """Frame exif: it opens photos by OpenCV, which turns them."""
    import numpy
    import supervision

    labels, photos = read_world(world, "exif")
    given = {}
    for photo in photos:
        edges = numpy.array([box["edges"] for box in photo["boxes"]], numpy.float32).reshape(-1, 4)
        classes = numpy.array([labels.index(box["label"]) for box in photo["boxes"]], int)
        masks = None
        if format_ == "coco, masks" and photo["boxes"]:
            masks = numpy.array([mask_of(box, photo) for box in photo["boxes"]])
        given[photo["path"]] = supervision.Detections(xyxy=edges, class_id=classes, mask=masks)
    dataset = supervision.DetectionDataset(classes=labels, images=[photo["path"] for photo in photos], annotations=given)
    if format_ == "yolo":
        places = {"images_directory_path": str(out / "images"), "annotations_directory_path": str(out / "labels")}
        dataset.as_yolo(**places, data_yaml_path=str(out / "data.yaml"))
        return {"annotations": ".", "photos": "images"}
    if format_ == "voc":
        places = {"images_directory_path": str(out / "JPEGImages"), "annotations_directory_path": str(out / "Annotations")}
        dataset.as_pascal_voc(**places)
        return {"annotations": ".", "photos": "JPEGImages"}
    dataset.as_coco(images_directory_path=str(out / "photos"), annotations_path=str(out / "coco.json"))
    return {"annotations": "coco.json", "photos": "photos"}


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


def write_datumaro(format_, world, out):
    """Frame exif: `imagesize`, which tells it how large photos are, turns them."""
    from datumaro import Bbox, Dataset, DatasetItem, Image, Polygon

    labels, photos = read_world(world, "exif")
    items = []
    for photo in photos:
        shapes = []
        for number, box in enumerate(photo["boxes"], start=1):
            known = {"label": labels.index(box["label"]), "id": number, "group": number}
            outlined = format_.endswith(", polygons") and box["polygon"]
            shapes.append(Polygon(flat(box["polygon"]), **known) if outlined else Bbox(*place(box), **known))
        media = Image.from_file(path=photo["path"])
        name = open_images_id(len(items)) if format_ == "open_images" else str(Path(photo["name"]).with_suffix(""))
        # Ultralytics' format needs both splits.
        subset = "val" if format_ == "yolo, ultralytics" and not items else "train"
        items.append(DatasetItem(id=name, subset=subset, media=media, annotations=shapes))
    dataset = Dataset.from_iterable(items, categories=labels)
    if format_.startswith("coco"):
        dataset.export(str(out), "coco_instances", save_media=True)
        return {"annotations": "annotations/instances_train.json", "photos": "images"}
    if format_ == "open_images":
        dataset.export(str(out), "open_images", save_media=True)
        return {"annotations": "annotations", "photos": "images"}
    kind = {"voc": "voc_detection", "cvat, polygons": "cvat", "yolo, ultralytics": "yolo_ultralytics"}.get(format_, format_)
    dataset.export(str(out), kind, save_media=True)
    return {"annotations": ".", "photos": "images" if kind == "cvat" else "."}


def write_globox(format_, world, out):
    """Frame stored: it reads how large photos are from their headers."""
    from globox import Annotation, AnnotationSet, BoundingBox, BoxFormat

    labels, photos = read_world(world, "stored")
    dataset = AnnotationSet()
    for photo in photos:
        made = [(box["label"], tuple(box["edges"])) for box in photo["boxes"]]
        boxes = [BoundingBox.create(label=label, coords=edges, box_format=BoxFormat.LTRB) for label, edges in made]
        name = open_images_id(len(dataset)) if format_ == "open_images" else photo["name"]
        dataset.add(Annotation(name, (photo["width"], photo["height"]), boxes))
    if format_ == "coco":
        dataset.save_coco(out / "coco.json", auto_ids=True)
        return {"annotations": "coco.json"}
    if format_ == "voc":
        make_folders(out / "Annotations", photos)
        dataset.save_pascal_voc(out / "Annotations")
        return {"annotations": "."}
    if format_ == "yolo":
        make_folders(out / "labels", photos)
        dataset.save_yolo_darknet(out / "labels", label_to_id={label: number for number, label in enumerate(labels)})
        (out / "classes.txt").write_text("\n".join(labels), encoding="utf-8")
        return {"annotations": "."}
    dataset.save_openimage(out / "train-annotations-bbox.csv")
    return {"annotations": "."}


def make_folders(folder, photos):
    """Those of photos' names, which globox does not make."""
    for photo in photos:
        (folder / photo["name"]).parent.mkdir(parents=True, exist_ok=True)


LABEL_CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image">{labels}</RectangleLabels>
<PolygonLabels name="outline" toName="image">{labels}</PolygonLabels></View>"""


def write_label_studio_sdk(format_, world, out):
    """Frame exif: boxes are drawn in a browser, in percent of the photo as shown."""
    # Where a server of Label Studio may read; without it, files are asked of the server.
    if format_ != "coco, local paths":
        os.environ["LOCAL_FILES_DOCUMENT_ROOT"] = str(world)
    from label_studio_sdk.converter import Converter

    labels, photos = read_world(world, "exif")
    uploads = out / "upload" / "1"
    uploads.mkdir(parents=True)
    tasks = []
    for number, photo in enumerate(photos, start=1):
        name = Path(photo["name"]).name
        shutil.copy(photo["path"], uploads / name)
        address = f"/data/upload/1/{name}"
        if format_ not in ("coco, uploads", "json, uploads"):
            address = f"/data/local-files/?d=photos/{photo['name']}"
        result = [drawn(box, photo, format_.endswith(", polygons"), place) for place, box in enumerate(photo["boxes"])]
        annotations = [{"id": number, "completed_by": 1, "result": result}] if result else []
        tasks.append({"id": number, "data": {"image": address}, "annotations": annotations})
    (out / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    if format_.startswith("json, "):  # What its server writes, from which the converter makes all other formats.
        return {"annotations": "tasks.json", "photos": "upload" if format_ == "json, uploads" else None}
    config = LABEL_CONFIG.format(labels="".join(f'<Label value="{label}"/>' for label in labels))
    copies = format_ in ("coco, local storage", "coco, polygons", "yolo", "voc")
    converter = Converter(config, str(out), upload_dir=str(out / "upload"), download_resources=copies)
    if format_ in ("json min", "yolo", "voc"):
        name = {"yolo": "YOLO_WITH_IMAGES"}.get(format_, format_.replace(" ", "_").upper())
        converter.convert(str(out / "tasks.json"), str(out / "export"), name, is_dir=False)
        return {"annotations": "export", "photos": None if format_ == "json min" else "export/images"}
    converter.convert_to_coco(str(out / "tasks.json"), str(out / "export"), is_dir=False)
    return {"annotations": "export/result.json", "photos": None if format_ == "coco, local paths" else "export/images"}


def drawn(box, photo, outlines, number):
    """A result of Label Studio: percent of the photo's sides."""
    width, height = photo["width"], photo["height"]
    known = {"id": f"r{number}", "to_name": "image", "original_width": width, "original_height": height, "image_rotation": 0}
    if outlines and box["polygon"]:
        value = {"points": [[100 * x / width, 100 * y / height] for x, y in box["polygon"]], "polygonlabels": [box["label"]]}
        return {**known, "from_name": "outline", "type": "polygonlabels", "value": value}
    x, y, w, h = place(box)
    value = {"x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width, "height": 100 * h / height, "rotation": 0}
    return {**known, "from_name": "label", "type": "rectanglelabels", "value": {**value, "rectanglelabels": [box["label"]]}}


def write_coco(path, labels, photos, folders):
    """COCO's format as COCO itself writes it, for tools that begin from it; names of photos with their folders or without."""
    images, annotations = [], []
    for number, photo in enumerate(photos, start=1):
        name = photo["name"] if folders else Path(photo["name"]).name
        images.append({"id": number, "file_name": name, "width": photo["width"], "height": photo["height"]})
        for box in photo["boxes"]:
            known = {"id": len(annotations) + 1, "image_id": number, "category_id": labels.index(box["label"]) + 1, "iscrowd": 0}
            _, _, width, height = place(box)
            annotations.append({**known, "bbox": place(box), "area": width * height, "segmentation": []})
    categories = [{"id": number, "name": label, "supercategory": ""} for number, label in enumerate(labels, start=1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}), encoding="utf-8")


def write_pylabel(format_, world, out):
    """Frame stored: sizes of photos are what COCO says."""
    from pylabel import importer

    labels, photos = read_world(world, "stored")
    write_coco(out / "given.json", labels, photos, folders=True)
    dataset = importer.ImportCoco(str(out / "given.json"))
    if format_ == "coco":
        dataset.export.ExportToCoco(str(out / "coco.json"))
        return {"annotations": "coco.json"}
    dataset.df.to_csv(out / "boxes.csv")
    return {"annotations": "boxes.csv"}


def write_imgann(format_, world, out):
    """Frame stored: sizes of photos are what COCO says. By default (`center`) it takes x and y for the centre of a box."""
    from imgann import Convertor

    labels, photos = read_world(world, "stored")
    write_coco(out / "given.json", labels, photos, folders=False)
    (out / "photos").mkdir()
    for photo in photos:
        shutil.copy(photo["path"], out / "photos")
    given = str(out / "photos"), str(out / "given.json")
    Convertor.coco2csv(*given, str(out / "boxes.csv"), center=False)
    if format_ == "coco":
        Convertor.csv2coco(given[0], str(out / "boxes.csv"), str(out / "coco.json"), center=False)
    return {"annotations": "coco.json" if format_ == "coco" else "boxes.csv", "photos": "photos"}


def main():
    """One tool, one format."""
    tool, format_, world, out = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    out.mkdir(parents=True, exist_ok=True)
    made = globals()[f"write_{tool.replace('-', '_')}"](format_, world, out)
    print(f"\n{json.dumps(made)}")


if __name__ == "__main__":
    main()
