// What the passes over parameters and their state share: a block as it was loaded, and the numbers that rules run on.
#pragma once

#include "optimizer_blocks.cuh"
#include "state_codec.cuh"

namespace bnb {

struct Quotient;

// A float whose square root and quotient are the hardware's approximations. Sums and products are exact.
struct Quick {
    float value;

    __device__ __forceinline__ Quick() {}
    __device__ __forceinline__ explicit Quick(float value) : value(value) {}

    friend __device__ __forceinline__ Quick operator+(Quick a, Quick b) { return Quick(a.value + b.value); }
    friend __device__ __forceinline__ Quick operator-(Quick a, Quick b) { return Quick(a.value - b.value); }
    friend __device__ __forceinline__ Quick operator*(Quick a, Quick b) { return Quick(a.value * b.value); }
    friend __device__ __forceinline__ Quotient operator/(Quick a, Quick b);
    friend __device__ __forceinline__ Quick sqrt(Quick a) {
        float root;
        asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(a.value));  // eps hides what is lost below 1e-19
        return Quick(root);
    }
    friend __device__ __forceinline__ Quick sign(Quick a) {
        return Quick(a.value > 0.0f ? 1.0f : a.value < 0.0f ? -1.0f : 0.0f);
    }
};

// A product yet to be taken. As it is approximate anyway, a sum with it rounds once.
struct Quotient {
    float dividend, reciprocal;

    __device__ __forceinline__ operator Quick() const { return Quick(dividend * reciprocal); }
    friend __device__ __forceinline__ Quick operator+(Quotient a, Quick b) {
        return Quick(__fmaf_rn(a.dividend, a.reciprocal, b.value));
    }
};

__device__ __forceinline__ Quotient operator/(Quick a, Quick b) {
    Quotient quotient{a.value, 0.0f};
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient.reciprocal) : "f"(b.value));
    return quotient;
}

// Rules run on exact floats where state is exact.
template <class State>
using RealFor = std::conditional_t<sizeof(State) == 1, Quick, float>;

__device__ __forceinline__ float value_of(float x) { return x; }
__device__ __forceinline__ float value_of(Quick x) { return x.value; }

// One lane's share of a block as it lies in memory: eight elements and their state, float32 or codes.
template <class Rule, class P, class G, class State>
struct Loaded {
    using Here = Place<Rule, P, G, State>;
    static constexpr int kGroup = Here::kGroup;
    static constexpr bool kCoded = sizeof(State) == 1;

    Lane<G, kGroup> g;
    Lane<P, kGroup> p;
    Lane<State, kGroup> states[Rule::kStates];
    float absmax[Rule::kStates];  // of codes only

    // Without kSome, only blocks before place.whole.
    template <bool kSome>
    __device__ __forceinline__ void load(const Here& place, uint32_t block) {
        const bool some = kSome && block >= place.whole;
        const int64_t rest = place.rest_of(block);
        load_lane(g, block_of(place.g, block), some, rest);
        load_lane(p, block_of(place.p, block), some, rest);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) {
            load_lane(states[k], block_of(place.states[k], block), some, rest);
            if constexpr (kCoded) absmax[k] = __ldcs(place.absmax[k] + block);
        }
    }

    // State k of element i. Without codes, `tables` are not used.
    __device__ __forceinline__ float state(const StateTables& tables, int k, int i) const {
        if constexpr (kCoded) {
            const uint32_t four = states[k].words[i / 4];
            return absmax[k] * (k < Rule::kFirst ? tables.decode<0>(four, i % 4) : tables.decode<1>(four, i % 4));
        } else {
            return states[k].values[i];
        }
    }

  private:
    template <class T>
    __device__ static __forceinline__ void load_lane(Lane<T, kGroup>& values, const T* first, bool some, int64_t rest) {
        if (some) {
            values.load_some(first, rest);
        } else {
            values.load(first);
        }
    }
};

template <class Rule>
constexpr int kMaps = Rule::kStates > Rule::kFirst ? 2 : 1;

}  // namespace bnb
