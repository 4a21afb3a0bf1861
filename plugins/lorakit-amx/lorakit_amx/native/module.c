/* The kernels as a Python module: addresses and sizes in, no tensors known.  The interpreter is let
   go of while they run. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "attention.h"
#include "gate.h"
#include "multiply.h"

#if LORAKIT_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

/* CPUID leaf 7: AVX512F, AVX512BW, AVX512VL; AMX-BF16, AMX-TILE. */
static int has_units(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const unsigned avx512 = 1u << 16 | 1u << 30 | 1u << 31, amx = 1u << 22 | 1u << 24;
  return (b & avx512) == avx512 && (d & amx) == amx;
}
#endif

/* Why the kernels cannot be used here, or None.  Asks the kernel for the tiles' registers. */
static PyObject *unusable(PyObject *self, PyObject *none) {
  (void)self;
  (void)none;
#if LORAKIT_HAS_AMX
  if (!has_units()) return PyUnicode_FromString("this processor has no AMX units for bf16");
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA))
    return PyUnicode_FromString("the operating system does not let programs use AMX (Linux 5.16 "
                                "and later do)");
  Py_RETURN_NONE;
#else
  return PyUnicode_FromString("not built: it takes Linux on x86-64, and GCC 11 or "
                              "Clang 12 or newer");
#endif
}

#if LORAKIT_HAS_AMX
typedef unsigned long long address;

static float *numbers_at(address of) { return (float *)(uintptr_t)of; }

static PyObject *py_multiply(PyObject *self, PyObject *args) {
  (void)self;
  address out, x, weight, parallel;
  long out_stride, x_stride, weight_stride, rows, columns, inner;
  int bf16, transposed, add, failed;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "KlKlKlpplllpIK", &out, &out_stride, &x, &x_stride, &weight,
                        &weight_stride, &bf16, &transposed, &rows, &columns, &inner, &add, &threads,
                        &parallel))
    return NULL;
  const matrix w = {numbers_at(weight), weight_stride, bf16};
  Py_BEGIN_ALLOW_THREADS;
  failed = multiply(numbers_at(out), out_stride, numbers_at(x), x_stride, w, transposed, rows,
                    columns, inner, add, threads, (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  if (failed) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

static PyObject *py_gate(PyObject *self, PyObject *args) {
  (void)self;
  address out, g, u, parallel;
  long out_stride, g_stride, u_stride, rows, width;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "KlKlKlllIK", &out, &out_stride, &g, &g_stride, &u, &u_stride, &rows,
                        &width, &threads, &parallel))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  gate(numbers_at(out), out_stride, numbers_at(g), g_stride, numbers_at(u), u_stride, rows, width,
       threads, (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

static PyObject *py_gate_backward(PyObject *self, PyObject *args) {
  (void)self;
  address dg, du, dout, g, u, parallel;
  long dg_stride, du_stride, dout_stride, g_stride, u_stride, rows, width;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "KlKlKlKlKlllIK", &dg, &dg_stride, &du, &du_stride, &dout,
                        &dout_stride, &g, &g_stride, &u, &u_stride, &rows, &width, &threads,
                        &parallel))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  gate_backward(numbers_at(dg), dg_stride, numbers_at(du), du_stride, numbers_at(dout), dout_stride,
                numbers_at(g), g_stride, numbers_at(u), u_stride, rows, width, threads,
                (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

static PyObject *py_attention_bytes(PyObject *self, PyObject *args) {
  (void)self;
  long tokens, heads, kv_heads, head_dim;
  int threads;
  if (!PyArg_ParseTuple(args, "lllli", &tokens, &heads, &kv_heads, &head_dim, &threads))
    return NULL;
  return PyLong_FromLong(attention_bytes(tokens, heads, kv_heads, head_dim, threads));
}

static PyObject *py_attend(PyObject *self, PyObject *args) {
  (void)self;
  address q, k, v, out, normalizer, workspace, parallel;
  long tokens, heads, kv_heads, head_dim, q_stride, k_stride, v_stride;
  float scale;
  int threads;
  if (!PyArg_ParseTuple(args, "KKKKKKlllllllfiK", &q, &k, &v, &out, &normalizer, &workspace,
                        &tokens, &heads, &kv_heads, &head_dim, &q_stride, &k_stride, &v_stride,
                        &scale, &threads, &parallel))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  attend(numbers_at(q), numbers_at(k), numbers_at(v), numbers_at(out), numbers_at(normalizer),
         (char *)numbers_at(workspace), tokens, heads, kv_heads, head_dim, q_stride, k_stride,
         v_stride, scale, threads, (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

static PyObject *py_attend_backward(PyObject *self, PyObject *args) {
  (void)self;
  address dout, q, k, v, out, normalizer, dq, dk, dv, workspace, parallel;
  long tokens, heads, kv_heads, head_dim, dout_stride, q_stride, k_stride, v_stride;
  float scale;
  int threads;
  if (!PyArg_ParseTuple(args, "KKKKKKKKKKllllllllfiK", &dout, &q, &k, &v, &out, &normalizer, &dq,
                        &dk, &dv, &workspace, &tokens, &heads, &kv_heads, &head_dim, &dout_stride,
                        &q_stride, &k_stride, &v_stride, &scale, &threads, &parallel))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  attend_backward(numbers_at(dout), numbers_at(q), numbers_at(k), numbers_at(v), numbers_at(out),
                  numbers_at(normalizer), numbers_at(dq), numbers_at(dk), numbers_at(dv),
                  (char *)numbers_at(workspace), tokens, heads, kv_heads, head_dim, dout_stride,
                  q_stride, k_stride, v_stride, scale, threads, (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}
#endif

/* Their arguments are in _kernels.pyi. */
static PyMethodDef methods[] = {
    {"unusable", unusable, METH_NOARGS, "Why the kernels cannot be used on this machine, or None."},
#if LORAKIT_HAS_AMX
    {"multiply", py_multiply, METH_VARARGS, "out = x W, or x W^T; see multiply.h."},
    {"gate", py_gate, METH_VARARGS, "out = silu(g) u; see gate.h."},
    {"gate_backward", py_gate_backward, METH_VARARGS, "Its gradients; see gate.h."},
    {"attention_bytes", py_attention_bytes, METH_VARARGS, "Of workspace; see attention.h."},
    {"attend", py_attend, METH_VARARGS, "Causal attention; see attention.h."},
    {"attend_backward", py_attend_backward, METH_VARARGS, "Its gradients; see attention.h."},
#endif
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "lorakit_amx._kernels", NULL, -1,
                                        methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&definition); }
