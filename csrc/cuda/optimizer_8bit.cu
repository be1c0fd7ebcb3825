// Optimizer updates with 8-bit state: decode, step and encode each block of 256 elements in one pass.
//
// Memory bound on paper, 10 bytes per element for Adam in bfloat16, which leaves some 70 instructions per element: so a
// warp owns a block and finds its absmax without a barrier, codes are looked up in conflict-free tables
// (state_codec.cuh), and rules run on a float whose square root and quotient are the hardware's approximations (an
// error of 2 ulp; the state itself, which takes neither, is exact). One CTA per multiprocessor builds the tables once
// and walks a contiguous range of blocks. A block's registers are free once it was stepped: the next one's loads are
// then in flight while the present one is encoded.
//
// There are two loops: a plain one for whole blocks without extras, and one for anything.

#include <cstddef>

#include "loaded_block.cuh"

namespace bnb {
namespace {

// As many warps as have registers for a block; together they keep some 30 KB in flight.
template <class Rule, class P, class G>
struct Tuning {
    static constexpr bool kWide = sizeof(P) + sizeof(G) > 4;
    static constexpr int kStreams = Rule::kStates + kWide;
    static constexpr int kThreads = kStreams == 1 ? 896 : kStreams == 2 ? 768 : kStreams == 3 ? 640 : 512;
    static constexpr int kWarps = kThreads / kWarpLanes;
};

constexpr int64_t kFewTensors = 4;

__device__ __forceinline__ uint32_t largest_of_warp(uint32_t bits) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(~0u, bits);
#else
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
        bits = max(bits, __shfl_xor_sync(~0u, bits, distance));
    }
    return bits;
#endif
}

constexpr uint32_t kInfinityBits = 0x7f800000u;

// Whether a step is the rule's and nothing else.
template <class Rule>
__device__ __forceinline__ bool is_plain(const OptimizerStep& step, uint32_t index) {
    const bnb_optimizer_config& config = config_of(step, index);
    return tensor_of(step, index).key < 0 && config.gnorm_scale == 1.0f && !config.skip_zeros &&
           !(Rule::kCoupledDecay && config.decay != 0.0f);
}

// One lane's share of a block after the step: eight parameters, and their states before they are encoded.
template <class Rule, class P, class G, bool kPlain>
class Stepped {
  public:
    using Block = Loaded<Rule, P, G, uint8_t>;
    using Here = typename Block::Here;
    using Scalars = StepScalars<Quick>;

    // `offset` elements come before the block.
    __device__ __forceinline__ void step(
        const Block& block, const StateTables& tables, const Scalars& h, const Dice& dice, uint64_t offset) {
#pragma unroll
        for (int i = 0; i < kPerLane; i += 2) {
            const float first = step_one(block, tables, h, i), second = step_one(block, tables, h, i + 1);
            if (kPlain) {
                p_.set_pair(i, first, second);
            } else {
                round_pair(p_, i, first, second, dice, offset);
            }
        }
    }

    // Encode the states and store everything. `shared` is where the tables are.
    __device__ __forceinline__ void store(
        const Here& place, const StateTables& tables, const void* shared, uint32_t block) {
        if (!kPlain && block >= place.whole) clear_from(place.rest_of(block));
        uint32_t largest[Rule::kStates];
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) largest[k] = largest_of(k);
        if (largest[Rule::kStates - 1] >= kInfinityBits) {
            reset_bad(place, block);
#pragma unroll
            for (int k = 0; k < Rule::kStates; ++k) largest[k] = largest_of(k);
        }
        const bool some = !kPlain && block >= place.whole;
        P* p = block_of(place.p, block);
        if (some) {
            p_.store_some(p, place.rest_of(block));
        } else {
            p_.store(p);
        }
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) {
            const Lane<uint8_t, kGroup> codes = encoded(tables, shared, k, largest[k]);
            uint8_t* state = block_of(place.states[k], block);
            if (some) {
                codes.store_some(state, place.rest_of(block));
            } else {
                codes.store(state);
            }
        }
        if (threadIdx.x % kWarpLanes == 0) {
#pragma unroll
            for (int k = 0; k < Rule::kStates; ++k) place.absmax[k][block] = __uint_as_float(largest[k]);
        }
    }

  private:
    static constexpr int kGroup = Here::kGroup;

    // Advance the state of one element; its parameter after the step.
    __device__ __forceinline__ float step_one(const Block& block, const StateTables& tables, const Scalars& h, int i) {
        const Quick p(block.p.get(i)), g_raw(block.g.get(i));
        Quick g = g_raw;
        if (!kPlain) g = gradient_of<Rule>(h, g_raw, p);
        Quick state[Rule::kStates];
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) {
            values_[k][i] = block.state(tables, k, i);
            state[k] = Quick(values_[k][i]);
        }
        const Quick direction = Rule::direction(g, state, h);
        float moved = h.moved(p, direction, h.step_size).value;
        if (Rule::kQuotient) {  // approximate, so it need not round as others do
            moved = __fmaf_rn(-direction.value, h.step_size.value, (p * h.shrink).value);
        }
        if (!kPlain && h.skip_zeros && g_raw.value == 0.0f) return p.value;
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) values_[k][i] = state[k].value;
        return moved;
    }

    // What lies past the end of the tensor must not count in the block's absmax.
    __device__ __forceinline__ void clear_from(int64_t rest) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            if (element<kGroup>(i) < rest) continue;
#pragma unroll
            for (int k = 0; k < Rule::kStates; ++k) values_[k][i] = 0.0f;
        }
    }

    // Magnitude of the largest value of a state in the block, as bits. What is not finite is larger than all that is in
    // the last state: with a state2, where a gradient's square is not finite, it is there that it shows.
    __device__ __forceinline__ uint32_t largest_of(int k) const {
        uint32_t bits = 0;
        if (k + 1 < Rule::kStates) {
            float magnitude = 0.0f;
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) magnitude = fmaxf(magnitude, fabsf(values_[k][i]));
            bits = __float_as_uint(magnitude);
        } else {
            constexpr uint32_t kMask = Rule::kStates > Rule::kFirst ? ~0u : 0x7fffffffu;  // state2 has no sign
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) bits = max(bits, __float_as_uint(values_[k][i]) & kMask);
        }
        return largest_of_warp(bits);
    }

    // An element whose state is not finite starts anew and stays put; its block must not notice.
    __device__ __forceinline__ void reset_bad(const Here& place, uint32_t block) {
        const P* p = block_of(place.p, block);
        const int64_t rest = place.rest_of(block);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            bool bad = false;
#pragma unroll
            for (int k = 0; k < Rule::kStates; ++k) {
                bad = bad || (__float_as_uint(values_[k][i]) & 0x7fffffffu) >= kInfinityBits;
            }
            if (!bad) continue;
#pragma unroll
            for (int k = 0; k < Rule::kStates; ++k) values_[k][i] = 0.0f;
            if (element<kGroup>(i) < rest) p_.values[i] = p[element<kGroup>(i)];
        }
    }

    // Codes of the values of a state, scaled by the block's largest.
    __device__ __forceinline__ Lane<uint8_t, kGroup> encoded(
        const StateTables& tables, const void* shared, int k, uint32_t largest) const {
        const float factor = 1.0f / floored_absmax(__uint_as_float(largest));
        uint32_t words[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            if (k < Rule::kFirst) {
                words[i] = Codec1::encode<offsetof(Encoders, first)>(tables.encoders, scaled(values_[k][i], factor));
            } else {
                words[i] = Codec2::encode<offsetof(Encoders, second)>(tables.encoders, values_[k][i] * factor);
            }
        }
        if (!kPlain && tables.crowded) search(*static_cast<const Encoders*>(shared), k, factor, words);
        Lane<uint8_t, kGroup> codes;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t low = __byte_perm(words[4 * j], words[4 * j + 1], 0x0040);
            const uint32_t high = __byte_perm(words[4 * j + 2], words[4 * j + 3], 0x0040);
            codes.words[j] = __byte_perm(low, high, 0x5410);
        }
        return codes;
    }

    // One rounding, as of a product; but zero loses its sign, while a value that becomes zero keeps it.
    __device__ static __forceinline__ float scaled(float value, float factor) { return __fmaf_rn(value, factor, 0.0f); }

    __device__ __forceinline__ void search(const Encoders& encoders, int k, float factor, uint32_t* words) const {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            words[i] = k < Rule::kFirst ? Codec1::search(encoders.first, scaled(values_[k][i], factor))
                                        : Codec2::search(encoders.second, values_[k][i] * factor);
        }
    }

    Lane<P, kGroup> p_;
    float values_[Rule::kStates][kPerLane];
};

// Step a tensor's blocks from `block` to `stop`; the first block that was left.
template <bool kPlain, class Rule, class P, class G>
__device__ __forceinline__ uint32_t step_blocks(
    const OptimizerStep& step, const Place<Rule, P, G, uint8_t>& place, const StateTables& tables, const void* shared,
    uint32_t block, uint32_t stop, uint32_t stride) {
    if (block >= stop) return block;
    const StepScalars<Quick> h = scalars_of<Rule, Quick>(step, place.index);
    Loaded<Rule, P, G, uint8_t> loaded;
    loaded.template load<!kPlain>(place, block);
    const Dice dice = kPlain ? Dice{} : dice_of<Place<Rule, P, G, uint8_t>::kGroup>(step, place.index);
    for (;;) {
        Stepped<Rule, P, G, kPlain> stepped;
        stepped.step(loaded, tables, h, dice, uint64_t(block) * kOptimizerBlock);
        const uint32_t next = block + stride;
        if (next < stop) loaded.template load<!kPlain>(place, next);
        stepped.store(place, tables, shared, block);
        block = next;
        if (block >= stop) return block;
    }
}

template <class Rule, class P, class G>
__global__ void __launch_bounds__(Tuning<Rule, P, G>::kThreads, 1)
    optimizer_8bit_kernel(const __grid_constant__ OptimizerStep step) {
    constexpr int kWarps = Tuning<Rule, P, G>::kWarps;
    extern __shared__ uint32_t shared[];
    const StateTables tables = build_state_tables<kMaps<Rule> == 2, true>(shared, step.qmap1, step.qmap2);

    // A few large tensors are read as one stream by all CTAs; of many, each CTA takes its own, to look up fewer.
    const bool shared_stream = step.count <= kFewTensors;
    const uint32_t stride = shared_stream ? gridDim.x * kWarps : kWarps;
    const int64_t end = shared_stream ? step.blocks : step.blocks * (blockIdx.x + 1) / gridDim.x;
    int64_t next = shared_stream ? blockIdx.x * kWarps : step.blocks * blockIdx.x / gridDim.x;
    next += threadIdx.x / kWarpLanes;
    while (next < end) {
        const auto place = place_of<Rule, P, G, uint8_t>(step, next);
        const uint32_t stop = static_cast<uint32_t>(min(end - place.first, int64_t(place.blocks)));
        uint32_t block = static_cast<uint32_t>(next - place.first);
        if (is_plain<Rule>(step, place.index) && !tables.crowded) {
            block = step_blocks<true>(step, place, tables, shared, block, min(stop, place.whole), stride);
        }
        block = step_blocks<false>(step, place, tables, shared, block, stop, stride);
        next = place.first + block;
    }
}

}  // namespace

void optimizer_update_8bit(const OptimizerStep& step, const OptimizerKind& kind, cudaStream_t stream) {
    if (step.blocks == 0) return;
    visit_kind(kind, [&](auto rule, auto p, auto g) {
        using Rule = decltype(rule);
        using P = typename decltype(p)::type;
        using G = typename decltype(g)::type;
        using Tune = Tuning<Rule, P, G>;
        constexpr int kShared = StateTables::bytes(kMaps<Rule>);
        auto* kernel = optimizer_8bit_kernel<Rule, P, G>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "optimizer_8bit");
        const int64_t ctas = (step.blocks + Tune::kWarps - 1) / Tune::kWarps;
        const int64_t all = current_device().multiprocessors;
        kernel<<<grid_size(ctas < all ? ctas : all), Tune::kThreads, kShared, stream>>>(step);
        check_launch("optimizer_8bit");
    });
}

}  // namespace bnb
