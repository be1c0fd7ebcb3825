// Questions about the library itself: version, last error, tables, instruction sets.

#include <cstring>

#include "../bnb.h"
#include "../common/codebooks.h"
#include "../cpu/int8_kernels.h"
#include "../cpu/kernels.h"
#include "guard.h"

namespace bnb {

namespace {

constexpr size_t kTextSize = 512;

// Per thread and of fixed size: recording a failure must not be able to fail.
thread_local bnb_status last_status = BNB_STATUS_OK;
thread_local char last_text[kTextSize];

size_t append(size_t at, const char* text) noexcept {
    const size_t room = kTextSize - 1 - at;
    const size_t length = strlen(text) < room ? strlen(text) : room;
    memcpy(last_text + at, text, length);
    last_text[at + length] = '\0';
    return at + length;
}

}  // namespace

void set_last(bnb_status status, const char* function, const char* message) noexcept {
    last_status = status;
    last_text[0] = '\0';
    if (status != BNB_STATUS_OK) append(append(append(0, function), ": "), message);
}

}  // namespace bnb

extern "C" {

int32_t bnb_abi_version(void) { return BNB_ABI_VERSION; }

int32_t bnb_last_status(void) { return bnb::last_status; }

const char* bnb_last_error(void) { return bnb::last_text; }

bool bnb_has_cuda(void) {
#ifdef BNB_WITH_CUDA
    return true;
#else
    return false;
#endif
}

bnb_status bnb_codebook(bnb_format format, float* values, float* thresholds) {
    return bnb::guarded("bnb_codebook", [&] {
        const bnb::FourBitFormat* found = bnb::find_format(format);
        bnb::require(found != nullptr, "unknown 4-bit format ", int(format));
        bnb::require(values != nullptr && thresholds != nullptr, "values and thresholds must not be null");
        memcpy(values, found->values, sizeof(found->values));
        memcpy(thresholds, found->thresholds, sizeof(found->thresholds));
    });
}

const char* bnb_cpu_isa(void) {
    const bnb::Kernels* kernels = bnb::find_kernels();
    return kernels ? kernels->name : nullptr;
}

const char* bnb_cpu_int8_isa(void) { return bnb::int8_variant(); }

const char* bnb_cpu_isa_available(void) { return bnb::available_variants(); }

}  // extern "C"
