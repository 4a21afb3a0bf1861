/* The gate of a feed-forward layer, silu(g) u with silu(g) = g / (1 + exp(-g)), and its gradients:
   each number read once and written once, where operation by operation would go through memory two
   and five times. */
#include "gate.h"
#include "rows.h"

#if LORAKIT_HAS_KERNELS

typedef struct {
  float *first, *second;
  const float *dout, *g, *u;
  long first_stride, second_stride, dout_stride, g_stride, u_stride, width;
} operands;

AVX512_INLINE __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = power_of_2(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
  return _mm512_div_ps(one, _mm512_add_ps(one, e));
}

AVX512 static void gate_row(const void *data, long row) {
  const operands *all = data;
  const float *g = all->g + row * all->g_stride, *u = all->u + row * all->u_stride;
  float *out = all->first + row * all->first_stride;
  for (long i = 0; i < all->width; i += 16) {
    const __mmask16 mask = first_of_16(all->width - i);
    const __m512 x = _mm512_maskz_loadu_ps(mask, g + i);
    const __m512 y = _mm512_mul_ps(_mm512_mul_ps(x, sigmoid(x)), _mm512_maskz_loadu_ps(mask, u + i));
    _mm512_mask_storeu_ps(out + i, mask, y);
  }
}

/* With s = sigmoid(g): silu'(g) = s (1 + g (1 - s)). */
AVX512 static void gate_row_backward(const void *data, long row) {
  const operands *all = data;
  const __m512 one = _mm512_set1_ps(1.0f);
  const float *g = all->g + row * all->g_stride, *u = all->u + row * all->u_stride;
  const float *dout = all->dout + row * all->dout_stride;
  float *dg = all->first + row * all->first_stride, *du = all->second + row * all->second_stride;
  for (long i = 0; i < all->width; i += 16) {
    const __mmask16 mask = first_of_16(all->width - i);
    const __m512 x = _mm512_maskz_loadu_ps(mask, g + i), s = sigmoid(x);
    const __m512 d = _mm512_maskz_loadu_ps(mask, dout + i);
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
    const __m512 of_g = _mm512_mul_ps(_mm512_mul_ps(d, _mm512_maskz_loadu_ps(mask, u + i)), slope);
    _mm512_mask_storeu_ps(du + i, mask, _mm512_mul_ps(d, _mm512_mul_ps(x, s)));
    _mm512_mask_storeu_ps(dg + i, mask, of_g);
  }
}

void gate(float *out, long out_stride, const float *g, long g_stride, const float *u, long u_stride,
          long rows, long width, unsigned threads, parallel_fn parallel) {
  const operands all = {.first = out, .first_stride = out_stride, .g = g, .g_stride = g_stride,
              .u = u, .u_stride = u_stride, .width = width};
  for_each_row(gate_row, &all, rows, threads, parallel);
}

void gate_backward(float *dg, long dg_stride, float *du, long du_stride, const float *dout,
                   long dout_stride, const float *g, long g_stride, const float *u, long u_stride,
                   long rows, long width, unsigned threads, parallel_fn parallel) {
  const operands all = {.first = dg, .first_stride = dg_stride, .second = du, .second_stride = du_stride,
              .dout = dout, .dout_stride = dout_stride, .g = g, .g_stride = g_stride,
              .u = u, .u_stride = u_stride, .width = width};
  for_each_row(gate_row_backward, &all, rows, threads, parallel);
}

#endif
