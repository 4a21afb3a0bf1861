/* What attention asks of blocks, whatever units multiply them: `blocks_amx.h` and `blocks_avx512.h`
 * define the rest, one of which is included before.  What it is compiled for is called UNITS there. */
#ifndef LORAKIT_BLOCKS_H
#define LORAKIT_BLOCKS_H

#include "vectors.h"

#if LORAKIT_HAS_KERNELS

enum {
  SIDE = 32,          /* of a block */
  AREA = SIDE * SIDE, /* of a block */
  TILE = AREA / 2,    /* of 16 rows of a factor */
};

/* How a block of a matrix X is used: as left or right factor, and which of its indices the product
 * sums over.  The other factor's rows or columns are those of X or of its transpose. */
enum use {
  LEFT = 0,               /* X Y: sums over columns */
  LEFT_TRANSPOSED = 3,    /* X^T Y: sums over rows */
  RIGHT = 1,              /* Y X: sums over rows */
  RIGHT_TRANSPOSED = 2,   /* Y X^T: sums over columns */
  SUMS_ROWS = 1,
  TRANSPOSES = 2,
};

/* Work for the vector units, in steps.  Where other units multiply, it is done meanwhile: alternating
 * instructions of the two keep both busy. */
struct work {
  long left;             /* steps */
  long credit, interval; /* 16 steps for every `interval` products of tiles */
};

typedef void (*step_fn)(struct work *);

UNITS_INLINE void do_step(struct work *work, step_fn step) {
  work->left--;
  step(work);
}

UNITS_INLINE void finish_work(struct work *work, step_fn step) {
  while (work->left > 0)
    do_step(work, step);
}

#endif
#endif
