"""XML from strangers as a tree: no document type, so no entity that grows, and no other file is ever opened."""

from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

# Deeper than any tool nests; the tree is walked by recursion elsewhere.
_DEEPEST = 50


def read_xml(path: Path) -> Element:
    """The root of a file, with all below it.

    Raises:
        ValueError: the file is no XML, is cut off, cannot be read, or declares a document type; with what is wrong, in words.
    """
    builder, depth = TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"has elements in elements, more than {_DEEPEST} deep")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise ValueError("declares a document type (<!DOCTYPE ...>), which no annotation needs; take that line away")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.buffer_text = True
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except (expat.ExpatError, LookupError) as error:  # The latter for an encoding that nobody knows.
        raise ValueError(f"is no XML that can be read ({error})") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    return builder.close()


def text_of(element: Element, tag: str) -> str:
    """The text of a child, without spaces around it; empty where there is none."""
    return (element.findtext(tag) or "").strip()
