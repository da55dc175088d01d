// Ranks characters by their logits: the likeliest first, equal ones in the order of ids.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace gru {

struct Ranked {
    uint64_t key;
    int64_t id;
    bool operator<(const Ranked& other) const { return key != other.key ? key > other.key : id < other.id; }
};

// Returns a larger key for a larger value, and the same for 0 and -0. The keys are integers because comparisons with
// NaN would make the order inconsistent.
inline uint64_t rank_key(double value) {
    value += 0.0;
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint64_t sign = uint64_t(1) << 63;
    return bits & sign ? ~bits : bits | sign;
}

// Puts the num_ranked likeliest of `size` characters at the start of `ranked`, in order.
template <typename Float>
void rank(const Float* logits, int64_t size, int64_t num_ranked, Ranked* ranked) {
    for (int64_t i = 0; i < size; ++i) ranked[i] = {rank_key(double(logits[i])), i};
    if (num_ranked < size)
        std::partial_sort(ranked, ranked + num_ranked, ranked + size);
    else
        std::sort(ranked, ranked + size);
}

}  // namespace gru
