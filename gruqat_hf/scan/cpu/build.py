"""Compiling the kernels on first use, once for each machine's instruction set, into a cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...arithmetic import gates

logger = logging.getLogger("gruqat_hf")

#: Environment variables: the directory that built kernels are kept in, and an instruction set to build for instead of the best.
CACHE_VARIABLE = "GRUQAT_CACHE"
LEVEL_VARIABLE = "GRUQAT_CPU_LEVEL"

_SOURCES = Path(__file__).parent
_MAIN = "kernels.cpp"

#: Instruction sets, best first: the flags of /proc/cpuinfo that each needs, and the compiler's options.
LEVELS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "avx512": (
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma"}),
        ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma"),
    ),
    "avxvnni": (frozenset({"avx2", "fma", "avx_vnni"}), ("-mavx2", "-mfma", "-mavxvnni")),
    "avx2": (frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
    "plain": (frozenset(), ()),
}


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message says which."""


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset({"avx2", "fma"}) if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def levels() -> list[str]:
    """The instruction sets that this machine has, best first, from the forced one on if one is forced.

    Raises:
        BuildError: the forced one does not exist, or this machine lacks it.
    """
    flags = _cpu_flags()
    possible = [name for name, (needed, _) in LEVELS.items() if needed <= flags]
    forced = os.environ.get(LEVEL_VARIABLE)
    if not forced:
        return possible
    if forced not in possible:
        raise BuildError(f"{LEVEL_VARIABLE}={forced} is not among what this machine has: {', '.join(possible)}")
    return [forced]


def _compiler() -> list[str]:
    """The C++ compiler's command.

    Raises:
        BuildError: there is none.
    """
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise BuildError(f"no C++ compiler: CXX={named[0]} is not found")
        return named
    for candidate in ("g++", "clang++", "c++"):
        if (path := shutil.which(candidate)) is not None:
            return [path]
    raise BuildError("no C++ compiler (g++, clang++ or c++) is on the PATH and CXX is unset")


def _constants() -> list[str]:
    """The portable gates' constants as macros, so that gates.py stays their only source."""

    def listed(clamp: float, numerator: gates.Numerator, denominator: gates.Denominator) -> str:
        return ",".join(value.hex() + "f" for value in (clamp, *numerator, *denominator[0], *denominator[1]))

    return [
        f"-DTANH_CONSTANTS={listed(gates.TANH_CLAMP, gates.TANH_NUMERATOR, gates.TANH_DENOMINATOR)}",
        f"-DSIGMOID_CONSTANTS={listed(gates.SIGMOID_CLAMP, gates.SIGMOID_NUMERATOR, gates.SIGMOID_DENOMINATOR)}",
        f"-DRECIPROCAL_SEED={gates.RECIPROCAL_SEED:#x}",
        f"-DRECIPROCAL_CENTRE={gates.RECIPROCAL_CENTRE.hex()}f",
    ]


def _options(level: str) -> list[str]:
    fixed = ["-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    return [*fixed, *LEVELS[level][1], *_constants()]


def cache_directory() -> Path | None:
    """Where built kernels are kept; None where the user has no home."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "gruqat_hf"
    try:
        return Path.home() / ".cache" / "gruqat_hf"
    except RuntimeError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time builds; where files cannot be locked, several build the same and the last one's file stays."""
    with open(path, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def _compile(level: str, target: Path, compiler: list[str]) -> None:
    """Compile into a file of its own and move it into place whole.

    Raises:
        BuildError: the compiler failed.
    """
    handle, name = tempfile.mkstemp(suffix=".so", prefix=".build-", dir=target.parent)
    os.close(handle)
    command = [*compiler, *_options(level), str(_SOURCES / _MAIN), "-o", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-3:]
            raise BuildError(f"{compiler[0]} failed for {level}: {'; '.join(errors[:3])}")
        os.replace(name, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler[0]} failed for {level}: {error}") from error
    finally:
        if os.path.exists(name):
            os.unlink(name)


def _writable_cache() -> Path:
    directory = cache_directory()
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(directory, os.W_OK):
                return directory
        except OSError:
            pass
    # A folder of this process alone: a known name in a folder that others write to could hold their code.
    private = Path(tempfile.mkdtemp(prefix="gruqat_hf-"))
    logger.warning(
        "cannot write to %s, so the CPU kernels are built anew in each process; set %s to a folder that they can be kept in",
        directory or "a home folder",
        CACHE_VARIABLE,
    )
    return private


def built_library() -> tuple[Path, str]:
    """The compiled kernels, built now if this machine has not built them before, and the instruction set they are for.

    Raises:
        BuildError: there is no compiler, or it failed for every instruction set.
    """
    sources = b"".join(path.read_bytes() for path in sorted(_SOURCES.glob("*.h")) + [_SOURCES / _MAIN])
    kept, directory = cache_directory(), None
    failed: list[str] = []
    for level in levels():
        circumstances = repr((_options(level), os.environ.get("CXX"), platform.libc_ver()))
        key = hashlib.sha256(sources + circumstances.encode()).hexdigest()[:16]
        name = f"kernels-{platform.machine()}-{level}-{key}.so"
        if kept is not None and (found := kept / name).exists():
            return found, level
        compiler = _compiler()
        directory = directory or _writable_cache()
        target = directory / name
        try:
            with _locked(directory / f"{name}.lock"):
                if not target.exists():
                    logger.warning("building the CPU kernels for %s (once; takes about ten seconds)", level)
                    _compile(level, target, compiler)
            return target, level
        except BuildError as error:
            failed.append(str(error))
    raise BuildError(failed[0])
