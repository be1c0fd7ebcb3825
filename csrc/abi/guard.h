// Exceptions in, status and text out. Nothing thrown inside may reach the C caller.
#pragma once

#include <new>

#include "../common/error.h"

namespace bnb {

// Remember the outcome of the calling thread's last call.
void set_last(bnb_status status, const char* function, const char* message) noexcept;

// Run body; on an exception keep "function: message" for bnb_last_error and return the matching status.
template <class Body>
bnb_status guarded(const char* function, Body&& body) noexcept {
    bnb_status status = BNB_STATUS_OK;
    try {
        body();
        set_last(status, function, "");
    } catch (const Error& error) {
        set_last(status = error.status, function, error.what());
    } catch (const std::bad_alloc&) {
        set_last(status = BNB_STATUS_OUT_OF_MEMORY, function, "out of host memory");
    } catch (const std::exception& error) {
        set_last(status = BNB_STATUS_INTERNAL_ERROR, function, error.what());
    } catch (...) {
        set_last(status = BNB_STATUS_INTERNAL_ERROR, function, "unknown exception");
    }
    return status;
}

}  // namespace bnb
