"""A setting that was given and that nothing reads is refused, in one line with the way out."""

import pytest

from pbe_core.errors import InputError
from pbe_core.settings import dump_settings, load_settings, preset
from pipelines.annotations import open_source
from pipelines.annotations.source import flags_that_nobody_sets, refuse_unread
from pipelines.config import BuildSettings
from tests.coco_files import annotation, write

OWN = ["--source.kind", "boxes", "--source.unit", "pixel"]
COCO = ["--source.kind", "coco"]


def settings_of(*options: str, name: str = "open_images") -> BuildSettings:
    return load_settings(BuildSettings, "build", list(options), preset(name))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--source.validation_share", "0.2"], "source.validation_share: open_images has splits of its own"),
        (["--source.storage", '{"anon": true}'], "source.storage: it is for a photo store behind a URL"),
        (["--storage", '{"anon": true}'], "build.storage: it is for a dataset behind a URL"),
        (["--crawl.contact", "me@example.org"], "crawl.contact: nothing is crawled, as build.crawl.sources names no place"),
        (["--crawl.per_host.concurrency", "2"], "crawl.per_host: nothing is crawled"),
    ],
)
def test_what_nothing_reads_is_refused(options, says):
    with pytest.raises(InputError) as caught:
        refuse_unread(settings_of(*options))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        [],
        [*OWN, "--source.validation_share", "0.2", "--source.frame", "stored"],
        [*COCO, "--references.background", "grey", "--source.validation_share", "0.2", "--source.frame", "exif"],
        ["--source.photos", "s3://bucket/store", "--source.storage", '{"anon": true}'],
        ["--out", "s3://bucket/dataset", "--storage", '{"anon": true}'],
        ["--crawl.sources", '["{url}"]', "--crawl.contact", "me@example.org", "--crawl.workers", "2"],
    ],
)
@pytest.mark.parametrize("name", ["open_images", "coco", "tiny"])
def test_presets_can_be_used_with_every_kind_of_source(name, options):
    """Those of one kind hold nothing that another one does not read."""
    kind = [] if "--source.kind" in options or name != "coco" else ["--source.kind", "open_images"]
    refuse_unread(settings_of(*kind, *options, name=name))


def test_dumped_settings_can_be_used_again(tmp_path):
    """All of them stand there, and none of them was given by anybody."""
    (tmp_path / "all.yaml").write_text(dump_settings(settings_of(), "build"))
    refuse_unread(load_settings(BuildSettings, "build", ["--config", str(tmp_path / "all.yaml")]))


def test_a_share_for_validation_is_refused_where_the_annotations_have_splits(tmp_path):
    """Which the reader alone knows. No other setting is refused before anything is read: every program opens annotations here."""
    write(tmp_path / "coco" / "instances_train.json", [annotation(1)])
    table = tmp_path / "boxes.csv"
    table.write_text("photo,x_min,y_min,x_max,y_max,split\na.jpg,1,2,30,40,train\n")
    share = ["--source.validation_share", "0.3"]
    for path, kind in ((tmp_path / "coco", [*COCO, "--source.splits", '["train"]']), (table, OWN)):
        options = ["--source.annotations", str(path), *kind]
        with pytest.raises(InputError, match=rf"source.validation_share: .*{path.name} has splits of its own"):
            open_source(settings_of(*options, *share))
        assert open_source(settings_of(*options)).rows
    one_file = tmp_path / "coco" / "instances_train.json"
    assert open_source(settings_of("--source.annotations", str(one_file), *COCO, *share)).rows == 1
    with pytest.raises(InputError, match=r"source\.storage"):
        open_source(settings_of("--source.annotations", str(tmp_path / "nowhere"), "--source.storage", '{"anon": true}'))


def test_grey_is_refused_where_no_file_has_object_masks(tmp_path):
    """In every kind of source masks are something that may be missing; what would have them is said."""
    table = tmp_path / "boxes.csv"
    table.write_text("photo,x_min,y_min,x_max,y_max\na.jpg,1,2,30,40\n")
    with pytest.raises(InputError, match=r"references\.background: grey takes object masks, and .*boxes\.csv has none: .*`mask`"):
        open_source(settings_of("--source.annotations", str(table), *OWN, "--references.background", "grey"))


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (["--selection.reject_flags", '["truncated"]'], []),
        ([*COCO, "--selection.reject_flags", '["truncated", "group_of"]'], ["truncated"]),
        ([*OWN, "--selection.reject_flags", '["group_of"]'], ["group_of"]),
    ],
)
def test_flags_that_boxes_of_a_kind_never_have_are_known(options, flags):
    assert flags_that_nobody_sets(settings_of(*options)) == flags
