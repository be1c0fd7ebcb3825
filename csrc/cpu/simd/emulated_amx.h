// The tile registers of avx512amx.h in memory, so that kernels which use them are tested where there is no AMX.
#pragma once

BNB_NAMESPACE_BEGIN

inline thread_local uint32_t emulated_registers[8][kAmxRows][kAmxRows];

struct AmxRegisters {
    AmxRegisters() { memset(emulated_registers, 0xff, sizeof(emulated_registers)); }  // NaN
    ~AmxRegisters() { memset(emulated_registers, 0xff, sizeof(emulated_registers)); }
};

template <int number>
BNB_INLINE void amx_load(const void* source, int64_t pitch = kAmxBytes) {
    for (int i = 0; i < kAmxRows; ++i) {
        memcpy(emulated_registers[number][i], static_cast<const uint8_t*>(source) + i * pitch, kAmxBytes);
    }
}
template <int number>
BNB_INLINE void amx_zero() {
    memset(emulated_registers[number], 0, sizeof(emulated_registers[number]));
}
template <int number>
BNB_INLINE void amx_store(void* target) {
    memcpy(target, emulated_registers[number], sizeof(emulated_registers[number]));
}

template <int sum, int first, int second>
BNB_INLINE void amx_add_products() {
    for (int i = 0; i < kAmxRows; ++i) {
        F32 row = broadcast(0.0f);  // as in the instruction, products are added up before the sum before them is added
        for (int k = 0; k < kAmxRows; ++k) {
            const I32 word = broadcast(static_cast<int32_t>(emulated_registers[first][i][k]));
            row = add_pair_products(row, load_words(emulated_registers[second][k]), word);
        }
        store_words(emulated_registers[sum][i], bits(from_bits(load_words(emulated_registers[sum][i])) + row));
    }
}

template <int sum, int first, int second>
BNB_INLINE void amx_add_int8_products() {
    const auto byte = [](uint32_t word, int b) { return int32_t(int8_t(word >> 8 * b)); };
    for (int i = 0; i < kAmxRows; ++i) {
        for (int j = 0; j < kAmxRows; ++j) {
            uint32_t added = 0;
            for (int k = 0; k < kAmxBytes; ++k) {
                const uint32_t a = emulated_registers[first][i][k / 4], b = emulated_registers[second][k / 4][j];
                added += static_cast<uint32_t>(byte(a, k % 4) * byte(b, k % 4));
            }
            emulated_registers[sum][i][j] += added;
        }
    }
}

BNB_NAMESPACE_END
