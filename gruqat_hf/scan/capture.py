"""What is prepared once and read by many calls, on a GPU where calls may be in several streams, or recorded into a CUDA graph."""

from __future__ import annotations

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether launches are being recorded into a CUDA graph: what they fill is filled when the graph is replayed, and lies in the
    graph's own memory, so that no other call may read it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Readiness:
    """Makes streams wait, once each, for what another stream has prepared."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._streams: set[int] = set()

    def record(self, device: torch.device) -> None:
        """Something was prepared on the current stream, which has waited for all that was prepared before."""
        if device.type == "cuda" and not is_capturing(device):
            with torch.cuda.device(device):
                self._event = torch.cuda.Event()
                self._event.record()
                self._streams = {torch.cuda.current_stream().cuda_stream}

    def wait(self, device: torch.device) -> None:
        """Make the current stream wait for it; not one that is being recorded, as a capture begins when the device is idle."""
        if self._event is None:
            return
        stream = torch._C._cuda_getCurrentRawStream(device.index)  # takes a fraction of the time of what gives an object
        if stream not in self._streams and not is_capturing(device):
            torch.cuda.current_stream(device).wait_event(self._event)
            self._streams.add(stream)
