/* A block's halves as functions of the Python module. */
#include "arguments.h"

#if LORAKIT_HAS_KERNELS

/* What all of them are told. */
typedef struct {
  sublayer half;
  rotation angles;
  attended attending;
  carried kept;
  working work;
  machine on;
} whole;

static int parse_half(PyObject *given, sublayer *half) {
  address norm;
  PyObject *inner, *outer;
  if (!PyArg_ParseTuple(given, "KfllO!O!", &norm, &half->eps, &half->rows, &half->width,
                        &PyTuple_Type, &inner, &PyTuple_Type, &outer) ||
      !parse_layer(outer, &half->outer))
    return 0;
  half->norm = numbers_at(norm);
  half->inner_count = (long)PyTuple_Size(inner);
  if (half->inner_count > MOST_INNER) {
    PyErr_SetString(PyExc_ValueError, "too many layers");
    return 0;
  }
  for (long i = 0; i < half->inner_count; i++)
    if (!parse_layer(PyTuple_GetItem(inner, i), &half->inner[i])) return 0;
  return 1;
}

static int parse_angles(PyObject *given, rotation *angles) {
  address cos, sin;
  if (!PyArg_ParseTuple(given, "KKll", &cos, &sin, &angles->stride, &angles->half)) return 0;
  angles->cos = numbers_at(cos);
  angles->sin = numbers_at(sin);
  return 1;
}

static int parse_whole(PyObject *given, whole *all) {
  address made, outer_made, small, parallel, input, outer, dmade, rotated, d_low;
  PyObject *half, *heads, *work;
  int units;
  if (!PyArg_ParseTuple(given, "iO!O!KpKKO!IK", &units, &PyTuple_Type, &half, &PyTuple_Type, &heads,
                        &made, &all->kept.again, &outer_made, &small, &PyTuple_Type, &work,
                        &all->on.threads, &parallel) ||
      !PyArg_ParseTuple(work, "KKKKK", &input, &outer, &dmade, &rotated, &d_low) ||
      !parse_half(half, &all->half))
    return 0;
  if (PyTuple_Size(heads)) {
    PyObject *angles, *attending;
    if (!PyArg_ParseTuple(heads, "O!O!", &PyTuple_Type, &angles, &PyTuple_Type, &attending) ||
        !parse_angles(angles, &all->angles) || !parse_attended(attending, &all->attending))
      return 0;
  }
  all->kept.made = numbers_at(made);
  all->kept.outer_made = numbers_at(outer_made);
  all->kept.small = numbers_at(small);
  all->work = (working){numbers_at(input), numbers_at(outer), numbers_at(dmade),
                        numbers_at(rotated), numbers_at(d_low)};
  all->on.multiply = kernels[units].multiply;
  all->on.attention = kernels[units].attention;
  all->on.parallel = (parallel_fn)(uintptr_t)parallel;
  return 1;
}

static int parse_gradients(PyObject *given, long count, factor_gradients *gradients) {
  if (PyTuple_Size(given) != count) {
    PyErr_SetString(PyExc_ValueError, "gradients of other layers");
    return 0;
  }
  for (long i = 0; i < count; i++) {
    address down, up, sums;
    if (!PyArg_ParseTuple(PyTuple_GetItem(given, i), "KKK", &down, &up, &sums)) return 0;
    gradients->down[i] = numbers_at(down);
    gradients->up[i] = numbers_at(up);
    gradients->sums[i] = numbers_at(sums);
  }
  return 1;
}

typedef int (*forward_fn)(const whole *all, const float *x, float *out);

static PyObject *forward(PyObject *args, forward_fn half) {
  whole all = {0};
  PyObject *given;
  address x, out;
  int failed;
  if (!PyArg_ParseTuple(args, "O!KK", &PyTuple_Type, &given, &x, &out) || !parse_whole(given, &all))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  failed = half(&all, numbers_at(x), numbers_at(out));
  Py_END_ALLOW_THREADS;
  if (failed) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

typedef int (*backward_fn)(const whole *all, const float *dout, const float *x, float *dx,
                           const factor_gradients *gradients);

static PyObject *backward(PyObject *args, backward_fn half) {
  whole all = {0};
  factor_gradients gradients;
  PyObject *given, *of_factors;
  address dout, x, dx;
  int failed;
  if (!PyArg_ParseTuple(args, "O!KKKO!", &PyTuple_Type, &given, &dout, &x, &dx, &PyTuple_Type,
                        &of_factors) ||
      !parse_whole(given, &all) ||
      !parse_gradients(of_factors, all.half.inner_count + 1, &gradients))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  failed = half(&all, numbers_at(dout), numbers_at(x), numbers_at(dx), &gradients);
  Py_END_ALLOW_THREADS;
  if (failed) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

static int fed(const whole *all, const float *x, float *out) {
  return feed_forward(&all->half, x, &all->kept, out, &all->work, &all->on);
}

static int fed_backward(const whole *all, const float *dout, const float *x, float *dx,
                        const factor_gradients *gradients) {
  return feed_forward_backward(&all->half, dout, x, &all->kept, dx, gradients, &all->work, &all->on);
}

static int attending(const whole *all, const float *x, float *out) {
  return self_attention(&all->half, &all->angles, &all->attending, x, &all->kept, out, &all->work,
                        &all->on);
}

static int attending_backward(const whole *all, const float *dout, const float *x, float *dx,
                              const factor_gradients *gradients) {
  return self_attention_backward(&all->half, &all->angles, &all->attending, dout, x, &all->kept, dx,
                                 gradients, &all->work, &all->on);
}

PyObject *py_feed_forward(PyObject *self, PyObject *args) {
  (void)self;
  return forward(args, fed);
}

PyObject *py_feed_forward_backward(PyObject *self, PyObject *args) {
  (void)self;
  return backward(args, fed_backward);
}

PyObject *py_self_attention(PyObject *self, PyObject *args) {
  (void)self;
  return forward(args, attending);
}

PyObject *py_self_attention_backward(PyObject *self, PyObject *args) {
  (void)self;
  return backward(args, attending_backward);
}

#endif
