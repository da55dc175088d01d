// Stores weights in the order in which a variant of the kernel reads them.
//
// A group is three vectors of `lanes` outputs each: the gates r, z and n of `lanes` units. So the products of one group
// are all that the gates of its units need. In memory a group is
//
//     8 bits: [columns / depth][3][lanes][depth] bytes, each an integer + offset
//     4 bits: [columns / depth / 2][3][lanes][depth] bytes, each with two integers + 8: the low half belongs to an even
//             block of columns, the high half to the odd block after it
//
// Padding holds the integer 0 (stored as the offset), so that its products are 0.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "memory.h"

namespace gru {

constexpr int kGates = 3;
constexpr int kOffset4 = 8;  // 4-bit integers are stored without a sign

// The order of weights that a variant needs.
struct Packing {
    int lanes;         // outputs in a vector
    int depth;         // columns that one instruction multiplies and adds
    int offset8;       // added to 8-bit integers when they are stored
    int columns = 16;  // columns are padded to a multiple of it: at least two blocks of `depth`, which is at most 8
};

// Whether requests by the program for 4-bit weights help. With 1 to 4 texts they make a step up to 14 % faster on an Intel
// Xeon. On AMD they made it slower, and in 8 bits on both.
inline bool prefetching_helps() {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A group of a matrix, as products read it.
struct Group {
    const uint8_t* data;
    int bits, offset;
    int64_t columns;
    int num_vectors;  // 1 to 3
    bool prefetches;
    uint8_t* bytes = nullptr;  // where the next product stores 4-bit weights as bytes; null: nowhere

    // Returns the weights that a product has stored there.
    Group unpacked() const { return {bytes, 8, offset, columns, num_vectors, false}; }
};

struct Matrix {
    int bits = 8;
    int offset = 0;       // added to each integer that is stored
    int64_t columns = 0;  // padded
    int64_t num_groups = 0;
    int64_t last_vectors = kGates;  // vectors of the last group: fewer than three if the others would be padding
    int64_t group_bytes = 0;
    bool prefetches = false;  // whether products with few states request weights before they need them
    Buffer<uint8_t> data;

    Group group(int64_t g) const {
        const int num_vectors = g + 1 == num_groups ? int(last_vectors) : kGates;
        return {data.get() + g * group_bytes, bits, offset, columns, num_vectors, prefetches};
    }
};

// Packs `weight` (rows, columns). row_of(group, vector, lane) returns the row to store there, or -1 for padding.
template <typename RowOf>
Matrix pack(const int8_t* weight, int64_t columns, int64_t num_groups, int64_t last_vectors, int bits,
            const Packing& packing, const RowOf& row_of) {
    const int lanes = packing.lanes, depth = packing.depth, limit = bits == 8 ? 127 : 7;
    Matrix matrix;
    matrix.bits = bits;
    matrix.offset = bits == 8 ? packing.offset8 : kOffset4;
    matrix.columns = round_up(columns, packing.columns);
    matrix.num_groups = num_groups;
    matrix.prefetches = bits == 4 && prefetching_helps();
    matrix.last_vectors = last_vectors;
    matrix.group_bytes = kGates * lanes * matrix.columns * bits / 8;
    matrix.data = Buffer<uint8_t>(num_groups * matrix.group_bytes);
    for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t vectors = g + 1 == num_groups ? last_vectors : kGates;
        uint8_t* group = matrix.data.get() + g * matrix.group_bytes;
        for (int64_t v = 0; v < vectors; ++v)
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t row = row_of(g, v, lane);
                for (int64_t k = 0; k < matrix.columns; ++k) {
                    const int value = row < 0 || k >= columns ? 0 : weight[row * columns + k];
                    if (value < -limit || value > limit) throw std::invalid_argument("a weight is out of range");
                    const uint8_t stored = uint8_t(value + matrix.offset);
                    const int64_t block = k / depth, byte = k % depth;
                    if (bits == 8)
                        group[((block * vectors + v) * lanes + lane) * depth + byte] = stored;
                    else
                        group[((block / 2 * vectors + v) * lanes + lane) * depth + byte] |=
                            uint8_t(stored << (block % 2 * 4));
                }
            }
    }
    return matrix;
}

// Packs (3H,) or (rows, 3H) floats as [group][row][3][lanes], padded with zeros.
inline Buffer<float> pack_gates(const float* values, int64_t rows, int64_t units, int lanes) {
    const int64_t num_groups = (units + lanes - 1) / lanes;
    Buffer<float> packed(num_groups * rows * kGates * lanes);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t gate = 0; gate < kGates; ++gate)
            for (int64_t unit = 0; unit < units; ++unit)
                packed[((unit / lanes * rows + row) * kGates + gate) * lanes + unit % lanes] =
                    values[(row * kGates + gate) * units + unit];
    return packed;
}

// Returns a copy padded with zeros to a multiple of `to`.
inline Buffer<float> padded(const float* values, int64_t size, int64_t to) {
    Buffer<float> copy(round_up(size, to));
    std::memcpy(copy.get(), values, std::size_t(size) * sizeof(float));
    return copy;
}

}  // namespace gru
