"""The remote code of a checkpoint: a file that imports this package, so that with ``trust_remote_code=True`` nobody has to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODULE = "modeling_gruqat"
FILE = f"{MODULE}.py"

#: Names of the classes that checkpoints offer, by the name of the Auto class that finds them. ``hub.register()`` fills it.
AUTO_CLASSES: dict[str, str] = {}

# transformers reads the imports of such a file itself and suggests a wrong package name where one is missing, but leaves alone
# what stands in a try block. error.name is also gruqat_hf where the package is there but lacks a class.
_TEMPLATE = '''\
"""For trust_remote_code=True: the classes of this model are those of the package gruqat-hf."""

try:
    from gruqat_hf import {names}  # noqa: F401
except ImportError as error:
    if error.name != "gruqat_hf":
        raise
    if isinstance(error, ModuleNotFoundError):
        raise ImportError("this model needs the package gruqat-hf: pip install gruqat-hf") from None
    raise ImportError("this model needs a newer version of gruqat-hf: pip install -U gruqat-hf") from error
'''


def auto_map(present: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What ``config.auto_map`` has to say.

    Args:
        present: the config's own so far; entries that lead to other code than the shim are kept. (transformers writes the
            repository into those of a model loaded from the Hub, so that what is saved would refer back to it.)
    """
    others = {
        auto: target
        for auto, target in (present or {}).items()
        if not isinstance(target, str) or target.rpartition("--")[2].partition(".")[0] != MODULE
    }
    return {**{auto: f"{MODULE}.{name}" for auto, name in AUTO_CLASSES.items()}, **others}


def write_shim(folder: Path) -> None:
    """Write the file into ``folder``; it is the same for every model."""
    names = ", ".join(sorted(set(AUTO_CLASSES.values())))
    (folder / FILE).write_text(_TEMPLATE.format(names=names), encoding="utf-8")
