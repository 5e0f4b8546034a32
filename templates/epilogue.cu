// What becomes of two neighbouring outputs n and n + 1 of a row: $(epilogue.summary())$.
struct Epilogue {
/*%- if let Some(added) = epilogue.residual %*/
    const float* residual;  // (.., N)
/*%- if added.mapped %*/
    const uint32_t* logit_rows;  // of the residual
/*%- endif %*/
/*%- endif %*/
/*%- if let Some(norm) = epilogue.residual_norm() %*/
    const RowSums<ROWS>& residual_sums;
/*%- if norm.weight %*/
    const float* residual_norm_weight;
/*%- endif %*/
/*%- if norm.bias %*/
    const float* residual_norm_bias;
/*%- endif %*/
/*%- endif %*/
/*%- match epilogue.output %*/
/*%- when Output::Qkv with { hidden_size, .. } %*/
    const uint32_t* kv_slots;
    T* queries;  // (M, 3 * $(hidden_size)$), of which the first third is written
    T* kv;       // the layer's keys and values in block 0
/*%- when Output::Element %*/
    T* out;  // (M, N)
/*%- else %*/
    float* out;  // (M, N)
/*%- endmatch %*/

    // The output from its sum$(epilogue.bias_phrase())$; zero where n is none.
    KILN_DEVICE float finish(uint32_t row, uint32_t n, float x$(epilogue.bias_parameter())$) const {
        if (n >= N) return 0.0f;
/*%- if epilogue.bias %*/
        x += bias;
/*%- endif %*/
/*%- if let Some(activation) = epilogue.activation() %*/
        x = $(activation)$(x);
/*%- endif %*/
/*%- if let Some(added) = epilogue.residual %*/
        const float added = load_fresh(residual + $(added.row("logit_rows", "row"))$ * static_cast<uint64_t>(N) + n);
/*%- if let Some(norm) = epilogue.residual_norm() %*/
        const Moments moments = row_moments<N>(residual_sums, row, $(norm.eps)$f);
        x += normalise(added, moments, $(norm.weight("residual_norm_weight[n]"))$, $(norm.bias("residual_norm_bias[n]"))$);
/*%- else %*/
        x += added;
/*%- endif %*/
/*%- endif %*/
        return x;
    }

    // Stores finished outputs.
    KILN_DEVICE void store(uint32_t row, uint32_t n, float x, float y) const {
        if (n >= N) return;
/*%- match epilogue.output %*/
/*%- when Output::Qkv with { hidden_size, head_dim, block_stride } %*/
        constexpr uint32_t C = $(hidden_size)$;
        constexpr uint32_t D = $(head_dim)$;
        const uint32_t pair = pack<T>(x, y);
        if (n < C) {
            *reinterpret_cast<uint32_t*>(queries + row * static_cast<uint64_t>(3 * C) + n) = pair;
            return;
        }
        const uint32_t slot = load_fresh(kv_slots + row), position = slot % BLOCK_TOKENS;
        const uint32_t head = n % C / D, component = n % D;
        T* const block = kv + slot / BLOCK_TOKENS * $(block_stride)$ull;
        if (n < 2 * C) {
            T* const keys = block + head * (D * BLOCK_TOKENS);
            *reinterpret_cast<uint32_t*>(keys + key_index(position, component)) = pair;
        } else {
            T* const values = block + (C + head * D) * BLOCK_TOKENS;
            values[value_index(position, component)].bits = static_cast<uint16_t>(pair);
            values[value_index(position, component + 1)].bits = static_cast<uint16_t>(pair >> 16);
        }
/*%- when Output::Element %*/
        *reinterpret_cast<uint32_t*>(out + row * static_cast<uint64_t>(N) + n) = pack<T>(x, y);
/*%- else %*/
/*%- if n % 2 == 0 %*/
        *reinterpret_cast<float2*>(out + row * static_cast<uint64_t>(N) + n) = {x, y};
/*%- else %*/
        out[row * static_cast<uint64_t>(N) + n] = x;
        if (n + 1 < N) out[row * static_cast<uint64_t>(N) + n + 1] = y;
/*%- endif %*/
/*%- endmatch %*/
    }
};
