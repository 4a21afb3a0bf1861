#ifndef LORAKIT_MULTIPLY_H
#define LORAKIT_MULTIPLY_H

#include "parts.h"

/* fp32, or bf16 where bf16 is not 0; strides are in numbers, and within a row numbers are next to
   each other. */
typedef struct {
  const void *values;
  long stride;
  int bf16;
} matrix;

/* out = x W, or x W^T if `transposed`, added to what out holds if `add`.

   x [rows, inner], W [inner, columns] or transposed [columns, inner], out [rows, columns] fp32.
   Returns 0, or 1 where there is not memory enough. */
int multiply(float *out, long out_stride, const float *x, long x_stride, matrix weight,
             int transposed, long rows, long columns, long inner, int add, unsigned threads,
             parallel_fn parallel);

#endif
