// Threads that share the work of a step. Their barrier is fast while every thread has a core, and gives the core to
// others while a thread is not running.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#define GRU_POSIX 1
#endif

namespace gru {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A counter that threads wait on. A waiting thread spins for about the time of a step, then yields its core, then
// sleeps.
class Signal {
   public:
    uint64_t value() const { return value_.load(std::memory_order_acquire); }

    void raise() {
        value_.fetch_add(1);
        if (num_sleeping_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }  // a sleeper is either before its check or in its sleep
            changed_.notify_all();
        }
    }

    void wait(uint64_t old, int num_spins) {
        for (int i = 0; i < num_spins; ++i) {
            if (value() != old) return;
            pause();
        }
        for (int i = 0; num_spins > 0 && i < kYields; ++i) {
            if (value() != old) return;
            std::this_thread::yield();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        num_sleeping_.fetch_add(1);
        changed_.wait(lock, [&] { return value_.load() != old; });
        num_sleeping_.fetch_sub(1);
    }

    static constexpr int kSpins = 2000;  // about 30 us

   private:
    static constexpr int kYields = 200;
    alignas(64) std::atomic<uint64_t> value_{0};
    std::atomic<int> num_sleeping_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

// Makes each of `size` threads wait until all of them have called wait(). Free with one thread.
class Barrier {
   public:
    void reset(int size) { size_ = size; }
    int size() const { return size_; }

    void wait() {
        if (size_ == 1) return;
        const uint64_t round = passed_.value();
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            passed_.raise();
        } else {
            passed_.wait(round, Signal::kSpins);
        }
    }

   private:
    int size_ = 1;
    alignas(64) std::atomic<int> arrived_{0};
    Signal passed_;
};

// Helper threads that sleep until there is work. They are started when they are first needed, because threads don't
// survive a fork, and started again after a fork.
class Pool {
   public:
    ~Pool() { stop(); }

    // Starts helpers. Returns how many threads `run` may use, the caller's included: at most num_threads, fewer if the
    // system has no more threads.
    int prepare(int num_threads) {
        if (num_threads == 1) return 1;
#if GRU_POSIX
        if (crew_ != nullptr && crew_->process != getpid()) crew_ = nullptr;  // its threads exist in the parent only
#endif
        if (crew_ == nullptr) crew_ = new Crew;
        Crew& crew = *crew_;
        BlockedSignals blocked;
        try {
            while (int(crew.threads.size()) + 1 < num_threads) {
                const int rank = int(crew.threads.size()) + 1;
                crew.threads.emplace_back(help, std::ref(crew), rank, crew.called.value());
            }
        } catch (const std::system_error&) {
        }
        const int available = int(crew.threads.size()) + 1;
        return available < num_threads ? available : num_threads;
    }

    // Calls work(rank) for ranks 0 .. num_threads - 1 in parallel, rank 0 in this thread. num_threads must be a number
    // that `prepare` returned.
    template <typename Work>
    void run(int num_threads, const Work& work) {
        if (num_threads == 1) return work(0);
        Crew& crew = *crew_;
        crew.work = [&work, num_threads](int rank) {
            if (rank < num_threads) work(rank);
        };
        crew.num_busy.store(int(crew.threads.size()), std::memory_order_relaxed);
        const uint64_t round = crew.done.value();
        crew.called.raise();
        work(0);
        crew.done.wait(round, Signal::kSpins);
    }

   private:
    struct Crew {
        std::vector<std::thread> threads;
        std::function<void(int)> work;
        Signal called, done;
        std::atomic<int> num_busy{0};
        std::atomic<bool> is_closing{false};
#if GRU_POSIX
        const pid_t process = getpid();
#endif
    };

    // Blocks all signals in this thread while it exists. Threads started meanwhile inherit that, so that signals reach
    // Python's main thread, which handles them.
    struct BlockedSignals {
#if GRU_POSIX
        sigset_t before;
        BlockedSignals() {
            sigset_t all;
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);
        }
        ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
#endif
    };

    static void help(Crew& crew, int rank, uint64_t round) {
        for (;; ++round) {
            crew.called.wait(round, 0);
            if (crew.is_closing.load()) return;
            crew.work(rank);
            if (crew.num_busy.fetch_sub(1) == 1) crew.done.raise();
        }
    }

    void stop() {
        if (crew_ == nullptr) return;
#if GRU_POSIX
        if (crew_->process != getpid()) return;
#endif
        crew_->is_closing.store(true);
        crew_->called.raise();
        for (std::thread& thread : crew_->threads) thread.join();
        delete crew_;
        crew_ = nullptr;
    }

    Crew* crew_ = nullptr;
};

// Decides whether threads share each step of a few rows. Sharing takes two barriers a step, which is only faster while
// each thread has a core to itself. Decides by the measured time of shared steps and of steps by one thread.
class Cooperation {
   public:
    explicit Cooperation(bool always) : always_(always) {}

    bool pays(int64_t num_rows) {
        if (num_rows >= int64_t(alone_.size())) alone_.resize(num_rows + 1);
        if (always_) return true;
        if (alone_[num_rows] == 0) return false;  // not measured yet
        return num_refusals_ == 0 || --num_refusals_ == 0;
    }

    void measured(int64_t num_rows, bool together, double step_s) {
        double& alone = alone_[num_rows];
        if (!together) {
            alone = alone == 0 ? step_s : 0.75 * alone + 0.25 * step_s;
        } else if (step_s > alone) {
            num_refusals_ = backoff_ = backoff_ < kMaxRefusals ? 2 * backoff_ : kMaxRefusals;
        } else if (backoff_ > 1) {
            backoff_ /= 2;
        }
    }

   private:
    const bool always_;
    static constexpr int kMaxRefusals = 256;  // calls of about 5 ms each
    std::vector<double> alone_;               // seconds of a step by one thread, by number of rows; 0 if not measured
    int num_refusals_ = 0;                    // calls left before sharing is tried again
    int backoff_ = 1;                         // half the number of calls to refuse after the next slow shared call
};

}  // namespace gru
