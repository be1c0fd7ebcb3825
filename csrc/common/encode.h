// One value -> one code, and back: the rule every device follows bit for bit.
//
// A full block is scaled by the float32 reciprocal of its largest magnitude; the short block at the end divides,
// and keeps the floored magnitude as its absmax. A code counts the thresholds strictly below the scaled value, so
// a value on a boundary takes the lower code; NaN compares with nothing and takes the highest.
#pragma once

#include "platform.h"

BNB_NAMESPACE_BEGIN

// Keeps the reciprocal of an all-zero block finite.
constexpr float kMinAbsmax = 1e-38f;

BNB_HOST_DEVICE inline float floored_absmax(float absmax) {
    return absmax < kMinAbsmax ? kMinAbsmax : absmax;  // NaN stays
}

// Whether a scaled value lies above a threshold; NaN lies above all.
BNB_HOST_DEVICE inline bool is_above(float value, float threshold) { return !(value <= threshold); }

// Number of ascending thresholds below a scaled value.
BNB_HOST_DEVICE inline int bucket_of(float scaled, const float* thresholds, int count) {
    int low = 0;
    while (count > 0) {
        const int half = count / 2;
        if (is_above(scaled, thresholds[low + half])) {
            low += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return low;
}

// The rounding threshold between two neighbours of a map.
BNB_HOST_DEVICE inline float midpoint(float lower, float upper) { return (lower + upper) * 0.5f; }

BNB_NAMESPACE_END
