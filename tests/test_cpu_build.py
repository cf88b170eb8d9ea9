"""Building the CPU kernels: without a compiler, with one that fails, for every instruction set, by many processes at once."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_helpers import build_layer, needs_kernels

from gruqat_hf.scan.cpu import build, library

pytestmark = needs_kernels


def test_without_a_compiler_the_reference_serves_and_says_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_loaded", None)
    layer = build_layer("blockdiag", 32, "int8_state16")
    with caplog.at_level(logging.WARNING, logger="gruqat_hf"), torch.no_grad():
        layer(torch.randn(3, 2, 32))
        layer.bias_input.add_(1.0)
        layer(torch.randn(3, 2, 32))
    assert layer.last_path.startswith("reference") and "no C++ compiler" in layer.last_path
    told = f"no CPU kernels, the reference runs instead: {library._loaded}"
    assert [record.message for record in caplog.records].count(told) == 1


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(build.BuildError, match="false failed"):
        build.built_library()
    assert not list(tmp_path.glob("*.so"))


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    monkeypatch.setenv(build.LEVEL_VARIABLE, "plain")
    with caplog.at_level(logging.WARNING, logger="gruqat_hf"):
        path, level = build.built_library()
    assert path.exists() and level == "plain" and "cannot write to" in caplog.text
    shutil.rmtree(path.parent)


def test_an_instruction_set_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv(build.LEVEL_VARIABLE, "mmx")
    with pytest.raises(build.BuildError, match="GRUQAT_CPU_LEVEL=mmx is not among"):
        build.built_library()


_OTHER_LEVEL = """
import sys, pytest
from gruqat_hf.scan.cpu import library
assert library.library().level == sys.argv[1], library.library()
chosen = "frozen_gives or odd_sizes or gradients or nan or agrees or number_of_threads"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:], "-k", chosen]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", build.levels()[1:])
def test_other_instruction_sets(level, tmp_path):
    environment = {**os.environ, build.LEVEL_VARIABLE: level, build.CACHE_VARIABLE: str(tmp_path)}
    files = [str(Path(__file__).with_name(name)) for name in ("test_cpu_backend.py", "test_cpu_training.py")]
    done = subprocess.run([sys.executable, "-c", _OTHER_LEVEL, level, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.slow
def test_processes_that_build_at_once_share_one_build(tmp_path):
    script = "from gruqat_hf.scan.cpu.build import built_library; print(built_library()[0])"
    environment = {**os.environ, build.LEVEL_VARIABLE: "plain", build.CACHE_VARIABLE: str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) for _ in range(3)]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert len({out for out, _ in outputs}) == 1 and len(list(tmp_path.glob("*.so"))) == 1
    assert sum("building the CPU kernels" in err for _, err in outputs) == 1
