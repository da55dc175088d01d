// What passes between Python and the kernel. `binding.py` mirrors these structures; every field takes 8 bytes.
#pragma once

#include <cstdint>

extern "C" {

// (rows, columns) integers, row by row; scale and bias: (rows,). The product with round(127 x), times scale, plus bias.
struct GruLinear {
    const int8_t* weight;
    const float* scale;
    const float* bias;
};

// Gates are stacked r, z, n. Scales and biases are in the units of the activations (see gates.py).
// recurrent: bias is (H,), of n alone. inputs.weight: null in the first layer, which has the table.
struct GruLayer {
    GruLinear recurrent;
    GruLinear inputs;
};

struct GruModel {
    int64_t vocab, units, num_layers;
    int64_t bits;        // of the weights of layers: 8 or 4; dense ones have 8
    const float* table;  // (V, 3H), in the units of the activations
    const GruLayer* layers;
    GruLinear dense;
};

// One text during one call. The caller owns all memory. Steps count from 0 in each call: those below num_prompt read.
struct GruRow {
    uint64_t seed;
    int64_t position;
    float* hidden;      // (L, H), read and written
    int64_t num_steps;  // to be done; on return: done
    int64_t stopped;    // on return: a stop string was completed
    int64_t num_prompt;
    const int64_t* prompt;  // (num_prompt,)
    int64_t* chars;         // (num_steps,): those read and those drawn

    double temperature;
    int64_t is_plain;  // temperature is all that applies; then nothing below, up to num_generated, is looked at
    int64_t top_k;
    double top_p, min_p, repetition, presence, frequency;
    int64_t num_biases;
    const int64_t* bias_ids;
    const double* biases;
    const uint8_t* in_prompt;  // (V,) and
    double* num_generated;     // (V,): the history; null where nothing is penalized

    int64_t num_stops;
    const int64_t* stop_lengths;  // (num_stops,)
    const int64_t* stop_ids;      // all of them, one after the other
    int64_t* text;                // what was generated before, and room for num_steps more
    int64_t text_length;

    int64_t num_top;       // likeliest characters to report, at most V; -1: no scores
    int64_t scores_start;  // the first step that has scores; they are stored from index 0 on
    double* chosen;        // (num_steps,)
    int64_t* top_ids;      // (num_steps, num_top)
    double* top;           // (num_steps, num_top)

    int64_t num_keep;
    const int64_t* keep_at;  // (num_keep,) positions in rising order
    float* kept;             // (num_keep, L, H)

    int64_t reaches_length;  // the text ends with these steps, if not before
    int64_t num_next;        // when it has ended, characters likeliest to follow that are to be reported; -1: none
    int64_t* next_ids;       // (num_next,)
    double* next;            // (num_next,) log-probabilities
};

}  // extern "C"
