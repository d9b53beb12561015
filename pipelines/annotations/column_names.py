"""Columns of a table of boxes by the names that people and tools give them: what is beyond doubt is read, the rest is refused.

    photo,x_min,y_min,x_max,y_max,label          ours
    image,xmin,ymin,xmax,ymax,label              VoTT and many others: read, and said
    filename,width,height,class,xmin,...         TensorFlow's examples: read, and said
    photo,x,y,width,height                       corner and size, or centre and size? refused, with what either would be
    ...,lable,name                               refused, all at once, each with what it may mean

Names are compared by their letters and digits alone: `XMin`, `x_min` and `x-min` are one.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

CORNERS = ("x_min", "y_min", "x_max", "y_max")
REQUIRED = ("photo", *CORNERS)
OPTIONAL = ("label", "split", "width", "height", "url", "author", "licence")
COLUMNS = (*REQUIRED, *OPTIONAL)
_MEANING = {
    "photo": (
        "photo image img filename file filepath path imagepath imgpath imagename imgname imagefile imagefilename imgfilename "
        "photopath photoname"
    ),
    "x_min": "xmin x1 left xtl bboxxmin boxxmin bboxx1",
    "y_min": "ymin y1 top ytl bboxymin boxymin bboxy1",
    "x_max": "xmax x2 right xbr bboxxmax boxxmax bboxx2",
    "y_max": "ymax y2 bottom ybr bboxymax boxymax bboxy2",
    "label": "label class classname category categoryname labelname classlabel catname",
    "split": "split subset",
    "width": "width imagewidth imgwidth photowidth",
    "height": "height imageheight imgheight photoheight",
    "url": "url imageurl imgurl photourl",
    "author": "author",
    "licence": "licence license",
}
_COLUMN_OF = {word: column for column, words in _MEANING.items() for word in words.split()}
# Some count the corners from 0: then x1 is the right edge.
_FROM_ZERO = {"x0": "x_min", "y0": "y_min", "x1": "x_max", "y1": "y_max"}
# Neither place nor class of a box; the first two are what pandas writes for its row numbers.
_NOT_READ = re.compile(r"|unnamed\d*|index|id|annotationid|boxid|area|iscrowd|confidence|score|depth|filesize|trackerid")
# Numbers beside the names that count; alone they may be what is meant.
_BESIDE = dict.fromkeys(("imageid", "imgid", "photoid"), "photo") | dict.fromkeys(("classid", "categoryid", "labelid"), "label")
_MAY_MEAN = _BESIDE | {
    "x": "x_min",
    "y": "y_min",
    **dict.fromkeys(("name", "title"), "photo` or `label"),
    **dict.fromkeys(("object", "objectname", "type", "tag", "cls", "target"), "label"),
    **dict.fromkeys(("set", "usage", "dataset", "fold"), "split"),
}
_OPEN_IMAGES = {"imageid", "labelname", "xmin"}
_EXPORT_COCO = "whose boxes are JSON in a cell: export COCO there, and read that with source.kind: coco (docs/coco.md)"


@dataclass(frozen=True)
class Columns:
    """What the names in a header, or the keys of JSON objects, mean."""

    names: tuple[str, ...]
    """As they stand."""
    columns: tuple[str | None, ...]
    """Ours, one for each; null for what is not read."""
    unknown: tuple[str, ...]
    """Names that may mean something, and one cannot tell what."""

    @property
    def note(self) -> str | None:
        """What a user should know; null where all names are ours."""
        pairs = list(zip(self.names, self.columns, strict=True))
        other = [f"{name} as {column}" for name, column in pairs if column and name != column]
        left = [name for name, column in pairs if name and column is None and name not in self.unknown]
        if nameless := self.names.count(""):
            left.insert(0, "a column without a name" if nameless == 1 else f"{nameless} columns without names")
        parts = [f"read {', '.join(other)}" if other else "", f"not read: {', '.join(left)}" if left else ""]
        return "; ".join(part for part in parts if part) or None

    @property
    def twice(self) -> dict[str, tuple[str, ...]]:
        """Columns that several names stand for -> these names."""
        pairs = list(zip(self.names, self.columns, strict=True))
        named = {column: tuple(name for name, meant in pairs if meant == column) for column in COLUMNS}
        return {column: names for column, names in named.items() if len(names) > 1}


def columns_of(names: tuple[str, ...]) -> Columns:
    """What names mean: one alone may mean nothing that is sure, beside others it does."""
    words = [_letters(name) for name in names]
    known = _COLUMN_OF | _FROM_ZERO if {"x0", "y0"} <= set(words) else _COLUMN_OF
    columns = tuple(known.get(word) for word in words)
    unknown = tuple(
        name
        for name, word, column in zip(names, words, columns, strict=True)
        if column is None and not _NOT_READ.fullmatch(word) and (word not in _BESIDE or _BESIDE[word] not in columns)
    )
    return Columns(names, columns, unknown)


def problem_of(found: Columns, complete: bool = True) -> str | None:
    """What is wrong with the names of a table, all of it, with the way out; null if nothing is.

    Args:
        found: its names.
        complete: whether these are all; an object of JSON Lines may leave out what others have.
    """
    missing = [column for column in REQUIRED if column not in found.columns] if complete else []
    if missing and (form := _other_form(found)):
        return form
    told = _twice(found)
    columns = f"columns are {', '.join(COLUMNS)}"
    if found.unknown:
        lacking = f"; column {', '.join(missing)} is missing" if missing else ""
        asked = ", ".join(f"{name[:40]!r}{_hint(name)}" for name in found.unknown)
        them = "it" if len(found.unknown) == 1 else "them"
        told.append(f"no column is called {asked}{lacking}; rename {them} or take {them} out: {columns}")
    elif missing:
        told.append(
            f"column {', '.join(missing)} is missing (found: {', '.join(found.names)}); at least {','.join(REQUIRED)} are needed"
        )
    if told:
        return "; ".join(told)
    if ("width" in found.columns) != ("height" in found.columns):
        return "of width and height only one is there; give both or none"
    return None


def _twice(found: Columns) -> list[str]:
    """What to say of columns that are there more than once."""
    alike = [column for column, names in found.twice.items() if len(set(names)) == 1]
    told = []
    if len(alike) == 1:
        told = [f"column `{found.twice[alike[0]][0]}` is there twice; take one of them out"]
    elif alike:
        which = ", ".join(f"`{found.twice[column][0]}`" for column in alike)
        way = "keep one name of each, and leave the others empty (docs/own-data.md#four-corners)"
        told = [f"columns {which} are there twice; {way}"]
    return told + [
        f"columns {', '.join(names)} all mean `{column}`; keep one of them"
        for column, names in found.twice.items()
        if column not in alike
    ]


def own_table(names: Sequence[str]) -> str | None:
    """For a header that seems to be of boxes of one's own: what its names mean, in words. Null for any other."""
    found = columns_of(tuple(names))
    if {_letters(name) for name in names} >= _OPEN_IMAGES:
        return None
    if sum(corner in found.columns for corner in CORNERS) < 2:
        return _other_form(found)
    return ", ".join(f"{name} is {column}" for name, column in zip(names, found.columns, strict=True) if column)


def header_for(cells: Sequence[str], is_number: Sequence[bool]) -> str | None:
    """What to put above a table that has no header, by its first row; null if the row may well be a header.

    Args:
        cells: of the first row.
        is_number: for each, whether it is a number.
    """
    if not any(is_number) and not any(re.search(r"\.(jpe?g|png|webp|bmp|tiff?|gif)$", cell, re.IGNORECASE) for cell in cells):
        return None
    edges = [number or not cell for cell, number in zip(cells[1:5], is_number[1:5], strict=True)]
    # keras-retinanet's rows have a class at the end, and nothing but the photo's path where there is no box.
    if len(cells) in (5, 6) and not is_number[0] and all(edges):
        return f"put the names of the columns there: {','.join((*REQUIRED, 'label')[: len(cells)])}"
    here = ""
    # Google's AutoML and Vertex AI: the corners that are left empty would repeat the two others.
    if len(cells) == 11 and not any((*cells[5:7], *cells[9:])) and all((*is_number[3:5], *is_number[7:9])):
        split = "" if cells[0].casefold() == "unassigned" else "split"
        here = f"; of this table they seem to be {split},photo,label,x_min,y_min,,,x_max,y_max,, (docs/own-data.md#four-corners)"
    return f"put the names of the columns there, in their order: columns are {', '.join(COLUMNS)}{here}"


def _other_form(found: Columns) -> str | None:
    """What a table is whose boxes are not given as four edges, with the way out; null if its names do not tell."""
    words = {_letters(name) for name in found.names}
    if "regionshapeattributes" in words:
        return f"this is VIA's CSV, {_EXPORT_COCO}"
    if {"annotationid", "leadtime"} <= words:
        return f"this is Label Studio's CSV, {_EXPORT_COCO}"
    if words >= _OPEN_IMAGES:
        return "this is a table of Open Images: set source.kind: open_images and source.annotations to the folder that holds it"
    if {"x_max", "y_max"} & set(found.columns):
        return None
    plain = {re.sub("^(bbox|box)", "", word) or "bbox" for word in words if word}
    sizes = next((pair for pair in (("w", "h"), ("width", "height")) if set(pair) <= plain), None)
    if sizes and plain & {"xcenter", "xcentre", "centerx", "centrex", "cx"}:
        return (
            f"boxes are given as centre and size; write edges: x_min = x_center - {sizes[0]} / 2, x_max = x_center + "
            f"{sizes[0]} / 2, and so for y (docs/own-data.md#boxes-of-another-form)"
        )
    if sizes and plain & {"x", "xmin", "left"}:
        return (
            f"boxes are given as a point and {sizes[0]}, {sizes[1]}; write edges: where the point is the top left corner, "
            f"x_max = x + {sizes[0]} and y_max = y + {sizes[1]} (docs/own-data.md#boxes-of-another-form)"
        )
    if plain & {"bbox", "boundingbox"}:
        return (
            "a box stands in one cell; give each edge a column of its own: x_min, y_min, x_max, y_max "
            "(docs/own-data.md#boxes-of-another-form)"
        )
    return None


def _hint(name: str) -> str:
    word = _letters(name)
    if word in _MAY_MEAN:
        return f" (is it `{_MAY_MEAN[word]}`?)"
    close = difflib.get_close_matches(word, _COLUMN_OF, n=1, cutoff=0.6)
    return f" (did you mean `{_COLUMN_OF[close[0]]}`?)" if close else ""


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
