// align_forward, with the op's arguments (dtype and memory format as their numbers), and the usual backward of its
// autograd.Function as built-in functions of Python; and what else takes many questions about a tensor: the fingerprint
// of a layer, and who holds a tensor. On the way through torch.ops each argument is matched against the schema, boxed,
// unboxed and boxed again, which takes several times as long as aligning a small weight; so do a backward's questions
// in Python.
//
// The functions return None for whatever the dispatcher would not hand to the op's kernel as it is, and for arguments
// that the kernel rejects: the caller then calls the op, which does the rest and raises the error. Errors of the work
// itself, a launch that fails, are raised here: nothing is tried twice. The caller must look for what tensors do not
// show: modes, tracing, profiling.
//
// The library does not depend on Python: it knows objects by address, a few functions of CPython's stable ABI by weak
// symbols, and torch's functions for objects (torch >= 2.14) by name.
#include "python_calls.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "tensor_holders.h"

namespace wa {
namespace {

struct Backends {
    const AlignBackend *forward, *backward;
};
std::map<int32_t, Backends>& backends() {
    static std::map<int32_t, Backends> by_device_type;
    return by_device_type;
}

// As the dispatcher calls an op: other threads of Python run meanwhile, copies of strided weights are not recorded.
struct AsAnOp {
    void* state = PyEval_SaveThread();
    bool is_grad_enabled = aoti_torch_grad_mode_is_enabled();
    AsAnOp() { aoti_torch_grad_mode_set_enabled(false); }
    ~AsAnOp() {
        aoti_torch_grad_mode_set_enabled(is_grad_enabled);
        PyEval_RestoreThread(state);
    }
};

// Conversions from Python.
double to(PyObject* object, double*) {
    require(type_of(object) == &PyFloat_Type);
    return PyFloat_AsDouble(object);
}
Tensor to(PyObject* object, Tensor*) {
    Tensor t = plain_tensor(object);
    require(t.const_data_ptr() || t.numel() == 0);  // torch's zero tensors have no memory
    require(!is_true(Owned(PyObject_CallFunctionObjArgs(python.is_neg, object, nullptr))));
    return t;
}
std::optional<Tensor> to(PyObject* object, std::optional<Tensor>*) {
    if (object == python.none) return std::nullopt;
    return to(object, static_cast<Tensor*>(nullptr));
}
template <class T>
std::vector<T> list(PyObject* sequence, ssize_t first, ssize_t last) {
    std::vector<T> values;
    require(first < last);
    values.reserve(std::min<ssize_t>(last - first, 1024));  // whatever a sequence of the user says its size is
    for (ssize_t i = first; i < last; ++i) values.push_back(to(item(sequence, i).get(), static_cast<T*>(nullptr)));
    return values;
}
template <class T>
std::vector<T> list(PyObject* sequence) {
    return list<T>(sequence, 0, PySequence_Size(sequence));
}

const Backends& backends_of(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& gains) {
    const int32_t type = device_type_of(weights[0]);
    for (const Tensor& w : weights) require(device_type_of(w) == type);
    for (const auto& gain : gains) require(!gain || device_type_of(*gain) == type);
    auto found = backends().find(type);
    require(found != backends().end());
    return found->second;
}

// Whether the result of an op can need a gradient: whether one of the tensors requires it.
bool wants_gradients(PyObject* tensors) {
    const ssize_t count = PySequence_Size(tensors);
    for (ssize_t i = 0; i < count; ++i) {
        Owned tensor = item(tensors, i);
        if (tensor.get() != python.none && requires_grad(tensor.get())) return true;
    }
    return false;
}

// How often each of the weights, then of the gains has been written to, None for None: what its backward compares.
Owned versions_of(PyObject* weights, PyObject* gains, ssize_t count) {
    Owned versions(PyTuple_New(2 * count));
    for (ssize_t i = 0; i < 2 * count; ++i) {
        Owned tensor = item(i < count ? weights : gains, i % count);
        if (tensor.get() != python.none) tensor = version_of(tensor.get());
        PyTuple_SetItem(versions.get(), i, tensor.release());
    }
    return versions;
}

// As the op: dtype is the weights' if None; the last argument is None or, for each aligned weight, a tensor whose
// memory it may have, or None. Returns (aligned, statistics, versions), versions None if nothing can want gradients.
Owned forward(PyObject* const* a) {
    auto weights = list<Tensor>(a[0]);
    auto gains = list<std::optional<Tensor>>(a[1]);
    auto eps = list<double>(a[2]), scales = list<double>(a[3]);
    for (double each : eps) require(each >= std::numeric_limits<float>::min() && std::isfinite(each));
    for (double each : scales) require(std::isfinite(each));
    const long format_number = PyLong_AsLong(a[5]);
    ScalarType dtype = weights[0].scalar_type();
    if (a[4] != python.none) {
        const long number = PyLong_AsLong(a[4]);
        require(number >= 0 && number <= std::numeric_limits<int8_t>::max());
        dtype = torch::stable::detail::to<ScalarType>(torch::stable::detail::from(int32_t(number)));
    }
    require(!PyErr_Occurred() && format_number >= 0 && format_number <= long(MemoryFormat::ChannelsLast3d));
    std::vector<std::optional<Tensor>> memory;
    if (a[6] != python.none) memory = list<std::optional<Tensor>>(a[6]);
    require(memory.empty() || memory.size() == weights.size());
    for (const auto& each : memory) {
        require(!each || device_type_of(*each) == device_type_of(weights[0]));
        if (each) check_memory("memory", *each);
    }
    const AlignBackend& backend = *backends_of(weights, gains).forward;
    require(gains.size() == weights.size());
    Owned versions = reference_to(python.none);
    if (aoti_torch_grad_mode_is_enabled() && (wants_gradients(a[0]) || wants_gradients(a[1])))
        versions = versions_of(a[0], a[1], ssize_t(weights.size()));
    auto [aligned, statistics] = [&] {
        AsAnOp scope;
        return forward_beside(nullptr, backend, weights, gains, eps, scales, dtype, MemoryFormat(format_number),
                              memory);
    }();
    Owned results(PyTuple_New(aligned.size()));
    for (size_t i = 0; i < aligned.size(); ++i) PyTuple_SetItem(results.get(), i, object_of(aligned[i]).release());
    return tuple_of(std::move(results), object_of(statistics), std::move(versions));
}

// The gain's part of a list's gradients, in its shape.
Tensor part(const Tensor& grad_gains, const Tensor& gain, int64_t offset) {
    if (gain.dim() == 1 && gain.numel() == grad_gains.numel()) return grad_gains;
    const std::vector<int64_t> strides(gain.dim(), 1);  // all but the first dimension have one element
    return in_memory_of(grad_gains, gain.dim(), gain.sizes().data(), strides.data(), offset);
}

constexpr ssize_t kOthers = 3;  // arguments of the autograd.Function before the weights

// Whether the weight of each gradient, or its gain, wants one, and no weight and gain was written to since `versions`.
void require_usual(PyObject* grads, PyObject* wanted, PyObject* tensors, PyObject* versions) {
    const ssize_t both = PySequence_Size(tensors), count = both / 2;
    require(2 * count == both && PySequence_Size(grads) == count && PySequence_Size(versions) == both &&
            PySequence_Size(wanted) == kOthers + both);
    auto is_wanted = [&](ssize_t i) { return PyObject_IsTrue(item(wanted, i).get()) == 1; };
    for (ssize_t i = 0; i < count; ++i) require(is_wanted(kOthers + i) || is_wanted(kOthers + count + i));
    for (ssize_t i = 0; i < both; ++i) {
        Owned tensor = item(tensors, i);
        require(tensor.get() == python.none || as_long(version_of(tensor.get())) == as_long(item(versions, i)));
    }
    require(!PyErr_Occurred());
}

// Of each gradient, whether the weight's may be written over it: it has `large` values or more, which makes its memory
// worth asking, and nobody else holds it. `limits` is a function that returns the `holders_of` a gradient that is
// spent.
std::vector<bool> which_are_spent(PyObject* grads, int64_t large, PyObject* limits) {
    Owned holders = answer(PyObject_CallFunctionObjArgs(limits, nullptr));
    std::vector<bool> spent;
    for (ssize_t i = 0, count = PySequence_Size(grads); i < count; ++i) {
        Owned grad = item(grads, i);
        const bool is_large = plain_tensor(grad.get()).numel() >= large;
        spent.push_back(is_large && type_of(grad.get()) == python.tensor &&
                        has_no_more_holders(grad.get(), holders.get()));
    }
    return spent;
}

// The backward of autograd.py's Function of (call, results, input, weights..., gains...), for what is usual: no input,
// a gradient for each weight, no graph of the backward itself. All gradients, each in its tensor's shape and dtype, so
// that no Python must put them there; gains of another dtype than the statistics are left to it. Arguments: the
// gradients; what of the Function's arguments wants one; weights and gains, and their versions in the forward;
// statistics; scales; `limits` and `large` of `which_are_spent`.
Owned backward(PyObject* const* a) {
    require(!aoti_torch_grad_mode_is_enabled());
    require_usual(a[0], a[1], a[2], a[3]);
    const ssize_t count = PySequence_Size(a[0]);
    auto weights = list<Tensor>(a[2], 0, count);
    auto gains = list<std::optional<Tensor>>(a[2], count, 2 * count);
    Tensor statistics = to(a[4], static_cast<Tensor*>(nullptr));
    auto scales = list<double>(a[5]);
    const int64_t large = PyLong_AsLong(a[7]);
    require(!PyErr_Occurred());
    for (const auto& gain : gains) require(!gain || gain->scalar_type() == statistics.scalar_type());
    const AlignBackend& backend = *backends_of(weights, gains).backward;
    require(device_type_of(statistics) == device_type_of(weights[0]));
    auto grads = list<Tensor>(a[0]);
    for (const Tensor& grad : grads) require(device_type_of(grad) == device_type_of(statistics));
    std::vector<bool> spent;
    auto is_large = [&](const Tensor& grad) { return grad.numel() >= large; };
    if (backend.is_in_place && std::any_of(grads.begin(), grads.end(), is_large)) {
        grads.clear();  // as each of these holds its gradient
        spent = which_are_spent(a[0], large, a[6]);
        grads = list<Tensor>(a[0]);
    }
    AlignBackwardResult results = [&] {
        AsAnOp scope;
        return backward_beside(nullptr, backend, grads, weights, gains, statistics, scales, spent);
    }();
    const auto& [grad_weights, grad_gains] = results;
    Owned placed(PyTuple_New(kOthers + 2 * count));
    auto place = [&](ssize_t i, Owned object) { PyTuple_SetItem(placed.get(), i, object.release()); };
    for (ssize_t i = 0; i < kOthers; ++i) place(i, reference_to(python.none));
    int64_t offset = 0;
    for (ssize_t i = 0; i < count; ++i) {
        place(kOthers + i, object_of(grad_weights[i]));
        place(kOthers + count + i,
              gains[i] ? object_of(part(grad_gains, *gains[i], offset)) : reference_to(python.none));
        offset += weights[i].size(0);
    }
    return placed;
}

// What the layer's aligned filters are computed from, as bytes: what `fingerprint_with` of fingerprint.py lists.
Owned fingerprint(PyObject* const* a) {
    static const auto name = PyUnicode_InternFromString;
    static PyObject *const parameters = name("_parameters"), *const weight = name("weight"), *const gain = name("gain"),
                           *const eps = name("eps"), *const scale = name("scale");
    constexpr int64_t kMaxRank = 16;
    int64_t found[2 * (5 + kMaxRank) + 2];
    size_t count = 0;
    Owned attributes(PyObject_GenericGetDict(a[0], nullptr));
    Owned tensors(PyObject_GetItem(attributes.get(), parameters));
    for (PyObject* key : {weight, gain}) {
        Owned object(PyObject_GetItem(tensors.get(), key));
        if (object.get() == python.none && key == gain) continue;
        Tensor t = plain_tensor(object.get());
        require(t.dim() <= kMaxRank);
        found[count++] = reinterpret_cast<intptr_t>(object.get());
        found[count++] = as_long(version_of(object.get()));
        found[count++] = requires_grad(object.get());
        found[count++] = reinterpret_cast<intptr_t>(t.const_data_ptr());
        found[count++] = int64_t(t.scalar_type());
        for (int64_t stride : t.strides()) found[count++] = stride;
    }
    for (PyObject* key : {eps, scale}) {
        double number = to(Owned(PyObject_GetItem(attributes.get(), key)).get(), static_cast<double*>(nullptr));
        std::memcpy(&found[count++], &number, sizeof number);
    }
    return Owned(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(found), count * sizeof found[0]));
}

// For Python's probe of a gradient that is spent: of the only gradient of a backward.
Owned holders(PyObject* const* a) { return holders_of(item(a[0], 0).get()); }
Owned state_of_storage(PyObject* const* a) { return storage_state(a[0]); }

template <Owned (*function)(PyObject* const*), ssize_t kCount>
PyObject* called(PyObject*, PyObject* const* arguments, ssize_t count) {
    try {
        require(count == kCount);
        return function(arguments).release();
    } catch (const RunError& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    } catch (const Raised&) {
        return nullptr;
    } catch (...) {
        PyErr_Clear();
        return reference_to(python.none).release();
    }
}

PyMethodDef definitions[] = {{"align_forward", called<forward, 7>, METH_FASTCALL, nullptr},
                             {"align_backward", called<backward, 8>, METH_FASTCALL, nullptr},
                             {"fingerprint", called<fingerprint, 1>, METH_FASTCALL, nullptr},
                             {"holders", called<holders, 1>, METH_FASTCALL, nullptr},
                             {"storage_state", called<state_of_storage, 1>, METH_FASTCALL, nullptr}};

}  // namespace

void serve_python_calls(int32_t device_type, const AlignBackend& forward, const AlignBackend& backward) {
    backends()[device_type] = {&forward, &backward};
}

}  // namespace wa

// The functions of `definitions`, or None if torch is older. Called through ctypes, once.
extern "C" __attribute__((visibility("default"))) PyObject* wa_python_calls(const wa::PythonNames* names) {
    using namespace wa;
    python = *names;
    for (PyObject* each : {python.is_neg, python.getrefcount, python.storage_holders}) Py_IncRef(each);  // for good
    auto find = [](auto& function, const char* name) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
        return function != nullptr;
    };
    if (!find(tensor_from, "torch_tensor_from_pyobject") || !find(tensor_to, "torch_tensor_to_pyobject") ||
        !find(has_storage, "torch_has_storage"))
        return reference_to(python.none).release();
    Owned functions(PyTuple_New(std::size(definitions)));
    for (size_t i = 0; i < std::size(definitions); ++i)
        PyTuple_SetItem(functions.get(), ssize_t(i), PyCFunction_NewEx(&definitions[i], nullptr, nullptr));
    return functions.release();
}
