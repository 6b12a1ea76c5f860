#include "emulator.h"

#include <algorithm>
#include <boost/context/fiber.hpp>
#include <boost/context/pooled_fixedsize_stack.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>

#include "cuda_runtime.h"

namespace emulator {

thread_local Thread* thread = nullptr;
thread_local Block* block = nullptr;

namespace {

namespace context = boost::context;

struct Failed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

thread_local std::string last_error;  // of launches since it was asked for
std::string shown;                    // what cudaGetErrorString() says of it

struct Lane : Thread {
  context::fiber fiber;  // where it goes on; inside the fiber: where the block does
  enum class State { kRuns, kAtCollective, kAtBarrier, kDone } state = State::kRuns;
  const char* kind = "";
  unsigned mask = 0;
  Words words{};
  std::shared_ptr<const std::array<Words, 32>> exchanged;  // by the last collective
  bool yes = false;
};

struct Running : Block {
  std::vector<Lane> lanes;
  int counted = 0;  // by the last barrier
  std::string error;
};
thread_local Running* running = nullptr;

Lane& self() { return static_cast<Lane&>(*thread); }

std::string where(const Lane& l) {
  const auto xyz = [](const uint3& v) {
    return std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z);
  };
  return "block " + xyz(running->index) + " thread " + xyz(l.index);
}

void wait(Lane::State state) {
  Lane& me = self();
  me.state = state;
  me.fiber = std::move(me.fiber).resume();
  thread = &me;
}

/// Lets the collectives go on whose lanes are all there.
bool complete_warp(std::size_t first) {
  bool any = false;
  const std::size_t end = std::min(first + 32, running->lanes.size());
  for (std::size_t l = first; l < end; ++l) {
    Lane& lane = running->lanes[l];
    if (lane.state != Lane::State::kAtCollective) continue;
    bool all = true;
    for (std::size_t o = 0; o < 32 && all; ++o) {
      if (!(lane.mask >> o & 1u)) continue;
      if (first + o >= end) throw Failed(where(lane) + ": the mask of " + lane.kind + " names lanes that do not exist");
      const Lane& other = running->lanes[first + o];
      if (other.state == Lane::State::kDone)
        throw Failed(where(lane) + ": " + lane.kind + " waits for lane " + std::to_string(o) + ", which has returned");
      all = other.state == Lane::State::kAtCollective && other.mask == lane.mask;
      if (all && std::string_view(other.kind) != lane.kind)
        throw Failed(where(lane) + ": " + lane.kind + " meets " + other.kind + " of lane " + std::to_string(o));
    }
    if (!all) continue;
    auto exchanged = std::make_shared<std::array<Words, 32>>();
    for (std::size_t o = 0; o < 32; ++o) {
      if (!(lane.mask >> o & 1u)) continue;
      (*exchanged)[o] = running->lanes[first + o].words;
    }
    const unsigned mask = lane.mask;
    for (std::size_t o = 0; o < 32; ++o) {
      if (!(mask >> o & 1u)) continue;
      running->lanes[first + o].exchanged = exchanged;
      running->lanes[first + o].state = Lane::State::kRuns;
    }
    any = true;
  }
  return any;
}

bool complete_barrier() {
  int yes = 0;
  const Lane* absent = nullptr;
  const Lane* there = nullptr;
  for (const Lane& l : running->lanes) {
    (l.state == Lane::State::kAtBarrier ? there : absent) = &l;
    yes += l.state == Lane::State::kAtBarrier && l.yes;
  }
  if (there == nullptr) return false;
  if (absent != nullptr) {
    if (absent->state == Lane::State::kDone)
      throw Failed(where(*there) + " waits at __syncthreads for " + where(*absent) + ", which has returned");
    return false;
  }
  running->counted = yes;
  for (Lane& l : running->lanes) l.state = Lane::State::kRuns;
  return true;
}

/// In which order warps run, and lanes of a warp.
class Order {
 public:
  explicit Order(std::size_t threads) : warps_((threads + 31) / 32), lanes_(32) {
    std::iota(warps_.begin(), warps_.end(), std::size_t{0});
    std::iota(lanes_.begin(), lanes_.end(), std::size_t{0});
    const char* chosen = std::getenv("MOE_AUDIT_EMULATED_ORDER");
    const std::string name = chosen == nullptr ? "backward" : chosen;
    if (name == "backward") {
      std::reverse(warps_.begin(), warps_.end());
      std::reverse(lanes_.begin(), lanes_.end());
    } else if (name == "forward") {
      copies_at_once_ = true;
    } else {
      const unsigned long seed = std::stoul(name);
      random_.seed(static_cast<unsigned>(seed));
      shuffles_ = true, copies_at_once_ = seed % 2 == 1;
    }
  }
  bool copies_at_once() const { return copies_at_once_; }
  const std::vector<std::size_t>& warps() { return shuffled(warps_); }
  const std::vector<std::size_t>& lanes() { return shuffled(lanes_); }

 private:
  const std::vector<std::size_t>& shuffled(std::vector<std::size_t>& order) {
    if (shuffles_) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }
  std::vector<std::size_t> warps_, lanes_;
  std::mt19937 random_;
  bool shuffles_ = false, copies_at_once_ = false;
};

/// Until all of its lanes wait for other warps, or have returned.
void run_warp(Running& b, std::size_t first, Order& order) {
  const std::size_t end = std::min(first + 32, b.lanes.size());
  do {
    for (const std::size_t o : order.lanes()) {
      if (first + o >= end) continue;
      Lane& l = b.lanes[first + o];
      if (l.state != Lane::State::kRuns) continue;
      l.fiber = std::move(l.fiber).resume();
      if (!b.error.empty()) throw Failed(b.error);
    }
  } while (complete_warp(first));
}

void run_block(Running& b, const std::function<void()>& body, Order& order, context::pooled_fixedsize_stack& stacks) {
  std::fill(b.shared.begin(), b.shared.end(), std::byte{0xa5});
  const std::size_t threads = b.lanes.size();
  for (std::size_t i = 0; i < threads; ++i) {
    Lane& l = b.lanes[i];
    l.state = Lane::State::kRuns;
    l.copies.clear(), l.products.clear(), l.copy_groups.clear(), l.product_groups.clear();
    l.rank = static_cast<int>(i);
    const auto r = static_cast<unsigned>(i);
    l.index = {r % b.size.x, r / b.size.x % b.size.y, r / b.size.x / b.size.y};
    l.fiber = context::fiber(std::allocator_arg, stacks, [&l, &body](context::fiber&& back) {
      l.fiber = std::move(back);
      thread = &l;
      try {
        body();
      } catch (const Failed& e) {
        running->error = e.what();
      }
      l.state = Lane::State::kDone;
      return std::move(l.fiber);
    });
  }
  do {
    for (const std::size_t warp : order.warps()) run_warp(b, warp * 32, order);
  } while (complete_barrier());
  for (const Lane& l : b.lanes) {
    if (l.state == Lane::State::kAtCollective) throw Failed(where(l) + " waits at " + l.kind + " for ever");
    if (l.state == Lane::State::kAtBarrier) throw Failed(where(l) + " waits at __syncthreads for ever");
  }
}

}  // namespace

void fail(const char* what) { throw Failed(where(self()) + ": " + what); }

void run(dim3 grid, dim3 size, std::size_t shared_bytes, const std::function<void()>& body) {
  const std::size_t threads = std::size_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > 227 * 1024) {
    last_error = "invalid configuration of a launch";
    return;
  }
  static thread_local context::pooled_fixedsize_stack stacks(128 * 1024);
  Order order(threads);
  Running b;
  b.size = size, b.grid = grid;
  b.shared.resize(shared_bytes);
  b.copies_at_once = order.copies_at_once();
  b.lanes.resize(threads);
  running = &b, block = &b;
  try {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          b.index = {x, y, z};
          run_block(b, body, order, stacks);
        }
      }
    }
  } catch (const Failed& e) {
    last_error = e.what();
  }
  b.lanes.clear();  // unwinds what was left waiting, while the block is still there
  running = nullptr, block = nullptr, thread = nullptr;
}

void* dynamic_shared() { return block->shared.data(); }
std::uint32_t shared_address(const void* p) {
  return kSharedBegin + static_cast<std::uint32_t>(static_cast<const std::byte*>(p) - block->shared.data());
}
std::byte* at_shared(std::uint32_t address) {
  if (address < kSharedBegin || address - kSharedBegin >= block->shared.size())
    fail("an address beyond the shared memory");
  return block->shared.data() + (address - kSharedBegin);
}

int barrier(bool yes) {
  self().yes = yes;
  wait(Lane::State::kAtBarrier);
  return running->counted;
}

const std::array<Words, 32>& exchange(const char* kind, unsigned mask, const Words& mine) {
  Lane& me = self();
  if (!(mask >> lane() & 1u)) fail("the mask of a collective does not name the lane itself");
  me.kind = kind, me.mask = mask, me.words = mine;
  wait(Lane::State::kAtCollective);
  return *me.exchanged;
}

void finish_groups(std::vector<std::vector<std::function<void()>>>& groups, int pending) {
  while (static_cast<int>(groups.size()) > pending) {
    for (const auto& f : groups.front()) f();
    groups.erase(groups.begin());
  }
}

}  // namespace emulator

namespace {
cudaError_t take_error() {
  if (emulator::last_error.empty()) return cudaSuccess;
  emulator::shown = emulator::last_error;
  emulator::last_error.clear();
  std::fprintf(stderr, "emulated CUDA: %s\n", emulator::shown.c_str());
  return cudaErrorLaunchFailure;
}
}  // namespace

cudaError_t cudaGetLastError() { return take_error(); }
cudaError_t cudaDeviceSynchronize() { return take_error(); }
const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : emulator::shown.c_str(); }
cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  if (posix_memalign(p, 256, bytes) != 0)
    return cudaErrorMemoryAllocation;  // no byte to spare: AddressSanitizer sees the end
  std::memset(*p, 0xa5, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
