/* The backward pass of attention: see attention.h. */
#include "attention_sums.h"

#if LORAKIT_HAS_KERNELS

/* Memory to bring into the cache before it is needed, some bytes with every step of some work. */
struct fetch {
  const char *next;
  long bytes;
};

/* What there is for a block of keys, within WIDTH times 16 steps. */
static struct fetch fetch_row(const void *from, size_t bytes) {
  return (struct fetch){from, (long)bytes / (16 * WIDTH)};
}

UNITS_INLINE void fetch_some(struct fetch *fetch) {
  for (long at = 0; at < fetch->bytes; at += 64)
    _mm_prefetch(fetch->next + at, _MM_HINT_T1);
  fetch->next += fetch->bytes;
}

/* Weights exp(score - normalizer) of a row of blocks, as left factors, and the gradients of their
 * scores: weight (dweight - delta). */
struct gradients {
  struct work work;
  const float *scores;
  float *dweights; /* becomes the gradients of scores */
  element *weights;
  const float *normalizer, *delta;
  struct fetch fetches[5];
};

UNITS_INLINE void gradients_step(struct work *work) {
  struct gradients *own = (struct gradients *)work;
  for (int i = 0; i < 5; i++)
    fetch_some(&own->fetches[i]);
  for (int row = 0; row < 2; row++) {
    __m512 weights[2];
    for (int half = 0; half < 2; half++) {
      __m512 score = _mm512_load_ps(own->scores + row * AREA / 2 + 16 * half);
      float *dweight = own->dweights + row * AREA / 2 + 16 * half;
      /* Exact near the normalizer, where the weight is large. */
      __m512 logarithm = _mm512_sub_ps(score, _mm512_load_ps(own->normalizer + 16 * half));
      weights[half] = power_of_2(_mm512_mul_ps(logarithm, _mm512_set1_ps(LOG2_E)));
      __m512 delta = _mm512_load_ps(own->delta + 16 * half);
      __m512 excess = _mm512_sub_ps(_mm512_load_ps(dweight), delta);
      _mm512_store_ps(dweight, _mm512_mul_ps(weights[half], excess));
    }
    split_left(weights[0], weights[1], own->weights + row * TILE);
  }
  own->scores += SIDE;
  own->dweights += SIDE;
  own->weights += SIDE;
  if (work->left % 16 == 0) {
    own->scores += AREA / 2;
    own->dweights += AREA / 2;
    own->weights += BLOCK - TILE;
    own->normalizer += SIDE;
    own->delta += SIDE;
  }
}

/* Gradients of scores of a group, as factors. */
struct splitting {
  struct work work;
  const float *from;
  element *left, *right;
  long key, query, query_count; /* the block */
  long before_own;              /* blocks of queries at the start */
  int diagonal;                 /* whether the group is: without queries that come before keys */
};

/* The first block of queries that gets something from a block of keys. */
static inline long first_query(long before_own, int diagonal, long key) {
  return diagonal && key > before_own ? key : before_own;
}

UNITS_INLINE void splitting_step(struct work *work) {
  struct splitting *own = (struct splitting *)work;
  long i = 15 - work->left % 16, at = own->key * WIDTH + own->query;
  const float *from = own->from + at * AREA + i * SIDE;
  __m512 rows[2][2] = {
      {_mm512_load_ps(from), _mm512_load_ps(from + 16)},
      {_mm512_load_ps(from + AREA / 2), _mm512_load_ps(from + AREA / 2 + 16)},
  };
  element *left = own->left + at * BLOCK + i * SIDE;
  element *right = own->right + at * BLOCK + i * SIDE;
  for (int n = 0; n < BLOCK / TILE; n++) { /* where later rows go */
    __builtin_prefetch(left + n * TILE + 4 * SIDE, 1);
    __builtin_prefetch(right + n * TILE + 4 * SIDE, 1);
  }
  split_rows(rows, left, right);
  if (i == 15 && ++own->query == own->query_count) {
    own->key++;
    own->query = first_query(own->before_own, own->diagonal, own->key);
  }
}

/* A thread's memory: a group of queries and what is computed of it and a group of keys. */
struct backward {
  element *q_right, *q_transposed, *dout_right, *dout_transposed; /* [query block][column][BLOCK] */
  float *dq;                                                   /* [query block][column][AREA] */
  float *normalizer, *delta;                                   /* [query block][SIDE] */
  long before_own; /* blocks of queries at the start of the group that are another document's */
  float *scores[2];                                            /* [query block][AREA] */
  float *dscores;                                              /* [key block][query block][AREA] */
  element *weights_left, *dscores_left, *dscores_right; /* [key block][query block][BLOCK] */
};

static struct backward backward_memory(char **from, long columns) {
  const size_t packed = (size_t)(WIDTH * columns * BLOCK) * sizeof(element);
  const size_t group = WIDTH * WIDTH * BLOCK * sizeof(element), block = AREA * sizeof(float);
  struct backward memory;
  memory.q_right = take(from, packed);
  memory.q_transposed = take(from, packed);
  memory.dout_right = take(from, packed);
  memory.dout_transposed = take(from, packed);
  memory.dq = take(from, (size_t)(WIDTH * columns) * block);
  memory.normalizer = take(from, WIDTH * SIDE * sizeof(float));
  memory.delta = take(from, WIDTH * SIDE * sizeof(float));
  memory.scores[0] = take(from, WIDTH * block);
  memory.scores[1] = take(from, WIDTH * block);
  memory.dscores = take(from, WIDTH * WIDTH * block);
  memory.weights_left = take(from, group);
  if (RESULTS_ARE_FACTORS) {
    memory.dscores_left = memory.dscores_right = (element *)memory.dscores;
  } else {
    memory.dscores_left = take(from, group);
    memory.dscores_right = take(from, group);
  }
  return memory;
}

/* Packs a block of queries and of gradients, which are zeros for another document's tokens. */
UNITS static void pack_gradients(struct task *task, struct backward *memory, long head, long block,
                               long at) {
  const attended *all = &task->all;
  const long row = block * SIDE, offset = head * all->head_dim;
  const long out_stride = all->heads * all->head_dim, dout_stride = task->gradients.dout_stride;
  const float *dout = task->gradients.dout + offset, *out = all->out + offset;
  for (long c = 0; c < task->columns; c++) {
    const long to = (at * task->columns + c) * BLOCK, from = c * SIDE;
    const placed_rows q = block_of(task, all->q + offset + from, all->q_stride, row);
    placed_rows own = block_of(task, dout + from, dout_stride, row);
    own.first = task->own_from - row;
    pack_block(q, RIGHT, memory->q_right + to);
    pack_scaled(q, RIGHT_TRANSPOSED, all->scale, memory->q_transposed + to);
    pack_block(own, RIGHT, memory->dout_right + to);
    pack_block(own, RIGHT_TRANSPOSED, memory->dout_transposed + to);
  }
  for (long i = 0; i < SIDE; i++) {
    const long token = row + i;
    __m512 sum = _mm512_setzero_ps();
    if (token >= task->own_from && token < task->tokens) {
      const long place = task->places[token];
      for (long j = 0; j < all->head_dim; j += 16)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(dout + place * dout_stride + j),
                              _mm512_loadu_ps(out + place * out_stride + j), sum);
    }
    memory->delta[at * SIDE + i] = _mm512_reduce_add_ps(sum);
    memory->normalizer[at * SIDE + i] =
        token < task->tokens ? task->normalizer[head * task->tokens + token] : 0;
  }
}

UNITS static void multiply_and_weigh(const element *a, const element *b, long count, float *c,
                                   struct work *work) {
  multiply(a, BLOCK, b, BLOCK, count, c, 0, work, gradients_step);
}

UNITS static void multiply_and_split(const element *a, long a_step, const element *b, long b_step,
                                   long count, float *c, int add, struct work *work) {
  multiply(a, a_step, b, b_step, count, c, add, work, splitting_step);
}

/* A group of keys, and what each of its keys gets from queries. */
struct keys {
  const element *k, *k_transposed, *v;
  float *dk, *dv;
  long count;
};

/* Weights and gradients of scores, of a group of keys and a group of queries. */
UNITS static void weigh_group(struct task *task, struct backward *memory, const struct keys *keys,
                            long queries, int diagonal) {
  const long columns = task->columns, packed = columns * BLOCK;
  struct gradients pending = {.work = {.interval = 12 * columns}};
  for (long i = 0; i < keys->count; i++) {
    const long start = first_query(memory->before_own, diagonal, i), at = i * WIDTH + start;
    float *scores = memory->scores[i % 2] + start * AREA, *dweights = memory->dscores + at * AREA;
    /* The products for these blocks, while the previous row is worked at. */
    for (long j = start; j < queries; j++)
      multiply_and_weigh(keys->k + i * packed, memory->q_transposed + j * packed, columns,
                         scores + (j - start) * AREA, &pending.work);
    for (long j = start; j < queries; j++)
      multiply_and_weigh(keys->v + i * packed, memory->dout_transposed + j * packed, columns,
                         dweights + (j - start) * AREA, &pending.work);
    finish_work(&pending.work, gradients_step);
    if (diagonal && start == i)
      mask_diagonal(scores, -1e30f);
    pending = (struct gradients){
        .work = {.left = 16 * (queries - start), .interval = 12 * columns},
        .scores = scores,
        .dweights = dweights,
        .weights = memory->weights_left + at * BLOCK,
        .normalizer = memory->normalizer + start * SIDE,
        .delta = memory->delta + start * SIDE,
    };
    if (!diagonal) {
      /* A part of the next group of keys. */
      const long next = i + WIDTH;
      struct fetch *fetches = pending.fetches;
      fetches[0] = fetch_row(keys->k + next * packed, packed * sizeof(element));
      fetches[1] = fetch_row(keys->k_transposed + next * packed, packed * sizeof(element));
      fetches[2] = fetch_row(keys->v + next * packed, packed * sizeof(element));
      fetches[3] = fetch_row(keys->dk + next * columns * AREA, columns * AREA * sizeof(float));
      fetches[4] = fetch_row(keys->dv + next * columns * AREA, columns * AREA * sizeof(float));
    }
  }
  finish_work(&pending.work, gradients_step);
}

/* Adds what a group of keys and a group of queries get from each other. */
UNITS static void add_gradients(struct task *task, struct backward *memory, const struct keys *keys,
                              long queries, int diagonal, int first_queries, int first_keys) {
  const long columns = task->columns, packed = columns * BLOCK;
  long blocks = 0;
  for (long i = 0; i < keys->count; i++)
    blocks += queries - first_query(memory->before_own, diagonal, i);
  struct splitting splitting = {
      .work = {.left = RESULTS_ARE_FACTORS ? 0 : 16 * blocks, .interval = 6 * columns},
      .from = memory->dscores,
      .left = memory->dscores_left,
      .right = memory->dscores_right,
      .query = memory->before_own,
      .query_count = queries,
      .before_own = memory->before_own,
      .diagonal = diagonal,
  };
  for (long c = 0; c < columns; c++)
    for (long i = 0; i < keys->count; i++) {
      const long j = first_query(memory->before_own, diagonal, i);
      multiply_and_split(memory->weights_left + (i * WIDTH + j) * BLOCK, BLOCK,
                         memory->dout_right + j * packed + c * BLOCK, packed, queries - j,
                         keys->dv + (i * columns + c) * AREA, !first_queries, &splitting.work);
    }
  finish_work(&splitting.work, splitting_step);
  for (long c = 0; c < columns; c++)
    for (long i = 0; i < keys->count; i++) {
      const long j = first_query(memory->before_own, diagonal, i);
      multiply(memory->dscores_left + (i * WIDTH + j) * BLOCK, BLOCK,
               memory->q_right + j * packed + c * BLOCK, packed, queries - j,
               keys->dk + (i * columns + c) * AREA, !first_queries, NULL, NULL);
    }
  for (long j = memory->before_own; j < queries; j++)
    for (long c = 0; c < columns; c++)
      multiply(keys->k_transposed + c * BLOCK, packed, memory->dscores_right + j * BLOCK,
               WIDTH * BLOCK, diagonal ? j + 1 : keys->count, memory->dq + (j * columns + c) * AREA,
               !first_keys, NULL, NULL);
}

/* Gradients of a group of queries of one head, and of the keys they see. */
UNITS static void backward_group(struct task *task, struct backward *memory, long head, long split,
                               long group) {
  const long columns = task->columns, packed = columns * BLOCK, first = group * WIDTH;
  const long queries = smaller(WIDTH, task->blocks - first);
  const long heads = task->all.heads;
  const long key_blocks = head / (heads / task->all.kv_heads) * task->blocks;
  const long sum_blocks = (split * heads + head) * task->blocks;
  memory->before_own = blocks_before_own(task, group);
  for (long j = memory->before_own; j < queries; j++)
    pack_gradients(task, memory, head, first + j, j);
  for (long key = 0; key <= first; key += WIDTH) {
    const struct keys keys = {
        .k = task->k_left + (key_blocks + key) * packed,
        .k_transposed = task->k_left_transposed + (key_blocks + key) * packed,
        .v = task->v_left + (key_blocks + key) * packed,
        .dk = task->dk_parts + (sum_blocks + key) * columns * AREA,
        .dv = task->dv_parts + (sum_blocks + key) * columns * AREA,
        .count = smaller(WIDTH, task->blocks - key),
    };
    weigh_group(task, memory, &keys, queries, key == first);
    add_gradients(task, memory, &keys, queries, key == first,
                  key == first || group == split_start(task, split), key == 0);
  }
  const __m512 scale = _mm512_set1_ps(task->all.scale), factors[2] = {scale, scale};
  for (long j = memory->before_own; j < queries; j++)
    store_own(task, memory->dq + j * columns * AREA, factors, task->gradients.dq,
              task->gradients.dq_stride, head, first + j);
}

UNITS static void backward_items(void *data) {
  struct batch *batch = data;
  char *own = own_scratch(batch);
  struct backward memory = backward_memory(&own, batch->tasks->columns);
  begin_products();
  for (struct task *task = batch->tasks; task < batch->tasks + batch->count; task++) {
    const long heads = task->all.heads;
    for (long item; (item = atomic_fetch_add(&task->next, 1)) < heads * task->splits;) {
      const long head = item % heads, split = task->splits - 1 - item / heads;
      for (long i = split_start(task, split); i < split_start(task, split + 1); i++)
        backward_group(task, &memory, head, split, i);
    }
  }
  end_products();
}

/* The size of a thread's memory. */
static size_t backward_size(long columns) {
  char *end = NULL;
  backward_memory(&end, columns);
  return (size_t)end;
}

static long attention_bytes(long tokens, long heads, long kv_heads, long head_dim,
                            unsigned threads) {
  /* Of a batch of documents all may be split. */
  const long most = tokens > TOKENS_TOGETHER ? tokens : TOKENS_TOGETHER;
  const int64_t lengths[1][2] = {{most, most}};
  const attended all = {.heads = heads, .kv_heads = kv_heads, .head_dim = head_dim,
                        .lengths = lengths};
  struct task task = task_of(&all, 0, 0);
  task.splits = splits_of(&task);
  const size_t forward = 2 * packed_size(&task) + threads * forward_size(task.columns);
  const size_t backward =
      3 * packed_size(&task) + 2 * sums_size(&task) + threads * backward_size(task.columns);
  return (long)(forward > backward ? forward : backward);
}

static void attend_backward(const attended *all, const attention_gradients *gradients,
                            unsigned threads, parallel_fn parallel) {
  struct batch batch;
  for (long document = 0, before = 0; document < all->documents;) {
    next_batch(&batch, all, &document, &before);
    if (!batch.count) break;
    char *from = all->workspace;
    for (struct task *task = batch.tasks; task < batch.tasks + batch.count; task++) {
      task->gradients = *gradients;
      task->splits = splits_of(task);
      const size_t packed = packed_size(task), sums = sums_size(task);
      task->k_left = take(&from, packed);
      task->k_left_transposed = take(&from, packed);
      task->v_left = take(&from, packed);
      task->dk_parts = take(&from, sums);
      task->dv_parts = take(&from, sums);
    }
    batch.scratch = from;
    batch.scratch_size = backward_size(batch.tasks->columns);
    run_batch(&batch, pack_all_keys, threads, parallel);
    run_batch(&batch, backward_items, threads, parallel);
    run_batch(&batch, sum_items, threads, parallel);
  }
}

#endif
