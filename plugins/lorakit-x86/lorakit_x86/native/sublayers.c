#include "sublayers.h"

#if LORAKIT_HAS_KERNELS

#include "gate.h"
#include "norm.h"
#include "rotate.h"
#include "rows.h"

/* Where a matrix is, whose rows are so many numbers apart. */
typedef struct {
  float *at;
  long stride;
} place;

/* Where `count` parts of these widths are, which are made by a layer each, or side by side by one. */
static void find_parts(const sublayer *half, float *from, const long widths[], int count,
                       place parts[]) {
  const int apart = half->inner_count > 1;
  for (int i = 0; i < count; i++) {
    parts[i] = (place){from, apart ? widths[i] : half->inner[0].outputs};
    from += widths[i] * (apart ? half->rows : 1);
  }
}

static float *low_of(const sublayer *half, const carried *kept, long layer) {
  float *low = kept->small + half->rows;
  for (long i = 0; i < layer; i++) low += half->rows * half->inner[i].rank;
  return low;
}

static void normalize_input(const sublayer *half, const float *x, const carried *kept, float *out,
                            const machine *on) {
  normalize(out, kept->small, x, half->width, half->norm, half->eps, half->rows, half->width,
            on->threads, on->parallel);
}

/* What the inner layers make of their input. */
static int make_inner(const sublayer *half, const float *input, const carried *kept,
                      const machine *on) {
  float *to = kept->made;
  for (long i = 0; i < half->inner_count; to += half->rows * half->inner[i++].outputs)
    if (adapt(&half->inner[i], input, half->width, to, half->inner[i].outputs, 0,
              low_of(half, kept, i), on->multiply, on->threads, on->parallel))
      return 1;
  return 0;
}

/* out = x, or x + y. */
typedef struct {
  float *out;
  const float *x, *y;
  long width;
} added;

AVX512 static void add_row(const void *data, long row) {
  const added *all = data;
  const float *x = all->x + row * all->width;
  float *out = all->out + row * all->width;
  if (!all->y) {
    memcpy(out, x, (size_t)all->width * sizeof(float));
    return;
  }
  const float *y = all->y + row * all->width;
  for (long i = 0; i < all->width; i += 16) {
    const long left = all->width - i;
    const __m512 sum = _mm512_add_ps(load_numbers(x + i, left), load_numbers(y + i, left));
    _mm512_mask_storeu_ps(out + i, first_of_16(left), sum);
  }
}

static void add_rows(const sublayer *half, const float *x, const float *y, float *out,
                     const machine *on) {
  const added all = {out, x, y, half->width};
  for_each_row(add_row, &all, half->rows, on->threads, on->parallel);
}

/* out = x + what the outer layer makes of its input. */
static int add_outer(const sublayer *half, const float *x, const float *input, const carried *kept,
                     float *out, const machine *on) {
  const int apart = half->outer.ratio != NULL;
  if (!apart) add_rows(half, x, NULL, out, on);
  if (adapt(&half->outer, input, half->outer.inputs, apart ? kept->outer_made : out, half->width,
            !apart, low_of(half, kept, half->inner_count), on->multiply, on->threads, on->parallel))
    return 1;
  if (apart) add_rows(half, x, kept->outer_made, out, on);
  return 0;
}

/* The gradient of the outer layer's input. */
static int outer_backward(const sublayer *half, const float *dout, place input, const carried *kept,
                          place dinput, const factor_gradients *gradients, float *d_low,
                          const machine *on) {
  const long at = half->inner_count;
  if (half->outer.ratio)
    sum_products(dout, half->width, kept->outer_made, half->width, half->rows, half->width,
                 gradients->sums[at], on->threads, on->parallel);
  return adapt_backward(&half->outer, dout, half->width, input.at, input.stride,
                        low_of(half, kept, at), d_low, dinput.at, dinput.stride, 0,
                        gradients->down[at], gradients->up[at], on->multiply, on->threads,
                        on->parallel);
}

/* From the gradients of what the inner layers made to that of x. */
static int inner_backward(const sublayer *half, const float *dout, const float *x,
                          const carried *kept, float *dx, const factor_gradients *gradients,
                          const working *work, const machine *on) {
  const float *made = kept->made, *dmade = work->dmade;
  for (long i = 0; i < half->inner_count; i++) {
    const adapted *layer = &half->inner[i];
    const long outputs = layer->outputs;
    if (layer->ratio)
      sum_products(dmade, outputs, made, outputs, half->rows, outputs, gradients->sums[i],
                   on->threads, on->parallel);
    if (adapt_backward(layer, dmade, outputs, work->input, half->width, low_of(half, kept, i),
                       work->d_low, dx, half->width, i > 0, gradients->down[i], gradients->up[i],
                       on->multiply, on->threads, on->parallel))
      return 1;
    made += half->rows * outputs;
    dmade += half->rows * outputs;
  }
  if (dx)
    normalize_backward(dx, dx, half->width, dout, half->width, x, half->width, half->norm,
                       kept->small, half->rows, half->width, on->threads, on->parallel);
  return 0;
}

static void find_gate(const sublayer *half, float *from, place parts[2]) {
  const long hidden = half->outer.inputs;
  find_parts(half, from, (const long[]){hidden, hidden}, 2, parts);
}

static void apply_gate(const sublayer *half, const carried *kept, place out, const machine *on) {
  place made[2];
  find_gate(half, kept->made, made);
  gate(out.at, out.stride, made[0].at, made[0].stride, made[1].at, made[1].stride, half->rows,
       half->outer.inputs, on->threads, on->parallel);
}

int feed_forward(const sublayer *half, const float *x, const carried *kept, float *out,
                 const working *work, const machine *on) {
  normalize_input(half, x, kept, work->input, on);
  if (make_inner(half, work->input, kept, on)) return 1;
  apply_gate(half, kept, (place){work->outer, half->outer.inputs}, on);
  return add_outer(half, x, work->outer, kept, out, on);
}

int feed_forward_backward(const sublayer *half, const float *dout, const float *x,
                          const carried *kept, float *dx, const factor_gradients *gradients,
                          const working *work, const machine *on) {
  normalize_input(half, x, kept, work->input, on);
  if (kept->again && make_inner(half, work->input, kept, on)) return 1;
  place made[2], dmade[2];
  find_gate(half, kept->made, made);
  find_gate(half, work->dmade, dmade);
  /* silu(g) u, in whose place comes the gradient of u; that of it lies in the place of g's. */
  const place product = dmade[1], dproduct = dmade[0];
  apply_gate(half, kept, product, on);
  if (outer_backward(half, dout, product, kept, dproduct, gradients, work->d_low, on)) return 1;
  gate_backward(dmade[0].at, dmade[0].stride, dmade[1].at, dmade[1].stride, dproduct.at,
                dproduct.stride, made[0].at, made[0].stride, made[1].at, made[1].stride, half->rows,
                half->outer.inputs, on->threads, on->parallel);
  return inner_backward(half, dout, x, kept, dx, gradients, work, on);
}

enum { Q, K, V };

static void find_heads(const sublayer *half, const attended *attending, float *from,
                       place parts[3]) {
  const long q = attending->heads * attending->head_dim;
  const long k = attending->kv_heads * attending->head_dim;
  find_parts(half, from, (const long[]){q, k, k}, 3, parts);
}

static void rotate_part(place from, place to, const rotation *angles, int back, long rows,
                        long heads, long head_dim, const machine *on) {
  rotate(to.at, to.stride, from.at, from.stride, angles->cos, angles->sin, angles->stride, back,
         rows, heads, head_dim, angles->half, on->threads, on->parallel);
}

/* q and k, as they have been made, rotated into `rotated`; v where it has been made. */
static attended attending_rotated(const sublayer *half, const rotation *angles,
                                  const attended *attending, const carried *kept, float *rotated,
                                  const machine *on) {
  attended all = *attending;
  const long rows = half->rows, head_dim = all.head_dim;
  place made[3];
  find_heads(half, attending, kept->made, made);
  const place q = {rotated, all.heads * head_dim};
  const place k = {rotated + rows * q.stride, all.kv_heads * head_dim};
  rotate_part(made[Q], q, angles, 0, rows, all.heads, head_dim, on);
  rotate_part(made[K], k, angles, 0, rows, all.kv_heads, head_dim, on);
  all.q = q.at, all.q_stride = q.stride;
  all.k = k.at, all.k_stride = k.stride;
  all.v = made[V].at, all.v_stride = made[V].stride;
  return all;
}

int self_attention(const sublayer *half, const rotation *angles, const attended *attending,
                   const float *x, const carried *kept, float *out, const working *work,
                   const machine *on) {
  normalize_input(half, x, kept, work->input, on);
  if (make_inner(half, work->input, kept, on)) return 1;
  const attended all = attending_rotated(half, angles, attending, kept, work->rotated, on);
  on->attention->attend(&all, on->threads, on->parallel);
  return add_outer(half, x, all.out, kept, out, on);
}

int self_attention_backward(const sublayer *half, const rotation *angles, const attended *attending,
                            const float *dout, const float *x, const carried *kept, float *dx,
                            const factor_gradients *gradients, const working *work,
                            const machine *on) {
  const long q_width = half->outer.inputs, rows = half->rows, head_dim = attending->head_dim;
  normalize_input(half, x, kept, work->input, on);
  if (kept->again && make_inner(half, work->input, kept, on)) return 1;
  const attended all = attending_rotated(half, angles, attending, kept, work->rotated, on);
  if (outer_backward(half, dout, (place){all.out, q_width}, kept, (place){work->outer, q_width},
                     gradients, work->d_low, on))
    return 1;
  place to[3];
  find_heads(half, attending, work->dmade, to);
  const attention_gradients of_heads = {
      .dout = work->outer, .dout_stride = q_width, .dq = to[Q].at, .dk = to[K].at, .dv = to[V].at,
      .dq_stride = to[Q].stride, .dk_stride = to[K].stride, .dv_stride = to[V].stride,
  };
  on->attention->attend_backward(&all, &of_heads, on->threads, on->parallel);
  rotate_part(to[Q], to[Q], angles, 1, rows, attending->heads, head_dim, on);
  rotate_part(to[K], to[K], angles, 1, rows, attending->kv_heads, head_dim, on);
  return inner_backward(half, dout, x, kept, dx, gradients, work, on);
}

#endif
