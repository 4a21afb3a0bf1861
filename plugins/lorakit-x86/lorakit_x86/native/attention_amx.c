/* Attention on AMX's tiles, an fp32 number in three parts: `blocks_amx.h` multiplies the blocks, all else is in headers. */
#include "blocks_amx.h"

#include "attention_forward.h"

#include "attention_backward.h"

#if LORAKIT_HAS_KERNELS
const struct attention attention_on_amx = {attend, attend_backward, attention_bytes};
#endif
