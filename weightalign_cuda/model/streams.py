"""CUDA streams and graph capture, for filters that outlive the call that created them."""

import torch
from torch import Tensor


class ReadyEvent:
    """Records that tensors of one device have been written, up to now, on the current stream. Any other stream must
    wait for it before it reads them, and must keep their memory from being reused until it is done."""

    def __init__(self, device: torch.device) -> None:
        self.stream = self.event = None
        if device.type == "cuda":
            self.stream = torch.cuda.current_stream(device)
            self.event = self.stream.record_event()

    def wait(self, tensor: Tensor) -> None:
        """Call before `tensor` is used on the current stream."""
        if self.event is not None:
            stream = torch.cuda.current_stream(tensor.device)
            if stream != self.stream:
                stream.wait_event(self.event)
                tensor.record_stream(stream)


def is_captured(tensor: Tensor) -> bool:
    """Whether work on the tensor is now being captured in a CUDA graph: it does not run yet, but in each replay, on the
    same memory."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
