// Computes the instructions of AMX for processors without them, as a library for LD_PRELOAD: each is an illegal
// instruction there, so that the signal's handler decodes it, computes it, and continues after it.
//
// Written from Intel's manual and not from the kernel: encodings, the order of operands, the sizes of tiles and their
// configuration are checked, and what the manual forbids ends the process with SIGILL.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

static __thread struct {
    int is_configured;
    uint16_t row_bytes[8];
    uint8_t rows[8];
    uint8_t data[8][16][64];
} tiles;

// Stops as the processor would.
static void refuse(void) {
    signal(SIGILL, SIG_DFL);
    sigset_t illegal;
    sigemptyset(&illegal);
    sigaddset(&illegal, SIGILL);
    sigprocmask(SIG_UNBLOCK, &illegal, NULL);
    raise(SIGILL);
    _exit(1);
}

static int64_t general(const greg_t* registers, int number) {
    static const int order[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers[order[number]];
}

static void configure(const uint8_t* memory) {
    memset(&tiles, 0, sizeof tiles);
    if (memory[0] != 1 || memory[1] != 0) refuse();
    for (int i = 2; i < 16; ++i)
        if (memory[i] != 0) refuse();
    for (int tile = 0; tile < 16; ++tile) {
        uint16_t row_bytes;
        memcpy(&row_bytes, memory + 16 + 2 * tile, 2);
        const uint8_t rows = memory[48 + tile];
        if (row_bytes > (tile < 8 ? 64 : 0) || rows > (tile < 8 ? 16 : 0) || (row_bytes == 0) != (rows == 0)) refuse();
        if (tile < 8) tiles.row_bytes[tile] = row_bytes, tiles.rows[tile] = rows;
    }
    tiles.is_configured = 1;
}

// sums += a times b, where bytes of a or b are signed or unsigned.
static void multiply(int sums, int a, int b, int a_is_signed, int b_is_signed) {
    if (sums == a || sums == b || a == b) refuse();
    if (tiles.row_bytes[a] % 4 || tiles.row_bytes[b] % 4 || tiles.row_bytes[sums] != tiles.row_bytes[b] ||
        tiles.rows[sums] != tiles.rows[a] || tiles.rows[b] != tiles.row_bytes[a] / 4)
        refuse();
    for (int m = 0; m < tiles.rows[sums]; ++m)
        for (int n = 0; n < tiles.row_bytes[sums] / 4; ++n) {
            int32_t sum;
            memcpy(&sum, &tiles.data[sums][m][4 * n], 4);
            for (int k = 0; k < tiles.rows[b]; ++k)
                for (int i = 0; i < 4; ++i) {
                    const uint8_t left = tiles.data[a][m][4 * k + i], right = tiles.data[b][k][4 * n + i];
                    sum += (a_is_signed ? (int8_t)left : left) * (b_is_signed ? (int8_t)right : right);
                }
            memcpy(&tiles.data[sums][m][4 * n], &sum, 4);
        }
}

static void handle(int number, siginfo_t* info, void* context) {
    (void)number, (void)info;
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    const uint8_t* code = (const uint8_t*)registers[REG_RIP];
    // A VEX prefix of three bytes; map 0F38, W 0, length 128.
    if (code[0] != 0xC4 || (code[1] & 31) != 2 || (code[2] & 0x84) != 0) refuse();
    const int high_reg = !(code[1] & 0x80) * 8, high_index = !(code[1] & 0x40) * 8, high_base = !(code[1] & 0x20) * 8;
    const int third = ~code[2] >> 3 & 15, prefix = code[2] & 3;  // 1: 66, 2: F3, 3: F2
    const int opcode = code[3], mod = code[4] >> 6, reg = (code[4] >> 3 & 7) + high_reg, rm = code[4] & 7;
    const uint8_t* next = code + 5;
    int64_t address = 0, stride = 0;
    int has_index = 0;
    if (mod != 3) {
        int displacement_size = mod == 1 ? 1 : mod == 2 ? 4 : 0;
        if (rm == 4) {
            const int scale = *next >> 6, index = (*next >> 3 & 7) + high_index, base = *next & 7;
            ++next;
            if (index != 4) stride = general(registers, index) * (1 << scale);
            has_index = 1;
            if (base == 5 && mod == 0)
                displacement_size = 4;
            else
                address = general(registers, base + high_base);
        } else if (rm == 5 && mod == 0) {
            displacement_size = 4;
            address = (int64_t)(next + 4);
        } else {
            address = general(registers, rm + high_base);
        }
        if (displacement_size == 1) address += *(const int8_t*)next;
        if (displacement_size == 4) {
            int32_t displacement;
            memcpy(&displacement, next, 4);
            address += displacement;
        }
        next += displacement_size;
    }
    if (opcode == 0x49 && prefix == 0 && third == 0) {
        if (mod != 3 && reg == 0)
            configure((const uint8_t*)(address + (has_index ? stride : 0)));
        else if (code[4] == 0xC0)
            tiles.is_configured = 0;
        else
            refuse();
    } else if (!tiles.is_configured || reg > 7) {
        refuse();
    } else if (opcode == 0x4B && mod != 3 && has_index && third == 0 && prefix != 0) {
        for (int row = 0; row < tiles.rows[reg]; ++row) {
            uint8_t* memory = (uint8_t*)(address + row * stride);
            if (prefix == 2) {
                memcpy(memory, tiles.data[reg][row], tiles.row_bytes[reg]);
            } else {
                memset(tiles.data[reg][row], 0, 64);
                memcpy(tiles.data[reg][row], memory, tiles.row_bytes[reg]);
            }
        }
    } else if (opcode == 0x5E && mod == 3 && third < 8 && high_base == 0) {
        multiply(reg, rm, third, prefix >= 2, prefix % 2);
    } else {
        refuse();
    }
    registers[REG_RIP] = (greg_t)next;
}

// A thread that blocks the signal would be ended by it.
int pthread_sigmask(int how, const sigset_t* set, sigset_t* before) {
    int (*original)(int, const sigset_t*, sigset_t*) = dlsym(RTLD_NEXT, "pthread_sigmask");
    sigset_t without;
    if (set != NULL && how != SIG_UNBLOCK) {
        without = *set;
        sigdelset(&without, SIGILL);
        set = &without;
    }
    return original(how, set, before);
}

static int original_sigaction(int number, const struct sigaction* action, struct sigaction* before) {
    int (*original)(int, const struct sigaction*, struct sigaction*) = dlsym(RTLD_NEXT, "sigaction");
    return original(number, action, before);
}

// The handler of SIGILL stays this one, as no illegal instruction is left for others.
int sigaction(int number, const struct sigaction* action, struct sigaction* before) {
    return original_sigaction(number, number == SIGILL ? NULL : action, before);
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    original_sigaction(SIGILL, &action, NULL);
}
