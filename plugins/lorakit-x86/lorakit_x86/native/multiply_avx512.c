/* x W and x W^T in fp32, by AVX-512.

   Both are copied to where the product reads them one number after the other: W in panels of 32
   columns, widened or transposed on the way, x in tiles of 12 rows. */
#include "multiply.h"

#if LORAKIT_HAS_KERNELS

/* Results are made 12 rows by 32 columns at a time, in 24 of the 32 registers. */
enum { TILE = 12, PANEL = 32 };

/* What is handled at a time, to stay in a core's second cache (1 MB and more): so many rows of x, as
   far along as spares most rereading of results, and as much of W. */
enum { ROWS = 30 * TILE, INNER = 576, WEIGHT_BYTES = 1 << 18 };

/* Of a second pair of factors so much goes along with the end of the first. */
enum { MORE = 64 };

/* A panel of W: 32 columns. */
AVX512 static void copy_straight(matrix w, long column, long columns, long at, long inner,
                                 float *to) {
  for (long k = 0; k < inner; k++, to += PANEL) {
    _mm512_store_ps(to, load_weight(w, at + k, column, columns));
    _mm512_store_ps(to + 16, load_weight(w, at + k, column + 16, columns - 16));
  }
}

/* A panel of W^T: 32 rows of W. */
AVX512 static void copy_transposed(matrix w, long row, long rows, long at, long inner, float *to) {
  for (long half = 0; half < 2; half++)
    for (long k = 0; k < inner; k += 16) {
      const long there = smaller(inner - k, 16);
      __m512i part[16];
#pragma GCC unroll 16
      for (long i = 0; i < 16; i++) {
        const long from = row + 16 * half + i;
        part[i] = 16 * half + i < rows
                      ? _mm512_castps_si512(load_weight(w, from, at + k, there))
                      : _mm512_setzero_si512();
      }
      transpose(part);
      for (long i = 0; i < there; i++)
        _mm512_store_si512(to + (k + i) * PANEL + 16 * half, part[i]);
    }
}

/* Rows of x, 12 at a time, the 12 next to each other for each column; rows there are not, are zeros.
   The next 12 are `length` columns further on. */
AVX512 static void copy_rows(const float *x, long stride, const float *scale, long rows, long inner,
                             long length, float *to) {
  for (long row = 0; row < rows; row += TILE, to += TILE * length)
    for (long k = 0; k < inner; k += 16) {
      const __m512 factor = scale ? load_numbers(scale + k, inner - k) : _mm512_set1_ps(1);
      __m512i part[16];
#pragma GCC unroll 16
      for (long i = 0; i < 16; i++) {
        part[i] = _mm512_setzero_si512();
        if (i >= smaller(rows - row, TILE)) continue;
        const __m512 numbers = load_numbers(x + (row + i) * stride + k, inner - k);
        part[i] = _mm512_castps_si512(_mm512_mul_ps(numbers, factor));
      }
      transpose(part);
      for (long i = 0; i < smaller(inner - k, 16); i++)
        _mm512_mask_storeu_epi32(to + (k + i) * TILE, first_of_16(TILE), part[i]);
    }
}

/* Results of the first `tile` of 12 rows with a panel, of which there are `rows`, or with the first 16
   columns of it, `halves` being 1. */
AVX512_INLINE void multiply_tile(const float *x, const float *w, long inner, float *out,
                                 long out_stride, long rows, long columns, int add, int tile,
                                 int halves) {
  __m512 sums[TILE][2];
#pragma GCC unroll 12
  for (int i = 0; i < tile; i++)
    for (int half = 0; half < halves; half++) {
      sums[i][half] = _mm512_setzero_ps();
      /* Where results go: fetched while they are made. */
      __builtin_prefetch(out + i * out_stride + 16 * half, 1);
    }
#pragma GCC unroll 2
  for (long k = 0; k < inner; k++, x += TILE, w += PANEL) {
    __m512 right[2];
    for (int half = 0; half < halves; half++) right[half] = _mm512_load_ps(w + 16 * half);
#pragma GCC unroll 12
    for (int i = 0; i < tile; i++) {
      const __m512 left = _mm512_set1_ps(x[i]);
      for (int half = 0; half < halves; half++)
        sums[i][half] = _mm512_fmadd_ps(left, right[half], sums[i][half]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < tile; i++, out += out_stride) {
    if (i >= rows) return;
    for (int half = 0; half < halves; half++) {
      const __mmask16 there = first_of_16(columns - 16 * half);
      if (add)
        sums[i][half] = _mm512_add_ps(sums[i][half], _mm512_maskz_loadu_ps(there, out + 16 * half));
      _mm512_mask_storeu_ps(out + 16 * half, there, sums[i][half]);
    }
  }
}

/* All rows of x, times a panel. */
AVX512_INLINE void multiply_panel(const float *x, const float *w, long inner, float *out,
                                  long out_stride, long rows, long columns, int add, int halves) {
  for (; rows > 0; rows -= TILE, x += TILE * inner, out += TILE * out_stride) {
    /* Constants, so that each is compiled for itself. */
    if (rows > 8)
      multiply_tile(x, w, inner, out, out_stride, rows, columns, add, 12, halves);
    else if (rows > 4)
      multiply_tile(x, w, inner, out, out_stride, rows, columns, add, 8, halves);
    else
      multiply_tile(x, w, inner, out, out_stride, rows, columns, add, 4, halves);
  }
}

AVX512 static void multiply_whole_panel(const float *x, const float *w, long inner, float *out,
                                        long out_stride, long rows, long columns, int add) {
  multiply_panel(x, w, inner, out, out_stride, rows, columns, add, 2);
}

AVX512 static void multiply_half_panel(const float *x, const float *w, long inner, float *out,
                                       long out_stride, long rows, long columns, int add) {
  multiply_panel(x, w, inner, out, out_stride, rows, columns, add, 1);
}

/* Part of the sum that a product is. */
typedef struct {
  const factors *from;
  long at, inner;
} part;

AVX512 static void copy_rows_of(part a, long row, long rows, long length, float *to) {
  const factors *f = a.from;
  copy_rows(f->x + row * f->x_stride + a.at, f->x_stride, f->scale ? f->scale + a.at : NULL, rows,
            a.inner, length, to);
}

AVX512 static void copy_weights_of(part a, int transposed, long column, long columns, float *to) {
  (transposed ? copy_transposed : copy_straight)(a.from->weight, column, columns, a.at, a.inner, to);
}

/* Adds up one part, or two. */
AVX512 static void multiply_parts(const product *p, part a, part b, long row, long rows, int add,
                                  float *x, float *w) {
  const long inner = a.inner + b.inner, width = WEIGHT_BYTES / 4 / inner / PANEL * PANEL;
  copy_rows_of(a, row, rows, inner, x);
  if (b.inner) copy_rows_of(b, row, rows, inner, x + a.inner * TILE);
  for (long column = 0; column < p->columns; column += width) {
    const long columns = smaller(p->columns - column, width);
    float *out = p->out + row * p->out_stride + column;
    for (long j = 0; j < columns; j += PANEL) {
      float *panel = w + j * inner;
      copy_weights_of(a, p->transposed, column + j, columns - j, panel);
      if (b.inner)
        copy_weights_of(b, p->transposed, column + j, columns - j, panel + a.inner * PANEL);
    }
    for (long j = 0; j < columns; j += PANEL)
      (columns - j > 16 ? multiply_whole_panel : multiply_half_panel)(
          x, w + j * inner, inner, out + j, p->out_stride, rows, columns - j, add);
  }
}

int multiply_on_avx512(const product *p) {
  float *w = kept(WEIGHT_BYTES + ROWS * (INNER + MORE) * (long)sizeof(float));
  if (!w) return 1;
  float *x = w + WEIGHT_BYTES / sizeof(float);
  const part nothing = {&p->more, 0, 0};
  const int along = p->more.inner <= MORE;
  for (long row = 0; row < p->rows; row += ROWS) {
    const long rows = smaller(p->rows - row, ROWS);
    int add = p->add;
    for (long at = 0; at < p->first.inner; at += INNER, add = 1) {
      const part a = {&p->first, at, smaller(p->first.inner - at, INNER)};
      const part rest = {&p->more, 0, p->more.inner};
      const int last = at + INNER >= p->first.inner;
      multiply_parts(p, a, last && along ? rest : nothing, row, rows, add, x, w);
    }
    for (long at = 0; at < p->more.inner && !along; at += INNER) {
      const part a = {&p->more, at, smaller(p->more.inner - at, INNER)};
      multiply_parts(p, a, nothing, row, rows, 1, x, w);
    }
  }
  return 0;
}

#endif
