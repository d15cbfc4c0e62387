"""CUDA's order of things, for filters that outlive the call that made them: streams, and the capture of graphs."""

import torch
from torch import Tensor


class ReadyEvent:
    """When tensors of one device were made, or written to last: now. Any other stream has to wait for that before it
    reads one, and to keep its memory from being given away until it has."""

    def __init__(self, device: torch.device) -> None:
        self.stream = self.event = None
        if device.type == "cuda":
            self.stream = torch.cuda.current_stream(device)
            self.event = self.stream.record_event()

    def wait(self, tensor: Tensor) -> None:
        """Before `tensor` is used on the current stream."""
        if self.event is not None:
            stream = torch.cuda.current_stream(tensor.device)
            if stream != self.stream:
                stream.wait_event(self.event)
                tensor.record_stream(stream)


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done to the tensor now becomes part of a CUDA graph: it runs not yet, but at each replay, in the
    very same memory."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
