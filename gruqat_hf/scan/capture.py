"""What is prepared once and read by many calls, on a GPU where calls may be in several streams, or recorded into a CUDA graph."""

from __future__ import annotations

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether launches are being recorded into a CUDA graph: what they fill is filled when the graph is replayed, and lies in the
    graph's own memory, so that no other call may read it."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Readiness:
    """Makes streams wait, once each, for what another stream has prepared."""

    def __init__(self) -> None:
        #: When the last of it is there, and the streams that need not wait.
        self._prepared: tuple[torch.cuda.Event, set[int]] | None = None

    def record(self, device: torch.device) -> None:
        """Something was prepared on the current stream; who waits for it waits for all that was prepared before, too."""
        if device.type == "cuda" and not is_capturing(device):
            self.wait(device)  # another thread may have prepared something since this one waited
            stream = torch.cuda.current_stream(device)
            self._prepared = stream.record_event(), {stream.cuda_stream}

    def wait(self, device: torch.device) -> None:
        """Make the current stream wait for it; not one that is being recorded: torch.cuda.graph waits for the device before."""
        if self._prepared is None:
            return
        event, streams = self._prepared
        stream = torch._C._cuda_getCurrentRawStream(device.index)  # takes a fraction of the time of what gives an object
        if stream not in streams and not is_capturing(device):
            torch.cuda.current_stream(device).wait_event(event)
            streams.add(stream)
