// The inputs x that routers are replayed on.
#include "audit/measures/router_inputs.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string_view>
#include <thread>

#include "kernels/host/gaussian.h"
#include "kernels/host/router.h"

namespace moeaudit {
namespace {

bool is_plain_float(DType d) { return d == DType::kF64 || d == DType::kF32 || d == DType::kBF16 || d == DType::kF16; }

bool all_finite(const float* values, std::int64_t count) {
  return std::all_of(values, values + count, [](float v) { return std::isfinite(v); });
}

/// The first `count` values of a tensor of `of`.
std::string read_first(const TensorStore& store, const std::string& name, std::int64_t count, std::int64_t of, std::vector<float>* out) {
  const TensorView* view = store.find(name);
  if (view == nullptr) return name + " is not in the weights";
  if (!is_plain_float(view->dtype))
    return name + " is stored as " + std::string(view->dtype_text) + ", which needs scales to read";
  if (view->elements() != of) {
    return name + " has " + std::to_string(view->elements()) + " elements where " + std::to_string(of) +
           " are expected";
  }
  out->resize(static_cast<std::size_t>(count));
  if (!decode(*view, 0, count, out->data())) return name + " cannot be decoded";
  return all_finite(out->data(), count) ? std::string() : name + " has values that are not finite";
}

}  // namespace

std::string read_floats(const TensorStore& store, const std::string& name, std::int64_t count, std::vector<float>* out) {
  return read_first(store, name, count, count, out);
}

std::string read_gate(const TensorStore& store, const RouterTable& table, std::size_t row, const std::string& name, std::vector<float>* out) {
  const auto experts = static_cast<std::size_t>(table.experts[row]), hidden = static_cast<std::size_t>(table.hidden[row]);
  std::string fault = read_floats(store, name, table.experts[row] * table.hidden[row], out);
  if (!fault.empty() || !table.is_input_major(row)) return fault;
  const std::vector<float> stored = *out;
  for (std::size_t h = 0; h < hidden; ++h) {
    for (std::size_t e = 0; e < experts; ++e) (*out)[e * hidden + h] = stored[h * experts + e];
  }
  return fault;
}

std::string read_correction_bias(const TensorStore& store, const std::string& name, std::int64_t experts, std::vector<float>* out) {
  const TensorView* view = store.find(name);
  const bool rows = view != nullptr && view->shape.size() == 2 && view->shape[1] == experts;
  return read_first(store, name, experts, rows ? view->elements() : experts, out);
}

void parallel_for(int threads, std::int64_t count, const std::function<void(std::int64_t, int)>& f) {
  const int workers = static_cast<int>(std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(count, 1)));
  std::atomic<std::int64_t> next{0};
  const auto work = [&](int worker) {
    for (std::int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) f(i, worker);
  };
  std::vector<std::thread> pool;
  for (int w = 1; w < workers; ++w) pool.emplace_back(work, w);
  work(0);
  for (std::thread& t : pool) t.join();
}

void RouterInputs::make_probe(std::int64_t tokens, std::int64_t hidden, int threads) {
  if (probe_hidden_ == hidden && static_cast<std::int64_t>(rows_.size()) == tokens * hidden) return;
  probe_hidden_ = hidden;
  rows_.resize(static_cast<std::size_t>(tokens * hidden));
  parallel_for(threads, tokens, [&](std::int64_t t, int) {
    float* row = rows_.data() + t * hidden;
    kernels::unit_gaussians(kProbeSeed, static_cast<std::uint64_t>(t), 0, hidden, row);
    double squares = 0;  // in index order
    for (std::int64_t i = 0; i < hidden; ++i) squares += static_cast<double>(row[i]) * static_cast<double>(row[i]);
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(hidden));
    for (std::int64_t i = 0; i < hidden; ++i) row[i] = static_cast<float>(row[i] * scale);
  });
}

const TensorView* RouterInputs::tensor_of(int layer) const {
  if (store_.size() == 1) return &store_[0];
  for (std::size_t i = 0; i < store_.size(); ++i) {
    for (const std::string_view prefix : {"model.layers.", "layers.", "layer."}) {
      const std::string want = std::string(prefix) + std::to_string(layer);
      if (store_[i].name == want || store_[i].name.starts_with(want + ".")) return &store_[i];
    }
  }
  return nullptr;
}

std::int64_t RouterInputs::rows_of(const TensorView& view, std::int64_t hidden) {
  if (view.shape.empty() || view.shape.back() != hidden || hidden < 1 || !is_plain_float(view.dtype)) return 0;
  return view.elements() / hidden;
}

std::int64_t RouterInputs::fill(const float* norm, const TensorView* view, std::int64_t hidden, std::int64_t first,
                                std::int64_t count, std::int64_t of, float* x) const {
  std::int64_t kept = 0;
  for (std::int64_t t = first; t < first + count; ++t) {
    float* row = x + kept * hidden;
    if (view == nullptr) {
      const float* from = rows_.data() + t * hidden;
      for (std::int64_t i = 0; i < hidden; ++i) row[i] = from[i] * norm[i];
    } else if (!decode(*view, t * rows_of(*view, hidden) / of * hidden, hidden, row)) {
      continue;
    }
    kernels::round_values(row, hidden, activations_, row);
    kept += view == nullptr || all_finite(row, hidden) ? 1 : 0;
  }
  return kept;
}

}  // namespace moeaudit
