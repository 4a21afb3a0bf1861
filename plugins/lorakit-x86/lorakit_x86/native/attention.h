#ifndef LORAKIT_ATTENTION_H
#define LORAKIT_ATTENTION_H

#include "vectors.h"

/* Causal attention within documents: out = softmax(scale q k^T) v, each token seeing itself and those
 * before it.
 *
 * q and out [rows, heads, head_dim], k and v [rows, kv_heads, head_dim], a row's heads one after the
 * other; rows of q, k and v so many numbers apart, of out next to each other.  head_dim is a multiple
 * of 32; query head h sees key head h / (heads / kv_heads).
 *
 * places [tokens of all documents] says in which row each token of each document is.  A document has
 * lengths[document][0] tokens, the last lengths[document][1] of which are its own; the others are
 * those of documents before it, and are seen, but what they see is not computed again.
 *
 * normalizer has heads times the tokens of a document for each, as [heads, tokens]: the logarithms of
 * the softmax's sums, for the backward pass; of all tokens from the 32 on that the first of its own is
 * one of.
 *
 * workspace is what `bytes` says of the longest document, at a multiple of 64.  A NaN of v may reach
 * the 31 tokens before it. */
typedef struct {
  const float *q, *k, *v;
  long q_stride, k_stride, v_stride;
  float *out, *normalizer;
  long heads, kv_heads, head_dim;
  float scale;
  const int64_t *places, (*lengths)[2];
  long documents;
  char *workspace;
} attended;

/* Rows are so many numbers apart. */
typedef struct {
  const float *dout;
  long dout_stride;
  float *dq, *dk, *dv;
  long dq_stride, dk_stride, dv_stride;
} attention_gradients;

/* Once for each kind of units that can compute it. */
struct attention {
  void (*attend)(const attended *all, unsigned threads, parallel_fn parallel);

  /* Given dout and what `attend` wrote: dq, dk and dv. */
  void (*attend_backward)(const attended *all, const attention_gradients *gradients,
                          unsigned threads, parallel_fn parallel);

  /* Of workspace that either of them needs at most. */
  long (*bytes)(long tokens, long heads, long kv_heads, long head_dim, unsigned threads);
};

extern const struct attention attention_on_amx, attention_on_avx512;

#endif
