#ifndef LORAKIT_NORM_H
#define LORAKIT_NORM_H

#include "vectors.h"

/* out = x r w, with r = 1 / sqrt(mean(x^2) + eps) of each row, which `roots` gets.  x [rows, width],
   its rows so many numbers apart, out without gaps, w [width], roots [rows]; all fp32. */
void normalize(float *out, float *roots, const float *x, long x_stride, const float *weight,
               float eps, long rows, long width, unsigned threads, parallel_fn parallel);

/* The gradient of x, given that of out, added to `plus` [rows, width] unless that is NULL; without
   gaps.  It may be written over that of out. */
void normalize_backward(float *dx, const float *dout, long dout_stride, const float *plus,
                        long plus_stride, const float *x, long x_stride, const float *weight, const float *roots, long rows,
                        long width, unsigned threads, parallel_fn parallel);

#endif
