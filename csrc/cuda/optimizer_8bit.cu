// Optimizer updates with 8-bit state: decode, step and encode each block of 256 elements in one pass.
//
// Memory bound on paper, 10 bytes per element for Adam in bfloat16, which leaves some 70 instructions per element: so a
// warp owns a block and finds its absmax without a barrier, codes are looked up in conflict-free tables
// (state_codec.cuh), and rules run on a float whose square root and quotient are the hardware's approximations (an
// error of 2 ulp; the state itself, which takes neither, is exact). One CTA per multiprocessor builds the tables once
// and walks a contiguous range of blocks; the next block's loads are in flight while the present one is computed.

#include <cstddef>

#include "optimizer_blocks.cuh"
#include "state_codec.cuh"

namespace bnb {
namespace {

// As many warps as have registers for a block in work and one in flight; together they keep some 30 KB in flight.
template <class Rule, class P, class G>
struct Tuning {
    static constexpr bool kWide = sizeof(P) + sizeof(G) > 4;
    static constexpr int kThreads = Rule::kStates + kWide == 1 ? 768 : Rule::kStates + kWide == 2 ? 640 : 512;
    static constexpr int kWarps = kThreads / kWarpLanes;
};

constexpr int64_t kFewTensors = 4;

// A float whose square root and quotient are approximate.
struct Quick {
    float value;

    __device__ __forceinline__ Quick() {}
    __device__ __forceinline__ explicit Quick(float value) : value(value) {}

    friend __device__ __forceinline__ Quick operator+(Quick a, Quick b) { return Quick(a.value + b.value); }
    friend __device__ __forceinline__ Quick operator-(Quick a, Quick b) { return Quick(a.value - b.value); }
    friend __device__ __forceinline__ Quick operator*(Quick a, Quick b) { return Quick(a.value * b.value); }
    friend __device__ __forceinline__ Quick operator/(Quick a, Quick b) {
        float reciprocal;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b.value));
        return Quick(a.value * reciprocal);
    }
    friend __device__ __forceinline__ Quick sqrt(Quick a) {
        float root;
        asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(a.value));  // eps hides what is lost below 1e-19
        return Quick(root);
    }
    friend __device__ __forceinline__ Quick sign(Quick a) {
        return Quick(a.value > 0.0f ? 1.0f : a.value < 0.0f ? -1.0f : 0.0f);
    }
};

struct Tables {
    Codec1::Tables first;
    Codec2::Tables second;
};

template <class Rule>
constexpr size_t kTableBytes = Rule::kStates > Rule::kFirst ? sizeof(Tables) : offsetof(Tables, second);

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

// One lane's share of a block: eight elements and their codes.
template <class Rule, class P, class G>
class BlockUpdate {
  public:
    static constexpr int kGroup = kGroupOf<P, G>;
    using Here = Place<Rule, uint8_t>;
    using Scalars = StepScalars<Quick>;

    __device__ __forceinline__ void load(const Here& place, uint32_t block, int lane) {
        g_.load(block_of(static_cast<const G*>(place.g), block), lane);
        p_.load(block_of(static_cast<const P*>(place.p), block), lane);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) {
            codes_[k].load(block_of(place.states[k], block), lane);
            absmax_[k] = __ldcs(place.absmax[k] + block);
        }
    }

    __device__ __forceinline__ void load_some(const Here& place, uint32_t block, int lane) {
        const int64_t count = place.rest(block);
        g_.load_some(block_of(static_cast<const G*>(place.g), block), lane, count);
        p_.load_some(block_of(static_cast<const P*>(place.p), block), lane, count);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) {
            codes_[k].load_some(block_of(place.states[k], block), lane, count);
            absmax_[k] = place.absmax[k][block];
        }
    }

    // Advance parameter and state.
    template <bool kSkipZeros>
    __device__ __forceinline__ void step(const Tables& tables, const Scalars& h, int lane) {
#pragma unroll
        for (int i = 0; i < kPerLane; i += 2) {
            const float first = step_one<kSkipZeros>(tables, h, lane, i);
            const float second = step_one<kSkipZeros>(tables, h, lane, i + 1);
            p_.set_pair(i, first, second);
        }
    }

    // What lies past the end of the tensor must not count in the block's absmax.
    __device__ __forceinline__ void clear_from(int64_t count, int lane) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            if (element<kGroup>(lane, i) < count) continue;
#pragma unroll
            for (int k = 0; k < Rule::kStates; ++k) values_[k][i] = 0.0f;
        }
    }

    // Magnitude of the largest value of a state in the block, as bits. What is not finite is larger than all that is in
    // the last state: with a state2, where a gradient's square is not finite, it is there that it shows.
    __device__ __forceinline__ uint32_t largest(int k) const {
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
    __device__ __forceinline__ void reset_bad(const Here& place, uint32_t block, int lane) {
        const P* p = block_of(static_cast<const P*>(place.p), block);
        const int64_t count = place.rest(block);
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
            const int at = element<kGroup>(lane, i);
            if (at < count) p_.values[i] = p[at];
        }
    }

    // Values to codes, scaled by the block's largest.
    __device__ __forceinline__ void encode(const Tables& tables, int k, uint32_t largest) {
        const float factor = 1.0f / floored_absmax(__uint_as_float(largest));
        absmax_[k] = __uint_as_float(largest);
        uint32_t words[kPerLane], flags = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            if (k < Rule::kFirst) {
                words[i] = Codec1::encode(tables.first, scaled(values_[k][i], factor));
            } else {
                words[i] = Codec2::encode(tables.second, values_[k][i] * factor);
            }
            flags |= words[i];
        }
        if (flags & Codec1::kCrowded) search(tables, k, factor, words);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t low = __byte_perm(words[4 * j], words[4 * j + 1], 0x0040);
            const uint32_t high = __byte_perm(words[4 * j + 2], words[4 * j + 3], 0x0040);
            codes_[k].words[j] = __byte_perm(low, high, 0x5410);
        }
    }

    __device__ __forceinline__ void store(const Here& place, uint32_t block, int lane) const {
        P* p = block_of(static_cast<P*>(place.p), block);
        if (block < place.whole) {
            p_.store(p, lane);
#pragma unroll
            for (int k = 0; k < Rule::kStates; ++k) codes_[k].store(block_of(place.states[k], block), lane);
        } else {
            const int64_t count = place.rest(block);
            p_.store_some(p, lane, count);
#pragma unroll
            for (int k = 0; k < Rule::kStates; ++k) {
                codes_[k].store_some(block_of(place.states[k], block), lane, count);
            }
        }
        if (lane == 0) {
#pragma unroll
            for (int k = 0; k < Rule::kStates; ++k) place.absmax[k][block] = absmax_[k];
        }
    }

  private:
    // Advance the state of one element; its parameter after the step.
    template <bool kSkipZeros>
    __device__ __forceinline__ float step_one(const Tables& tables, const Scalars& h, int lane, int i) {
        const Quick g(g_.get(i)), p(p_.get(i));
        Quick state[Rule::kStates];
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) {
            const uint32_t codes = codes_[k].words[i / 4];
            const float entry = k < Rule::kFirst ? Codec1::decode(tables.first, codes, i % 4, lane)
                                                 : Codec2::decode(tables.second, codes, i % 4, lane);
            values_[k][i] = entry * absmax_[k];
            state[k] = Quick(values_[k][i]);
        }
        const Quick direction = Rule::direction(gradient_of<Rule>(h, g, p), state, h);
        const Quick moved = h.moved(p, direction, h.step_size);
        if (kSkipZeros && g.value == 0.0f) return p.value;
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) values_[k][i] = state[k].value;
        return moved.value;
    }

    // One rounding, as of a product; but zero loses its sign, while a value that becomes zero keeps it.
    __device__ static __forceinline__ float scaled(float value, float factor) { return __fmaf_rn(value, factor, 0.0f); }

    __device__ __forceinline__ void search(const Tables& tables, int k, float factor, uint32_t* words) const {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            words[i] = k < Rule::kFirst ? Codec1::search(tables.first, scaled(values_[k][i], factor))
                                        : Codec2::search(tables.second, values_[k][i] * factor);
        }
    }

    Lane<G, kGroup> g_;
    Lane<P, kGroup> p_;
    Lane<uint8_t, kGroup> codes_[Rule::kStates];
    float absmax_[Rule::kStates];
    float values_[Rule::kStates][kPerLane];
};

// Everything between loading and storing a block.
template <class Rule, class P, class G>
__device__ __forceinline__ void update_block(
    BlockUpdate<Rule, P, G>& update, const Tables& tables, const Place<Rule, uint8_t>& place,
    const StepScalars<Quick>& h, uint32_t block, int lane) {
    if (h.skip_zeros) {
        update.template step<true>(tables, h, lane);
    } else {
        update.template step<false>(tables, h, lane);
    }
    if (block >= place.whole) update.clear_from(place.rest(block), lane);
    uint32_t largest[Rule::kStates];
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) largest[k] = update.largest(k);
    if (largest[Rule::kStates - 1] >= kInfinityBits) {
        update.reset_bad(place, block, lane);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) largest[k] = update.largest(k);
    }
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) update.encode(tables, k, largest[k]);
    update.store(place, block, lane);
}

template <class Rule, class P, class G>
__global__ void __launch_bounds__(Tuning<Rule, P, G>::kThreads, 1)
    optimizer_8bit_kernel(const __grid_constant__ OptimizerStep step) {
    constexpr int kWarps = Tuning<Rule, P, G>::kWarps;
    extern __shared__ uint32_t shared[];
    Tables& tables = *reinterpret_cast<Tables*>(shared);
    Codec1::build(tables.first, step.qmap1);
    if constexpr (Rule::kStates > Rule::kFirst) Codec2::build(tables.second, step.qmap2);
    __syncthreads();

    const int lane = threadIdx.x % kWarpLanes;
    // A few large tensors are read as one stream by all CTAs; of many, each CTA takes its own, to look up fewer. The
    // register that the choice costs is one that a rule with three states does not have.
    const bool shared_stream = Rule::kStates < 3 && step.count <= kFewTensors;
    const uint32_t stride = shared_stream ? gridDim.x * kWarps : kWarps;
    const int64_t end = shared_stream ? step.blocks : step.blocks * (blockIdx.x + 1) / gridDim.x;
    int64_t next = shared_stream ? blockIdx.x * kWarps : step.blocks * blockIdx.x / gridDim.x;
    next += threadIdx.x / kWarpLanes;
    while (next < end) {
        const Place<Rule, uint8_t> place = place_of<Rule, uint8_t>(step, next);
        const StepScalars<Quick> h = scalars_of<Rule, Quick>(step, place.index);
        const uint32_t stop = static_cast<uint32_t>(min(end - place.first, int64_t(place.blocks)));
        const uint32_t whole = min(stop, place.whole);
        uint32_t block = static_cast<uint32_t>(next - place.first);
        BlockUpdate<Rule, P, G> ahead;
        if (block < whole) ahead.load(place, block, lane);
        for (; block < whole; block += stride) {
            BlockUpdate<Rule, P, G> update = ahead;
            if (block + stride < whole) ahead.load(place, block + stride, lane);
            update_block(update, tables, place, h, block, lane);
        }
        for (; block < stop; block += stride) {
            BlockUpdate<Rule, P, G> update;
            update.load_some(place, block, lane);
            update_block(update, tables, place, h, block, lane);
        }
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
        auto* kernel = optimizer_8bit_kernel<Rule, P, G>;
        check(
            cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kTableBytes<Rule>)),
            "optimizer_8bit");
        const int64_t ctas = (step.blocks + Tune::kWarps - 1) / Tune::kWarps;
        const int64_t all = current_device().multiprocessors;
        kernel<<<grid_size(ctas < all ? ctas : all), Tune::kThreads, kTableBytes<Rule>, stream>>>(step);
        check_launch("optimizer_8bit");
    });
}

}  // namespace bnb
