// Threads of the CPU kernels.
#pragma once

#include <cstdint>
#include <functional>

namespace dino {

// Runs body(task) for task = 0 .. tasks-1 on `threads` threads. Each thread begins with a range of its own, so
// results must not depend on which thread runs which task.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

}  // namespace dino
