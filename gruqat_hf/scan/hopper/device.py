"""Whether this machine can run Hopper kernels; no import of triton before it is known to be there."""

from __future__ import annotations

from ..triton.device import DeviceFacts, constant

#: Versions of Triton whose Gluon these kernels were compiled with.
_FIRST, _LAST = (3, 6), (3, 9)


def refuses_hopper(facts: DeviceFacts) -> str | None:
    """Why Hopper kernels do not run on a device, or None if they do."""
    if facts.capability != (9, 0):
        return "the GPU is not of compute capability 9.0"
    return refuses_version()


@constant
def refuses_version() -> str | None:
    """Why the installed Triton cannot compile these kernels, or None if it can."""
    from triton import __version__

    version = tuple(int(part) for part in __version__.split(".")[:2])
    if _FIRST <= version <= _LAST:
        return None
    return f"Hopper kernels are written for Triton {'.'.join(map(str, _FIRST))} to {'.'.join(map(str, _LAST))}, not {__version__}"
