#ifndef COMPOSER_MODULE_H
#define COMPOSER_MODULE_H

#include "driver.h"

/* A Python object that owns one tensor map; the map lies in `room` at the first multiple of 128. */
typedef struct {
  PyObject header;
  char room[sizeof(CUtensorMap) + 127];
} TensorMapObject;

extern PyTypeObject *tensor_map_type;

static inline CUtensorMap *tensor_map_of(PyObject *object) {
  return (CUtensorMap *)(((uintptr_t)((TensorMapObject *)object)->room + 127) & ~(uintptr_t)127);
}

/* launcher(codes: str) -> callable; `codes` describes the kernel's arguments, see launch.c. */
PyObject *new_launcher(PyObject *module, PyObject *arguments);

/* The same for a callable that takes its arguments as Triton 3.8 gives them. */
PyObject *new_packed_launcher(PyObject *module, PyObject *arguments);

/* Prepare launch.c; 0, or -1 with an exception set. */
int start_launch(void);

#endif
