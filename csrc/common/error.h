// The one exception type that native code throws; abi/guard.h turns it into a status and a text.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "../bnb.h"

namespace bnb {

class Error : public std::runtime_error {
  public:
    Error(bnb_status status, const std::string& text) : std::runtime_error(text), status(status) {}
    const bnb_status status;
};

// Join anything that streams into one string: text("n is ", n).
template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream stream;
    (stream << ... << parts);
    return stream.str();
}

// Refuse an argument unless the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (!condition) throw Error(BNB_STATUS_INVALID_ARGUMENT, text(parts...));
}

}  // namespace bnb
