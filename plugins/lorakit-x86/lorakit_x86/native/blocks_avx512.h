/* Blocks of 32 x 32 fp32 numbers as factors of products in AVX-512, for attention.
 *
 * A factor lies as it is multiplied: a left one row by row, the product running along them, a right
 * one so too, the product running down its columns.  So both are plain copies, transposed or not. */
#ifndef LORAKIT_BLOCKS_AVX512_H
#define LORAKIT_BLOCKS_AVX512_H

#include "vectors.h"

#define UNITS AVX512
#define UNITS_INLINE AVX512_INLINE

#include "blocks.h"

#if LORAKIT_HAS_KERNELS

typedef float element; /* of a factor */

enum {
  BLOCK = AREA,
  RESULTS_ARE_FACTORS = 1, /* left ones and right ones, as they are */
};

AVX512_INLINE void begin_products(void) {}

AVX512_INLINE void end_products(void) {}

/* A row of a left factor, its two halves. */
AVX512_INLINE void split_left(__m512 x, __m512 y, float *row) {
  _mm512_store_ps(row, x);
  _mm512_store_ps(row + 16, y);
}

/* Halves of rows i and i + 16 of a right factor. */
AVX512_INLINE void split_right(__m512 x, __m512 y, float *row, int half) {
  _mm512_store_ps(row + 16 * half, x);
  _mm512_store_ps(row + TILE + 16 * half, y);
}

/* Rows i and i + 16 of a block, their halves x[0][0], x[0][1] and x[1][0], x[1][1]: as a left and
 * as a right factor. */
AVX512_INLINE void split_rows(__m512 x[2][2], float *left, float *right) {
  for (int row = 0; row < 2; row++) {
    split_left(x[row][0], x[row][1], left + row * TILE);
    split_left(x[row][0], x[row][1], right + row * TILE);
  }
}

/* A 32 x 32 block of X, scaled. */
AVX512_INLINE void pack_scaled(placed_rows x, enum use use, float scale, float *to) {
  const __m512 factor = _mm512_set1_ps(scale);
  const int transposed = use & TRANSPOSES;
  for (int down = 0; down < 2; down++)
    for (int across = 0; across < 2; across++) {
      __m512 part[16];
      load_placed(x, 16 * down, 16 * across, part);
      if (transposed) transpose((__m512i *)part);
      float *corner = transposed ? to + across * TILE + 16 * down : to + down * TILE + 16 * across;
      for (int i = 0; i < 16; i++)
        _mm512_store_ps(corner + i * SIDE, _mm512_mul_ps(part[i], factor));
    }
}

enum { ROWS_AT_A_TIME = 8 };

/* 8 x 32 results, in half of the registers: see `multiply`. */
AVX512_INLINE void multiply_rows(const float *a, long a_step, const float *b, long b_step,
                                 long count, float *c, int add) {
  __m512 sums[ROWS_AT_A_TIME][2];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS_AT_A_TIME; i++)
    for (int half = 0; half < 2; half++) {
      sums[i][half] = _mm512_setzero_ps();
      /* Where results go: fetched while they are made. */
      __builtin_prefetch(c + SIDE * i + 16 * half, 1);
    }
  for (long n = 0; n < count; n++, a += a_step, b += b_step)
#pragma GCC unroll 2
    for (int k = 0; k < SIDE; k++) {
      const __m512 low = _mm512_load_ps(b + SIDE * k), high = _mm512_load_ps(b + SIDE * k + 16);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS_AT_A_TIME; i++) {
        const __m512 left = _mm512_set1_ps(a[SIDE * i + k]);
        sums[i][0] = _mm512_fmadd_ps(left, low, sums[i][0]);
        sums[i][1] = _mm512_fmadd_ps(left, high, sums[i][1]);
      }
    }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS_AT_A_TIME; i++)
    for (int half = 0; half < 2; half++) {
      float *to = c + SIDE * i + 16 * half;
      __m512 sum = sums[i][half];
      if (add) sum = _mm512_add_ps(sum, _mm512_load_ps(to));
      _mm512_store_ps(to, sum);
    }
}

/* c = (c if add) + the sum of `count` products of blocks, `a_step` and `b_step` apart.  Work is left
 * for later: it would take the same units. */
AVX512_INLINE void multiply(const float *a, long a_step, const float *b, long b_step, long count,
                            float *c, int add, struct work *work, step_fn step) {
  (void)work;
  (void)step;
  for (int row = 0; row < SIDE; row += ROWS_AT_A_TIME)
    multiply_rows(a + SIDE * row, a_step, b, b_step, count, c + SIDE * row, add);
}

#endif
#endif
