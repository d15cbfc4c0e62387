"""All private names of torch that this package uses, and why. torch 2.11 to 2.15 have all of them; with a later torch
that lacks one, what needs it raises an error that names it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    raise ImportError(
        f"weightalign_cuda: torch {torch.__version__} is installed, 2.11 or later is needed: pip install 'torch>=2.11'"
    )

_missing: list[str] = []


def _find(name: str) -> Any:
    """The object of this name or, if torch lacks it, a function that raises."""
    found: Any = torch
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            _missing.append(name)
            return _absent(name)
        found = getattr(found, part)
    return found


def _absent(name: str) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"weightalign_cuda needs {name}, which torch {torch.__version__} does not have")

    return fail


# Autograd. The context for calling ops from an autograd.Function, below the Autograd dispatch key.
below_autograd = _find("torch._C._AutoDispatchBelowAutograd")
# The id of the backward running on this thread, -1 if there is none; whether it was called with retain_graph.
current_graph_task_id = _find("torch._C._current_graph_task_id")
backward_keeps_graph = _find("torch._C._autograd._get_current_graph_task_keep_graph")
# The innermost saved_tensors_hooks, by which activation checkpointing is detected.
top_saved_tensors_hooks = _find("torch._C._autograd._top_saved_tensors_default_hooks")
# How many tensors use a storage, from its address: for gradients that nobody else sees.
storage_holders = _find("torch._C._storage_Use_Count")

# Calls a function at the end of the backward that is running: as FSDP2 does.
queue_callback = _find("torch.autograd.Variable._execution_engine.queue_callback")
# For the arguments that __torch_dispatch__ is given.
tree_leaves = _find("torch.utils._pytree.tree_leaves")
tree_map_only = _find("torch.utils._pytree.tree_map_only")

# Whether autocast is enabled for any device type, at a third of the cost of asking for one.
is_any_autocast_enabled = _find("torch._C._is_any_autocast_enabled")

# Whether torch.func transforms are active, or have wrapped a tensor; they need decomposable ops.
are_functorch_transforms_active = _find("torch._C._are_functorch_transforms_active")
is_functorch_wrapped = _find("torch._C._functorch.is_functorch_wrapped_tensor")
# Whether this gradient comes from is_grads_batched=True.
is_legacy_batched = _find("torch._C._functorch.is_legacy_batchedtensor")

# The state of torch.jit.trace; None outside of it. Whether it is active, in less time.
get_tracing_state = _find("torch._C._get_tracing_state")
is_tracing = _find("torch._C._is_tracing")

# Whether modes of __torch_function__, and how many of __torch_dispatch__, are active. The module that knows whether a
# profiler is.
is_function_mode_enabled = _find("torch._C._is_torch_function_mode_enabled")
dispatch_modes = _find("torch._C._len_torch_dispatch_stack")
profiler = torch.autograd.profiler

# Objects that autograd copies to its device threads, where context variables are unset: for `use_backend`.
get_object_in_tls = _find("torch._C._get_obj_in_tls")
is_key_in_tls = _find("torch._C._is_key_in_tls")
stash_object_in_tls = _find("torch._C._stash_obj_in_tls")

# How torch.compile treats a function, without importing torch._dynamo (1.5 s) as the public API does; and whether
# torch.compile is active on this thread.
set_code_exec_strategy = _find("torch._C._dynamo.eval_frame.set_code_exec_strategy")
FrameAction = _find("torch._C._dynamo.eval_frame._FrameAction")
FrameExecStrategy = _find("torch._C._dynamo.eval_frame._FrameExecStrategy")
get_eval_frame_callback = _find("torch._C._dynamo.eval_frame.get_eval_frame_callback")

# The base classes of torch.nn's convolutions, which ours derive from, too.
Convolution = _ConvNd
TransposedConvolution = _ConvTransposeNd


def is_forward_mode_active() -> bool:
    """Whether forward-mode AD is active."""
    return forward_ad._current_level >= 0


def are_calls_unobserved() -> bool:
    """Whether nobody wants to see or to change the calls of ops now: no mode, transform, tracer or profiler. In one
    function, as it takes part in each call of ours."""
    return not (
        dispatch_modes()
        or is_function_mode_enabled()
        or are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_tracing()
        or profiler._is_profiler_enabled
    )


def mark_constant(function: Any) -> None:
    """torch.compiler.assume_constant_result, without its import of torch._dynamo."""
    function._dynamo_marked_constant = True


# Attributes and methods that are accessed directly.
_ATTRIBUTES: dict[str, tuple[Any, tuple[str, ...]]] = {
    # to swap layers and read their parameters; forward hooks; checkpoints; torch.compile of a layer
    "torch.nn.Module": (
        nn.Module(),
        (
            *("_parameters", "_modules", "_forward_pre_hooks"),
            *("_load_from_state_dict", "_load_state_dict_pre_hooks", "_compiled_call_impl"),
        ),
    ),
    "torch.nn.Conv2d": (nn.Conv2d, ("_conv_forward",)),
    "torch.nn.ConvTranspose2d": (nn.ConvTranspose2d, ("_output_padding",)),
    # counts in-place writes; counts references; a tensor without data; the hooks that who sets a gradient has to call;
    # zeros that have no memory
    "torch.Tensor": (
        torch.Tensor,
        ("_version", "_use_count", "_make_wrapper_subclass", "_post_accumulate_grad_hooks", "_is_zerotensor"),
    ),
    "torch.autograd.forward_ad": (forward_ad, ("_current_level",)),
    "torch.autograd.profiler": (profiler, ("_is_profiler_enabled",)),
    # the overload's C++ function, without the Python wrapper
    "torch.ops.aten.add.Tensor": (torch.ops.aten.add.Tensor, ("_op",)),
}


def missing() -> list[str]:
    """The names above that the installed torch lacks."""
    attributes = (
        f"{owner}.{name}"
        for owner, (having, names) in _ATTRIBUTES.items()
        for name in names
        if not hasattr(having, name)
    )
    return [*_missing, *attributes]
