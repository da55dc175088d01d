// Tries instructions that a processor or a system may refuse although it claims to have them.
#pragma once

#include <csetjmp>
#include <csignal>
#include <pthread.h>

namespace gru {

class Trial {
   public:
    // Returns what attempt() returns, or false if it raises SIGILL or SIGSEGV. One trial at a time.
    static bool passes(bool (*attempt)()) {
        struct sigaction action = {};
        action.sa_handler = handle;
        thread_ = pthread_self();
        sigaction(SIGILL, &action, &illegal_before_);
        sigaction(SIGSEGV, &action, &fault_before_);
        volatile bool has_passed = false;
        if (sigsetjmp(begin_, 1) == 0) has_passed = attempt();
        sigaction(SIGILL, &illegal_before_, nullptr);
        sigaction(SIGSEGV, &fault_before_, nullptr);
        return has_passed;
    }

   private:
    static void handle(int signal) {
        if (pthread_equal(pthread_self(), thread_)) siglongjmp(begin_, 1);
        // Of another thread, which repeats its instruction after this and gets its own handler then.
        sigaction(signal, signal == SIGILL ? &illegal_before_ : &fault_before_, nullptr);
    }

    static inline sigjmp_buf begin_;
    static inline pthread_t thread_;
    static inline struct sigaction illegal_before_, fault_before_;
};

}  // namespace gru
