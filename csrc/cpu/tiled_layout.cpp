// Tiles of 32 rows: for every pair of columns the 64 codes (two of each row) fill 32 bytes, the first 32 codes in the
// low nibbles. This is a compatibility path: a plain pass over the weight, not a kernel to be fast.

#include "tiled_layout.h"

namespace bnb {

namespace {

constexpr int64_t kTileRows = 32;

uint8_t code_in_tile(const uint8_t* tile, int64_t position) {
    return position < kTileRows ? tile[position] & 15 : tile[position - kTileRows] >> 4;
}

}  // namespace

void untile_4bit(
    const uint8_t* tiles, const BFloat16* absmax, uint8_t* packed, float* flat_absmax, int64_t N, int64_t K,
    int64_t blocks) {
    const int64_t pairs = K / 2;
    for (int64_t row = 0; row < N; ++row) {
        const int64_t inside = row % kTileRows;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const uint8_t* tile = tiles + (row / kTileRows * pairs + pair) * kTileRows;
            packed[row * pairs + pair] =
                uint8_t(code_in_tile(tile, 2 * inside) << 4 | code_in_tile(tile, 2 * inside + 1));
        }
        for (int64_t block = 0; block < blocks; ++block) {
            flat_absmax[row * blocks + block] = to_float(absmax[block * N + row]);
        }
    }
}

}  // namespace bnb
