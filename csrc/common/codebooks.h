// The 4-bit tables and the decision boundaries that follow from them.
//
// A format is sixteen values in code order. Encoding counts the thresholds (float32 midpoints of neighbouring
// values) that lie strictly below a scaled value; that bucket is a position in value order, and `codes` turns it
// into a code. NF4 is already in value order, FP4 (sign, then magnitude index) is not.
#pragma once

#include <cstdint>

#include "../bnb.h"
#include "platform.h"

namespace bnb {

struct FourBitFormat {
    float values[16];      // by code
    float thresholds[15];  // ascending
    uint8_t codes[16];     // bucket -> code
};

}  // namespace bnb

BNB_NAMESPACE_BEGIN

struct FourBitValues {
    float values[16];
};

// Sort the values (stable: the two zeros of FP4 keep their order) and place a threshold between neighbours.
constexpr FourBitFormat make_format(const FourBitValues& table) {
    FourBitFormat format{};
    for (int i = 0; i < 16; ++i) {
        format.values[i] = table.values[i];
        format.codes[i] = static_cast<uint8_t>(i);
    }
    for (int i = 1; i < 16; ++i) {
        for (int j = i; j > 0; --j) {
            const uint8_t lower = format.codes[j - 1];
            const uint8_t upper = format.codes[j];
            if (!(table.values[upper] < table.values[lower])) break;
            format.codes[j - 1] = upper;
            format.codes[j] = lower;
        }
    }
    for (int i = 0; i < 15; ++i) {
        format.thresholds[i] = (table.values[format.codes[i]] + table.values[format.codes[i + 1]]) * 0.5f;
    }
    return format;
}

// clang-format off
constexpr FourBitFormat kNf4 = make_format({{
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
}});

constexpr FourBitFormat kFp4 = make_format({{
    0.0f, 0.0052083334885537624f, 0.6666666865348816f, 1.0f,
    0.3333333432674408f, 0.5f, 0.1666666716337204f, 0.25f,
    0.0f, -0.0052083334885537624f, -0.6666666865348816f, -1.0f,
    -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f,
}});
// clang-format on

// The format behind an enum value, or null.
inline const FourBitFormat* find_format(bnb_format format) {
    switch (format) {
        case BNB_FORMAT_FP4: return &kFp4;
        case BNB_FORMAT_NF4: return &kNf4;
    }
    return nullptr;
}

BNB_NAMESPACE_END
