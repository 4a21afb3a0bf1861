/* Rotary embedding, a token at a time. */
#include "rotate.h"

#if LORAKIT_HAS_KERNELS

#include "rows.h"

typedef struct {
  float *out;
  const float *x, *cos, *sin;
  long out_stride, x_stride, angle_stride, heads, head_dim, half;
  int back;
} operands;

AVX512 static void rotate_token(const void *data, long token) {
  const operands *all = data;
  const float *cos = all->cos + token * all->angle_stride, *sin = all->sin + token * all->angle_stride;
  const float *x = all->x + token * all->x_stride;
  float *out = all->out + token * all->out_stride;
  const long half = all->half, rest = all->head_dim - 2 * half;
  for (long head = 0; head < all->heads; head++, x += all->head_dim, out += all->head_dim) {
    for (long i = 0; i < half; i += 16) {
      const __mmask16 mask = first_of_16(half - i);
      const __m512 c = _mm512_maskz_loadu_ps(mask, cos + i);
      __m512 s = _mm512_maskz_loadu_ps(mask, sin + i);
      if (all->back) s = _mm512_sub_ps(_mm512_setzero_ps(), s);
      const __m512 first = _mm512_maskz_loadu_ps(mask, x + i);
      const __m512 second = _mm512_maskz_loadu_ps(mask, x + half + i);
      _mm512_mask_storeu_ps(out + i, mask, _mm512_fnmadd_ps(second, s, _mm512_mul_ps(first, c)));
      _mm512_mask_storeu_ps(out + half + i, mask,
                            _mm512_fmadd_ps(first, s, _mm512_mul_ps(second, c)));
    }
    if (rest && out != x) memcpy(out + 2 * half, x + 2 * half, (size_t)rest * sizeof(float));
  }
}

void rotate(float *out, long out_stride, const float *x, long x_stride, const float *cos, const float *sin,
            long angle_stride, int back, long tokens, long heads, long head_dim, long half,
            unsigned threads, parallel_fn parallel) {
  const operands all = {.out = out, .out_stride = out_stride, .x = x, .cos = cos, .sin = sin, .x_stride = x_stride,
                        .angle_stride = angle_stride, .heads = heads, .head_dim = head_dim,
                        .half = half, .back = back};
  for_each_row(rotate_token, &all, tokens, threads, parallel);
}

#endif
