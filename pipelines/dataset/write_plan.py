"""The plan of a dataset folder, written before the first shard, and its fingerprint: all that determines the shards' bytes.

    annotations ──select──▶ objects, rejects ──cut──▶ plan.parquet ──▶ selection.json   from the tables alone
    + VAE, versions ──────────────────────────────────────────────▶ plan.json        before the first shard is packed

Both records are written last and hold a fingerprint. Tables with the same one are taken as they are; a folder that was planned
with another is refused, with the difference spelled out.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pbe_core.dataset_reader import read_dataset
from pbe_core.errors import InputError
from pbe_core.files import file_sha256, write_atomically
from pbe_core.leave_out import read_left_out
from pbe_core.network_files import hash_vae_files
from pbe_core.progress import Progress
from pbe_core.words import number_of
from pipelines.annotations import open_source
from pipelines.annotations.source import Source
from pipelines.config import BuildSettings
from pipelines.dataset.plan_shards import extend_plan, write_plan
from pipelines.dataset.shapes import PhotoShapes
from pipelines.selection.duplicates import read_scan
from pipelines.selection.objects import Selection, select_objects
from schemas.dataset import CUTTING_VERSION, FORMAT_VERSION, VaeIdentity

PLAN_RECORD = "plan.json"
SELECTION_RECORD = "selection.json"
# Those that read, hash and sort the tables; and those that decode, resize, draw and encode.
_TABLE_LIBRARIES = ("paint-by-example", "numpy", "pyarrow")
_PACKING_LIBRARIES = ("diffusers", "opencv-python-headless", "pillow", "torch")
PLAN_TABLES = ("objects.parquet", "rejects.parquet", "same_photos.parquet", "plan.parquet")
SOURCE_KEYS = (
    "kind",
    "splits",
    "validation_share",
    "unit",
    "frame",
    "same_photo",
    "max_photo_pixels",
    "missing_end_mark",
    "group_by",
)
# Of the settings of references, what the tables depend on; those that are as ever are not among the settings.
_REFERENCE_KEYS = ("background", "padding", "others", "frames", "alone")


def hash_inputs(settings: BuildSettings, source: Source) -> dict[str, str]:
    """SHA-256 of each annotation file, of the survey's tables and of the list of what is left out, where given; by file name."""
    return _hash_files(settings, source) | dict(source.read_elsewhere())


def _hash_files(settings: BuildSettings, source: Source) -> dict[str, str]:
    survey = settings.source.survey
    if survey:
        read_scan(survey)
    tables = [survey / name for name in ("photos.parquet", "same_photos.parquet")] if survey else []
    if listed := settings.selection.leave_out:
        read_left_out(listed)
        tables.append(listed)
    paths = (*source.files, *tables)
    names = Counter(path.name for path in paths)
    # The folders of splits may hold files of one name.
    called = {path: path.name if names[path.name] == 1 else f"{path.parent.name}/{path.name}" for path in paths}
    return {name: file_sha256(path) for path, name in called.items()}


def fingerprint(
    settings: BuildSettings, inputs: dict[str, str], vae: VaeIdentity | None, everything: bool = False
) -> dict[str, Any]:
    """What determines the tables (without a VAE), or the shards' bytes (with one, or with `everything`, but for the VAE).

    Contents of the annotation files, settings, versions of the code, the VAE's weights. Folders' names are not part of it: moving
    the inputs changes nothing. Nor are the photos, which would have to be read for it: a photo is known by its id, and each
    sample records the SHA-256 of the file that it was cut from.
    """
    chosen = settings.model_dump(mode="json", exclude={"out", "upload", "storage", "ray", "crawl"})
    chosen["source"] = {name: chosen["source"][name] for name in SOURCE_KEYS if name in chosen["source"]}
    chosen["source"]["frame"] = settings.source.photo_frame  # A frame that is given is the same as one that the kind has.
    # What the report alone shows changes neither who is accepted nor a byte of a shard.
    del chosen["selection"]["all_reasons"], chosen["latents"]["vae"]
    del chosen["selection"]["leave_out"]  # Its contents are among the inputs.
    if not (vae or everything):
        chosen = {
            "seed": chosen["seed"],
            "source": chosen["source"],
            "selection": chosen["selection"],
            "views": {name: chosen["views"][name] for name in ("per_object", "buckets") if name in chosen["views"]},
            # What min_object_share looks at, and who is whose reference.
            "references": {name: chosen["references"][name] for name in _REFERENCE_KEYS if name in chosen["references"]},
            "shards": {"samples": settings.shards.samples},
        }
    return {
        "format_version": FORMAT_VERSION,
        "versions": _versions(packed=bool(vae or everything)),
        "inputs": inputs,
        **(_vae_part(vae) if vae else {}),
        "settings": chosen,
    }


def _vae_part(vae: VaeIdentity) -> dict[str, Any]:
    """The weights, and how their latents are stored where that is not as ever: mean and standard deviation, as they come."""
    how = {"deterministic": vae.deterministic, "normalisation": vae.normalisation and vae.normalisation.model_dump(mode="json")}
    return {"vae": vae.sha256, **({"latents": how} if any(how.values()) else {})}


def fingerprint_hash(content: dict[str, Any]) -> str:
    """A fingerprint as 64 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def select_and_plan(settings: BuildSettings, extend: bool = False) -> tuple[Selection, dict[str, str]]:
    """Select and plan from the tables alone, or take what is there if its fingerprint is the same.

    Writes objects.parquet, rejects.parquet, same_photos.parquet, plan.parquet and, last, selection.json.

    Args:
        settings: of the build.
        extend: whether other annotations, rules of selection and versions of libraries may add samples to a finished dataset.

    Returns:
        What the selection found, and the hashes of the input files (`hash_inputs`).

    Raises:
        InputError: the folder holds shards that were planned otherwise, or what is wrong with the annotations.
    """
    out = settings.out
    _check_folder(settings)
    with Progress("opening the annotations"):
        source = open_source(settings)
    source.print_notes()
    stored, packed = _read_record(out / SELECTION_RECORD), _read_record(out / PLAN_RECORD)
    if not (stored or packed):  # Nothing depends on the hashes before the tables are there.
        with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
            of_files = pool.submit(_hash_files, settings, source)
            with Progress("hashing the annotations"):
                elsewhere = dict(source.read_elsewhere())
            selection, hashes = _plan_anew(settings, source, extend=False)
        inputs = of_files.result() | elsewhere
        return _record_selection(settings, fingerprint(settings, inputs, None), selection, hashes), inputs
    with Progress("hashing the annotations"):
        inputs = hash_inputs(settings, source)
    content = fingerprint(settings, inputs, None)
    if packed:
        planned = _of_tables(packed["fingerprint"], content)
        if planned != content and not (extend and _may_extend(planned, content)):
            raise _refusal(out / PLAN_RECORD, planned, content)
    if stored and stored["fingerprint"] == content:
        with Progress("hashing the tables"):
            whole = stored.get("sha256") == _hashes(out)
        if whole and (stored["all_reasons"] or not settings.selection.all_reasons):
            return Selection(**stored["selection"]), inputs
    if packed and packed.get("extends") and not extend:
        raise InputError(
            f"{out / SELECTION_RECORD}: missing or damaged, and the plan of this dataset, which was extended, does not follow "
            f"from the annotations alone; put the file back from a copy, or add --extend to plan anew what is not packed"
        )
    selection, hashes = _plan_anew(settings, source, extend=bool(packed and extend))
    return _record_selection(settings, content, selection, hashes), inputs


def _record_selection(
    settings: BuildSettings, content: dict[str, Any], selection: Selection, hashes: Mapping[str, str]
) -> Selection:
    """Write selection.json, by which the tables are known to be whole; returns the selection."""
    record = {
        "fingerprint": content,
        "all_reasons": settings.selection.all_reasons,
        "sha256": hashes,
        "selection": _as_kept(selection),
    }
    write_atomically(settings.out / SELECTION_RECORD, json.dumps(record, indent=1).encode())
    return selection


def _as_kept(selection: Selection) -> dict[str, Any]:
    """What is written of a selection: without the counts of references, where there are none."""
    kept = dataclasses.asdict(selection)
    return {name: value for name, value in kept.items() if value or name not in ("references", "objects_with_references")}


def _plan_anew(settings: BuildSettings, source: Source, extend: bool) -> tuple[Selection, dict[str, str]]:
    """Write the tables, for a dataset of their own or to extend the one that is there; returns their hashes, too."""
    out = settings.out
    finished: set[str] = set()
    if extend:
        splits = read_dataset(out).splits  # Finished: only then it is known what is packed.
        finished = {shard for counts in splits.values() for shard in counts.shards}
        packed_keys = pq.read_table(out / "index.parquet", columns=["key"])["key"].combine_chunks()
    # From here to the new record the tables are not whole.
    (out / SELECTION_RECORD).unlink(missing_ok=True)
    selection = select_objects(settings, out, source)
    buckets = settings.views.buckets
    shapes = PhotoShapes(buckets, settings.source.survey) if buckets else None
    sizes = settings.views.per_object, settings.shards.samples, shapes
    with Progress("cutting objects into shards"), ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        hashes = pool.submit(_hashes, out, PLAN_TABLES[:-1])  # These are there: hashed while the plan is written.
        if extend:
            extend_plan(out / "objects.parquet", out / "plan.parquet", finished, packed_keys, *sizes)
        else:
            write_plan(out / "objects.parquet", out / "plan.parquet", *sizes)
        of_all = hashes.result() | _hashes(out, PLAN_TABLES[-1:])
    if shapes:
        _check_shapes_known(shapes, settings)
    return selection, of_all


def _check_shapes_known(shapes: PhotoShapes, settings: BuildSettings) -> None:
    """Tell how many photos are taken for squares. Raises InputError where all of them are: buckets would mean nothing."""
    survey = "run `pbe survey` with the same settings and --source.survey FOLDER, then build with that"
    if shapes.unknown and not shapes.known:
        raise InputError(
            f"views.buckets: neither {settings.source.annotations} nor a survey says how large the photos are, so none has a "
            f"shape to go by; {survey}, or leave views.buckets out"
        )
    if shapes.unknown:
        print(
            f"note: the size of the photos of {shapes.unknown:,} of {number_of(shapes.known + shapes.unknown, 'object')} is not "
            f"known; their views have the shape nearest to a square ({survey})"
        )


def check_packing(settings: BuildSettings, inputs: dict[str, str]) -> None:
    """Refuse settings under which a folder that is packed, in whole or in part, was not planned. The VAE is not looked at.

    Raises:
        InputError: names the difference.
    """
    record = settings.out / PLAN_RECORD
    stored = _read_record(record)
    if stored:
        content = fingerprint(settings, inputs, None, everything=True)
        old = {name: stored["fingerprint"][name] for name in ("inputs", "settings")}
        new = {name: content[name] for name in ("inputs", "settings")}
        if old != new:
            raise _refusal(record, old, new)


def record_plan(settings: BuildSettings, inputs: dict[str, str], vae: VaeIdentity, extend: bool = False) -> str:
    """Bind a folder's tables to a VAE and to all settings. Returns the fingerprint's hash; `select_and_plan` comes first.

    The record also says which files the VAE was, so that whoever comes back need not load it to know that it is the same.

    Args:
        settings: of the build.
        inputs: hashes of the annotation files.
        vae: which encodes.
        extend: as in `select_and_plan`.

    Raises:
        InputError: the folder's shards were planned with other inputs or settings.
    """
    content = fingerprint(settings, inputs, vae)
    record = settings.out / PLAN_RECORD
    stored = _read_record(record)
    if stored and stored["fingerprint"] == content:
        return fingerprint_hash(content)
    if stored and not (extend and _may_extend(stored["fingerprint"], content)):
        raise _refusal(record, stored["fingerprint"], content)
    before = {"extends": [*stored.get("extends", []), fingerprint_hash(stored["fingerprint"])]} if stored else {}
    known = {"files": hash_vae_files(vae.source), "identity": vae.model_dump(mode="json", exclude={"source"})}
    write_atomically(record, json.dumps({"fingerprint": content, **before, "vae": known}, indent=1).encode())
    return fingerprint_hash(content)


def recorded_vae(settings: BuildSettings) -> VaeIdentity | None:
    """The VAE of a folder's plan where the settings name the same files; null where nobody can tell without loading it.

    Raises:
        InputError: what the settings name is no VAE's folder, nor a hub id, or the hub does not give it.
    """
    stored: dict[str, Any] = _read_record(settings.out / PLAN_RECORD) or {}
    try:
        versions, files = stored["fingerprint"]["versions"], stored["vae"]["files"]
        identity = VaeIdentity(source=settings.latents.vae, **stored["vae"]["identity"])
    except (KeyError, TypeError, ValueError):  # Not planned yet, or before plans said this; or it is damaged.
        return None
    # Which tensors a file holds, and their names, also depend on who reads it.
    if versions != _versions(packed=True):
        return None
    try:
        return identity if hash_vae_files(settings.latents.vae) == files else None
    except OSError:  # Whoever loads it says what is wrong with a file that cannot be read.
        return None


def _versions(packed: bool) -> dict[str, str]:
    """Of what makes the tables, or of what makes shards."""
    libraries = _TABLE_LIBRARIES + (_PACKING_LIBRARIES if packed else ())
    cutting = {"cutting": str(CUTTING_VERSION)} if packed else {}
    return cutting | {name: importlib.metadata.version(name) for name in sorted(libraries)}


def accepted_fingerprints(folder: Path) -> frozenset[str]:
    """Hashes of the fingerprints whose shards belong to a dataset folder: that of its plan, and of those that it extends.

    Raises:
        InputError: nothing was planned here.
    """
    stored = _read_plan(folder)
    return frozenset({fingerprint_hash(stored["fingerprint"]), *stored.get("extends", [])})


def holds_means_only(folder: Path) -> bool:
    """Whether shards of a planned dataset hold no standard deviations, as its VAE is deterministic. Raises likewise."""
    return bool(_read_plan(folder)["fingerprint"].get("latents", {}).get("deterministic"))


def _read_plan(folder: Path) -> dict[str, Any]:
    """The record of a dataset folder's plan. Raises InputError: there is none."""
    stored = _read_record(folder / PLAN_RECORD)
    if not stored:
        raise InputError(f"{folder / PLAN_RECORD}: nothing was packed here; run pipelines/build.py first")
    return stored


def read_selection(folder: Path) -> Selection:
    """What the selection in a folder found.

    Raises:
        InputError: there is none.
    """
    stored = _read_record(folder / SELECTION_RECORD)
    if not stored:
        raise InputError(f"{folder / SELECTION_RECORD}: no selection here; run pipelines/plan.py or pipelines/build.py first")
    return Selection(**stored["selection"])


def _check_folder(settings: BuildSettings) -> None:
    """Raises InputError where `out` can be no folder, or holds shards that no build of ours left: they could be overwritten."""
    out, shards = settings.out, settings.out / "shards"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be a folder ({error.strerror}); set build.out (--out) to another place") from None
    if settings.upload or any((out / name).exists() for name in (PLAN_RECORD, SELECTION_RECORD)):
        return
    if shards.is_dir() and next(shards.iterdir(), None):
        raise InputError(foreign_shards(str(shards)))


def foreign_shards(place: str) -> str:
    """What to tell a person whose folder has shards without a plan."""
    return (
        f"{place}: holds files, but neither {PLAN_RECORD} nor {SELECTION_RECORD} is beside it, so this may be another's dataset; "
        f"give another --out, or put these records back from a copy, or remove the files"
    )


def _hashes(out: Path, tables: Collection[str] = PLAN_TABLES) -> dict[str, str]:
    """SHA-256 of each of these tables that is there."""
    return {name: file_sha256(out / name) for name in tables if (out / name).is_file()}


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        content["fingerprint"]["settings"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; remove the folder and run again, or put the file back") from None
    return content


def _may_extend(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two fingerprints differ in nothing but where boxes come from, which are accepted, and versions of libraries."""

    def kept(content: dict[str, Any]) -> dict[str, Any]:
        settings = {name: value for name, value in content["settings"].items() if name not in ("source", "selection")}
        return {**content, "inputs": {}, "versions": {}, "settings": settings}

    return kept(old) == kept(new)


def _refusal(path: Path, old: dict[str, Any], new: dict[str, Any]) -> InputError:
    extend = ", or --extend, which keeps what is packed and adds what is new" if _may_extend(old, new) else ""
    only_versions = {**old, "versions": None} == {**new, "versions": None}
    what = "by other versions of the program or its libraries" if only_versions else "with other inputs or settings"
    finish = "finish it with those, " if only_versions else ""
    return InputError(
        f"{path}: this folder was planned {what} ({'; '.join(difference(old, new))}); "
        f"{finish}give another --out{extend}, or remove the folder"
    )


def _only_there(group: str, settings: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Settings of references that a packed dataset has and that are as ever in what is asked for now."""
    return [key for key in _REFERENCE_KEYS if group == "references" and key in settings[group] and key not in asked]


def _of_tables(packed: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """What a fingerprint of shards says of the tables that they were planned from, in the form of a fingerprint of tables."""
    settings = packed["settings"]
    views = {key: value for key, value in settings["views"].items() if key == "buckets"}
    tables = {**tables, "settings": {**tables["settings"], "views": tables["settings"]["views"] | views}}
    return {
        "format_version": packed["format_version"],
        "versions": {name: packed["versions"].get(name) for name in tables["versions"]},
        "inputs": packed["inputs"],
        "settings": {
            name: {key: settings[name].get(key) for key in (*value, *_only_there(name, settings, value))}
            if name in ("views", "references", "shards")
            else settings.get(name)
            for name, value in tables["settings"].items()
        },
    }


def difference(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two fingerprints differ, as `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    if old == new:
        return []
    return [f"{name}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
