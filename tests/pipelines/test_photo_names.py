"""Names of photos as tools write them, and the files that they mean."""

from pathlib import Path

import pytest

from pbe_core.images.decode import PhotoError
from pbe_core.photo_files import photo_path
from pipelines.annotations.photo_names import PhotoNames


@pytest.fixture
def photos(tmp_path):
    """A photo folder with some photos."""
    root = tmp_path / "set" / "images"
    for name in ("p1.jpg", "a/p2.jpg", "a/p3.jpg", "b/p3.jpg", "b/c/p4 ä.jpg", "train2017/9.jpg", "val/9.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("p1.jpg", "p1.jpg"),
        ("./a//p2.jpg", "a/p2.jpg"),
        ("a\\p2.jpg", "a/p2.jpg"),
        (".\\a\\p2.jpg", "a/p2.jpg"),
        ("images/p1.jpg", "p1.jpg"),  # It counts from the folder above,
        ("set/images/a/p2.jpg", "a/p2.jpg"),  # or from two above,
        ("images\\p1.jpg", "p1.jpg"),
        ("images/none.jpg", "none.jpg"),  # also where the photo is still to come.
        ("other/p1.jpg", "other/p1.jpg"),  # No guess: that would be another photo.
        ("{root}/a/p2.jpg", "a/p2.jpg"),
        ("{root}/none.jpg", "none.jpg"),
        ("file://{root}/b/c/p4%20%C3%A4.jpg", "b/c/p4 ä.jpg"),
        ("/mnt/data/p1.jpg", "p1.jpg"),
        ("/mnt/data/a/p3.jpg", "a/p3.jpg"),  # Of two files of this name, the one in a folder of the same name.
        ("D:\\data\\b\\p3.jpg", "b/p3.jpg"),
        ("\\\\server\\share\\p2.jpg", "a/p2.jpg"),
        ("http://images.cocodataset.org/train2017/9.jpg", "train2017/9.jpg"),
        ("https://host/x/train2017/9.jpg?size=1", "train2017/9.jpg"),
        ("http://host/set/images/p1.jpg", "p1.jpg"),
        ("http://host/elsewhere/p4%20%C3%A4.jpg", "b/c/p4 ä.jpg"),
        ("http://host/far/away/none.jpg", "away/none.jpg"),
        ("s3://bucket/9.jpg", "9.jpg"),
    ],
)
def test_a_name_leads_to_its_file(photos, name, path):
    assert PhotoNames([photos]).path_of(name.replace("{root}", str(photos))) == path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (None, "is empty or no text"),
        (" ", "is empty or no text"),
        ("../p1.jpg", "leads out of the photo folder"),
        ("{root}/../p1.jpg", "leads out of the photo folder"),
        ("C:\\..\\p1.jpg", "leads out of the photo folder"),
        ("http://host/../p1.jpg", "leads out of the photo folder"),
        ("http://host/%2e%2e/p1.jpg", "leads out of the photo folder"),
        ("http://host/", "is empty or no text"),
        ("a\0.jpg", "NUL"),
        ("/mnt/p9.jpg", r"is absolute, and no file p9.jpg is below .*images; write it relative to that folder"),
        ("/mnt/p3.jpg", r"is absolute, and 2 files p3.jpg are below .*images; write it relative to that folder"),
    ],
)
def test_a_name_that_leads_nowhere_says_why(photos, name, problem):
    text = name.replace("{root}", str(photos)) if isinstance(name, str) else name
    with pytest.raises(ValueError, match=problem):
        PhotoNames([photos]).path_of(text)


def test_two_absolute_names_of_one_base_name_are_two_photos(photos):
    """One file cannot be both, whichever was looked for first: a second reading tells."""
    names = PhotoNames([photos])
    names.path_of("/first/p1.jpg")
    for name in ("/second/p1.jpg", "/first/p1.jpg"):
        with pytest.raises(ValueError, match=r"for it and for /(first|second)/p1.jpg there is one file, p1.jpg; write both"):
            names.path_of(name)


def test_the_annotations_folder_stands_before_names_that_do_not_say_it(photos):
    """Photos of instances_val.json lie in val, and tools write 9.jpg, val/9.jpg or images/val/9.jpg for them."""
    for name in ("9.jpg", "val/9.jpg", "images/val/9.jpg"):
        assert PhotoNames([photos]).path_of(name, "val/") == "val/9.jpg"
    assert PhotoNames([photos]).path_of("p1.jpg", "val/") == "p1.jpg"  # It lies there, and not in val.


def test_a_plan_depends_on_the_photo_folder_only_where_it_was_asked(photos):
    names = PhotoNames([photos])
    for name in ("p1.jpg", "a/p2.jpg", "a\\none.jpg", f"{photos}/a/p3.jpg", "http://h/train2017/9.jpg"):
        names.path_of(name)
    assert not names.moved
    names.path_of("images/p1.jpg")
    assert names.moved


def test_photos_that_are_not_here_keep_their_names_apart():
    """They are known by ids, in a photo store or a bucket; nothing is looked for."""
    names = PhotoNames([Path("/no/photos")], here=False)
    for name, path in (
        ("/data/a/1.jpg", "data/a/1.jpg"),
        ("C:\\d\\1.jpg", "d/1.jpg"),
        ("http://h/val2017/1.jpg", "val2017/1.jpg"),
    ):
        assert names.path_of(name) == path


def test_links_to_folders_are_followed_and_circles_are_not(photos, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "p5.jpg").touch()
    (photos / "near").symlink_to(tmp_path / "far")
    (photos / "a" / "again").symlink_to(photos)
    assert PhotoNames([photos]).path_of("/x/p5.jpg") == "near/p5.jpg"
    assert PhotoNames([photos]).path_of("/x/p1.jpg") == "p1.jpg"


@pytest.mark.parametrize("name", ["../p6.jpg", "/etc/hosts", "a/../../p6.jpg"])
def test_no_file_outside_the_photo_folder_is_a_photo(photos, name):
    (photos.parent / "p6.jpg").touch()
    with pytest.raises(PhotoError, match="no file"):
        photo_path(photos, "train", "p6", name)
