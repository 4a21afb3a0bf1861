/* What all kernels are made of: vectors of 16 fp32 numbers (AVX-512). */
#ifndef LORAKIT_VECTORS_H
#define LORAKIT_VECTORS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define LORAKIT_HAS_KERNELS 1

#include <immintrin.h>
#include <string.h>

/* Compiled for these instructions whatever the compiler's options are. */
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define AVX512_INLINE AVX512 static inline __attribute__((always_inline))

static inline long round_up(long count, long multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

static inline long divided_up(long a, long b) { return (a + b - 1) / b; }

static inline long smaller(long a, long b) { return a < b ? a : b; }

/* The first so many of 16 numbers. */
AVX512_INLINE __mmask16 first_of_16(long count) {
  return count >= 16 ? 0xFFFF : count > 0 ? (__mmask16)((1u << count) - 1) : 0;
}

/* The first so many of 16 numbers, and zeros. */
AVX512_INLINE __m512 load_numbers(const float *from, long count) {
  return _mm512_maskz_loadu_ps(first_of_16(count), from);
}

/* 16 x 16 numbers of 32 bits, or pairs of bf16, transposed. */
AVX512_INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
  }
}

/* Rows of a matrix, row i of which is `places[i]` times `stride` from where it starts; those before
   `first` and from `end` on are taken for zeros. */
typedef struct {
  const float *from;
  long stride;
  const int64_t *places;
  long first, end;
} placed_rows;

/* 16 columns of 16 rows, from there on. */
AVX512_INLINE void load_placed(placed_rows x, long row, long column, __m512 rows[16]) {
  for (long i = 0; i < 16; i++)
    rows[i] = row + i >= x.first && row + i < x.end
                  ? _mm512_loadu_ps(x.from + x.places[row + i] * x.stride + column)
                  : _mm512_setzero_ps();
}

/* 2^x to 1e-7, relative; 0 for very negative numbers. */
AVX512_INLINE __m512 power_of_2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, 0);
  const __m512 rest = _mm512_sub_ps(x, whole);
  /* The least largest relative error for |rest| <= 0.5. */
  __m512 p = _mm512_set1_ps(0.00015353362f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.0013398875f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.009618437f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.055503324f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.24022648f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.6931472f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

static const float LOG2_E = 1.44269504f;

#else
#define LORAKIT_HAS_KERNELS 0
#endif

/* libgomp's GOMP_parallel: runs the function in so many threads, this one among them. */
typedef void (*parallel_fn)(void (*function)(void *), void *data, unsigned threads, unsigned flags);

#endif
