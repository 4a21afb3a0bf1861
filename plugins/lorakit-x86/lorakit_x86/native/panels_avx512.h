/* W as products by AVX-512 read it: in fp32, in panels of 32 columns, one number after the other. */
#ifndef LORAKIT_PANELS_AVX512_H
#define LORAKIT_PANELS_AVX512_H

#include "multiply.h"

#if LORAKIT_HAS_KERNELS

enum { PANEL = 32 };

/* So many rows are brought to a panel one after the other: whole lines of memory are read, and what is
   written is not far apart. */
enum { ROWS_IN_TURN = 8 };

/* Part of the sum that a product is: `inner` of the numbers it sums over, from `at` on. */
typedef struct {
  const factors *from;
  long at, inner;
} part;

/* bf16 numbers, the second of each pair and the first. */
AVX512_INLINE __m512 second_of_pairs(__m512i x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xFFFF0000u)));
}

AVX512_INLINE __m512 first_of_pairs(__m512i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}

AVX512_INLINE __m512i load_bf16(matrix w, long row, long at, long count) {
  const __mmask32 there = count >= 32 ? 0xFFFFFFFF : count > 0 ? (1u << count) - 1 : 0;
  return _mm512_maskz_loadu_epi16(there, (const uint16_t *)w.values + row * w.stride + at);
}

/* Brings numbers to the caches that are read soon; where there are none, nothing happens. */
AVX512_INLINE void fetch(matrix w, long row, long at) {
  __builtin_prefetch((const char *)w.values + (row * w.stride + at) * (w.bf16 ? 2 : 4));
}

AVX512_INLINE __m512 load_fp32(matrix w, long row, long at, long count) {
  return load_numbers((const float *)w.values + row * w.stride + at, count);
}

/* A row of a panel, or the half of one. */
AVX512_INLINE void store_scaled(float *to, __m512 numbers, const float *scale) {
  _mm512_store_ps(to, scale ? _mm512_mul_ps(numbers, _mm512_set1_ps(*scale)) : numbers);
}

/* Copies so many columns of the product's right side; panels are `length` numbers long. */
typedef void (*copy_fn)(part a, long column, long columns, long length, float *to);

/* W [inner, columns]. */
AVX512 static void copy_straight(part a, long column, long columns, long length, float *to) {
  const matrix w = a.from->weight;
  const float *scale = a.from->scale ? a.from->scale + a.at : NULL;
  for (long start = 0; start < a.inner; start += ROWS_IN_TURN)
    for (long j = 0; j < columns; j += PANEL)
      for (long k = start; k < smaller(start + ROWS_IN_TURN, a.inner); k++) {
        const long row = a.at + k, there = columns - j;
        /* Rows are far apart: the processor does not foresee them. */
        fetch(w, row + 2 * ROWS_IN_TURN, column + j);
        float *next = to + j / PANEL * length + k * PANEL;
        __m512 low, high;
        if (w.bf16) {
          const __m512i both = load_bf16(w, row, column + j, there);
          low = widened(_mm512_castsi512_si256(both));
          high = widened(_mm512_extracti64x4_epi64(both, 1));
        } else {
          low = load_fp32(w, row, column + j, there);
          high = load_fp32(w, row, column + j + 16, there - 16);
        }
        store_scaled(next, low, scale ? scale + k : NULL);
        store_scaled(next + 16, high, scale ? scale + k : NULL);
      }
}

/* W [columns, inner], 16 rows of it at a time; bf16 numbers in pairs. */
AVX512 static void copy_transposed(part a, long column, long columns, long length, float *to) {
  const matrix w = a.from->weight;
  const float *scale = a.from->scale ? a.from->scale + a.at : NULL;
  const long each = w.bf16 ? 2 : 1;
  for (long j = 0; j < round_up(columns, PANEL); j += 16) {
    float *half = to + j / PANEL * length + j % PANEL;
    for (long k = 0; k < a.inner; k += 16 * each) {
      __m512i numbers[16];
#pragma GCC unroll 16
      for (long i = 0; i < 16; i++) {
        const long row = column + j + i, at = a.at + k, there = a.inner - k;
        if (j + i >= columns)
          numbers[i] = _mm512_setzero_si512();
        else if (w.bf16)
          numbers[i] = load_bf16(w, row, at, there);
        else
          numbers[i] = _mm512_castps_si512(load_fp32(w, row, at, there));
      }
      transpose(numbers);
#pragma GCC unroll 16
      for (long i = 0; i < 16; i++) {
        const long first = k + i * each, second = first + 1;
        if (first >= a.inner) break;
        const __m512 one = w.bf16 ? first_of_pairs(numbers[i]) : _mm512_castsi512_ps(numbers[i]);
        store_scaled(half + first * PANEL, one, scale ? scale + first : NULL);
        if (w.bf16 && second < a.inner)
          store_scaled(half + second * PANEL, second_of_pairs(numbers[i]), scale ? scale + second : NULL);
      }
    }
  }
}

#endif
#endif
