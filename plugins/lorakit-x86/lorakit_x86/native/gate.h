#ifndef LORAKIT_GATE_H
#define LORAKIT_GATE_H

#include "vectors.h"

/* out = silu(g) u.  All [rows, width] fp32, rows so many numbers apart. */
void gate(float *out, long out_stride, const float *g, long g_stride, const float *u, long u_stride,
          long rows, long width, unsigned threads, parallel_fn parallel);

/* The gradients of g and u, given that of out; either may be written over it. */
void gate_backward(float *dg, long dg_stride, float *du, long du_stride, const float *dout,
                   long dout_stride, const float *g, long g_stride, const float *u, long u_stride,
                   long rows, long width, unsigned threads, parallel_fn parallel);

#endif
