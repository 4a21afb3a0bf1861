/* Layers with a low-rank update, forward and backward: the wide products by the units given, the thin
   ones, and what the update adds to wide ones, by AVX-512. */
#include "adapted.h"

#if LORAKIT_HAS_KERNELS

#include <stdatomic.h>

/* The thin products read what is wide where it is: copied first, as wide products have it, they would
   take twice as long.  Results are made for 8 of the ranks at a time, in 24 registers. */
enum { RANKS = 8 };

/* scale x W^T, [rows, rank], of W [rank, inner]: sums along the rows, of 3 rows at a time. */
typedef struct {
  const float *x, *w;
  long x_stride, rows, inner, rank;
  float scale, *out;
  atomic_long next;
} along_rows;

enum { ROWS = 3, ROWS_IN_SHARE = 16 * ROWS };

AVX512_INLINE void sum_along_rows(const along_rows *s, long row, long rank, int rows, int ranks) {
  const float *x = s->x + row * s->x_stride, *w = s->w + rank * s->inner;
  __m512 sums[ROWS][RANKS];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < ranks; j++) sums[i][j] = _mm512_setzero_ps();
  for (long k = 0; k < s->inner; k += 16) {
    const __mmask16 there = first_of_16(s->inner - k);
    __m512 left[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) left[i] = _mm512_maskz_loadu_ps(there, x + i * s->x_stride + k);
#pragma GCC unroll 8
    for (int j = 0; j < ranks; j++) {
      const __m512 right = _mm512_maskz_loadu_ps(there, w + j * s->inner + k);
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) sums[i][j] = _mm512_fmadd_ps(left[i], right, sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < ranks; j++)
      s->out[(row + i) * s->rank + rank + j] = s->scale * _mm512_reduce_add_ps(sums[i][j]);
}

AVX512 static void share_rows(void *data) {
  along_rows *s = data;
  for (long start; (start = ROWS_IN_SHARE * atomic_fetch_add(&s->next, 1)) < s->rows;) {
    const long stop = smaller(start + ROWS_IN_SHARE, s->rows);
    for (long row = start; row < stop; row += ROWS)
      for (long rank = 0; rank < s->rank; rank += RANKS)
        /* Constants, so that each is compiled for itself. */
        if (stop - row >= ROWS && s->rank - rank >= RANKS)
          sum_along_rows(s, row, rank, ROWS, RANKS);
        else
          for (long i = row; i < smaller(row + ROWS, stop); i++)
            for (long j = rank; j < smaller(rank + RANKS, s->rank); j++)
              sum_along_rows(s, i, j, 1, 1);
  }
}

/* low^T z, [rank, columns]: sums over the rows, of 48 columns at a time.  Number (i, j), times factor j
   if there are any, goes to out[i * down + j * across]. */
typedef struct {
  const float *low, *z, *factors;
  long z_stride, rows, rank, columns;
  float *out;
  long down, across;
  atomic_long next;
} over_rows;

/* So many rows' sums at a time, for rounding errors not to grow. */
enum { VECTORS = 3, WIDE = 16 * VECTORS, ROWS_AT_ONCE = 256 };

AVX512_INLINE void add_rows(const float *low, long low_stride, const float *z, long z_stride,
                            long rows, long columns, int ranks, float total[RANKS][WIDE]) {
  __mmask16 there[VECTORS];
  __m512 sums[RANKS][VECTORS];
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; v++) {
    there[v] = first_of_16(columns - 16 * v);
#pragma GCC unroll 8
    for (int i = 0; i < ranks; i++) sums[i][v] = _mm512_setzero_ps();
  }
  for (long row = 0; row < rows; row++, low += low_stride, z += z_stride) {
    __m512 numbers[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      numbers[v] = _mm512_maskz_loadu_ps(there[v], z + 16 * v);
      /* Rows are far apart: the processor does not foresee them. */
      __builtin_prefetch(z + 8 * z_stride + 16 * v);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ranks; i++) {
      const __m512 factor = _mm512_set1_ps(low[i]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) sums[i][v] = _mm512_fmadd_ps(factor, numbers[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ranks; i++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      float *to = total[i] + 16 * v;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sums[i][v]));
    }
}

AVX512 static void sum_over_rows(const over_rows *s, long column, long columns) {
  for (long rank = 0; rank < s->rank; rank += RANKS) {
    const long ranks = smaller(s->rank - rank, RANKS);
    float total[RANKS][WIDE] = {0};
    for (long row = 0; row < s->rows; row += ROWS_AT_ONCE) {
      const float *low = s->low + row * s->rank + rank, *z = s->z + row * s->z_stride + column;
      const long rows = smaller(s->rows - row, ROWS_AT_ONCE);
      if (ranks == RANKS)
        add_rows(low, s->rank, z, s->z_stride, rows, columns, RANKS, total);
      else
        for (long i = 0; i < ranks; i++)
          add_rows(low + i, s->rank, z, s->z_stride, rows, columns, 1, total + i);
    }
    for (long i = 0; i < ranks; i++)
      for (long j = 0; j < columns; j++)
        s->out[(rank + i) * s->down + (column + j) * s->across] =
            total[i][j] * (s->factors ? s->factors[column + j] : 1);
  }
}

AVX512 static void share_columns(void *data) {
  over_rows *s = data;
  for (long column; (column = WIDE * atomic_fetch_add(&s->next, 1)) < s->columns;)
    sum_over_rows(s, column, smaller(s->columns - column, WIDE));
}

static void shared(void (*function)(void *), void *data, unsigned threads, parallel_fn parallel) {
  if (threads > 1 && parallel)
    parallel(function, data, threads, 0);
  else
    function(data);
}

int adapt(const adapted *layer, const float *x, long x_stride, float *out, long out_stride, int add,
          float *low, const multiply_units *units, unsigned threads, parallel_fn parallel) {
  along_rows thin = {
      .x = x, .x_stride = x_stride, .w = layer->down, .rows = layer->rows, .inner = layer->inputs,
      .rank = layer->rank, .scale = layer->scale, .out = low,
  };
  shared(share_rows, &thin, threads, parallel);
  const product wide = {
      .out = out, .out_stride = out_stride, .transposed = 1,
      .first = {x, x_stride, NULL, layer->weight, layer->inputs},
      .more = {low, layer->rank, NULL, {layer->up, layer->rank, 0}, layer->rank},
      .ratio = layer->ratio, .rows = layer->rows, .columns = layer->outputs, .add = add,
  };
  return multiply(&wide, units, threads, parallel);
}

int adapt_backward(const adapted *layer, const float *dout, long dout_stride, const float *x,
                   long x_stride, const float *low, float *d_low, float *dx, long dx_stride, int add,
                   float *d_down, float *d_up, const multiply_units *units, unsigned threads,
                   parallel_fn parallel) {
  const long rank = layer->rank, inputs = layer->inputs, outputs = layer->outputs;
  const float *ratio = layer->ratio;
  float *up = kept(rank * outputs * (long)sizeof(float)); /* B^T, times the ratio */
  if (!up) return 1;
  for (long i = 0; i < outputs; i++)
    for (long j = 0; j < rank; j++)
      up[j * outputs + i] = layer->up[i * rank + j] * (ratio ? ratio[i] : 1);
  along_rows thin = {
      .x = dout, .x_stride = dout_stride, .w = up, .rows = layer->rows, .inner = outputs,
      .rank = rank, .scale = layer->scale, .out = d_low,
  };
  shared(share_rows, &thin, threads, parallel);
  over_rows of_up = {
      .low = low, .z = dout, .z_stride = dout_stride, .factors = ratio, .rows = layer->rows,
      .rank = rank, .columns = outputs, .out = d_up, .down = 1, .across = rank,
  };
  shared(share_columns, &of_up, threads, parallel);
  over_rows of_down = {
      .low = d_low, .z = x, .z_stride = x_stride, .rows = layer->rows, .rank = rank,
      .columns = inputs, .out = d_down, .down = inputs, .across = 1,
  };
  shared(share_columns, &of_down, threads, parallel);
  const product wide = {
      .out = dx, .out_stride = dx_stride,
      .first = {dout, dout_stride, ratio, layer->weight, outputs},
      .more = {d_low, rank, NULL, {layer->down, inputs, 0}, rank},
      .rows = layer->rows, .columns = inputs, .add = add,
  };
  return dx ? multiply(&wide, units, threads, parallel) : 0;
}

typedef struct {
  const float *a, *b;
  long a_stride, b_stride, rows, columns;
  float *sums;
  atomic_long next;
} products;

AVX512 static void sum_columns(const products *s, long column, long columns) {
  const float *a = s->a + column, *b = s->b + column;
  __m512 totals[VECTORS], sums[VECTORS];
  __mmask16 there[VECTORS];
  for (int v = 0; v < VECTORS; v++) {
    there[v] = first_of_16(columns - 16 * v);
    totals[v] = sums[v] = _mm512_setzero_ps();
  }
  for (long row = 1; row <= s->rows; row++, a += s->a_stride, b += s->b_stride) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      sums[v] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there[v], a + 16 * v),
                                _mm512_maskz_loadu_ps(there[v], b + 16 * v), sums[v]);
      __builtin_prefetch(a + 8 * s->a_stride + 16 * v);
      __builtin_prefetch(b + 8 * s->b_stride + 16 * v);
    }
    if (row % ROWS_AT_ONCE && row < s->rows) continue;
    for (int v = 0; v < VECTORS; v++) {
      totals[v] = _mm512_add_ps(totals[v], sums[v]);
      sums[v] = _mm512_setzero_ps();
    }
  }
  for (int v = 0; v < VECTORS; v++)
    _mm512_mask_storeu_ps(s->sums + column + 16 * v, there[v], totals[v]);
}

static void share_products(void *data) {
  products *s = data;
  for (long column; (column = WIDE * atomic_fetch_add(&s->next, 1)) < s->columns;)
    sum_columns(s, column, smaller(s->columns - column, WIDE));
}

void sum_products(const float *a, long a_stride, const float *b, long b_stride, long rows,
                  long columns, float *sums, unsigned threads, parallel_fn parallel) {
  products all = {.a = a, .b = b, .a_stride = a_stride, .b_stride = b_stride, .rows = rows,
                  .columns = columns, .sums = sums};
  shared(share_products, &all, threads, parallel);
}

#endif
