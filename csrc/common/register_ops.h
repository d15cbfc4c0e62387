// Registration of the ops for one device: their schemas are in weightalign_cuda/ops/schemas.py.
#pragma once

#include "prepare_host.h"
#include "python_calls.h"

// The namespace of the ops. Hugging Face's kernel-builder names another, unique to each build (csrc/hub).
#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME weightalign_cuda
#endif
// STABLE_TORCH_LIBRARY_IMPL for that namespace: it is expanded on the way, before the macro pastes it into names.
#define WA_IMPLEMENT(device, library) WA_IMPLEMENT_IN(TORCH_EXTENSION_NAME, device, library)
#define WA_IMPLEMENT_IN(name, device, library) STABLE_TORCH_LIBRARY_IMPL(name, device, library)

namespace wa {

// An op of one backend: call(arguments...) = function(backend, arguments...).
template <auto function, const AlignBackend& backend, class Type = decltype(function)>
struct OpOn;
template <auto function, const AlignBackend& backend, class R, class... A>
struct OpOn<function, backend, R (*)(const AlignBackend&, A...)> {
    static R call(A... arguments) { return function(backend, arguments...); }
};

// Registers all ops of a backend, for tensors of this device type.
template <const AlignBackend& forward, const AlignBackend& backward, class Library>
void implement_ops(Library& library, int32_t device_type) {
    using AlignForward = OpOn<align_forward, forward>;
    using AlignBackward = OpOn<align_backward, backward>;
    using PrepareForward = OpOn<prepare_forward, forward>;
    using PrepareBackward = OpOn<prepare_backward, backward>;
    library.impl("align_forward", WA_BOX(AlignForward::call));
    library.impl("align_backward", WA_BOX(AlignBackward::call));
    library.impl("prepare_forward", WA_BOX(PrepareForward::call));
    library.impl("prepare_backward", WA_BOX(PrepareBackward::call));
    serve_python_calls(device_type, forward, backward);
}

}  // namespace wa
