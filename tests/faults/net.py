"""What a checkout does, written down, so that two checkouts can be compared: before and after modules move.

    python -m tests.faults.net record --checkout OLD --python OLD/.venv/bin/python --out before.json --real-data FOLDER
    python -m tests.faults.net record --checkout NEW --python NEW/.venv/bin/python --out after.json --real-data FOLDER
    python -m tests.faults.net compare before.json after.json --moved 'help/pipelines/plan.py/*' '*/members/json/*'

`record` starts the programs of that checkout as a user does, and reads the files they leave by what libraries know of tars,
Parquet and tensors. It imports none of the checkout's modules, so that an old and a new one are seen with the same eyes. About
eight minutes on two busy cores; `--parts` takes some of it:

    tiny              the tiny world's dataset: tars, their members by extension, tables column by column, records, card
    open_images_mini  real photos with Open Images' CSVs, the paper's settings; asks for --real-data
    coco_mini         real photos with COCO's outlines, which cut the references out; likewise
    losses            12 steps of training on the tiny dataset: the losses, and what the checkpoint holds
    edit              edits of a drawn photo by that run
    export            a run of the published kind of network in each format, edits by two of them, and a training from one
    help              what each program says of its options

Names of entries have slashes; those of --moved may have * in them. `compare` prints what differs, and where a value that is gone
stands under another name; status 1 if anything differs that no --moved names, or failed. The last bits of latents and losses
depend on the CPU and on versions of libraries, which are entries too: record both checkouts on one machine.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

PARTS = ("tiny", "open_images_mini", "coco_mini", "losses", "edit", "export", "help")
LIBRARIES = ("torch", "numpy", "opencv-python-headless", "diffusers", "transformers", "albumentations", "pillow", "pyarrow")
RAY = {"ray.address": "local", "ray.actors": 2, "ray.gpus_per_actor": 0}
QUIET = {"log_every": 1, "threads": 1, "loader.workers": 0, "pictures.every": 0}
REAL = {
    "open_images_mini": {"config": "configs/open_images.yaml"},
    "coco_mini": {"config": "configs/coco.yaml", "references.background": "grey", "source.validation_share": 0.2},
}
INSIDE = {"coco_mini": ("instances.json", "images")}
NEEDS = {"losses": ("tiny",), "edit": ("losses", "tiny")}
# What the original code's layout can say, which the tiny preset is not: heads, groups, depth, and the noise as target.
PUBLISHED = {
    "prediction": "epsilon",
    "model.unet.block_out_channels": "[32, 32, 64, 64]",
    "model.unet.attention": "[true, true, true, false]",
    "model.unet.attention_heads": 8,
    "model.unet.norm_groups": 32,
    "model.unet.cross_attention_dim": 64,
    "model.conditioner_blocks": 1,
}
COMMANDS = ("plan", "build", "crawl", "survey", "verify", "inspect_dataset")
HELP = [f"pipelines/{name}.py" for name in COMMANDS]
HELP += ["pbe_train/train.py", *(f"-m pbe_train.{name}" for name in ("sample", "evaluate", "demo", "export", "cost"))]
MISSING = "(not there)"
MEASURES = re.compile(r"loss|loss_q\d|validation_loss|gradient_norm|learning_rate|skipped_steps")
"""Of a line of metrics.jsonl; the others tell times."""


class Failed(Exception):
    """A command of the checkout failed."""


def sha256(data: bytes | str) -> str:
    """Hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def words_of(values: Mapping[str, object]) -> list[str]:
    """As words of a command line."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def member_hashes(tars: Iterable[Path]) -> dict[str, str]:
    """Extension -> hash over names and bytes of all members with it, and `json/<field>` -> hash over all values of this field."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                data = file.read() if file else b""
                key, _, extension = member.name.rpartition("/")[2].partition(".")
                found[extension].append((member.name, sha256(data)))
                if extension == "json":
                    for field, value in json.loads(data).items():
                        found[f"json/{field}"].append((key, json.dumps(value, sort_keys=True)))
    return {extension: sha256(json.dumps(sorted(members))) for extension, members in found.items()}


def table_entries(paths: Sequence[Path]) -> dict[str, Any]:
    """Number of rows, and each column's type and hash of its values in order: however they are encoded and compressed."""
    tables = [pq.read_table(path) for path in paths]
    entries: dict[str, Any] = {"rows": sum(table.num_rows for table in tables), "names": tables[0].column_names}
    for field in tables[0].schema:
        values = [value for table in tables for value in table.column(field.name).to_pylist()]
        entries[f"types/{field.name}"] = f"{field.type}{'' if field.nullable else ' not null'}"
        entries[f"columns/{field.name}"] = sha256(json.dumps(values, sort_keys=True, default=str))
    return entries


def tensors_hash(tensors: Mapping[str, Any]) -> str:
    """One hash over names, types, shapes and bytes of PyTorch's tensors, whatever their order in the file."""
    found = []
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found.append([name, str(tensor.dtype), list(tensor.shape), sha256(data)])
    return f"{len(found)} tensors, {sha256(json.dumps(found))}"


def pixels_hash(path: Path) -> str:
    """Of the decoded picture: another compression is no difference."""
    with Image.open(path) as picture:
        return f"{picture.width}x{picture.height} {picture.mode} {sha256(picture.tobytes())}"


def unpacked(values: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside the tensors of a file, some of it JSON in a string."""
    return {key: json.loads(value) if str(value).startswith("{") else value for key, value in values.items()}


def write_networks(folder: Path) -> None:
    """A VAE and a vision encoder of the published kind with random weights, small."""
    from diffusers import AutoencoderKL
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sides = {"hidden_size": 64, "intermediate_size": 128, "image_size": 64, "patch_size": 16}
    depth = {"num_hidden_layers": 4, "num_attention_heads": 1, "hidden_act": "quick_gelu"}
    vae = AutoencoderKL(**blocks, block_out_channels=(32,) * 4, layers_per_block=1, scaling_factor=0.18215)
    vae.save_pretrained(folder / "vae")
    CLIPVisionModel(CLIPVisionConfig(**sides, **depth)).save_pretrained(folder / "encoder")


class Recorder:
    """Runs a checkout's programs in a scratch folder, and keeps what they did by name."""

    def __init__(self, checkout: Path, python: Path, scratch: Path, real_data: Path) -> None:
        self.checkout, self.scratch, self.real_data = checkout.resolve(), scratch.resolve(), real_data.resolve()
        self.python = python.absolute()  # Not resolved: a virtual environment's is a link.
        self.entries: dict[str, Any] = {}
        own = {"PYTHONPATH": str(self.checkout), "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}
        own |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(self.scratch), "RAY_TMPDIR": str(self.scratch)}
        given = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PBE_", "PYTHON"))}
        self.environment = {**given, **own}

    def without_places(self, text: str) -> str:
        """The same text wherever checkout, scratch and data lie."""
        for place, word in {self.scratch: "SCRATCH", self.checkout: "CHECKOUT", self.real_data: "DATA"}.items():
            text = text.replace(str(place), word)
        return text

    def put(self, name: str, values: Any) -> None:
        """Keep an entry, or one for each value of nested mappings; what is long becomes a hash."""
        if isinstance(values, dict) and values:
            for key, value in values.items():
                self.put(f"{name}/{key}", value)
            return
        text = self.without_places(json.dumps(values, sort_keys=True, default=str))
        self.entries[name] = json.loads(text) if len(text) <= 400 else f"{len(text)} characters, {sha256(text)}"

    def put_file(self, name: str, path: Path) -> None:
        """Tensors by their content, JSON by its own, pictures by their pixels, the rest as text."""
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                self.put(name, tensors_hash({key: file.get_tensor(key) for key in file.keys()}))  # noqa: SIM118
                self.put(f"{name}/beside", unpacked(file.metadata() or {}))
        elif path.suffix == ".ckpt":
            content = torch.load(path, map_location="cpu", weights_only=True)
            self.put(name, tensors_hash(content.pop("state_dict")))
            self.put(f"{name}/beside", unpacked(content))
        elif path.suffix in (".json", ".yaml"):
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            if path.name == "export.json":  # The hashes depend on places, which the card names: do they fit?
                files = content["files"]
                content["files"] = {key: files[key]["sha256"] == sha256((path.parent / key).read_bytes()) for key in files}
            self.put(name, content)
        elif path.suffix == ".png":
            self.put(name, pixels_hash(path))
        else:
            self.put(name, sha256(self.without_places(path.read_text(encoding="utf-8"))))

    def put_files(self, name: str, folder: Path) -> None:
        """All below a folder, one by one."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put_file(f"{name}/{path.relative_to(folder)}", path)

    def put_dataset(self, name: str, folder: Path) -> None:
        """Tars, members, tables, records."""
        tars = sorted(folder.rglob("*.tar"))
        self.put(f"{name}/shards", {path.name: sha256(path.read_bytes()) for path in tars})
        self.put(f"{name}/members", member_hashes(tars))
        tables: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.rglob("*.parquet")):
            tables[re.sub(r"[a-z]+-\d{6}", "*", str(path.relative_to(folder)))].append(path)
        for table, paths in tables.items():
            self.put(f"{name}/tables/{table}", table_entries(paths))
        for path in (*folder.iterdir(), folder / "shards" / "sizes.json"):
            if path.suffix in (".json", ".md", ".html", ".png"):
                self.put_file(f"{name}/{path.name}", path)

    def put_run(self, name: str, folder: Path) -> None:
        """Losses by step, the settings, and what the checkpoints hold."""
        for line in map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
            self.put(f"{name}/step {line['step']:02d}", {key: line[key] for key in line if MEASURES.fullmatch(key)})
        self.put_files(f"{name}/checkpoints", folder / "checkpoints")
        for path in (folder / "settings.yaml", *folder.glob("start.json")):
            self.put_file(f"{name}/{path.name}", path)

    def run(self, title: str, *words: str) -> str:
        """What a command of the checkout prints. One with a title is waited for.

        Raises:
            Failed: with the last line of what it said.
        """
        began = time.monotonic()
        how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
        done = subprocess.run([self.python, *words], cwd=self.checkout, env=self.environment, **how)
        if title:
            print(f"{title}: {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-2000:]
            print(f"$ {shlex.join(words)}\n{said}\nstatus {done.returncode}", flush=True)
            raise Failed(f"{' '.join(words[:2])}: status {done.returncode}: {said.rpartition(chr(10))[2]}")
        return done.stdout

    def build(self, name: str, out: Path, annotations: Path, photos: Path, **more: object) -> None:
        """A dataset, by a Ray of its own."""
        places = {"source.annotations": annotations, "source.photos": photos, "out": out}
        self.run(f"{name}: build", "pipelines/build.py", *words_of({"config": "configs/tiny.yaml", **more, **places, **RAY}))

    def train(self, name: str, out: Path, dataset: Path, steps: int, **more: object) -> None:
        """A run on one thread of the CPU."""
        fixed = {"dataset": dataset, "out": out, "steps": steps, "checkpoint_every": steps, "validation.every": steps}
        options = words_of({"config": "configs/tiny.yaml", **fixed, **QUIET, **more})
        self.run(f"{name}: train", "pbe_train/train.py", *options)

    def paint(self, name: str, model: Path, *more: str) -> None:
        """An edit of a photo by references, all drawn from a fixed seed."""
        random, files = np.random.default_rng(0), {}
        for file, size in {"photo": (300, 220), "first": (90, 120), "second": (130, 70)}.items():
            coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
            files[file] = self.scratch / f"{file}.png"
            coarse.resize(size, Image.Resampling.BICUBIC).save(files[file])
        mask = Image.new("L", (300, 220))
        ImageDraw.Draw(mask).ellipse((90, 60, 190, 170), fill=255)
        mask.save(self.scratch / "mask.png")
        pictures = {"image": files["photo"], "mask": self.scratch / "mask.png", "out": self.scratch / "edited.png"}
        options = words_of({"model": model, **pictures, "device": "cpu", "steps": 10, "reference": files["first"]})
        second = [str(files["second"])] if "--blend" in more else []
        self.run(name, "-m", "pbe_train.sample", *options, *second, *more)
        self.put_file(name, self.scratch / "edited.png")

    def tiny(self) -> None:
        """What `make shards` makes."""
        photos = self.scratch / "photos"
        self.run("tiny: photos", "-m", "tiny_world.make_photos", "--out", str(photos))
        self.build("tiny", self.scratch / "data/tiny", photos, photos)
        self.put_dataset("tiny", self.scratch / "data/tiny")

    def real(self, name: str) -> None:
        """Real photos, by the preset of their kind but for the tiny world's VAE and sizes."""
        data, out = self.real_data / name, self.scratch / "data" / name
        annotations, photos = (data / inside for inside in INSIDE.get(name, ("", "")))
        small = {"latents.vae": "tiny_world/weights/vae", "views.size": 128, "shards.samples": 40}
        self.build(name, out, annotations, photos, **small, **REAL[name])
        self.put_dataset(name, out)

    def losses(self) -> None:
        """A run of the tiny preset."""
        self.train("losses", self.scratch / "runs/tiny", self.scratch / "data/tiny", 12)
        self.put_run("losses", self.scratch / "runs/tiny")

    def edit(self) -> None:
        """Edits by that run: as it is, with other options, of the whole square by two references."""
        run, other = self.scratch / "runs/tiny", ["--seed", "3", "--guidance", "3", "--weights", "model"]
        self.paint("edit/plain", run)
        self.paint("edit/options", run, *other, "--scheduler", "DPMSolverMultistepScheduler")
        self.paint("edit/two references", run, "--blend", "false")

    def export(self) -> None:
        """Out in each format; what was written paints, and is a start again."""
        folder = self.scratch / "published"
        photos, dataset, run, exported = (folder / name for name in ("photos", "dataset", "run", "exported"))
        write_networks(folder)
        self.run("export: photos", "-m", "tiny_world.make_photos", *words_of({"out": photos, "train": 24, "validation": 8}))
        self.build("export", dataset, photos, photos, **{"latents.vae": folder / "vae"})
        own = {**PUBLISHED, "model.vae": folder / "vae", "model.encoder": folder / "encoder"}
        self.train("export", run, dataset, 3, **own)
        self.put_run("export/run", run)
        for name, form in {"diffusers": "diffusers", "ldm": "ldm", "ckpt/model.ckpt": "ldm"}.items():
            options = words_of({"model": run, "out": exported / name, "format": form})
            self.run(f"export: {name}", "-m", "pbe_train.export", *options)
        self.put_files("export", exported)
        self.paint("export/edit by diffusers", exported / "diffusers")
        self.paint("export/edit by ckpt", exported / "ckpt/model.ckpt")
        self.train("export, from ckpt", folder / "again", dataset, 1, **own, **{"model.pretrained": exported / "ckpt/model.ckpt"})
        self.put_run("export/run from ckpt", folder / "again")

    def help(self) -> None:
        """The texts, and the names of options in them."""
        began = time.monotonic()
        for program in HELP:
            name = f"help/{program}"
            try:
                text = self.without_places(self.run("", *program.split(), "--help"))
            except Failed as error:
                self.put(f"{name}/failed", f"failed: {error}")
                continue
            self.put(name, {"first line": text.strip().splitlines()[0], "text": sha256(text)})
            self.put(f"{name}/options", dict.fromkeys(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", text), "there"))
        print(f"help: {time.monotonic() - began:.0f} s", flush=True)

    def record(self, part: str) -> None:
        """One part; a failure is its entry."""
        try:
            self.real(part) if part in REAL else getattr(self, part)()
        except (Failed, OSError, ValueError, LookupError) as error:
            print(f"{part}: {type(error).__name__}: {error}", flush=True)
            self.put(f"{part}/failed", f"failed: {error}")

    def machine(self) -> dict[str, str]:
        """Versions of the checkout's libraries, and the kind of CPU."""
        code = "import json, sys; from importlib.metadata import version; import torch; "
        code += "names = {name: version(name) for name in sys.argv[1:]}; "
        code += "print(json.dumps({**names, 'cpu': torch.backends.cpu.get_cpu_capability()}))"
        return dict(json.loads(self.run("", "-c", code, *LIBRARIES)))


def load(path: Path) -> dict[str, Any]:
    """Entries of a recording, the machine's among them."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {**{f"machine/{key}": value for key, value in content["machine"].items()}, **content["entries"]}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> both values, of what differs, is in one alone, or failed."""
    pairs = {name: (before.get(name, MISSING), after.get(name, MISSING)) for name in sorted(before.keys() | after.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] or str(pair[1]).startswith("failed: ")}


def compare(before: Mapping[str, Any], after: Mapping[str, Any], moved: Sequence[str]) -> int:
    """Print what differs; how many of these no pattern of `moved` names."""
    found = differences(before, after)
    unnamed = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in moved)]
    added = {str(pair[1]): name for name, pair in found.items() if pair[0] == MISSING}
    table = Table(title="what differs", title_justify="left")
    for heading in ("name", "before", "after", ""):
        table.add_column(heading, overflow="fold")
    for name, pair in found.items():
        told = [str(value) if len(str(value)) <= 60 else f"{str(value)[:28]}...{str(value)[-28:]}" for value in pair]
        # Hashes only: many entries are 0, 1 or null.
        place = added.get(str(pair[0])) if pair[1] == MISSING and re.search(r"[0-9a-f]{64}", str(pair[0])) else None
        notes = ["" if name in unnamed else "moved", f"now {place}" if place else ""]
        table.add_row(name, *told, ", ".join(filter(None, notes)))
    if found:
        Console(width=200, markup=False, highlight=False).print(table)
    for pattern in moved:
        if not any(fnmatchcase(name, pattern) for name in found):
            print(f"--moved {pattern}: nothing of this name differs")
    print(f"{len(before.keys() | after.keys())} entries: {len(found)} differ, {len(unnamed)} of these without --moved")
    return len(unnamed)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = parser.add_subparsers(dest="program", required=True)
    recording = programs.add_parser("record", help="write down what a checkout does")
    recording.add_argument("--checkout", type=Path, required=True, help="folder of the checkout")
    recording.add_argument("--python", type=Path, default=sys.executable, help="with its libraries (default: %(default)s)")
    recording.add_argument("--out", type=Path, required=True, help="file to write, JSON")
    recording.add_argument("--real-data", type=Path, help="folder with open_images_mini and coco_mini, or these are left out")
    recording.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these (default: all)")
    comparing = programs.add_parser("compare", help="print what differs between two recordings")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument(
        "--moved", nargs="+", default=[], metavar="NAME", help="entries that are meant to differ; * is any text"
    )
    given = parser.parse_args()
    if given.program == "compare":
        return 1 if compare(load(given.before), load(given.after), given.moved) else 0
    left_out = () if given.real_data else REAL
    needed = {need for part in given.parts for need in (part, *NEEDS.get(part, ()))}.difference(left_out)
    with tempfile.TemporaryDirectory(prefix="net-", ignore_cleanup_errors=True) as scratch:
        recorder = Recorder(given.checkout, given.python, Path(scratch), given.real_data or Path("real data"))
        machine = recorder.machine()
        for part in sorted(needed, key=PARTS.index):
            recorder.record(part)
    entries = {name: value for name, value in sorted(recorder.entries.items()) if name.partition("/")[0] in given.parts}
    content = {"machine": machine, "entries": entries}
    given.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    failed = [name for name, value in entries.items() if str(value).startswith("failed: ")]
    print(f"{given.out}: {len(entries)} entries" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
