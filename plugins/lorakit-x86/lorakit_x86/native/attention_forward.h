/* The forward pass of attention, and what the backward pass shares with it: see attention.h. */
#include "attention_task.h"

#if LORAKIT_HAS_KERNELS

static size_t packed_size(const struct task *task) {
  return (size_t)(task->all.kv_heads * task->blocks * task->columns * BLOCK) * sizeof(element);
}

/* Runs what shares out the items of a batch in all threads. */
static void run_batch(struct batch *batch, void (*fn)(void *), unsigned threads,
                      parallel_fn parallel) {
  atomic_store(&batch->next, 0);
  atomic_store(&batch->threads_begun, 0);
  for (long i = 0; i < batch->count; i++) atomic_store(&batch->tasks[i].next, 0);
  if (threads > 1)
    parallel(fn, batch, threads, 0);
  else
    fn(batch);
}

/* The calling thread's own memory. */
static char *own_scratch(struct batch *batch) {
  return batch->scratch + atomic_fetch_add(&batch->threads_begun, 1) * batch->scratch_size;
}

UNITS static void pack_keys(struct task *task) {
  const attended *all = &task->all;
  const int backward = task->gradients.dout != NULL;
  for (long item; (item = atomic_fetch_add(&task->next, 1)) < all->kv_heads * task->blocks;) {
    const long head = item / task->blocks, row = item % task->blocks * SIDE;
    for (long c = 0; c < task->columns; c++) {
      const long column = head * all->head_dim + c * SIDE, to = (item * task->columns + c) * BLOCK;
      const placed_rows k = block_of(task, all->k + column, all->k_stride, row);
      const placed_rows v = block_of(task, all->v + column, all->v_stride, row);
      pack_block(k, LEFT, task->k_left + to);
      pack_block(v, backward ? LEFT : LEFT_TRANSPOSED, task->v_left + to);
      if (backward) pack_block(k, LEFT_TRANSPOSED, task->k_left_transposed + to);
    }
  }
}

static void pack_all_keys(void *data) {
  struct batch *batch = data;
  for (long i = 0; i < batch->count; i++) pack_keys(&batch->tasks[i]);
}

/* Of 32 queries: over the keys so far, the maximum of the scores or a little less, and the sum of
 * exponentials. */
struct state {
  __m512 maximum[2], sum[2];
};

/* The exponentials of scores, as right factors, and their sum. */
struct exponentials {
  struct work work;
  const float *scores;
  element *weights;
  __m512 factor, offset[2], sum[2];
};

UNITS_INLINE void exponentials_step(struct work *work) {
  struct exponentials *own = (struct exponentials *)work;
  for (int half = 0; half < 2; half++) {
    const float *row = own->scores + 16 * half;
    __m512 x = _mm512_fmsub_ps(_mm512_load_ps(row), own->factor, own->offset[half]);
    __m512 y = _mm512_fmsub_ps(_mm512_load_ps(row + AREA / 2), own->factor, own->offset[half]);
    x = power_of_2(x);
    y = power_of_2(y);
    own->sum[half] = _mm512_add_ps(own->sum[half], _mm512_add_ps(x, y));
    split_right(x, y, own->weights, half);
  }
  own->scores += SIDE;
  own->weights += SIDE;
  if (work->left % 16 == 0) {
    own->scores += AREA / 2;
    own->weights += BLOCK - TILE;
  }
}

/* Some blocks of keys, for a block of queries of the group. */
struct chunk {
  long key, count, query;
  struct exponentials exponentials;
  float *scores; /* [WIDTH][AREA] */
  element *weights; /* [WIDTH][BLOCK] */
};

/* A thread's memory. */
struct forward {
  const element *k, *v;      /* of the head */
  element *q;                /* [WIDTH][column][BLOCK] */
  float *out;             /* [WIDTH][column][AREA], transposed */
  struct state *state;    /* [WIDTH] */
  struct chunk chunks[3]; /* at their three stages: see attend_group */
};

static struct forward forward_memory(char **from, long columns) {
  struct forward memory = {0};
  memory.q = take(from, WIDTH * columns * BLOCK * sizeof(element));
  memory.out = take(from, WIDTH * columns * AREA * sizeof(float));
  memory.state = take(from, WIDTH * sizeof(struct state));
  for (int i = 0; i < 3; i++) {
    memory.chunks[i].scores = take(from, WIDTH * AREA * sizeof(float));
    memory.chunks[i].weights = take(from, WIDTH * BLOCK * sizeof(element));
  }
  return memory;
}

/* Raises the maximum, if new scores are so far above it that exponentials might overflow: seldom,
 * for then what was summed up must be scaled. */
UNITS_INLINE void raise_maximum(struct state *state, const float *scores, long count, __m512 factor,
                              float *out, long columns) {
  __m512 seen[2] = {state->maximum[0], state->maximum[1]};
  for (long i = 0; i < count * SIDE; i++)
    for (int half = 0; half < 2; half++)
      seen[half] = _mm512_max_ps(seen[half], _mm512_load_ps(scores + SIDE * i + 16 * half));
  for (int half = 0; half < 2; half++) {
    __m512 rise = _mm512_mul_ps(_mm512_sub_ps(seen[half], state->maximum[half]), factor);
    if (!_mm512_cmp_ps_mask(rise, _mm512_set1_ps(20.0f), _CMP_GT_OQ))
      continue;
    __m512 shrink = power_of_2(_mm512_sub_ps(_mm512_setzero_ps(), rise));
    state->maximum[half] = seen[half];
    state->sum[half] = _mm512_mul_ps(state->sum[half], shrink);
    for (long i = 0; i < columns * SIDE; i++) {
      float *row = out + SIDE * i + 16 * half;
      _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), shrink));
    }
  }
}

/* Once, not in each place: the steps make it long. */
UNITS static void multiply_and_exponentiate(const element *a, long a_step, const element *b, long b_step,
                                          long count, float *c, int add, struct work *work) {
  multiply(a, a_step, b, b_step, count, c, add, work, exponentials_step);
}

/* First stage: scores. */
UNITS_INLINE void begin_chunk(struct task *task, struct forward *memory, struct chunk *chunk,
                            int diagonal, struct work *work) {
  const long packed = task->columns * BLOCK;
  for (long i = 0; i < chunk->count; i++)
    multiply_and_exponentiate(memory->k + (chunk->key + i) * packed, BLOCK,
                              memory->q + chunk->query * packed, BLOCK, task->columns,
                              chunk->scores + i * AREA, 0, work);
  if (diagonal)
    mask_diagonal(chunk->scores + (chunk->count - 1) * AREA, -1e30f);
}

/* Second stage: exponentials. */
UNITS_INLINE void plan_exponentials(struct task *task, struct forward *memory, struct chunk *chunk) {
  struct state *state = memory->state + chunk->query;
  __m512 factor = _mm512_set1_ps(LOG2_E);
  raise_maximum(state, chunk->scores, chunk->count, factor,
                memory->out + chunk->query * task->columns * AREA, task->columns);
  chunk->exponentials = (struct exponentials){
      .work = {.left = 16 * chunk->count, .interval = 12 * task->columns},
      .scores = chunk->scores,
      .weights = chunk->weights,
      .factor = factor,
      .offset = {_mm512_mul_ps(state->maximum[0], factor),
                 _mm512_mul_ps(state->maximum[1], factor)},
  };
}

UNITS_INLINE void finish_exponentials(struct forward *memory, struct chunk *chunk) {
  finish_work(&chunk->exponentials.work, exponentials_step);
  struct state *state = memory->state + chunk->query;
  for (int half = 0; half < 2; half++)
    state->sum[half] = _mm512_add_ps(state->sum[half], chunk->exponentials.sum[half]);
}

/* Third stage: adds the values of a chunk's keys, weighted. */
UNITS_INLINE void finish_chunk(struct task *task, struct forward *memory, struct chunk *chunk,
                             struct work *work) {
  const long columns = task->columns;
  float *out = memory->out + chunk->query * columns * AREA;
  for (long c = 0; chunk->count > 0 && c < columns; c++)
    multiply_and_exponentiate(memory->v + (chunk->key * columns + c) * BLOCK, columns * BLOCK,
                              chunk->weights, BLOCK, chunk->count, out + c * AREA, 1, work);
  chunk->count = 0;
}

/* What belongs to 32 queries of a head, from its transpose, each query's times a factor; to the rows
 * of the document's own. */
UNITS static void store_own(const struct task *task, const float *transposed, const __m512 factors[2],
                            float *to, long stride, long head, long block) {
  to += head * task->all.head_dim;
  for (long column = 0; column < 2 * task->columns; column++)
    for (int half = 0; half < 2; half++) {
      __m512 rows[16];
      for (int i = 0; i < 16; i++) {
        const float *from = transposed + column * AREA / 2 + i * SIDE + 16 * half;
        rows[i] = _mm512_mul_ps(_mm512_load_ps(from), factors[half]);
      }
      transpose((__m512i *)rows);
      for (long i = 0; i < 16; i++) {
        const long token = block * SIDE + 16 * half + i;
        if (token >= task->own_from && token < task->tokens)
          _mm512_storeu_ps(to + task->places[token] * stride + 16 * column, rows[i]);
      }
    }
}

/* Results of 32 queries, to their rows of `out`. */
UNITS static void finish_queries(struct task *task, long head, long block, const float *sums,
                               struct state *state) {
  float offset[SIDE], sum[SIDE];
  __m512 inverse[2];
  long there = smaller(SIDE, task->tokens - block * SIDE);
  for (int half = 0; half < 2; half++) {
    inverse[half] = _mm512_div_ps(_mm512_set1_ps(1.0f), state->sum[half]);
    _mm512_storeu_ps(offset + 16 * half,
                     _mm512_mul_ps(state->maximum[half], _mm512_set1_ps(LOG2_E)));
    _mm512_storeu_ps(sum + 16 * half, state->sum[half]);
  }
  const long first = block * SIDE;
  float *normalizer = task->normalizer + head * task->tokens + first;
  for (long i = 0; i < there; i++)
    normalizer[i] = (float)(offset[i] / (double)LOG2_E + logf(sum[i]));
  store_own(task, sums, inverse, task->all.out, task->all.heads * task->all.head_dim, head, block);
}

UNITS static void pack_queries(struct task *task, struct forward *memory, long head, long block,
                             long at) {
  const attended *all = &task->all;
  for (long c = 0; c < task->columns; c++)
    pack_scaled(block_of(task, all->q + head * all->head_dim + c * SIDE, all->q_stride, block * SIDE),
                RIGHT_TRANSPOSED, all->scale, memory->q + (at * task->columns + c) * BLOCK);
  struct state *state = memory->state + at;
  for (int half = 0; half < 2; half++) {
    state->maximum[half] = _mm512_set1_ps(-1e30f);
    state->sum[half] = _mm512_setzero_ps();
  }
}

/* Attention of a group of queries of one head. */
UNITS static void attend_group(struct task *task, struct forward *memory, long head, long group) {
  const long columns = task->columns, packed = columns * BLOCK, first = group * WIDTH;
  const long count = smaller(WIDTH, task->blocks - first);
  const long kv_head = head / (task->all.heads / task->all.kv_heads);
  const long start = blocks_before_own(task, group);
  memory->k = task->k_left + kv_head * task->blocks * packed;
  memory->v = task->v_left + kv_head * task->blocks * packed;
  memset(memory->out, 0, WIDTH * columns * AREA * sizeof(float));
  for (long i = start; i < count; i++)
    pack_queries(task, memory, head, first + i, i);
  /* Three chunks at a time: while tile units, if there are such, multiply for the first and the
   * third, the vector units compute the exponentials of the second. */
  struct chunk *next = memory->chunks, *current = next + 1, *last = next + 2;
  for (int i = 0; i < 3; i++) {
    memory->chunks[i].count = 0;
    memory->chunks[i].exponentials.work = (struct work){.left = 0, .interval = 16};
  }
  for (long key = 0; key < first + count; key += WIDTH)
    for (long i = start; i < count; i++) {
      struct work *work = &current->exponentials.work;
      next->key = key;
      next->query = i;
      next->count = smaller(WIDTH, first + i + 1 - key);
      begin_chunk(task, memory, next, key + next->count == first + i + 1, work);
      finish_chunk(task, memory, last, work);
      if (current->count)
        finish_exponentials(memory, current);
      /* The sums of these queries may be scaled now: nothing of the old scale may follow. */
      if (current->query == i)
        finish_chunk(task, memory, current, &next->exponentials.work);
      plan_exponentials(task, memory, next);
      struct chunk *free = last;
      last = current;
      current = next;
      next = free;
    }
  finish_chunk(task, memory, last, &current->exponentials.work);
  finish_exponentials(memory, current);
  finish_chunk(task, memory, current, &current->exponentials.work);
  for (long i = start; i < count; i++)
    finish_queries(task, head, first + i, memory->out + i * columns * AREA, memory->state + i);
}

UNITS static void attend_items(void *data) {
  struct batch *batch = data;
  char *own = own_scratch(batch);
  struct forward memory = forward_memory(&own, batch->tasks->columns);
  begin_products();
  for (struct task *task = batch->tasks; task < batch->tasks + batch->count; task++) {
    const long heads = task->all.heads, items = heads * (task->groups - task->first_group);
    for (long item; (item = atomic_fetch_add(&task->next, 1)) < items;)
      /* Those with most keys first, for the threads to end at about the same time. */
      attend_group(task, &memory, item % heads, task->groups - 1 - item / heads);
  }
  end_products();
}

/* The size of a thread's memory. */
static size_t forward_size(long columns) {
  char *end = NULL;
  forward_memory(&end, columns);
  return (size_t)end;
}

/* The task of a document, of which `before` tokens of all documents come before it. */
static struct task task_of(const attended *all, long document, long before) {
  const long tokens = all->lengths[document][0], own_from = tokens - all->lengths[document][1];
  return (struct task){
      .all = *all, .places = all->places + before, .normalizer = all->normalizer + all->heads * before,
      .tokens = tokens, .own_from = own_from, .blocks = divided_up(tokens, SIDE),
      .first_block = own_from / SIDE, .columns = all->head_dim / SIDE,
      .groups = divided_up(tokens, WIDTH * SIDE), .first_group = own_from / (WIDTH * SIDE),
  };
}

/* The next documents, from number `document` on, which goes on: one of any length, or as many as have
   TOKENS_TOGETHER at most, each in whole blocks.  `before` counts the tokens of all documents before
   them. */
static void next_batch(struct batch *batch, const attended *all, long *document, long *before) {
  long blocks = 0;
  for (batch->count = 0; *document < all->documents && batch->count < MOST_TOGETHER;) {
    const struct task task = task_of(all, *document, *before);
    if (batch->count && (blocks += task.blocks) > TOKENS_TOGETHER / SIDE) break;
    blocks = batch->count ? blocks : task.blocks;
    *before += task.tokens;
    ++*document;
    /* Else another document is the same. */
    if (task.own_from < task.tokens) batch->tasks[batch->count++] = task;
  }
}

static void attend(const attended *all, unsigned threads, parallel_fn parallel) {
  struct batch batch;
  for (long document = 0, before = 0; document < all->documents;) {
    next_batch(&batch, all, &document, &before);
    if (!batch.count) break;
    char *from = all->workspace;
    for (struct task *task = batch.tasks; task < batch.tasks + batch.count; task++) {
      task->k_left = take(&from, packed_size(task));
      task->v_left = take(&from, packed_size(task));
    }
    batch.scratch = from;
    batch.scratch_size = forward_size(batch.tasks->columns);
    run_batch(&batch, pack_all_keys, threads, parallel);
    run_batch(&batch, attend_items, threads, parallel);
  }
}

#endif
