/* AMX's instructions in AVX-512, to run what is written for AMX on processors without it: for tests
   only, many times as slow.  All tiles are 16 rows of 64 bytes.

   Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS. */
#ifndef LORAKIT_TILES_EMULATED_H
#define LORAKIT_TILES_EMULATED_H

#include "vectors.h"

#if LORAKIT_HAS_KERNELS

static __thread __m512i emulated_tiles[8][16];

AVX512_INLINE void emulated_load(int tile, const void *from, long stride) {
  for (int i = 0; i < 16; i++)
    emulated_tiles[tile][i] = _mm512_loadu_si512((const char *)from + i * stride);
}

AVX512_INLINE void emulated_store(int tile, void *to, long stride) {
  for (int i = 0; i < 16; i++)
    _mm512_storeu_si512((char *)to + i * stride, emulated_tiles[tile][i]);
}

AVX512_INLINE void emulated_zero(int tile) {
  for (int i = 0; i < 16; i++) emulated_tiles[tile][i] = _mm512_setzero_si512();
}

/* c += a b: of 16 pairs of bf16 in a row of a each with a row of b.  As AMX does, the products of
   the pairs' first numbers and those of the second ones are added up apart, and then to c. */
AVX512_INLINE void emulated_products(int c, int a, int b) {
  const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000u);
  for (int row = 0; row < 16; row++) {
    int pairs[16];
    _mm512_storeu_si512(pairs, emulated_tiles[a][row]);
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (int k = 0; k < 16; k++) {
      const __m512i left = _mm512_set1_epi32(pairs[k]), right = emulated_tiles[b][k];
      first = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)),
                              _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), first);
      second = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, upper)),
                               _mm512_castsi512_ps(_mm512_and_si512(right, upper)), second);
    }
    const __m512 sum = _mm512_castsi512_ps(emulated_tiles[c][row]);
    emulated_tiles[c][row] =
        _mm512_castps_si512(_mm512_add_ps(sum, _mm512_add_ps(first, second)));
  }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_zero emulated_zero
#define _tile_dpbf16ps emulated_products
#define _tile_release() ((void)0)

#endif
#endif
