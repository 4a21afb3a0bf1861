/* Attention in plain fp32: `blocks_avx512.h` multiplies the blocks, all else is in headers. */
#include "blocks_avx512.h"

#include "attention_forward.h"

#include "attention_backward.h"

#if LORAKIT_HAS_KERNELS
const struct attention attention_on_avx512 = {attend, attend_backward, attention_bytes};
#endif
