"""What the documents say is true: their Python runs, their numbers are those of benchmarks/."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from gruqat_hf import PRESETS, GruQatConfig, GruQatForSequenceClassification
from gruqat_hf.quantization import POINTS, schemes
from gruqat_hf.structures import config as structure_config
from gruqat_hf.structures import structure_class

pytestmark = pytest.mark.hf

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = "outputs/quickstart/gru-monarch-int8"


def blocks() -> list[pytest.param]:
    found = []
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```python\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 2
            found.append(pytest.param(name, line, textwrap.dedent(match[2]), id=f"{name}:{line}"))
    return found


@pytest.fixture
def registries_as_they_were(monkeypatch):
    """What an example registers is gone after it."""
    structures = sys.modules[structure_class.__module__]
    for module, name in ((structure_config, "_OPTIONS"), (structures, "_CLASSES"), (schemes, "_SCHEMES")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


@pytest.fixture
def quickstart_checkpoint(tmp_path, monkeypatch):
    """Stands in for what scripts/quickstart.sh leaves; the working directory is where it would be found."""
    monkeypatch.chdir(tmp_path)
    monarch = {"kind": "monarch", "nblocks": 4}
    config = GruQatConfig(input_size=8, hidden_size=64, num_hidden_layers=2, structure_hidden=monarch, num_labels=10)
    model = GruQatForSequenceClassification(config).prepare_qat("int8_state16")
    model.calibrate([torch.rand(4, 8, 8) * 2 - 1], progress=False).freeze().save_pretrained(QUICKSTART)


@pytest.mark.usefixtures("quickstart_checkpoint", "registries_as_they_were")
@pytest.mark.parametrize(("document", "line", "code"), blocks())
def test_python_block_runs(document, line, code):
    # Line numbers in a traceback are those of the document.
    exec(compile("\n" * (line - 1) + code, document, "exec"), {"__name__": "__main__"})


def test_there_are_blocks_to_run():
    assert len(blocks()) >= 8


def test_tables_name_every_kind_preset_and_point():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {name for row in re.findall(r"^\| (`.*?) \|", readme, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    missing = [name for name in (*structure_config._OPTIONS, *PRESETS, *POINTS) if name not in named]
    assert not missing, f"README.md's tables lack {missing}"


def test_numbers_are_those_of_benchmarks():
    check = [sys.executable, str(ROOT / "scripts" / "readme_tables.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_package_says_that_it_is_typed():
    assert (ROOT / "gruqat_hf" / "py.typed").is_file()
