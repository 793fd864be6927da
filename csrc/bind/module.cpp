// The Python module quant._C. Importing it registers the ops: each file of this folder does so for its own. The module
// itself only tells what it is.
#include <Python.h>

#include "bind/build_info.h"
#include "cpu/tables.h"

namespace {

PyObject* build_info(PyObject*, PyObject*) { return PyUnicode_FromString(foldkv_build_info); }

PyObject* cpu_isa(PyObject*, PyObject*) {
  const foldkv::cpu::IsaOps* isa = foldkv::cpu::isa();
  return PyUnicode_FromString(isa == nullptr ? "" : isa->name);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What this extension was built from and for, as JSON."},
    {"cpu_isa", cpu_isa, METH_NOARGS,
     "The instruction set that serves the CPU: one of build_info()'s isas. \"\": FOLDKV_ISA cannot run here."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "The kernels of foldkv.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
