#ifndef LORAKIT_ATTENTION_H
#define LORAKIT_ATTENTION_H

#include "vectors.h"

/* Causal attention within a document: out = softmax(scale q k^T) v, each token seeing itself and
 * those before it.  Once for each kind of units that can compute it. */
struct attention {
  /* q and out [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], a token's heads one
   * after the other; tokens of q, k and v so many numbers apart, of out next to each other.  head_dim
   * is a multiple of 32; query head h sees key head h / (heads / kv_heads).  normalizer
   * [heads, tokens] gets the logarithms of the softmax's sums, for the backward pass.
   *
   * workspace: what `bytes` says, at a multiple of 64.  A NaN of v may reach the 31 tokens before
   * it. */
  void (*attend)(const float *q, const float *k, const float *v, float *out, float *normalizer,
                 char *workspace, long tokens, long heads, long kv_heads, long head_dim,
                 long q_stride, long k_stride, long v_stride, float scale, int threads,
                 parallel_fn parallel);

  /* The gradients of q, k and v, given that of out; written without gaps. */
  void (*attend_backward)(const float *dout, const float *q, const float *k, const float *v,
                          const float *out, const float *normalizer, float *dq, float *dk,
                          float *dv, char *workspace, long tokens, long heads, long kv_heads,
                          long head_dim, long dout_stride, long q_stride, long k_stride,
                          long v_stride, float scale, int threads, parallel_fn parallel);

  /* Of workspace that either of them needs at most. */
  long (*bytes)(long tokens, long heads, long kv_heads, long head_dim, int threads);
};

extern const struct attention attention_on_amx, attention_on_avx512;

#endif
