// Loops whose index is a template argument.
#pragma once

BNB_NAMESPACE_BEGIN

// Call body(Constant<0>{}) ... body(Constant<count - 1>{}).
template <int value>
struct Constant {
    static constexpr int number = value;
};

template <int count, class Body>
BNB_INLINE void unrolled(const Body& body) {
    if constexpr (count > 0) {
        unrolled<count - 1>(body);
        body(Constant<count - 1>{});
    }
}

// Call body(Constant<rows>) for 1 <= rows <= kMost.
template <int kMost, class Body>
BNB_INLINE void with_constant(int64_t rows, const Body& body) {
    if constexpr (kMost > 1) {
        if (rows < kMost) return with_constant<kMost - 1>(rows, body);
    }
    body(Constant<kMost>{});
}

BNB_NAMESPACE_END
