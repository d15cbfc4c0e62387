// Objects of Python, without its headers: what is called of CPython's stable ABI, as weak symbols, and references.
#pragma once

#include <sys/types.h>

#include <utility>

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
WA_WEAK PyObject* PyObject_CallMethodObjArgs(PyObject* object, PyObject* name, ...);
WA_WEAK PyObject* PyObject_GetAttr(PyObject*, PyObject* name);
WA_WEAK PyObject* PyObject_GetItem(PyObject*, PyObject* key);
WA_WEAK PyObject* PyObject_GenericGetDict(PyObject*, void*);
WA_WEAK PyObject* PyUnicode_InternFromString(const char*);
WA_WEAK PyObject* PyBytes_FromStringAndSize(const char*, ssize_t);
WA_WEAK int PyObject_IsTrue(PyObject*);
extern WA_WEAK PyObject PyFloat_Type;
WA_WEAK double PyFloat_AsDouble(PyObject*);
WA_WEAK long PyLong_AsLong(PyObject*);
WA_WEAK PyObject* PyLong_FromLong(long);
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

struct Declined {};  // thrown where the op must be called instead
struct Raised {};    // thrown where Python has raised an exception that the caller shall see

inline void require(bool condition) {
    if (!condition) throw Declined();
}

// A reference to an object.
class Owned {
public:
    explicit Owned(PyObject* object) : object_(object) { require(object); }
    Owned(Owned&& other) : object_(other.release()) {}
    Owned& operator=(Owned&& other) {
        std::swap(object_, other.object_);
        return *this;
    }
    ~Owned() {
        if (object_) Py_DecRef(object_);
    }
    PyObject* get() const { return object_; }
    PyObject* release() { return std::exchange(object_, nullptr); }

private:
    PyObject* object_;
};

inline Owned reference_to(PyObject* object) {
    Py_IncRef(object);
    return Owned(object);
}

// What a function of Python returned; what it raised is for the caller to see.
inline Owned answer(PyObject* object) {
    if (!object) throw Raised();
    return Owned(object);
}

inline Owned item(PyObject* sequence, ssize_t i) { return Owned(PySequence_GetItem(sequence, i)); }
template <class... T>
Owned tuple_of(T... items) {
    Owned tuple(PyTuple_New(sizeof...(T)));
    ssize_t i = 0;
    (PyTuple_SetItem(tuple.get(), i++, items.release()), ...);
    return tuple;
}

}  // namespace wa
