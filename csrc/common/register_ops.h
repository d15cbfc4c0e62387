// Registration of the ops for one device: their schemas are in weightalign_cuda/ops/schemas.py.
#pragma once

#include "prepare_host.h"
#include "python_calls.h"

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
