// Tokens of a byte-level vocabulary as text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "common/model_file.h"

namespace kvspn {

class Vocabulary {
  public:
    // Of a file's "vocabulary.bytes" and "vocabulary.ends": token i has the bytes from the end of token i
    // - 1.
    Vocabulary(const ModelFile& file, int size);

    // UTF-8; bytes that are no character, or not a whole one, become U+FFFD, as in Python's errors="replace".
    std::string text(const int32_t* tokens, size_t count) const;

  private:
    std::string bytes_;
    std::vector<int32_t> ends_;
};

// Valid UTF-8: each longest part of a character that goes no further becomes one U+FFFD.
std::string repair(std::string_view bytes);

// Whether a valid text has nothing but white space.
bool is_blank(std::string_view text);

}  // namespace kvspn
