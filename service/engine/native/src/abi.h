// The structures that Python passes to the kernel. This file is the only place that says which fields they have.
//
// `layout.h` includes it twice: once to declare the structures, and once to describe them to Python, which takes the
// name, type and offset of every field from that description (`gru_describe_layout`, read in `binding.py`). So fields
// can be moved and added here freely; a field that is renamed or gets another type must be changed in `binding.py` too.
//
// A structure is used only after it was declared. The caller owns all memory that is pointed to.

// A linear layer: (weight @ round(127 x)) * scale + bias.
GRU_STRUCT(GruLinear)
GRU_FIELD(const int8_t*, weight)  // (rows, columns) integers, row by row; null if there is no such layer
GRU_FIELD(const float*, scale)    // (rows,)
GRU_FIELD(const float*, bias)     // (rows,)
GRU_END

// A GRU layer. The rows of its weights are those of gates r, z and n, in this order. Scales and biases are multiplied
// by the scales of the activations; see `gate_scales` in gates.py.
GRU_STRUCT(GruLayer)
GRU_FIELD(GruLinear, recurrent)  // (3H, H) weights of the layer's own state; its bias is (H,), of gate n alone
GRU_FIELD(GruLinear, inputs)     // (3H, H) weights of the state of the layer below; absent in the first layer
GRU_END

GRU_STRUCT(GruModel)
GRU_FIELD(int64_t, vocab)           // V, number of characters
GRU_FIELD(int64_t, units)           // H, numbers in the state of a layer
GRU_FIELD(int64_t, num_layers)      // L
GRU_FIELD(int64_t, bits)            // of the weights of GRU layers: 8 or 4; dense weights always have 8
GRU_FIELD(const float*, table)      // (V, 3H): input gates of the first layer for each character, scaled as above
GRU_FIELD(const GruLayer*, layers)  // (L,)
GRU_FIELD(GruLinear, dense)         // (V, H) weights from the last layer's state to logits
GRU_END

// One text, from its first call to its end: the kernel updates it, so that the next call continues. Steps are counted
// from 0 in each call. The first num_prompt steps read characters of the prompt, the others draw theirs.
GRU_STRUCT(GruRow)
GRU_FIELD(uint64_t, seed)          // random numbers depend on seed and position alone
GRU_FIELD(int64_t, position)       // characters consumed; updated
GRU_FIELD(float*, hidden)          // (L, H): the state, updated in place
GRU_FIELD(const int64_t*, prompt)  // ids of characters to read
GRU_FIELD(int64_t, num_read)       // of them, before this call; updated
GRU_FIELD(int64_t, num_generated)  // characters drawn before this call; updated
GRU_FIELD(int64_t, num_prompt)     // characters left to read; updated
GRU_FIELD(int64_t, max_draws)      // characters left to draw, unless the automaton ends the text; updated

GRU_FIELD(double, temperature)        // 0: always draw the likeliest character
GRU_FIELD(int64_t, is_plain)          // 1 if temperature is the only setting: top_k to biases are ignored
GRU_FIELD(int64_t, top_k)             // 0: no limit
GRU_FIELD(double, top_p)              // 1: no limit
GRU_FIELD(double, min_p)              // 0: no limit
GRU_FIELD(double, repetition_penalty)  // penalties, as in sampling.py
GRU_FIELD(double, presence_penalty)
GRU_FIELD(double, frequency_penalty)
GRU_FIELD(int64_t, num_biases)        // pairs of logit_bias
GRU_FIELD(const int64_t*, bias_ids)   // (num_biases,)
GRU_FIELD(const double*, biases)      // (num_biases,)
GRU_FIELD(const uint8_t*, allowed)    // (V,) 1 if the character can be drawn; null: all can
GRU_FIELD(const uint8_t*, in_prompt)  // (V,) 1 if the prompt has the character; null without penalties
GRU_FIELD(double*, times_generated)   // (V,) how often each character was generated; updated; null without penalties

// The automaton over the generated characters: see automaton.py.
GRU_FIELD(const int32_t*, classes)       // (V,) from 0 to num_classes - 1; null: there is no automaton
GRU_FIELD(int64_t, num_classes)          // C, at most V
GRU_FIELD(const int32_t*, transitions)   // (S, C) the next state; -1 if the class is not allowed
GRU_FIELD(const int32_t*, fewest)        // (S,) characters that complete a text; null: nothing is ever forbidden
GRU_FIELD(const int32_t*, fewest_after)  // (S,) the same if the text has to get longer; 2^31 - 1 if it can't
GRU_FIELD(const int32_t*, stop_chars)    // (S,) above 0 where a stop string is complete
GRU_FIELD(const int32_t*, withheld)      // (S,) how many of the last characters may belong to a stop string
GRU_FIELD(int64_t, state)                // after all generated characters; updated
GRU_FIELD(int64_t, num_left)             // characters until the text must be complete; updated
GRU_FIELD(int64_t, first_stop)           // characters to draw before one may complete a stop string; updated

// Results that the caller requests anew for each call.
GRU_FIELD(int64_t, num_top)       // likeliest characters to report at each step, at most V; -1: no scores
GRU_FIELD(int64_t, scores_start)  // the first step with scores; its scores have index 0 in the arrays below
GRU_FIELD(float*, chosen)         // (num_steps - scores_start,) out: log-probability of the step's own character
GRU_FIELD(int32_t*, top_ids)      // (num_steps - scores_start, num_top) out: the likeliest characters
GRU_FIELD(float*, top)            // (num_steps - scores_start, num_top) out: their log-probabilities
GRU_FIELD(float*, among_allowed)  // (num_drawn,) out: of each drawn character, among those that were
                                  // allowed by the automaton; null: none

GRU_FIELD(int64_t, num_checkpoints)              // states to copy during this call
GRU_FIELD(const int64_t*, checkpoint_positions)  // (num_checkpoints,) in rising order
GRU_FIELD(float*, checkpoints)                   // (num_checkpoints, L, H) out: the copies

GRU_FIELD(int64_t, num_next)   // likeliest next characters to report when the text is finished; -1: none
GRU_FIELD(int32_t*, next_ids)  // (num_next,) out: the likeliest characters
GRU_FIELD(float*, next)        // (num_next,) out: their log-probabilities
GRU_END

// What one call did to one text; or to all of them, as sums.
GRU_STRUCT(GruStepped)
GRU_FIELD(int64_t, num_read)      // characters of the prompt
GRU_FIELD(int64_t, num_drawn)     // characters
GRU_FIELD(int64_t, is_finished)   // 1 if nothing is left to do
GRU_FIELD(int64_t, has_stopped)   // 1 if the automaton ended the text after a character that was drawn
GRU_FIELD(int64_t, num_withheld)  // as the automaton says; 0 without one
GRU_END
