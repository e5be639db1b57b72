// Binds a function of a struct of arguments to Python: one keyword a field, of the field's name, so that an address
// cannot land in another field. A missing, misspelt or surplus keyword raises TypeError.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace dino::bindings {

namespace py = pybind11;

// How Python passes a value of type T: a pointer as an address, a DType as a number of DTYPES in _core/native.py.
template <class T>
struct Conversion {
    using Passed = T;
    static T from(T x) { return x; }
};
template <class T>
struct Conversion<T*> {
    using Passed = uintptr_t;
    static T* from(uintptr_t address) { return reinterpret_cast<T*>(address); }
};
template <>
struct Conversion<DType> {
    using Passed = int;
    static DType from(int number) { return DType(number); }
};

template <class Args, class T>
struct Field {
    using Passed = typename Conversion<T>::Passed;
    const char* name;
    T Args::* member;
    void set(Args& args, const Passed& x) const { args.*member = Conversion<T>::from(x); }
};

// A field of a struct inside the arguments.
template <class Args, class Part, class T>
struct PartField {
    using Passed = typename Conversion<T>::Passed;
    const char* name;
    Part Args::* part;
    T Part::* member;
    void set(Args& args, const Passed& x) const { args.*part.*member = Conversion<T>::from(x); }
};

// A list of numbers, of which the function reads the values and their count during the call.
template <class Args>
struct ListField {
    using Passed = std::vector<int64_t>;
    const char* name;
    const int64_t* Args::* member;
    int64_t Args::* count;
    void set(Args& args, const Passed& x) const { args.*member = x.data(), args.*count = int64_t(x.size()); }
};

#define DINO_FIELD(name) \
    Field<Args, decltype(Args::name)> { #name, &Args::name }

// m.name(*, fields) calls function(args).
template <class Args, class Result, class... Fields>
void bind(py::module_& m, const char* name, Result (*function)(const Args&), Fields... fields) {
    auto call = [=](typename Fields::Passed... values) {
        py::gil_scoped_release unlocked;
        Args args{};
        (fields.set(args, values), ...);
        return function(args);
    };
    m.def(name, call, py::kw_only(), py::arg(fields.name)...);
}

// object.name(*, fields) calls function(object, args).
template <class Self, class Args, class... Fields>
void bind(py::class_<Self>& type, const char* name, void (*function)(const Self&, const Args&), Fields... fields) {
    auto call = [=](const Self& self, typename Fields::Passed... values) {
        py::gil_scoped_release unlocked;
        Args args{};
        (fields.set(args, values), ...);
        function(self, args);
    };
    type.def(name, call, py::kw_only(), py::arg(fields.name)...);
}

// type(*, fields)
template <class Args, class... Fields>
void bind_constructor(py::class_<Args>& type, Fields... fields) {
    auto make = [=](typename Fields::Passed... values) {
        Args args{};
        (fields.set(args, values), ...);
        return args;
    };
    type.def(py::init(make), py::kw_only(), py::arg(fields.name)...);
}

template <class T>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
    std::vector<T*> result;
    for (uintptr_t address : addresses) result.push_back(reinterpret_cast<T*>(address));
    return result;
}

inline std::vector<DType> dtypes(const std::vector<int>& numbers) {
    std::vector<DType> result;
    for (int number : numbers) result.push_back(DType(number));
    return result;
}

}  // namespace dino::bindings
