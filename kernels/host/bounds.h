// Error bounds of the kernels, each derived from the operations it covers. Tests compare against these, never
// against picked tolerances.
//
// Notation: u is the unit roundoff of the arithmetic (unit_roundoff()). Each operation gives the exact result times
// (1 + e), |e| <= u, unless it underflows; n such factors together stay within 1 +- gamma_n, gamma_n = n u / (1 - n u)
// (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1). Factors within e^(+-a) and e^(+-b)
// multiply to one within e^(+-(a + b)), and 1 + gamma_n <= e^gamma_n: so relative bounds below add exponents and return
// expm1 of the sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/host/balance_loss.h"
#include "kernels/host/low_precision.h"
#include "kernels/host/moe_layer.h"
#include "kernels/host/router.h"
#include "kernels/host/weight_scan.h"
#include "kernels/host/z_loss.h"

namespace moeaudit::kernels::bounds {

inline double gamma(double n, double u) { return n * u / (1.0 - n * u); }

/// Smallest positive number of a format: the absolute error of one result that underflows is at most half of it.
inline double smallest(Float f) {
  if (f == Float::kF64) return 4.9406564584124654e-324;
  return power_of_two(format_of(f).min_exp) * power_of_two(1 - format_of(f).bits);
}

/// |computed - exact| of one logit of gate_logits(). absolute = sum_i |x_i w_i| + |bias|. A product takes one rounding
/// (none when products are exact), the longest stretch kGateRun - 1 additions (the first is onto 0), adding up the
/// stretches one fewer than there are, the bias one. Sums of floats do not underflow inexactly, products may.
inline double gate(std::int64_t hidden, double absolute, Float sum, bool exact_products) {
  const auto stretches = (hidden + kGateRun - 1) / kGateRun;
  const double n = (exact_products ? 0.0 : 1.0) + static_cast<double>(std::min(hidden, kGateRun) - 1) +
                   static_cast<double>(stretches - 1) + 1.0;
  const double underflow = exact_products ? 0.0 : 0.5 * static_cast<double>(hidden) * smallest(sum);
  return gamma(n, unit_roundoff(sum)) * absolute + underflow;
}

/// The same for a plain sum in index order, as reference/ has it, in float64: one rounding for the product, hidden - 1
/// additions, one for the bias.
inline double gate_in_index_order(std::int64_t hidden, double absolute) {
  return gamma(static_cast<double>(hidden) + 1.0, unit_roundoff(Float::kF64)) * absolute +
         0.5 * static_cast<double>(hidden) * smallest(Float::kF64);
}

/// |computed - exact| of a dot product of `length` bfloat16 or float16 numbers on tensor cores with float32 sums.
/// absolute = sum |a_i b_i|. Products are exact; an mma of 16 adds them and the running sum after aligning all 17 to
/// the largest and cutting them off, and cuts the result off at float32 (Fasi, Higham, Mikaitis, Pranesh, Numerical
/// behavior of NVIDIA tensor cores, PeerJ CS 2021): 18 errors of at most one place, 2^-23, of what has been added so
/// far.
inline double tensor_core_dot(std::int64_t length, double absolute) {
  const double steps = std::ceil(static_cast<double>(length) / 16.0);
  return gamma(18.0 * steps, 0x1p-23) * absolute + 18.0 * steps * smallest(Float::kF32);
}

/// |round_to(v, f) - exact| where |v - exact| <= before: half a place at the larger of the two, and what was there
/// before.
inline double rounded(double v, double before, Float f) { return 0.5 * spacing(std::fabs(v) + before, f) + before; }

/// Relative error of a softmax probability. `logit_error` bounds the error of every logit, `range` is the largest
/// |l - max l|. An error d of a logit is a factor e^d in the numerator and at worst e^-d over the denominator: 2 d. So
/// is the rounding of l - max l, which is at most range u. Then: an exponential counts 2 roundings (one unit in the
/// last place, or one rounding after a float64 exponential), in the numerator and in each term of the sum; E - 1
/// additions of positive numbers; one division.
inline double softmax_relative(std::int64_t experts, double logit_error, double range, Float f) {
  const double u = unit_roundoff(f);
  return std::expm1(2.0 * logit_error + 2.0 * range * u + gamma(2.0 + 2.0 + static_cast<double>(experts - 1) + 1.0, u));
}
/// Absolute error that underflow adds to it: half a place of the exponential (the sum is at least 1) and of the
/// quotient.
inline double softmax_underflow(Float f) { return smallest(f); }

/// Relative error of a sigmoid. d(ln s)/dl = 1 - s <= 1. In float64: exponential 2 roundings, sum, quotient, and one to
/// store it in f. In float32 the exponential (2) stands in the numerator or, weighing at most half, in the denominator:
/// 3 at most; sum, quotient.
inline double sigmoid_relative(double logit_error, Float f) {
  if (f == Float::kF32) return std::expm1(logit_error + gamma(5.0, unit_roundoff(f)));
  return std::expm1(logit_error + gamma(4.0, unit_roundoff(Float::kF64)) + gamma(1.0, unit_roundoff(f)));
}

/// Relative error of sqrt(softplus). d(ln sqrt(softplus))/dl = s / (2 softplus) <= 1/2, since softplus = -ln(1 - s) >=
/// s. In float64: 2 roundings for the exponential (a relative error of y changes ln(1 + y) by no larger one); the
/// logarithm 4 (two units in the last place); its correction y - (u - 1) is exact, its quotient and the final sum 2
/// more; a root halves them all and adds 1. Then one rounding to f. Valid while no logit crosses the switch at 20,
/// where the function itself jumps by 2.1e-9.
inline double sqrt_softplus_relative(double logit_error, Float f) {
  return std::expm1(0.5 * logit_error + gamma(0.5 * (2.0 + 4.0 + 2.0) + 1.0, unit_roundoff(Float::kF64)) +
                    gamma(1.0, unit_roundoff(f)));
}

/// |softcapped() - exact|, at most `softcap` in size: the quotient, a tanh (whose relative error is no larger than its
/// argument's, and which takes 8 roundings of float64 of its own before it is rounded to f) and the product.
inline double softcapped(double softcap, Float f) {
  return softcap * (gamma(3.0, unit_roundoff(f)) + gamma(8.0, unit_roundoff(Float::kF64)));
}

/// Relative error of weights w_j / (sum w + eps) * scaling, from positive scores with relative error `score`: once in
/// the numerator, once in the sum, k - 1 additions, one for eps (and one for storing it), one division.
inline double renormalised_relative(double score, std::int64_t top_k, Float f) {
  return std::expm1(2.0 * std::log1p(score) + gamma(static_cast<double>(top_k - 1) + 3.0, unit_roundoff(f)));
}
/// Absolute error that underflow adds to such a weight. Each score may be off by `smallest` (see softmax_underflow);
/// with D = sum of the exact scores + eps: |a/D' - s/D| <= a / D' + s k a / (D D') <= (1 + k) a / (D - k a), since s <=
/// D.
inline double renormalised_underflow(double denominator, std::int64_t top_k, Float f) {
  const double a = smallest(f), k = static_cast<double>(top_k);
  return denominator > k * a ? (1.0 + k) * a / (denominator - k * a) : INFINITY;
}
/// Relative error of sigmoid + offset: no larger than the sigmoid's, the offset rounded once, the sum once.
inline double offset_relative(double sigmoid, Float f) {
  return std::expm1(std::log1p(sigmoid) + gamma(2.0, unit_roundoff(f)));
}
/// Relative error of power(x, exponent) (router.h) of an exact x, |ln x| <= range. A product for a square; otherwise, in
/// float64, the logarithm 4 roundings (two units in the last place) and its product one, which the exponential makes
/// relative ones of the power, itself 2; then one to store it in f.
inline double power_relative(double exponent, double range, Float f) {
  const double wide = unit_roundoff(Float::kF64), u = unit_roundoff(f);
  if (exponent == 1.0) return 0.0;
  if (exponent == 2.0) return std::expm1(gamma(1.0, u));
  return std::expm1(std::fabs(exponent) * range * gamma(5.0, wide) + gamma(2.0, wide) + gamma(1.0, u));
}
/// Relative error of a PNorm of n positive scores s with relative error `score`, |ln s| <= range. The scores' own passes
/// through as it is: the norm is homogeneous. That of the powers and of n - 1 additions is divided by p by the root;
/// of it: a root for p = 2, else a power whose exponent was rounded once, of a norm within ln(n) / p of the scores'.
inline double norm_relative(double score, std::int64_t n, double p, double range, Float f) {
  const double u = unit_roundoff(f), own = std::log1p(score), count = static_cast<double>(n);
  if (std::isinf(p)) return score;
  const double sum = (std::log1p(power_relative(p, range, f)) + gamma(count - 1.0, u)) / p;
  if (p == 1.0) return std::expm1(own + sum);
  const double norm_range = range + std::log(count) / p;  // |ln of the norm|, p times less than that of the sum
  const double root = p == 2.0 ? gamma(1.0, u)
                               : norm_range * gamma(1.0, u) + std::log1p(power_relative(1.0 / p, p * norm_range, f));
  return std::expm1(own + sum + root);
}
/// renormalised_relative() and renormalised_underflow() of a norm other than the sum.
inline double normed_relative(double score, std::int64_t top_k, double p, double range, Float f) {
  return std::expm1(std::log1p(score) + std::log1p(norm_relative(score, top_k, p, range, f)) +
                    gamma(3.0, unit_roundoff(f)));
}
/// Each score may be off by a = `smallest`, and so may each power, which for p < 1 moves by a^p with its score: the sum
/// of the powers, `norm`^p, by k times that, its root by 1 / p as much; for p >= 1 the norm by no more than k a besides.
/// A weight is at most 1, since no score is above the norm.
inline double normed_underflow(double norm, std::int64_t top_k, double p, Float f) {
  const double a = smallest(f), k = static_cast<double>(top_k), floor = std::isinf(p) ? 0.0 : std::pow(norm, p);
  const double of_norm = k * a / norm + (std::isinf(p) ? 0.0 : k * std::pow(a, std::min(p, 1.0)) / (p * floor));
  return of_norm < 0.25 ? 2.0 * a / norm + 2.0 * of_norm : INFINITY;
}
/// One product with a scaling that was itself rounded once.
inline double scaled_relative(double weight, Float f) {
  return std::expm1(std::log1p(weight) + gamma(2.0, unit_roundoff(f)));
}

/// Error of one logit's gradient, of route_backward() and of autograd over the same operations, relative to `size`: the
/// sum of the magnitudes of its terms,
///   g_c     = scaling |u_c|, renormalised scaling (|u_c| / D + sum_j |u_j| s_j / D^2), D = sum_j s_j + eps, or its
///             floor, and then without the second term; u_c times the expert's scale where there is one; the sums over
///             j over those that a token always has, too; 0 for what was not chosen; plus |d loss / d s_c| of a loss of
///             the scores
///   size[e] = s_e (g_e + sum_f g_f s_f) for a softmax, g_e s_e (1 + s_e) for a sigmoid (1 - s_e as two terms), g_e
///   times the
///             slope for a square root of softplus, whose sigmoid is no less exact than its value; times 1 + t^2 where
///             logits are capped, t = tanh(logit / cap) (1 - t^2 as two terms)
/// `score` is the relative error of a score, which goes into a term at most 5 times: once in the sum over j, twice as
/// D, and twice in the slope. Roundings: k additions for the sum over j and for each D; its product, two quotients, a
/// difference, scaling, an expert's scale and the sum with the other loss (7); E additions, two products and a
/// difference for a softmax, three for a slope; one more where a gradient of the logits is added last; for logits that
/// are capped twice the 11 of softcapped() in t, its square, a difference and a product (25). top_k: with those that a
/// token always has.
inline double route_backward_relative(double score, std::int64_t experts, std::int64_t top_k, bool capped = false) {
  const double roundings = 3.0 * static_cast<double>(top_k) + static_cast<double>(experts) + (capped ? 36.0 : 11.0);
  return std::expm1(5.0 * std::log1p(score) + gamma(roundings, unit_roundoff(Float::kF64)));
}

/// Relative error of a weight of sparse_mixer(): a softmax over the experts that are kept, of whose logits each is off
/// by `logit_error`, then one product with 1 or the midpoint.
inline double sparse_mixer_weight(std::int64_t experts, double logit_error, double range, Float f) {
  return std::expm1(std::log1p(softmax_relative(experts, logit_error, range, f)) + gamma(1.0, unit_roundoff(f)));
}
/// Error of one logit's gradient, of sparse_mixer_backward() and of autograd over the same operations, relative to
///   size[e] = sum over both picks of |g| p[chosen] (p[e] + [e = chosen])
/// with p off by `score` each; a product with g, one with p[e], a difference and the sum over the picks.
inline double sparse_mixer_backward_relative(double score) {
  return std::expm1(2.0 * std::log1p(score) + gamma(4.0, unit_roundoff(Float::kF64)));
}

/// The same with a p-norm: (s_c / N)^(p - 1) times the second term of g_c, s with its offset. N goes into a term twice
/// (`norm`: of norm_relative()), a score three times and the power of s_c / N as well, |p - 1| times both. Autograd has
/// that power as S^(1/p - 1) s_c^(p - 1), S = N^p the sum: the norm's error as often, and exponents that were rounded,
/// of logarithms within p times L = range + ln(k) / p; here it is one power of a quotient within 2 L. Five roundings of
/// each logarithm (power_relative()), six of powers, quotient and products; a share of equal largest ones takes two.
inline double route_backward_normed_relative(double score, std::int64_t experts, std::int64_t top_k, double p,
                                             double range, bool capped = false) {
  const double u = unit_roundoff(Float::kF64), own = std::log1p(score), count = static_cast<double>(top_k);
  const double norm = std::log1p(norm_relative(score, top_k, p, range, Float::kF64));
  const double others = std::log1p(route_backward_relative(0.0, experts, top_k, capped));
  if (std::isinf(p)) return std::expm1(3.0 * own + 2.0 * norm + others + gamma(2.0, u));
  const double logarithms = (p + 1.0) * (range + std::log(count) / p);
  const double slope = std::fabs(p - 1.0) * (own + norm) + std::fabs(1.0 - 1.0 / p) * gamma(count + 3.0, u) +
                       2.0 * logarithms * gamma(5.0, u) + gamma(6.0, u);
  return std::expm1(3.0 * own + 2.0 * norm + slope + others);
}

/// Additions that one value of scan() goes through at most: those of its accumulator in a block, of the blocks of a
/// piece, of the tree over the accumulators, and of the pieces.
inline double scan_additions(Stored type, std::int64_t count) {
  const std::int64_t size = stored_size(type), lanes = type == Stored::kF64 ? 8 : 16;
  const auto parts = [](std::int64_t n, std::int64_t part) { return (n + part - 1) / part; };
  const std::int64_t in_piece = std::min(count, kScanPiece / size), in_block = std::min(count, kScanBlock / size);
  return static_cast<double>(parts(in_block, lanes) + parts(in_piece, kScanBlock / size) + (lanes == 16 ? 4 : 3) +
                             parts(count, kScanPiece / size));
}
/// |ScanResult::sum - exact|. absolute = sum of the magnitudes of the finite values. Sums of floats do not underflow
/// inexactly; they may overflow, which float64 values alone can do.
inline double scan_sum(Stored type, std::int64_t count, double absolute) {
  return gamma(scan_additions(type, count), unit_roundoff(Float::kF64)) * absolute;
}
/// |ScanResult::sum_of_squares - exact|: the same, and for float64 values one rounding a square, which may underflow.
/// Squares of values of 32 and fewer bits are exact: at most 48 significant bits, at least 2^-298.
inline double scan_squares(Stored type, std::int64_t count, double exact) {
  const bool rounds = type == Stored::kF64;
  return gamma(scan_additions(type, count) + (rounds ? 1 : 0), unit_roundoff(Float::kF64)) * exact +
         (rounds ? 0.5 * static_cast<double>(count) * smallest(Float::kF64) : 0.0);
}
/// A float64 sum of `count` terms in any order, each of which went through `roundings` roundings before.
inline double sum_in_any_order(std::int64_t count, double roundings, double absolute) {
  return gamma(static_cast<double>(count) + roundings, unit_roundoff(Float::kF64)) * absolute +
         0.5 * static_cast<double>(count) * smallest(Float::kF64);
}

/// Relative error of balance_loss() from non-negative probabilities, all of it float64: additions within a stretch, of
/// the stretches, over the experts and the sets; one division for a mean, 4 roundings for a weight, 1 for their
/// product, 2 for the share of a set.
inline double balance_loss_relative(std::int64_t tokens, std::int64_t experts, std::int64_t sets) {
  const double stretches = std::ceil(static_cast<double>(tokens) / static_cast<double>(kBalanceRun));
  const double adds =
      static_cast<double>(std::min(tokens, kBalanceRun)) + stretches + static_cast<double>(experts + sets);
  return gamma(adds + 8.0, unit_roundoff(Float::kF64));
}
/// The same for sums in any order.
inline double balance_loss_in_any_order(std::int64_t tokens, std::int64_t experts, std::int64_t sets) {
  return gamma(static_cast<double>(tokens + experts + sets) + 8.0, unit_roundoff(Float::kF64));
}
/// What underflow adds to either: half a place for the mean and the product of every expert, which count at most E
/// times, and two for the share of a set.
inline double balance_loss_underflow(std::int64_t experts, std::int64_t sets) {
  const double e = static_cast<double>(experts);
  return static_cast<double>(sets) * (e * e + 1.0) * smallest(Float::kF64);
}
/// Relative error of one element of its gradient: weight 4, share 1, product and quotient 2; then one rounding to f.
inline double balance_gradient_relative(Float f) {
  return gamma(7.0, unit_roundoff(Float::kF64)) + gamma(1.0, unit_roundoff(f));
}

/// |log_sum_exp() - exact| for finite logits within `range` of their largest, all float64: the sum has the relative
/// error of an exponential (2 roundings, and that of l - m in the exponent) and of its additions (never more than E,
/// whatever the lanes), which the logarithm turns into an absolute one; the logarithm itself 4 roundings of log(sum) <=
/// log E; the last addition one.
inline double log_sum_exp(std::int64_t experts, double range, double value) {
  const double u = unit_roundoff(Float::kF64);
  return gamma(2.0 + static_cast<double>(experts), u) + 2.0 * range * u +
         4.0 * u * std::log(static_cast<double>(experts) + 1.0) + 2.0 * u * std::fabs(value);
}
/// |z_loss() - exact| from the largest error and magnitude of a token's log-sum-exp: squares, and sums of non-negative
/// terms.
inline double z_loss(std::int64_t tokens, double lse_error, double largest_lse, double value) {
  return 2.0 * largest_lse * lse_error + lse_error * lse_error +
         gamma(static_cast<double>(tokens) + 4.0, unit_roundoff(Float::kF64)) * value;
}

/// |gradient - exact| of z_loss() at a logit, 2 / T lse p: the error of lse, of a softmax, and three roundings (2 / T
/// was one, two products). share = 2 / T; `gradient` its size.
inline double z_loss_gradient(std::int64_t experts, double range, double lse_error, double largest_lse, double share,
                              double gradient) {
  const double p = softmax_relative(experts, 0.0, range, Float::kF64), u = unit_roundoff(Float::kF64);
  return std::fabs(gradient) * std::expm1(std::log1p(p) + gamma(3.0, u)) + share * lse_error * (1.0 + p) +
         share * largest_lse * softmax_underflow(Float::kF64) + smallest(Float::kF64);
}

/// |bias_update() - exact| in float64, counts being integers, whose sum is exact. `size` bounds |bias| + |step|, a
/// proportional step as rate (mean + count). Bias and step, the mean of the steps and that of the biases make 4 times
/// that at most; means of E terms take E additions and a division, a step 3 roundings, the differences 3.
inline double bias_update(std::int64_t experts, double size) {
  return 4.0 * size * gamma(2.0 * static_cast<double>(experts) + 8.0, unit_roundoff(Float::kF64)) +
         4.0 * smallest(Float::kF64);
}

/// |sum of products - exact| in arithmetic f: one rounding a product, which may underflow, and `additions` at most for
/// any of them. absolute = the sum of the magnitudes of the products.
inline double sum_of_products(std::int64_t terms, double additions, double absolute, Float f) {
  return gamma(additions + 1.0, unit_roundoff(f)) * absolute + 0.5 * static_cast<double>(terms) * smallest(f);
}
/// Additions of combine() (k, the first onto 0) and of its gradient to the weights (a lane, then the lanes).
inline double combine_additions(std::int64_t top_k) { return static_cast<double>(top_k - 1); }
inline double lane_additions(std::int64_t count) {
  return std::ceil(static_cast<double>(count) / kLanes) - 1.0 + static_cast<double>(kLanes - 1);
}

/// Additions that a term of grouped_gemm() goes through: in its stretch, of the stretches, and three for alpha, `add`
/// and bias.
inline double grouped_gemm_additions(std::int64_t terms) {
  return static_cast<double>(std::min(terms, kGateRun)) + std::ceil(static_cast<double>(terms) / kGateRun) + 1.0;
}
/// One sum of products on tensor cores, bfloat16 to float32. Products are exact; a step adds 16 of them and what was
/// there before, aligned to the largest and cut off below its last place, 2^-23 of it (Fasi, Higham, Mikaitis, Pranesh,
/// Numerical behavior of NVIDIA tensor cores, 2021: truncation, no fixed order): 17 terms a step, each cut by at most
/// 2^-23 of the largest, which is no more than the sum of the magnitudes; one more rounding where alpha, `add` or a
/// bias follow.
inline double tensor_core_sum(std::int64_t terms, double absolute) {
  return gamma(17.0 * std::ceil(static_cast<double>(terms) / 16.0) + 3.0, 1.0 / 8388608.0) * absolute;
}

/// What activation_curve() is off by. d phi / d z stays within 1.13 (kSilu 1.10, at alpha z = 2.4; kGeluTanh 1.13), its
/// own slope within 1.13 max(1, alpha) (at most alpha / 2 and 0.8); for the two of max(z, 0) see the code. A sigmoid
/// counts 4 roundings, its argument 6, each of which moves it by no more than |argument| of them; the products 3 more.
/// 1 - s is off by one unit of 1, which the bound without the factor 1 - s covers.
struct CurveError {
  double value, slope;
};
inline CurveError activation(const ExpertForm& f, double z, double z_error, Float arithmetic = Float::kF64) {
  const Curve<double> c = activation_curve(f, z);
  const double u = unit_roundoff(arithmetic);
  if (f.activation == Activation::kRelu || f.activation == Activation::kRelu2) {
    const bool kink = std::fabs(z) <= z_error;  // either side
    if (f.activation == Activation::kRelu) return {z_error, kink ? 1.0 : 0.0};
    return {2.0 * (std::fabs(z) + z_error) * z_error + u * c.value, 2.0 * z_error};
  }
  const bool silu = f.activation == Activation::kSilu;
  const double steep = silu ? std::fabs(f.alpha) : 1.6 * (1.0 + 0.14 * z * z);
  const double argument = silu ? std::fabs(f.alpha * z) : 1.6 * (std::fabs(z) + 0.045 * std::fabs(z * z * z));
  const double s = z != 0.0 ? c.value / z : 0.5, n = 10.0 + 7.0 * argument;
  return {1.13 * z_error + gamma(n, u) * std::fabs(c.value),
          1.13 * std::max(1.0, std::fabs(f.alpha)) * z_error + gamma(n + 8.0, u) * s * (1.0 + std::fabs(z) * steep)};
}

/// Relative error of normal_tail_exact_order(), far underflow apart, in half places (1 + e): t = (u - 4) / (u + 4)
/// takes 3 roundings and (u + 4) M(u) changes by at most 1.1 times as much, relatively: 4. Clenshaw's recurrence over
/// coefficients c_k, sum_k (k + 1) (4 |b_(k+1)| + |b_(k+2)| + |b_k|) with |b_k| <= sum_(j >= k) (j - k + 1) |c_j|, is
/// 33 times the unit roundoff, over a value of at least 1. Quotient and u + 4: 2; each exponential 2; the constant, its
/// product, that of the exponentials and the last one: 4. 33 + 4 + 2 + 4 + 4 = 47.
inline double normal_cdf() { return gamma(47.0, unit_roundoff(Float::kF64)); }

/// Additions that one sum over tokens goes through in router_regularisers.h, and in any order.
inline double token_additions(std::int64_t tokens) {
  return static_cast<double>(std::min(tokens, kBalanceRun)) +
         std::ceil(static_cast<double>(tokens) / static_cast<double>(kBalanceRun));
}
inline double token_sum(std::int64_t tokens) {
  return gamma(token_additions(tokens) + 1.0, unit_roundoff(Float::kF64));
}
inline double token_sum_in_any_order(std::int64_t tokens) {
  return gamma(static_cast<double>(tokens) + 1.0, unit_roundoff(Float::kF64));
}

/// First-order errors of cv_squared() of n values, each off by `value_error`; `off` the largest distance from the mean.
struct CvError {
  double value, slope;
};
inline CvError cv_squared(std::int64_t n, double value_error, double mean, double off, double eps, double cv) {
  const double u = unit_roundoff(Float::kF64), count = static_cast<double>(n), by = n > 1 ? count - 1.0 : 1.0;
  const double below = mean * mean + eps;
  const double mean_error = value_error + gamma(count + 1.0, u) * (std::fabs(mean) + off);
  const double off_error = value_error + mean_error + u * off;
  const double below_relative = 2.0 * std::fabs(mean) * mean_error / below + 3.0 * u;
  const double value = count / by * (2.0 * off * off_error + off_error * off_error) / below +
                       cv * (below_relative + gamma(count + 6.0, u));
  const double slope =
      2.0 / (by * below) * (off_error + off * (below_relative + 6.0 * u)) +
      2.0 / (count * below) *
          (std::fabs(mean) * value + cv * mean_error + cv * std::fabs(mean) * (below_relative + 8.0 * u));
  return {value, slope};
}

/// |margin - exact| of load_margin(): `size` the largest |clean| + |noise stddev| of the row, stddev with 8 roundings
/// (a softplus takes 6, its exponential 2 of them, and one sum), the noisy logit 2 more and those of stddev, the
/// difference one, the quotient one.
inline double load_margin(double size, double stddev, double margin) {
  const double u = unit_roundoff(Float::kF64);
  return 13.0 * u * size / stddev + 11.0 * u * std::fabs(margin);
}

/// |entropy - exact| of entropy_token() in nats, logits within `range` of their largest: ln of the sum as in
/// log_sum_exp(); every p (m - l) >= 0 has the relative error of p and 2 roundings, and E additions.
inline double entropy(std::int64_t experts, double range, double value) {
  const double u = unit_roundoff(Float::kF64);
  const double p = softmax_relative(experts, 0.0, range, Float::kF64);
  return gamma(4.0 + static_cast<double>(experts), u) + 2.0 * range * u +
         4.0 * u * std::log(static_cast<double>(experts) + 1.0) +
         value * (p + gamma(static_cast<double>(experts) + 4.0, u));
}

/// |load_statistics() - exact|, relative to 1 + the value: sums of `terms` terms of magnitude at most ln E or 2, a
/// logarithm each. Of probabilities: as many terms as there are.
inline double load_statistics(std::int64_t terms) {
  const double n = static_cast<double>(terms);
  return gamma(2.0 * n + 16.0, unit_roundoff(Float::kF64)) * 4.0 * std::log(n + 2.0);
}

/// |noisy_logits() - exact|: a softplus takes 8 roundings (sqrt_softplus_relative() before the root); eps, product and
/// sum one each. `part` = |noise| deviation.
inline double noisy_logit(double logit, double part) {
  const double u = unit_roundoff(Float::kF64);
  return gamma(8.0 + 3.0, u) * part + u * (std::fabs(logit) + part) + smallest(Float::kF64);
}

}  // namespace moeaudit::kernels::bounds
