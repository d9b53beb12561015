"""Which classes a build takes: `selection.include_labels` and `exclude_labels`, by name or id, each with what lies below it."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from pbe_core.errors import InputError
from pipelines.annotations.source import Source
from pipelines.config import SelectionSettings


@dataclass(frozen=True)
class ClassChoice:
    """For each word of a list of labels: whether the source knows it, and whether the settings take it."""

    known: Bool[np.ndarray, " labels"]
    chosen: Bool[np.ndarray, " labels"]


def choose_classes(labels: Sequence[str], source: Source, settings: SelectionSettings) -> ClassChoice:
    """Whether each label is known and chosen.

    Args:
        labels: class ids as they stand in the boxes.
        source: for names and hierarchy.
        settings: `include_labels` and `exclude_labels`.

    Raises:
        InputError: a name in the settings is no class of the source, or of several.
    """
    included = below(settings.include_labels, source, "include_labels", labels)
    excluded = below(settings.exclude_labels, source, "exclude_labels", labels)
    known = [not source.class_names or label in source.class_names for label in labels]
    chosen = [(not settings.include_labels or label in included) and label not in excluded for label in labels]
    return ClassChoice(np.array(known, bool), np.array(chosen, bool))


def class_notes(labels: Sequence[str], source: Source, settings: SelectionSettings) -> Iterator[str]:
    """What a user of Open Images may not expect of `include_labels` and `exclude_labels`: classes without those below them.

    Args:
        labels: class ids as they stand in the boxes.
        source: for names and hierarchy.
        settings: the two lists; `choose_classes` knows all their words.
    """
    for key, words in (("include_labels", settings.include_labels), ("exclude_labels", settings.exclude_labels)):
        if not words:
            continue
        if not source.subclasses:
            yield (
                f"selection.{key} means {', '.join(words)} alone, and nothing below: no class hierarchy is read "
                f"(bbox_labels_600_hierarchy.json belongs beside the annotations; docs/selection.md#files-of-open-images)"
            )
            continue
        nodes = {*source.subclasses, *(child for children in source.subclasses.values() for child in children)}
        outside = [word for word in words if _class_id(word, source.class_names, {*nodes, *labels}, key) not in nodes]
        if outside:
            yield f"selection.{key}: {', '.join(outside)}: not in the class hierarchy, so nothing is below"


def below(wanted: Iterable[str], source: Source, key: str, present: Sequence[str] = ()) -> set[str]:
    """The ids of the wanted classes and of all classes below them in the hierarchy.

    Raises:
        InputError: a name that is no class of the source, or that several classes bear.
    """
    stack = [_class_id(word, source.class_names, {*source.subclasses, *present}, key) for word in wanted]
    found: set[str] = set()
    while stack:
        label = stack.pop()
        if label not in found:
            found.add(label)
            stack += source.subclasses.get(label, ())
    return found


def _class_id(word: str, names: Mapping[str, str], others: set[str], key: str) -> str:
    if word in names or word in others:
        return word
    found = [label for label, name in names.items() if name.casefold() == word.casefold()]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"selection.{key}: several classes are called {word!r}: {', '.join(found)}; give the id of one")
    close = difflib.get_close_matches(word.casefold(), [name.casefold() for name in names.values()], n=3)
    meant = sorted({name for name in names.values() if name.casefold() in close})
    hint = f"did you mean {', '.join(meant)}?" if meant else "give a class's name or id as the source's class list has it"
    raise InputError(f"selection.{key}: the source has no class {word!r}; {hint}")
