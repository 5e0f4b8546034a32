// $(summary)$
//
// A block owns a row.
#include "kiln/linear.cuh"

using T = $(element)$;

constexpr uint32_t WIDTH = $(width)$;

KILN_KERNEL(THREADS, 2)
$(entry)$($(parameters)$) {
/*%- if norm.is_some() %*/
    __shared__ RowSums<1> sums;
/*%- endif %*/
    start_next();
    wait_for_previous();
    const uint32_t row = blockIdx.x;
    if (row >= step.counts->$(input.count())$) return;
    const float* const from = input + $(input.row("row"))$ * static_cast<uint64_t>(WIDTH);
    $(out_type)$* const to = out + row * static_cast<uint64_t>(WIDTH);
/*%- if let Some(norm) = norm %*/
    sum_rows<WIDTH, 1>(sums, [&](uint32_t) { return from; }, 1);
    const Moments moments = row_moments<WIDTH>(sums, 0, $(norm.eps)$f);
/*%- endif %*/
    for (uint32_t i = threadIdx.x * 8; i < WIDTH; i += THREADS * 8) {
        float x[8];
        load8(x, from + i);
/*%- if let Some(norm) = norm %*/
/*%- if norm.weight %*/
        float scale[8];
        load8(scale, norm_weight + i);
/*%- endif %*/
/*%- if norm.bias %*/
        float shift[8];
        load8(shift, norm_bias + i);
/*%- endif %*/
        for (uint32_t e = 0; e < 8; e++) x[e] = normalise(x[e], moments, $(norm.weight("scale[e]"))$, $(norm.bias("shift[e]"))$);
/*%- endif %*/
/*%- if out_type == "float" %*/
        reinterpret_cast<float4*>(to + i)[0] = {x[0], x[1], x[2], x[3]};
        reinterpret_cast<float4*>(to + i)[1] = {x[4], x[5], x[6], x[7]};
/*%- else %*/
        *reinterpret_cast<uint4*>(to + i) = pack8<T>(x);
/*%- endif %*/
    }
}
