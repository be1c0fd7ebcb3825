// The tile registers of avx512amx.h in memory, so that kernels which use them are tested where there is no AMX.
#pragma once

BNB_NAMESPACE_BEGIN

inline thread_local uint32_t emulated_registers[8][kAmxRows][kAmxRows];

struct AmxRegisters {
    AmxRegisters() { memset(emulated_registers, 0xff, sizeof(emulated_registers)); }  // NaN
    ~AmxRegisters() { memset(emulated_registers, 0xff, sizeof(emulated_registers)); }
};

template <int number>
BNB_INLINE void amx_load(const void* source) {
    memcpy(emulated_registers[number], source, sizeof(emulated_registers[number]));
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

BNB_NAMESPACE_END
