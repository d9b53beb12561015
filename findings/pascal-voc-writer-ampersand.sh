#!/usr/bin/env bash
# pascal-voc-writer 0.1.4: names go into the XML as they are, so `salt & pepper` makes a file that no parser reads.
#
# Guess: what is special in XML is escaped in class names and paths.
# Behaviour: it is not. A class or a photo with an ampersand gives a file that is not well-formed; one with `<` likewise.
# Nothing is said when it is written.
# Why it matters: it is found when the annotations are read, by another program, one file at a time, when the tool that made
# them is long done.
set -u
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT && cd "$work" || exit 2
install() { venv/bin/pip install --quiet "$@" || { echo "the install failed" >&2; exit 2; }; }
python3 -m venv venv || exit 2
install "pascal-voc-writer==0.1.4"
cat >probe.py <<'END'
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version

from pascal_voc_writer import Writer


def read_back(photo, name):
    writer = Writer(photo, 640, 480)
    writer.addObject(name, 10, 20, 30, 40)
    writer.save("made.xml")
    try:
        return ElementTree.parse("made.xml").findtext("object/name")
    except ElementTree.ParseError as error:
        return str(error).partition(":")[0]


seen = [read_back("a.jpg", "salt"), read_back("a.jpg", "salt & pepper"), read_back("salt & pepper.jpg", "salt")]
recorded = ["salt", "not well-formed (invalid token)", "not well-formed (invalid token)"]
print("pascal-voc-writer", version("pascal-voc-writer"))
print("guess:", ["salt", "salt & pepper", "salt"])
print("seen: ", seen)
sys.exit(0 if seen == recorded else f"changed: recorded was {recorded}")
END
venv/bin/python probe.py
