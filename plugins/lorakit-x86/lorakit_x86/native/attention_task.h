/* What the forward and the backward pass of attention share, whatever units multiply the blocks.
 *
 * Scores are computed transposed, keys as rows: then the maximum over keys and the sum over keys
 * are those of whole vectors, and a block of the results is a factor of the next product as it is.
 * Everything goes in blocks of 32 tokens by 32 tokens or elements of a head; tokens beyond the last
 * are zeros, and as keys they are masked, since the queries that would see them come later still.
 */
#ifndef LORAKIT_ATTENTION_TASK_H
#define LORAKIT_ATTENTION_TASK_H

#include "attention.h"

#if LORAKIT_HAS_KERNELS

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

enum {
  WIDTH = 4, /* blocks of queries and blocks of keys that are handled together, while in L2 */
};

/* What to compute: pointers and sizes as in `attend`, and memory that the threads share. */
struct task {
  const float *dout, *q, *k, *v, *result, *known_normalizer;
  float *out, *normalizer, *dq, *dk, *dv;
  long tokens, heads, kv_heads, head_dim;
  long dout_stride, q_stride, k_stride, v_stride;
  float scale;
  long blocks;   /* of 32 tokens */
  long columns;  /* blocks of 32 elements of a head */
  long groups;   /* of WIDTH blocks */
  long splits;   /* of a head's queries, to divide the work among threads; backward only */
  element *k_left, *k_left_transposed, *v_left; /* [kv head][block][column][BLOCK] */
  float *dk_parts, *dv_parts;                   /* [split][head][block][column][AREA] */
  char *scratch;                                /* of all threads */
  size_t scratch_size;                          /* of one */
  atomic_long next, threads_begun;
};

/* Takes memory from a range; counts only, if that starts at NULL. */
static inline void *take(char **from, size_t bytes) {
  char *start = *from;
  *from = start + (bytes + 63) / 64 * 64;
  return start;
}

UNITS_INLINE void pack_block(const float *x, long stride, long rows, enum use use, element *to) {
  pack_scaled(x, stride, rows, use, 1, to);
}

/* Hides the scores of later keys in a block on the diagonal: key i is seen by queries i and up. */
UNITS_INLINE void mask_diagonal(float *scores, float value) {
  for (int i = 0; i < SIDE; i++) {
    uint32_t hidden = (1u << i) - 1;
    _mm512_mask_storeu_ps(scores + SIDE * i, (__mmask16)hidden, _mm512_set1_ps(value));
    _mm512_mask_storeu_ps(scores + SIDE * i + 16, hidden >> 16, _mm512_set1_ps(value));
  }
}

#endif
#endif
