// Runs CUDA kernels on the host, by the rules of the CUDA programming model: what their tests use where there is no
// device. It proves what a kernel computes (indices, orders of sums, barriers, what the lanes of a warp exchange, how
// matrices lie in fragments and shared memory), by the documentation; it proves nothing about the hardware or its
// speed.
//
// The stand-ins for the CUDA headers beside this file make kernels/cuda/*.cu C++. A block runs on the thread that
// launches it, its threads as fibers, each until it waits for others. Between two barriers they run one after the
// other, in an order that MOE_AUDIT_EMULATED_ORDER chooses: `backward` (the default), `forward`, or a number that seeds
// a shuffle; a missing barrier gives wrong results in one of them. What runs by itself does so either at once or as
// late as it may, when it is waited for: copies by cp.async late and products by wgmma at once (so that what is not
// there yet shows), but in `forward` and with odd numbers the other way round (so that what is overwritten too early
// shows). Device memory and dynamic shared memory that nobody wrote hold 0xa5. What would be undefined or would hang (a
// collective that some of its lanes never reach, a barrier that not all threads reach) ends the launch with an error,
// which cudaGetLastError() and cudaDeviceSynchronize() return.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>

struct CUstream_st;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

/// What a lane hands to the others of its warp.
using Words = std::array<std::uint32_t, 8>;

struct Thread {
  uint3 index{};
  int rank = 0;                                                                 // in the block
  std::vector<std::function<void()>> copies, products;                          // begun
  std::vector<std::vector<std::function<void()>>> copy_groups, product_groups;  // ended, not waited for
};
struct Block {
  uint3 index{};
  dim3 size, grid;
  std::vector<std::byte> shared;
  bool copies_at_once = false;  // else products are
};
extern thread_local Thread* thread;
extern thread_local Block* block;

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

template <class... P, class... A>
void queue(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, CUstream_st*, const A&... args) {
  std::tuple<P...> values(static_cast<P>(args)...);
  run(grid, block, shared_bytes, [&] { std::apply(kernel, values); });
}

/// Dynamic shared memory; its addresses as a 32-bit number begin at kSharedBegin, which is a multiple of 128 and no
/// more.
inline constexpr std::uint32_t kSharedBegin = 128;
void* dynamic_shared();
std::uint32_t shared_address(const void* p);
std::byte* at_shared(std::uint32_t address);  // ends the launch beyond the end

/// All threads; how many of them say `yes`.
int barrier(bool yes);

/// Waits until all lanes of `mask` are at a collective of this kind; all their words (of lanes outside, 0), until the
/// lane's next collective.
const std::array<Words, 32>& exchange(const char* kind, unsigned mask, const Words& mine);

template <class T>
class Values {
 public:
  explicit Values(const std::array<Words, 32>& words) : words_(&words) {}
  T operator[](std::size_t lane) const {
    T v;
    std::memcpy(&v, words_->at(lane).data(), sizeof(T));
    return v;
  }

 private:
  const std::array<Words, 32>* words_;
};
template <class T>
Values<T> exchange_values(const char* kind, unsigned mask, const T& mine) {
  static_assert(sizeof(T) <= sizeof(Words));
  Words words{};
  std::memcpy(words.data(), &mine, sizeof(T));
  return Values<T>(exchange(kind, mask, words));
}
inline int lane() { return thread->rank % 32; }

/// Work that runs by itself: done now, or when its group is waited for.
template <class F>
void begin(std::vector<std::function<void()>>& begun, bool at_once, F f) {
  if (at_once)
    f();
  else
    begun.emplace_back(f);
}
/// Does the groups that are not among the last `pending`.
void finish_groups(std::vector<std::vector<std::function<void()>>>& groups, int pending);

[[noreturn]] void fail(const char* what);

}  // namespace emulator
