// Threads: torch's own OpenMP workers, found at run time. A second pool beside them would compete with
// their spinning for the same cores, and linking an OpenMP library of our own would start one.
#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

#include "kernels.h"

namespace dino {
namespace {

// The entry point that GNU, LLVM and Intel OpenMP all export; torch loads one of them globally.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Job {
    const std::function<void(int64_t)>& body;
    int64_t tasks;
    std::atomic<int64_t> next{0};
};

void work(void* data) {
    Job& job = *static_cast<Job*>(data);
    for (int64_t task; (task = job.next.fetch_add(1)) < job.tasks;) job.body(task);
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
    static const auto gomp = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Job job{body, tasks};
    if (tasks < threads) threads = int(tasks);
    if (threads <= 1) {
        work(&job);
    } else if (gomp) {
        gomp(work, &job, unsigned(threads), 0);
    } else {
        std::vector<std::thread> helpers;
        for (int i = 1; i < threads; ++i) helpers.emplace_back(work, &job);
        work(&job);
        for (auto& helper : helpers) helper.join();
    }
}

}  // namespace dino
