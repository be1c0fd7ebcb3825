// Asking for rows of memory while others are multiplied.
#pragma once

BNB_NAMESPACE_BEGIN

constexpr int64_t kLineBytes = 64;

// Fetches `share` lines at a time of rows into the second-level cache, in the order of addresses: who asked for
// all of them at once would wait.
struct FetchLines {
    const uint8_t* row;
    int64_t stride, lines;  // bytes from row to row, lines of each
    int64_t share = 0, line = 0;

    BNB_INLINE void operator()() {
        for (int64_t i = 0; i < share; ++i) {
            BNB_PREFETCH_FAR(row + line * kLineBytes);
            if (++line == lines) line = 0, row += stride;
        }
    }
};

BNB_NAMESPACE_END
