"""A wheel, installed away from the checkout, has all that the product needs."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pbe_core.settings import REPOSITORY

# What a file of the checkout would be opened by is refused, in every Python process of the environment, Ray's workers included.
# The packages that it stands on may lie in a .venv there.
REFUSE = """
import sys
def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith({checkout!r}) and not str(arguments[0]).startswith({packages!r}):
        raise RuntimeError(f"a file of the checkout is opened: {{arguments[0]}}")
sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def pbe(tmp_path_factory) -> Path:
    """The command of an environment with the wheel, and with the packages of this one but for its own copy of the project."""
    folder = tmp_path_factory.mktemp("wheel")
    # Of a copy: a build leaves files, and takes what an earlier one has left.
    (folder / "source").mkdir()
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, folder / "source")
        elif not path.name.startswith(".") and path.name not in ("build", "data", "docs", "findings", "runs", "tests"):
            shutil.copytree(path, folder / "source" / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "wheel", *options, str(folder / "source")], check=True)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (wheel,) = folder.glob("*.whl")
    install = ["--python", str(environment / "bin" / "python"), "install", "--quiet", "--no-deps", "--no-compile", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    packages = sysconfig.get_path("purelib")
    (own,) = environment.glob("lib/python*/site-packages")
    # Unlike the folder itself, it brings no .pth files: the checkout, installed there as editable, is not importable.
    (own / "packages.pth").write_text(packages)
    (own / "refuse.pth").write_text("import refuse")
    (own / "refuse.py").write_text(REFUSE.format(checkout=f"{REPOSITORY}/", packages=packages))
    shutil.rmtree(folder / "source")
    return environment / "bin" / "pbe"


def run(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_guard_sees_files_of_the_checkout(pbe, tmp_path):
    """Otherwise the next test could not fail."""
    python = pbe.with_name("python")
    opened = run(python, "-c", f"open({str(REPOSITORY / 'configs' / 'tiny.yaml')!r})", folder=tmp_path)
    assert "a file of the checkout is opened" in opened.stderr
    assert "ModuleNotFoundError" in run(python, "-c", "import benchmarks", folder=tmp_path).stderr


def test_the_demonstration_and_a_plan_run_from_the_wheel(pbe, tmp_path):
    assert "usage: pbe COMMAND" in run(pbe, "--help", folder=tmp_path).stdout
    demo = run(pbe, "demo", "--photos", "4", "--steps", "1", folder=tmp_path)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "8 edits by step 1 of runs/tiny" in demo.stdout
    for name in ("data/tiny/dataset/report.html", "runs/tiny/demo.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    # The preset by its path in the project, and the table of rates.
    plan = run(pbe, "plan", "--config", "configs/tiny.yaml", "--out", tmp_path / "plan", folder=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert str(pbe.parent.parent) in plan.stdout.splitlines()[0]
    assert "Intel(R) Xeon(R) Processor" in plan.stdout
