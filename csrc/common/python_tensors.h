// Tensors as objects of Python: what the ops take of them, made of them and ask them.
#pragma once

#include "layout.h"
#include "python_objects.h"

namespace wa {

// What Python hands over once: see `wa_python_calls`.
struct PythonNames {
    PyObject *tensor, *parameter;  // the types without a __torch_function__ of their own
    PyObject* is_neg;              // of torch.Tensor: whether the values are those in memory, negated
    PyObject* getrefcount;         // of sys
    PyObject* storage_holders;     // how many tensors use a storage, from its address: of torch_private.py
    PyObject* none;
};
inline PythonNames python;

// torch's functions for objects (torch >= 2.14).
inline AOTITorchError (*tensor_from)(void* object, AtenTensorHandle* tensor);
inline AOTITorchError (*tensor_to)(AtenTensorHandle tensor, void* type, void** object);
inline AOTITorchError (*has_storage)(AtenTensorHandle tensor, bool* result);

inline PyObject* type_of(PyObject* object) { return Owned(PyObject_Type(object)).get(); }  // something else owns it

inline int32_t device_type_of(const Tensor& t) {
    int32_t type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    return type;
}

// A tensor with a storage (wrappers and sparse tensors have none), of torch's own types.
inline Tensor plain_tensor(PyObject* object) {
    PyObject* type = type_of(object);
    require(type == python.tensor || type == python.parameter);
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(tensor_from(object, &handle));
    Tensor t(handle);
    bool has_memory = false;
    STABLE_TORCH_ERROR_CODE_CHECK(has_storage(handle, &has_memory));
    require(has_memory);
    return t;
}

inline Owned object_of(const Tensor& t) {
    void* object = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(tensor_to(t.get(), nullptr, &object));
    return Owned(static_cast<PyObject*>(object));
}

inline long as_long(const Owned& object) { return PyLong_AsLong(object.get()); }
inline bool is_true(const Owned& object) { return PyObject_IsTrue(object.get()) == 1; }

inline bool requires_grad(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("requires_grad");
    return is_true(Owned(PyObject_GetAttr(tensor, name)));
}

// How often the tensor was written to.
inline Owned version_of(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    return Owned(PyObject_GetAttr(tensor, name));
}

}  // namespace wa
