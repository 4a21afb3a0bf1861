/* x W and x W^T in fp32, by AMX's bf16 units: see parts.h for why that is exact.

   Blocks of x and of W are copied to where their tiles lie one after the other, split into parts
   on the way.  A block of W is split into three only if it is not bf16 already, which the first
   copy of it finds out. */
#include "multiply.h"
#include "parts.h"

#if LORAKIT_HAS_KERNELS

/* Results are made 16 rows by 64 columns at a time, four tiles of sums: 16 rows of x in three parts
   then take the other registers but one, through which W goes. */
enum { WIDE = 64, ACROSS = WIDE / TILE_ROWS };

/* What is copied at a time: of x as many rows as amortize copying W, as far along as a core's first
   cache holds 16 rows of them, and of W what the second one (2 MB, maybe shared with another thread)
   holds beside all rows. */
enum { ROWS = 256, INNER = 288, WEIGHT_BYTES = 1 << 19 };

/* 32 numbers of a row from `at` on, or fewer and zeros behind them. */
AMX_INLINE numbers load(const float *row, long at, long left) {
  numbers x = {load_numbers(row + at, left), load_numbers(row + at + 16, left - 16)};
  return x;
}

/* Of a row of W so many of 16 numbers from `at` on, and zeros. */
AVX512_INLINE __m512 load_weight(matrix w, long row, long at, long count) {
  const long place = row * w.stride + at;
  if (!w.bf16) return load_numbers((const float *)w.values + place, count);
  const uint16_t *from = (const uint16_t *)w.values + place;
  return widened(_mm256_maskz_loadu_epi16(first_of_16(count), from));
}

AMX_INLINE numbers load_weights(matrix w, long row, long at, long left) {
  numbers x = {load_weight(w, row, at, left), load_weight(w, row, at + 16, left - 16)};
  return x;
}

/* Tiles of x: for 16 rows at a time and 32 columns at a time, the three parts. */
AMX static void copy_rows(const factors *f, long row0, long rows, long at0, long inner,
                          uint16_t *tiles) {
  const long steps = round_up(inner, DEPTH) / DEPTH;
  for (long row = 0; row < round_up(rows, TILE_ROWS); row++) {
    const float *from = f->x + (row0 + row) * f->x_stride + at0;
    uint16_t *to = tiles + row / TILE_ROWS * steps * PARTS * TILE_NUMBERS + row % TILE_ROWS * DEPTH;
    for (long step = 0; step < steps; step++) {
      const long at = step * DEPTH;
      const long there = row < rows ? inner - at : 0;
      numbers x = load(from, at, there);
      if (f->scale) {
        const numbers factor = load(f->scale + at0, at, there);
        x.low = _mm512_mul_ps(x.low, factor.low);
        x.high = _mm512_mul_ps(x.high, factor.high);
      }
      for (int part = 0; part < PARTS; part++, to += TILE_NUMBERS) {
        _mm512_store_si512(to, as_bf16(take_part(&x, part == PARTS - 1)));
      }
    }
  }
}

/* Which bits of the numbers bf16 does not keep. */
AMX_INLINE __m512i lower(numbers x) {
  const __m512i mask = _mm512_set1_epi32(0xFFFF);
  return _mm512_and_si512(_mm512_or_si512(bits(x.low), bits(x.high)), mask);
}

/* Tiles of W^T, for 64 of W's rows at a time, in so many parts: 1 or all.  Returns whether one part
   was not all there is to W. */
AMX_INLINE int copy_transposed(matrix w, long row0, long rows, long at0, long inner, int parts,
                               uint16_t *tiles) {
  const long steps = round_up(inner, DEPTH) / DEPTH;
  __m512i lost = _mm512_setzero_si512();
  for (long row = 0; row < round_up(rows, WIDE); row += TILE_ROWS) {
    const long tile_of_row = row / WIDE * steps * ACROSS + row % WIDE / TILE_ROWS;
    uint16_t *to = tiles + tile_of_row * parts * TILE_NUMBERS;
    for (long step = 0; step < steps; step++, to += (ACROSS - 1) * parts * TILE_NUMBERS) {
      const long at = step * DEPTH;
      numbers x[TILE_ROWS];
#pragma GCC unroll 16
      for (long i = 0; i < TILE_ROWS; i++) {
        x[i] = load_weights(w, row0 + row + i, at0 + at, row + i < rows ? inner - at : 0);
        if (parts == 1) lost = _mm512_or_si512(lost, lower(x[i]));
      }
      for (int part = 0; part < parts; part++, to += TILE_NUMBERS) {
        __m512i tile[TILE_ROWS];
#pragma GCC unroll 16
        for (int i = 0; i < TILE_ROWS; i++) tile[i] = as_bf16(take_part(&x[i], part == parts - 1));
        transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < TILE_ROWS; i++) {
          _mm512_store_si512(to + i * DEPTH, tile[i]);
        }
      }
    }
  }
  return _mm512_test_epi32_mask(lost, lost) != 0;
}

/* Two numbers above each other side by side, as bf16. */
AMX_INLINE __m512i interleaved(__m512 even, __m512 odd) {
  return _mm512_or_si512(_mm512_srli_epi32(bits(even), 16), bits(upper(bits(odd))));
}

/* Tiles of W, for 64 of its columns at a time; as above. */
AMX_INLINE int copy_straight(matrix w, long column0, long columns, long at0, long inner, int parts,
                             uint16_t *tiles) {
  const long steps = round_up(inner, DEPTH) / DEPTH;
  __m512i lost = _mm512_setzero_si512();
  for (long at = 0; at < round_up(inner, DEPTH); at += 2) {
    for (long column = 0; column < round_up(columns, WIDE); column += DEPTH) {
      const long tile = (column / WIDE * steps + at / DEPTH) * ACROSS + column % WIDE / TILE_ROWS;
      uint16_t *to = tiles + tile * parts * TILE_NUMBERS + at % DEPTH / 2 * DEPTH;
      const long left = columns > column ? columns - column : 0;
      numbers even = load_weights(w, at0 + at, column0 + column, at < inner ? left : 0);
      numbers odd = load_weights(w, at0 + at + 1, column0 + column, at + 1 < inner ? left : 0);
      if (parts == 1) lost = _mm512_or_si512(lost, _mm512_or_si512(lower(even), lower(odd)));
      for (int part = 0; part < parts; part++) {
        const numbers above = take_part(&even, part == parts - 1);
        const numbers below = take_part(&odd, part == parts - 1);
        uint16_t *pair = to + part * TILE_NUMBERS;
        _mm512_store_si512(pair, interleaved(above.low, below.low));
        _mm512_store_si512(pair + parts * TILE_NUMBERS, interleaved(above.high, below.high));
      }
    }
  }
  return _mm512_test_epi32_mask(lost, lost) != 0;
}

AMX static int copy_weights(const product *p, long column0, long columns, long at0, long inner,
                            int parts, uint16_t *tiles) {
  const matrix w = p->first.weight;
  /* Constants, so that each case is compiled for itself. */
  if (p->transposed) {
    return parts == 1 ? copy_transposed(w, column0, columns, at0, inner, 1, tiles)
                      : copy_transposed(w, column0, columns, at0, inner, PARTS, tiles);
  }
  return parts == 1 ? copy_straight(w, column0, columns, at0, inner, 1, tiles)
                    : copy_straight(w, column0, columns, at0, inner, PARTS, tiles);
}

/* tmm0 to tmm3 += 16 rows of x times 64 columns of W, over so many tiles of 32. */
AMX_INLINE void add_up(const uint16_t *x, const uint16_t *w, long steps, int weight_parts) {
/* A macro, for a tile's number has to be a literal. */
#define ADD_TIMES(sums)                     \
  for (int part = 0; part < weight_parts; part++, w += TILE_NUMBERS) { \
    _tile_loadd(4, w, 64);                  \
    _tile_dpbf16ps(sums, 5, 4);             \
    if (part < 2) _tile_dpbf16ps(sums, 6, 4); \
    if (part < 1) _tile_dpbf16ps(sums, 7, 4); \
  }
  for (long step = 0; step < steps; step++, x += PARTS * TILE_NUMBERS) {
    _tile_loadd(5, x, 64);
    _tile_loadd(6, x + TILE_NUMBERS, 64);
    _tile_loadd(7, x + 2 * TILE_NUMBERS, 64);
    ADD_TIMES(0)
    ADD_TIMES(1)
    ADD_TIMES(2)
    ADD_TIMES(3)
  }
#undef ADD_TIMES
}

AMX_INLINE void store_sums(float *to, long stride) {
  _tile_stored(0, to, stride * 4);
  _tile_stored(1, to + TILE_ROWS, stride * 4);
  _tile_stored(2, to + 2 * TILE_ROWS, stride * 4);
  _tile_stored(3, to + 3 * TILE_ROWS, stride * 4);
}

/* 16 x 64 results, or what there is of them. */
AMX static void multiply_block(const uint16_t *x, const uint16_t *w, long steps, int parts,
                               float *out, long stride, long rows, long columns,
                               const float *ratio, int add) {
  STORES_DONE();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (parts == 1)
    add_up(x, w, steps, 1);
  else
    add_up(x, w, steps, PARTS);
  if (!add && !ratio && rows >= TILE_ROWS && columns >= WIDE) {
    store_sums(out, stride);
    return;
  }
  /* Sums over parts of a long inner side are added up here: within one, rounding would grow. */
  float sums[TILE_ROWS * WIDE] __attribute__((aligned(64)));
  store_sums(sums, WIDE);
  STORES_DONE();
  for (long row = 0; row < smaller(rows, TILE_ROWS); row++) {
    for (long half = 0; half < smaller(columns, WIDE); half += 16) {
      const long left = columns - half;
      const __mmask16 mask = left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1);
      float *to = out + row * stride + half;
      const __m512 sum = _mm512_load_ps(sums + row * WIDE + half);
      const __m512 factors = load_ratio(ratio ? ratio + half : NULL, mask);
      const __m512 before = _mm512_maskz_loadu_ps(add ? mask : 0, to);
      _mm512_mask_storeu_ps(to, mask, scaled_and_added(sum, factors, before));
    }
  }
}

AMX static int multiply_share(const product *p) {
  const long of_x = round_up(smaller(p->rows, ROWS), TILE_ROWS) *
                    round_up(smaller(p->first.inner, INNER), DEPTH) * PARTS;
  uint16_t *x = kept(2 * of_x + WEIGHT_BYTES);
  if (!x) return 1;
  uint16_t *w = x + of_x;
  int parts = p->first.weight.bf16 ? 1 : 0; /* 0: not known yet */
  configure_tiles();
  for (long row = 0; row < p->rows; row += ROWS) {
    const long rows = smaller(p->rows - row, ROWS);
    for (long at = 0; at < p->first.inner; at += INNER) {
      const long inner = smaller(p->first.inner - at, INNER), steps = round_up(inner, DEPTH) / DEPTH;
      const int add = p->add || at > 0;
      copy_rows(&p->first, row, rows, at, inner, x);
      long width;
      for (long column = 0; column < p->columns; column += width) {
        const int most = parts == 1 ? 1 : PARTS;
        width = WEIGHT_BYTES / (2 * steps * DEPTH * most) / WIDE * WIDE;
        const long columns = smaller(p->columns - column, width);
        if (parts != PARTS && copy_weights(p, column, columns, at, inner, 1, w)) parts = PARTS;
        if (parts == PARTS) copy_weights(p, column, columns, at, inner, PARTS, w);
        const int now = parts == PARTS ? PARTS : 1;
        for (long i = 0; i < rows; i += TILE_ROWS) {
          for (long j = 0; j < columns; j += WIDE) {
            multiply_block(x + i * steps * DEPTH * PARTS, w + j * steps * DEPTH * now, steps, now,
                           p->out + (row + i) * p->out_stride + column + j, p->out_stride,
                           rows - i, columns - j, p->ratio ? p->ratio + column + j : NULL, add);
          }
        }
      }
    }
  }
  _tile_release();
  if (!p->more.inner) return 0;
  product rest = *p;
  rest.first = p->more;
  rest.more.inner = 0;
  rest.add = 1;
  return multiply_on_avx512.multiply(&rest);
}

const multiply_units multiply_on_amx = {.multiply = multiply_share, .block = WIDE, .copies_x = 1};

#endif
