// A step by value, as all kernels of a model have it.
#include "kiln/step.cuh"

KILN_KERNEL(32, 1) step_by_value(const Step step, uint32_t added) {
    wait_for_previous();
    const Counts counts = *step.counts;
    if (threadIdx.x < counts.sequences) step.chosen[threadIdx.x] = step.token_ids[threadIdx.x] + counts.tokens + added;
}
