// $(summary)$
//
// A block owns a sequence. Sums of probabilities are formed in fixed point, so that they do not depend
// on the order in which threads add; the token is a function of the row, the request's parameters, its
// seed and the token's index alone.
#include "kiln/sampling.cuh"

constexpr uint32_t V = $(vocab_size)$;
/*%- if blocks > 0 %*/
constexpr uint32_t LM_HEAD_BLOCKS = $(blocks)$;
/*%- endif %*/

KILN_KERNEL(SAMPLE_THREADS, 1)
$(entry)$($(parameters)$) {
    __shared__ SampleScratch scratch;
    start_next();
    wait_for_previous();
    if (blockIdx.x >= step.counts->draws) return;
    const Draw draw = step.draws[blockIdx.x];
    const Row row{logits + draw.row * static_cast<uint64_t>(V), V, step.lists + draw.suppressed, draw.suppressed_len};

    Candidate best{minus_infinity(), NO_TOKEN};
/*%- if blocks > 0 %*/
    if (draw.suppressed_len == 0) {
        const Candidate* const from = best_of_block + draw.row * LM_HEAD_BLOCKS;
        for (uint32_t i = threadIdx.x; i < LM_HEAD_BLOCKS; i += SAMPLE_THREADS) best = better(best, from[i]);
    } else {
        best = best_of_row(row);
    }
/*%- else %*/
    best = best_of_row(row);
/*%- endif %*/
    best = block_best(scratch, best);
    uint32_t token = best.token;
    if (token != NO_TOKEN && draw.temperature > 0.0f) token = sample_row(scratch, row, draw, best.logit);
    if (threadIdx.x == 0) {
        step.chosen[blockIdx.x] = token;
        // A row that is no number ends its sequence; until the host knows, it is fed some token.
        step.last_sampled[draw.slot] = token == NO_TOKEN ? 0 : token;
    }
}
