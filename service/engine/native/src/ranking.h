// The order of characters by their logits: the likeliest first, equal ones in the order of ids.
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

// Larger for larger values, equal for 0 and -0. Integers, because an order with NaN in it would be none.
inline uint64_t rank_key(double value) {
    value += 0.0;
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint64_t sign = uint64_t(1) << 63;
    return bits & sign ? ~bits : bits | sign;
}

template <typename Float>
void rank(const Float* logits, int64_t size, int64_t num_wanted, Ranked* ranked) {
    for (int64_t i = 0; i < size; ++i) ranked[i] = {rank_key(double(logits[i])), i};
    if (num_wanted < size)
        std::partial_sort(ranked, ranked + num_wanted, ranked + size);
    else
        std::sort(ranked, ranked + size);
}

}  // namespace gru
