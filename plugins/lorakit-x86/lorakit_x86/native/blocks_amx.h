/* Blocks of 32 x 32 fp32 numbers as factors of products on AMX, for attention.
 *
 * Here both factors are in three parts (parts.h), which are cut off, not rounded: attention splits
 * as much as it multiplies, and what the products left out come to is still below fp32's rounding.
 *
 * A tile register holds 16 rows of 16 pairs of bf16, and multiplies the pairs of the left matrix's
 * row with those of the right one's column.  Which numbers form a pair does not matter, if it is the
 * same on both sides: here those 16 apart, for both then lie in the same place of two vectors.
 */
#ifndef LORAKIT_BLOCKS_AMX_H
#define LORAKIT_BLOCKS_AMX_H

#include "parts.h"

#define UNITS AMX
#define UNITS_INLINE AMX_INLINE

#include "blocks.h"

#if LORAKIT_HAS_KERNELS

typedef uint16_t bf16;
typedef bf16 element; /* of a factor */

enum {
  PART = 2 * TILE,  /* bf16 in one part of a block */
  BLOCK = 3 * PART, /* bf16 in a block */
  RESULTS_ARE_FACTORS = 0, /* but become them in parts */
};

AMX_INLINE void begin_products(void) { configure_tiles(); }

AMX_INLINE void end_products(void) { _tile_release(); }

/* Two vectors to one row of a tile, in each of the three parts. */
AMX_INLINE void split(__m512 x, __m512 y, bf16 *row) {
  const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000);
  for (int part = 0; part < 3; part++) {
    __m512i bits_x = _mm512_castps_si512(x), bits_y = _mm512_castps_si512(y);
    __m512i pairs = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(bits_x, 16), bits_y);
    _mm512_store_si512(row + part * PART, pairs);
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(bits_x, upper)));
    y = _mm512_sub_ps(y, _mm512_castsi512_ps(_mm512_and_si512(bits_y, upper)));
  }
}

/* A row of a left factor, its two halves. */
AMX_INLINE void split_left(__m512 x, __m512 y, bf16 *row) { split(x, y, row); }

/* Halves of rows i and i + 16 of a right factor. */
AMX_INLINE void split_right(__m512 x, __m512 y, bf16 *row, int half) {
  split(x, y, row + half * TILE);
}

/* Rows i and i + 16 of a block, their halves x[0][0], x[0][1] and x[1][0], x[1][1]: as a left and
 * as a right factor. */
AMX_INLINE void split_rows(__m512 x[2][2], bf16 *left, bf16 *right) {
  const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000);
  const __mmask32 odd = 0xAAAAAAAA;
  for (int part = 0; part < 3; part++) {
    __m512i high[2][2], low[2][2];
    for (int row = 0; row < 2; row++)
      for (int half = 0; half < 2; half++) {
        high[row][half] = _mm512_castps_si512(x[row][half]);
        low[row][half] = _mm512_srli_epi32(high[row][half], 16);
        x[row][half] = _mm512_sub_ps(
            x[row][half], _mm512_castsi512_ps(_mm512_and_si512(high[row][half], upper)));
      }
    for (int n = 0; n < 2; n++) {
      _mm512_store_si512(left + part * PART + n * TILE,
                         _mm512_mask_blend_epi16(odd, low[n][0], high[n][1]));
      _mm512_store_si512(right + part * PART + n * TILE,
                         _mm512_mask_blend_epi16(odd, low[0][n], high[1][n]));
    }
  }
}

/* A 32 x 32 block of X, scaled, as parts in tiles. */
AMX_INLINE void pack_scaled(placed_rows x, enum use use, float scale, bf16 *to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int half = 0; half < 2; half++, to += TILE) {
    __m512 first[16], second[16];
    if (use & SUMS_ROWS) {
      load_placed(x, 0, 16 * half, first);
      load_placed(x, 16, 16 * half, second);
    } else {
      load_placed(x, 16 * half, 0, first);
      load_placed(x, 16 * half, 16, second);
    }
    if (use & TRANSPOSES) {
      transpose((__m512i *)first);
      transpose((__m512i *)second);
    }
    for (int i = 0; i < 16; i++)
      split(_mm512_mul_ps(first[i], factor), _mm512_mul_ps(second[i], factor), to + 32 * i);
  }
}

AMX_INLINE void load_left(const bf16 *a) {
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a + TILE, 64);
}

AMX_INLINE void load_right(const bf16 *b) {
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b + TILE, 64);
}

AMX_INLINE void multiply_tiles(void) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

AMX_INLINE void multiply_and_work(struct work *work, step_fn step) {
  multiply_tiles();
  if (!step)
    return;
  for (work->credit += 16; work->credit >= work->interval; work->credit -= work->interval)
    if (work->left > 0)
      do_step(work, step);
}

/* c = (c if add) + the sum of `count` products of blocks, `a_step` and `b_step` apart.  Meanwhile
 * does steps of work, if `step` is not NULL. */
AMX_INLINE void multiply(const bf16 *a, long a_step, const bf16 *b, long b_step, long count,
                         float *c, int add, struct work *work, step_fn step) {
  STORES_DONE();
  if (add) {
    _tile_loadd(0, c, 128);
    _tile_loadd(1, c + 16, 128);
    _tile_loadd(2, c + AREA / 2, 128);
    _tile_loadd(3, c + AREA / 2 + 16, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  /* Small terms first: their sums' rounding errors are small too.  One factor changes at a time. */
  for (long i = 0; i < count; i++) {
    const bf16 *left = a + i * a_step, *right = b + i * b_step;
    load_left(left);
    load_right(right + 2 * PART);
    multiply_and_work(work, step);
    load_right(right + PART);
    multiply_and_work(work, step);
    load_left(left + PART);
    multiply_and_work(work, step);
    load_right(right);
    multiply_and_work(work, step);
    load_left(left + 2 * PART);
    multiply_and_work(work, step);
  }
  for (long i = 0; i < count; i++) {
    load_left(a + i * a_step);
    load_right(b + i * b_step);
    multiply_and_work(work, step);
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c + AREA / 2, 128);
  _tile_stored(3, c + AREA / 2 + 16, 128);
}

#endif
#endif
