// What a wrong argument raises inside the library; the C ABI turns it into a status and a text.
#pragma once

#include <sstream>
#include <stdexcept>

namespace kvspn {

struct InvalidArgument : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream text;
    (text << ... << parts);
    throw InvalidArgument(text.str());
}

}  // namespace kvspn
