/* Sharing the rows of a tensor out over threads. */
#ifndef LORAKIT_ROWS_H
#define LORAKIT_ROWS_H

#include "vectors.h"

#if LORAKIT_HAS_KERNELS

#include <stdatomic.h>

/* What is done to one row. */
typedef void (*row_fn)(const void *operands, long row);

struct rows {
  row_fn each;
  const void *operands;
  long count;
  atomic_long next;
};

static void do_rows(void *data) {
  struct rows *all = data;
  const long at_a_time = 16;
  for (long at; (at = atomic_fetch_add(&all->next, at_a_time)) < all->count;)
    for (long row = at; row < smaller(at + at_a_time, all->count); row++)
      all->each(all->operands, row);
}

static inline void for_each_row(row_fn each, const void *operands, long count, unsigned threads,
                                parallel_fn parallel) {
  struct rows all = {.each = each, .operands = operands, .count = count};
  if (threads > 1 && parallel)
    parallel(do_rows, &all, threads, 0);
  else
    do_rows(&all);
}

#endif
#endif
