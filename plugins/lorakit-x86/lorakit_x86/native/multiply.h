#ifndef LORAKIT_MULTIPLY_H
#define LORAKIT_MULTIPLY_H

#include "vectors.h"

/* fp32, or bf16 where bf16 is not 0; strides are in numbers, and within a row numbers are next to
   each other. */
typedef struct {
  const void *values;
  long stride;
  int bf16;
} matrix;

/* What a product multiplies: x [rows, inner], its columns times `scale` [inner] first, if that is not
   NULL, with W [inner, columns], or transposed [columns, inner]. */
typedef struct {
  const float *x;
  long x_stride;
  const float *scale;
  matrix weight;
  long inner;
} factors;

/* out = x W, or x W^T if `transposed`, added to what out holds if `add`.

   out [rows, columns] fp32; `more` is added to the product, unless its inner is 0.  Both are multiplied
   by `ratio` [columns], unless that is NULL. */
typedef struct {
  float *out;
  long out_stride;
  const float *ratio;
  factors first, more;
  int transposed;
  long rows, columns;
  int add;
} product;

/* What computes products. */
typedef struct {
  /* In the calling thread.  Returns 0, or 1 where there is not memory enough. */
  int (*multiply)(const product *p);
  /* Columns are made so many at a time. */
  long block;
  /* Whether x is copied, and so once more for each share of the columns. */
  int copies_x;
} multiply_units;

extern const multiply_units multiply_on_amx, multiply_on_avx512;

/* Shares a product out over threads. */
int multiply(const product *p, const multiply_units *units, unsigned threads, parallel_fn parallel);

/* Memory of the calling thread's own, kept from call to call until the thread ends; at a multiple of
   64.  NULL where there is not enough. */
void *kept(long bytes);

#if LORAKIT_HAS_KERNELS

/* bf16 numbers as fp32. */
AVX512_INLINE __m512 widened(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

/* What results are multiplied by, of the columns there are: ones, where there is no ratio. */
AVX512_INLINE __m512 load_ratio(const float *ratio, __mmask16 there) {
  return ratio ? _mm512_maskz_loadu_ps(there, ratio) : _mm512_set1_ps(1);
}

/* Rounded once.  Compilers may or may not do the same of a product and a sum, here and there. */
AVX512_INLINE __m512 scaled_and_added(__m512 sum, __m512 ratio, __m512 before) {
  return _mm512_fmadd_ps(sum, ratio, before);
}

#endif
#endif
