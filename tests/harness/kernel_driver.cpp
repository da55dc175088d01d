// Calls the functions of a kernel for a Python of another processor; see emulated_kernel.py. A Python here copies the
// memory that a function needs and sends it with the call. So this program knows neither the functions nor the
// structures, and stays the same when they change.
//
// Everything is a number of 8 bytes in this processor's byte order, except names and memory. A call on standard input:
//
//     length of the name, name
//     number of bytes, memory
//     number of addresses, pairs (place of an address in the memory, place to which it points)
//     number of arguments, pairs (1 if the argument is a place in the memory, argument)
//     1 if the function returns a text, else 0
//
// The answer on standard output: the returned number; number of bytes, the text; number of bytes, the memory, in which
// the addresses are what they were in the call.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using Number = uint64_t;
// Processors with 8-byte registers pass each argument in one of them, whatever its type.
using Function = Number (*)(Number, Number, Number, Number, Number, Number, Number);

void fail(const char* why) {
    std::fprintf(stderr, "%s\n", why);
    std::exit(1);
}

// Reads n bytes. Ends the program at the end of the input.
void read(void* to, Number n) {
    if (n != 0 && std::fread(to, 1, n, stdin) != n) std::exit(0);
}

Number read_number() {
    Number number;
    read(&number, sizeof number);
    return number;
}

void write(const void* from, Number n) {
    if (std::fwrite(&n, 1, sizeof n, stdout) != sizeof n || std::fwrite(from, 1, n, stdout) != n) fail("no reader");
}

int main(int argc, char** argv) {
    void* library = argc == 2 ? dlopen(argv[1], RTLD_NOW) : nullptr;
    if (library == nullptr) fail(argc == 2 ? dlerror() : "the argument is the path of the kernel");
    for (;;) {
        std::string name(read_number(), '\0');
        read(&name[0], name.size());
        const Number size = read_number();
        char* memory = static_cast<char*>(std::aligned_alloc(64, size / 64 * 64 + 64));
        if (memory == nullptr) fail("no memory");
        read(memory, size);
        const Number base = reinterpret_cast<Number>(memory);
        std::vector<Number> places, originals;
        for (Number left = read_number(); left != 0; --left) {
            const Number place = read_number(), address = base + read_number();
            Number original;
            std::memcpy(&original, memory + place, sizeof original);
            std::memcpy(memory + place, &address, sizeof address);
            places.push_back(place);
            originals.push_back(original);
        }
        Number arguments[7] = {};
        const Number num_arguments = read_number();
        if (num_arguments > 7) fail("too many arguments");
        for (Number i = 0; i < num_arguments; ++i) {
            const bool is_place = read_number() != 0;
            arguments[i] = read_number() + (is_place ? base : 0);
        }
        const bool returns_text = read_number() != 0;
        const auto function = reinterpret_cast<Function>(dlsym(library, name.c_str()));
        if (function == nullptr) fail("the kernel lacks the function");
        const Number returned = function(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4],
                                         arguments[5], arguments[6]);
        for (std::size_t i = 0; i < places.size(); ++i)
            std::memcpy(memory + places[i], &originals[i], sizeof(Number));
        const char* text = returns_text && returned != 0 ? reinterpret_cast<const char*>(returned) : "";
        std::fwrite(&returned, 1, sizeof returned, stdout);
        write(text, std::strlen(text));
        write(memory, size);
        std::fflush(stdout);
        std::free(memory);
    }
}
