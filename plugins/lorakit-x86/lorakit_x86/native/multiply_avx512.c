/* x W and x W^T in fp32, by AVX-512.

   W is copied first, widened, scaled or transposed on the way; x is read where it is, each row at a
   place of its own. */
#include "panels_avx512.h"

#if LORAKIT_HAS_KERNELS

/* Results are made 12 rows by a panel of 32 columns at a time, in 24 of the 32 registers. */
enum { TILE = 12 };

/* What is handled at a time: of a row as much as 12 of them have room for in a core's first cache
   (32 KB and more), and as much of W as its second has (1 MB and more). */
enum { INNER = 576, WEIGHT_BYTES = 1 << 19 };

/* Of a second pair of factors so much goes along with the end of the first. */
enum { MORE = 64 };

/* Rows of x, from the first number on that a panel is multiplied with. */
typedef struct {
  const float *x;
  long stride, inner;
} rows_of_x;

/* Some rows, of x and of what is multiplied with the end of a panel, and where their results go. */
typedef struct {
  rows_of_x first, more;
  float *out;
  long out_stride;
} tile_rows;

/* Adds `steps` of the product of `tile` rows with a panel, and goes on by as many.  The rows are found
   from every third one. */
AVX512_INLINE void add_steps(const float *third[4], long stride, const float **panel, int steps,
                             int tile, __m512 sums[TILE][2]) {
#pragma GCC unroll 4
  for (int k = 0; k < steps; k++, *panel += PANEL) {
    const __m512 right[2] = {_mm512_load_ps(*panel), _mm512_load_ps(*panel + 16)};
#pragma GCC unroll 12
    for (int i = 0; i < tile; i++) {
      const __m512 left = _mm512_set1_ps(third[i / 3][i % 3 * stride + k]);
      sums[i][0] = _mm512_fmadd_ps(left, right[0], sums[i][0]);
      sums[i][1] = _mm512_fmadd_ps(left, right[1], sums[i][1]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) third[i] += steps;
}

AVX512_INLINE void add_up(rows_of_x rows, const float *panel, int tile, __m512 sums[TILE][2]) {
  const long stride = rows.stride;
  const float *third[] = {rows.x, rows.x + 3 * stride, rows.x + 6 * stride, rows.x + 9 * stride};
  long k = 0;
  for (; k + 4 <= rows.inner; k += 4) add_steps(third, stride, &panel, 4, tile, sums);
  for (; k < rows.inner; k++) add_steps(third, stride, &panel, 1, tile, sums);
}

/* Results of `tile` rows with the panel at `column`, from which on there are so many columns. */
AVX512_INLINE void multiply_tile(const tile_rows *rows, const float *panel, long column, long columns,
                                 const float *ratio, int add, int tile) {
  const long out_stride = rows->out_stride;
  float *out = rows->out + column;
  __m512 sums[TILE][2];
#pragma GCC unroll 12
  for (int i = 0; i < tile; i++)
    for (int half = 0; half < 2; half++) {
      sums[i][half] = _mm512_setzero_ps();
      /* Where results go: fetched while they are made. */
      __builtin_prefetch(out + i * out_stride + 16 * half, 1);
    }
  add_up(rows->first, panel, tile, sums);
  if (rows->more.inner) add_up(rows->more, panel + rows->first.inner * PANEL, tile, sums);
  const __mmask16 there[2] = {first_of_16(columns), first_of_16(columns - 16)};
  const __m512 factors[2] = {load_ratio(ratio, there[0]),
                             load_ratio(ratio ? ratio + 16 : NULL, there[1])};
#pragma GCC unroll 12
  for (int i = 0; i < tile; i++)
    for (int half = 0; half < 2; half++) {
      float *to = out + i * out_stride + 16 * half;
      const __m512 before = _mm512_maskz_loadu_ps(add ? there[half] : 0, to);
      _mm512_mask_storeu_ps(to, there[half], scaled_and_added(sums[i][half], factors[half], before));
    }
}

/* No more arguments than there are registers for: what goes through memory may wait for all results
   before it to be written. */
typedef void (*tile_fn)(const tile_rows *rows, const float *panel, long column, long columns,
                        const float *ratio, int add);

/* With constants, each is compiled for itself. */
#define TILE_OF(ROWS)                                                                               \
  AVX512 static void multiply_##ROWS(const tile_rows *rows, const float *panel, long column,        \
                                     long columns, const float *ratio, int add) {                   \
    multiply_tile(rows, panel, column, columns, ratio, add, ROWS);                                  \
  }
TILE_OF(1)
TILE_OF(2)
TILE_OF(3)
TILE_OF(4)
TILE_OF(5)
TILE_OF(6)
TILE_OF(7)
TILE_OF(8)
TILE_OF(9)
TILE_OF(10)
TILE_OF(11)
TILE_OF(12)
#undef TILE_OF

/* By rows, from one on. */
static const tile_fn tiles[TILE] = {multiply_1, multiply_2, multiply_3,  multiply_4,
                                    multiply_5, multiply_6, multiply_7,  multiply_8,
                                    multiply_9, multiply_10, multiply_11, multiply_12};

static rows_of_x rows_of(part a, long row) {
  const rows_of_x rows = {a.from->x + row * a.from->x_stride + a.at, a.from->x_stride, a.inner};
  return rows;
}

/* All rows with as much of W as has been copied.  12 rows stay in the first cache for all panels. */
static void multiply_rows(const product *p, part a, part b, const float *w, long column, long columns,
                          int add) {
  const long panel = (a.inner + b.inner) * PANEL;
  const float *ratio = p->ratio ? p->ratio + column : NULL;
  for (long row = 0; row < p->rows; row += TILE) {
    const tile_rows rows = {rows_of(a, row), rows_of(b, row), p->out + row * p->out_stride + column,
                            p->out_stride};
    const tile_fn multiply = tiles[smaller(TILE, p->rows - row) - 1];
    for (long j = 0; j < columns; j += PANEL)
      multiply(&rows, w + j / PANEL * panel, j, columns - j, ratio ? ratio + j : NULL, add);
  }
}

/* Adds up one part, or two. */
static void multiply_parts(const product *p, part a, part b, int add, float *w) {
  const long inner = a.inner + b.inner, width = WEIGHT_BYTES / 4 / inner / PANEL * PANEL;
  const copy_fn copy = p->transposed ? copy_transposed : copy_straight;
  for (long column = 0; column < p->columns; column += width) {
    const long columns = smaller(p->columns - column, width);
    copy(a, column, columns, inner * PANEL, w);
    if (b.inner) copy(b, column, columns, inner * PANEL, w + a.inner * PANEL);
    multiply_rows(p, a, b, w, column, columns, add);
  }
}

static int multiply_share(const product *p) {
  float *w = kept(WEIGHT_BYTES);
  if (!w) return 1;
  const part nothing = {&p->more, 0, 0}, more = {&p->more, 0, p->more.inner};
  const int along = p->more.inner <= MORE;
  int add = p->add;
  for (long at = 0; at < p->first.inner; at += INNER, add = 1) {
    const part a = {&p->first, at, smaller(p->first.inner - at, INNER)};
    const int last = at + INNER >= p->first.inner;
    multiply_parts(p, a, last && along ? more : nothing, add, w);
  }
  for (long at = 0; at < p->more.inner && !along; at += INNER) {
    const part a = {&p->more, at, smaller(p->more.inner - at, INNER)};
    multiply_parts(p, a, nothing, 1, w);
  }
  return 0;
}

const multiply_units multiply_on_avx512 = {
    .multiply = multiply_share, .block = PANEL, .copies_x = 0};

#endif
