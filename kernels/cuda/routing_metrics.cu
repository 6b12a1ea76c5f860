// Margins, agreement, settling and counts by label: a thread a token, integer additions.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/routing_metrics.h"

namespace moeaudit::kernels::cuda {
namespace {

constexpr int kThreads = 128;

/// Adds to counters in device memory what the block's threads found, one addition a block.
__device__ void add(std::int64_t* to, bool found) {
  const int n = __syncthreads_count(found);
  if (threadIdx.x == 0 && n > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(n));
}
__device__ void add(std::int64_t* to, std::int64_t n) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(n));
}

__device__ bool counts(const std::uint8_t* valid, std::int64_t t, std::int64_t tokens) {
  return t < tokens && (valid == nullptr || valid[t] != 0);
}
__device__ std::int64_t token() { return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

template <class T>
__global__ void margins(MarginArgs<T> a, MarginResult r) {
  const std::int64_t t = token();
  TokenMargin m;
  if (t < a.tokens) m = token_margin(a, t);
  if (t < a.tokens && r.margin != nullptr) r.margin[t] = m.margin;
  const bool in = counts(a.valid, t, a.tokens);
  add(&r.counts->tokens, in);
  add(&r.counts->near_ties, in && m.near);
  add(&r.counts->ties, in && m.margin == 0.0);
  add(&r.counts->inverted, in && m.margin < 0.0);
  add(&r.counts->nan, in && m.margin != m.margin);
}

__global__ void agree(AgreementArgs a, std::int64_t rows, std::int64_t* table, AgreementCounts* c) {
  const std::int64_t t = token();
  const bool in = counts(a.valid, t, a.tokens);
  TokenAgreement s;
  if (in) s = token_agreement(a, t);
  add(&c->tokens, in);
  add(&c->same_first, in && s.same_first);
  if (!in) return;
  add(&c->chosen_now, s.now);
  add(&c->chosen_then, s.then);
  if (s.shared < rows) add(table + s.shared * agreement_columns(a) + (s.now + s.then - s.shared), std::int64_t{1});
}

__global__ void settle(SettlingArgs a, std::int64_t* tokens_settled) {
  const std::int64_t t = token();
  if (counts(a.valid, t, a.tokens)) add(tokens_settled + settled_at(a, t), std::int64_t{1});
}

__global__ void by_label(CountArgs<std::int32_t> a, const std::int32_t* labels, std::int64_t num_labels,
                         std::int64_t* table, std::int64_t* outside) {
  const std::int64_t t = token();
  if (!counts(a.valid, t, a.tokens)) return;
  const bool known = labels[t] >= 0 && labels[t] < num_labels;
  for (std::int64_t j = 0; j < a.top_k; ++j) {
    const std::int32_t e = a.chosen[t * a.top_k + j];
    add(known && e >= 0 && e < a.experts ? table + labels[t] * a.experts + e : outside, std::int64_t{1});
  }
}

bool zero(void* p, std::size_t bytes, CUstream_st* stream) {
  return cudaMemsetAsync(p, 0, bytes, stream) == cudaSuccess;
}
Status launched() { return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed; }

template <class T>
Status launch(const MarginArgs<T>& a, const MarginResult& r, CUstream_st* stream) {
  if (const Status status = check_margins(a, r); status != Status::kOk) return status;
  const std::int64_t blocks = parts(a.tokens, kThreads);
  if (blocks > 2147483647) return Status::kBadShape;
  if (!zero(r.counts, sizeof *r.counts, stream)) return Status::kLaunchFailed;
  if (blocks > 0) queue(margins<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, r);
  return launched();
}

}  // namespace

Status routing_margins(const MarginArgs<float>& args, const MarginResult& result, CUstream_st* stream) {
  return launch(args, result, stream);
}
Status routing_margins(const MarginArgs<double>& args, const MarginResult& result, CUstream_st* stream) {
  return launch(args, result, stream);
}

Status count_agreement(const AgreementArgs& args, std::int64_t* table, AgreementCounts* counts, CUstream_st* stream) {
  if (const Status status = check_agreement(args, table, counts); status != Status::kOk) return status;
  const std::int64_t blocks = parts(args.tokens, kThreads), rows = agreement_rows(args);
  if (blocks > 2147483647) return Status::kBadShape;
  if (!zero(table, static_cast<std::size_t>(rows * agreement_columns(args)) * sizeof *table, stream) ||
      !zero(counts, sizeof *counts, stream))
    return Status::kLaunchFailed;
  if (blocks > 0) queue(agree, static_cast<unsigned>(blocks), kThreads, 0, stream, args, rows, table, counts);
  return launched();
}

Status count_settled(const SettlingArgs& args, std::int64_t* tokens_settled, CUstream_st* stream) {
  if (const Status status = check_settling(args, tokens_settled); status != Status::kOk) return status;
  const std::int64_t blocks = parts(args.tokens, kThreads);
  if (blocks > 2147483647) return Status::kBadShape;
  if (!zero(tokens_settled, static_cast<std::size_t>(args.checkpoints) * sizeof *tokens_settled, stream))
    return Status::kLaunchFailed;
  if (blocks > 0) queue(settle, static_cast<unsigned>(blocks), kThreads, 0, stream, args, tokens_settled);
  return launched();
}

Status count_by_label(const CountArgs<std::int32_t>& args, const std::int32_t* labels, std::int64_t num_labels,
                      std::int64_t* table, std::int64_t* outside, CUstream_st* stream) {
  const Status status = check_count_by_label(args, labels, num_labels, table, outside);
  if (status != Status::kOk) return status;
  const std::int64_t blocks = parts(args.tokens, kThreads);
  if (blocks > 2147483647) return Status::kBadShape;
  if (!zero(table, static_cast<std::size_t>(num_labels * args.experts) * sizeof *table, stream) ||
      !zero(outside, sizeof *outside, stream))
    return Status::kLaunchFailed;
  if (blocks > 0)
    queue(by_label, static_cast<unsigned>(blocks), kThreads, 0, stream, args, labels, num_labels, table, outside);
  return launched();
}

}  // namespace moeaudit::kernels::cuda
