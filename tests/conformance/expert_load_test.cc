// Expert load: kernels/host against reference/; closed forms; the published counts of OLMoE and Mixtral; the sampling
// floor.
#define BOOST_TEST_MODULE expert_load
#include "kernels/host/expert_load.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <bit>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/host/bounds.h"
#include "kernels/host/gaussian.h"
#include "reference/expert_load.h"
#include "reference/router.h"
#include "tests/support/on_every_target.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
using Longs = std::vector<std::int64_t>;

at::Tensor tensor(const Longs& v) {
  return at::from_blob(const_cast<std::int64_t*>(v.data()), {static_cast<std::int64_t>(v.size())}, at::kLong).clone();
}

k::LoadStatistics statistics(const Longs& counts, std::int64_t top_k, std::int64_t tokens) {
  k::LoadStatistics s;
  BOOST_REQUIRE(k::load_statistics(counts.data(), static_cast<std::int64_t>(counts.size()), top_k, tokens, &s) ==
                k::Status::kOk);
  return s;
}

void check(const Longs& counts) {
  const k::LoadStatistics s = statistics(counts, 1, 1000);
  const auto want = ref::load_statistics(tensor(counts));
  const double bound = k::bounds::load_statistics(static_cast<std::int64_t>(counts.size()));
  const auto near = [&](const char* name, double got) {
    BOOST_CHECK_MESSAGE(std::fabs(got - want.at(name)) <= bound * (1 + std::fabs(want.at(name))),
                        name << ": " << got << ", not " << want.at(name));
  };
  near("max_violation", s.max_violation);
  near("min_violation", s.min_violation);
  near("cv_population", s.cv_population);
  near("cv_sample", s.cv_sample);
  near("entropy", s.entropy);
  near("normalised_entropy", s.normalised_entropy);
  near("effective_experts", s.effective_experts);
  near("kl_to_uniform", s.kl_to_uniform);
  near("gini", s.gini);
  near("idle", static_cast<double>(s.idle));
  near("below_tenth", static_cast<double>(s.below_tenth));
  near("below_permille", static_cast<double>(s.below_permille));
  near("below_half_percent", static_cast<double>(s.below_half_percent));
}

std::vector<float> gaussians(std::int64_t n, std::uint64_t stream) {
  std::vector<float> g(static_cast<std::size_t>(n));
  k::unit_gaussians(8, stream, 0, n, g.data());
  return g;
}

BOOST_AUTO_TEST_CASE(statistics_agree_with_the_reference) {
  for (const std::int64_t experts : {2, 8, 60, 144, 384}) {
    Longs counts;
    for (float v : gaussians(experts, static_cast<std::uint64_t>(experts)))
      counts.push_back(static_cast<std::int64_t>(std::exp(5 + 2 * static_cast<double>(v))));
    check(counts);
    counts[0] = 0;
    counts[1] = 1'000'000'000'000;
    check(counts);
  }
}

BOOST_AUTO_TEST_CASE(closed_forms) {
  const k::LoadStatistics even = statistics(Longs(64, 1000), 8, 8000);
  BOOST_CHECK_SMALL(even.max_violation, 1e-15);
  BOOST_CHECK_SMALL(even.gini, 1e-14);
  BOOST_CHECK_CLOSE(even.normalised_entropy, 1.0, 1e-12);
  BOOST_CHECK_CLOSE(even.effective_experts, 64.0, 1e-11);
  Longs one(8);
  one[5] = 800;
  const k::LoadStatistics all = statistics(one, 1, 800);
  BOOST_CHECK_CLOSE(all.max_violation, 7.0, 1e-12);
  BOOST_CHECK_CLOSE(all.min_violation, 1.0, 1e-12);
  BOOST_CHECK_CLOSE(all.gini, 7.0 / 8, 1e-12);
  BOOST_CHECK_CLOSE(all.cv_population, std::sqrt(7.0), 1e-12);
  BOOST_CHECK_CLOSE(all.cv_sample, std::sqrt(8.0), 1e-12);
  BOOST_CHECK_SMALL(all.entropy, 1e-15);
  BOOST_CHECK(all.idle == 7 && all.below_tenth == 7);
  BOOST_CHECK(std::isnan(statistics(Longs(8, 0), 1, 0).max_violation));
  BOOST_CHECK_CLOSE(statistics({5}, 1, 5).normalised_entropy, 1.0, 1e-12);
  BOOST_CHECK(std::isnan(statistics({5}, 1, 5).cv_sample));
  // 68.9 is the share below which an idle expert may still be one with a tenth of it.
  BOOST_CHECK(!statistics(Longs(8, 69), 2, 276).idle_is_dead);
  BOOST_CHECK(statistics(Longs(8, 70), 2, 280).idle_is_dead);
  BOOST_CHECK(!statistics(Longs(8, 99), 2, 396).can_judge && statistics(Longs(8, 100), 2, 400).can_judge);
}

BOOST_AUTO_TEST_CASE(counts_that_no_int64_adds_up) {
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  k::LoadStatistics s;
  k::LoadIntervals intervals;
  const auto status = [&](const Longs& counts) {
    return k::load_statistics(counts.data(), static_cast<std::int64_t>(counts.size()), 1, 10, &s);
  };
  const auto of_blocks = [&](const Longs& counts) { return k::load_intervals(counts.data(), 2, 2, 40, 1, &intervals); };
  BOOST_CHECK(status({most, 1}) == k::Status::kBadShape);
  BOOST_CHECK(status({most, most, most, 3}) == k::Status::kBadShape);  // wraps round to a number above 0
  BOOST_CHECK(status({most / 2, most / 2, 1}) == k::Status::kOk && s.choices == most);
  BOOST_CHECK_CLOSE(s.max_violation, 0.5, 1e-9);
  BOOST_CHECK(status({4, -1}) == k::Status::kBadShape);
  // A block may be drawn as often as there are blocks.
  BOOST_CHECK(of_blocks({most / 4, most / 4, 0, 1}) == k::Status::kOk);
  BOOST_CHECK(of_blocks({0, 1, most / 2, 1}) == k::Status::kBadShape);
  BOOST_CHECK(of_blocks({0, 1, most, most}) == k::Status::kBadShape);
  BOOST_CHECK(of_blocks({9, 9, 9, -1}) == k::Status::kBadShape);
  // Whatever is drawn: 50 blocks, of which one is too large to be drawn 50 times, or has a count below 0 that the
  // others would hide.
  Longs many(100, 9);
  many[0] = most / 10;
  BOOST_CHECK(k::load_intervals(many.data(), 50, 2, 40, 1, &intervals) == k::Status::kBadShape);
  many[0] = -1;
  BOOST_CHECK(k::load_intervals(many.data(), 50, 2, 40, 1, &intervals) == k::Status::kBadShape);
  many[0] = 0;
  BOOST_CHECK(k::load_intervals(many.data(), 50, 2, 40, 1, &intervals) == k::Status::kOk);
}

BOOST_AUTO_TEST_CASE(published_counts) {
  // Values of these pickles, computed apart with numpy to three digits.
  struct Cell {
    const char *file, *layer;
    double max_violation, cv, entropy, gini, least;
    std::int64_t below_tenth = 0, below_permille = 0;
  };
  for (const Cell& c : {Cell{"olmoe-1b-7b_c4", "0", 2.02, .32, .990, .14, .30},
                        {"olmoe-1b-7b_c4", "7", 1.66, .40, .982, .21, .20},
                        {"olmoe-1b-7b_c4", "15", 1.50, .51, .968, .29, .19},
                        {"olmoe-1b-7b_github", "0", 4.01, .66, .961, .29, .17},
                        {"olmoe-1b-7b_github", "7", 5.16, 1.35, .851, .58, .013, 5, 3},
                        {"olmoe-1b-7b_github", "15", 3.51, 1.19, .853, .59, .007, 12, 7},
                        {"olmoe-1b-7b_arxiv", "0", 6.81, .95, .943, .32, .21},
                        {"olmoe-1b-7b_arxiv", "7", 5.28, 1.28, .866, .55, .05, 6, 4},
                        {"olmoe-1b-7b_arxiv", "15", 6.50, 1.25, .864, .56, .001, 9, 8},
                        {"olmoe-1b-7b_wikipedia", "15", 3.65, 1.30, .829, .63, .04, 10, 3},
                        {"olmoe-1b-7b_book", "0", 2.63, .56, .966, .27, .05, 2, 1},
                        {"olmoe-1b-7b_book", "15", 1.93, .78, .926, .43, .03, 5, 2},
                        {"olmoe-1b-7b_tulu", "0", 2.23, .46, .980, .21, .33},
                        {"olmoe-1b-7b_tulu", "7", 3.45, .76, .944, .37, .14},
                        {"olmoe-1b-7b_tulu", "15", 3.14, .83, .938, .38, .23}}) {
    const auto json = nlohmann::json::parse(
        std::ifstream(std::string(MOE_AUDIT_SOURCE_DIR "/fixtures/expert_counts/") + c.file + ".json"));
    const k::LoadStatistics s = statistics(json["layers"][c.layer].get<Longs>(), json["top_k"], 200'000);
    BOOST_CHECK_SMALL(s.max_violation - c.max_violation, 0.0051);
    BOOST_CHECK_SMALL(s.cv_population - c.cv, 0.0051);
    BOOST_CHECK_SMALL(s.normalised_entropy - c.entropy, 0.00051);
    BOOST_CHECK_SMALL(s.gini - c.gini, 0.0051);
    BOOST_CHECK_SMALL(1 - s.min_violation - c.least, 0.0051);
    BOOST_CHECK(s.idle == 0 && s.below_tenth == c.below_tenth && s.below_permille == c.below_permille && s.can_judge);
  }
}

/// MaxVio and CV of an even router, simulated apart with two digits: the first formula lies above, by less than a
/// third.
BOOST_AUTO_TEST_CASE(floors) {
  struct Row {
    std::int64_t experts, top_k;
    double max_violation[4], cv[4];
  };
  for (const Row& r : {Row{8, 2, {.17, .09, .05, .02}, {.10, .06, .03, .01}},
                       {64, 8, {.41, .19, .10, .05}, {.17, .08, .04, .02}},
                       {128, 8, {.62, .33, .16, .08}, {.24, .12, .06, .03}},
                       {256, 8, {1.10, .51, .26, .12}, {.35, .17, .09, .04}}}) {
    for (int i = 0; i < 4; ++i) {
      const std::int64_t tokens = std::int64_t{256} << 2 * i;
      const k::LoadStatistics s = statistics(Longs(static_cast<std::size_t>(r.experts), 1), r.top_k, tokens);
      const double cv =
          std::sqrt((static_cast<double>(r.experts) / static_cast<double>(r.top_k) - 1) / static_cast<double>(tokens));
      BOOST_CHECK_CLOSE(s.cv_floor, cv, 1e-12);
      BOOST_CHECK_CLOSE(s.max_violation_floor, cv * std::sqrt(2 * std::log(static_cast<double>(r.experts))), 1e-12);
      BOOST_CHECK_SMALL(s.cv_floor - r.cv[i], 0.0101);
      BOOST_CHECK(s.max_violation_floor > r.max_violation[i] - 0.005 &&
                  s.max_violation_floor < 1.3 * (r.max_violation[i] + 0.005));
    }
  }
}

BOOST_AUTO_TEST_CASE(sampling_floor) {
  // Independent tokens of an even router: the CV seen is the floor to a few per cent, MaxVio below its approximation.
  const std::int64_t experts = 64, top_k = 8, tokens = 4096;
  double cv = 0, violation = 0, floor_cv = 0, floor_violation = 0;
  const int windows = 8;
  for (std::uint64_t w = 0; w < windows; ++w) {
    std::vector<double> z;
    for (float v : gaussians(tokens * experts, 100 + w)) z.push_back(static_cast<double>(v));
    ref::RouteOptions o;
    o.top_k = top_k;
    const at::Tensor chosen = ref::route(at::from_blob(z.data(), {tokens, experts}, at::kDouble), o).chosen;
    const at::Tensor counts = ref::count_choices(chosen, experts);
    const k::LoadStatistics s =
        statistics(Longs(counts.data_ptr<std::int64_t>(), counts.data_ptr<std::int64_t>() + experts), top_k, tokens);
    cv += s.cv_population / windows;
    violation += s.max_violation / windows;
    floor_cv = s.cv_floor;
    floor_violation = s.max_violation_floor;
  }
  BOOST_CHECK_CLOSE(cv, floor_cv, 10);  // 64 experts in 8 windows: its deviation is 1 / sqrt(2 * 512) = 3 %
  BOOST_CHECK(violation < 1.1 * floor_violation && violation > 0.6 * floor_violation);
}

BOOST_AUTO_TEST_CASE(intervals_agree_with_the_reference) {
  for (const std::int64_t experts : {2, 60, 160}) {
    const std::int64_t blocks = 7, draws = 90;
    Longs counts, drawn;
    for (float v : gaussians(blocks * experts, 40))
      counts.push_back(static_cast<std::int64_t>(std::exp(4 + static_cast<double>(v))));
    for (std::int64_t i = 0; i < draws * blocks; ++i) {
      drawn.push_back(k::drawn_block(5, i, blocks));
      BOOST_REQUIRE(drawn.back() >= 0 && drawn.back() < blocks);
    }
    k::LoadIntervals got;
    BOOST_REQUIRE(k::load_intervals(counts.data(), blocks, experts, draws, 5, &got) == k::Status::kOk);
    const auto want =
        ref::load_intervals(tensor(counts).reshape({blocks, experts}), tensor(drawn).reshape({draws, blocks}));
    const double bound = k::bounds::load_statistics(experts);
    for (const auto& [name, i] : {std::pair<const char*, k::Interval>{"max_violation", got.max_violation},
                                  {"min_violation", got.min_violation},
                                  {"cv_population", got.cv_population},
                                  {"normalised_entropy", got.normalised_entropy},
                                  {"gini", got.gini}}) {
      BOOST_CHECK_SMALL(i.low - want.at(name).first, bound * (1 + want.at(name).first));
      BOOST_CHECK_SMALL(i.high - want.at(name).second, bound * (1 + want.at(name).second));
    }
  }
  // Every block as often as another: 7000 draws of 1000 each, five deviations of 29.
  Longs seen(7);
  for (std::int64_t i = 0; i < 7000; ++i) ++seen[static_cast<std::size_t>(k::drawn_block(9, i, 7))];
  for (const std::int64_t n : seen) BOOST_CHECK(std::abs(n - 1000) < 150);
}

BOOST_AUTO_TEST_CASE(intervals) {
  // Blocks that are alike leave nothing to be uncertain of; blocks that are not do.
  Longs alike, apart;
  for (int b = 0; b < 20; ++b) {
    for (int e = 0; e < 4; ++e) {
      alike.push_back(e == 0 ? 40 : 20);
      apart.push_back(b % 4 == e ? 80 : 10);
    }
  }
  k::LoadIntervals of_alike, of_apart, again;
  BOOST_REQUIRE(k::load_intervals(alike.data(), 20, 4, 200, 1, &of_alike) == k::Status::kOk);
  k::LoadStatistics pooled;
  const Longs sum = {800, 400, 400, 400};
  BOOST_REQUIRE(k::load_statistics(sum.data(), 4, 1, 2000, &pooled) == k::Status::kOk);
  BOOST_CHECK_CLOSE(of_alike.max_violation.low, 0.6, 1e-9);
  for (const auto& [interval, value] : {std::pair{of_alike.max_violation, pooled.max_violation},
                                        {of_alike.min_violation, pooled.min_violation},
                                        {of_alike.cv_population, pooled.cv_population},
                                        {of_alike.normalised_entropy, pooled.normalised_entropy},
                                        {of_alike.gini, pooled.gini}}) {
    BOOST_CHECK_CLOSE(interval.low, value, 1e-9);
    BOOST_CHECK_CLOSE(interval.high, value, 1e-9);
  }
  BOOST_REQUIRE(k::load_intervals(apart.data(), 20, 4, 200, 1, &of_apart) == k::Status::kOk);
  for (const k::Interval& i : {of_apart.max_violation, of_apart.cv_population, of_apart.gini})
    BOOST_CHECK(i.low < i.high && i.low >= 0);
  BOOST_CHECK(of_apart.normalised_entropy.low < of_apart.normalised_entropy.high &&
              of_apart.normalised_entropy.high <= 1 + 1e-12);
  BOOST_REQUIRE(k::load_intervals(apart.data(), 20, 4, 200, 1, &again) == k::Status::kOk);
  BOOST_CHECK(again.max_violation.low == of_apart.max_violation.low &&
              again.max_violation.high == of_apart.max_violation.high);
  BOOST_CHECK(k::load_intervals(apart.data(), 1, 4, 200, 1, &again) == k::Status::kBadShape);
  const Longs nothing(8);
  BOOST_REQUIRE(k::load_intervals(nothing.data(), 2, 4, 40, 1, &again) == k::Status::kOk);
  BOOST_CHECK(std::isnan(again.max_violation.low) && std::isnan(again.gini.high));
}

template <class Id>
void check_counts(std::int64_t tokens, std::int64_t top_k, std::int64_t experts, bool masked) {
  std::vector<Id> chosen;
  std::vector<std::uint8_t> valid;
  Longs inside;
  std::int64_t want_outside = 0;
  for (std::int64_t t = 0; t < tokens; ++t) {
    valid.push_back(t % 7 != 3);
    for (std::int64_t j = 0; j < top_k; ++j) {
      const std::int64_t id = (t * t * 31 + j * 17) % (experts + 2) - 1;  // -1 and E are no experts
      chosen.push_back(static_cast<Id>(id));
      if (masked && valid.back() == 0) continue;
      inside.push_back(id);
      want_outside += id < 0 || id >= experts;
    }
  }
  Longs counts(static_cast<std::size_t>(experts), -1);
  std::int64_t outside = -1;
  const k::CountArgs<Id> a{chosen.data(), masked ? valid.data() : nullptr, tokens, top_k, experts};
  BOOST_REQUIRE(k::count_choices(a, counts.data(), &outside) == k::Status::kOk);
  BOOST_CHECK(at::equal(tensor(counts), ref::count_choices(tensor(inside), experts)));
  BOOST_CHECK(outside == want_outside);
}

BOOST_AUTO_TEST_CASE(counts_agree_with_the_reference) {
  for (const bool masked : {false, true}) {
    check_counts<std::int16_t>(1, 1, 1, masked);
    check_counts<std::int16_t>(1001, 8, 128, masked);
    check_counts<std::int32_t>(999, 3, 384, masked);
    check_counts<std::int32_t>(40, 32, 144, masked);
    check_counts<std::int16_t>(25, 6, 160, masked);
  }
  std::int64_t outside = 0, count = 5;
  BOOST_CHECK(
      (k::count_choices(k::CountArgs<std::int16_t>{nullptr, nullptr, 0, 2, 1}, &count, &outside) == k::Status::kOk &&
       count == 0));
  BOOST_CHECK((k::count_choices(k::CountArgs<std::int16_t>{nullptr, nullptr, 3, 2, 1}, &count, &outside) ==
               k::Status::kNullPointer));
}

template <class T>
void check_probabilities(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, bool masked) {
  std::vector<double> z;
  for (float v : gaussians(tokens * experts, 9)) z.push_back(2 * static_cast<double>(v));
  const at::Tensor logits = at::from_blob(z.data(), {tokens, experts}, at::kDouble);
  const at::Tensor wide = ref::scores(logits, ref::Score::kSoftmax).contiguous();
  ref::RouteOptions o;
  o.top_k = top_k;
  const at::Tensor chosen = ref::route(logits, o).chosen.contiguous();
  const std::vector<T> p(wide.data_ptr<double>(), wide.data_ptr<double>() + wide.numel());
  std::vector<std::int32_t> ids(chosen.data_ptr<std::int64_t>(), chosen.data_ptr<std::int64_t>() + chosen.numel());
  std::vector<std::uint8_t> valid;
  Longs kept;
  for (std::int64_t t = 0; t < tokens; ++t) {
    valid.push_back(!masked || t % 5 != 3);
    if (valid.back() != 0) kept.push_back(t);
    if (valid.back() == 0) ids[static_cast<std::size_t>(t * top_k)] = -1;  // of padding nobody asks
  }
  k::RoutingStatistics s;
  BOOST_REQUIRE(k::routing_statistics(k::RoutingStatisticsArgs<T>{p.data(), ids.data(), masked ? valid.data() : nullptr,
                                                                  tokens, experts, top_k},
                                      &s) == k::Status::kOk);
  const at::Tensor of_valid =
      at::from_blob(const_cast<T*>(p.data()), {tokens, experts}, sizeof(T) == 4 ? at::kFloat : at::kDouble)
          .index_select(0, tensor(kept));
  const auto want = ref::routing_statistics(of_valid, chosen.index_select(0, tensor(kept)));
  const double bound = k::bounds::load_statistics(tokens * experts);
  if (experts > 1) {
    BOOST_CHECK_SMALL(s.token_entropy - want.at("token_entropy"), bound);
    BOOST_CHECK_SMALL(s.mean_entropy - want.at("mean_entropy"), bound);
  }
  BOOST_CHECK_SMALL(s.mutual_information - want.at("mutual_information"), bound);
  BOOST_CHECK_SMALL(s.confidence - want.at("confidence"), bound);
}

BOOST_AUTO_TEST_CASE(statistics_of_probabilities) {
  for (const bool masked : {false, true}) {
    check_probabilities<double>(300, 60, 4, masked);
    check_probabilities<float>(300, 60, 4, masked);
    check_probabilities<double>(1, 1, 1, false);
    check_probabilities<float>(1, 8, 8, false);
    check_probabilities<double>(33, 144, 6, masked);
    check_probabilities<float>(20, 384, 32, masked);
  }
  k::RoutingStatistics s;
  // Every token sure of an expert of its own: no entropy a token, all of it in the mean.
  std::vector<double> sure(64);
  std::vector<std::int32_t> own;
  for (std::int32_t t = 0; t < 8; ++t) sure[static_cast<std::size_t>(9 * t)] = 1, own.push_back(t);
  BOOST_REQUIRE(k::routing_statistics(k::RoutingStatisticsArgs<double>{sure.data(), own.data(), nullptr, 8, 8, 1},
                                      &s) == k::Status::kOk);
  BOOST_CHECK_CLOSE(s.mutual_information, std::log(8.0), 1e-12);
  BOOST_CHECK(s.token_entropy == 0.0 && s.confidence == 1.0);
}

/// Probabilities with what a broken router gives, or a narrow softmax: `what` in expert 1 of token 2.
template <class T>
std::vector<T> probabilities_with(T what, std::int64_t tokens, std::int64_t experts) {
  std::vector<double> z;
  for (float v : gaussians(tokens * experts, 21)) z.push_back(2 * static_cast<double>(v));
  const at::Tensor p =
      ref::scores(at::from_blob(z.data(), {tokens, experts}, at::kDouble), ref::Score::kSoftmax).contiguous();
  std::vector<T> out(p.data_ptr<double>(), p.data_ptr<double>() + p.numel());
  out[static_cast<std::size_t>((tokens > 2 ? 2 : 0) * experts + (experts > 1 ? 1 : 0))] = what;
  return out;
}

template <class T>
std::vector<T> oddities() {
  using L = std::numeric_limits<T>;
  return {L::quiet_NaN(), L::infinity(), -L::infinity(), L::denorm_min(), L::min() / 2,
          L::min(),       T(0),          T(-0.0),        T(-0.25),        L::max()};
}

bool same(double a, double b, double relative) {
  return std::isnan(a) || std::isnan(b)   ? std::isnan(a) && std::isnan(b)
         : std::isinf(a) || std::isinf(b) ? a == b
                                          : std::fabs(a - b) <= relative * std::max(1.0, std::fabs(b));
}

template <class T>
void check_oddities() {
  constexpr std::int64_t kTokens = 7, kExperts = 19, kTopK = 2;
  for (const T what : oddities<T>()) {
    const std::vector<T> p = probabilities_with(what, kTokens, kExperts);
    std::vector<std::int32_t> ids;
    Longs chosen;
    for (std::int64_t i = 0; i < kTokens * kTopK; ++i)
      ids.push_back(static_cast<std::int32_t>(i % 3)), chosen.push_back(i % 3);
    std::vector<std::uint8_t> valid(kTokens, 1);
    const at::Tensor all = at::from_blob(const_cast<T*>(p.data()), {kTokens, kExperts},
                                         sizeof(T) == 4 ? at::kFloat : at::kDouble),
                     of_all = tensor(chosen).reshape({kTokens, kTopK});
    for (const bool masked : {false, true}) {  // the token that has it
      valid[2] = !masked;
      k::RoutingStatistics s;
      BOOST_REQUIRE(k::routing_statistics(
                        k::RoutingStatisticsArgs<T>{p.data(), ids.data(), valid.data(), kTokens, kExperts, kTopK},
                        &s) == k::Status::kOk);
      const at::Tensor rows = tensor(masked ? Longs{0, 1, 3, 4, 5, 6} : Longs{0, 1, 2, 3, 4, 5, 6});
      const auto want = ref::routing_statistics(all.index_select(0, rows), of_all.index_select(0, rows));
      const double bound = k::bounds::load_statistics(kTokens * kExperts);
      for (const auto& [name, got] : {std::pair<const char*, double>{"token_entropy", s.token_entropy},
                                      {"mean_entropy", s.mean_entropy},
                                      {"mutual_information", s.mutual_information},
                                      {"confidence", s.confidence}}) {
        BOOST_CHECK_MESSAGE(same(got, want.at(name), bound),
                            name << " with " << what << ": " << got << ", not " << want.at(name));
        BOOST_CHECK(!masked || std::isfinite(got));
      }
      if (masked) continue;
      const bool wrong = std::isnan(what) || what < 0;
      BOOST_CHECK(std::isnan(s.token_entropy) == wrong);
      BOOST_CHECK(what != std::numeric_limits<T>::infinity() ||
                  s.token_entropy == -std::numeric_limits<double>::infinity());
    }
  }
}
BOOST_AUTO_TEST_CASE(what_is_no_probability) {
  check_oddities<float>();
  check_oddities<double>();
}

/// The bits of the terms do not depend on how many of them a register holds.
template <class T>
void same_on_every_target(std::int64_t tokens, std::int64_t experts, T what) {
  const std::vector<T> p = probabilities_with(what, tokens, experts);
  const std::vector<std::int32_t> chosen(static_cast<std::size_t>(tokens), static_cast<std::int32_t>(experts - 1));
  const auto bits = [](double v) { return std::isnan(v) ? ~std::uint64_t{0} : std::bit_cast<std::uint64_t>(v); };
  std::vector<std::uint64_t> first;
  const int targets = moeaudit::test::on_every_target([&] {
    k::RoutingStatistics s;
    BOOST_REQUIRE(
        k::routing_statistics(k::RoutingStatisticsArgs<T>{p.data(), chosen.data(), nullptr, tokens, experts, 1}, &s) ==
        k::Status::kOk);
    const std::vector<std::uint64_t> all = {bits(s.token_entropy), bits(s.mean_entropy), bits(s.mutual_information),
                                            bits(s.confidence)};
    if (first.empty()) first = all;
    BOOST_CHECK_MESSAGE(all == first, tokens << "x" << experts << " with " << what);
  });
  BOOST_CHECK(targets >= 2);
}
BOOST_AUTO_TEST_CASE(every_vector_width_has_the_same_bits) {
  for (const std::int64_t experts : {1, 2, 3, 5, 8, 17, 60, 144, 384}) {
    for (const std::int64_t tokens : {1, 4, 300}) {
      same_on_every_target<float>(tokens, experts, 0.25F);
      same_on_every_target<double>(tokens, experts, 0.25);
    }
    for (const float what : oddities<float>()) same_on_every_target(4, experts, what);
    for (const double what : oddities<double>()) same_on_every_target(4, experts, what);
  }
}

BOOST_AUTO_TEST_CASE(co_activation_agrees_with_the_reference) {
  for (const bool masked : {false, true}) {
    for (const auto& [tokens, experts, top_k] :
         {std::array<std::int64_t, 3>{1, 1, 1}, {1, 8, 8}, {90, 60, 4}, {40, 144, 6}, {30, 384, 32}}) {
      std::vector<std::int32_t> chosen;
      std::vector<std::uint8_t> valid;
      Longs inside;
      for (std::int64_t t = 0; t < tokens; ++t) {
        valid.push_back(t % 7 != 3);
        for (std::int64_t j = 0; j < top_k; ++j) {
          const std::int64_t id = (t * j) % 11 == 5 ? -1 : (t * t + j) % experts;
          chosen.push_back(static_cast<std::int32_t>(id));
          inside.push_back(masked && valid.back() == 0 ? -1 : id);
        }
      }
      Longs together(static_cast<std::size_t>(experts * experts), -1);
      const k::CountArgs<std::int32_t> a{chosen.data(), masked ? valid.data() : nullptr, tokens, top_k, experts};
      BOOST_REQUIRE(k::co_activation(a, together.data()) == k::Status::kOk);
      BOOST_CHECK(at::equal(tensor(together).reshape({experts, experts}),
                            ref::co_activation(tensor(inside).reshape({tokens, top_k}), experts)));
    }
  }
}

BOOST_AUTO_TEST_CASE(co_activation_counts_all_pairs) {
  const std::vector<std::int32_t> chosen = {0, 1, 2, 2, 1, 3, 0, 1, -1};  // the last token lost a choice
  Longs together(16, -1);
  BOOST_REQUIRE(k::co_activation(k::CountArgs<std::int32_t>{chosen.data(), nullptr, 3, 3, 4}, together.data()) ==
                k::Status::kOk);
  BOOST_TEST(together == (Longs{2, 2, 1, 0, 2, 3, 2, 1, 1, 2, 2, 1, 0, 1, 1, 1}), boost::test_tools::per_element());
}

}  // namespace
