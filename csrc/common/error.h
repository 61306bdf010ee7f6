// What a wrong argument raises inside the library; the C ABI turns it into a status and a text.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace kvspn {

struct InvalidArgument : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What a row's logits raise that no token can be chosen by.
struct NoToken : std::runtime_error {
    NoToken(int row, int position)
        : std::runtime_error("the logits of row " + std::to_string(row) + " at position " +
                             std::to_string(position) +
                             " must be numbers, one of them above -inf, got NaN or -inf alone") {}
};

template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream text;
    (text << ... << parts);
    throw InvalidArgument(text.str());
}

}  // namespace kvspn
