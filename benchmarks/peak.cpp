// The most that a core of this processor multiplies: instructions that multiply bytes, on registers alone.
//
//     peak                  prints the names of those that this processor has
//     peak NAME SECONDS     prints the multiply-adds a second of one of them

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

// Each does `repeats` times 12 (tiles: 6) independent multiplications, and returns its multiply-adds. Empty assembly
// makes the compiler compute each result.
#if defined(__x86_64__)

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static int64_t tiles(int64_t repeats) {
    const TileConfig config;
    asm volatile("ldtilecfg %0" : : "m"(config));
    asm volatile("tilezero %%tmm0; tilezero %%tmm1; tilezero %%tmm2; tilezero %%tmm3" : :);
    asm volatile("tilezero %%tmm4; tilezero %%tmm5; tilezero %%tmm6; tilezero %%tmm7" : :);
    for (int64_t i = 0; i < repeats; ++i) {
        asm volatile("tdpbsud %%tmm7, %%tmm6, %%tmm0; tdpbsud %%tmm7, %%tmm6, %%tmm1" : :);
        asm volatile("tdpbsud %%tmm7, %%tmm6, %%tmm2; tdpbsud %%tmm7, %%tmm6, %%tmm3" : :);
        asm volatile("tdpbsud %%tmm7, %%tmm6, %%tmm4; tdpbsud %%tmm7, %%tmm6, %%tmm5" : :);
    }
    asm volatile("tilerelease");
    return repeats * 6 * 16 * 16 * 64;
}

static bool has_tiles() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & 1u << 24) && (d & 1u << 25) &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
}

__attribute__((target("avx512f,avx512vnni"))) static int64_t vnni512(int64_t repeats) {
    __m512i sums[12] = {}, weights = _mm512_set1_epi8(3), states = _mm512_set1_epi8(5);
    for (int64_t i = 0; i < repeats; ++i)
#pragma GCC unroll 12
        for (int j = 0; j < 12; ++j) {
            sums[j] = _mm512_dpbusd_epi32(sums[j], weights, states);
            asm volatile("" : "+v"(sums[j]));
        }
    return repeats * 12 * 64;
}

__attribute__((target("avx2,avxvnni"))) static int64_t vnni256(int64_t repeats) {
    __m256i sums[12] = {}, weights = _mm256_set1_epi8(3), states = _mm256_set1_epi8(5);
    for (int64_t i = 0; i < repeats; ++i)
#pragma GCC unroll 12
        for (int j = 0; j < 12; ++j) {
            sums[j] = _mm256_dpbusd_avx_epi32(sums[j], weights, states);
            asm volatile("" : "+x"(sums[j]));
        }
    return repeats * 12 * 32;
}

static bool has_vnni256() {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}

// Two products of bytes in 16 bits, their pairs in 32, and the sum.
__attribute__((target("avx2"))) static int64_t maddubs256(int64_t repeats) {
    __m256i sums[12] = {}, weights = _mm256_set1_epi8(3), states = _mm256_set1_epi8(5);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t i = 0; i < repeats; ++i)
#pragma GCC unroll 12
        for (int j = 0; j < 12; ++j) {
            asm volatile("" : "+x"(states));
            sums[j] = _mm256_add_epi32(sums[j], _mm256_madd_epi16(_mm256_maddubs_epi16(weights, states), ones));
            asm volatile("" : "+x"(sums[j]));
        }
    return repeats * 12 * 32;
}

__attribute__((target("ssse3"))) static int64_t maddubs128(int64_t repeats) {
    __m128i sums[12] = {}, weights = _mm_set1_epi8(3), states = _mm_set1_epi8(5);
    const __m128i ones = _mm_set1_epi16(1);
    for (int64_t i = 0; i < repeats; ++i)
#pragma GCC unroll 12
        for (int j = 0; j < 12; ++j) {
            asm volatile("" : "+x"(states));
            sums[j] = _mm_add_epi32(sums[j], _mm_madd_epi16(_mm_maddubs_epi16(weights, states), ones));
            asm volatile("" : "+x"(sums[j]));
        }
    return repeats * 12 * 16;
}

#elif defined(__aarch64__)

__attribute__((target("arch=armv8.2-a+dotprod"))) static int64_t sdot(int64_t repeats) {
    int32x4_t sums[12] = {};
    const int8x16_t weights = vdupq_n_s8(3), states = vdupq_n_s8(5);
    for (int64_t i = 0; i < repeats; ++i)
#pragma GCC unroll 12
        for (int j = 0; j < 12; ++j) {
            sums[j] = vdotq_s32(sums[j], weights, states);
            asm volatile("" : "+w"(sums[j]));
        }
    return repeats * 12 * 16;
}

__attribute__((target("arch=armv8.2-a+i8mm"))) static int64_t smmla(int64_t repeats) {
    int32x4_t sums[12] = {};
    const int8x16_t weights = vdupq_n_s8(3), states = vdupq_n_s8(5);
    for (int64_t i = 0; i < repeats; ++i)
#pragma GCC unroll 12
        for (int j = 0; j < 12; ++j) {
            sums[j] = vmmlaq_s32(sums[j], weights, states);
            asm volatile("" : "+w"(sums[j]));
        }
    return repeats * 12 * 32;
}

#endif

struct Instruction {
    const char* name;
    int64_t (*run)(int64_t repeats);
    bool (*is_supported)();
};

static const Instruction kInstructions[] = {
#if defined(__x86_64__)
    {"tiles", tiles, has_tiles},
    {"vnni512", vnni512, [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"); }},
    {"vnni256", vnni256, has_vnni256},
    {"maddubs256", maddubs256, [] { return bool(__builtin_cpu_supports("avx2")); }},
    {"maddubs128", maddubs128, [] { return bool(__builtin_cpu_supports("ssse3")); }},
#elif defined(__aarch64__)
    {"smmla", smmla, [] { return (getauxval(AT_HWCAP2) & 1u << 13) != 0; }},
    {"sdot", sdot, [] { return (getauxval(AT_HWCAP) & 1u << 20) != 0; }},
#endif
    {nullptr, nullptr, nullptr},
};

int main(int argc, char** argv) {
    for (const Instruction* it = kInstructions; it->name != nullptr; ++it) {
        if (!it->is_supported()) continue;
        if (argc < 3) {
            std::puts(it->name);
        } else if (std::strcmp(argv[1], it->name) == 0) {
            it->run(100'000);  // the processor changes its frequency for wide instructions
            const std::chrono::duration<double> enough(std::atof(argv[2]));
            const auto began = std::chrono::steady_clock::now();
            std::chrono::duration<double> taken{};
            int64_t products = 0;
            do {
                products += it->run(100'000);
                taken = std::chrono::steady_clock::now() - began;
            } while (taken < enough);
            std::printf("%.0f\n", double(products) / taken.count());
            return 0;
        }
    }
    return argc < 3 ? 0 : 1;
}
