/* fp32 numbers as sums of bf16 numbers, and tiles of them, for Intel AMX.

   An fp32 number has 24 significant bits and a bf16 number 8, at the same exponents: the nearest
   bf16 number, the one nearest to what is left, and the rest add up to it exactly.  AMX multiplies
   bf16 matrices and adds the products, which fp32 holds exactly, up in fp32.  With a = a0 + a1 + a2
   and b = b0 + b1 + b2, the six products ai bj with i + j <= 2 are a b to 2^-25 of it, half of what
   fp32 itself rounds away; where b is a bf16 number, as most published weights are, three are all.

   A tile is 16 rows of 64 bytes: of a left operand 16 x 32 numbers, of a right operand 32 x 16,
   two rows of it interleaved in one.

   Infinities become NaN, and so do numbers within 2^-9 of the largest.

   Reference: Intel Architecture Instruction Set Extensions, chapter 3 (AMX). */
#ifndef LORAKIT_PARTS_H
#define LORAKIT_PARTS_H

#include "vectors.h"

#if LORAKIT_HAS_KERNELS

#ifdef LORAKIT_EMULATED_TILES
#include "tiles_emulated.h"
#define AMX AVX512
#else
#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,amx-tile,amx-bf16")))
#endif
#define AMX_INLINE AMX static inline __attribute__((always_inline))

/* Of a left operand's tile; DEPTH is what a product of tiles sums over. */
enum { PARTS = 3, TILE_ROWS = 16, DEPTH = 32, TILE_NUMBERS = TILE_ROWS * DEPTH };

AMX_INLINE void configure_tiles(void) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int tile = 0; tile < 8; tile++) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = TILE_ROWS;
  }
#ifndef LORAKIT_EMULATED_TILES
  /* GCC's _tile_loadconfig says that it reads 8 bytes only. */
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
#else
  (void)config;
#endif
}

/* GCC's _tile_loadd does not say that it reads memory: stores before it must stay before it. */
#define STORES_DONE() __asm__ volatile("" ::: "memory")

/* 32 fp32 numbers. */
typedef struct {
  __m512 low, high;
} numbers;

AMX_INLINE __m512i bits(__m512 x) { return _mm512_castps_si512(x); }

/* The upper halves of fp32 numbers, which are bf16 numbers. */
AMX_INLINE __m512 upper(__m512i x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xFFFF0000u)));
}

/* The bf16 numbers next to fp32 numbers. */
AMX_INLINE numbers nearest(numbers x) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  numbers n = {upper(_mm512_add_epi32(bits(x.low), half)),
               upper(_mm512_add_epi32(bits(x.high), half))};
  return n;
}

/* The next part of the numbers, which is taken from them; the last is what there still is. */
AMX_INLINE numbers take_part(numbers *x, int is_last) {
  if (is_last) return *x;
  const numbers n = nearest(*x);
  x->low = _mm512_sub_ps(x->low, n.low);
  x->high = _mm512_sub_ps(x->high, n.high);
  return n;
}

/* 32 bf16 numbers, in fp32 so far, in order. */
AMX_INLINE __m512i as_bf16(numbers x) {
  const __m512i odd = _mm512_set_epi16(
      63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
      31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(_mm512_castps_si512(x.low), odd, _mm512_castps_si512(x.high));
}

#endif
#endif
