#include "kernels/host/sparse_mixer.h"

namespace moeaudit::kernels {
namespace {

template <class T>
Status run(const SparseMixerArgs<T>& a, const SparseMixerResult<T>& r) {
  if (const Status status = check_sparse_mixer(a, r); status != Status::kOk) return status;
  if (!mixer_ids_fit(a.given, a.tokens, a.experts)) return Status::kBadShape;
  for (std::int64_t t = 0; t < a.tokens; ++t) sparse_mixer_token(a, r, t);
  return Status::kOk;
}
template <class T>
Status run(const SparseMixerBackwardArgs<T>& a, double* d_logits) {
  if (const Status status = check_sparse_mixer_backward(a, d_logits); status != Status::kOk) return status;
  if (!mixer_ids_fit(a.chosen, a.forward.tokens, a.forward.experts)) return Status::kBadShape;
  for (std::int64_t t = 0; t < a.forward.tokens; ++t)
    sparse_mixer_backward_token(a, t, d_logits + t * a.forward.experts);
  return Status::kOk;
}

}  // namespace

Status sparse_mixer(const SparseMixerArgs<float>& args, const SparseMixerResult<float>& result) {
  return run(args, result);
}
Status sparse_mixer(const SparseMixerArgs<double>& args, const SparseMixerResult<double>& result) {
  return run(args, result);
}
Status sparse_mixer_backward(const SparseMixerBackwardArgs<float>& args, double* d_logits) {
  return run(args, d_logits);
}
Status sparse_mixer_backward(const SparseMixerBackwardArgs<double>& args, double* d_logits) {
  return run(args, d_logits);
}

}  // namespace moeaudit::kernels
