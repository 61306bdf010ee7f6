#include "common/text.h"

#include "common/error.h"

namespace kvspn {
namespace {

// Bytes of the character that `bytes` begins with, and whether it is whole.
struct Character {
    size_t bytes;
    bool whole;
};
Character first_of(std::string_view bytes) {
    const auto at = [&](size_t i) { return i < bytes.size() ? uint8_t(bytes[i]) : 0; };
    const uint8_t lead = at(0);
    if (lead < 0x80) return {1, true};
    const size_t size = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    if (lead < 0xc2 || lead > 0xf4) return {1, false};
    // Of the second byte: no longer forms than needed, no surrogates, nothing above U+10FFFF.
    const uint8_t low = lead == 0xe0   ? 0xa0
                        : lead == 0xf0 ? 0x90
                                       : 0x80,
                  high = lead == 0xed   ? 0x9f
                         : lead == 0xf4 ? 0x8f
                                        : 0xbf;
    if (at(1) < low || at(1) > high) return {1, false};
    for (size_t i = 2; i < size; ++i)
        if ((at(i) & 0xc0) != 0x80) return {i, false};
    return {size, true};
}

}  // namespace

Vocabulary::Vocabulary(const ModelFile& file, int size) {
    const kvspn_tensor &bytes = file.tensor("vocabulary.bytes", {Dtype::int4}, {kAny}),
                       &ends = file.tensor("vocabulary.ends", {Dtype::int32}, {size});
    bytes_.assign(static_cast<const char*>(bytes.data), size_t(bytes.shape[0]));
    const int32_t* own = static_cast<const int32_t*>(ends.data);
    ends_.assign(own, own + size);
    int32_t last = 0;
    for (const int32_t end : ends_) {
        require(end >= last && end <= bytes.shape[0], "vocabulary.ends must rise to at most ", bytes.shape[0],
                ", got ", end, " behind ", last);
        last = end;
    }
}

std::string Vocabulary::text(const int32_t* tokens, size_t count) const {
    std::string bytes;
    for (size_t i = 0; i < count; ++i) {
        const size_t token = size_t(tokens[i]), begin = token ? size_t(ends_[token - 1]) : 0;
        bytes.append(bytes_, begin, size_t(ends_[token]) - begin);
    }
    return repair(bytes);
}

std::string repair(std::string_view bytes) {
    std::string text;
    while (!bytes.empty()) {
        const Character next = first_of(bytes);
        text += next.whole ? bytes.substr(0, next.bytes) : "\xef\xbf\xbd";
        bytes.remove_prefix(next.bytes);
    }
    return text;
}

bool is_blank(std::string_view text) {
    while (!text.empty()) {
        const size_t size = first_of(text).bytes;
        uint32_t code = uint8_t(text[0]) & (size == 1 ? 0x7f : 0x7f >> size);
        for (size_t i = 1; i < size; ++i) code = code << 6 | (uint8_t(text[i]) & 0x3f);
        const bool space = code == ' ' || (code >= 9 && code <= 13) || (code >= 28 && code <= 31) ||
                           code == 0x85 || code == 0xa0 || code == 0x1680 ||
                           (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 ||
                           code == 0x202f || code == 0x205f || code == 0x3000;
        if (!space) return false;
        text.remove_prefix(size);
    }
    return true;
}

}  // namespace kvspn
