"""Runs in the environment of one foreign tool, without this project: the tool turns what another one wrote into COCO.

    python -I foreign_converters.py TOOL FORMAT FILES OUT

FILES has the folders `photos` and `annotations`, a file for each photo in both, and the classes in classes.txt, data.yaml and
labelmap.txt. Writes OUT/coco.json. The last line printed is JSON: where the annotations are, below OUT.
"""

import json
import shutil
import sys
from pathlib import Path


def convert_supervision(format_, files, out):
    from supervision import DetectionDataset

    photos, annotations = str(files / "photos"), str(files / "annotations")
    if format_ == "voc, one-based":
        dataset = DetectionDataset.from_pascal_voc(photos, annotations)
    elif format_ == "yolo":
        dataset = DetectionDataset.from_yolo(photos, annotations, str(files / "data.yaml"))
    else:
        dataset = DetectionDataset.from_labelme(photos, annotations)
    dataset.as_coco(annotations_path=str(out / "coco.json"))


def convert_datumaro(format_, files, out):
    """It knows Pascal VOC by its folders, and other classes than Pascal's own by labelmap.txt."""
    from datumaro import Dataset

    voc = out / "voc"
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    shutil.copytree(files / "annotations", voc / "Annotations")
    shutil.copytree(files / "photos", voc / "JPEGImages")
    shutil.copy(files / "labelmap.txt", voc)
    stems = sorted(path.stem for path in (files / "annotations").glob("*.xml"))
    (voc / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
    mode = {"coordinate_mode": "voc-one-based"} if format_ == "voc, one-based" else {}
    Dataset.import_from(str(voc), "voc_detection", **mode).export(str(out / "coco"), "coco_instances")
    shutil.copy(out / "coco" / "annotations" / "instances_train.json", out / "coco.json")


def convert_globox(format_, files, out):
    from globox import AnnotationSet

    if format_ == "voc":
        dataset = AnnotationSet.from_pascal_voc(files / "annotations")
    elif format_ == "labelme":
        dataset = AnnotationSet.from_labelme(files / "annotations", include_poly=True)
    else:
        dataset = AnnotationSet()
        # It wants one ending for all photos.
        for ending in {path.suffix for path in (files / "photos").iterdir()}:
            part = out / ending
            part.mkdir()
            for photo in (files / "photos").glob(f"*{ending}"):
                if (text := files / "annotations" / f"{photo.stem}.txt").is_file():
                    shutil.copy(text, part)
            found = AnnotationSet.from_yolo_v5(part, image_folder=files / "photos", image_extension=ending)
            labels = (files / "classes.txt").read_text(encoding="utf-8").splitlines()
            dataset.update(found.map_labels({str(number): label for number, label in enumerate(labels)}))
    dataset.save_coco(out / "coco.json", auto_ids=True)


def convert_labelformat(format_, files, out):
    from labelformat import formats

    labels = (files / "classes.txt").read_text(encoding="utf-8").splitlines()
    if format_ == "voc":
        dataset = formats.PascalVOCObjectDetectionInput(files / "annotations", ",".join(labels))
    else:
        # It finds the folder `labels` by the name of the folder `images`.
        shutil.copytree(files / "photos", out / "yolo" / "images")
        shutil.copytree(files / "annotations", out / "yolo" / "labels")
        content = {"path": ".", "train": "images", "names": labels}
        (out / "yolo" / "data.yaml").write_text(json.dumps(content), encoding="utf-8")
        dataset = formats.YOLOv8ObjectDetectionInput(out / "yolo" / "data.yaml", "train")
    formats.COCOObjectDetectionOutput(out / "coco.json").save(dataset)


def convert_labelme2coco(format_, files, out):
    import labelme2coco

    # Photos and annotations lie side by side, as LabelMe leaves them.
    shutil.copytree(files / "photos", out / "labelme")
    shutil.copytree(files / "annotations", out / "labelme", dirs_exist_ok=True)
    labelme2coco.convert(str(out / "labelme"), str(out / "made"))
    shutil.copy(out / "made" / "dataset.json", out / "coco.json")


def convert_pylabel(format_, files, out):
    from pylabel import importer

    if format_ == "voc":
        dataset = importer.ImportVOC(str(files / "annotations"), path_to_images="../photos")
    else:
        labels = (files / "classes.txt").read_text(encoding="utf-8").splitlines()
        dataset = importer.ImportYoloV5(str(files / "annotations"), cat_names=labels, path_to_images="../photos")
    dataset.export.ExportToCoco(str(out / "coco.json"))


def convert_fiftyone(format_, files, out):
    """Its importers and exporters alone: its data sets need MongoDB."""
    from fiftyone import ImageMetadata
    from fiftyone.utils.coco import COCODetectionDatasetExporter
    from fiftyone.utils.voc import VOCDetectionDatasetImporter
    from fiftyone.utils.yolo import YOLOv5DatasetImporter

    labels = (files / "classes.txt").read_text(encoding="utf-8").splitlines()
    if format_ == "voc":
        importer = VOCDetectionDatasetImporter(data_path=str(files / "photos"), labels_path=str(files / "annotations"))
    else:
        shutil.copytree(files / "photos", out / "yolo" / "images" / "val")
        shutil.copytree(files / "annotations", out / "yolo" / "labels" / "val")
        content = {"path": ".", "val": "./images/val/", "names": labels}
        (out / "yolo" / "dataset.yaml").write_text(json.dumps(content), encoding="utf-8")
        importer = YOLOv5DatasetImporter(dataset_dir=str(out / "yolo"))
    exporter = COCODetectionDatasetExporter(
        export_dir=str(out), data_path="none", labels_path="coco.json", classes=labels, export_media=False
    )
    with importer, exporter:
        for path, metadata, found in importer:
            exporter.export_sample(path, found, metadata=metadata or ImageMetadata.build_for(path))


def main():
    """One tool, one format."""
    tool, format_, files, out = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    out.mkdir(parents=True, exist_ok=True)
    globals()[f"convert_{tool.replace('-', '_')}"](format_, files, out)
    print(f"\n{json.dumps({'annotations': 'coco.json'})}")


if __name__ == "__main__":
    main()
