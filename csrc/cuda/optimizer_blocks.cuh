// What the optimizer kernels share: finding a warp's block of 256 elements among many tensors, and a lane's eight
// elements of it.
//
// A warp owns a block, a lane eight of its elements: in groups as wide as the widest access of the dtypes involved
// allows, so that every load is 16 bytes or a full sector per group of lanes. A short block at the end of a tensor, and
// tensors that are not aligned, take guarded scalar accesses.
#pragma once

#include <type_traits>

#include "../common/optimizer_rules.h"
#include "../common/stochastic_rounding.h"
#include "device.cuh"
#include "optimizer.h"
#include "vector_io.cuh"

namespace bnb {

constexpr int kOptimizerBlock = 256;
constexpr int kWarpLanes = 32;
constexpr int kPerLane = kOptimizerBlock / kWarpLanes;

// Elements of a lane that lie side by side: eight of 16 bits, four where float32 takes part.
template <class... Types>
constexpr int kGroupOf = ((sizeof(Types) == 4) || ...) ? 4 : 8;

// From a lane's first element of a block to its i-th: known at compile time, so that an access is a pointer that the
// lane keeps plus a constant.
template <int kGroup>
__device__ constexpr int element(int i) {
    return i / kGroup * kWarpLanes * kGroup + i % kGroup;
}

template <int kBytes>
using Access = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;

// A lane's eight elements as they lie in memory.
template <class T, int kGroup>
struct Lane {
    static constexpr int kGroups = kPerLane / kGroup;
    using Wide = Access<kGroup * sizeof(T)>;
    union {
        Wide wide[kGroups];
        uint32_t words[kPerLane * sizeof(T) / sizeof(uint32_t)];
        T values[kPerLane];
    };

    __device__ __forceinline__ Lane() {}

    __device__ __forceinline__ float get(int i) const {
        if constexpr (sizeof(T) == 4) {
            return values[i];
        } else if constexpr (std::is_same_v<T, BFloat16>) {
            return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
        } else {
            return __half2float(__ushort_as_half(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))));
        }
    }

    // Elements i and i + 1, i even: the hardware rounds two at a time.
    __device__ __forceinline__ void set_pair(int i, float a, float b) {
        if constexpr (sizeof(T) == 4) {
            values[i] = a;
            values[i + 1] = b;
        } else if constexpr (std::is_same_v<T, BFloat16>) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
            memcpy(&words[i / 2], &pair, sizeof(pair));
        } else {
            const __half2 pair = __floats2half2_rn(a, b);
            memcpy(&words[i / 2], &pair, sizeof(pair));
        }
    }

    // From and to where the lane's first element lies.
    __device__ __forceinline__ void load(const T* first) {
#pragma unroll
        for (int j = 0; j < kGroups; ++j) wide[j] = __ldcs(reinterpret_cast<const Wide*>(first) + j * kWarpLanes);
    }

    __device__ __forceinline__ void store(T* first) const {
#pragma unroll
        for (int j = 0; j < kGroups; ++j) __stcs(reinterpret_cast<Wide*>(first) + j * kWarpLanes, wide[j]);
    }

    // Of a tensor that ends `rest` elements after the lane's first one.
    __device__ void load_some(const T* first, int64_t rest) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) values[i] = element<kGroup>(i) < rest ? first[element<kGroup>(i)] : T{};
    }

    __device__ void store_some(T* first, int64_t rest) const {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            if (element<kGroup>(i) < rest) first[element<kGroup>(i)] = values[i];
        }
    }
};

// What a tensor's parameters are rounded by.
struct Dice {
    int64_t key;     // negative: to nearest
    uint64_t first;  // index of the lane's first element

    __device__ __forceinline__ BFloat16 round(float value, uint64_t offset) const {
        return round_stochastic(value, random_bits(uint64_t(key), first + offset));
    }
};

// Round elements i and i + 1, i even, of the block that starts at `offset`.
template <class T, int kGroup>
__device__ __forceinline__ void round_pair(
    Lane<T, kGroup>& target, int i, float a, float b, const Dice& dice, uint64_t offset) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (dice.key >= 0) {
            target.values[i] = dice.round(a, offset + element<kGroup>(i));
            target.values[i + 1] = dice.round(b, offset + element<kGroup>(i + 1));
            return;
        }
    }
    target.set_pair(i, a, b);
}

// The tensor that a warp is in, as one of its lanes sees it: pointers and the rest start at the lane's own first
// element. Blocks are counted from the tensor's first one.
template <class Rule, class P, class G, class State>
struct Place {
    static constexpr int kGroup = kGroupOf<P, G, State>;

    const G* g;
    P* p;
    State* states[Rule::kStates];
    float* absmax[Rule::kStates];  // 8-bit state only
    int64_t rest;                  // elements
    int64_t first;                 // its first block, in the numbering through all tensors
    uint32_t index;
    uint32_t blocks;  // all of them
    uint32_t whole;   // those with 256 elements, which may be accessed in full width

    __device__ __forceinline__ int64_t rest_of(uint32_t block) const { return rest - int64_t(block) * kOptimizerBlock; }
};

// Index of the tensor that holds a block.
__device__ inline uint32_t find_tensor(const OptimizerStep& step, int64_t block) {
    uint32_t low = 0, high = static_cast<uint32_t>(step.count);
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (step.tensors[middle].first_block <= block) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

__device__ __forceinline__ const bnb_optimizer_tensor& tensor_of(const OptimizerStep& step, uint32_t index) {
    return step.tensors ? step.tensors[index] : step.tensor;
}

template <class Rule, class P, class G, class State>
__device__ inline Place<Rule, P, G, State> place_of(const OptimizerStep& step, int64_t block) {
    using Here = Place<Rule, P, G, State>;
    const uint32_t own = threadIdx.x % kWarpLanes * Here::kGroup;  // the lane's first element
    Here place;
    place.index = step.tensors ? find_tensor(step, block) : 0;
    const bnb_optimizer_tensor& tensor = tensor_of(step, place.index);
    place.g = static_cast<const G*>(tensor.g) + own;
    place.p = static_cast<P*>(tensor.p) + own;
    place.rest = tensor.n - own;
    place.first = tensor.first_block;
    place.blocks = static_cast<uint32_t>((tensor.n + kOptimizerBlock - 1) / kOptimizerBlock);
    uintptr_t addresses = reinterpret_cast<uintptr_t>(tensor.g) | reinterpret_cast<uintptr_t>(tensor.p);
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) {
        const bool first = k < Rule::kFirst;
        State* state = static_cast<State*>(first ? tensor.state1 : tensor.state2) + (first ? k * tensor.n : 0);
        place.states[k] = state + own;
        place.absmax[k] = first ? tensor.absmax1 + k * int64_t(place.blocks) : tensor.absmax2;
        // Codes need half of the alignment, hence the shift.
        addresses |= reinterpret_cast<uintptr_t>(state) << (sizeof(State) == 1 ? 1 : 0);
    }
    place.whole = addresses % 16 == 0 ? static_cast<uint32_t>(tensor.n / kOptimizerBlock) : 0;
    return place;
}

template <int kGroup>
__device__ __forceinline__ Dice dice_of(const OptimizerStep& step, uint32_t index) {
    const bnb_optimizer_tensor& tensor = tensor_of(step, index);
    return {tensor.key, uint64_t(tensor.offset) + threadIdx.x % kWarpLanes * kGroup};
}

// Where block number `block` of a tensor begins; one multiply-add for a 32-bit number.
template <class T>
__device__ __forceinline__ T* block_of(T* tensor, uint32_t block) {
    return tensor + uint64_t(block) * kOptimizerBlock;
}

__device__ __forceinline__ const bnb_optimizer_config& config_of(const OptimizerStep& step, uint32_t index) {
    return step.tensors ? step.configs[index] : step.config;
}

// The scalars of a tensor's step as Real. Knowing at compile time whether decay joins the gradient saves instructions.
template <class Rule, class Real>
__device__ __forceinline__ StepScalars<Real> scalars_of(const OptimizerStep& step, uint32_t index) {
    StepScalars<Real> h(config_of(step, index), [](float value) { return Real(value); });
    if (step.sizes) h.step_size = Real(step.sizes[index]);
    return h;
}

// The gradient that a rule sees.
template <class Rule, class Real>
__device__ __forceinline__ Real gradient_of(const StepScalars<Real>& h, Real g, Real p) {
    if constexpr (Rule::kCoupledDecay) {
        return h.gradient(g, p);
    } else {
        return g * h.gnorm_scale;
    }
}

// Call body(Rule{}, TypeTag<P>{}, TypeTag<G>{}) for the types behind a kind.
template <class Body>
void visit_kind(const OptimizerKind& kind, Body&& body) {
    const bool known = visit(kind.p_dtype, [&](auto p) {
        const bool ruled = visit_rule(kind.rule, [&](auto rule) {
            if (kind.g_dtype == kind.p_dtype) {
                body(rule, p, p);
            } else {
                body(rule, p, TypeTag<float>{});
            }
        });
        require(ruled, "unknown optimizer rule ", int(kind.rule));
    });
    require(known, "unknown dtype ", int(kind.p_dtype));
}

}  // namespace bnb
