// Regularisers of the router. A thread computes a token, a block adds up a stretch of tokens in the host's order, one
// block adds up the stretches; dot products by a warp, whose lanes are the host's.
#include <cuda_runtime.h>

#include "kernels/cuda/router_regularisers.h"
#include "kernels/cuda/token_sums.cuh"

namespace moeaudit::kernels::cuda {
namespace {

/// CV^2 of the sums, and weight times its slope.
__global__ void finish_cv(Sums s, CvConvention cv, double weight, double* slope, double* loss, double* out) {
  add_stretches(s, false);
  for (std::int64_t e = threadIdx.x; out != nullptr && e < s.columns; e += blockDim.x) out[e] = s.sum[e];
  if (threadIdx.x != 0) return;
  *loss = weight * cv_squared(s.sum, s.columns, cv, slope);
  for (std::int64_t e = 0; e < s.columns; ++e) slope[e] = weight * slope[e];
}

// ---- importance

template <class T>
struct GateOf {
  ImportanceLossArgs<T> a;
  __device__ void operator()(std::int64_t t, std::int64_t e, double& sum) const {
    if (a.chosen == nullptr) {
      sum += static_cast<double>(a.gates[t * a.width + e]);
      return;
    }
    for (std::int64_t j = 0; j < a.width; ++j) {
      if (a.chosen[t * a.width + j] == e) sum += static_cast<double>(a.gates[t * a.width + j]);
    }
  }
};

template <class T>
__global__ void importance_gradient(ImportanceLossArgs<T> a, const double* slope, T* gradient) {
  const std::int64_t i = thread_index();
  if (i >= a.tokens * a.width) return;
  const std::int64_t e = a.chosen == nullptr ? i % a.width : a.chosen[i];
  const bool counts = (a.valid == nullptr || a.valid[i / a.width] != 0) && e >= 0 && e < a.experts;
  gradient[i] = counts ? static_cast<T>(slope[e]) : T(0);
}

struct CvRoom {
  Sums sums;
  double* slope;
};
CvRoom cv_room(Room& room, std::int64_t tokens, std::int64_t experts) {
  return {sums_in(room, tokens, experts), room.take<double>(experts)};
}

template <class T>
Status launch(const ImportanceLossArgs<T>& a, const ImportanceLossResult<T>& r, void* workspace, CUstream_st* stream) {
  if (const Status status = check_importance_loss(a, r); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = thread_index_blocks(a.tokens * a.width);
  if (blocks > kMostBlocks) return Status::kBadShape;
  Room room(workspace);
  const CvRoom s = cv_room(room, a.tokens, a.experts);
  if (!sum_tokens(a.tokens, a.valid, GateOf<T>{a}, s.sums, stream)) return Status::kLaunchFailed;
  queue(finish_cv, 1, kThreads, 0, stream, s.sums, a.cv, a.weight, s.slope, r.loss, r.importance);
  if (r.gradient != nullptr && blocks > 0)
    queue(importance_gradient<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, s.slope, r.gradient);
  return launched();
}

// ---- smooth load

template <class T>
__global__ void load_tokens(LoadLossArgs<T> a, double* noisy, double* probability, LastChosen* last) {
  const std::int64_t t = thread_index();
  if (t < a.tokens) last[t] = load_token(a, t, noisy + t * a.experts, probability + t * a.experts);
}

template <class T>
__global__ void load_tokens_backward(LoadLossArgs<T> a, const double* noisy, const LastChosen* last,
                                     const double* slope, double* room, T* d_clean, T* d_raw) {
  const std::int64_t t = thread_index();
  if (t >= a.tokens) return;
  if (a.valid == nullptr || a.valid[t] != 0) {
    load_token_backward(a, t, noisy + t * a.experts, last[t], slope, room + t * a.experts, d_clean, d_raw);
    return;
  }
  for (std::int64_t i = t * a.experts; i < (t + 1) * a.experts; ++i) {
    if (d_clean != nullptr) d_clean[i] = T(0);
    if (d_raw != nullptr) d_raw[i] = T(0);
  }
}

struct LoadRoom {
  CvRoom cv;
  LastChosen* last;
  double *noisy, *table;
};
LoadRoom load_room(Room& room, std::int64_t tokens, std::int64_t experts) {
  return {cv_room(room, tokens, experts), room.take<LastChosen>(tokens), room.take<double>(tokens * experts),
          room.take<double>(tokens * experts)};
}

template <class T>
Status launch(const LoadLossArgs<T>& a, const LoadLossResult<T>& r, void* workspace, CUstream_st* stream) {
  if (const Status status = check_load_loss(a, r); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = thread_index_blocks(a.tokens);
  if (blocks > kMostBlocks) return Status::kBadShape;
  Room room(workspace);
  const LoadRoom s = load_room(room, a.tokens, a.experts);
  double* probability = r.probability != nullptr ? r.probability : s.table;
  if (blocks > 0)
    queue(load_tokens<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, s.noisy, probability, s.last);
  if (!sum_tokens(a.tokens, a.valid, Column<double>{probability, a.experts}, s.cv.sums, stream))
    return Status::kLaunchFailed;
  queue(finish_cv, 1, kThreads, 0, stream, s.cv.sums, a.cv, a.weight, s.cv.slope, r.loss, r.load);
  if ((r.d_clean != nullptr || r.d_raw != nullptr) && blocks > 0)
    queue(load_tokens_backward<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, s.noisy, s.last, s.cv.slope,
          s.table, r.d_clean, r.d_raw);
  return launched();
}

// ---- entropy

struct EntropyRoom {
  Sums sums;  // of p, and in the last column of H
  double *p, *h, *slope;
};
EntropyRoom entropy_room(Room& room, std::int64_t tokens, std::int64_t experts) {
  return {sums_in(room, tokens, experts + 1), room.take<double>(tokens * experts), room.take<double>(tokens),
          room.take<double>(1)};
}

struct EntropyColumn {
  const double *p, *h;
  std::int64_t experts;
  __device__ void operator()(std::int64_t t, std::int64_t c, double& sum) const {
    sum += c < experts ? p[t * experts + c] : h[t];
  }
};

template <class T>
__global__ void entropy_tokens(EntropyLossArgs<T> a, double* p, double* h, double* token_entropy) {
  const std::int64_t t = thread_index();
  if (t >= a.tokens) return;
  h[t] = entropy_token(a.logits + t * a.experts, a.experts, p + t * a.experts).entropy;
  if (token_entropy != nullptr) token_entropy[t] = h[t];
}

template <class T>
__global__ void finish_entropy(EntropyLossArgs<T> a, Sums s, double* slope, double* loss, double* entropy,
                               double* mean) {
  add_stretches(s, true);
  for (std::int64_t e = threadIdx.x; mean != nullptr && e < a.experts; e += blockDim.x) mean[e] = s.sum[e];
  if (threadIdx.x != 0) return;
  double h = 0;
  const double nats = a.of == EntropyOf::kTokens ? s.sum[a.experts] : entropy_of(s.sum, a.experts);
  const double value = entropy_sense(a, nats, &h, slope);
  *loss = *s.counted == 0 ? 0.0 : value;
  if (entropy != nullptr) *entropy = h;
}

template <class T>
__global__ void entropy_gradient(EntropyLossArgs<T> a, Sums s, double* p, const double* slope, T* gradient) {
  const std::int64_t t = thread_index();
  if (t >= a.tokens) return;
  const std::int64_t row = t * a.experts;
  if (a.valid == nullptr || a.valid[t] != 0) {
    entropy_token_backward(a.of, a.logits + row, s.sum, a.experts, *slope / static_cast<double>(*s.counted), p + row,
                           gradient + row);
    return;
  }
  for (std::int64_t e = 0; e < a.experts; ++e) gradient[row + e] = T(0);
}

template <class T>
Status launch(const EntropyLossArgs<T>& a, const EntropyLossResult<T>& r, void* workspace, CUstream_st* stream) {
  if (const Status status = check_entropy_loss(a, r); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = thread_index_blocks(a.tokens);
  if (blocks > kMostBlocks) return Status::kBadShape;
  Room room(workspace);
  const EntropyRoom s = entropy_room(room, a.tokens, a.experts);
  if (blocks > 0)
    queue(entropy_tokens<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, s.p, s.h, r.token_entropy);
  if (!sum_tokens(a.tokens, a.valid, EntropyColumn{s.p, s.h, a.experts}, s.sums, stream)) return Status::kLaunchFailed;
  queue(finish_entropy<T>, 1, kThreads, 0, stream, a, s.sums, s.slope, r.loss, r.entropy, r.mean_probability);
  if (r.gradient != nullptr && blocks > 0)
    queue(entropy_gradient<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, s.sums, s.p, s.slope, r.gradient);
  return launched();
}

// ---- Gram matrices

/// A warp computes <v_i, v_j>, j <= i, of one of `batches` sets of `rows` vectors.
template <class T>
__global__ void gram_of(const T* v, std::int64_t batches, std::int64_t rows, std::int64_t n, double* gram) {
  const std::int64_t warp = thread_index() / kLanes, batch = warp / (rows * rows);
  const std::int64_t i = warp / rows % rows, j = warp % rows;
  if (batch >= batches || j > i) return;  // whole warps
  const T *a = v + (batch * rows + i) * n, *b = v + (batch * rows + j) * n;
  const int lane = threadIdx.x % kLanes;
  double mine = 0, sum = 0;
  for (std::int64_t c = lane; c < n; c += kLanes) mine += static_cast<double>(a[c]) * static_cast<double>(b[c]);
  for (int l = 0; l < kLanes; ++l) sum += __shfl_sync(0xffffffffu, mine, l);
  if (lane == 0) gram[(batch * rows + i) * rows + j] = gram[(batch * rows + j) * rows + i] = sum;
}
std::int64_t gram_blocks(std::int64_t batches, std::int64_t rows) {
  return parts(batches * rows * rows, kThreads / kLanes);
}

__global__ void gram_rows(GramNorm norm, const double* gram, std::int64_t experts, double* row) {
  const std::int64_t e = thread_index();
  if (e < experts) row[e] = gram_row(norm, gram, e, experts);
}
__global__ void add_rows(std::int64_t experts, double weight, const double* row, double* loss) {
  double sum = 0;
  for (std::int64_t e = 0; e < experts; ++e) sum += row[e];
  *loss = weight * sum;
}
template <class T>
__global__ void gram_gradient(GateOrthogonalityArgs<T> a, const double* gram, T* gradient) {
  const std::int64_t at = thread_index();
  if (at >= a.experts * a.hidden) return;
  const std::int64_t e = at / a.hidden, i = at % a.hidden;
  double sum = 0;
  for (std::int64_t f = 0; f < a.experts; ++f)
    sum += gram_slope(a.norm, gram[e * a.experts + f], e == f) * static_cast<double>(a.w[f * a.hidden + i]);
  gradient[at] = static_cast<T>(a.weight * sum);
}

template <class T>
Status launch(const GateOrthogonalityArgs<T>& a, const GateOrthogonalityResult<T>& r, void* workspace,
              CUstream_st* stream) {
  if (const Status status = check_gate_orthogonality(a, r); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = thread_index_blocks(a.experts * a.hidden), warps = gram_blocks(1, a.experts);
  if (blocks > kMostBlocks || warps > kMostBlocks) return Status::kBadShape;
  Room room(workspace);
  double* row = room.take<double>(a.experts);
  double* gram = r.gram != nullptr ? r.gram : room.take<double>(a.experts * a.experts);
  queue(gram_of<T>, static_cast<unsigned>(warps), kThreads, 0, stream, a.w, 1, a.experts, a.hidden, gram);
  queue(gram_rows, static_cast<unsigned>(parts(a.experts, kThreads)), kThreads, 0, stream, a.norm, gram, a.experts,
        row);
  queue(add_rows, 1, 1, 0, stream, a.experts, a.weight, row, r.loss);
  if (r.gradient != nullptr)
    queue(gram_gradient<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, gram, r.gradient);
  return launched();
}

// ---- overlap of the experts' outputs

struct OverlapRoom {
  Sums sums;
  unsigned long long* with_pairs;
  std::int64_t* pairs;
  double *gram, *mix, *value;
};
OverlapRoom overlap_room(Room& room, std::int64_t tokens, std::int64_t top_k) {
  return {sums_in(room, tokens, 1),
          room.take<unsigned long long>(1),
          room.take<std::int64_t>(tokens),
          room.take<double>(tokens * top_k * top_k),
          room.take<double>(tokens * top_k * top_k),
          room.take<double>(tokens)};
}

template <class T>
__global__ void overlap_tokens(ExpertOverlapArgs<T> a, OverlapRoom s, double* token) {
  const std::int64_t t = thread_index(), square = a.top_k * a.top_k;
  if (t >= a.tokens) return;
  const double value = overlap_token(a, t, s.gram + t * square, s.mix + t * square, s.pairs + t);
  const std::int64_t pairs = s.pairs[t];
  s.value[t] = pairs == 0 ? 0.0 : (a.over_pairs == OverPairs::kMean ? value / static_cast<double>(pairs) : value);
  if (token != nullptr) token[t] = value;
  if (pairs > 0 && (a.valid == nullptr || a.valid[t] != 0)) atomicAdd(s.with_pairs, 1ull);
}

template <class T>
__device__ double overlap_divisor(const ExpertOverlapArgs<T>& a, const OverlapRoom& s) {
  return a.over_pairs == OverPairs::kMean && *s.with_pairs > 0 ? static_cast<double>(*s.with_pairs) : 1.0;
}

template <class T>
__global__ void finish_overlap(ExpertOverlapArgs<T> a, OverlapRoom s, double* loss) {
  add_stretches(s.sums, false);
  if (threadIdx.x == 0) *loss = a.weight * (s.sums.sum[0] / overlap_divisor(a, s));
}

template <class T>
__global__ void overlap_gradient(ExpertOverlapArgs<T> a, OverlapRoom s, T* gradient) {
  const std::int64_t at = thread_index();
  if (at >= a.tokens * a.top_k * a.hidden) return;
  const std::int64_t c = at % a.hidden, j = at / a.hidden % a.top_k, t = at / (a.hidden * a.top_k);
  const double* mix = s.mix + (t * a.top_k + j) * a.top_k;
  double sum = 0;
  for (std::int64_t i = 0; i < a.top_k; ++i) {
    if (mix[i] != 0.0) sum += mix[i] * static_cast<double>(a.outputs[(t * a.top_k + i) * a.hidden + c]);
  }
  const double share = overlap_share(a, t, s.pairs[t], overlap_divisor(a, s));
  gradient[at] = share == 0.0 ? T(0) : static_cast<T>(share * sum);
}

template <class T>
Status launch(const ExpertOverlapArgs<T>& a, const ExpertOverlapResult<T>& r, void* workspace, CUstream_st* stream) {
  if (const Status status = check_expert_overlap(a, r); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = thread_index_blocks(a.tokens), warps = gram_blocks(a.tokens, a.top_k);
  const std::int64_t elements = thread_index_blocks(a.tokens * a.top_k * a.hidden);
  if (warps > kMostBlocks || elements > kMostBlocks) return Status::kBadShape;
  Room room(workspace);
  const OverlapRoom s = overlap_room(room, a.tokens, a.top_k);
  if (cudaMemsetAsync(s.with_pairs, 0, sizeof *s.with_pairs, stream) != cudaSuccess) return Status::kLaunchFailed;
  if (blocks > 0) {
    queue(gram_of<T>, static_cast<unsigned>(warps), kThreads, 0, stream, a.outputs, a.tokens, a.top_k, a.hidden,
          s.gram);
    queue(overlap_tokens<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, s, r.token);
  }
  if (!sum_tokens(a.tokens, a.valid, Column<double>{s.value, 1}, s.sums, stream)) return Status::kLaunchFailed;
  queue(finish_overlap<T>, 1, kThreads, 0, stream, a, s, r.loss);
  if (r.gradient != nullptr && elements > 0)
    queue(overlap_gradient<T>, static_cast<unsigned>(elements), kThreads, 0, stream, a, s, r.gradient);
  return launched();
}

// ---- variance of the scores

struct VarianceRoom {
  Sums means, squares;
};
VarianceRoom variance_room(Room& room, std::int64_t tokens, std::int64_t experts) {
  return {sums_in(room, tokens, experts), sums_in(room, tokens, experts)};
}

__global__ void finish_means(Sums s, double* mean) {
  add_stretches(s, true);
  for (std::int64_t c = threadIdx.x; mean != nullptr && c < s.columns; c += blockDim.x) mean[c] = s.sum[c];
}

template <class T>
struct SquareOff {
  const T* scores;
  const double* mean;
  std::int64_t experts;
  __device__ void operator()(std::int64_t t, std::int64_t e, double& sum) const {
    const double off = static_cast<double>(scores[t * experts + e]) - mean[e];
    sum += off * off;
  }
};

template <class T>
__global__ void finish_variance(ScoreVarianceArgs<T> a, Sums s, double* loss) {
  add_stretches(s, false);
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (std::int64_t e = 0; e < s.columns; ++e) sum += s.sum[e];
  *loss = score_variance_share(a, static_cast<std::int64_t>(*s.counted)) * sum;
}

template <class T>
__global__ void variance_gradient(ScoreVarianceArgs<T> a, Sums means, T* gradient) {
  const std::int64_t i = thread_index();
  if (i >= a.tokens * a.experts) return;
  const double share = score_variance_share(a, static_cast<std::int64_t>(*means.counted));
  const double off = static_cast<double>(a.scores[i]) - means.sum[i % a.experts];
  gradient[i] = a.valid == nullptr || a.valid[i / a.experts] != 0 ? static_cast<T>(2.0 * share * off) : T(0);
}

template <class T>
Status launch(const ScoreVarianceArgs<T>& a, const ScoreVarianceResult<T>& r, void* workspace, CUstream_st* stream) {
  if (const Status status = check_score_variance(a, r); status != Status::kOk) return status;
  if (workspace == nullptr) return Status::kNullPointer;
  const std::int64_t blocks = thread_index_blocks(a.tokens * a.experts);
  if (blocks > kMostBlocks) return Status::kBadShape;
  Room room(workspace);
  const VarianceRoom s = variance_room(room, a.tokens, a.experts);
  if (!sum_tokens(a.tokens, a.valid, Column<T>{a.scores, a.experts}, s.means, stream)) return Status::kLaunchFailed;
  queue(finish_means, 1, kThreads, 0, stream, s.means, r.mean);
  if (!sum_tokens(a.tokens, a.valid, SquareOff<T>{a.scores, s.means.sum, a.experts}, s.squares, stream))
    return Status::kLaunchFailed;
  queue(finish_variance<T>, 1, kThreads, 0, stream, a, s.squares, r.loss);
  if (r.gradient != nullptr && blocks > 0)
    queue(variance_gradient<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, a, s.means, r.gradient);
  return launched();
}

}  // namespace

std::size_t importance_loss_workspace(std::int64_t tokens, std::int64_t experts) {
  Room room(nullptr);
  cv_room(room, tokens, experts);
  return room.used();
}
std::size_t load_loss_workspace(std::int64_t tokens, std::int64_t experts) {
  Room room(nullptr);
  load_room(room, tokens, experts);
  return room.used();
}
std::size_t entropy_loss_workspace(std::int64_t tokens, std::int64_t experts) {
  Room room(nullptr);
  entropy_room(room, tokens, experts);
  return room.used();
}
std::size_t gate_orthogonality_workspace(std::int64_t experts) {
  return static_cast<std::size_t>(experts * (experts + 1)) * sizeof(double);
}
std::size_t expert_overlap_workspace(std::int64_t tokens, std::int64_t top_k) {
  Room room(nullptr);
  overlap_room(room, tokens, top_k);
  return room.used();
}
std::size_t score_variance_workspace(std::int64_t tokens, std::int64_t experts) {
  Room room(nullptr);
  variance_room(room, tokens, experts);
  return room.used();
}

Status importance_loss(const ImportanceLossArgs<float>& args, const ImportanceLossResult<float>& result,
                       void* workspace, CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status importance_loss(const ImportanceLossArgs<double>& args, const ImportanceLossResult<double>& result,
                       void* workspace, CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status load_loss(const LoadLossArgs<float>& args, const LoadLossResult<float>& result, void* workspace,
                 CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status load_loss(const LoadLossArgs<double>& args, const LoadLossResult<double>& result, void* workspace,
                 CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status entropy_loss(const EntropyLossArgs<float>& args, const EntropyLossResult<float>& result, void* workspace,
                    CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status entropy_loss(const EntropyLossArgs<double>& args, const EntropyLossResult<double>& result, void* workspace,
                    CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status gate_orthogonality(const GateOrthogonalityArgs<float>& args, const GateOrthogonalityResult<float>& result,
                          void* workspace, CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status gate_orthogonality(const GateOrthogonalityArgs<double>& args, const GateOrthogonalityResult<double>& result,
                          void* workspace, CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status expert_overlap(const ExpertOverlapArgs<float>& args, const ExpertOverlapResult<float>& result, void* workspace,
                      CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status expert_overlap(const ExpertOverlapArgs<double>& args, const ExpertOverlapResult<double>& result, void* workspace,
                      CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status score_variance(const ScoreVarianceArgs<float>& args, const ScoreVarianceResult<float>& result, void* workspace,
                      CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}
Status score_variance(const ScoreVarianceArgs<double>& args, const ScoreVarianceResult<double>& result, void* workspace,
                      CUstream_st* stream) {
  return launch(args, result, workspace, stream);
}

}  // namespace moeaudit::kernels::cuda
