/* Gradients of keys and values in parts, a part for each query head and split of its queries, and their
 * sums. */
#ifndef LORAKIT_ATTENTION_SUMS_H
#define LORAKIT_ATTENTION_SUMS_H

#include "attention_task.h"

#if LORAKIT_HAS_KERNELS

/* The first group of queries of a split.  All splits take about the same time: the later a query,
 * the more keys it sees. */
static long split_start(struct task *task, long split) {
  const double first = (double)task->first_group * task->first_group;
  const double all = (double)task->groups * task->groups;
  return lround(sqrt(first + (all - first) * split / task->splits));
}

/* Of the gradients of keys or values, in parts. */
static size_t sums_size(const struct task *task) {
  return (size_t)(task->splits * task->all.heads * task->blocks * task->columns * AREA) *
         sizeof(float);
}

static long splits_of(const struct task *task) {
  return task->groups - task->first_group < 2 ? 1 : 2;
}

/* 16 columns of dk or dv of 32 keys: the sum of those for each query head and split.  Other documents'
 * tokens have some already, for those documents come before. */
UNITS_INLINE void sum_parts(struct task *task, const float *parts, long kv_head, long column,
                            long block, float scale, float *to, long stride) {
  const long heads = task->all.heads, group = heads / task->all.kv_heads;
  const long between = task->blocks * task->columns * AREA;
  parts += kv_head * group * between + block * task->columns * AREA;
  parts += column / SIDE * AREA + column % SIDE;
  to += kv_head * task->all.head_dim + column;
  long first = 0;
  while (split_start(task, first + 1) * WIDTH <= block)
    first++;
  for (long i = 0; i < SIDE && block * SIDE + i < task->tokens; i++, parts += SIDE) {
    const long token = block * SIDE + i;
    float *at = to + task->places[token] * stride;
    __m512 sum = _mm512_setzero_ps();
    for (long split = first; split < task->splits; split++)
      for (long n = 0; n < group; n++)
        sum = _mm512_add_ps(sum, _mm512_load_ps(parts + (split * heads + n) * between));
    sum = _mm512_mul_ps(sum, _mm512_set1_ps(scale));
    if (token < task->own_from) sum = _mm512_add_ps(sum, _mm512_loadu_ps(at));
    _mm512_storeu_ps(at, sum);
  }
}

/* Shared out by columns: of each, the documents come one after the other. */
UNITS static void sum_items(void *data) {
  struct batch *batch = data;
  const attended *all = &batch->tasks->all;
  const attention_gradients *to = &batch->tasks->gradients;
  const long columns = all->head_dim / 16;
  for (long item; (item = atomic_fetch_add(&batch->next, 1)) < all->kv_heads * columns;) {
    const long head = item / columns, column = item % columns * 16;
    for (struct task *task = batch->tasks; task < batch->tasks + batch->count; task++)
      for (long block = 0; block < task->blocks; block++) {
        sum_parts(task, task->dk_parts, head, column, block, all->scale, to->dk, to->dk_stride);
        sum_parts(task, task->dv_parts, head, column, block, 1, to->dv, to->dv_stride);
      }
  }
}

#endif
#endif
