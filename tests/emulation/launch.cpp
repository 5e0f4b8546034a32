// The shared object of one kernel: KILN_SOURCE, the CUDA source, and KILN_ENTRY, its entry point, are
// given to the compiler.
#include "kiln/ptx.cuh"

// Without external names, which may not be shared with other objects of the process, and would make
// COMMON or unique symbols of shared variables in templates.
namespace {
#include KILN_SOURCE
}

namespace emulation {

template <typename T>
T load(const Parameter& parameter) {
    T value;
    __builtin_memcpy(&value, parameter.bytes, sizeof value);
    return value;
}

template <size_t... I>
struct Indices {};

// The parameter types of the kernel, from its address.
template <typename... P>
struct Signature {
    static bool fits(const Launch& launch) {
        size_t sizes[] = {sizeof(P)..., 0};
        if (launch.parameter_count != sizeof...(P))
            return refuse(launch, "%zu parameters: the kernel has %zu", launch.parameter_count, sizeof...(P));
        for (size_t i = 0; i < sizeof...(P); i++)
            if (launch.parameters[i].size != sizes[i])
                return refuse(launch, "parameter %zu has %zu bytes: the kernel's has %zu", i,
                                         launch.parameters[i].size, sizes[i]);
        return true;
    }

    template <size_t... I>
    static void call(void (*kernel)(P...), const Parameter* parameters, Indices<I...>) {
        kernel(load<P>(parameters[I])...);
    }

    static void call(void (*kernel)(P...), const Parameter* parameters) {
        call(kernel, parameters, Indices<__integer_pack(sizeof...(P))...>{});
    }
};

template <typename... P>
Signature<P...> signature(void (*)(P...)) {
    return {};
}

using Kernel = decltype(signature(::KILN_ENTRY));

static void call(const Parameter* parameters) { Kernel::call(::KILN_ENTRY, parameters); }

}  // namespace emulation

extern "C" __attribute__((visibility("default"))) int kiln_emulate(const emulation::Launch* launch) {
    return emulation::Kernel::fits(*launch) && emulation::run(*launch, emulation::call) ? 0 : 1;
}

extern "C" __attribute__((visibility("default"))) void kiln_free_pool(void* pool) { emulation::free_pool(pool); }
