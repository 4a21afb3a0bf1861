#include "arguments.h"

#if LORAKIT_HAS_KERNELS

const kernels_of_units kernels[] = {
    [ON_AVX512] = {&attention_on_avx512, &multiply_on_avx512},
    [ON_AMX] = {&attention_on_amx, &multiply_on_amx},
};

int parse_layer(PyObject *given, adapted *layer) {
  address weight, down, up, ratio;
  long stride;
  int bf16;
  if (!PyArg_ParseTuple(given, "KlpKKKfllll", &weight, &stride, &bf16, &down, &up, &ratio,
                        &layer->scale, &layer->rows, &layer->inputs, &layer->outputs, &layer->rank))
    return 0;
  layer->weight = (matrix){numbers_at(weight), stride, bf16};
  layer->down = numbers_at(down);
  layer->up = numbers_at(up);
  layer->ratio = numbers_at(ratio);
  return 1;
}

int parse_attended(PyObject *given, attended *all) {
  address q, k, v, out, normalizer, workspace, places, lengths;
  if (!PyArg_ParseTuple(given, "KlKlKlKKKlllfKKl", &q, &all->q_stride, &k, &all->k_stride, &v,
                        &all->v_stride, &out, &normalizer, &workspace, &all->heads, &all->kv_heads,
                        &all->head_dim, &all->scale, &places, &lengths, &all->documents))
    return 0;
  all->q = numbers_at(q);
  all->k = numbers_at(k);
  all->v = numbers_at(v);
  all->out = numbers_at(out);
  all->normalizer = numbers_at(normalizer);
  all->workspace = (char *)numbers_at(workspace);
  all->places = (const int64_t *)(uintptr_t)places;
  all->lengths = (const int64_t(*)[2])(uintptr_t)lengths;
  return 1;
}

#endif
