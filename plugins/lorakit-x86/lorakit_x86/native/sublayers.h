#ifndef LORAKIT_SUBLAYERS_H
#define LORAKIT_SUBLAYERS_H

#include "adapted.h"
#include "attention.h"

/* A block's two halves, each x + f(norm(x)), in one call: what would come between their kernels, in
   Python and in torch, takes as long as they do where there are few tokens.

   x, out and their gradients [rows, width], without gaps. */

/* What computes. */
typedef struct {
  const multiply_units *multiply;
  const struct attention *attention;
  unsigned threads;
  parallel_fn parallel;
} machine;

enum { MOST_INNER = 3 };

/* What both halves have: an RMSNorm, layers that share its results, and a layer behind. */
typedef struct {
  const float *norm; /* [width] */
  float eps;
  adapted inner[MOST_INNER], outer;
  long inner_count, rows, width;
} sublayer;

/* What the forward pass writes and the backward pass reads. */
typedef struct {
  /* Of the inner layers, one behind the other [rows, outputs]; if `again`, the backward pass writes them,
     too. */
  float *made;
  int again;
  /* Of the outer layer [rows, width], if it has a ratio. */
  float *outer_made;
  /* The norm's roots [rows], and scale x A^T [rows, rank] of each inner layer and of the outer. */
  float *small;
} carried;

/* Of each inner layer and of the outer: the gradients of A and B, and if it has a ratio, the sums over rows
   of its result times that's gradient [outputs]. */
typedef struct {
  float *down[MOST_INNER + 1], *up[MOST_INNER + 1], *sums[MOST_INNER + 1];
} factor_gradients;

/* Memory for a call.  Apart, as other tensors of these sizes are, whose memory they may take. */
typedef struct {
  float *input;   /* what is normalized [rows, width] */
  float *outer;   /* the outer layer's input, or its gradient [rows, inputs]; of a feed-forward layer the
                     forward pass only, of attention the backward pass only */
  float *dmade;   /* backward: like `made` */
  float *rotated; /* of attention: q and k, one behind the other */
  float *d_low;   /* backward: [rows, the largest rank] */
} working;

/* out = x + W (silu(g) u), W the outer layer; g and u are made by a layer each, or by one, the numbers of
   g first.  These, too, return 1 where there is not memory enough. */
int feed_forward(const sublayer *half, const float *x, const carried *kept, float *out,
                 const working *work, const machine *on);

/* Given the gradient of out: that of x, unless dx is NULL, and those of the factors. */
int feed_forward_backward(const sublayer *half, const float *dout, const float *x,
                          const carried *kept, float *dx, const factor_gradients *gradients,
                          const working *work, const machine *on);

/* Of each token so many numbers apart, the first `half` of each. */
typedef struct {
  const float *cos, *sin;
  long stride, half;
} rotation;

/* out = x + W attention(q, k, v): q, k and v are made by a layer each, or by one, in that order; then q and
   k are rotated.  Where q, k and v are, `attending` does not say; its out is kept. */
int self_attention(const sublayer *half, const rotation *angles, const attended *attending,
                   const float *x, const carried *kept, float *out, const working *work,
                   const machine *on);

/* Like `feed_forward_backward`. */
int self_attention_backward(const sublayer *half, const rotation *angles, const attended *attending,
                            const float *dout, const float *x, const carried *kept, float *dx,
                            const factor_gradients *gradients, const working *work,
                            const machine *on);

#endif
