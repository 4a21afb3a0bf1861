/* From Python: addresses and sizes, no tensors known; what they are is in _kernels.pyi. */
#ifndef LORAKIT_ARGUMENTS_H
#define LORAKIT_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "sublayers.h"

#if LORAKIT_HAS_KERNELS

typedef unsigned long long address;

static inline float *numbers_at(address of) { return (float *)(uintptr_t)of; }

/* What computes; the same numbers as in _kernels.pyi. */
enum units { ON_AVX512, ON_AMX };

typedef struct {
  const struct attention *attention;
  const multiply_units *multiply;
} kernels_of_units;

extern const kernels_of_units kernels[];

/* From tuples.  Return 0, and an exception is set, where they are not as they should be. */
int parse_layer(PyObject *given, adapted *layer);
int parse_attended(PyObject *given, attended *all);

PyObject *py_feed_forward(PyObject *self, PyObject *args);
PyObject *py_feed_forward_backward(PyObject *self, PyObject *args);
PyObject *py_self_attention(PyObject *self, PyObject *args);
PyObject *py_self_attention_backward(PyObject *self, PyObject *args);

#endif
#endif
