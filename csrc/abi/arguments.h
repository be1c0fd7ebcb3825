// What entry points ask of their arguments alike.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/error.h"

typedef struct CUstream_st* cudaStream_t;

namespace bnb {

inline cudaStream_t as_stream(bnb_stream stream) { return static_cast<cudaStream_t>(stream); }

inline bool is_aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Call body(TypeTag<T>{}) for the C++ type behind a dtype.
template <class Body>
void visit_or_refuse(bnb_dtype dtype, Body&& body) {
    require(visit(dtype, body), "unknown dtype ", int(dtype));
}

inline void check_dtype(bnb_dtype dtype) {
    visit_or_refuse(dtype, [](auto) {});
}

}  // namespace bnb
