// $(summary)$
//
// A block owns a sequence. Where processors change the scores, they do so in a copy of the row, which
// the token is then chosen from. Sums of probabilities are formed in fixed point, so that they do not
// depend on the order in which threads add; the token is a function of the row, the request's
// parameters, its seed and the token's index alone, and of what its sequence holds.
#include "kiln/beams.cuh"
#include "kiln/processors.cuh"

constexpr uint32_t V = $(vocab_size)$;
/*%- if blocks > 0 %*/
constexpr uint32_t LM_HEAD_BLOCKS = $(blocks)$;
/*%- endif %*/

KILN_KERNEL(SAMPLE_THREADS, 2)
$(entry)$($(parameters)$) {
    __shared__ SampleScratch scratch;
    __shared__ BeamScratch beam;
    __shared__ DrawWords words;
    start_next();
    wait_for_previous();
    if (blockIdx.x >= step.counts->draws) return;
    const Draw& draw = words.fetch(step.draws + blockIdx.x);
    uint32_t* const counts = step.token_counts + draw.slot * static_cast<uint64_t>(V);
    const History history{step.histories + draw.history, counts, draw.history_len, draw.prompt_len};
    if (draw.given) history.set(draw.given == 1 ? step.lists + draw.given_from : history.tokens, V);

    Row row{logits + draw.row * static_cast<uint64_t>(V), V};
    Candidate best{minus_infinity(), NO_TOKEN};
/*%- if blocks > 0 %*/
    const Candidate* const from = best_of_block + draw.row * LM_HEAD_BLOCKS;
    for (uint32_t i = threadIdx.x; i < LM_HEAD_BLOCKS; i += SAMPLE_THREADS) best = better(best, from[i]);
/*%- else %*/
    best = best_of_logits(row);
/*%- endif %*/
    best = block_best(scratch, best);
    const bool finite = best.token != NO_TOKEN;
    float* const own = scores + blockIdx.x * static_cast<uint64_t>(V);
    if (draw.continuations_len > 0) {
        Continuation* const out = step.continuations + draw.continuations;
        if (finite) {
            log_probabilities(scratch, row, best.logit, own);
            if (draw.processed) process(own, V, draw, step.lists, history);
            best_continuations(scratch, beam, BeamScores{own, V, draw.beam_score}, draw.continuations_len, out);
        } else if (threadIdx.x == 0) {
            out[0] = {NO_TOKEN, 0.0f};
        }
        return;
    }

    uint32_t token = best.token;
    if (finite && draw.forced != NO_TOKEN) {
        token = draw.forced;
    } else if (finite) {
        if (draw.processed) {
            for (uint32_t i = threadIdx.x; i < V; i += SAMPLE_THREADS) own[i] = row.scores[i];
            process(own, V, draw, step.lists, history);
            row.scores = own;
            best = block_best(scratch, best_of_scores(row));
            token = best.token;
        }
        if (token != NO_TOKEN && draw.temperature > 0.0f) token = sample_row(scratch, row, draw, best.logit);
    }
    if (threadIdx.x == 0) {
        // A row that is no number ends its sequence; until the host knows, it is fed some token.
        const uint32_t fed = token == NO_TOKEN ? 0 : token;
        step.chosen[blockIdx.x] = token;
        step.last_sampled[draw.slot] = fed;
        if (draw.history_len > 0) history.append(fed);
    }
}
