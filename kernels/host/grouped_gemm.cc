#include "kernels/host/grouped_gemm.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace moeaudit::kernels {
namespace {

bool ascend(const std::int64_t* offsets, std::int64_t experts, std::int64_t rows) {
  for (std::int64_t e = 0; e < experts; ++e) {
    if (offsets[e + 1] < offsets[e]) return false;
  }
  return offsets[0] == 0 && offsets[experts] <= rows;
}

/// The gate GEMM does the work, with an expert's matrix for its weights: the same sums in the same order.
template <class T>
class Products {
 public:
  using In = Wide<T>;
  using Sum = std::conditional_t<std::is_same_v<T, BFloat16>, double, T>;

  explicit Products(const GroupedGemmArgs<T>& a) : a_(a) {}

  void run() {
    for (std::int64_t e = 0; e < a_.experts; ++e) {
      const std::int64_t first = a_.offsets[e], rows = a_.offsets[e + 1] - first, matrix = a_.outputs * a_.inputs;
      switch (a_.product) {
        case GroupedProduct::kForward:
          copy(a_.left + first * a_.inputs, rows * a_.inputs, &left_);
          copy(a_.right + e * matrix, matrix, &right_);
          multiply(rows, a_.inputs, a_.outputs);
          finish(first, rows, a_.outputs, a_.bias == nullptr ? nullptr : a_.bias + e * a_.outputs);
          break;
        case GroupedProduct::kInput:
          copy(a_.left + first * a_.outputs, rows * a_.outputs, &left_);
          transpose(a_.right + e * matrix, a_.outputs, a_.inputs, &right_);
          multiply(rows, a_.outputs, a_.inputs);
          finish(first, rows, a_.inputs, nullptr);
          break;
        case GroupedProduct::kWeight:
          transpose(a_.left + first * a_.outputs, rows, a_.outputs, &left_);
          transpose(a_.right + first * a_.inputs, rows, a_.inputs, &right_);
          multiply(a_.outputs, rows, a_.inputs);
          for (std::int64_t i = 0; i < matrix; ++i)
            a_.weight[e * matrix + i] =
                narrow<Wide<T>>(static_cast<Sum>(a_.alpha) * sums_[static_cast<std::size_t>(i)]);
          break;
      }
    }
  }

 private:
  void copy(const T* from, std::int64_t count, std::vector<In>* to) {
    to->resize(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) (*to)[static_cast<std::size_t>(i)] = widen(from[i]);
  }
  /// to[columns, rows] of from[rows, columns].
  void transpose(const T* from, std::int64_t rows, std::int64_t columns, std::vector<In>* to) {
    to->resize(static_cast<std::size_t>(rows * columns));
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c)
        (*to)[static_cast<std::size_t>(c * rows + r)] = widen(from[r * columns + c]);
    }
  }
  /// sums_[i, j] = sum over `terms` of left_[i, .] right_[j, .]
  void multiply(std::int64_t lines, std::int64_t terms, std::int64_t columns) {
    sums_.assign(static_cast<std::size_t>(lines * columns), Sum(0));
    if (lines == 0 || terms == 0) return;
    packed_.resize(static_cast<std::size_t>(packed_gate_size<Sum>(columns, terms)));
    pack_gate(right_.data(), columns, terms, packed_.data());
    GateArgs<In, Sum> g;
    g.x = left_.data(), g.packed = packed_.data(), g.tokens = lines, g.hidden = terms, g.experts = columns;
    g.logits = sums_.data();
    gate_logits(g);
  }
  void finish(std::int64_t first, std::int64_t rows, std::int64_t columns, const T* bias) {
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      T& out = a_.out[first * columns + i];
      out = finish_product<T, Sum>(sums_[static_cast<std::size_t>(i)], static_cast<Sum>(a_.alpha), a_.add, out,
                                   bias == nullptr ? nullptr : bias + i % columns);
    }
  }

  const GroupedGemmArgs<T>& a_;
  std::vector<In> left_, right_;
  std::vector<Sum> packed_, sums_;
};

template <class T>
Status run(const GroupedGemmArgs<T>& a) {
  if (const Status status = check_grouped_gemm(a); status != Status::kOk) return status;
  if (!ascend(a.offsets, a.experts, a.rows)) return Status::kBadShape;
  Products<T>(a).run();
  return Status::kOk;
}

template <class T>
Status run(const ColumnSumsArgs<T>& a) {
  if (const Status status = check_column_sums(a); status != Status::kOk) return status;
  if (!ascend(a.offsets, a.experts, a.rows)) return Status::kBadShape;
  for (std::int64_t e = 0; e < a.experts; ++e) {
    for (std::int64_t n = 0; n < a.columns; ++n) {
      Wide<T> sum = 0;
      for (std::int64_t first = a.offsets[e]; first < a.offsets[e + 1]; first += kGateRun)
        sum += column_stretch(a, first, std::min(first + kGateRun, a.offsets[e + 1]), n);
      a.sums[e * a.columns + n] = sum;
    }
  }
  return Status::kOk;
}

}  // namespace

Status grouped_gemm(const GroupedGemmArgs<float>& args) { return run(args); }
Status grouped_gemm(const GroupedGemmArgs<double>& args) { return run(args); }
Status grouped_gemm(const GroupedGemmArgs<BFloat16>& args) { return run(args); }
Status column_sums(const ColumnSumsArgs<float>& args) { return run(args); }
Status column_sums(const ColumnSumsArgs<double>& args) { return run(args); }
Status column_sums(const ColumnSumsArgs<BFloat16>& args) { return run(args); }

}  // namespace moeaudit::kernels
