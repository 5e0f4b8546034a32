// $(summary)$
//
// A block owns a token; a thread copies eight components at a time.
#include "kiln/linear.cuh"

using T = $(element)$;

constexpr uint32_t WIDTH = $(width)$;
/*%- if let Some(weights) = tokens %*/

using W = $(weights)$;
/*%- endif %*/

KILN_KERNEL(THREADS, 4)
$(entry)$($(parameters)$) {
    start_next();
    wait_for_previous();
    const uint32_t row = blockIdx.x;
    if (row >= step.counts->tokens) return;
/*%- if tokens.is_some() %*/
    uint32_t id = step.token_ids[row];
    if (id >= LAST_SAMPLED) id = step.last_sampled[id - LAST_SAMPLED];
/*%- endif %*/
/*%- if positions %*/
    const T* const position = positions + (step.positions[row] + $(position_offset)$) * static_cast<uint64_t>(WIDTH);
/*%- endif %*/
    $(out_type)$* const to = out + row * static_cast<uint64_t>(WIDTH);
    for (uint32_t i = threadIdx.x * 8; i < WIDTH; i += THREADS * 8) {
        float x[8] = {};
/*%- if tokens.is_some() %*/
        W::row8(x, tokens, id, i);
/*%- endif %*/
/*%- if positions %*/
        float y[8];
        unpack8<T>(y, *reinterpret_cast<const uint4*>(position + i));
        for (uint32_t e = 0; e < 8; e++) x[e] += y[e];
/*%- endif %*/
/*%- if out_type == "float" %*/
        reinterpret_cast<float4*>(to + i)[0] = {x[0], x[1], x[2], x[3]};
        reinterpret_cast<float4*>(to + i)[1] = {x[4], x[5], x[6], x[7]};
/*%- else %*/
        *reinterpret_cast<uint4*>(to + i) = pack8<T>(x);
/*%- endif %*/
    }
}
