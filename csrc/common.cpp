// What the kernels share and need not be fast: checks of the data, threads.
#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ops.h"

namespace hiper_fast {

void check_prefix_sum(const char* name, const int32_t* cu, int64_t segments, int64_t total) {
  if (cu[0] != 0)
    throw std::invalid_argument(std::string(name) + " must begin with 0, got " + std::to_string(cu[0]));
  for (int64_t i = 0; i < segments; ++i) {
    if (cu[i + 1] < cu[i]) {
      throw std::invalid_argument(std::string(name) + " must never fall, but falls from " +
                                  std::to_string(cu[i]) + " to " + std::to_string(cu[i + 1]) + " at index " +
                                  std::to_string(i + 1));
    }
  }
  if (cu[segments] != total) {
    throw std::invalid_argument(std::string(name) + " must end with " + std::to_string(total) + ", got " +
                                std::to_string(cu[segments]));
  }
}

void check_targets(const int64_t* targets, int64_t count, int64_t vocabulary) {
  for (int64_t i = 0; i < count; ++i) {
    if (targets[i] < 0 || targets[i] >= vocabulary) {
      throw std::invalid_argument("targets must lie in [0, " + std::to_string(vocabulary) + "), got " +
                                  std::to_string(targets[i]));
    }
  }
}

void in_parallel(int64_t count, int64_t elements, int threads, void (*body)(void*, int64_t, int64_t),
                 void* context) {
  constexpr int64_t kWorthAThread = 1 << 18;  // some 0.2 ms; to start a thread takes a tenth of that
  const int64_t parts = std::min<int64_t>({count, threads, elements / kWorthAThread});
  if (parts <= 1) return body(context, 0, count);

  std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
  const auto run = [&](int64_t part) {
    try {
      body(context, count * part / parts, count * (part + 1) / parts);
    } catch (...) {
      errors[size_t(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts; ++part) others.emplace_back(run, part);
  run(0);
  for (std::thread& thread : others) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace hiper_fast
