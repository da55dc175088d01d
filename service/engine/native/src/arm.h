// What an Arm processor can do. It can't be asked itself, but the system knows.
#pragma once

// Defines GRU_ARM_DOTPROD and GRU_ARM_I8MM, the instructions of the variants as the compiler's attribute names them,
// unless there can be no variants:
// - The order of bytes in registers is part of the variants.
// - GCC before 10 does not know i8mm.
// - GCC refuses a function that calls an inline function which may use more instructions. So the attribute must include
//   all instructions that the whole library is compiled for, and Armv8.2, which the assembler wants.
#if !defined(__AARCH64EL__)
#elif defined(__clang__)
#define GRU_ARM_DOTPROD "dotprod"
#define GRU_ARM_I8MM "i8mm"
#elif __GNUC__ < 10
#elif defined(__ARM_FEATURE_DOTPROD)
#define GRU_ARM_DOTPROD "+dotprod"
#define GRU_ARM_I8MM "+i8mm"
#elif defined(__ARM_FEATURE_SVE) || defined(__ARM_FEATURE_FP16_SCALAR_ARITHMETIC)
#elif defined(__ARM_FEATURE_CRYPTO)
#define GRU_ARM_DOTPROD "arch=armv8.2-a+crypto+dotprod"
#define GRU_ARM_I8MM "arch=armv8.2-a+crypto+i8mm"
#else
#define GRU_ARM_DOTPROD "arch=armv8.2-a+dotprod"
#define GRU_ARM_I8MM "arch=armv8.2-a+i8mm"
#endif

#if defined(GRU_ARM_DOTPROD)

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace gru {

// The bits are those of Linux, which older headers lack (HWCAP_ASIMDDP and HWCAP2_I8MM).
#if defined(__linux__)
inline bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
inline bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#elif defined(__APPLE__)
inline bool has_feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
inline bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
inline bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
inline bool has_dotprod() { return false; }
inline bool has_i8mm() { return false; }
#endif

}  // namespace gru

#endif
