#include "reference/executable/vectors.h"

#include <ATen/ATen.h>

#include <cmath>

#include "reference/router.h"

namespace moeaudit::reference {
namespace {

constexpr std::int64_t kE = 8, kT = 16, kK = 2;

/// Vectors under way. A tensor is stored once, whoever reads it.
class Builder {
 public:
  Json file = {{"tensors", Json::object()}, {"vectors", Json::array()}};

  void tensor(const std::string& name, const at::Tensor& t) { file["tensors"][name] = json_of(t); }
  /// `inputs`: role -> name of a tensor.
  Json& vector(const std::string& stem, const std::string& id, const std::string& operation, const std::string& source,
               Json options, Json inputs) {
    Json v = {{"id", stem + "/" + id}, {"stem", stem}, {"operation", operation}, {"source", source}};
    v["options"] = options.is_null() ? Json::object() : std::move(options);
    v["inputs"] = std::move(inputs);
    file["vectors"].push_back(std::move(v));
    return file["vectors"].back();
  }
  /// One row of the catalogue of wrong formulas. `published`: its digits, computed apart; empty: none are published.
  void row(const std::string& stem, const std::string& id, const std::string& operation, const std::string& formula,
           const std::string& seen_in, const std::vector<std::string>& published, Json options, Json inputs,
           const std::string& output = "loss", std::int64_t first = 0, std::int64_t count = 1) {
    Json& v = vector(stem, id, operation, seen_in, std::move(options), std::move(inputs));
    v["row"] = {{"id", id}, {"formula", formula}, {"output", output}, {"first", first}, {"count", count}};
    if (!published.empty()) v["row"]["published"] = published;
  }
};

// ---- the closed-form test vector: z = 2 sin(0.7 (t + 1)(e + 1) + 1.3 l) + 0.5 cos(0.37 (t + 1) + (e + 1)) + (0.8 if
// e = 0), E = 8, k = 2, T = 16, two layers; sequences are halves. Its values were computed apart, in Python, with every
// formula written out.

at::Tensor vector_logits(int layer) {
  const at::Tensor z = at::empty({kT, kE}, at::kDouble);
  double* to = z.data_ptr<double>();
  for (int t = 1; t <= kT; ++t) {
    for (int e = 1; e <= kE; ++e)
      *to++ = 2 * std::sin(0.7 * t * e + 1.3 * layer) + 0.5 * std::cos(0.37 * t + e) + (e == 1 ? 0.8 : 0.0);
  }
  return z;
}
at::Tensor ints(const std::vector<std::int64_t>& v) { return at::tensor(v, at::kLong); }
at::Tensor doubles(const std::vector<double>& v) { return at::tensor(v, at::kDouble); }
at::Tensor best2(const at::Tensor& choice) {
  return std::get<1>(at::sort(choice, /*stable=*/true, -1, /*descending=*/true)).narrow(-1, 0, kK).contiguous();
}
/// Values without a pattern in -1..1, multiples of 2^-10: float32 and their products in float64 are exact.
at::Tensor spread(std::vector<std::int64_t> shape, double seed) {
  const at::Tensor v = at::empty(shape, at::kDouble);
  double* to = v.data_ptr<double>();
  for (std::int64_t i = 0; i < v.numel(); ++i) to[i] = std::round(1024 * std::sin(seed + 1.7 * static_cast<double>(i * i % 997) + 0.31 * static_cast<double>(i))) / 1024;
  return v;
}

void tensors_of_the_test_vector(Builder& b) {
  const at::Tensor z0 = vector_logits(0), z1 = vector_logits(1);
  const at::Tensor bias = (at::arange(kE, at::kDouble) - 3.5) * 0.05;
  b.tensor("logits", z0);
  b.tensor("logits of layer 1", z1);
  b.tensor("bias", bias);
  b.tensor("logits with bias", z0 + bias);
  const at::Tensor p0 = scores(z0, Score::kSoftmax), p1 = scores(z1, Score::kSoftmax), s0 = scores(z0, Score::kSigmoid);
  b.tensor("softmax", p0);
  b.tensor("softmax of layer 1", p1);
  b.tensor("softmax of both", at::cat({p0, p1}));
  b.tensor("softmax of softmax", scores(p0, Score::kSoftmax));
  b.tensor("sigmoid", s0);
  b.tensor("sigmoid over its sum", s0 / s0.sum(-1, true));
  b.tensor("first half", p0.narrow(0, 0, 8).contiguous());
  b.tensor("second half", p0.narrow(0, 8, 8).contiguous());
  const at::Tensor c0 = best2(z0), c1 = best2(z1);
  b.tensor("chosen", c0);
  b.tensor("chosen of layer 1", c1);
  b.tensor("chosen of both", at::cat({c0, c1}));
  b.tensor("chosen with bias", best2(s0 + bias));
  b.tensor("chosen of first half", c0.narrow(0, 0, 8).contiguous());
  b.tensor("chosen of second half", c0.narrow(0, 8, 8).contiguous());
  const at::Tensor picked = p0.gather(-1, c0);
  b.tensor("renormalised weights", at::zeros_like(p0).scatter(-1, c0, picked / picked.sum(-1, true)));
  b.tensor("logits of the chosen", z0.gather(-1, c0));
  // Capacity 4, in the order of the tokens; first choices before second ones gives the same counts.
  at::Tensor kept = c0.clone();
  std::vector<std::int64_t> taken(kE);
  for (std::int64_t i = 0; i < kept.numel(); ++i) {
    std::int64_t& e = kept.data_ptr<std::int64_t>()[i];
    if (++taken[static_cast<std::size_t>(e)] > 4) e = -1;
  }
  b.tensor("chosen within capacity", kept);
  at::Tensor padded = z0.clone(), valid = at::ones({kT}, at::kLong);
  padded.narrow(0, 12, 4).copy_(z0.narrow(0, 15, 1).expand({4, kE}));
  valid.narrow(0, 12, 4).zero_();
  b.tensor("padded logits", padded);
  b.tensor("padded softmax", scores(padded, Score::kSoftmax));
  b.tensor("padded chosen", best2(padded));
  b.tensor("valid", valid);
  b.tensor("halves", ints({0, 8, 16}));
  b.tensor("layers", ints({0, 16, 32}));
  b.tensor("running counts", at::stack({at::bincount(c0.narrow(0, 0, 8).reshape({-1}), {}, kE), at::bincount(c0.reshape({-1}), {}, kE)}).to(at::kLong));
  b.tensor("running tokens", ints({8, 16}));
  b.tensor("full counts", at::full({1, kE}, 4, at::kLong));
  b.tensor("all tokens", ints({kT}));
}

void balance_rows(Builder& b) {
  const Json one = {{"probabilities", "softmax"}, {"chosen", "chosen"}};
  const Json both = {{"probabilities", "softmax of both"}, {"chosen", "chosen of both"}};
  const Json layers = {{"probabilities", "softmax of both"}, {"chosen", "chosen of both"}, {"sets", "layers"}};
  const Json halves = {{"probabilities", "softmax"}, {"chosen", "chosen"}, {"sets", "halves"}};
  const Json padded = {{"probabilities", "padded softmax"}, {"chosen", "padded chosen"}};
  Json masked = padded;
  masked["valid"] = "valid";
  const auto p = [&](const char* probabilities, const char* chosen = "chosen") { return Json{{"probabilities", probabilities}, {"chosen", chosen}}; };
  const auto row = [&](const char* id, const char* formula, const char* seen, const char* digits, const Json& inputs, const Json& options = {}) {
    b.row("balance_loss", id, "balance_loss", formula, seen, *digits ? std::vector<std::string>{digits} : std::vector<std::string>{}, options, inputs);
  };
  const char* switch_paper = "Switch Transformers, arXiv 2101.03961 equations 4 to 6, over k";
  row("right", "E sum_e f_e P_e of layer 0", switch_paper, "1.086730629", one, {{"gradient", true}});
  row("right-layer-1", "the same of layer 1", switch_paper, "1.050889132", p("softmax of layer 1", "chosen of layer 1"));
  row("right-layers", "mean of both layers", switch_paper, "1.068809881", layers);
  row("right-sequences", "mean of both sequences", "DeepSeek-V3, arXiv 2412.19437 equations 17 to 20; Megatron-LM seq_aux_loss", "1.153945171", halves, {{"gradient", true}});
  row("right-sigmoid", "P from sigmoid scores over their sum", "DeepSeek-V3, arXiv 2412.19437 equation 19", "1.031707853", p("sigmoid over its sum"));
  row("right-masked", "padding left out of sums and T", switch_paper, "1.180170249", masked, {{"gradient", true}});
  row("A1", "sum over layers instead of their mean", "Megatron-DeepSpeed (by design), user code", "2.137619761", layers, {{"sum", true}});
  row("A2", "layers concatenated before f and P", "transformers #31464, #28255", "1.064989317", both);
  row("A3", "A2 without / k", "transformers load_balancing_loss_func", "2.129978635", both, {{"over_k", false}});
  row("A4", "/ k missing", "Megatron-LM before core 0.5, MaxText", "2.173461259", one, {{"over_k", false}});
  row("A5", "/ k twice", "Megatron-LM main, June 2024", "0.5433653147", one, {{"factor", 0.5}});
  row("A6", "E missing", "GShard as printed, user code", "0.1358413287", one, {{"factor", 0.125}});
  row("A6'", "local E^2 with a global mean, 2 ranks", "FastMoE", "", one, {{"factor", 0.25}});
  row("A7", "f from the first choice alone", "DeepSpeed top-2, Tutel", "1.241710524", one, {{"first_choice", true}});
  row("A8", "P from softmax of the softmax", "transformers #45120 (5.0 to 5.5)", "1.012495077", p("softmax of softmax"));
  row("A9", "P from renormalised weights of the chosen", "MaxText #1432, transformers #28093", "1.166564029", p("renormalised weights"));
  row("A10", "raw logits as P", "NeMo Automodel #1559", "", p("logits"));
  row("A11", "sigmoid without its sum", "NeMo Automodel without norm, TransformerEngine k = 1 before 2.14", "4.259023519", p("sigmoid"));
  row("A12", "softmax P for a sigmoid router", "Megatron-LM #1438", "1.086730629", one);
  row("A13", "batch level where sequence level is meant", "packed batches, transformers #5696", "1.086730629", one);
  row("A14", "sum over sequences, no / batch size", "user code", "2.307890342", halves, {{"sum", true}});
  row("A16", "padding counted", "Megatron-LM #1984, transformers #28505", "1.11109582", padded);
  row("A17", "padding out of the sums, T unmasked", "partial masks", "0.663845765", masked, {{"all_tokens", true}});
  row("A18", "f from the biased selection", "Megatron-LM up to core 0.12", "0.964183591", p("sigmoid over its sum", "chosen with bias"));
  row("A19", "f after dropping at capacity 4", "Megatron-LM #1513", "0.8589304497", p("softmax", "chosen within capacity"));
  row("A20", "f from the map padded to capacity", "Megatron-LM #1617", "1.000000000", {{"probabilities", "softmax"}, {"counts", "full counts"}, {"counted", "all tokens"}});
  row("A22", "sum over 2 micro-batches, no / M", "NeMo Automodel #3359, ms-swift #5627", "2.307890342", halves, {{"sum", true}});
  row("A23", "micro-batch level where global is meant", "most frameworks' default", "1.153945171", halves);
  row("A24", "running mean of counts over micro-batches", "Megatron-LM global_aux_loss (documented approximation)", "1.112273445",
      {{"probabilities", "softmax"}, {"chosen", "chosen"}, {"sets", "halves"}, {"counts", "running counts"}, {"counted", "running tokens"}});
  row("A25-rank-0", "not reduced over 2 data-parallel ranks: the first", "DeepSpeed, MegaBlocks, OLMo-core local_batch", "1.0763675663", p("first half", "chosen of first half"));
  row("A25-rank-1", "the same, the second", "DeepSpeed, MegaBlocks, OLMo-core local_batch", "1.2315227757", p("second half", "chosen of second half"));
  row("A26-counts", "counts reduced over 2 equal ranks, T not", "user code", "", one, {{"factor", 2.0}});
  row("A26-tokens", "T over 2 equal ranks, counts not reduced", "user code", "", one, {{"factor", 0.5}});
  row("A27", "global T with averaged gradients: gradient 1 / DP, loss right", "Megatron-LM #3672", "1.086730629", one);
  row("A28", "model adds it, trainer adds it again", "ms-swift #5375", "", one, {{"factor", 2.0}});
  row("A30", "scaler's output discarded: no gradient, loss right", "NeMo Automodel #1408, Megatron-LM January 2024", "1.086730629", one);
  row("A31", "recomputation logged twice: log 2 x, gradient right", "Megatron-LM up to core 0.11", "", one, {{"factor", 2.0}});
  row("A32", "times the world size, W = 2", "transformers #48690", "", one, {{"factor", 2.0}});
  b.vector("balance_loss", "devices", "balance_loss", "DeepSeekMoE, arXiv 2401.06066 equations 15 to 17", {{"balanced", "devices"}, {"devices", 4}, {"gradient", true}}, one);
  b.vector("balance_loss", "over-sum", "balance_loss", "DeepSeek-V3, arXiv 2412.19437 equations 17 to 20: sigmoid scores over their sum, per sequence",
           {{"over_sum", true}, {"gradient", true}}, {{"probabilities", "sigmoid"}, {"chosen", "chosen"}, {"sets", "halves"}});
  b.vector("balance_loss", "communication", "balance_loss", "DeepSeek-V2, arXiv 2405.04434 equations 29 to 31", {{"balanced", "communication"}, {"devices", 4}, {"most_devices", 2}, {"gradient", true}}, one);
  row("A35", "divided by all layers, half of which are dense", "Megatron-LM #2197, MegaBlocks, OLMo-core", "", layers, {{"factor", 0.5}});
}

void z_rows(Builder& b) {
  const auto row = [&](const char* id, const char* formula, const char* seen, const char* digits, const Json& inputs, const Json& options = {}, const char* operation = "z_loss") {
    b.row("z_loss", id, operation, formula, seen, *digits ? std::vector<std::string>{digits} : std::vector<std::string>{}, options, inputs);
  };
  const Json one = {{"logits", "logits"}}, padded = {{"logits", "padded logits"}}, masked = {{"logits", "padded logits"}, {"valid", "valid"}};
  b.tensor("logits of both", at::cat({vector_logits(0), vector_logits(1)}));
  const Json both = {{"logits", "logits of both"}};
  const char* paper = "ST-MoE, arXiv 2202.08906 equation 5";
  row("right", "mean of lse^2, layer 0", paper, "9.531159145", one, {{"gradient", true}});
  row("right-layer-1", "the same of layer 1", paper, "8.580354634", {{"logits", "logits of layer 1"}});
  row("right-layers", "mean of both layers", paper, "9.05575689", both);
  row("right-masked", "padding left out", paper, "9.691293379", masked, {{"gradient", true}});
  row("Z2", "sum over layers", "MegaBlocks, vector summed", "18.11151378", both, {{"factor", 2.0}});
  row("Z3", "lse of probabilities", "Megatron-LM January 2024", "4.907561327", {{"logits", "softmax"}});
  row("Z4", "mean of z^2", "user code", "2.274243152", one, {{"factor", 1.0 / (kT * kE)}}, "squares");
  row("Z5", "sum of z^2 of a token", "user code", "18.19394521", one, {{"factor", 1.0 / kT}}, "squares");
  row("Z6", "square of the mean lse", "user code", "9.457807317", one, {{"value", "squared_mean"}});
  row("Z7", "mean lse, no square", "user code", "3.075354828", one, {{"value", "mean"}});
  row("Z8", "/ k as well", "OLMoE training run", "4.765579573", one, {{"factor", 0.5}});
  row("Z9", "lse over the chosen logits alone", "marin #5491", "7.050116942", {{"logits", "logits of the chosen"}});
  row("Z11", "padding counted", "Megatron-LM without mask", "9.346098535", padded);
  row("Z12", "masked sum over unmasked T", "user code", "7.268470034", masked, {{"all_tokens", true}});
  row("Z13", "log sum exp without the shift: right until it overflows", "MegaBlocks #133", "9.531159145", one);
  row("Z15", "/ (tp cp) missing, TP = 2", "Megatron-LM before 0.7, 0.12 to 0.18", "", one, {{"factor", 2.0}});
}

void token_rows(Builder& b) {
  // Rank 0: micro-batches of 1 and 3 labels with losses that sum to 1 and 9; rank 1: 2 and 1 labels, 2 and 3.
  b.tensor("sums", doubles({1, 9, 2, 3}).reshape({2, 2}));
  b.tensor("labels", ints({1, 3, 2, 1}).reshape({2, 2}));
  const auto row = [&](const char* id, const char* how, const char* formula, const char* seen, const char* digits) {
    b.row("token_loss", id, "normalise", formula, seen, {digits}, {{"how", how}}, {{"sums", "sums"}, {"labels", "labels"}});
  };
  row("right", "tokens", "sum of losses / labels: 15 / 7", "closed form", "2.142857143");
  row("G1", "mean_of_means", "mean of the micro-batches' means: (1 + 3 + 1 + 3) / 4", "transformers before 4.46, ms-swift #10096", "2.000000000");
  row("means-summed", "means_summed", "/ M missing: 4", "trainers without it", "4.000000000");
  row("means-divided-twice", "means_divided_twice", "/ M twice: 1", "trainer and accelerate both", "1.000000000");
  row("tokens-times-steps", "tokens_times_steps", "M times right: 30 / 7", "trainers that scale back", "4.285714286");
  row("tokens-divided-twice", "tokens_divided_twice", "right / M: 15 / 14", "trainer and accelerate both", "1.071428571");
  row("tokens-of-rank", "tokens_of_rank", "mean over ranks: (10 / 4 + 5 / 3) / 2", "average_tokens_across_devices off", "2.083333333");
  row("tokens-times-ranks", "tokens_times_ranks", "W times right: 30 / 7", "sums of gradients where a mean was expected", "4.285714286");
  row("tokens-over-ranks", "tokens_over_ranks", "right / W: 15 / 14", "labels of all ranks, and a mean on top", "1.071428571");
  row("G12", "sum", "divided by no count: 15", "verl #6609", "15.000000000");
  // Weights of the micro-batches' balance losses; tokens t of the router, labels n, N = 7.
  b.tensor("router tokens", ints({2, 4, 3, 1}).reshape({2, 2}));
  using Digits = std::vector<std::string>;
  const auto term = [&](const char* id, const char* how, const char* formula, const char* seen, const Digits& digits) {
    b.row("token_loss", id, "term_weights", formula, seen, digits, {{"how", how}, {"tp", 2}, {"cp", 3}, {"ep", 4}, {"sequences", 2}},
          {{"tokens", "router tokens"}, {"labels", "labels"}}, "weight", 0, 4);
  };
  const auto all = [](const char* digits) { return Digits(4, digits); };
  term("right-terms", "mean", "weight of a balance loss: 1 / (M W)", "closed form", all("0.250000000"));
  term("G2", "summed", "/ M missing", "transformers with num_items_in_batch, NeMo Automodel #3359", all("0.500000000"));
  term("G3", "over_tokens", "1 / (M N)", "Megatron-LM to 0.11", all("0.071428571"));
  term("G4", "tokens_of_shard", "t / (tp cp N), tp = 2, cp = 3", "Megatron-LM #1652, #5047", {"0.047619048", "0.095238095", "0.071428571", "0.023809524"});
  term("G5", "tokens_of_sequence", "t / (S N), S = 2", "Megatron-LM #5798", {"0.142857143", "0.285714286", "0.214285714", "0.071428571"});
  term("G6", "tokens_reduced_twice", "tp cp t / N", "Megatron-LM #7452", {"1.714285714", "3.428571429", "2.571428571", "0.857142857"});
  term("G7", "without_context", "1 / (cp M W)", "Megatron-LM #2217", all("0.083333333"));
  term("G8", "all_tokens", "t / N", "Megatron-LM with masked prompts", {"0.285714286", "0.571428571", "0.428571429", "0.142857143"});
  term("G9", "divided_twice", "/ M twice", "huggingface/trl #6083", all("0.125000000"));
  term("G10", "scale_of_last", "n of the rank's last micro-batch / N", "a global scale set before the backward pass", {"0.428571429", "0.428571429", "0.142857143", "0.142857143"});
  term("G11", "over_expert_ranks", "ep / (M W), ep = 4: of experts' gradients", "expert-data-parallel averages", all("1.000000000"));
  b.tensor("token labels", ints({3, -100, 0, 7, 5, 5, -100, 1, 2, 2, 4, 6, 0, 3, 7, 1}));
  b.vector("token_loss", "cross-entropy", "cross_entropy", "PyTorch cross_entropy, reduction sum, ignore_index -100",
           {{"weight", 1.0 / 14}}, {{"logits", "logits"}, {"labels", "token labels"}});
}

void bias_rows(Builder& b) {
  b.tensor("bias counts", doubles({2, 2, 1, 4, 5, 4, 7, 7, 7, 5, 5, 3, 2, 4, 3, 3}).reshape({2, kE}));
  b.tensor("zero bias", at::zeros({2, kE}, at::kDouble));
  using Digits = std::vector<std::string>;
  const auto row = [&](const char* id, const char* formula, const char* seen, const Digits& digits, const Json& options) {
    b.row("bias_update", id, "bias_update", formula, seen, digits, options, {{"bias", "zero bias"}, {"counts", "bias counts"}}, "bias", 0, 16);
  };
  const Digits signs = {"0.001000000", "0.001000000", "0.001000000", "0.000000000", "-0.001000000", "0.000000000", "-0.001000000", "-0.001000000"};
  const auto with = [&](const Digits& second) {
    Digits all = signs;
    all.insert(all.end(), second.begin(), second.end());
    return all;
  };
  row("right", "b += u sign(mean c - c), u = 0.001", "arXiv 2408.15664 algorithm 1; Megatron-LM",
      with({"-0.001000000", "-0.001000000", "-0.001000000", "0.001000000", "0.001000000", "0.000000000", "0.001000000", "0.001000000"}), {});
  row("B18", "the mean of the step taken from it", "torchtitan",
      with({"-0.001125000", "-0.001125000", "-0.001125000", "0.000875000", "0.000875000", "-0.000125000", "0.000875000", "0.000875000"}), {{"centre", "step"}});
  row("B18-bias", "the mean of the bias taken from it: the same from a zero bias", "user code", {}, {{"centre", "bias"}});
  row("B1", "wrong sign", "user code", {}, {{"rate", -0.001}});
  row("B2", "per micro-batch, M = 2 alike: two steps", "torchtitan 0.1", {}, {{"rate", 0.002}});
  row("B14", "u (mean c - c) instead of its sign", "unit error", {}, {{"proportional", true}});
  row("B17", "rate 0", "coefficient missing", {}, {{"rate", 0.0}});
  // Two ranks with three micro-batches each; the sums end in bits that bfloat16 does not have.
  at::Tensor parts = at::empty({2, 3, 2, kE}, at::kDouble);
  for (std::int64_t i = 0; i < parts.numel(); ++i) parts.data_ptr<double>()[i] = static_cast<double>(200 + i * i % 211);
  b.tensor("counts of micro-batches", parts);
  const Json in = {{"bias", "zero bias"}, {"counts", "counts of micro-batches"}};
  b.vector("bias_update", "micro-batches", "bias_update", "counts over ranks and micro-batches", {}, in);
  b.vector("bias_update", "micro-batches-bf16", "bias_update", "Megatron-LM moe_utils.py get_updated_expert_bias with bfloat16 counters",
           {{"counts_bf16", true}, {"proportional", true}, {"rate", 1.0}}, in);
}

void router_vectors(Builder& b) {
  const Json z = {{"logits", "logits"}}, biased = {{"logits", "logits"}, {"correction_bias", "bias"}};
  using Digits = std::vector<std::string>;
  const auto row = [&](const char* id, const char* formula, const char* seen, const Digits& digits, const Json& options, const Json& inputs) {
    b.row("router", id, "route", formula, seen, digits, options, inputs, "weights", 3 * kK, kK);  // of token 3
  };
  const Json sigmoid = {{"top_k", 2}, {"score", "sigmoid"}, {"renormalise", true}};
  row("right-sigmoid", "the bias chooses, the sigmoid weighs", "DeepSeek-V3, arXiv 2412.19437 equations 12 to 16", {"0.5532", "0.4468"}, sigmoid, biased);
  Json w1 = sigmoid;
  w1["weighs"] = "choice";
  row("W1", "biased scores as weights", "Megatron-LM April 2025, vLLM #12002, transformers #39581", {"0.5213", "0.4787"}, w1, biased);
  row("W2", "bias on the logits", "the same window", {"0.5297", "0.4703"}, sigmoid, {{"logits", "logits with bias"}});
  row("W3-pre", "softmax, then top-k, no renormalisation", "mlxcel #391, SGLang #35160", {"0.5046", "0.2098"}, {{"top_k", 2}}, z);
  row("W3-post", "top-k, then softmax", "gpt-oss, Mixtral as trained", {"0.7063", "0.2937"}, {{"top_k", 2}, {"score_after_top_k", true}}, z);
  row("right-softmax", "softmax, top-k, renormalised: the same as top-k, then softmax", "transformers modeling_mixtral.py", {"0.7063", "0.2937"}, {{"top_k", 2}, {"renormalise", true}}, z);
  row("W4", "softmax of the softmax", "transformers 5.0 to 5.5", {"0.5732", "0.4268"}, {{"top_k", 2}, {"renormalise", true}}, {{"logits", "softmax"}});
  b.row("router", "W5", "route", "k = 1, its weight divided by itself: no gradient", "Megatron-LM #894, minimind #859", {"1.0"}, {{"top_k", 1}, {"renormalise", true}}, z,
        "weights", 3, 1);  // of token 3
  Json twice = sigmoid;
  twice["scaling"] = 2.5;
  row("right-scaled", "routed_scaling_factor 2.5", "DeepSeek-V3", {}, twice, biased);
  twice["scaling"] = 6.25;
  row("W8-twice", "routed_scaling_factor twice", "user code", {}, twice, biased);
  row("W8-omitted", "routed_scaling_factor omitted", "user code", {"0.5532", "0.4468"}, sigmoid, biased);
  b.vector("router", "groups", "route", "DeepSeek-V3, modeling_deepseek_v3.py: 4 groups by their two best, 2 kept",
           {{"top_k", 4}, {"score", "sigmoid"}, {"group_score", "top2_sum"}, {"groups", 4}, {"top_groups", 2}, {"renormalise", true}, {"renormalise_eps", 1e-20}, {"scaling", 2.5}}, biased);
  b.vector("router", "device-limited", "route", "DeepSeek-V2, arXiv 2405.04434 section 2.2.2",
           {{"top_k", 3}, {"group_score", "max"}, {"groups", 4}, {"top_groups", 2}, {"scaling", 16.0}}, z);
  b.vector("router", "sqrtsoftplus", "route", "modeling_deepseek_v4.py", {{"top_k", 6}, {"score", "sqrtsoftplus"}, {"renormalise", true}, {"scaling", 1.5}}, biased);
  b.tensor("equal logits", at::full({3, 160}, 0.25, at::kDouble));
  b.vector("router", "ties", "route", "ties go to the lowest index", {{"top_k", 32}, {"renormalise", true}}, {{"logits", "equal logits"}});
  b.tensor("scale of experts", spread({kE}, 0.6));
  b.tensor("given experts", (at::arange(kT * kK) * 5).remainder(kE).reshape({kT, kK}).to(at::kDouble));
  b.tensor("logits of two more", 2 * spread({kT, 2}, 0.8));
  b.vector("router", "sigmoid-after-top-k", "route", "modeling_llama4.py, modeling_cohere2_moe.py",
           {{"top_k", 3}, {"score", "sigmoid"}, {"score_after_top_k", true}, {"renormalise", true}}, z);
  b.vector("router", "floor", "route", "modeling_ernie4_5_moe.py, with a floor that bites",
           {{"top_k", 2}, {"renormalise", true}, {"renormalise_floor", 0.7}}, biased);
  b.vector("router", "capped-logits", "route", "modeling_laguna.py",
           {{"top_k", 3}, {"score", "sigmoid"}, {"logit_softcap", 2.0}, {"renormalise", true}}, biased);
  b.vector("router", "scaled-by-expert", "route", "modeling_gemma4.py", {{"top_k", 3}, {"renormalise", true}},
           {{"logits", "logits"}, {"expert_scale", "scale of experts"}});
  b.vector("router", "given", "route", "modeling_deepseek_v4.py: experts by token id",
           {{"top_k", 2}, {"score", "sqrtsoftplus"}, {"renormalise", true}, {"renormalise_eps", 1e-20}, {"scaling", 1.5}},
           {{"logits", "logits"}, {"given", "given experts"}});
  const Json with_two = {{"logits", "logits"}, {"correction_bias", "bias"}, {"always_logits", "logits of two more"}};
  b.vector("router", "always", "route", "modeling_inkling.py: shared experts in the sum",
           {{"top_k", 3}, {"score", "sigmoid"}, {"renormalise", true}, {"scaling", 8.0}}, with_two);
  const char* torch_norm = "modeling_dbrx.py, MegaBlocks and OLMo-core: weights over their p-norm";
  b.vector("router", "p-norm-2", "route", torch_norm, {{"top_k", 4}, {"renormalise", true}, {"renormalise_norm", 2}}, z);
  b.vector("router", "p-norm-3", "route", torch_norm, {{"top_k", 3}, {"score", "sigmoid"}, {"renormalise", true}, {"renormalise_norm", 3}, {"scaling", 1.5}}, with_two);
  b.vector("router", "p-norm-half", "route", torch_norm, {{"top_k", 3}, {"renormalise", true}, {"renormalise_norm", 0.5}}, z);
  b.vector("router", "p-norm-largest", "route", torch_norm, {{"top_k", 4}, {"renormalise", true}, {"renormalise_norm", "inf"}}, z);
  b.vector("router", "sigmoid-offset", "route", "OLMo-core nn/moe/router.py: sigmoid + 1e-7",
           {{"top_k", 3}, {"score", "sigmoid"}, {"sigmoid_offset", 1e-7}, {"renormalise", true}, {"renormalise_norm", 2}}, biased);
  b.vector("router", "sigmoid-offset-seen", "route", "the same, with an offset that no rounding hides",
           {{"top_k", 3}, {"score", "sigmoid"}, {"sigmoid_offset", 0.25}, {"renormalise", true}}, with_two);
  b.tensor("gate x", spread({5, 150}, 0.1));
  b.tensor("gate w", spread({kE, 150}, 0.7));
  b.vector("router", "gate", "gate_logits", "logits = x W^T + b; 150 is more than one stretch of the sum", {}, {{"x", "gate x"}, {"w", "gate w"}, {"bias", "bias"}});
  b.tensor("short x", at::round(64 * spread({5, 150}, 0.3)) / 64);
  b.tensor("short w", at::round(64 * spread({kE, 150}, 0.5)) / 64);
  for (const int stretch : {1, 50})
    b.vector("rounded_gate", "stretch-" + std::to_string(stretch), "rounded_gate_logits", "bfloat16 inside the sum: a variant",
             {{"stretch", stretch}}, {{"x", "short x"}, {"w", "short w"}});
  b.tensor("d weights", spread({kT, kK}, 0.4));
  b.tensor("d weights of 4", spread({kT, 4}, 0.4));
  const char* autograd = "autograd of the reference";
  const Json softmax = {{"logits", "logits"}, {"d_weights", "d weights"}};
  b.vector("router_backward", "softmax", "route_backward", autograd, {{"top_k", 2}, {"renormalise", true}}, softmax);
  b.vector("router_backward", "after-top-k", "route_backward", autograd, {{"top_k", 2}, {"score_after_top_k", true}}, softmax);
  b.vector("router_backward", "sigmoid", "route_backward", autograd, {{"top_k", 4}, {"score", "sigmoid"}, {"renormalise", true}, {"renormalise_eps", 1e-20}, {"scaling", 2.5}},
           {{"logits", "logits"}, {"correction_bias", "bias"}, {"d_weights", "d weights of 4"}});
  b.vector("router_backward", "sqrtsoftplus", "route_backward", autograd, {{"top_k", 2}, {"score", "sqrtsoftplus"}}, softmax);
  b.tensor("d weights of two more", spread({kT, 2}, 1.3));
  b.vector("router_backward", "all-of-it", "route_backward", autograd,
           {{"top_k", 2}, {"score", "sigmoid"}, {"logit_softcap", 2.0}, {"renormalise", true}, {"renormalise_eps", 1e-3}, {"scaling", 2.5}},
           {{"logits", "logits"}, {"correction_bias", "bias"}, {"expert_scale", "scale of experts"}, {"always_logits", "logits of two more"},
            {"d_weights", "d weights"}, {"d_always_weights", "d weights of two more"}});
  b.vector("router_backward", "floor", "route_backward", autograd, {{"top_k", 2}, {"renormalise", true}, {"renormalise_floor", 0.7}}, softmax);
  const Json of_four = {{"logits", "logits"}, {"d_weights", "d weights of 4"}};
  b.vector("router_backward", "p-norm-2", "route_backward", autograd, {{"top_k", 4}, {"renormalise", true}, {"renormalise_norm", 2}}, of_four);
  b.vector("router_backward", "p-norm-largest", "route_backward", autograd, {{"top_k", 4}, {"renormalise", true}, {"renormalise_norm", "inf"}}, of_four);
  b.vector("router_backward", "p-norm-3-of-offset-sigmoids", "route_backward", autograd,
           {{"top_k", 2}, {"score", "sigmoid"}, {"sigmoid_offset", 0.25}, {"renormalise", true}, {"renormalise_norm", 3}, {"scaling", 1.5}},
           {{"logits", "logits"}, {"correction_bias", "bias"}, {"always_logits", "logits of two more"}, {"d_weights", "d weights"},
            {"d_always_weights", "d weights of two more"}});
  b.tensor("gate x of 16", spread({kT, 12}, 0.2));
  b.tensor("gate w of 12", spread({kE, 12}, 0.9));
  b.tensor("d logits", spread({kT, kE}, 1.1));
  b.vector("router_backward", "gate", "gate_backward", "d W = d^T x, d x = d W", {}, {{"d_logits", "d logits"}, {"x", "gate x of 16"}, {"w", "gate w of 12"}});
}

void dispatch_vectors(Builder& b) {
  b.tensor("weights", spread({kT, kK}, 2.2).abs() + 1.0 / 64);
  const Json in = {{"chosen", "chosen"}, {"weights", "weights"}, {"keys", "d weights"}};
  const std::pair<const char*, const char*> orders[] = {{"tokens", "by token"},
                                                        {"choices", "GShard, arXiv 2006.16668 algorithm 1"},
                                                        {"weights", "Megatron-LM --moe-token-drop-policy probs"},
                                                        {"keys", "DeepSpeed's random token selection"}};
  for (const auto& [order, source] : orders) b.vector("dispatch", order, "drop", source, {{"order", order}, {"capacity", 3}}, in);
  b.vector("dispatch", "batch_prioritised", "drop", "V-MoE, arXiv 2106.05974 section 4.1", {{"order", "batch_prioritised"}, {"capacity", 3}},
           {{"chosen", "chosen with bias"}, {"weights", "weights"}, {"scores", "sigmoid"}});
  b.vector("expert_load", "counts", "expert_load", "counts, and the statistics of docs/generated/kernels/expert_load.md", {{"experts", kE}, {"top_k", kK}}, {{"chosen", "chosen"}});
  b.tensor("one expert", at::full({kT, 1}, 3, at::kLong));
  b.vector("expert_load", "collapsed", "expert_load", "every token on one expert", {{"experts", kE}, {"top_k", 1}}, {{"chosen", "one expert"}});
  b.vector("expert_load", "probabilities", "routing_statistics", "entropies and chosen mass", {}, {{"probabilities", "softmax"}, {"chosen", "chosen"}});
  b.tensor("rows", spread({kT * kK, 20}, 0.5));
  b.tensor("row weights", spread({kT, kK}, 0.6));
  b.tensor("d y", spread({kT, 20}, 0.8));
  const Json rows = {{"chosen", "chosen within capacity"}, {"rows", "rows"}, {"weights", "row weights"}, {"d_y", "d y"}};
  b.vector("permute", "dropped", "permute", "rows by expert and token; combine and its gradients; some choices dropped", {{"experts", kE}}, rows);
  b.tensor("other chosen", best2(vector_logits(0) + (at::arange(kE, at::kDouble) - 3.5) * 0.2));
  b.vector("routing_metrics", "margins", "routing_margins", "least chosen minus largest other", {}, {{"choice", "logits"}, {"chosen", "chosen"}});
  b.vector("routing_metrics", "agreement", "agreement", "OLMoE, arXiv 2409.02060: router saturation", {{"experts", kE}}, {{"now", "other chosen"}, {"then", "chosen"}});
  b.tensor("domains", ints({0, 1, 2, 3, 0, 1, 2, 3, 3, 3, 0, 0, 1, -1, 2, 9}));
  b.tensor("first choices", ints({3, 1, 0, 7, 3, 2, 5, 8, 3, 1, 5, 7, 3, 2, 5, 8}).reshape({4, 4}));
  b.vector("routing_metrics", "settled", "count_settled", "StableMoE, arXiv 2204.08396: last fluctuation", {}, {{"first", "first choices"}});
  b.vector("routing_metrics", "by-domain", "count_by_label", "OLMoE, arXiv 2409.02060: domain specialisation", {{"experts", kE}, {"num_labels", 4}}, {{"chosen", "chosen"}, {"labels", "domains"}});
}

/// How many choices an expert takes. The digits were computed apart, with Python's integers and floats, and NumPy's float32.
void capacity_rows(Builder& b) {
  b.tensor("capacity cases", ints({100, 8, 2, 4, 4, 4, 1, 40, 16, 8, 2, 8, 1, 1, 1, 9, 30, 12, 2, 0, 2, 3, 1, 8, 1000, 64, 6, 4, 8, 8, 1, 200,
                                   4096, 160, 6, 4, 8, 8, 1, 300, 70, 10, 2, 8, 1, 2, 1, 30, 50, 10, 1, 4, 2, 5, 1, 9,
                                   50, 8, 2, 4, 1, 1, 1, 20, 50, 20, 3, 4, 2, 1, 1, 15}).reshape({9, 8}));
  b.tensor("capacity factors", doubles({1.25, 1.0, 1.1, 1.1, 1.2, 1.1, 1.4, 1.2, 1.2}));
  const Json in = {{"cases", "capacity cases"}, {"factors", "capacity factors"}};
  const auto row = [&](const char* id, const char* form, const char* formula, const char* seen, const std::vector<std::string>& published) {
    b.row("dispatch", id, "capacity", formula, seen, published, {{"form", form}}, in, "places", 0, 9);
  };
  row("C0", "megatron", "ceil(T k / E cf)", "megatron/core/transformer/moe/moe_utils.py get_capacity", {"32.0", "4.0", "6.0", "104.0", "185.0", "16.0", "7.0", "15.0", "9.0"});
  row("C1", "deepspeed", "max(ceil(T / E cf k), min_capacity), in float32", "deepspeed/moe/sharded_moe.py _capacity", {"32.0", "8.0", "6.0", "104.0", "185.0", "16.0", "7.0", "16.0", "9.0"});
  row("C2", "megablocks", "int(cf (k T ep / E)), the largest count where that is 0", "megablocks/layers/moe.py expert_capacity", {"125.0", "4.0", "11.0", "825.0", "1474.0", "15.0", "14.0", "15.0", "18.0"});
  row("C3", "olmo_core", "ep up8(int(cf (k T / E)))", "olmo_core/nn/moe/parallel_mlp.py", {"128.0", "8.0", "16.0", "832.0", "1472.0", "16.0", "16.0", "16.0", "32.0"});
  row("C4", "tutel", "k int(cf ceil(T / E)), cf > 0", "tutel/impls/fast_dispatch.py", {"32.0", "4.0", "6.0", "102.0", "186.0", "14.0", "7.0", "16.0", "9.0"});
  row("C5", "fastmoe", "ceil(cf T) k // E", "fmoe/gates/gshard_gate.py", {"31.0", "4.0", "5.0", "103.0", "184.0", "15.0", "7.0", "15.0", "9.0"});
}

/// Where the counts decide: no limit, or at most the largest count.
void capacity_by_counts(Builder& b) {
  b.tensor("capacity cases by counts", ints({100, 8, 2, 0, 1, 1, 1, 40, 100, 8, 2, 0, 1, 1, 16, 40, 100, 8, 2, 0, 1, 1, 1, 40, 100, 8, 2, 0, 1, 1, 1, 29,
                                             100, 8, 2, 0, 1, 1, 16, 40}).reshape({5, 8}));
  b.tensor("factors of counts", doubles({0, 0, -1.2, -1.2, 1.2}));
  b.vector("dispatch", "tutel-by-counts", "capacity", "tutel/impls/fast_dispatch.py extract_critical", {{"form", "tutel"}},
           {{"cases", "capacity cases by counts"}, {"factors", "factors of counts"}});
  b.tensor("no factor", doubles({0, 1.2, 0, 0.001, 1.2}));
  b.vector("dispatch", "megablocks-by-counts", "capacity", "megablocks/layers/moe.py forward_once", {{"form", "megablocks"}},
           {{"cases", "capacity cases by counts"}, {"factors", "no factor"}});
}

/// Expert choice and noise; digits as above.
void choice_and_noise_rows(Builder& b) {
  const char* zhou = "arXiv 2202.09368 section 3.2";
  b.tensor("d weights of experts", spread({kE, 4}, 5.4));
  b.tensor("coarse logits", vector_logits(0).round());
  b.row("expert_choice", "right", "expert_choice", "the 4 best tokens of every expert, by its softmax scores", zhou,
        {"0.654796659", "0.572792988", "0.469327317", "0.437221154", "0.360675217", "0.318334427", "0.272076787", "0.245863828"},
        {{"capacity", 4}}, {{"scores", "softmax"}, {"d_weights", "d weights of experts"}}, "weights", 0, 8);
  b.vector("expert_choice", "ties", "expert_choice", "the lower token first among equals", {{"capacity", 4}}, {{"scores", "coarse logits"}, {"d_weights", "d weights of experts"}});
  b.vector("expert_choice", "padding", "expert_choice", "nobody takes what is not valid", {{"capacity", 4}}, {{"scores", "padded softmax"}, {"valid", "valid"}, {"d_weights", "d weights of experts"}});
  const Json drawn = {{"logits", "logits"}, {"noise", "noise"}};
  Json learnt = drawn;
  learnt["raw"] = "raw noise", learnt["d_noisy"] = "d logits";
  b.row("router_noise", "right", "noisy_logits", "z + n (softplus(r) + 0.01)", "arXiv 1701.06538 equation 4; tensor2tensor expert_utils.py noisy_top_k_gating",
        {"1.858705500", "2.480924058", "1.205882078", "1.118980697", "0.605125023", "-1.573846558", "-2.054982808", "-1.030801453"},
        {{"eps", 0.01}}, learnt, "noisy", 0, 8);
  b.row("router_noise", "fixed", "noisy_logits", "z + n / E", "V-MoE, arXiv 2106.05974",
        {"2.072437579", "1.704417877", "1.233667304", "0.578889346", "-0.289629299", "-1.357339247", "-1.834302409", "-1.445400937"},
        {{"scale", 0.125}}, drawn, "noisy", 0, 8);
  b.tensor("factors of jitter", 1 + at::round(16 * spread({kT, 12}, 5.5)) / 4096);
  b.vector("router_noise", "jitter-bf16", "jitter", "Switch, arXiv 2101.03961 table 4; one rounding to bfloat16", {}, {{"x", "gate x of 16"}, {"factor", "factors of jitter"}});
  Json mixed = {{"logits", "logits"}, {"d_weights", "d weights"}};
  b.vector("sparse_mixer", "evaluation", "sparse_mixer", "modeling_phimoe.py sparsemixer, arXiv 2310.00811; gradients by autograd", {{"jitter", 0.2}}, mixed);
  b.tensor("draws of the midpoint", spread({kT, kK}, 5.6).abs());
  mixed["given"] = "given experts", mixed["draws"] = "draws of the midpoint";
  b.vector("sparse_mixer", "training", "sparse_mixer", "the same, with what was drawn; gradients by its autograd function", {{"jitter", 0.2}}, mixed);
}

void weight_vectors(Builder& b) {
  const auto codes = [&](const char* name, std::int64_t n, std::int64_t step) { b.tensor(name, at::arange(n, at::kLong) * step % 256); };
  // Not the codes of NaN: 0x7f and 0xff in e4m3.
  std::vector<std::int64_t> e4m3;
  for (std::int64_t i = 0; i < 256; ++i) e4m3.push_back(i % 128 == 127 ? 0x7e : i);
  b.tensor("e4m3 codes", ints(e4m3));
  b.tensor("block scales", spread({9}, 0.3).abs() + 0.5);
  b.vector("quantised_weights", "fp8-blocks", "dequantise", "DeepSeek-V3 inference/kernel.py weight_dequant, blocks of 6 x 7 in 16 x 16; all finite codes",
           {{"code", "e4m3"}, {"rows", 16}, {"columns", 16}, {"row_block", 6}, {"column_block", 7}}, {{"codes", "e4m3 codes"}, {"scales", "block scales"}});
  codes("packed codes", 96, 37);
  b.tensor("exponents", ints({127, 120, 1, 254, 130, 126}));
  b.vector("quantised_weights", "mxfp4", "dequantise", "OCP Microscaling 1.0, arXiv 2310.10537; gpt-oss", {{"code", "e2m1"}, {"scale", "e8m0"}, {"rows", 2}, {"columns", 96}, {"row_block", 1}, {"column_block", 32}}, {{"codes", "packed codes"}, {"scales", "exponents"}});
  b.tensor("e4m3 scales", ints({56, 57, 60, 48, 72, 33, 56, 70, 24, 11, 99, 64}));
  b.vector("quantised_weights", "nvfp4", "dequantise", "two-level scales, ModelOpt's weight_scale_2", {{"code", "e2m1"}, {"scale", "e4m3"}, {"rows", 2}, {"columns", 96}, {"row_block", 1}, {"column_block", 16}, {"factor", 0.0009765625}}, {{"codes", "packed codes"}, {"scales", "e4m3 scales"}});
  // The published NF4 levels as bitsandbytes stores them: float32.
  b.tensor("nf4 levels", doubles({-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0}));
  b.tensor("nested bytes", ints({0, 255, 128}));
  b.tensor("nested map", at::arange(256, at::kDouble) / 128 - 1);
  b.tensor("nested absmax", doubles({0.75, 1.5}));
  b.vector("quantised_weights", "nf4-double", "dequantise", "QLoRA, arXiv 2305.14314 section 3; bitsandbytes functional.py dequantize_4bit",
           {{"code", "table"}, {"high_half_first", true}, {"scale", "nested"}, {"nested_block", 2}, {"nested_offset", 1.25}, {"rows", 1}, {"columns", 192}, {"row_block", 1}, {"column_block", 64}},
           {{"codes", "packed codes"}, {"scales", "nested bytes"}, {"nested_map", "nested map"}, {"nested_absmax", "nested absmax"}, {"table", "nf4 levels"}});
  codes("int8 codes", 40, 101);
  b.tensor("row scales", doubles({12.7, 0.3, 1.0, 127.0}));
  b.vector("quantised_weights", "int8", "dequantise", "LLM.int8(), arXiv 2208.07339; bitsandbytes SCB", {{"code", "int8"}, {"rows", 4}, {"columns", 10}, {"row_block", 1}, {"column_block", 10}, {"divisor", 127.0}, {"scale", "f64"}}, {{"codes", "int8 codes"}, {"scales", "row scales"}});
  b.tensor("lora w", spread({9, 14}, 1.3) + 3);
  b.tensor("lora a", spread({4, 14}, 1.4));
  b.tensor("lora b", spread({9, 4}, 1.5));
  b.tensor("lora x", spread({6, 14}, 1.6));
  b.tensor("lora d y", spread({6, 9}, 1.7));
  const Json merge = {{"w", "lora w"}, {"a", "lora a"}, {"b", "lora b"}};
  b.vector("lora", "merge", "lora_merge", "arXiv 2106.09685, W + (alpha / r) B A", {{"scale", 0.5}}, merge);
  b.vector("lora", "unmerge", "lora_merge", "W - (alpha / r) B A", {{"scale", 0.5}, {"unmerge", true}}, merge);
  b.vector("lora", "merge-bf16", "lora_merge", "the same, stored in bfloat16", {{"scale", 0.5}, {"stored", "bf16"}}, merge);
  b.vector("lora", "gradients", "lora_gradient", "autograd of the reference", {{"scale", 2.0}}, {{"x", "lora x"}, {"w", "lora w"}, {"a", "lora a"}, {"b", "lora b"}, {"d_y", "lora d y"}});
}

void layer_vectors(Builder& b) {
  constexpr std::int64_t kD = 12, kF = 6, kExperts = 4, kTokens = 7, kRank = 2;
  b.tensor("layer x", spread({kTokens, kD}, 3.1));
  b.tensor("layer chosen", ints({0, 2, 3, 1, 2, 0, -1, 3, 1, 2, 2, 3, 0, 2}).reshape({kTokens, 2}));
  b.tensor("layer weights", spread({kTokens, 2}, 3.2));
  b.tensor("layer gate_up", spread({kExperts, 2 * kF, kD}, 3.3));
  b.tensor("layer down", spread({kExperts, kD, kF}, 3.4));
  b.tensor("layer gate_up a", spread({kExperts, kRank, kD}, 3.5));
  b.tensor("layer gate_up b", spread({kExperts, 2 * kF, kRank}, 3.6));
  b.tensor("layer shared gate_up", spread({1, 2 * kF, kD}, 3.7));
  b.tensor("layer shared down", spread({1, kD, kF}, 3.8));
  b.tensor("layer shared gate", spread({kD}, 3.9));
  b.tensor("layer d y", spread({kTokens, kD}, 4.0));
  Json in = {{"x", "layer x"}, {"chosen", "layer chosen"}, {"weights", "layer weights"}, {"gate_up", "layer gate_up"}, {"down", "layer down"}, {"d_y", "layer d y"}};
  b.vector("moe_layer", "swiglu", "moe_layer", "Mixtral, arXiv 2401.04088; gradients by autograd; one choice dropped, an expert of one token", {}, in);
  Json lora = in;
  lora["gate_up_lora_a"] = "layer gate_up a", lora["gate_up_lora_b"] = "layer gate_up b";
  b.vector("moe_layer", "lora-gpt-oss", "moe_layer", "expert adapters as PEFT has them; alpha 1.702 and up + 1 as gpt-oss has them", {{"alpha", 1.702}, {"up_offset", 1.0}, {"lora_scaling", 0.75}}, lora);
  in["shared_gate_up"] = "layer shared gate_up", in["shared_down"] = "layer shared down", in["shared_gate"] = "layer shared gate";
  b.vector("moe_layer", "shared", "moe_layer", "shared expert behind a sigmoid gate: modeling_qwen2_moe.py", {}, in);
  // Regularisers of the router.
  const char* shazeer = "arXiv 1701.06538";
  b.tensor("picked", at::gather(scores(vector_logits(0), Score::kSoftmax), -1, best2(vector_logits(0))));
  b.vector("router_regularisers", "importance", "importance_loss", shazeer, {{"experts", kE}}, {{"gates", "picked"}, {"chosen", "chosen"}});
  b.vector("router_regularisers", "importance-sample", "importance_loss", "fastmoe: over E - 1", {{"experts", kE}, {"sample", true}, {"eps", 1e-10}}, {{"gates", "picked"}, {"chosen", "chosen"}});
  b.tensor("noise", spread({kT, kE}, 5.1));
  b.tensor("raw noise", spread({kT, kE}, 5.2));
  b.vector("router_regularisers", "load", "load_loss", shazeer, {{"top_k", kK}, {"added", 0.01}}, {{"clean", "logits"}, {"noise", "noise"}, {"raw", "raw noise"}});
  b.vector("router_regularisers", "entropy", "entropy_loss", "LIMoE, arXiv 2206.02770: local", {}, {{"logits", "logits"}});
  b.vector("router_regularisers", "entropy-of-mean", "entropy_loss", "LIMoE, arXiv 2206.02770: global", {{"of_mean", true}}, {{"logits", "logits"}});
  b.vector("router_regularisers", "orthogonality", "gate_orthogonality", "SimBal, arXiv 2506.14038", {}, {{"w", "gate w of 12"}});
  b.tensor("expert outputs", spread({5, 3, 10}, 5.3));
  for (const char* overlap : {"projection", "squared", "cosine"})
    b.vector("router_regularisers", std::string("overlap-") + overlap, "expert_overlap", "arXiv 2505.22323, arXiv 2506.14038", {{"overlap", overlap}, {"mean", std::string(overlap) == "cosine"}}, {{"outputs", "expert outputs"}});
  b.vector("router_regularisers", "variance", "score_variance", "arXiv 2505.22323", {{"mean", true}}, {{"scores", "softmax"}});
}

}  // namespace

Json json_of(const at::Tensor& t) {
  const at::Tensor c = t.detach().contiguous();
  const bool whole = at::isIntegralType(c.scalar_type(), true);
  Json j = {{"type", whole ? "i64" : "f64"}, {"shape", c.sizes().vec()}};
  const at::Tensor v = c.to(whole ? at::kLong : at::kDouble);
  if (whole) j["values"] = std::vector<std::int64_t>(v.data_ptr<std::int64_t>(), v.data_ptr<std::int64_t>() + v.numel());
  else j["values"] = std::vector<double>(v.data_ptr<double>(), v.data_ptr<double>() + v.numel());
  return j;
}

at::Tensor tensor_of(const Json& j) {
  const auto shape = j.at("shape").get<std::vector<std::int64_t>>();
  const bool whole = j.at("type") == "i64";
  at::Tensor t = whole ? ints(j.at("values").get<std::vector<std::int64_t>>()) : doubles(j.at("values").get<std::vector<double>>());
  return t.reshape(shape);
}

Json make_vectors() {
  Builder b;
  tensors_of_the_test_vector(b);
  router_vectors(b);
  balance_rows(b);
  z_rows(b);
  bias_rows(b);
  token_rows(b);
  dispatch_vectors(b);
  capacity_rows(b);
  capacity_by_counts(b);
  weight_vectors(b);
  layer_vectors(b);
  choice_and_noise_rows(b);
  b.file["not_reached"] = Json::array(
      {{{"rows", {"A29", "A33"}}, {"why", "the coefficient: the loss itself is right, and none is logged"}},
       {{"rows", {"A34"}}, {"why", "an epsilon that matters only where all scores of a token are near 0"}},
       {{"rows", {"A36"}}, {"why", "a constant that depends on the shapes alone"}},
       {{"rows", {"A37"}}, {"why", "the language-model loss that the loss is added to"}},
       {{"rows", {"Z14"}}, {"why", "bfloat16: a relative error of about 2^-8, with no digits of its own"}},
       {{"rows", {"Z16"}}, {"why", "what one rank logs; tokens of other ranks are not in the vector"}},
       {{"rows", {"Z17"}}, {"why", "logits of the language-model head"}},
       {{"rows", {"G13"}}, {"why", "a coefficient that nobody meant: every weight is wrong"}},
       {{"rows", {"B3", "B4", "B6", "B7", "B8", "B9", "B10", "B11"}}, {"why", "which tokens are counted, and in what dtype: the update of those counts is right"}},
       {{"rows", {"B5", "B19"}}, {"why", "what the bias is rounded to, or replaced by, where it is kept"}},
       {{"rows", {"B12"}}, {"why", "an optimizer that moves the bias as well"}},
       {{"rows", {"B13", "B15", "B16"}}, {"why", "a bias that is not saved, moved where it should stay, or left out"}},
       {{"rows", {"W6"}}, {"why", "an epsilon that matters only where all scores of a token are near 0"}},
       {{"rows", {"W7"}}, {"why", "choices that are dropped, and this router drops none"}},
       {{"rows", {"W9", "W10", "W11"}}, {"why", "groups of experts, which this router has none of; the vectors of router have them"}},
       {{"rows", {"W12"}}, {"why", "bfloat16: other experts where logits come to tie, no digits of its own"}},
       {{"rows", {"W13", "W14"}}, {"why", "noise, given in the vectors of router_noise"}},
       {{"rows", {"W15"}}, {"why", "limits of a selection kernel: more experts, negative logits"}},
       {{"rows", {"W16"}}, {"why", "scores on the inputs of experts that are not linear, which the vector has none of"}},
       {{"rows", {"X1", "X2", "X3", "X4", "X7"}}, {"why", "C0 to C5 of other k, E or tokens than were meant"}},
       {{"rows", {"X5", "X6"}}, {"why", "which choices are dropped, not how many"}}});
  return b.file;
}

}  // namespace moeaudit::reference
