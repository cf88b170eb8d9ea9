"""transformers' own model tests, which come with the source package of each version, run on this package's classes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
import transformers

pytestmark = pytest.mark.hf

VERSION = transformers.__version__
HERE = Path(__file__).resolve().parent

#: What the tests import beside themselves and the source package lacks.
STUBS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def _source_package() -> Path:
    """The source package of the installed transformers: downloaded once, by pip."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gruqat-hf"
    archive = cache / f"transformers-{VERSION}.tar.gz"
    if not archive.exists():
        command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(cache), f"transformers=={VERSION}"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pip", *command], capture_output=True, text=True, timeout=180, check=False
            )
            said = done.stderr.strip()[-300:]
        except subprocess.TimeoutExpired:
            said = "pip took longer than 180 s"
        if not archive.exists():
            pytest.skip(f"NOT TESTED: the source package of transformers {VERSION} could not be downloaded: {said}")
    return archive


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    """Names of the tests by class and outcome, and what the failed ones said."""
    if importlib.util.find_spec("parameterized") is None:
        pytest.skip("NOT TESTED: transformers' tests need the package parameterized: pip install parameterized")
    folder = tmp_path_factory.mktemp("suite")
    tests = folder / "tests"
    with tarfile.open(_source_package()) as archive:
        source = archive.extractfile(f"transformers-{VERSION}/tests/test_modeling_common.py")
        assert source is not None
        tests.mkdir()
        (tests / "test_modeling_common.py").write_bytes(source.read())
    for path, name in STUBS.items():
        stub = tests / path
        stub.parent.mkdir()
        (stub.parent / "__init__.py").touch()
        stub.write_text(f"class {name}: ...\n")
    (tests / "__init__.py").touch()
    (tests / "test_gruqat.py").write_bytes((HERE / "common_suite.py").read_bytes())
    report = folder / "report.xml"
    (folder / "pytest.ini").write_text("[pytest]\n")
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", "tests/test_gruqat.py"],
        cwd=folder,
        env={**environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    outcomes: dict[tuple[str, str], list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        kind = "failed" if problem is not None else "skipped" if case.find("skipped") is not None else "passed"
        said = "" if problem is None else f": {problem.get('message')}\n{(problem.text or '')[-1500:]}"
        outcomes.setdefault((case.get("classname", "").rpartition(".")[2], kind), []).append(f"{case.get('name')}{said}")
    print(Counter({"/".join(key): len(names) for key, names in outcomes.items()}))
    return outcomes


NAMES = ("FloatText", "FloatAudio", "FloatSeries", "QatText", "QatSeries", "FrozenText", "FrozenSeries")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_fails(results: dict[tuple[str, str], list[str]], name: str) -> None:
    failed = results.get((f"{name}Test", "failed"), [])
    assert not failed, "\n\n".join(failed)
    # Of about 160, most are for attention, for experts or for accelerators; that many must have run.
    assert len(results[f"{name}Test", "passed"]) >= 45
