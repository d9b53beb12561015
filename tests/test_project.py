"""What the project promises as a whole: README's commands exist, the wings stay apart, nothing phones home."""

import ast
import json
import re
import subprocess
import sys
from typing import Any

from pbe_cli.__main__ import COMMANDS, usage
from pbe_core.settings import REPOSITORY, field_names
from pbe_train.config import TrainSettings
from pipelines.pairing.settings import BenchmarkSettings

CAPTURED: Any = {"cwd": REPOSITORY, "capture_output": True, "text": True}
# Programs that read their settings from a file.
SETTINGS_OF = ("plan", "build", "crawl", "survey", "benchmark", "train", "cost")
GUARD = """
import os, socket, sys
for name in ("RAY_USAGE_STATS_ENABLED", "NO_ALBUMENTATIONS_UPDATE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY"):
    os.environ.pop(name, None)
def refuse(self, address, *more):
    if self.family != socket.AF_UNIX:
        print("phones home:", address)
    raise OSError("no network in this test")
socket.socket.connect = refuse
socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda host, *more, **named: print("phones home:", host)
"""


def run_guarded(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", GUARD + code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_an_entry_point_opens_no_connection_and_advises_nothing():
    modules = [*(module for module, _ in COMMANDS.values()), "pipelines.dataset.pack"]
    said = run_guarded(f"import pbe_train.checkpoints.diffusers_format, {', '.join(modules)}, tiny_world.make_photos")
    assert "phones home" not in said
    assert "torchvision" not in said


def test_the_guard_sees_the_update_check_that_is_switched_off():
    """Otherwise the test above could not fail."""
    assert "phones home" in run_guarded("import albumentations")


def test_rays_usage_statistics_are_off():
    code = "import pipelines\nfrom ray._common.usage import usage_lib\nprint(usage_lib.usage_stats_enabled())"
    assert run_guarded(code).strip() == "False"


HELP = """
import contextlib, io, runpy
heavy = ("torch", "diffusers", "transformers", "matplotlib")
for program in sys.argv[1:]:
    sys.argv = [program, "--help"] if "." in program else ["pbe", program, "--help"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_module(program if "." in program else "pbe_cli", run_name="__main__")
    print(json.dumps([program, [name for name in heavy if name in sys.modules], said.getvalue().strip()]))
"""


def test_help_is_each_programs_own_however_it_is_started_and_loads_no_large_library():
    """PyTorch, diffusers and matplotlib take seconds to load."""
    programs = [program for name, (module, _) in COMMANDS.items() for program in (name, module)]
    command = [sys.executable, "-c", f"import json, sys\n{HELP}", *programs]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [program for program, _, _ in told] == programs
    assert all(not heavy for _, heavy, _ in told), told
    texts = {program: text for program, _, text in told}
    for name, (module, _) in COMMANDS.items():
        own = (ast.get_docstring(ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text())) or "").splitlines()[0]
        # Programs with settings print their own text first, the others argparse's usage, which names the command.
        assert texts[name].startswith(own if name in SETTINGS_OF else f"usage: pbe {name} "), texts[name]
        assert own in " ".join(texts[name].split())
        # But for the usage, which names the program and is wrapped behind that.
        assert texts[name].partition("\noptions:")[2] == texts[module].partition("\noptions:")[2] != ""


def test_the_command_lists_its_commands_and_loads_nothing():
    code = "import runpy, sys, atexit; atexit.register(lambda: print([m for m in ('numpy', 'pydantic') if m in sys.modules]));"
    code += "sys.argv[1:] = ['trian']; runpy.run_module('pbe_cli', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], **CAPTURED)
    assert done.returncode == 2
    assert "`train`" in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in usage() for name in COMMANDS)


def test_readme_names_only_targets_that_exist():
    named = set(re.findall(r"make ([a-z-]+)", (REPOSITORY / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert {"shards", "test", "demo"} <= named <= targets


PACKAGES = ("schemas", "pbe_core", "pipelines", "pbe_train", "pbe_cli")
PRODUCT = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]


def test_the_pages_that_the_code_points_to_are_there():
    """Page and section: who follows an error's pointer finds what it promises."""
    named = {match for path in PRODUCT for match in re.findall(r"docs/([\w-]+\.md)(?:#([\w-]+))?", path.read_text())}
    assert ("data-format.md", "reasons-of-rejects") in named
    for page, section in sorted(named):
        text = (REPOSITORY / "docs" / page).read_text()
        titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
        sections = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert not section or section in sections, f"{page}#{section}"


def test_the_settings_that_messages_name_are_there():
    settings = {*field_names(BenchmarkSettings), *field_names(TrainSettings)}
    groups = "|".join(sorted({name.partition(".")[0] for name in settings if "." in name}))
    named = set()
    for path in PRODUCT:
        if path.parent.name == "checkpoints":  # Names of tensors look the same.
            continue
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        for text in filter(lambda value: isinstance(value, str), texts):
            named |= set(re.findall(rf"(?<![\w./-])(?:--)?(?:build\.|train\.)?((?:{groups})\.[a-z_]+(?:\.[a-z_]+)?)\b", text))
    files = {name for name in named if name.endswith((".json", ".png", ".py", ".safetensors"))}
    python = {"masks.shape", "ray._raylet", "ray.exceptions"}  # Of the card's snippet and of Ray's own modules.
    assert {"source.unit", "crawl.sources", "model.pretrained"} <= named
    assert sorted(named - files - python - settings) == []


def test_arrows_point_downwards_between_packages_and_files():
    """The contracts in pyproject.toml."""
    done = subprocess.run([sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"], **CAPTURED)
    assert done.returncode == 0, done.stdout


def test_no_module_has_the_name_of_a_standard_one():
    """Scripts are started by path, so their folder comes first on Python's path: `select.py` would shadow the real one."""
    for package in ("pipelines", "pbe_train"):
        names = {path.stem for path in (REPOSITORY / package).glob("*.py")}
        assert not names & sys.stdlib_module_names
