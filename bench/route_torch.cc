// The route stage from logits, on one core, against what one writes with LibTorch: softmax (or DeepSeek-V3's sigmoid in
// groups), top-k, renormalisation; and with the balance loss, the z-loss and the tokens per expert. x_torch is the
// ratio of medians of the same run. No BLAS is in any of it.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <time.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/host/balance_loss.h"
#include "kernels/host/expert_load.h"
#include "kernels/host/router.h"
#include "kernels/host/z_loss.h"

namespace {

namespace k = moeaudit::kernels;

/// Processor time of this thread, which is all that either side uses: neighbours on the machine do not show.
template <class F>
double median_seconds(F&& f) {
  const auto now = [] {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  std::vector<double> times;
  f();
  for (int i = 0; i < 7; ++i) {
    const double start = now();
    f();
    times.push_back(now() - start);
  }
  std::nth_element(times.begin(), times.begin() + 3, times.end());
  return times[3];
}

constexpr std::int64_t kTokens = 8192;

struct Setup {
  at::Tensor logits, bias;
  std::int64_t experts, top_k;
  std::vector<std::int32_t> chosen;
  std::vector<float> weights;
  explicit Setup(std::int64_t e, std::int64_t n) : experts(e), top_k(n), chosen(kTokens * n), weights(kTokens * n) {
    at::set_num_threads(1);
    logits = at::randn({kTokens, e});
    bias = at::randn({e}) * 0.05;
  }
  k::RouteArgs<float> args() const {
    k::RouteArgs<float> a;
    a.logits = logits.data_ptr<float>();
    a.tokens = kTokens, a.experts = experts, a.top_k = top_k, a.renormalise = true;
    return a;
  }
  k::RouteResult<float> result() { return {chosen.data(), weights.data(), nullptr, nullptr}; }
};

void report(benchmark::State& state, double ours, double torch) {
  for (auto _ : state) benchmark::DoNotOptimize(ours);
  state.counters["x_torch"] = torch / ours;
  state.counters["tokens_per_us"] = static_cast<double>(kTokens) / ours * 1e-6;
  state.SetLabel(std::string("LibTorch ") + TORCH_VERSION_TEXT + ", one thread; ours " + k::host_backend());
}

void softmax(benchmark::State& state) {
  Setup s(state.range(0), state.range(1));
  const double torch = median_seconds([&] {
    const at::Tensor p = at::softmax(s.logits, -1);
    auto [w, e] = at::topk(p, s.top_k);
    w = w / w.sum(-1, true);
    benchmark::DoNotOptimize(w.data_ptr<float>());
  });
  report(state, median_seconds([&] { k::route(s.args(), s.result()); }), torch);
}

void sigmoid(benchmark::State& state) {
  Setup s(state.range(0), state.range(1));
  const double torch = median_seconds([&] {
    const at::Tensor p = at::sigmoid(s.logits), e = std::get<1>(at::topk(p + s.bias, s.top_k));
    at::Tensor w = p.gather(1, e);
    w = w / (w.sum(-1, true) + 1e-20);
    benchmark::DoNotOptimize(w.data_ptr<float>());
  });
  k::RouteArgs<float> a = s.args();
  a.score = k::Score::kSigmoid, a.correction_bias = s.bias.data_ptr<float>(), a.renormalise_eps = 1e-20f;
  report(state, median_seconds([&] { k::route(a, s.result()); }), torch);
}

void deepseek_v3(benchmark::State& state) {
  Setup s(256, 8);
  const double torch = median_seconds([&] {
    const at::Tensor p = at::sigmoid(s.logits), choice = p + s.bias;
    const at::Tensor group = std::get<0>(at::topk(choice.view({kTokens, 8, 32}), 2)).sum(-1);
    const at::Tensor mask = at::zeros_like(group).scatter_(1, std::get<1>(at::topk(group, 4)), 1);
    const at::Tensor kept = mask.unsqueeze(-1).expand({kTokens, 8, 32}).reshape({kTokens, 256}).to(at::kBool);
    const at::Tensor e =
        std::get<1>(at::topk(choice.masked_fill(kept.logical_not(), -std::numeric_limits<float>::infinity()), s.top_k));
    at::Tensor w = p.gather(1, e);
    w = w / (w.sum(-1, true) + 1e-20) * 2.5;
    benchmark::DoNotOptimize(w.data_ptr<float>());
  });
  k::RouteArgs<float> a = s.args();
  a.score = k::Score::kSigmoid, a.correction_bias = s.bias.data_ptr<float>();
  a.group_score = k::GroupScore::kTop2Sum, a.groups = 8, a.top_groups = 4;
  a.renormalise_eps = 1e-20f, a.scaling = 2.5f;
  report(state, median_seconds([&] { k::route(a, s.result()); }), torch);
}

/// softmax routing, transformers' load_balancing_loss_func, z-loss, tokens per expert.
void stage(benchmark::State& state) {
  Setup s(state.range(0), state.range(1));
  const double torch = median_seconds([&] {
    const at::Tensor p = at::softmax(s.logits, -1);
    auto [w, e] = at::topk(p, s.top_k);
    w = w / w.sum(-1, true);
    const at::Tensor mask = at::one_hot(e, s.experts).to(at::kFloat);
    const at::Tensor aux = (mask.mean(0) * p.mean(0).unsqueeze(0)).sum() * s.experts;
    const at::Tensor z = at::logsumexp(s.logits, -1).square().mean();
    const at::Tensor load = at::bincount(e.flatten(), {}, s.experts);
    benchmark::DoNotOptimize(aux.item<float>() + z.item<float>() + static_cast<float>(load[0].item<std::int64_t>()));
  });
  std::vector<float> probabilities(kTokens * s.experts);
  std::vector<double> f(s.experts), p(s.experts);
  std::vector<std::int64_t> load(s.experts);
  const double ours = median_seconds([&] {
    k::RouteResult<float> r = s.result();
    r.choice = probabilities.data();  // without a bias the choice is the probability
    k::route(s.args(), r);
    double aux = 0, z = 0;
    k::BalanceLossArgs<float> b;
    b.probabilities = probabilities.data(), b.chosen = s.chosen.data(), b.tokens = kTokens, b.experts = s.experts,
    b.top_k = s.top_k;
    k::BalanceLossResult<float> br;
    br.loss = &aux;
    k::balance_loss(b, br);
    k::ZLossArgs<float> za;
    za.logits = s.logits.data_ptr<float>(), za.tokens = kTokens, za.experts = s.experts;
    k::ZLossResult<float> zr;
    zr.loss = &z;
    k::z_loss(za, zr);
    k::CountArgs<std::int32_t> counted;
    counted.chosen = s.chosen.data(), counted.tokens = kTokens, counted.top_k = s.top_k, counted.experts = s.experts;
    std::int64_t outside = 0;
    k::count_choices(counted, load.data(), &outside);
    benchmark::DoNotOptimize(aux + z + static_cast<double>(load[0]));
  });
  report(state, ours, torch);
}

BENCHMARK(softmax)->Args({8, 1})->Args({8, 2})->Args({16, 2})->Args({32, 2})->Args({64, 8})->Args({128, 8})->Args({256,
                                                                                                                   8});
BENCHMARK(sigmoid)->Args({8, 2})->Args({32, 2})->Args({64, 6});
BENCHMARK(deepseek_v3);
BENCHMARK(stage)->Args({8, 2})->Args({64, 8})->Args({128, 8})->Args({256, 8});

}  // namespace

BENCHMARK_MAIN();
