// LoRA on a CUDA device against the host: the same bits.
#include <gtest/gtest.h>

#ifndef MOE_AUDIT_HAVE_CUDA

TEST(LoraCuda, SameBitsAsTheHost) { GTEST_SKIP() << "built without CUDA (no nvcc, or MOE_AUDIT_CUDA=OFF)"; }

#else

#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/lora.h"
#include "kernels/host/gaussian.h"
#include "tests/support/on_device.h"

namespace moeaudit::kernels {
namespace {

using test::expect_same;
using test::OnDevice;

class LoraCuda : public test::OnCuda {};

std::vector<float> gaussians(std::int64_t n, std::uint64_t stream) {
  std::vector<float> g(static_cast<std::size_t>(n));
  unit_gaussians(9, stream, 0, n, g.data());
  return g;
}

std::vector<double> numbers(const MergeLoss& l) {
  return {static_cast<double>(l.elements),
          static_cast<double>(l.changed),
          static_cast<double>(l.swallowed),
          static_cast<double>(l.not_restored),
          l.delta_squares,
          l.moved_squares,
          l.dot,
          l.error_squares};
}

void check_merge(std::int64_t rows, std::int64_t columns, std::int64_t rank, MergeDtypes dtypes,
                 const std::string& what) {
  const std::vector<float> left = gaussians(rows * rank, 1), right = gaussians(rank * columns, 2),
                           weights = gaussians(rows * columns, 3);
  std::vector<double> w(weights.begin(), weights.end()), out(w.size(), -7);
  for (double& v : w) v = round_to(v, dtypes.stored);
  if (w.size() > 3) w[2] = std::numeric_limits<double>::infinity();
  const OnDevice<float> d_left(left), d_right(right);
  const OnDevice<double> d_w(w), d_out(out);
  const OnDevice<MergeLoss> d_loss(std::vector<MergeLoss>(1));
  const OnDevice<char> workspace(std::vector<char>(cuda::lora_merge_loss_workspace(rows), 1));
  const LoraMergeArgs host{{left.data(), right.data(), rows, columns, rank}, w.data(), 0.007, dtypes};
  LoraMergeArgs device = host;
  device.update.left = d_left.data(), device.update.right = d_right.data(), device.w = d_w.data();
  ASSERT_EQ(lora_product(host.update, out.data()), Status::kOk) << what;
  ASSERT_EQ(cuda::lora_product(device.update, d_out.data(), nullptr), Status::kOk) << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  expect_same(out, d_out.fetch(), what + " product");
  for (const bool unmerge : {false, true}) {
    ASSERT_EQ(lora_merge(host, unmerge, out.data()), Status::kOk) << what;
    ASSERT_EQ(cuda::lora_merge(device, unmerge, d_out.data(), nullptr), Status::kOk) << what;
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
    expect_same(out, d_out.fetch(), what + (unmerge ? " un-merge" : " merge"));
  }
  MergeLoss loss;
  ASSERT_EQ(lora_merge_loss(host, dtypes, &loss), Status::kOk) << what;
  ASSERT_EQ(cuda::lora_merge_loss(device, dtypes, d_loss.data(), workspace.data(), nullptr), Status::kOk) << what;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
  expect_same(numbers(loss), numbers(d_loss.fetch()[0]), what + " loss");
}

TEST_F(LoraCuda, SameBitsAsTheHost) {
  for (const Float stored : {Float::kF64, Float::kF32, Float::kBF16, Float::kF16}) {
    MergeDtypes d = peft_dtypes(Float::kF32, stored, PeftLayer::kLinear, true, PeftCall::kUnmerge);
    const std::string what = "dtype " + std::to_string(static_cast<int>(stored));
    check_merge(1, 1, 1, d, what);
    check_merge(2, 300, 1, d, what);
    check_merge(257, 65, 16, d, what);
  }
}

TEST_F(LoraCuda, GradientsHaveTheBitsOfTheHost) {
  struct Shape {
    std::int64_t tokens, in, out, rank;
  };
  for (const Shape s : {Shape{1, 1, 1, 1}, {0, 5, 4, 3}, {7, 5, 160, 9}, {50, 200, 96, 16}}) {
    const std::string what = "tokens " + std::to_string(s.tokens);
    const std::vector<float> x = gaussians(s.tokens * s.in + 1, 1), dy = gaussians(s.tokens * s.out + 1, 2),
                             a = gaussians(s.rank * s.in, 3), b = gaussians(s.out * s.rank, 4);
    std::vector<double> da(a.size(), -7), db(b.size(), -7), dx(x.size(), -7);
    const OnDevice<float> d_x(x), d_dy(dy), d_a(a), d_b(b);
    const OnDevice<double> d_da(da), d_db(db), d_dx(dx);
    const OnDevice<char> workspace(std::vector<char>(cuda::lora_gradient_workspace(s.tokens, s.rank) + 8, 1));
    LoraGradientArgs args{x.data(), dy.data(), a.data(), b.data(), s.tokens, s.in, s.out, s.rank, 1.7};
    ASSERT_EQ(lora_gradient(args, {da.data(), db.data(), dx.data()}), Status::kOk) << what;
    args.x = d_x.data(), args.grad_y = d_dy.data(), args.a = d_a.data(), args.b = d_b.data();
    ASSERT_EQ(cuda::lora_gradient(args, {d_da.data(), d_db.data(), d_dx.data()}, workspace.data(), nullptr),
              Status::kOk)
        << what;
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << what;
    expect_same(da, d_da.fetch(), what + " A");
    expect_same(db, d_db.fetch(), what + " B");
    expect_same(dx, d_dx.fetch(), what + " x");
  }
}

}  // namespace
}  // namespace moeaudit::kernels

#endif
