// LoRA: an element of a merge a thread; a row of what it loses a warp, then the rows in their order; the two
// projections of a token first, then an element of a gradient a thread.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/lora.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 256;

__device__ double product_at(const LoraUpdate& u, std::int64_t row, std::int64_t column) {
  double sum = 0;
  for (std::int64_t i = 0; i < u.rank; ++i)
    sum += static_cast<double>(u.left[row * u.rank + i]) * static_cast<double>(u.right[i * u.columns + column]);
  return sum;
}
__device__ std::int64_t thread_number() { return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

__global__ void products(LoraUpdate u, double* out) {
  const std::int64_t i = thread_number();
  if (i < u.rows * u.columns) out[i] = product_at(u, i / u.columns, i % u.columns);
}
__global__ void merged(LoraMergeArgs a, bool unmerge, double* out) {
  const std::int64_t i = thread_number(), columns = a.update.columns;
  if (i >= a.update.rows * columns) return;
  out[i] = merged_value(a.w[i], product_at(a.update, i / columns, i % columns), a.scale, a.dtypes, unmerge);
}

__global__ void losses_of_rows(LoraMergeArgs a, MergeDtypes back, MergeLoss* rows) {
  __shared__ MergeLoss lanes[kThreads];
  const std::int64_t row = thread_number() / kLanes, columns = a.update.columns;
  if (row >= a.update.rows) return;  // whole warps
  MergeLoss mine;
  for (std::int64_t c = threadIdx.x % kLanes; c < columns; c += kLanes)
    add_merge_loss(a.w[row * columns + c], product_at(a.update, row, c), a.scale, a.dtypes, back, &mine);
  lanes[threadIdx.x] = mine;
  __syncwarp();
  if (threadIdx.x % kLanes != 0) return;
  MergeLoss sum;
  for (int l = 0; l < kLanes; ++l) append(lanes[threadIdx.x + l], &sum);
  rows[row] = sum;
}
/// One warp: a stretch of rows at a time is fetched by all lanes and added by the first.
__global__ void add_rows(std::int64_t rows, const MergeLoss* row, MergeLoss* loss) {
  __shared__ MergeLoss fetched[kLanes];
  MergeLoss sum;
  for (std::int64_t first = 0; first < rows; first += kLanes) {
    const std::int64_t mine = first + threadIdx.x;
    if (mine < rows) fetched[threadIdx.x] = row[mine];
    __syncwarp();
    if (threadIdx.x == 0) {
      for (int l = 0; l < kLanes && first + l < rows; ++l) append(fetched[l], &sum);
    }
    __syncwarp();
  }
  if (threadIdx.x == 0) *loss = sum;
}

/// A x by the lanes of a warp, of one token and one i of the rank.
__global__ void through_a(LoraGradientArgs g, double* h) {
  __shared__ double lanes[kThreads];
  const std::int64_t i = thread_number() / kLanes;
  if (i >= g.tokens * g.rank) return;  // whole warps
  const std::int64_t t = i / g.rank, r = i % g.rank;
  double sum = 0;
  for (std::int64_t c = threadIdx.x % kLanes; c < g.in; c += kLanes)
    sum += static_cast<double>(g.x[t * g.in + c]) * static_cast<double>(g.a[r * g.in + c]);
  lanes[threadIdx.x] = sum;
  __syncwarp();
  if (threadIdx.x % kLanes != 0) return;
  double all = 0;
  for (int l = 0; l < kLanes; ++l) all += lanes[threadIdx.x + l];
  h[i] = all;
}
/// B^T grad_y, one token and one i of the rank a thread.
__global__ void through_b(LoraGradientArgs g, double* back) {
  const std::int64_t i = thread_number();
  if (i >= g.tokens * g.rank) return;
  const std::int64_t t = i / g.rank, r = i % g.rank;
  double sum = 0;
  for (std::int64_t o = 0; o < g.out; ++o)
    sum += static_cast<double>(g.grad_y[t * g.out + o]) * static_cast<double>(g.b[o * g.rank + r]);
  back[i] = sum;
}
/// Elements of the gradients, A's first, then B's, then x's.
__global__ void gradients(LoraGradientArgs g, LoraGradient r, const double* h, const double* back) {
  std::int64_t i = thread_number();
  double sum = 0;
  if (i < g.rank * g.in) {
    for (std::int64_t t = 0; t < g.tokens; ++t)
      sum += back[t * g.rank + i / g.in] * static_cast<double>(g.x[t * g.in + i % g.in]);
    r.a[i] = sum * g.scale;
    return;
  }
  i -= g.rank * g.in;
  if (i < g.out * g.rank) {
    for (std::int64_t t = 0; t < g.tokens; ++t)
      sum += static_cast<double>(g.grad_y[t * g.out + i / g.rank]) * h[t * g.rank + i % g.rank];
    r.b[i] = sum * g.scale;
    return;
  }
  i -= g.out * g.rank;
  if (r.x == nullptr || i >= g.tokens * g.in) return;
  for (std::int64_t j = 0; j < g.rank; ++j)
    sum += back[i / g.in * g.rank + j] * static_cast<double>(g.a[j * g.in + i % g.in]);
  r.x[i] = sum * g.scale;
}

/// Blocks for a thread each; 0 if that is too many.
unsigned blocks_for(std::int64_t threads) {
  const std::int64_t blocks = parts(threads, kThreads);
  return blocks > 2147483647 ? 0 : static_cast<unsigned>(blocks);
}
Status launched() { return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed; }

}  // namespace

std::size_t lora_merge_loss_workspace(std::int64_t rows) { return static_cast<std::size_t>(rows) * sizeof(MergeLoss); }
std::size_t lora_gradient_workspace(std::int64_t tokens, std::int64_t rank) {
  return static_cast<std::size_t>(2 * tokens * rank) * sizeof(double);
}

Status lora_product(const LoraUpdate& u, double* out, CUstream_st* stream) {
  if (const Status status = check_update(u); status != Status::kOk) return status;
  if (out == nullptr) return Status::kNullPointer;
  const unsigned blocks = blocks_for(u.rows * u.columns);
  if (blocks == 0) return Status::kBadShape;
  queue(products, blocks, kThreads, 0, stream, u, out);
  return launched();
}

Status lora_merge(const LoraMergeArgs& a, bool unmerge, double* out, CUstream_st* stream) {
  if (const Status status = check_update(a.update); status != Status::kOk) return status;
  if (a.w == nullptr || out == nullptr) return Status::kNullPointer;
  const unsigned blocks = blocks_for(a.update.rows * a.update.columns);
  if (blocks == 0) return Status::kBadShape;
  queue(merged, blocks, kThreads, 0, stream, a, unmerge, out);
  return launched();
}

Status lora_merge_loss(const LoraMergeArgs& a, const MergeDtypes& unmerge, MergeLoss* loss, void* workspace,
                       CUstream_st* stream) {
  if (const Status status = check_update(a.update); status != Status::kOk) return status;
  if (a.w == nullptr || loss == nullptr || workspace == nullptr) return Status::kNullPointer;
  const unsigned blocks = blocks_for(a.update.rows * kLanes);
  if (blocks == 0) return Status::kBadShape;
  auto* rows = static_cast<MergeLoss*>(workspace);
  queue(losses_of_rows, blocks, kThreads, 0, stream, a, unmerge, rows);
  queue(add_rows, 1, kLanes, 0, stream, a.update.rows, rows, loss);
  return launched();
}

Status lora_gradient(const LoraGradientArgs& args, const LoraGradient& result, void* workspace, CUstream_st* stream) {
  if (const Status status = check_gradient(args, result); status != Status::kOk) return status;
  if (workspace == nullptr && args.tokens > 0) return Status::kNullPointer;
  const unsigned first = blocks_for(args.tokens * args.rank * kLanes);
  const unsigned second =
      blocks_for(args.rank * (args.in + args.out) + (result.x == nullptr ? 0 : args.tokens * args.in));
  if (second == 0 || (first == 0 && args.tokens > 0)) return Status::kBadShape;
  auto* h = static_cast<double*>(workspace);
  auto* back = h + args.tokens * args.rank;
  if (first > 0) {
    queue(through_a, first, kThreads, 0, stream, args, h);
    queue(through_b, blocks_for(args.tokens * args.rank), kThreads, 0, stream, args, back);
  }
  queue(gradients, second, kThreads, 0, stream, args, result, h, back);
  return launched();
}

}  // namespace moeaudit::kernels::cuda
