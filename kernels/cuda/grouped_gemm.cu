// Grouped matrix products. A tile of one expert's product is computed by one block, all of its sums from the first term
// to the last, so nothing is ever added up across blocks.
//
// Every product is out[line, column] = sum over terms of a[line, term] b[column, term]; what differs is which operand
// lies with its terms side by side and which with its lines side by side:
//   kForward  lines: rows of the expert, columns: outputs, terms: inputs    a terms    b terms
//   kInput    lines: rows of the expert, columns: inputs,  terms: outputs   a terms    b lines
//   kWeight   lines: outputs,            columns: inputs,  terms: rows      a lines    b lines
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/grouped_gemm.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/mma.cuh"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMost = 2147483647 - 4096;  // terms of a sum, a stage beyond the last included

// ---- which tile a block has
// ------------------------------------------------------------------------------------------------

/// One block: starts[e] = tiles of `size` rows of the experts before e.
__global__ void tile_starts(const std::int64_t* offsets, std::int64_t experts, std::int64_t size,
                            std::int64_t* starts) {
  __shared__ std::int64_t sums[1024];
  std::int64_t before = 0;
  for (std::int64_t first = 0; first < experts; first += blockDim.x) {
    const std::int64_t e = first + threadIdx.x;
    sums[threadIdx.x] = e < experts ? parts(offsets[e + 1] - offsets[e], size) : 0;
    __syncthreads();
    for (unsigned step = 1; step < blockDim.x; step *= 2) {
      const std::int64_t more = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
      __syncthreads();
      sums[threadIdx.x] += more;
      __syncthreads();
    }
    if (e < experts) starts[e + 1] = before + sums[threadIdx.x];
    before += sums[blockDim.x - 1];
    __syncthreads();
  }
  if (threadIdx.x == 0) starts[0] = 0;
}

/// A tile: its place, and what is left of the operands from there on.
template <class T>
struct Tile {
  const T *a, *b;  // (first line, first term), (first column, first term)
  std::int64_t a_step,
      b_step;          // elements from a line to the next, or from a term to the next where lines lie side by side
  int lines, columns;  // at most those of a tile
  int terms;
  std::int64_t expert, first_line, first_column;  // first_line counts rows from 0, not within the expert
};

/// Tiles of 16 lines of tiles go together, column by column, so that what they share stays in the second-level cache.
template <GroupedProduct kProduct, class T>
__device__ bool find_tile(const GroupedGemmArgs<T>& a, const std::int64_t* starts, int height, int width,
                          std::int64_t block, Tile<T>* t) {
  constexpr std::int64_t kTogether = 16;
  constexpr bool kWeight = kProduct == GroupedProduct::kWeight;
  const std::int64_t columns = kProduct == GroupedProduct::kForward ? a.outputs : a.inputs;
  const std::int64_t across = parts(columns, width);
  const auto up_to = [](std::int64_t n, int most) { return static_cast<int>(n < most ? n : most); };
  std::int64_t e = 0, down = 0;
  if constexpr (kWeight) {
    down = parts(a.outputs, height);
    e = block / (down * across);
    if (e >= a.experts) return false;
    block -= e * down * across;
  } else {
    if (block >= starts[a.experts] * across) return false;
    std::int64_t last = a.experts;  // starts[e] <= block / across < starts[last]
    while (last - e > 1) {
      const std::int64_t middle = (e + last) / 2;
      (starts[middle] * across <= block ? e : last) = middle;
    }
    down = starts[e + 1] - starts[e];
    block -= starts[e] * across;
  }
  const std::int64_t first = block / (kTogether * across) * kTogether;
  const std::int64_t together = down - first < kTogether ? down - first : kTogether;
  block -= first * across;
  const std::int64_t line = (first + block % together) * height, column = block / together * width;
  const std::int64_t row = a.offsets[e], rows = a.offsets[e + 1] - row;
  t->expert = e;
  t->first_column = column;
  t->columns = up_to(columns - column, width);
  if constexpr (kWeight) {
    t->first_line = line;
    t->lines = up_to(a.outputs - line, height);
    t->terms = static_cast<int>(rows);
    t->a = a.left + row * a.outputs + line, t->a_step = a.outputs;
    t->b = a.right + row * a.inputs + column, t->b_step = a.inputs;
  } else {
    t->first_line = row + line;
    t->lines = up_to(rows - line, height);
    t->a_step = kProduct == GroupedProduct::kForward ? a.inputs : a.outputs;
    t->terms = static_cast<int>(t->a_step);
    t->a = a.left + t->first_line * t->a_step;
    t->b = a.right + e * a.outputs * a.inputs + (kProduct == GroupedProduct::kForward ? column * a.inputs : column);
    t->b_step = a.inputs;
  }
  return true;
}

template <GroupedProduct kProduct, class T>
std::int64_t blocks_of(const GroupedGemmArgs<T>& a, int height, int width) {
  if (kProduct == GroupedProduct::kWeight) return a.experts * parts(a.outputs, height) * parts(a.inputs, width);
  // Every expert may have a tile that is not full.
  const std::int64_t full = a.rows / height, tiles = full + (a.rows - full < a.experts ? a.rows - full : a.experts);
  return tiles * parts(kProduct == GroupedProduct::kForward ? a.outputs : a.inputs, width);
}

// ---- tensor cores
// ----------------------------------------------------------------------------------------------------------

constexpr int kTerms = 64;  // of one stage: 128 bytes a line
constexpr int kStages = 3;

/// One operand's stage in shared memory: kLines lines of kTerms terms. Chunks of 16 bytes change places within a line
/// of 128 bytes, so that eight rows of a matrix lie in different banks. kAcross: lines lie side by side.
template <int kLines, bool kAcross>
struct Stage {
  static constexpr int kBytes = kLines * kTerms * 2;

  static __device__ void copy(std::uint32_t to, const BFloat16* from, std::int64_t step, int lines, int terms,
                              int first) {
    const int t = threadIdx.x;
    if constexpr (kAcross) {
      constexpr int kChunks = kLines / 8, kEach = kThreads / kChunks;
      const int chunk = t % kChunks;
#pragma unroll
      for (int i = 0; i < kTerms / kEach; ++i) {
        const int term = t / kChunks + i * kEach;
        const bool there = first + term < terms && chunk * 8 < lines;
        copy_16(to + term * (kLines * 2) + ((chunk ^ (term & 7)) << 4),
                there ? from + (first + term) * step + chunk * 8 : from, there);
      }
    } else {
      const int chunk = t & 7;
#pragma unroll
      for (int i = 0; i < kLines * 8 / kThreads; ++i) {
        const int line = (t >> 3) + i * (kThreads / 8);
        const bool there = line < lines && first + chunk * 8 < terms;
        copy_16(to + line * 128 + ((chunk ^ (line & 7)) << 4), there ? from + line * step + first + chunk * 8 : from,
                there);
      }
    }
  }

  /// Terms 16 part to 16 part + 16 of 16 lines as the first operand of multiply_add().
  static __device__ void first_operand(std::uint32_t at, int line, int part, std::uint32_t* out) {
    const int l = threadIdx.x & 31;
    if constexpr (kAcross) {
      const int term = part * 16 + (l & 7) + ((l >> 4) << 3), chunk = line / 8 + ((l >> 3) & 1);
      load_matrices<true>(at + term * (kLines * 2) + ((chunk ^ (term & 7)) << 4), out);
    } else {
      const int row = line + (l & 15), chunk = part * 2 + (l >> 4);
      load_matrices<false>(at + row * 128 + ((chunk ^ (row & 7)) << 4), out);
    }
  }
  /// The same of 16 lines as two second operands.
  static __device__ void second_operands(std::uint32_t at, int line, int part, std::uint32_t* out) {
    const int l = threadIdx.x & 31;
    if constexpr (kAcross) {
      const int term = part * 16 + (l & 7) + (((l >> 3) & 1) << 3), chunk = line / 8 + (l >> 4);
      load_matrices<true>(at + term * (kLines * 2) + ((chunk ^ (term & 7)) << 4), out);
    } else {
      const int row = line + (l & 7) + ((l >> 4) << 3), chunk = part * 2 + ((l >> 3) & 1);
      load_matrices<false>(at + row * 128 + ((chunk ^ (row & 7)) << 4), out);
    }
  }
};

/// Warps of a block and what each computes: kWarpsDown x kWarpsAcross warps, 16 kM lines and 8 kN columns each; and the
/// blocks that share a multiprocessor.
template <int kWarpsDown, int kWarpsAcross, int kM, int kN, int kShare>
struct Shape {
  static constexpr int kDown = kWarpsDown, kLines = kM, kColumns = kN, kBlocks = kShare;
  static constexpr int kHeight = kWarpsDown * kM * 16, kWidth = kWarpsAcross * kN * 8;
  static_assert(kWarpsDown * kWarpsAcross * 32 == kThreads);
};
using Wide256 = Shape<2, 4, 4, 8, 1>;   // 128 x 256
using Narrow64 = Shape<4, 2, 2, 4, 2>;  // 128 x 64: adapters, narrow experts

template <GroupedProduct kProduct, class S>
struct Stages {
  using A = Stage<S::kHeight, kProduct == GroupedProduct::kWeight>;
  using B = Stage<S::kWidth, kProduct != GroupedProduct::kForward>;
  static constexpr int kBytes = kStages * (A::kBytes + B::kBytes);
};

/// Two neighbouring columns of one line.
template <GroupedProduct kProduct>
__device__ inline void store_pair(const GroupedGemmArgs<BFloat16>& a, const Tile<BFloat16>& t, int line, int column,
                                  float first, float second) {
  if (line >= t.lines || column >= t.columns) return;
  const std::int64_t n = t.first_column + column;
  const auto alpha = static_cast<float>(a.alpha);
  if constexpr (kProduct == GroupedProduct::kWeight) {
    const std::int64_t at = (t.expert * a.outputs + t.first_line + line) * a.inputs + n;
    *reinterpret_cast<float2*>(a.weight + at) = make_float2(alpha * first, alpha * second);
  } else {
    const std::int64_t columns = kProduct == GroupedProduct::kForward ? a.outputs : a.inputs;
    auto* out = reinterpret_cast<ushort2*>(a.out + (t.first_line + line) * columns + n);
    ushort2 before = make_ushort2(0, 0);
    if (a.add) before = *out;
    const BFloat16* bias = a.bias == nullptr ? nullptr : a.bias + t.expert * a.outputs + n;
    const BFloat16 x = finish_product<BFloat16, float>(first, alpha, a.add, BFloat16{before.x}, bias);
    const BFloat16 y =
        finish_product<BFloat16, float>(second, alpha, a.add, BFloat16{before.y}, bias == nullptr ? nullptr : bias + 1);
    *out = make_ushort2(x.bits, y.bits);
  }
}

/// A block has every gridDim.x-th tile. Copies run kStages - 1 stages ahead, into the next tile while this one is
/// stored; the operands of the next 16 terms are loaded while these are multiplied.
template <GroupedProduct kProduct, class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks)
    tensor_products(const GroupedGemmArgs<BFloat16> a, const std::int64_t* starts) {
  using A = typename Stages<kProduct, S>::A;
  using B = typename Stages<kProduct, S>::B;
  MOE_AUDIT_DYNAMIC_SHARED(unsigned char, memory);
  const auto base = shared_address(memory);
  const int warp = threadIdx.x / 32, line = warp % S::kDown * (S::kLines * 16),
            column = warp / S::kDown * (S::kColumns * 8);
  const auto a_at = [&](int slot) { return base + slot * A::kBytes; };
  const auto b_at = [&](int slot) { return base + kStages * A::kBytes + slot * B::kBytes; };
  const auto stages_of = [](const Tile<BFloat16>& t) { return (t.terms + kTerms - 1) / kTerms; };
  const auto copy = [&](const Tile<BFloat16>& t, int stage, int slot) {
    if (stage < stages_of(t)) {
      A::copy(a_at(slot), t.a, t.a_step, t.lines, t.terms, stage * kTerms);
      B::copy(b_at(slot), t.b, t.b_step, t.columns, t.terms, stage * kTerms);
    }
    end_copies();
  };
  const auto begin = [&](const Tile<BFloat16>& t) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) copy(t, s, s);
  };
  Tile<BFloat16> t;
  std::int64_t tile = blockIdx.x;
  if (!find_tile<kProduct>(a, starts, S::kHeight, S::kWidth, tile, &t)) return;
  begin(t);
  for (bool more = true; more;) {
    float sum[S::kLines][S::kColumns][4] = {};
    std::uint32_t x[2][S::kLines][4], y[2][S::kColumns / 2][4];
    const auto load = [&](int slot, int part, int to) {
#pragma unroll
      for (int m = 0; m < S::kLines; ++m) A::first_operand(a_at(slot), line + m * 16, part, x[to][m]);
#pragma unroll
      for (int n = 0; n < S::kColumns / 2; ++n) B::second_operands(b_at(slot), column + n * 16, part, y[to][n]);
    };
    const int stages = stages_of(t);
    if (stages > 0) {
      wait_copies<kStages - 2>();
      __syncthreads();
      load(0, 0, 0);
    }
    int slot = 0, free = kStages - 1;
    for (int stage = 0; stage < stages; ++stage) {
#pragma unroll
      for (int part = 0; part < kTerms / 16; ++part) {
        if (part == kTerms / 16 - 1) {  // on to the next stage; all warps are through with the last reads of this one
          wait_copies<kStages - 2>();
          __syncthreads();
          free = slot;
          slot = slot + 1 == kStages ? 0 : slot + 1;
          if (stage + 1 < stages) load(slot, 0, 0);
        } else {
          load(slot, part + 1, (part + 1) & 1);
        }
        if (part == 0) copy(t, stage + kStages - 1, free);
#pragma unroll
        for (int m = 0; m < S::kLines; ++m) {
#pragma unroll
          for (int n = 0; n < S::kColumns; ++n) multiply_add(x[part & 1][m], y[part & 1][n / 2] + n % 2 * 2, sum[m][n]);
        }
      }
    }
    Tile<BFloat16> next;
    tile += gridDim.x;
    more = find_tile<kProduct>(a, starts, S::kHeight, S::kWidth, tile, &next);
    if (more) begin(next);  // every warp is past the barrier after the last reads
    const int l = threadIdx.x & 31;
#pragma unroll
    for (int m = 0; m < S::kLines; ++m) {
#pragma unroll
      for (int n = 0; n < S::kColumns; ++n) {
        const int i = line + m * 16 + (l >> 2), j = column + n * 8 + (l & 3) * 2;
        store_pair<kProduct>(a, t, i, j, sum[m][n][0], sum[m][n][1]);
        store_pair<kProduct>(a, t, i + 8, j, sum[m][n][2], sum[m][n][3]);
      }
    }
    t = next;
  }
}

// ---- the host's order
// ------------------------------------------------------------------------------------------------------

constexpr int kSide = 64, kDepth = 16, kEach = kSide / 16;  // a thread has kEach x kEach sums, 16 apart

/// One operand: term by term, the lines of a term side by side.
template <bool kAcross, class T>
__device__ inline void copy_block(const T* from, std::int64_t step, int lines, int terms, int first,
                                  T (*to)[kSide + 1]) {
  for (int i = threadIdx.x; i < kSide * kDepth; i += kThreads) {
    const int line = kAcross ? i % kSide : i / kDepth, term = kAcross ? i / kSide : i % kDepth;
    const bool there = line < lines && first + term < terms;
    to[term][line] = there ? (kAcross ? from[(first + term) * step + line] : from[line * step + first + term]) : T(0);
  }
}

/// Products beyond the last term are 0 times 0: adding them to a sum that began at +0 changes no bit of it.
template <GroupedProduct kProduct, class T>
__global__ void __launch_bounds__(kThreads) ordered_products(const GroupedGemmArgs<T> a, const std::int64_t* starts) {
  __shared__ T x[kDepth][kSide + 1], y[kDepth][kSide + 1];
  Tile<T> t;
  if (!find_tile<kProduct>(a, starts, kSide, kSide, blockIdx.x, &t)) return;
  const int line = threadIdx.x / 16, column = threadIdx.x % 16;
  T run[kEach][kEach] = {}, sum[kEach][kEach] = {};
  const auto end_run = [&] {
    for (int i = 0; i < kEach; ++i) {
      for (int j = 0; j < kEach; ++j) sum[i][j] += run[i][j], run[i][j] = 0;
    }
  };
  static_assert(kGateRun % kDepth == 0);
  for (int first = 0; first < t.terms; first += kDepth) {
    if (first > 0 && first % kGateRun == 0) end_run();
    copy_block<kProduct == GroupedProduct::kWeight>(t.a, t.a_step, t.lines, t.terms, first, x);
    copy_block<kProduct != GroupedProduct::kForward>(t.b, t.b_step, t.columns, t.terms, first, y);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      for (int i = 0; i < kEach; ++i) {
        for (int j = 0; j < kEach; ++j) run[i][j] += x[k][line + 16 * i] * y[k][column + 16 * j];
      }
    }
    __syncthreads();
  }
  end_run();
  for (int i = 0; i < kEach; ++i) {
    for (int j = 0; j < kEach; ++j) {
      const int l = line + 16 * i, c = column + 16 * j;
      if (l >= t.lines || c >= t.columns) continue;
      const std::int64_t n = t.first_column + c;
      if constexpr (kProduct == GroupedProduct::kWeight) {
        a.weight[(t.expert * a.outputs + t.first_line + l) * a.inputs + n] = static_cast<T>(a.alpha) * sum[i][j];
      } else {
        T& out = a.out[(t.first_line + l) * (kProduct == GroupedProduct::kForward ? a.outputs : a.inputs) + n];
        out = finish_product<T, T>(sum[i][j], static_cast<T>(a.alpha), a.add, a.add ? out : T(0),
                                   a.bias == nullptr ? nullptr : a.bias + t.expert * a.outputs + n);
      }
    }
  }
}

// ---- launches
// --------------------------------------------------------------------------------------------------------------

template <GroupedProduct kProduct, class T>
Status starts_of(const GroupedGemmArgs<T>& a, int height, std::int64_t* starts, CUstream_st* stream) {
  if (kProduct == GroupedProduct::kWeight) return Status::kOk;
  const unsigned threads = a.experts <= 128 ? 128 : 1024;
  queue(tile_starts, 1, threads, 0, stream, a.offsets, a.experts, height, starts);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

template <GroupedProduct kProduct, class S>
Status launch_tensor(const GroupedGemmArgs<BFloat16>& a, std::int64_t* starts, CUstream_st* stream) {
  const std::int64_t blocks = blocks_of<kProduct>(a, S::kHeight, S::kWidth);
  if (blocks > 2147483647) return Status::kBadShape;
  if (blocks == 0) return Status::kOk;
  if (const Status status = starts_of<kProduct>(a, S::kHeight, starts, stream); status != Status::kOk) return status;
  constexpr int kBytes = Stages<kProduct, S>::kBytes;
  const auto kernel = tensor_products<kProduct, S>;
  int device = 0, multiprocessors = 0;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) != cudaSuccess ||
      cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return Status::kLaunchFailed;
  const std::int64_t most = static_cast<std::int64_t>(multiprocessors) * S::kBlocks;
  queue(kernel, static_cast<unsigned>(blocks < most ? blocks : most), kThreads, kBytes, stream, a, starts);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

template <GroupedProduct kProduct>
Status launch(const GroupedGemmArgs<BFloat16>& a, std::int64_t* starts, CUstream_st* stream) {
  const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  if (a.inputs % 8 != 0 || a.outputs % 8 != 0 ||
      (address(a.left) | address(a.right) | address(a.out) | address(a.weight)) % 16 != 0)
    return Status::kBadShape;
  const std::int64_t columns = kProduct == GroupedProduct::kForward ? a.outputs : a.inputs;
  return columns <= Narrow64::kWidth ? launch_tensor<kProduct, Narrow64>(a, starts, stream)
                                     : launch_tensor<kProduct, Wide256>(a, starts, stream);
}

template <GroupedProduct kProduct, class T>
Status launch(const GroupedGemmArgs<T>& a, std::int64_t* starts, CUstream_st* stream) {
  const std::int64_t blocks = blocks_of<kProduct>(a, kSide, kSide);
  if (blocks > 2147483647) return Status::kBadShape;
  if (blocks == 0) return Status::kOk;
  if (const Status status = starts_of<kProduct>(a, kSide, starts, stream); status != Status::kOk) return status;
  queue(ordered_products<kProduct, T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, starts);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

template <class T>
Status run(const GroupedGemmArgs<T>& a, void* workspace, CUstream_st* stream) {
  if (const Status status = check_grouped_gemm(a); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  if (a.rows > kMost || a.inputs > kMost || a.outputs > kMost) return Status::kBadShape;
  auto* starts = static_cast<std::int64_t*>(workspace);
  switch (a.product) {
    case GroupedProduct::kForward: return launch<GroupedProduct::kForward>(a, starts, stream);
    case GroupedProduct::kInput: return launch<GroupedProduct::kInput>(a, starts, stream);
    case GroupedProduct::kWeight: return launch<GroupedProduct::kWeight>(a, starts, stream);
  }
  return Status::kBadOption;
}

/// Block (columns, expert) of 32 x 8 threads: 8 stretches at a time, added up in their order.
template <class T>
__global__ void add_columns(const ColumnSumsArgs<T> a) {
  __shared__ Wide<T> stretch[8][32];
  const std::int64_t e = blockIdx.y, column = static_cast<std::int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const std::int64_t first = a.offsets[e], last = a.offsets[e + 1];
  Wide<T> sum = 0;
  for (std::int64_t at = first; at < last; at += 8 * kGateRun) {
    const std::int64_t begin = at + threadIdx.y * kGateRun, end = begin + kGateRun < last ? begin + kGateRun : last;
    if (column < a.columns && begin < last) stretch[threadIdx.y][threadIdx.x] = column_stretch(a, begin, end, column);
    __syncthreads();
    if (threadIdx.y == 0) {
      for (int i = 0; i < 8 && at + i * kGateRun < last; ++i) sum += stretch[i][threadIdx.x];
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && column < a.columns) a.sums[e * a.columns + column] = sum;
}

template <class T>
Status run(const ColumnSumsArgs<T>& a, CUstream_st* stream) {
  if (const Status status = check_column_sums(a); status != Status::kOk) return status;
  const std::int64_t blocks = parts(a.columns, 32);
  if (a.experts > 65535 || blocks > 2147483647) return Status::kBadShape;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.experts));
  queue(add_columns<T>, grid, dim3(32, 8), 0, stream, a);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace

std::size_t grouped_gemm_workspace(std::int64_t experts) { return static_cast<std::size_t>(experts + 1) * 8; }

Status grouped_gemm(const GroupedGemmArgs<float>& args, void* workspace, CUstream_st* stream) {
  return run(args, workspace, stream);
}
Status grouped_gemm(const GroupedGemmArgs<double>& args, void* workspace, CUstream_st* stream) {
  return run(args, workspace, stream);
}
Status grouped_gemm(const GroupedGemmArgs<BFloat16>& args, void* workspace, CUstream_st* stream) {
  return run(args, workspace, stream);
}
Status column_sums(const ColumnSumsArgs<float>& args, CUstream_st* stream) { return run(args, stream); }
Status column_sums(const ColumnSumsArgs<double>& args, CUstream_st* stream) { return run(args, stream); }
Status column_sums(const ColumnSumsArgs<BFloat16>& args, CUstream_st* stream) { return run(args, stream); }

}  // namespace moeaudit::kernels::cuda
