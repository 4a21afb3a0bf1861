/* RMSNorm, a row at a time, which stays in the first cache between being summed up and being scaled. */
#include "norm.h"

#if LORAKIT_HAS_KERNELS

#include <math.h>

#include "rows.h"

typedef struct {
  float *out, *new_roots;
  const float *dout, *plus, *x, *weight, *roots;
  long dout_stride, plus_stride, x_stride, width;
  float eps;
} operands;

AVX512 static void normalize_row(const void *data, long row) {
  const operands *all = data;
  const float *x = all->x + row * all->x_stride;
  float *out = all->out + row * all->width;
  __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (long i = 0; i < all->width; i += 16) {
    const __m512 part = load_numbers(x + i, all->width - i);
    squares[i / 16 % 2] = _mm512_fmadd_ps(part, part, squares[i / 16 % 2]);
  }
  const float sum = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1]));
  const float root = 1 / sqrtf(sum / (float)all->width + all->eps);
  all->new_roots[row] = root;
  for (long i = 0; i < all->width; i += 16) {
    const __m512 part = load_numbers(x + i, all->width - i);
    const __m512 weight = load_numbers(all->weight + i, all->width - i);
    _mm512_mask_storeu_ps(out + i, first_of_16(all->width - i),
                          _mm512_mul_ps(_mm512_mul_ps(part, _mm512_set1_ps(root)), weight));
  }
}

/* With g = dout w: dx = r g - x r^3 <g, x> / width.  Each number of dout is read before that of dx is
   written. */
AVX512 static void normalize_row_backward(const void *data, long row) {
  const operands *all = data;
  const float *x = all->x + row * all->x_stride, *dout = all->dout + row * all->dout_stride;
  const float *plus = all->plus ? all->plus + row * all->plus_stride : NULL;
  float *dx = all->out + row * all->width;
  __m512 along[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (long i = 0; i < all->width; i += 16) {
    const long left = all->width - i;
    const __m512 g = _mm512_mul_ps(load_numbers(dout + i, left), load_numbers(all->weight + i, left));
    along[i / 16 % 2] = _mm512_fmadd_ps(g, load_numbers(x + i, left), along[i / 16 % 2]);
  }
  const float root = all->roots[row];
  const float sum = _mm512_reduce_add_ps(_mm512_add_ps(along[0], along[1]));
  const __m512 of_x = _mm512_set1_ps(-sum * root * root * root / (float)all->width);
  for (long i = 0; i < all->width; i += 16) {
    const long left = all->width - i;
    const __m512 g = _mm512_mul_ps(load_numbers(dout + i, left), load_numbers(all->weight + i, left));
    __m512 scaled = _mm512_mul_ps(g, _mm512_set1_ps(root));
    if (plus) scaled = _mm512_add_ps(scaled, load_numbers(plus + i, left));
    _mm512_mask_storeu_ps(dx + i, first_of_16(left),
                          _mm512_fmadd_ps(load_numbers(x + i, left), of_x, scaled));
  }
}

void normalize(float *out, float *roots, const float *x, long x_stride, const float *weight,
               float eps, long rows, long width, unsigned threads, parallel_fn parallel) {
  const operands all = {.out = out, .new_roots = roots, .x = x, .x_stride = x_stride,
                        .weight = weight, .width = width, .eps = eps};
  for_each_row(normalize_row, &all, rows, threads, parallel);
}

void normalize_backward(float *dx, const float *dout, long dout_stride, const float *plus,
                        long plus_stride, const float *x, long x_stride, const float *weight, const float *roots, long rows,
                        long width, unsigned threads, parallel_fn parallel) {
  const operands all = {.out = dx, .dout = dout, .dout_stride = dout_stride, .plus = plus,
                        .plus_stride = plus_stride, .x = x,
                        .x_stride = x_stride, .weight = weight, .roots = roots, .width = width};
  for_each_row(normalize_row_backward, &all, rows, threads, parallel);
}

#endif
