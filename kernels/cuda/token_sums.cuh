// Sums over tokens in the host's order (kernels/host/router_regularisers.h): a block adds up a stretch of kBalanceRun
// tokens, a column a thread; one block adds up the stretches. And the workspace they need.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/host/balance_loss.h"

struct CUstream_st;

namespace moeaudit::kernels::cuda {

inline constexpr int kThreads = 128;
inline constexpr std::int64_t kMostBlocks = 2147483647;

/// Hands out parts of the workspace; of a null workspace, counts them.
class Room {
 public:
  explicit Room(void* workspace) : at_(static_cast<char*>(workspace)) {}
  template <class T>
  T* take(std::int64_t n) {
    char* here = at_ == nullptr ? nullptr : at_ + used_;
    used_ += (static_cast<std::size_t>(n) * sizeof(T) + 7) / 8 * 8;
    return reinterpret_cast<T*>(here);
  }
  std::size_t used() const { return used_; }

 private:
  char* at_;
  std::size_t used_ = 0;
};

/// Sums over tokens: of the stretches, and of all of them; and how many tokens they are.
struct Sums {
  unsigned long long* counted;
  double *stretch, *sum;
  std::int64_t stretches, columns;
};
inline Sums sums_in(Room& room, std::int64_t tokens, std::int64_t columns) {
  Sums s;
  s.stretches = parts(tokens, kBalanceRun);
  s.columns = columns;
  s.counted = room.take<unsigned long long>(1);
  s.sum = room.take<double>(columns);
  s.stretch = room.take<double>(s.stretches * columns);
  return s;
}

/// Block (stretch): a column a thread.
template <class Value>
__global__ void add_stretch(std::int64_t tokens, const std::uint8_t* valid, Value value, Sums s) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBalanceRun;
  const std::int64_t last = first + kBalanceRun < tokens ? first + kBalanceRun : tokens;
  for (std::int64_t c = threadIdx.x; c < s.columns; c += blockDim.x) {
    double sum = 0;
    for (std::int64_t t = first; t < last; ++t) {
      if (valid == nullptr || valid[t] != 0) value(t, c, sum);
    }
    s.stretch[blockIdx.x * s.columns + c] = sum;
  }
  for (std::int64_t t = first + threadIdx.x; t < last; t += blockDim.x) {
    if (valid == nullptr || valid[t] != 0) atomicAdd(s.counted, 1ull);
  }
}

/// By all threads of the one block that goes on with the sums; over_counted: the means.
inline __device__ void add_stretches(const Sums& s, bool over_counted) {
  for (std::int64_t c = threadIdx.x; c < s.columns; c += blockDim.x) {
    double sum = 0;
    for (std::int64_t i = 0; i < s.stretches; ++i) sum += s.stretch[i * s.columns + c];
    const auto counted = static_cast<double>(*s.counted);
    s.sum[c] = !over_counted ? sum : (counted == 0.0 ? 0.0 : sum / counted);
  }
  __syncthreads();
}

template <class Value>
bool sum_tokens(std::int64_t tokens, const std::uint8_t* valid, Value value, const Sums& s, CUstream_st* stream) {
  if (cudaMemsetAsync(s.counted, 0, sizeof *s.counted, stream) != cudaSuccess) return false;
  if (s.stretches > 0)
    queue(add_stretch<Value>, static_cast<unsigned>(s.stretches), kThreads, 0, stream, tokens, valid, value, s);
  return true;
}

inline Status launched() { return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed; }

inline std::int64_t thread_index_blocks(std::int64_t n) { return parts(n, kThreads); }
inline __device__ std::int64_t thread_index() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

/// Column c of a table [tokens, columns].
template <class T>
struct Column {
  const T* table;
  std::int64_t columns;
  __device__ void operator()(std::int64_t t, std::int64_t c, double& sum) const {
    sum += static_cast<double>(table[t * columns + c]);
  }
};

}  // namespace moeaudit::kernels::cuda
