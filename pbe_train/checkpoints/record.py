"""What an export says of itself that no tensor tells: how its model is to be used, how deep it is, under what licence it is.

A file in the original layout carries it inside, so that its copy paints the same; for a folder export.json has it.
"""

import json
from pathlib import Path
from typing import Any

from pbe_core.errors import InputError
from pbe_core.words import number_of

RECORD = "export.json"
KEY = "paint_by_example"
"""Of the record in a safetensors file's metadata, or beside the `state_dict` of a pickle; its value is JSON."""


def parse_record(text: object) -> dict[str, Any]:
    """The record in such a value; nothing where it is none."""
    try:
        content = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def record_beside(folder: Path, file: str) -> dict[str, Any]:
    """What export.json in a folder says, if that file there is one of the export; nothing of any other model.

    Args:
        folder: of the model.
        file: its weights, by their path in the folder.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
        mine = record["files"][file]["bytes"] == (folder / file).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return record if mine else {}


def check_depth(where: str, blocks: int, layers: int, record: dict[str, Any]) -> None:
    """Refuse a model that is not whole, which would otherwise be taken for a shallower one.

    Args:
        where: file or folder, for messages.
        blocks: of its conditioner.
        layers: of its vision encoder.
        record: what it says of itself.

    Raises:
        InputError: the record, or else the rule by which both published programs make their models, says otherwise.
    """
    expected_layers = record.get("encoder_layers", layers)
    expected_blocks = record.get("conditioner_blocks", (layers + 1) // 5)
    if (blocks, layers) != (expected_blocks, expected_layers):
        raise InputError(
            f"{where}: its conditioner has {number_of(blocks, 'block')} and its vision encoder {number_of(layers, 'layer')}, "
            f"where {expected_blocks} and {expected_layers} belong together; it is cut short or of another kind, get it again"
        )
