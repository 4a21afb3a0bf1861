/* The kernels as a Python module: addresses and sizes in, no tensors known.  The interpreter is let
   go of while they run. */
#include "arguments.h"
#include "gate.h"
#include "norm.h"
#include "rotate.h"

#if LORAKIT_HAS_KERNELS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

/* Why units cannot be used here, or NULL.  Of AMX, asks the kernel for the tiles' registers. */
static const char *reason_against(int units) {
  unsigned a, b, c, d;
  /* What the operating system does not save, __builtin_cpu_supports says is not there. */
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl"))
    return "this processor has no AVX-512";
#ifdef LORAKIT_EMULATED_TILES
  return NULL;
#endif
  if (units != ON_AMX) return NULL;
  const unsigned amx = 1u << 22 | 1u << 24; /* CPUID leaf 7: AMX-BF16, AMX-TILE */
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx) != amx)
    return "this processor has no AMX units for bf16";
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA))
    return "the operating system does not let programs use AMX (Linux 5.16 and later do)";
  return NULL;
}
#endif

static PyObject *unusable(PyObject *self, PyObject *args) {
  (void)self;
  int units;
  if (!PyArg_ParseTuple(args, "i", &units)) return NULL;
#if LORAKIT_HAS_KERNELS
  const char *reason = reason_against(units);
#else
  const char *reason = "not built: it takes Linux on x86-64, and GCC 11 or Clang 12 or newer";
#endif
  if (reason) return PyUnicode_FromString(reason);
  Py_RETURN_NONE;
}

#if LORAKIT_HAS_KERNELS
static PyObject *py_multiply(PyObject *self, PyObject *args) {
  (void)self;
  address out, x, scale, weight, parallel;
  long out_stride, x_stride, weight_stride, rows, columns, inner;
  int units, bf16, transposed, add, failed;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "iKlKlKKlpplllpIK", &units, &out, &out_stride, &x, &x_stride, &scale,
                        &weight, &weight_stride, &bf16, &transposed, &rows, &columns, &inner, &add, &threads,
                        &parallel))
    return NULL;
  const product p = {
      .out = numbers_at(out), .out_stride = out_stride,
      .first = {numbers_at(x), x_stride, numbers_at(scale), {numbers_at(weight), weight_stride, bf16}, inner},
      .transposed = transposed, .rows = rows, .columns = columns, .add = add,
  };
  Py_BEGIN_ALLOW_THREADS;
  failed = multiply(&p, kernels[units].multiply, threads, (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  if (failed) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

static PyObject *py_adapt(PyObject *self, PyObject *args) {
  (void)self;
  address x, out, low, parallel;
  long x_stride, out_stride;
  PyObject *given;
  adapted layer;
  int units, failed;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "iKlKlKO!IK", &units, &x, &x_stride, &out, &out_stride, &low,
                        &PyTuple_Type, &given, &threads, &parallel) ||
      !parse_layer(given, &layer))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  failed = adapt(&layer, numbers_at(x), x_stride, numbers_at(out), out_stride, 0, numbers_at(low),
                 kernels[units].multiply, threads, (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  if (failed) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

static PyObject *py_adapt_backward(PyObject *self, PyObject *args) {
  (void)self;
  address dout, x, low, d_low, dx, d_down, d_up, parallel;
  long dout_stride, x_stride, dx_stride;
  PyObject *given;
  adapted layer;
  int units, add, failed;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "iKlKlKKKlpKKO!IK", &units, &dout, &dout_stride, &x, &x_stride, &low,
                        &d_low, &dx, &dx_stride, &add, &d_down, &d_up, &PyTuple_Type, &given,
                        &threads, &parallel) ||
      !parse_layer(given, &layer))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  failed = adapt_backward(&layer, numbers_at(dout), dout_stride, numbers_at(x), x_stride,
                          numbers_at(low), numbers_at(d_low), numbers_at(dx), dx_stride, add,
                          numbers_at(d_down), numbers_at(d_up), kernels[units].multiply, threads,
                          (parallel_fn)(uintptr_t)parallel);
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

static PyObject *py_normalize(PyObject *self, PyObject *args) {
  (void)self;
  address out, roots, x, weight, parallel;
  long x_stride, rows, width;
  float eps;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "KKKlKfllIK", &out, &roots, &x, &x_stride, &weight, &eps, &rows,
                        &width, &threads, &parallel))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  normalize(numbers_at(out), numbers_at(roots), numbers_at(x), x_stride, numbers_at(weight), eps,
            rows, width, threads, (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

static PyObject *py_normalize_backward(PyObject *self, PyObject *args) {
  (void)self;
  address dx, dout, x, weight, roots, parallel;
  long dout_stride, x_stride, rows, width;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "KKlKlKKllIK", &dx, &dout, &dout_stride, &x, &x_stride, &weight,
                        &roots, &rows, &width, &threads, &parallel))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  normalize_backward(numbers_at(dx), numbers_at(dout), dout_stride, NULL, 0, numbers_at(x), x_stride,
                     numbers_at(weight), numbers_at(roots), rows, width, threads,
                     (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

static PyObject *py_rotate(PyObject *self, PyObject *args) {
  (void)self;
  address out, x, cos, sin, parallel;
  long x_stride, angle_stride, tokens, heads, head_dim, half;
  int back;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "KKlKKlpllllIK", &out, &x, &x_stride, &cos, &sin, &angle_stride, &back,
                        &tokens, &heads, &head_dim, &half, &threads, &parallel))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  rotate(numbers_at(out), heads * head_dim, numbers_at(x), x_stride, numbers_at(cos), numbers_at(sin),
         angle_stride, back, tokens, heads, head_dim, half, threads, (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

static PyObject *py_attention_bytes(PyObject *self, PyObject *args) {
  (void)self;
  long tokens, heads, kv_heads, head_dim;
  int units;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "illllI", &units, &tokens, &heads, &kv_heads, &head_dim, &threads))
    return NULL;
  return PyLong_FromLong(
      kernels[units].attention->bytes(tokens, heads, kv_heads, head_dim, threads));
}

static PyObject *py_attend(PyObject *self, PyObject *args) {
  (void)self;
  address parallel;
  PyObject *given;
  attended all;
  int units;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "iO!IK", &units, &PyTuple_Type, &given, &threads, &parallel) ||
      !parse_attended(given, &all))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  kernels[units].attention->attend(&all, threads, (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

static PyObject *py_attend_backward(PyObject *self, PyObject *args) {
  (void)self;
  address dout, dq, dk, dv, parallel;
  PyObject *given;
  attended all;
  attention_gradients gradients;
  int units;
  unsigned threads;
  if (!PyArg_ParseTuple(args, "iKlKKKO!IK", &units, &dout, &gradients.dout_stride, &dq, &dk, &dv,
                        &PyTuple_Type, &given, &threads, &parallel) ||
      !parse_attended(given, &all))
    return NULL;
  gradients.dout = numbers_at(dout);
  gradients.dq = numbers_at(dq);
  gradients.dk = numbers_at(dk);
  gradients.dv = numbers_at(dv);
  gradients.dq_stride = all.heads * all.head_dim;
  gradients.dk_stride = gradients.dv_stride = all.kv_heads * all.head_dim;
  Py_BEGIN_ALLOW_THREADS;
  kernels[units].attention->attend_backward(&all, &gradients, threads,
                                            (parallel_fn)(uintptr_t)parallel);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}
#endif

/* Their arguments are in _kernels.pyi. */
static PyMethodDef methods[] = {
    {"unusable", unusable, METH_VARARGS, "Why units cannot be used on this machine, or None."},
#if LORAKIT_HAS_KERNELS
    {"multiply", py_multiply, METH_VARARGS, "out = x W, or x W^T; see multiply.h."},
    {"adapt", py_adapt, METH_VARARGS, "A layer with a low-rank update; see adapted.h."},
    {"adapt_backward", py_adapt_backward, METH_VARARGS, "Its gradients; see adapted.h."},
    {"gate", py_gate, METH_VARARGS, "out = silu(g) u; see gate.h."},
    {"gate_backward", py_gate_backward, METH_VARARGS, "Its gradients; see gate.h."},
    {"normalize", py_normalize, METH_VARARGS, "RMSNorm; see norm.h."},
    {"normalize_backward", py_normalize_backward, METH_VARARGS, "Its gradient; see norm.h."},
    {"rotate", py_rotate, METH_VARARGS, "Rotary embedding; see rotate.h."},
    {"attention_bytes", py_attention_bytes, METH_VARARGS, "Of workspace; see attention.h."},
    {"attend", py_attend, METH_VARARGS, "Causal attention; see attention.h."},
    {"feed_forward", py_feed_forward, METH_VARARGS, "Half a block; see sublayers.h."},
    {"feed_forward_backward", py_feed_forward_backward, METH_VARARGS, "Its gradients."},
    {"self_attention", py_self_attention, METH_VARARGS, "Half a block; see sublayers.h."},
    {"self_attention_backward", py_self_attention_backward, METH_VARARGS, "Its gradients."},
    {"attend_backward", py_attend_backward, METH_VARARGS, "Its gradients; see attention.h."},
#endif
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "lorakit_x86._kernels", NULL, -1,
                                        methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&definition); }
