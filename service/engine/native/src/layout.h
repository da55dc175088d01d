// The structures of abi.h for C++, and a description of them for Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#define GRU_STRUCT(Name) \
    struct Name {        \
        static constexpr const char* kName = #Name;
#define GRU_FIELD(Type, name) Type name;
#define GRU_END };
#include "abi.h"
#undef GRU_STRUCT
#undef GRU_FIELD
#undef GRU_END

namespace gru {

// i (signed), u (unsigned) or f (floating point) and the number of bytes; * and the type for an address; or the name of
// a structure.
template <typename Type>
std::string type_code() {
    if constexpr (std::is_pointer_v<Type>)
        return "*" + type_code<std::remove_cv_t<std::remove_pointer_t<Type>>>();
    else if constexpr (std::is_floating_point_v<Type>)
        return "f" + std::to_string(sizeof(Type));
    else if constexpr (std::is_integral_v<Type>)
        return (std::is_signed_v<Type> ? "i" : "u") + std::to_string(sizeof(Type));
    else
        return Type::kName;
}

// For each structure the line `structure NAME BYTES`, followed by a line `field NAME TYPE OFFSET` for each field.
inline std::string describe_layout() {
    std::string text;
#define GRU_STRUCT(Name)        \
    {                           \
        using Structure = Name; \
        text += "structure " #Name " " + std::to_string(sizeof(Name)) + "\n";
#define GRU_FIELD(Type, name) \
    text += "field " #name " " + type_code<Type>() + " " + std::to_string(offsetof(Structure, name)) + "\n";
#define GRU_END }
#include "abi.h"
#undef GRU_STRUCT
#undef GRU_FIELD
#undef GRU_END
    return text;
}

}  // namespace gru
