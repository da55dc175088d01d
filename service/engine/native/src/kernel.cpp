// The stepper in C++: the computation of `Stepper.advance`, on rows that Python has prepared (see rows.py).
//
// The same files are compiled once for each set of instructions, each time in another namespace. At run time the best
// variant for the processor is chosen. All variants give the same bits: sums of integers are exact in any order, and
// everything else is +, -, *, / and rounding in a fixed order (no -ffast-math, and -ffp-contract=off).

#include <algorithm>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <memory>

#include "layout.h"
#include "model.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include "trial.h"
#endif
#elif defined(__aarch64__)
#include "arm.h"
#endif

static_assert(FLT_EVAL_METHOD == 0, "float must be computed as float, double as double");

// `isa` is a list for the attribute `target`. clang ignores the whole list if it has a word that clang doesn't know, so
// that words for gcc alone are in GRU_WIDE.
#if defined(__clang__)
#define GRU_WIDE
#define GRU_PRAGMA(text) _Pragma(#text)
#define GRU_BEGIN(name, isa) \
    GRU_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function)) namespace gru::name {
#define GRU_END } _Pragma("clang attribute pop")
#else
#define GRU_WIDE ",prefer-vector-width=512"
#define GRU_PRAGMA(text) _Pragma(#text)
#define GRU_BEGIN(name, isa) _Pragma("GCC push_options") GRU_PRAGMA(GCC target(isa)) namespace gru::name {
#define GRU_END } _Pragma("GCC pop_options")
#endif

#if !defined(__clang__) && __GNUC__ < 11
#define GRU_OLD_COMPILER 1
#endif

#if defined(__x86_64__) && defined(__linux__) && !defined(GRU_OLD_COMPILER)
#define GRU_AMX 1
GRU_BEGIN(amx_int8, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,gfni,amx-tile,amx-int8" GRU_WIDE)
namespace vectors {
#include "operations_avx512vnni.inc"
#include "product_vectors.inc"
#include "product_rows.inc"
}  // namespace vectors
#include "tiles_amx.inc"
#include "product_tiles.inc"
#include "arithmetic.inc"
#include "sampling.inc"
#include "step.inc"
GRU_END
#endif

#if defined(__x86_64__)
GRU_BEGIN(avx512vnni, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni" GRU_WIDE)
#include "operations_avx512vnni.inc"
#include "arithmetic.inc"
#include "product_vectors.inc"
#include "product_rows.inc"
#include "sampling.inc"
#include "step.inc"
GRU_END

#if !defined(GRU_OLD_COMPILER)
GRU_BEGIN(avxvnni, "avx2,avxvnni")
#define GRU_DPBUSD_256 _mm256_dpbusd_avx_epi32
#include "operations_avxvnni.inc"
#undef GRU_DPBUSD_256
#include "arithmetic.inc"
#include "product_vectors.inc"
#include "product_rows.inc"
#include "sampling.inc"
#include "step.inc"
GRU_END
#endif

GRU_BEGIN(avx2, "avx2")
#include "operations_avx2.inc"
#include "arithmetic.inc"
#include "product_vectors.inc"
#include "product_rows.inc"
#include "sampling.inc"
#include "step.inc"
GRU_END

GRU_BEGIN(sse4, "ssse3,sse4.1")
#include "operations_sse4.inc"
#include "arithmetic.inc"
#include "product_vectors.inc"
#include "product_rows.inc"
#include "sampling.inc"
#include "step.inc"
GRU_END
#endif

#if defined(GRU_ARM_DOTPROD)
GRU_BEGIN(i8mm, GRU_ARM_I8MM)
#include "operations_i8mm.inc"
#include "product_neon.inc"
#include "product_rows.inc"
#include "arithmetic.inc"
#include "sampling.inc"
#include "step.inc"
GRU_END

GRU_BEGIN(dotprod, GRU_ARM_DOTPROD)
#include "operations_dotprod.inc"
#include "product_neon.inc"
#include "product_rows.inc"
#include "arithmetic.inc"
#include "sampling.inc"
#include "step.inc"
GRU_END
#endif

namespace gru::portable {
#include "product_portable.inc"
#include "arithmetic.inc"
#include "product_rows.inc"
#include "sampling.inc"
#include "step.inc"
}  // namespace gru::portable

// For tests of the tiles on processors without them.
namespace gru::amx_int8_reference {
namespace vectors {
#include "operations_reference.inc"
#include "product_vectors.inc"
#include "product_rows.inc"
}  // namespace vectors
#include "tiles_reference.inc"
#include "product_tiles.inc"
#include "arithmetic.inc"
#include "sampling.inc"
#include "step.inc"
}  // namespace gru::amx_int8_reference

namespace gru {

// A variant, its name, and whether this processor can run it.
struct NamedVariant {
    const char* name;
    const Variant* variant;
    bool (*is_supported)();
};

#if defined(__x86_64__)
bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

// Not every compiler's __builtin_cpu_supports knows this name. AVX2 implies that the system saves the registers.
bool has_avxvnni() {
    unsigned a, b, c, d;
    constexpr unsigned kAvxVnni = 1u << 4;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni) != 0;
}
#endif

#if defined(GRU_AMX)
// Whether the processor claims to have tiles of bytes, and the system lets this process and its children use them. The
// system must be asked, because tiles make what it saves of a thread four times as large: it refuses if a thread's stack
// for signals is too small for that.
bool claims_amx_int8() {
    if (!has_avx512vnni() || !__builtin_cpu_supports("gfni")) return false;
    unsigned a, b, c, d;
    constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBytes) == 0) return false;
    // Some virtual machines show these bits but no palette, or have a system that doesn't save tiles.
    constexpr unsigned kPalettes = 0x1D, kSaved = 3u << 17;
    if (!__get_cpuid_count(kPalettes, 0, &a, &b, &c, &d) || a < 1) return false;
    if (!__get_cpuid_count(kPalettes, 1, &a, &b, &c, &d)) return false;
    const unsigned tile_bytes = a >> 16, row_bytes = b & 0xFFFF, num_tiles = b >> 16, num_rows = c & 0xFFFF;
    if (tile_bytes < 1024 || row_bytes < 64 || num_tiles < 8 || num_rows < 16) return false;
    unsigned saved, unused;
    asm volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (saved & kSaved) == kSaved && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Tries tiles once, because a claim that is wrong would end the process.
bool has_amx_int8() {
    static const bool has = claims_amx_int8() && Trial::passes(amx_int8::tiles_work);
    return has;
}
#endif

// Best first. constexpr, because code that runs while the library is loaded must run on every processor.
constexpr NamedVariant kVariants[] = {
#if defined(__x86_64__)
#if defined(GRU_AMX)
    {"amx_int8", &amx_int8::kVariant, has_amx_int8},
#endif
    {"avx512vnni", &avx512vnni::kVariant, has_avx512vnni},
#if !defined(GRU_OLD_COMPILER)
    {"avxvnni", &avxvnni::kVariant, has_avxvnni},
#endif
    {"avx2", &avx2::kVariant, [] { return bool(__builtin_cpu_supports("avx2")); }},
    {"sse4", &sse4::kVariant, [] { return __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.1"); }},
#endif
#if defined(GRU_ARM_DOTPROD)
    {"i8mm", &i8mm::kVariant, has_i8mm},
    {"dotprod", &dotprod::kVariant, has_dotprod},
#endif
    {"portable", &portable::kVariant, [] { return true; }},
};

// Found by its name only.
constexpr NamedVariant kReference{"amx_int8_reference", &amx_int8_reference::kVariant, [] { return true; }};

// Returns the variant of this name, or null if there is none or this processor can't run it.
const Variant* find(const char* name) {
    for (const NamedVariant& candidate : kVariants)
        if (std::strcmp(candidate.name, name) == 0 && candidate.is_supported()) return candidate.variant;
    if (std::strcmp(kReference.name, name) == 0) return kReference.variant;
    return nullptr;
}

// Threads that neither share rows nor have as many each: one thread advances all rows.
constexpr int64_t kOwnRows = 8;

// With fewer multiples of rows for each thread (see Blocks), rows are not divided in multiples.
constexpr int64_t kManyUnits = 8;

class Kernel {
   public:
    Kernel(const GruModel& model, const Variant& variant, int num_threads, bool always_together)
        : variant_(variant),
          model_(model, variant.packing),
          num_threads_(num_threads),
          cooperation_(always_together) {
        workers_.reserve(num_threads);
        for (int i = 0; i < num_threads; ++i) workers_.emplace_back(model_, variant);
    }

    void advance(GruRow* const* rows, int64_t num_rows, int64_t max_chars, int64_t* drawn, GruStepped* stepped,
                 GruStepped& sums) {
        batch_.reserve(model_, num_rows);
        batch_.rows = rows;
        batch_.stepped = stepped;
        batch_.drawn = drawn;
        batch_.max_chars = max_chars;
        for (int64_t i = 0; i < num_rows; ++i) {
            const int64_t num_left = rows[i]->num_prompt + rows[i]->max_draws;
            batch_.ends[i].store(std::min(max_chars, num_left), std::memory_order_relaxed);
            batch_.num_stored[i] = 0;
            stepped[i] = {};
            stepped[i].is_finished = num_left <= max_chars;
        }
        for (Worker& worker : workers_) worker.reserve(num_rows, model_, variant_);
        if (num_threads_ == 1 || num_rows >= variant_.blocks.shared_rows * num_threads_)
            advance_apart(num_rows);
        else
            advance_shared(num_rows);
        sums = {};
        for (int64_t i = 0; i < num_rows; ++i) {
            continue_after(*rows[i], batch_.ends[i].load(std::memory_order_relaxed), stepped[i]);
            sums.num_read += stepped[i].num_read;
            sums.num_drawn += stepped[i].num_drawn;
            sums.is_finished += stepped[i].is_finished;
            sums.has_stopped += stepped[i].has_stopped;
            sums.num_withheld += stepped[i].num_withheld;
        }
    }

    void recurrent_products(int64_t layer, const int8_t* states, int64_t num_rows, int64_t repeats, int32_t* out) {
        if (layer < 0 || layer >= model_.num_layers) throw std::out_of_range("layer");
        Buffer<int8_t> padded(num_rows * model_.stride);
        for (int64_t row = 0; row < num_rows; ++row)
            std::copy(states + row * model_.units, states + (row + 1) * model_.units,
                      padded.get() + row * model_.stride);
        workers_[0].reserve(num_rows, model_, variant_);
        for (int64_t i = 0; i < repeats; ++i)
            variant_.recurrent_products(model_, layer, padded.get(), num_rows, i % 2 == 1, workers_[0], out);
    }

   private:
    // Makes a row that has done num_steps steps continue with the next call.
    static void continue_after(GruRow& row, int64_t num_steps, GruStepped& stepped) {
        stepped.num_read = std::min(num_steps, row.num_prompt);
        stepped.num_drawn = num_steps - stepped.num_read;
        if (row.classes != nullptr) stepped.num_withheld = row.withheld[row.state];
        row.position += num_steps;
        row.num_read += stepped.num_read;
        row.num_generated += stepped.num_drawn;
        row.num_prompt -= stepped.num_read;
        row.max_draws -= stepped.num_drawn;
        row.num_left -= stepped.num_drawn;
        row.first_stop -= stepped.num_drawn;
        row.num_top = -1;
        row.num_checkpoints = 0;
        if (!stepped.is_finished) return;
        row.max_draws = 0;
        row.num_next = -1;
    }

    void advance_block(int64_t begin, int64_t end, int rank) {
        variant_.advance(model_, batch_, begin, end, workers_[rank], alone_, 0);
    }

    // Each thread takes one block of rows after another and advances it alone.
    void advance_apart(int64_t num_rows) {
        const Blocks& blocks = variant_.blocks;
        const int num_threads = num_rows < kOwnRows * num_threads_ ? 1 : pool_.prepare(num_threads_);
        const int64_t least_number = num_threads == 1 ? 1 : blocks.per_thread * num_threads;
        const int64_t most_number = std::max<int64_t>(num_rows / blocks.least, 1);
        int64_t number = std::max(least_number, round_up(divided(num_rows, blocks.most), num_threads));
        number = std::min(number, most_number);
        if (number > num_threads) number -= number % num_threads;  // as many for each thread
        // With few rows it matters more that threads have the same number of them.
        const int64_t unit = num_rows < kManyUnits * num_threads * blocks.multiple ? 1 : blocks.multiple;
        const int64_t num_units = divided(num_rows, unit);
        const auto block_begin = [&](int64_t i) { return std::min(num_units * i / number * unit, num_rows); };
        std::atomic<int64_t> next{0};
        pool_.run(num_threads, [&](int rank) {
            for (int64_t i; (i = next.fetch_add(1)) < number;) advance_block(block_begin(i), block_begin(i + 1), rank);
        });
    }

    // Rounded up.
    static int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

    // In every step each thread takes all rows and a share of the weights, while that is faster.
    void advance_shared(int64_t num_rows) {
        const auto began = std::chrono::steady_clock::now();
        const bool together = cooperation_.pays(num_rows);
        if (together) {
            const int num_threads = pool_.prepare(num_threads_);
            together_.reset(num_threads);
            pool_.run(num_threads, [&](int rank) {
                variant_.advance(model_, batch_, 0, num_rows, workers_[rank], together_, rank);
            });
        } else {
            advance_apart(num_rows);
        }
        int64_t num_steps = 1;
        for (int64_t i = 0; i < num_rows; ++i) num_steps = std::max(num_steps, batch_.ends[i].load());
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
        cooperation_.measured(num_rows, together, taken.count() / double(num_steps));
    }

    const Variant& variant_;
    const Model model_;
    const int num_threads_;
    Batch batch_;
    std::vector<Worker> workers_;
    Barrier together_;
    Barrier alone_;  // of one thread
    Cooperation cooperation_;
    Pool pool_;
};

// Runs `work` and returns a code for its outcome, because exceptions must not reach Python: 0 for success, 1 for lack
// of memory, 2 for invalid arguments.
template <typename Work>
int32_t guarded(const Work& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    } catch (...) {
        return 2;
    }
}

}  // namespace gru

extern "C" {

#if defined(_WIN32)
#define GRU_EXPORT __declspec(dllexport)
#else
#define GRU_EXPORT __attribute__((visibility("default")))
#endif

// Describes the structures of abi.h to Python; see `describe_layout` for the format.
GRU_EXPORT const char* gru_describe_layout() {
    static const std::string description = gru::describe_layout();
    return description.c_str();
}

// Returns the name of the index-th variant that this processor can run, best first, or null after the last.
GRU_EXPORT const char* gru_variant(int32_t index) {
    for (const gru::NamedVariant& candidate : gru::kVariants)
        if (candidate.is_supported() && index-- == 0) return candidate.name;
    return nullptr;
}

// Creates a kernel with a packed copy of the model. The model's arrays are not used after the call.
GRU_EXPORT int32_t gru_create(const GruModel* model, const char* variant, int32_t num_threads, int32_t always_together,
                              gru::Kernel** kernel) {
    return gru::guarded([&] {
        const gru::Variant* chosen = gru::find(variant);
        if (chosen == nullptr || num_threads < 1 || num_threads > 1024)
            throw std::invalid_argument("variant or threads");
        *kernel = new gru::Kernel(*model, *chosen, num_threads, always_together != 0);
    });
}

GRU_EXPORT void gru_destroy(gru::Kernel* kernel) { delete kernel; }

// Advances B rows by max_chars characters, or to their ends. drawn: (B, max_chars); stepped: (B,); sums: over all rows;
// these three are out.
GRU_EXPORT int32_t gru_advance(gru::Kernel* kernel, GruRow* const* rows, int64_t num_rows, int64_t max_chars,
                               int64_t* drawn, GruStepped* stepped, GruStepped* sums) {
    return gru::guarded([&] { kernel->advance(rows, num_rows, max_chars, drawn, stepped, *sums); });
}

// Computes recurrent products alone, for measurements and tests: (B, H) int8 -> (B, 3H) int32, `repeats` times.
GRU_EXPORT int32_t gru_recurrent_products(gru::Kernel* kernel, int64_t layer, const int8_t* states, int64_t num_rows,
                                          int64_t repeats, int32_t* out) {
    return gru::guarded([&] { kernel->recurrent_products(layer, states, num_rows, repeats, out); });
}

}  // extern "C"
