"""torch.nn's layers with aligned weights (arXiv 2010.07160, eq. 10)."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.alignment import align
from ..functional.checks import TENSORS, check_activation, check_number
from ..functional.convolution import convolve, prepare_convolution
from ..functional.dtensor import convolve_shards, is_sharded, ones_for
from ..ops.reference.activations import activate
from ..torch_private import Convolution, TransposedConvolution
from .fx import Proxy, call_module
from .parameters import parameter


class Aligned(nn.Module):
    """Base class of all layers: the gain, the aligned weight, and loading of plain layers' checkpoints."""

    weight: Tensor
    gain: Tensor | None
    # A function that returns the aligned filters, shaped like `filters()`, called in each forward instead of aligning
    # them here. For aligning all layers of a model together, or once for many forwards. Excluded from copies and
    # pickles; must not be a Module, which would be registered as a submodule.
    aligned_by: Callable[[], Tensor] | None = None

    def __init__(self, *args: Any, eps: float, scale: float, activation: str | None, **kwargs: Any) -> None:
        check_number("eps", eps, positive=True)
        check_number("scale", scale)
        check_activation(activation)
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.scale = scale
        self.activation = activation
        self.gain = nn.Parameter(self.weight.new_ones(self.filters().shape[0]))

    def filters(self) -> Tensor:
        """The weight with its filters along dimension 0, as `align` expects it."""
        return parameter(self, "weight")

    def as_weight(self, filters: Tensor) -> Tensor:
        """Inverse of `filters`: the shape that torch's function expects."""
        return filters

    def aligned_filters(self) -> Tensor:
        """The filters for the forward: from `aligned_by` if it is set, else aligned by the layer."""
        aligned_by = self.aligned_by
        return self.align_filters() if aligned_by is None else aligned_by()

    def align_filters(self) -> Tensor:
        """Aligns the layer's own weight, unless a launch that also prepares the input does so."""
        return align(self.filters(), parameter(self, "gain"), eps=self.eps, scale=self.scale)

    def to_prepare(self) -> tuple[Tensor, Tensor | None, bool]:
        """Filters, gain and whether the filters are already aligned, for the launch that prepares the input; it aligns
        them if they are not."""
        if self.aligned_by is not None:
            return self.aligned_by(), None, True
        return self.filters(), self.gain, False

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if getattr(self, "gain", None) is not None:
            nn.init.ones_(self.gain)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        scale = f", scale={self.scale:g}" if self.scale != 1 else ""
        activation = f", activation={self.activation}" if self.activation else ""
        name = getattr(self.aligned_by, "name", None)  # foreach, frozen or accumulate
        aligned_by = f", aligned by {name}" if name else ""
        return f"{super().extra_repr()}, eps={self.eps:g}{scale}{activation}{aligned_by}"

    def __getstate__(self) -> dict[str, Any]:
        _refuse_fusion(sys._getframe(1).f_back)
        return {name: value for name, value in self.__dict__.items() if name != "aligned_by"}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Plain layers' checkpoints have no gain: it becomes 1. Gains of shape (C_out,) and timm's (C_out, 1, 1, 1)
        load into each other."""
        key = prefix + "gain"
        gain, weight = state_dict.get(key), state_dict.get(prefix + "weight")
        if self._parameters.get("gain") is not None:
            own: Tensor = self._parameters["gain"]  # type: ignore[assignment]
            if gain is None and weight is not None:
                state_dict[key] = ones_for(weight, own)
            elif gain is not None and gain.shape[:1] == own.shape[:1] and gain.numel() == own.numel():
                state_dict[key] = gain.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _refuse_fusion(copying: FrameType | None) -> None:
    """torch.nn.utils.fusion copies a layer (in frame `copying`), then scales its weight, which is not aligned."""
    if copying is not None and copying.f_globals.get("__name__") == "torch.nn.utils.fusion":
        raise RuntimeError(
            f"{copying.f_code.co_name}: expected a layer of torch.nn, got one of weightalign_cuda, whose weight is not "
            "aligned yet: fuse what wa.fold returns"
        )


def aligned_layers(modules: Iterable[nn.Module]) -> list[Aligned]:
    """The modules that are layers of this package."""
    return [module for module in modules if isinstance(module, Aligned)]


@contextlib.contextmanager
def aligned_by(functions: Mapping[Aligned, Callable[[], Tensor]]) -> Iterator[None]:
    """Context in which these functions provide the layers' filters; on exit the previous ones are restored."""
    before = {layer: layer.aligned_by for layer in functions}
    for layer, function in functions.items():
        layer.aligned_by = function
    try:
        yield
    finally:
        for layer, function_before in before.items():
            layer.aligned_by = function_before


def gain_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The gains of all layers of the model, without duplicates, in the order of `model.modules()`: for parameter
    groups."""
    layers = aligned_layers(model.modules())
    return list(dict.fromkeys(gain for layer in layers if isinstance(gain := layer.gain, nn.Parameter)))


class _Convolution(Aligned, Convolution):
    """torch's convolution; any padding but symmetric zeros is done where the weight is aligned."""

    convolution: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        scale: float = 1.0,
        activation: str | None = None,
    ) -> None:
        torch_padding = 0 if padding == "same_tf" else padding  # torch does not know same_tf
        arguments = in_channels, out_channels, kernel_size, stride, torch_padding, dilation, groups, bias, padding_mode
        super().__init__(*arguments, device, dtype, eps=eps, scale=scale, activation=activation)
        if padding == "same_tf":
            self.padding = padding

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return call_module(self, input)
        if self.activation is None and self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return self._conv_forward(input, self.aligned_filters(), parameter(self, "bias"))
        filters, gain, is_aligned = self.to_prepare()
        sizes = self.bias, self.stride, self.padding, self.dilation, self.groups
        options = *sizes, gain, self.padding_mode, self.activation, self.eps, self.scale, is_aligned
        return convolve(self.convolution, len(self.kernel_size), input, filters, *options)


class _TransposedConvolution(Aligned, TransposedConvolution):
    """torch's transposed convolution. A filter produces one output channel: (C_in / groups, kernel...)."""

    convolution: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        scale: float = 1.0,
        activation: str | None = None,
    ) -> None:
        sizes = kernel_size, stride, padding, output_padding
        arguments = in_channels, out_channels, *sizes, groups, bias, dilation, padding_mode, device, dtype
        super().__init__(*arguments, eps=eps, scale=scale, activation=activation)

    def filters(self) -> Tensor:
        """(C_in, C_out / groups, kernel...) -> (C_out, C_in / groups, kernel...), a view if groups is 1."""
        return self.as_weight(self.weight)

    def as_weight(self, filters: Tensor) -> Tensor:
        grouped = filters.unflatten(0, (self.groups, filters.shape[0] // self.groups))
        return grouped.transpose(1, 2).flatten(0, 1)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return call_module(self, input, output_size)
        convolution = self.convolution
        if self.activation is None:
            filters = self.aligned_filters()
        else:
            raw, gain, is_aligned = self.to_prepare()
            pairs = [(0, 0)] * len(self.kernel_size)
            options = pairs, "zeros", self.activation, self.eps, self.scale
            input, filters, _ = prepare_convolution(input, raw, gain, *options, is_aligned=is_aligned)
            if type(filters) not in TENSORS and is_sharded([filters]):
                convolution = partial(convolve_shards, convolution, groups=self.groups, by=1)
        stride, padding, dilation = self.stride, self.padding, self.dilation
        size = output_size, stride, padding, self.kernel_size, len(self.kernel_size), dilation
        output_padding = self._output_padding(input, *size)  # type: ignore[arg-type]
        sizes = stride, padding, output_padding, self.groups, dilation
        return convolution(input, self.as_weight(filters), self.bias, *sizes)


class WAConv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` with aligned weights: see `WAConv2d`."""

    convolution = F.conv1d


class WAConv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` with aligned weights and a learnable gain for each output channel (arXiv 2010.07160, eq. 10).

    Shapes, arguments and initialisation are those of `torch.nn.Conv2d`; alignment makes the output independent of the
    scale of `weight`. Input and weight share a dtype (float32, float16, bfloat16 or float64); autocast applies.

    Args:
        padding: as in torch, or "same_tf": TensorFlow's "same", for any stride.
        eps: added to n/2 * var of each filter; see `weightalign_cuda.align`.
        scale: a constant factor of the aligned weight.
        activation: None, "relu", "silu", "gelu" (exact, with erf) or "hardswish", applied to the layer's input. Like
            any padding but symmetric zeros, it runs in the launch that aligns the weight.

    Attributes:
        weight: (C_out, C_in / groups, kernel...), not aligned.
        gain: (C_out,), initialised to 1; (C_out, 1, 1, 1) in layers converted from timm's. May be None, which means 1:
            `layer.register_parameter("gain", None)`. Checkpoints without a gain load as 1; both shapes load.
        bias: (C_out,) or None.

    Raises:
        TypeError, ValueError: for eps, scale and activation as `align` and `prepare`; otherwise as `torch.nn.Conv2d`.
    """

    convolution = F.conv2d


class WAConv3d(_Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` with aligned weights: see `WAConv2d`."""

    convolution = F.conv3d


class WAConvTranspose1d(_TransposedConvolution, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with aligned weights: see `WAConvTranspose2d`."""

    convolution = F.conv_transpose1d


class WAConvTranspose2d(_TransposedConvolution, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with aligned weights: as `WAConv2d`, without padding "same_tf".

    A filter produces one output channel: of weight (C_in, C_out / groups, kernel...), the C_in / groups slices of its
    group, n = C_in / groups * prod(kernel) values. gain: (C_out,).
    """

    convolution = F.conv_transpose2d


class WAConvTranspose3d(_TransposedConvolution, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with aligned weights: see `WAConvTranspose2d`."""

    convolution = F.conv_transpose3d


class WALinear(Aligned, nn.Linear):
    """`torch.nn.Linear` with aligned weights: eps, scale, activation and gain, (out_features,), as for `WAConv2d`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        scale: float = 1.0,
        activation: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, eps=eps, scale=scale, activation=activation)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return call_module(self, input)
        return F.linear(activate(input, self.activation), self.aligned_filters(), self.bias)
