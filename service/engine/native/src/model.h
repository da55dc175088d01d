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
        stride = round_up(units, 64) + 64;
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

// How the rows of a call are divided among threads that don't share rows. Each block reads all weights in each step.
struct Blocks {
    int per_thread;      // at least, so that a thread that shares its core leaves some to the others
    int64_t least;       // rows
    int64_t most;        // rows, so that the states of a block stay in the cache of a core
    int64_t multiple;    // many rows are divided in multiples of it
    int64_t shared_rows; // with fewer rows for each thread, threads share the rows and divide the weights
};

struct Batch;
struct Worker;

// The kernel compiled for one set of instructions; see step.inc.
struct Variant {
    Packing packing;
    int max_rows;    // whose logits are computed at a time
    bool has_tiles;  // whether products are computed by product_tiles.inc
    bool unpacks;    // whether 4-bit weights are stored as bytes for products with many rows
    Blocks blocks;
    void (*advance)(const Model&, Batch&, int64_t begin, int64_t end, Worker&, Barrier&, int rank);
    void (*recurrent_products)(const Model&, int64_t layer, const int8_t* rounded, int64_t num_rows, bool is_falling,
                               Worker&, int32_t* out);
};

// Rounded states to multiply with weights, in the form that a variant needs. Its `gather` fills it.
struct States {
    std::vector<const int8_t*> rows;
    std::vector<int32_t> sums;  // of the numbers of each state; 0 if the weights have no offset
    // With tiles only; padded to two tiles of rows.
    Buffer<int8_t> copies;   // (rows, stride), because tiles need states at equal distances
    Buffer<int32_t> starts;  // (rows, lanes): the correction for the offset of weights, which sums start with
    int64_t stride = 0;

    void reserve(int64_t num_rows, const Model& model, const Variant& variant) {
        rows.reserve(num_rows);
        sums.reserve(num_rows);
        stride = model.stride;
        const int64_t padded_rows = round_up(num_rows, 32), lanes = variant.packing.lanes;
        if (!variant.has_tiles || padded_rows * lanes <= starts.size()) return;
        copies = Buffer<int8_t>(padded_rows * stride);
        starts = Buffer<int32_t>(padded_rows * lanes);
    }
};

// Where the numbers of a row are in a layer. The numbers of group g are g * lanes after the address.
struct Place {
    float* hidden;
    int8_t* rounded;
    const float* input_gates;  // (3, lanes) of the first group; see GateUpdate in step.inc
};

// Scratch memory of one thread.
struct Worker {
    Buffer<float> logits;          // (max_rows, num_logits)
    Buffer<double> shares;         // (V,) unnormalised probabilities
    Buffer<double> adjusted;       // (V,) logits after penalties and bias
    Buffer<Ranked> ranked;         // (V,)
    Buffer<uint8_t> may_follow;    // (V,) by class of the row's automaton
    Buffer<uint8_t> mask;          // (V,) characters that the row may draw
    std::vector<int32_t> active;   // indices of the rows that are not at their ends
    std::vector<int32_t> drawing;  // indices of the rows that need logits
    std::vector<Place> places;     // of the active rows
    States own, below, last;       // of a layer, of the layer below it, and of the last layer
    Buffer<float> inputs;          // (rows, 3, lanes) input gates of a group, in all layers but the first
    Buffer<uint8_t> unpacked;      // a group of 4-bit weights as bytes

    Worker(const Model& model, const Variant& variant)
        : logits(variant.max_rows * model.num_logits),
          shares(model.vocab),
          adjusted(model.vocab),
          ranked(model.vocab),
          may_follow(model.vocab),
          mask(model.vocab),
          unpacked(variant.unpacks ? kGates * variant.packing.lanes * model.layers[0].recurrent.columns : 0) {
        last.reserve(variant.max_rows, model, variant);
    }

    // Reserves memory, so that nothing is allocated during the steps.
    void reserve(int64_t num_rows, const Model& model, const Variant& variant) {
        active.reserve(num_rows);
        drawing.reserve(num_rows);
        places.reserve(num_rows);
        own.reserve(num_rows, model, variant);
        if (model.num_layers == 1) return;
        below.reserve(num_rows, model, variant);
        const int64_t size = num_rows * kGates * variant.packing.lanes;
        if (size > inputs.size()) inputs = Buffer<float>(size);
    }
};

// The rows of a call. The memory is reused by the next call.
struct Batch {
    GruRow* const* rows = nullptr;           // (B,)
    GruStepped* stepped = nullptr;           // (B,)
    int64_t* drawn = nullptr;                // (B, max_chars) the characters drawn
    int64_t max_chars = 0;                   // steps of a row at most
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

}  // namespace gru
