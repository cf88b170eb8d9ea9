"""The wheel is pure Python and holds every file of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not (find_spec("pip") and find_spec("setuptools")), reason="building a wheel needs pip and setuptools")
def test_wheel_is_pure_and_complete(tmp_path):
    source = tmp_path / "source"  # a build leaves folders behind
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gruqat_hf", source / "gruqat_hf", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {path.relative_to(source).as_posix() for path in (source / "gruqat_hf").rglob("*") if path.is_file()}
    assert "gruqat_hf/py.typed" in files
    assert sorted(files - packed) == []
