/* Products in fp32, shared out over threads; what computes a share is in `multiply_amx.c` and
   `multiply_avx512.c`. */
#include "multiply.h"

#if LORAKIT_HAS_KERNELS

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

static pthread_key_t own_memory;
static pthread_once_t own_memory_once = PTHREAD_ONCE_INIT;

static void make_own_memory(void) { pthread_key_create(&own_memory, free); }

void *kept(long bytes) {
  static __thread void *memory;
  static __thread long size;
  if (size < bytes) {
    pthread_once(&own_memory_once, make_own_memory);
    free(memory);
    memory = aligned_alloc(64, round_up(bytes, 64));
    size = memory ? bytes : 0;
    pthread_setspecific(own_memory, memory);
  }
  return memory;
}

/* The product cut along its rows or its columns, a share for each thread. */
typedef struct {
  const product *whole;
  const multiply_units *units;
  long shares;
  atomic_long next;
  atomic_int failed;
} work;

/* Leaves out the rows, or the columns, before `start`. */
static void take_share(factors *f, int by_rows, int transposed, long start) {
  if (by_rows) {
    f->x += start * f->x_stride;
  } else {
    const long offset = transposed ? start * f->weight.stride : start;
    f->weight.values = (const char *)f->weight.values + offset * (f->weight.bf16 ? 2 : 4);
  }
}

/* W is copied by each share of the rows, x, if at all, by each of the columns: the smaller of them. */
static int cut_by_rows(const product *p, const multiply_units *units, long shares) {
  if (!units->copies_x && p->columns % (shares * units->block) == 0) return 0;
  return p->rows > p->columns;
}

static void multiply_shares(void *data) {
  work *all = data;
  for (long i; (i = atomic_fetch_add(&all->next, 1)) < all->shares;) {
    product p = *all->whole;
    const int by_rows = cut_by_rows(&p, all->units, all->shares);
    const long count = by_rows ? p.rows : p.columns;
    /* Blocks are whole in all but the last. */
    const long each = round_up(divided_up(count, all->shares), all->units->block), start = i * each;
    if (start >= count) continue;
    const long size = smaller(count - start, each);
    p.out += by_rows ? start * p.out_stride : start;
    if (p.ratio && !by_rows) p.ratio += start;
    *(by_rows ? &p.rows : &p.columns) = size;
    take_share(&p.first, by_rows, p.transposed, start);
    take_share(&p.more, by_rows, p.transposed, start);
    if (all->units->multiply(&p)) atomic_store(&all->failed, 1);
  }
}

int multiply(const product *p, const multiply_units *units, unsigned threads, parallel_fn parallel) {
  work all = {.whole = p, .units = units, .shares = threads > 1 && parallel ? (long)threads : 1};
  if (all.shares > 1)
    parallel(multiply_shares, &all, threads, 0);
  else
    multiply_shares(&all);
  return all.failed;
}

#endif
