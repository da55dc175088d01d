// A model packed for one variant of the kernel, and the memory that a call works in.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "layout.h"
#include "memory.h"
#include "packing.h"
#include "ranking.h"
#include "team.h"

namespace gru {

struct Layer {
    Matrix recurrent;
    Matrix inputs;               // empty in the first layer
    Buffer<float> scale;         // [group][3][lanes], of the recurrent products
    Buffer<float> bias_n;        // [group][lanes], of gate n's recurrent product
    Buffer<float> inputs_scale;  // [group][3][lanes]
    Buffer<float> inputs_bias;   // [group][3][lanes]
};

struct Model {
    int64_t vocab, units, num_layers, num_groups;
    int64_t stride;       // of rounded states: padded, and never a power of two, which would crowd a few cache sets
    Buffer<float> table;  // [group][V][3][lanes]
    std::vector<Layer> layers;
    Matrix dense;
    Buffer<float> dense_scale, dense_bias;  // (num_logits,)
    int64_t num_logits;                     // V, padded

    Model(const GruModel& from, const Packing& packing)
        : vocab(from.vocab), units(from.units), num_layers(from.num_layers) {
        const int lanes = packing.lanes, bits = int(from.bits);
        // 255 * 127 * units must fit 31 bits.
        if (vocab < 1 || vocab > 1 << 24 || units < 1 || units > 1 << 16 || num_layers < 1 || num_layers > 64 ||
            (bits != 8 && bits != 4))
            throw std::invalid_argument("sizes out of range");
        num_groups = (units + lanes - 1) / lanes;
        stride = round_up(padded_columns(units), 64) + 64;
        table = pack_gates(from.table, vocab, units, lanes);
        const auto unit_row = [&](int64_t group, int64_t gate, int64_t lane) {
            const int64_t unit = group * lanes + lane;
            return unit < units ? gate * units + unit : -1;
        };
        for (int64_t l = 0; l < num_layers; ++l) {
            const GruLinear &recurrent = from.layers[l].recurrent, &inputs = from.layers[l].inputs;
            if ((l == 0) != (inputs.weight == nullptr))
                throw std::invalid_argument("every layer but the first needs inputs");
            Layer layer;
            layer.recurrent = pack(recurrent.weight, units, num_groups, kGates, bits, packing, unit_row);
            layer.scale = pack_gates(recurrent.scale, 1, units, lanes);
            layer.bias_n = padded(recurrent.bias, units, lanes);
            if (inputs.weight != nullptr) {
                layer.inputs = pack(inputs.weight, units, num_groups, kGates, bits, packing, unit_row);
                layer.inputs_scale = pack_gates(inputs.scale, 1, units, lanes);
                layer.inputs_bias = pack_gates(inputs.bias, 1, units, lanes);
            }
            layers.push_back(std::move(layer));
        }
        const int64_t width = kGates * lanes, dense_groups = (vocab + width - 1) / width;
        const int64_t last_vectors = (vocab - (dense_groups - 1) * width + lanes - 1) / lanes;
        num_logits = dense_groups * width;
        dense = pack(from.dense.weight, units, dense_groups, last_vectors, 8, packing,
                     [&](int64_t group, int64_t vector, int64_t lane) {
                         const int64_t row = group * width + vector * lanes + lane;
                         return row < vocab ? row : -1;
                     });
        dense_scale = padded(from.dense.scale, vocab, width);
        dense_bias = padded(from.dense.bias, vocab, width);
    }
};

// Scratch memory of one thread.
struct Worker {
    Buffer<float> logits;               // (max_rows, num_logits)
    Buffer<double> shares;              // (V,) unnormalised probabilities
    Buffer<double> adjusted;            // (V,) logits after penalties and bias
    Buffer<Ranked> ranked;              // (V,)
    Buffer<uint8_t> may_follow;         // (V,) by class of the row's automaton
    Buffer<uint8_t> mask;               // (V,) characters that the row may draw
    std::vector<int32_t> active;        // indices of the rows that are not at their ends
    std::vector<int32_t> drawing;       // indices of the rows that need logits
    std::vector<int32_t> sums;          // of the numbers of each state in `states`
    std::vector<const int8_t*> states;  // rounded states to multiply with weights

    Worker(const Model& model, int max_rows)
        : logits(max_rows * model.num_logits),
          shares(model.vocab),
          adjusted(model.vocab),
          ranked(model.vocab),
          may_follow(model.vocab),
          mask(model.vocab) {}

    // Reserves memory, so that nothing is allocated during the steps.
    void reserve(int64_t num_rows) {
        active.reserve(num_rows);
        drawing.reserve(num_rows);
        sums.reserve(2 * num_rows);
        states.reserve(2 * num_rows);
    }
};

// The rows of a call. The memory is reused by the next call.
struct Batch {
    GruRow* rows = nullptr;
    std::vector<int64_t> chars;              // (B,) ids of the current step
    std::vector<int64_t> num_stored;         // (B,) checkpoints stored so far
    std::vector<std::atomic<int64_t>> ends;  // (B,) number of steps of each row; the end of a text lowers it
    Buffer<int8_t> rounded;                  // (2, L, B, stride) states before and after a step, alternating

    void reserve(const Model& model, int64_t num_rows) {
        if (num_rows <= int64_t(chars.size())) return;
        rounded = Buffer<int8_t>(2 * model.num_layers * num_rows * model.stride);
        chars.resize(num_rows);
        num_stored.resize(num_rows);
        std::vector<std::atomic<int64_t>>(num_rows).swap(ends);
    }

    int8_t* rounded_row(const Model& model, int64_t parity, int64_t layer, int64_t row) {
        return rounded.get() + ((parity * model.num_layers + layer) * int64_t(chars.size()) + row) * model.stride;
    }
};

// The kernel compiled for one set of instructions; see step.inc.
struct Variant {
    Packing packing;
    int max_rows;
    void (*advance)(const Model&, Batch&, int64_t begin, int64_t end, Worker&, Barrier&, int rank);
    void (*recurrent_products)(const Model&, int64_t layer, const int8_t* rounded, int64_t num_rows, int32_t* out);
};

}  // namespace gru
