#include "tensor_holders.h"

#include <vector>

namespace wa {
namespace {

long number(PyObject* object) {
    const long found = as_long(answer(object));
    if (PyErr_Occurred()) throw Raised();
    return found;
}
long references_to(PyObject* object) {
    return number(PyObject_CallFunctionObjArgs(python.getrefcount, object, nullptr));
}

// Both call `see` with one number after the other until it returns false; whether it never did. One after the other, as
// the first of all says no of most gradients that somebody holds.
template <class See>
bool each_of_storage(PyObject* tensor, See see) {
    static const auto name = PyUnicode_InternFromString;
    static PyObject *const untyped_storage = name("untyped_storage"), *const cdata = name("_cdata"),
                           *const resizable = name("resizable"), *const is_shared = name("is_shared"),
                           *const nbytes = name("nbytes");
    Owned object = answer(PyObject_CallMethodObjArgs(tensor, untyped_storage, nullptr));
    PyObject* storage = object.get();
    auto ask = [&](PyObject* method) { return number(PyObject_CallMethodObjArgs(storage, method, nullptr)); };
    auto uses = [&] {
        Owned address = answer(PyObject_GetAttr(storage, cdata));
        return number(PyObject_CallFunctionObjArgs(python.storage_holders, address.get(), nullptr));
    };
    return see(references_to(storage)) && see(uses()) && see(!ask(resizable)) && see(ask(is_shared)) &&
           see(ask(nbytes) != number(PyObject_GetAttr(tensor, nbytes)));
}
template <class See>
bool each_holder(PyObject* tensor, See see) {
    static PyObject* const use_count = PyUnicode_InternFromString("_use_count");
    return see(references_to(tensor)) && see(number(PyObject_CallMethodObjArgs(tensor, use_count, nullptr))) &&
           each_of_storage(tensor, see);
}

template <class Each>
Owned all(PyObject* tensor, Each each) {
    std::vector<long> found;
    each(tensor, [&](long value) { return found.push_back(value), true; });
    Owned tuple(PyTuple_New(ssize_t(found.size())));
    for (size_t i = 0; i < found.size(); ++i) PyTuple_SetItem(tuple.get(), ssize_t(i), PyLong_FromLong(found[i]));
    return tuple;
}

}  // namespace

Owned holders_of(PyObject* tensor) {
    return all(tensor, [](PyObject* t, auto see) { each_holder(t, see); });
}
Owned storage_state(PyObject* tensor) {
    return all(tensor, [](PyObject* t, auto see) { each_of_storage(t, see); });
}
bool has_no_more_holders(PyObject* tensor, PyObject* holders) {
    ssize_t i = 0;
    return each_holder(tensor, [&](long value) { return value <= number(item(holders, i++).release()); });
}

}  // namespace wa
