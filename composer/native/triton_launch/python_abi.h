/* The part of CPython's stable ABI (PEP 384, added in 3.10 or earlier) that this extension uses.
 *
 * Declared here, not taken from Python.h, so that the bytes do not depend on which interpreter's headers, if any, the
 * build machine has. Layouts are those of a build with the GIL, the only one that loads .abi3.so files.
 */
#ifndef COMPOSER_PYTHON_ABI_H
#define COMPOSER_PYTHON_ABI_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

typedef ssize_t Py_ssize_t;
typedef struct PyTypeObject PyTypeObject;
typedef struct PyThreadState PyThreadState;
typedef struct PyObject {
  Py_ssize_t ob_refcnt;
  PyTypeObject *ob_type;
} PyObject;

typedef PyObject *(*PyCFunction)(PyObject *, PyObject *);
typedef PyObject *(*PyCFunctionFast)(PyObject *, PyObject *const *, Py_ssize_t);
typedef struct {
  const char *ml_name;
  PyCFunction ml_meth;
  int ml_flags;
  const char *ml_doc;
} PyMethodDef;

typedef struct {
  PyObject ob_base;
  PyObject *(*m_init)(void);
  Py_ssize_t m_index;
  PyObject *m_copy;
  const char *m_name;
  const char *m_doc;
  Py_ssize_t m_size;
  PyMethodDef *m_methods;
  void *m_slots, *m_traverse, *m_clear, *m_free;
} PyModuleDef;

typedef struct {
  int slot;
  void *pfunc;
} PyType_Slot;
typedef struct {
  const char *name;
  int basicsize, itemsize;
  unsigned int flags;
  PyType_Slot *slots;
} PyType_Spec;

enum { METH_VARARGS = 0x1, METH_FASTCALL = 0x80, PYTHON_ABI_VERSION = 3 };
#define Py_TPFLAGS_DEFAULT (1u << 18)
#define Py_TPFLAGS_LONG_SUBCLASS (1ul << 24)
#define Py_TPFLAGS_TUPLE_SUBCLASS (1ul << 26)

extern PyObject _Py_NoneStruct;
extern PyObject *PyExc_OverflowError, *PyExc_RuntimeError, *PyExc_TypeError, *PyExc_ValueError;

void Py_IncRef(PyObject *);
void Py_DecRef(PyObject *);
PyThreadState *PyEval_SaveThread(void);
void PyEval_RestoreThread(PyThreadState *);
PyObject *PyErr_Occurred(void);
void PyErr_SetString(PyObject *, const char *);
PyObject *PyErr_Format(PyObject *, const char *, ...);
PyObject *PyErr_NoMemory(void);
int _PyArg_ParseTuple_SizeT(PyObject *, const char *, ...);
PyObject *Py_BuildValue(const char *, ...);
unsigned long PyType_GetFlags(PyTypeObject *);
PyObject *PyType_FromSpec(PyType_Spec *);
PyObject *PyObject_CallObject(PyObject *, PyObject *);
PyObject *PyObject_CallFunctionObjArgs(PyObject *, ...);
PyObject *PyObject_CallMethodObjArgs(PyObject *, PyObject *, ...);
int PyObject_IsTrue(PyObject *);
int PySequence_Check(PyObject *);
PyObject *PySequence_Tuple(PyObject *);
Py_ssize_t PyTuple_Size(PyObject *);
PyObject *PyTuple_GetItem(PyObject *, Py_ssize_t);
PyObject *PyLong_FromLong(long);
long PyLong_AsLong(PyObject *);
long long PyLong_AsLongLong(PyObject *);
unsigned long PyLong_AsUnsignedLongMask(PyObject *);
unsigned long long PyLong_AsUnsignedLongLong(PyObject *);
unsigned long long PyLong_AsUnsignedLongLongMask(PyObject *);
double PyFloat_AsDouble(PyObject *);
PyObject *PyUnicode_InternFromString(const char *);
PyObject *PyCapsule_New(void *, const char *, void (*)(PyObject *));
void *PyCapsule_GetPointer(PyObject *, const char *);
PyObject *PyCFunction_NewEx(PyMethodDef *, PyObject *, PyObject *);
PyObject *PyModule_Create2(PyModuleDef *, int);
int PyModule_AddObject(PyObject *, const char *, PyObject *);
void *PyMem_Malloc(size_t);
void PyMem_Free(void *);

#define Py_None (&_Py_NoneStruct)
#define PyArg_ParseTuple _PyArg_ParseTuple_SizeT

static inline int PyLong_Check(PyObject *object) {
  return (PyType_GetFlags(object->ob_type) & Py_TPFLAGS_LONG_SUBCLASS) != 0;
}

static inline int PyTuple_Check(PyObject *object) {
  return (PyType_GetFlags(object->ob_type) & Py_TPFLAGS_TUPLE_SUBCLASS) != 0;
}

static inline PyObject *new_none(void) {
  Py_IncRef(Py_None);
  return Py_None;
}

#endif
