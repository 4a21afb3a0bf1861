#ifndef LORAKIT_ROTATE_H
#define LORAKIT_ROTATE_H

#include "vectors.h"

/* Rotary embedding: element i of a head, i < half, and element i + half turn by an angle; elements
   from 2 half on stay.  x [tokens, heads, head_dim], its tokens so many numbers apart, a token's heads
   one after the other; out likewise, and it may be x; cos and sin of each token so many numbers apart,
   the first `half` of each.  Turns back if `back`. */
void rotate(float *out, long out_stride, const float *x, long x_stride, const float *cos, const float *sin,
            long angle_stride, int back, long tokens, long heads, long head_dim, long half,
            unsigned threads, parallel_fn parallel);

#endif
