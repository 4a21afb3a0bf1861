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
  TOKENS_TOGETHER = 512, /* of a batch of several documents */
  MOST_TOGETHER = TOKENS_TOGETHER / SIDE, /* of them: each has a block at least */
};

/* What to compute for a document, and memory that the threads share. */
struct task {
  attended all;
  attention_gradients gradients; /* backward only */
  const int64_t *places;         /* of its tokens */
  float *normalizer;             /* its own */
  long tokens, own_from;         /* the first token that is its own */
  long blocks, first_block;      /* of 32 tokens; the first with a token of its own */
  long columns;                  /* blocks of 32 elements of a head */
  long groups, first_group;      /* of WIDTH blocks; the first with queries */
  long splits; /* of a head's queries, to divide the work among threads; backward only */
  element *k_left, *k_left_transposed, *v_left; /* [kv head][block][column][BLOCK] */
  float *dk_parts, *dv_parts;                   /* [split][head][block][column][AREA] */
  atomic_long next;
};

/* Documents whose items the threads share out without waiting for each other in between. */
struct batch {
  struct task tasks[MOST_TOGETHER];
  long count;
  char *scratch;       /* of all threads */
  size_t scratch_size; /* of one */
  atomic_long next, threads_begun;
};

/* Takes memory from a range; counts only, if that starts at NULL. */
static inline void *take(char **from, size_t bytes) {
  char *start = *from;
  *from = start + (bytes + 63) / 64 * 64;
  return start;
}

/* A block of 32 tokens from `row` on, of some columns. */
UNITS_INLINE placed_rows block_of(const struct task *task, const float *columns, long stride,
                                  long row) {
  return (placed_rows){columns, stride, task->places + row, 0, task->tokens - row};
}

UNITS_INLINE void pack_block(placed_rows x, enum use use, element *to) {
  pack_scaled(x, use, 1, to);
}

/* Of a group of blocks: those at its start that are another document's. */
static inline long blocks_before_own(const struct task *task, long group) {
  const long before = task->first_block - group * WIDTH;
  return before > 0 ? before : 0;
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
