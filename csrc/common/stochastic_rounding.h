// Stochastic rounding to bfloat16: up or down with the odds that make the mean right, so that updates too small
// for a parameter's last place still count.
//
// The dice are a hash of (key, index of the element), with no state to keep: the same bits result for any launch
// shape, number of threads and device. `key` stands for one step of one parameter. The same arithmetic stands in
// plain torch in backends/default/rounding.py; tests/optim/test_rounding.py compares the two.
#pragma once

#include "dtype.h"

BNB_NAMESPACE_BEGIN

// An invertible mix of 32 bits with little bias (constants: C. Wellons' hash prospector).
BNB_HOST_DEVICE BNB_INLINE uint32_t mixed_bits(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// Thirty-two random bits for element `index` of the step that `key` stands for.
BNB_HOST_DEVICE BNB_INLINE uint32_t random_bits(uint64_t key, uint64_t index) {
    const uint32_t low = mixed_bits(uint32_t(index) ^ uint32_t(key));
    return mixed_bits((low + uint32_t(index >> 32) * 0x9e3779b9u) ^ uint32_t(key >> 32));
}

// The key of one step of the parameter at a place in its group, as optim/_rounding.py has it (splitmix64); not
// negative.
BNB_HOST_DEVICE inline int64_t rounding_key(int64_t seed, int64_t place, int64_t step) {
    uint64_t key = uint64_t(seed);
    const uint64_t parts[] = {uint64_t(place), uint64_t(step)};
    for (const uint64_t part : parts) {
        key += (part + 1) * 0x9e3779b97f4a7c15u;
        key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9u;
        key = (key ^ (key >> 27)) * 0x94d049bb133111ebu;
        key ^= key >> 31;
    }
    return int64_t(key >> 1);
}

// value, rounded up in magnitude where the low half of `random` says so; infinity and NaN as ever.
BNB_HOST_DEVICE BNB_INLINE BFloat16 round_stochastic(float value, uint32_t random) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + (random & 0xffffu)) >> 16;
    const uint32_t quiet = (bits & 0x7fffffu) != 0 ? 0x40u : 0u;
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return {uint16_t(finite ? rounded : (bits >> 16) | quiet)};
}

BNB_NAMESPACE_END
