#ifndef LORAKIT_ADAPTED_H
#define LORAKIT_ADAPTED_H

#include "multiply.h"

/* A layer of a frozen weight W [outputs, inputs] with a low-rank update beside it, A [rank, inputs]
   and B [outputs, rank], both fp32, of `rows` tokens.  Its results are multiplied by `ratio` [outputs],
   unless that is NULL. */
typedef struct {
  matrix weight;
  const float *down, *up, *ratio;
  float scale;
  long rows, inputs, outputs, rank;
} adapted;

/* low = scale x A^T [rows, rank], and out = x W^T + low B^T, times the ratio; added to what out holds if
   `add`.  Returns 0, or 1 where there is not memory enough. */
int adapt(const adapted *layer, const float *x, long x_stride, float *out, long out_stride, int add,
          float *low, const multiply_units *units, unsigned threads, parallel_fn parallel);

/* Given the gradient of out, and low as `adapt` made it: those of A and of B, and that of x, which is
   added to what dx holds if `add`; none, if dx is NULL.  d_low [rows, rank] is memory to work in. */
int adapt_backward(const adapted *layer, const float *dout, long dout_stride, const float *x,
                   long x_stride, const float *low, float *d_low, float *dx, long dx_stride, int add,
                   float *d_down, float *d_up, const multiply_units *units, unsigned threads,
                   parallel_fn parallel);

/* The sums over rows of a times b [rows, columns]. */
void sum_products(const float *a, long a_stride, const float *b, long b_stride, long rows,
                  long columns, float *sums, unsigned threads, parallel_fn parallel);

#endif
