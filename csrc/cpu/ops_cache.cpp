// What moves in a cache, on the CPU: append_kv, accept_and_rollback and compact_kv.
#include <algorithm>
#include <vector>

#include "common/accept.h"
#include "common/memory.h"
#include "common/ops.h"
#include "common/tensor.h"
#include "cpu/parts.h"

namespace kvspn::cpu {
namespace {

int32_t& integer(const kvspn_tensor& tensor, int64_t row, int64_t column = 0) {
    const int64_t at = row * tensor.strides[0] + (tensor.ndim > 1 ? column * tensor.strides[1] : 0);
    return static_cast<int32_t*>(tensor.data)[at];
}

uint8_t& flag(const kvspn_tensor& tensor, int64_t row) {
    return static_cast<uint8_t*>(tensor.data)[row * tensor.strides[0]];
}

// Of a cache [L, 2, B, H, S, D] or its scales [L, 2, B, H, S]: the bytes of one position of one head.
char* place(const kvspn_tensor& cache, int64_t layer, int64_t part, int64_t row, int64_t head,
            int64_t position) {
    const int64_t* at = cache.strides;
    return static_cast<char*>(cache.data) +
           (layer * at[0] + part * at[1] + row * at[2] + head * at[3] + position * at[4]) *
               int64_t(size_of(Dtype(cache.dtype)));
}

}  // namespace

void append_kv(const kvspn_append_params& p) {
    check(p);
    check_stream(p.stream);
    const int64_t rows = p.kv.shape[2], heads = p.kv.shape[3], capacity = p.kv.shape[4],
                  width = p.kv.shape[5], queries = p.k.shape[2];
    const size_t bytes = width * size_of(Dtype(p.kv.dtype));
    const Kernels& kernels = select_kernels(nullptr);
    Memory floats(width * sizeof(float));
    for (int64_t b = 0; b < rows; ++b) {
        if (p.finished.data && flag(p.finished, b)) continue;
        for (int64_t q = 0; q < queries; ++q) {
            const int64_t position = int64_t(integer(p.lengths, b)) + q;
            if (position < 0 || position >= capacity) continue;
            for (int64_t n = 0; n < 2 * heads; ++n) {
                const int64_t part = n / heads, head = n % heads;
                const kvspn_tensor& x = part ? p.v : p.k;
                const int64_t from = b * x.strides[0] + head * x.strides[1] + q * x.strides[2];
                char* to = place(p.kv, p.layer, part, b, head, position);
                if (p.kv.dtype != KVSPN_INT8) {
                    std::memcpy(to, static_cast<char*>(x.data) + from * int64_t(size_of(Dtype(x.dtype))),
                                bytes);
                    continue;
                }
                for (int64_t c = 0; c < width; ++c) floats.as<float>()[c] = element(x, from + c);
                *reinterpret_cast<float*>(place(p.kv_scale, p.layer, part, b, head, position)) =
                    kernels.quantise_int8(floats.as<float>(), int(width), reinterpret_cast<int8_t*>(to));
            }
        }
    }
}

namespace {

struct OpRow {
    const kvspn_accept_params& p;
    int64_t b;
    int32_t draft(int64_t i) const { return integer(p.draft, b, i); }
    int32_t rank(int64_t i) const { return integer(p.rank, b, i); }
    int32_t choice(int64_t i) const { return integer(p.argmax, b, i); }
    void emit(int64_t i, int64_t at, int32_t token) const {
        if (at < 0 || at >= p.tokens.shape[1]) return;
        integer(p.tokens, b, at) = token;
        if (!given(p.scores)) return;
        const float* scores =
            static_cast<const float*>(p.scores.data) + b * p.scores.strides[0] + i * p.scores.strides[1];
        const bool drafted = i < p.draft.shape[1] && draft(i) == token;
        static_cast<float*>(p.log_probs.data)[b * p.log_probs.strides[0] + at] =
            scores[drafted ? 2 : 1] - scores[0];
    }
};

}  // namespace

void accept_and_rollback(const kvspn_accept_params& p) {
    check(p);
    check_stream(p.stream);
    const StopRule rule{p.k, p.eos, p.max_length};
    for (int64_t b = 0; b < p.tokens.shape[0]; ++b) {
        if (flag(p.finished, b)) continue;
        flag(p.finished, b) =
            accept(OpRow{p, b}, int32_t(p.draft.shape[1]), rule, integer(p.lengths, b), &integer(p.stats, b));
    }
}

void compact_kv(const kvspn_compact_params& p) {
    check(p);
    const int64_t layers = p.kv.shape[0], rows = p.kv.shape[2], heads = p.kv.shape[3],
                  capacity = p.kv.shape[4], count = p.source.shape[1];
    struct Move {
        int64_t from_row, from, row, to;
    };
    std::vector<Move> moves;
    for (int64_t b = 0; b < rows; ++b) {
        for (int64_t m = 0; m < count; ++m) {
            const Move move{integer(p.rows, b), integer(p.source, b, m), b, integer(p.start, b) + m};
            if (move.from_row >= 0 && move.from_row < rows && std::min(move.from, move.to) >= 0 &&
                std::max(move.from, move.to) < capacity)
                moves.push_back(move);
        }
    }
    const int64_t planes = layers * 2 * heads;
    const Parts parts(p.stream, planes);
    const auto move_all = [&](const kvspn_tensor& cache, int64_t width) {
        const size_t bytes = width * size_of(Dtype(cache.dtype));
        const auto held = scratch<char>(parts.count() * moves.size() * bytes);
        parts.run([&](int thread) {
            char* mine = held.get() + thread * moves.size() * bytes;
            for (int64_t n = thread; n < planes; n += parts.count()) {
                const int64_t layer = n / (2 * heads), part = n / heads % 2, head = n % heads;
                for (size_t i = 0; i < moves.size(); ++i)
                    std::memcpy(mine + i * bytes,
                                place(cache, layer, part, moves[i].from_row, head, moves[i].from), bytes);
                for (size_t i = 0; i < moves.size(); ++i)
                    std::memcpy(place(cache, layer, part, moves[i].row, head, moves[i].to), mine + i * bytes,
                                bytes);
            }
        });
    };
    move_all(p.kv, p.kv.shape[5]);
    if (p.kv_scale.data) move_all(p.kv_scale, 1);
}

}  // namespace kvspn::cpu
