// align_forward and align_backward as built-in functions of Python, with the arguments of the ops (dtype and memory
// format as their numbers); and the fingerprint of a layer, for which Python asks torch a dozen questions. On the way
// through torch.ops each argument is matched against the schema, boxed, unboxed and boxed again, which takes several
// times as long as aligning a small weight.
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
#include <sys/types.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "layout.h"

extern "C" {
#define WA_WEAK __attribute__((weak))
struct PyObject;
using PyFunction = PyObject* (*)(PyObject * self, PyObject* const* arguments, ssize_t count);
struct PyMethodDef {
    const char* name;
    PyFunction function;
    int flags;
    const char* doc;
};
constexpr int METH_FASTCALL = 0x80;
WA_WEAK void Py_IncRef(PyObject*);
WA_WEAK void Py_DecRef(PyObject*);
WA_WEAK PyObject* PyObject_Type(PyObject*);
WA_WEAK PyObject* PyObject_CallFunctionObjArgs(PyObject* function, ...);
WA_WEAK PyObject* PyObject_GetAttr(PyObject*, PyObject* name);
WA_WEAK PyObject* PyObject_GetItem(PyObject*, PyObject* key);
WA_WEAK PyObject* PyObject_GenericGetDict(PyObject*, void*);
WA_WEAK PyObject* PyUnicode_InternFromString(const char*);
WA_WEAK PyObject* PyBytes_FromStringAndSize(const char*, ssize_t);
WA_WEAK int PyObject_IsTrue(PyObject*);
extern WA_WEAK PyObject PyFloat_Type;
WA_WEAK double PyFloat_AsDouble(PyObject*);
WA_WEAK long PyLong_AsLong(PyObject*);
WA_WEAK ssize_t PySequence_Size(PyObject*);
WA_WEAK PyObject* PySequence_GetItem(PyObject*, ssize_t);
WA_WEAK PyObject* PyTuple_New(ssize_t);
WA_WEAK int PyTuple_SetItem(PyObject*, ssize_t, PyObject*);
WA_WEAK PyObject* PyErr_Occurred();
WA_WEAK void PyErr_Clear();
WA_WEAK void PyErr_SetString(PyObject* type, const char* message);
extern WA_WEAK PyObject* PyExc_RuntimeError;
WA_WEAK void* PyEval_SaveThread();
WA_WEAK void PyEval_RestoreThread(void*);
WA_WEAK PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject* self, PyObject* module);
}

namespace wa {
namespace {

struct Declined {};  // thrown where the op must be called instead

void require(bool condition) {
    if (!condition) throw Declined();
}

AOTITorchError (*tensor_from)(void* object, AtenTensorHandle* tensor);
AOTITorchError (*tensor_to)(AtenTensorHandle tensor, void* type, void** object);
AOTITorchError (*has_storage)(AtenTensorHandle tensor, bool* result);
PyObject *plain_type, *parameter_type;  // without a __torch_function__ of their own
PyObject* is_negated;                   // torch.Tensor.is_neg: whether the values are those in memory, negated

struct Backends {
    const AlignBackend *forward, *backward;
};
std::map<int32_t, Backends>& backends() {
    static std::map<int32_t, Backends> by_device_type;
    return by_device_type;
}

// A reference to an object.
class Owned {
public:
    explicit Owned(PyObject* object) : object_(object) { require(object); }
    Owned(Owned&& other) : object_(other.release()) {}
    ~Owned() {
        if (object_) Py_DecRef(object_);
    }
    PyObject* get() const { return object_; }
    PyObject* release() { return std::exchange(object_, nullptr); }

private:
    PyObject* object_;
};

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

int32_t device_type_of(const Tensor& t) {
    int32_t type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    return type;
}

PyObject* type_of(PyObject* object) { return Owned(PyObject_Type(object)).get(); }  // something else owns each type

// Conversions from Python. `none` is the functions' `self`.
double to(PyObject* object, PyObject*, double*) {
    require(type_of(object) == &PyFloat_Type);
    return PyFloat_AsDouble(object);
}
Tensor plain_tensor(PyObject* object) {
    PyObject* type = type_of(object);
    require(type == plain_type || type == parameter_type);
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(tensor_from(object, &handle));
    Tensor t(handle);
    bool has_memory = false;  // wrappers and sparse tensors have none
    STABLE_TORCH_ERROR_CODE_CHECK(has_storage(handle, &has_memory));
    require(has_memory);
    return t;
}
Tensor to(PyObject* object, PyObject*, Tensor*) {
    Tensor t = plain_tensor(object);
    require(t.const_data_ptr() || t.numel() == 0);  // torch's zero tensors have no memory
    require(!PyObject_IsTrue(Owned(PyObject_CallFunctionObjArgs(is_negated, object, nullptr)).get()));
    return t;
}
bool to(PyObject* object, PyObject*, bool*) { return PyObject_IsTrue(object) == 1; }
std::optional<Tensor> to(PyObject* object, PyObject* none, std::optional<Tensor>*) {
    if (object == none) return std::nullopt;
    return to(object, none, static_cast<Tensor*>(nullptr));
}
template <class T>
std::vector<T> list(PyObject* sequence, PyObject* none) {
    std::vector<T> values;
    ssize_t size = PySequence_Size(sequence);
    require(size > 0);
    values.reserve(std::min<ssize_t>(size, 1024));  // whatever a sequence of the user says its size is
    for (ssize_t i = 0; i < size; ++i)
        values.push_back(to(Owned(PySequence_GetItem(sequence, i)).get(), none, static_cast<T*>(nullptr)));
    return values;
}

Owned from(const Tensor& t) {
    void* object = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(tensor_to(t.get(), nullptr, &object));
    return Owned(static_cast<PyObject*>(object));
}
template <class... T>
Owned tuple_of(T... items) {
    Owned tuple(PyTuple_New(sizeof...(T)));
    ssize_t i = 0;
    (PyTuple_SetItem(tuple.get(), i++, items.release()), ...);
    return tuple;
}
Owned from(const std::tuple<std::vector<Tensor>, Tensor>& results) {
    const auto& [tensors, last] = results;
    Owned tuple(PyTuple_New(tensors.size()));
    for (size_t i = 0; i < tensors.size(); ++i) PyTuple_SetItem(tuple.get(), i, from(tensors[i]).release());
    return tuple_of(std::move(tuple), from(last));
}

const Backends& backends_of(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& gains) {
    const int32_t type = device_type_of(weights[0]);
    for (const Tensor& w : weights) require(device_type_of(w) == type);
    for (const auto& gain : gains) require(!gain || device_type_of(*gain) == type);
    auto found = backends().find(type);
    require(found != backends().end());
    return found->second;
}

// As the op; the last argument is None or, for each aligned weight, a tensor whose memory it may have, or None.
Owned forward(PyObject* const* a, PyObject* none) {
    auto weights = list<Tensor>(a[0], none);
    auto gains = list<std::optional<Tensor>>(a[1], none);
    auto eps = list<double>(a[2], none), scales = list<double>(a[3], none);
    for (double each : eps) require(each >= std::numeric_limits<float>::min() && std::isfinite(each));
    for (double each : scales) require(std::isfinite(each));
    const long dtype_number = PyLong_AsLong(a[4]), format_number = PyLong_AsLong(a[5]);
    require(!PyErr_Occurred() && dtype_number >= 0 && dtype_number <= std::numeric_limits<int8_t>::max());
    require(format_number >= 0 && format_number <= long(MemoryFormat::ChannelsLast3d));
    auto dtype = torch::stable::detail::to<ScalarType>(torch::stable::detail::from(int32_t(dtype_number)));
    auto format = MemoryFormat(format_number);
    std::vector<std::optional<Tensor>> memory;
    if (a[6] != none) memory = list<std::optional<Tensor>>(a[6], none);
    require(memory.empty() || memory.size() == weights.size());
    for (const auto& each : memory) {
        require(!each || device_type_of(*each) == device_type_of(weights[0]));
        if (each) check_memory("memory", *each);
    }
    const AlignBackend& backend = *backends_of(weights, gains).forward;
    return from([&] {
        AsAnOp scope;
        return forward_beside(nullptr, backend, weights, gains, eps, scales, dtype, format, memory);
    }());
}

// The gain's part of a list's gradients, in its shape.
Tensor part(const Tensor& grad_gains, const Tensor& gain, int64_t offset) {
    if (gain.dim() == 1 && gain.numel() == grad_gains.numel()) return grad_gains;
    const std::vector<int64_t> strides(gain.dim(), 1);  // all but the first dimension have one element
    return in_memory_of(grad_gains, gain.dim(), gain.sizes().data(), strides.data(), offset);
}

// (gradients of the weights, then of the gains): unlike the op's results, each in its tensor's shape and dtype, so that
// no Python must put them there. Gains of another dtype than the statistics are left to it. The last argument says of
// each gradient whether it is spent: whether the weight's may be written over it.
Owned backward(PyObject* const* a, PyObject* none) {
    auto grads = list<Tensor>(a[0], none), weights = list<Tensor>(a[1], none);
    auto gains = list<std::optional<Tensor>>(a[2], none);
    auto statistics = to(a[3], none, static_cast<Tensor*>(nullptr));
    auto scales = list<double>(a[4], none);
    auto spent = list<bool>(a[5], none);
    require(!PyErr_Occurred() && spent.size() == grads.size());
    for (const auto& gain : gains) require(!gain || gain->scalar_type() == statistics.scalar_type());
    const AlignBackend& backend = *backends_of(weights, gains).backward;
    for (const Tensor& grad : grads) require(device_type_of(grad) == device_type_of(statistics));
    require(device_type_of(statistics) == device_type_of(weights[0]));
    AlignBackwardResult results = [&] {
        AsAnOp scope;
        return backward_beside(nullptr, backend, grads, weights, gains, statistics, scales, spent);
    }();
    const auto& [grad_weights, grad_gains] = results;
    Owned placed(PyTuple_New(2 * weights.size()));
    int64_t offset = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
        PyTuple_SetItem(placed.get(), i, from(grad_weights[i]).release());
        PyObject* grad_gain = gains[i] ? from(part(grad_gains, *gains[i], offset)).release() : (Py_IncRef(none), none);
        PyTuple_SetItem(placed.get(), weights.size() + i, grad_gain);
        offset += weights[i].size(0);
    }
    return placed;
}

// What the layer's aligned filters are computed from, as bytes: what `fingerprint_with` of fingerprint.py lists.
Owned fingerprint(PyObject* const* a, PyObject* none) {
    static const auto name = PyUnicode_InternFromString;
    static PyObject *const parameters = name("_parameters"), *const weight = name("weight"), *const gain = name("gain"),
                           *const eps = name("eps"), *const scale = name("scale"), *const version = name("_version"),
                           *const requires_grad = name("requires_grad");
    constexpr int64_t kMaxRank = 16;
    int64_t found[2 * (5 + kMaxRank) + 2];
    size_t count = 0;
    Owned attributes(PyObject_GenericGetDict(a[0], nullptr));
    Owned tensors(PyObject_GetItem(attributes.get(), parameters));
    for (PyObject* key : {weight, gain}) {
        Owned object(PyObject_GetItem(tensors.get(), key));
        if (object.get() == none && key == gain) continue;
        Tensor t = plain_tensor(object.get());
        require(t.dim() <= kMaxRank);
        found[count++] = reinterpret_cast<intptr_t>(object.get());
        found[count++] = PyLong_AsLong(Owned(PyObject_GetAttr(object.get(), version)).get());
        found[count++] = PyObject_IsTrue(Owned(PyObject_GetAttr(object.get(), requires_grad)).get());
        found[count++] = reinterpret_cast<intptr_t>(t.const_data_ptr());
        found[count++] = int64_t(t.scalar_type());
        for (int64_t stride : t.strides()) found[count++] = stride;
    }
    for (PyObject* key : {eps, scale}) {
        double number = to(Owned(PyObject_GetItem(attributes.get(), key)).get(), none, static_cast<double*>(nullptr));
        std::memcpy(&found[count++], &number, sizeof number);
    }
    return Owned(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(found), count * sizeof found[0]));
}

template <Owned (*function)(PyObject* const*, PyObject*), ssize_t kCount>
PyObject* called(PyObject* none, PyObject* const* arguments, ssize_t count) {
    try {
        require(count == kCount);
        return function(arguments, none).release();
    } catch (const RunError& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    } catch (...) {
        PyErr_Clear();
        Py_IncRef(none);
        return none;
    }
}

PyMethodDef definitions[] = {{"align_forward", called<forward, 7>, METH_FASTCALL, nullptr},
                             {"align_backward", called<backward, 6>, METH_FASTCALL, nullptr},
                             {"fingerprint", called<fingerprint, 1>, METH_FASTCALL, nullptr}};

}  // namespace

void serve_python_calls(int32_t device_type, const AlignBackend& forward, const AlignBackend& backward) {
    backends()[device_type] = {&forward, &backward};
}

}  // namespace wa

// (align_forward, align_backward, fingerprint), or None if torch is older. Called through ctypes, once.
extern "C" __attribute__((visibility("default"))) PyObject* wa_python_calls(PyObject* tensor, PyObject* parameter,
                                                                            PyObject* is_neg, PyObject* none) {
    using namespace wa;
    plain_type = tensor, parameter_type = parameter, is_negated = is_neg;
    auto find = [](auto& function, const char* name) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
        return function != nullptr;
    };
    if (!find(tensor_from, "torch_tensor_from_pyobject") || !find(tensor_to, "torch_tensor_to_pyobject") ||
        !find(has_storage, "torch_has_storage"))
        return Py_IncRef(none), none;
    auto function = [&](PyMethodDef& definition) { return Owned(PyCFunction_NewEx(&definition, none, nullptr)); };
    return tuple_of(function(definitions[0]), function(definitions[1]), function(definitions[2])).release();
}
