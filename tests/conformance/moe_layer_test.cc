// One MoE layer: kernels/host against reference/ and its autograd, within the errors that tests/support/running_layer.h
// derives; real blocks of transformers; the laws that a layer obeys; what pipelining in chunks of tokens keeps and
// changes.
#define BOOST_TEST_MODULE moe_layer
#include "kernels/host/moe_layer.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/host/balance_loss.h"
#include "kernels/host/dispatch.h"
#include "reference/moe_layer.h"
#include "tests/support/compare.h"
#include "tests/support/layer_memory.h"
#include "tests/support/tensors.h"

namespace {

namespace k = moeaudit::kernels;
namespace ref = moeaudit::reference;
using moeaudit::test::values;
namespace test = moeaudit::test;
using test::LayerShape;
using Doubles = std::vector<double>;
using Ids = std::vector<std::int32_t>;
template <class T>
using Memory = test::LayerMemory<T, test::OnHost>;
using Results = std::map<std::string, Doubles>;

constexpr double kInf = std::numeric_limits<double>::infinity();

template <class T>
constexpr k::Float kStored = sizeof(T) == 8   ? k::Float::kF64
                             : sizeof(T) == 4 ? k::Float::kF32
                                              : k::Float::kBF16;
template <class T>
test::LayerArithmetic host_arithmetic() {
  const k::Float wide = kStored<k::Wide<T>>;
  return test::arithmetic_of(sizeof(T) == 4 ? k::Float::kF32 : k::Float::kF64, kStored<T>, wide);
}

// ---- the reference and its gradients
// ---------------------------------------------------------------------------------------

struct Leaf {
  at::Tensor tensor;
  std::string gradient;
};

ref::ExpertForm form_of(const k::ExpertForm& f) {
  return {static_cast<ref::Activation>(static_cast<int>(f.activation)), f.gated, f.alpha, f.limit, f.up_offset};
}

/// "y" and every gradient, by the names of LayerMemory.
Results reference_of(const test::LayerValues& v) {
  std::vector<Leaf> leaves;
  const auto leaf = [&](const Doubles& d, std::vector<std::int64_t> shape, const std::string& name) {
    at::Tensor t = at::from_blob(const_cast<double*>(d.data()), shape, at::kDouble).clone();
    t.set_requires_grad(true);
    leaves.push_back({t, "d " + name});
    return t;
  };
  const auto linear = [&](const test::LinearValues& l, std::int64_t experts, std::int64_t in, std::int64_t out,
                          const std::string& name) {
    ref::ExpertLinear r;
    r.weight = leaf(l.weight, {experts, out, in}, name);
    if (!l.bias.empty()) r.bias = leaf(l.bias, {experts, out}, name + " bias");
    if (l.rank > 0) {
      r.lora_a = leaf(l.lora_a, {experts, l.rank, in}, name + " lora A");
      r.lora_b = leaf(l.lora_b, {experts, out, l.rank}, name + " lora B");
      r.scaling = l.scaling;
    }
    return r;
  };
  const at::Tensor x = leaf(v.x, {v.tokens, v.hidden}, "x"), w = leaf(v.weights, {v.tokens, v.top_k}, "weights");
  const std::vector<std::int64_t> ids(v.chosen.begin(), v.chosen.end());
  const at::Tensor chosen =
      at::from_blob(const_cast<std::int64_t*>(ids.data()), {v.tokens, v.top_k}, at::kLong).clone();
  const ref::Experts routed = {linear(v.gate_up, v.experts, v.hidden, k::first_outputs(v.form, v.width), "gate_up"),
                               linear(v.down, v.experts, v.width, v.hidden, "down")};
  ref::Experts shared;
  at::Tensor gate;
  if (v.shared_width > 0) {
    shared = {linear(v.shared_gate_up, 1, v.hidden, k::first_outputs(v.form, v.shared_width), "shared gate_up"),
              linear(v.shared_down, 1, v.shared_width, v.hidden, "shared down")};
    if (!v.shared_gate.empty()) gate = leaf(v.shared_gate, {v.hidden}, "shared gate");
  }
  const at::Tensor y =
      ref::moe_layer(x, chosen, w, form_of(v.form), routed, shared, gate, v.weight_on == k::WeightOn::kInput);
  (y * at::from_blob(const_cast<double*>(v.d_y.data()), {v.tokens, v.hidden}, at::kDouble)).sum().backward();
  Results r = {{"y", values(y)}};
  for (const Leaf& l : leaves)
    r[l.gradient] =
        l.tensor.grad().defined() ? values(l.tensor.grad()) : Doubles(static_cast<std::size_t>(l.tensor.numel()));
  return r;
}

template <class T>
void run(Memory<T>& m) {
  BOOST_REQUIRE(k::moe_layer(m.args, m.state, m.y) == k::Status::kOk);
  BOOST_REQUIRE(k::moe_layer_backward(m.args, m.state, m.d_y, m.gradients) == k::Status::kOk);
}
template <class T>
Results run_of(const test::LayerValues& v, const Ids& place = {}, std::int64_t capacity = 0) {
  Memory<T> m(v, place, capacity);
  run(m);
  Results r;
  for (const auto& [name, fetch] : m.results) r[name] = fetch();
  return r;
}

template <class T>
void agrees(const LayerShape& s, const std::string& what) {
  const test::LayerValues v = test::layer_values<T>(s);
  const Results got = run_of<T>(v), want = reference_of(v);
  const test::LayerArithmetic own = host_arithmetic<T>(), exact = host_arithmetic<double>();
  const test::LayerErrors errors = test::RunningLayer(v, own).run(), least = test::RunningLayer(v, exact).run();
  const test::NamedRows bound = test::named(errors), reference_bound = test::named(least);
  for (const auto& [name, expected] : want) {
    if (expected.empty()) continue;
    const test::Row &b = *bound.at(name), &r = *reference_bound.at(name);
    BOOST_REQUIRE_MESSAGE(b.size() == expected.size(), what << " " << name);
    test::CompareOptions o;
    o.bound = [&](std::size_t i, double) { return b[i].error + r[i].error; };
    const auto n = static_cast<std::int64_t>(expected.size());
    const auto& actual = got.at(name);
    const auto c = test::compare({{n}, expected}, {{static_cast<std::int64_t>(actual.size())}, actual}, o);
    BOOST_CHECK_MESSAGE(c.ok(), what << " of " << k::name_of(kStored<T>) << ", " << name << "\n" << c.report());
    // The running values are a derivation of their own.
    Doubles third;
    for (const test::Running& x : r) third.push_back(x.value);
    o.bound = [&](std::size_t i, double) { return 2 * r[i].error; };
    const auto d = test::compare({{n}, expected}, {{n}, third}, o);
    BOOST_CHECK_MESSAGE(d.ok(), what << " written out, " << name << "\n" << d.report());
  }
}
void agrees(const LayerShape& s, const std::string& what) {
  agrees<double>(s, what);
  agrees<float>(s, what);
  agrees<k::BFloat16>(s, what);
}

k::ExpertForm form(k::Activation a, bool gated, double alpha = 1, double limit = kInf, double offset = 0) {
  return {a, gated, alpha, limit, offset};
}
const k::ExpertForm kGptOss = form(k::Activation::kSilu, true, 1.702, 0.8, 1);  // a limit that values reach

BOOST_AUTO_TEST_CASE(activations_agree_with_the_reference) {
  const auto with = [](const k::ExpertForm& f, const std::string& what, bool bias = false) {
    LayerShape s{12, 4, 2, 16, 8};
    s.form = f, s.bias = bias;
    agrees(s, what);
  };
  with(form(k::Activation::kSilu, true), "silu, gated");
  with(form(k::Activation::kGeluTanh, true), "gelu, gated");
  with(form(k::Activation::kGeluTanh, false), "gelu");
  with(form(k::Activation::kRelu, false), "relu", true);
  with(form(k::Activation::kRelu2, false), "relu squared");
  with(kGptOss, "gpt-oss", true);
  with(form(k::Activation::kSilu, true, 1, 0.8), "limit alone");
  LayerShape input{17, 4, 2, 16, 8};
  input.weight_on = k::WeightOn::kInput, input.bias = true, input.rank = 2, input.shared_width = 8;
  agrees(input, "weights on the inputs");
}

BOOST_AUTO_TEST_CASE(shapes_agree_with_the_reference) {
  for (const bool adapted : {false, true}) {
    for (const LayerShape& shape :
         {LayerShape{1, 1, 1, 8, 8}, LayerShape{1, 8, 8, 8, 16}, LayerShape{0, 4, 2, 8, 8}, LayerShape{17, 6, 3, 16, 8},
          LayerShape{140, 2, 1, 8, 8}, LayerShape{5, 4, 2, 136, 24}, LayerShape{6, 144, 6, 8, 8},
          LayerShape{5, 160, 32, 8, 8}, LayerShape{9, 384, 8, 8, 8}}) {
      LayerShape s = shape;
      if (adapted) s.rank = 8, s.shared_width = 16, s.shared_gate = s.tokens % 2 == 1, s.bias = s.experts < 100;
      if (s.experts > 100 && adapted) s.rank = 0;
      agrees(s, std::to_string(s.tokens) + "x" + std::to_string(s.experts) + "/" + std::to_string(s.top_k) +
                    (adapted ? " with shared expert" : ""));
    }
  }
  LayerShape one{40, 4, 1, 8, 8};
  one.how = LayerShape::kOneExpert;
  agrees(one, "all on one expert");
  LayerShape none{4, 4, 2, 8, 8};
  none.how = LayerShape::kNoneAtAll, none.shared_width = 8;
  agrees(none, "everything dropped");
}

/// Values below the smallest normal number come through with the absolute error that underflow has.
BOOST_AUTO_TEST_CASE(denormals_agree_with_the_reference) {
  LayerShape s{6, 3, 2, 8, 8};
  s.scale = 1e-40;
  agrees<float>(s, "denormals");
  agrees<k::BFloat16>(s, "denormals");
  s.scale = 1e-310;
  agrees<double>(s, "denormals");
}

/// Autograd and the written-out gradients share the forward formula; differences of the loss do not share theirs.
BOOST_AUTO_TEST_CASE(gradients_are_slopes_of_the_loss) {
  LayerShape s{5, 3, 2, 6, 4};
  s.rank = 2, s.shared_width = 4, s.shared_gate = true, s.bias = true;
  s.form = form(k::Activation::kSilu, true, 1.702, 7, 1);  // nothing at the limit: the loss is smooth
  const test::LayerValues v = test::layer_values<double>(s);
  const Results g = run_of<double>(v);
  const auto loss = [](const test::LayerValues& at) {
    const Results r = run_of<double>(at);
    long double sum = 0;
    for (std::size_t i = 0; i < at.d_y.size(); ++i) sum += static_cast<long double>(r.at("y")[i]) * at.d_y[i];
    return static_cast<double>(sum);
  };
  const auto check = [&](const std::string& name, Doubles test::LayerValues::*member, auto&& inner) {
    test::LayerValues moved = v;
    Doubles& values = inner(moved, member);
    for (std::size_t i = 0; i < values.size(); i += 1 + values.size() / 12) {
      const double before = values[i], h = 1e-5;
      values[i] = before + h;
      const double above = loss(moved);
      values[i] = before - h;
      const double below = loss(moved);
      values[i] = before;
      // Central differences: h^2 / 6 of the third derivative (at most some hundreds here), and 1e-13 / h of rounding.
      BOOST_CHECK_SMALL((above - below) / (2 * h) - g.at(name)[i], 1e-7);
    }
  };
  const auto plain = [](test::LayerValues& l, Doubles test::LayerValues::*m) -> Doubles& { return l.*m; };
  check("d x", &test::LayerValues::x, plain);
  check("d weights", &test::LayerValues::weights, plain);
  check("d shared gate", &test::LayerValues::shared_gate, plain);
  const auto of = [&](test::LinearValues test::LayerValues::*linear, const std::string& name) {
    check("d " + name, nullptr, [&](auto& l, auto) -> Doubles& { return (l.*linear).weight; });
    check("d " + name + " bias", nullptr, [&](auto& l, auto) -> Doubles& { return (l.*linear).bias; });
    check("d " + name + " lora A", nullptr, [&](auto& l, auto) -> Doubles& { return (l.*linear).lora_a; });
    check("d " + name + " lora B", nullptr, [&](auto& l, auto) -> Doubles& { return (l.*linear).lora_b; });
  };
  of(&test::LayerValues::gate_up, "gate_up");
  of(&test::LayerValues::down, "down");
  of(&test::LayerValues::shared_gate_up, "shared gate_up");
  of(&test::LayerValues::shared_down, "shared down");
}

// ---- transformers' blocks
// --------------------------------------------------------------------------------------------------

using Json = nlohmann::json;

/// [lines, rows, columns] to [lines, columns, rows].
Doubles transposed(const Doubles& v, std::size_t rows, std::size_t columns) {
  Doubles out(v.size());
  for (std::size_t i = 0; i < v.size(); ++i) {
    const std::size_t line = i / (rows * columns), r = i / columns % rows, c = i % columns;
    out[(line * columns + c) * rows + r] = v[i];
  }
  return out;
}
/// Pairs of (gate, up) along `rows` of [lines, rows, columns] to halves.
Doubles halves(const Doubles& v, std::size_t rows, std::size_t columns) {
  Doubles out(v.size());
  for (std::size_t i = 0; i < v.size(); ++i) {
    const std::size_t line = i / (rows * columns), r = i / columns % rows, c = i % columns;
    out[(line * rows + r % 2 * (rows / 2) + r / 2) * columns + c] = v[i];
  }
  return out;
}
Doubles joined(std::vector<Doubles> parts) {
  Doubles out;
  for (const Doubles& p : parts) out.insert(out.end(), p.begin(), p.end());
  return out;
}

struct Golden {
  Json file, block;
  std::size_t experts, hidden, width;
  explicit Golden(const std::string& name) {
    std::ifstream in(MOE_AUDIT_SOURCE_DIR "/fixtures/golden/moe_layer.json");
    file = Json::parse(in);
    block = file.at("blocks").at(name);
    experts = file.at("experts"), hidden = file.at("hidden"), width = file.at("width");
  }
  test::LayerValues values() const {
    test::LayerValues v;
    v.tokens = file.at("tokens"), v.top_k = file.at("top_k");
    v.experts = static_cast<std::int64_t>(experts), v.hidden = static_cast<std::int64_t>(hidden);
    v.width = static_cast<std::int64_t>(width);
    v.x = block.at("x").get<Doubles>(), v.d_y = block.at("d_y").get<Doubles>();
    v.chosen = block.at("chosen").get<Ids>(), v.weights = block.at("weights").get<Doubles>();
    for (Doubles* d : {&v.x, &v.d_y, &v.weights}) {
      for (double& x : *d) x = static_cast<double>(static_cast<float>(x));  // 9 digits of a float32
    }
    return v;
  }
};

/// Parameters or their gradients into the layer's layout; same for both.
using Layout = std::function<void(const Json& p, const Golden& g, test::LayerValues* v)>;

void stacks(const Json& p, const std::string& first, const std::string& second, test::LayerValues* v) {
  v->gate_up.weight = p.at(first).get<Doubles>();
  v->down.weight = p.at(second).get<Doubles>();
}
void shared(const Json& p, const std::string& name, bool gated, test::LayerValues* v) {
  const Doubles up = p.at(name + "up_proj.weight").get<Doubles>();
  v->shared_gate_up.weight = gated ? joined({p.at(name + "gate_proj.weight").get<Doubles>(), up}) : up;
  v->shared_down.weight = p.at(name + "down_proj.weight").get<Doubles>();
  v->shared_width = static_cast<std::int64_t>(v->shared_down.weight.size()) / v->hidden;
}

void matches_golden(const std::string& name, const k::ExpertForm& form, const Layout& layout) {
  const Golden g(name);
  test::LayerValues v = g.values(), gradient = v;
  v.form = form;
  layout(g.block.at("parameters"), g, &v);
  for (test::LinearValues* l : {&v.gate_up, &v.down, &v.shared_gate_up, &v.shared_down}) {
    for (Doubles* d : {&l->weight, &l->bias, &l->lora_a, &l->lora_b}) {
      for (double& x : *d) x = static_cast<double>(static_cast<float>(x));
    }
  }
  for (double& x : v.shared_gate) x = static_cast<double>(static_cast<float>(x));
  const Json& wide = g.block.at("float64");
  layout(wide.at("gradients"), g, &gradient);
  Results want = {{"y", wide.at("y").get<Doubles>()},
                  {"d x", wide.at("d_x").get<Doubles>()},
                  {"d gate_up", gradient.gate_up.weight},
                  {"d down", gradient.down.weight},
                  {"d gate_up bias", gradient.gate_up.bias},
                  {"d down bias", gradient.down.bias},
                  {"d gate_up lora A", gradient.gate_up.lora_a},
                  {"d gate_up lora B", gradient.gate_up.lora_b},
                  {"d down lora A", gradient.down.lora_a},
                  {"d down lora B", gradient.down.lora_b},
                  {"d shared gate_up", gradient.shared_gate_up.weight},
                  {"d shared down", gradient.shared_down.weight},
                  {"d shared gate", gradient.shared_gate}};
  if (wide.contains("d_weights")) want["d weights"] = wide.at("d_weights").get<Doubles>();
  const auto check = [&](const Results& expected, const Results& got, const test::LayerArithmetic& library,
                         const test::LayerArithmetic& own, const std::string& what) {
    const test::LayerErrors a = test::RunningLayer(v, library).run(), b = test::RunningLayer(v, own).run();
    const test::NamedRows of_library = test::named(a), of_kernel = test::named(b);
    std::size_t compared = 0;
    for (const auto& [key, e] : expected) {
      if (e.empty()) continue;
      const test::Row &x = *of_library.at(key), &y = *of_kernel.at(key);
      BOOST_REQUIRE_MESSAGE(x.size() == e.size() && got.at(key).size() == e.size(), name << " " << key);
      Doubles actual = got.at(key), kept = e;
      test::CompareOptions o;
      if (key == "d gate_up lora B" && g.block.contains("rank")) {
        // Blocks of the joined matrix that separate adapters do not have.
        for (std::size_t i = 0; i < kept.size(); ++i) actual[i] = std::isnan(kept[i]) ? 0 : actual[i];
        for (double& d : kept) d = std::isnan(d) ? 0 : d;
      }
      o.bound = [&](std::size_t i, double) { return x[i].error + y[i].error; };
      const auto n = static_cast<std::int64_t>(e.size());
      const auto c = test::compare({{n}, kept}, {{n}, actual}, o);
      BOOST_CHECK_MESSAGE(c.ok(), name << " " << what << " " << key << "\n" << c.report());
      compared += e.size();
    }
    BOOST_CHECK(compared > 80);
  };
  test::LayerArithmetic library = host_arithmetic<double>();
  check(want, run_of<double>(v), library, library, "float64");
  if (!g.block.contains("float32")) return;
  const Json& narrow = g.block.at("float32");
  library = host_arithmetic<float>();
  library.elementwise = k::Float::kF32;
  check({{"y", narrow.at("y").get<Doubles>()},
         {"d x", narrow.at("d_x").get<Doubles>()},
         {"d weights", narrow.at("d_weights").get<Doubles>()}},
        run_of<float>(v), library, host_arithmetic<float>(), "float32");
}

BOOST_AUTO_TEST_CASE(blocks_of_transformers) {
  const k::ExpertForm plain;
  matches_golden("mixtral", plain, [](const Json& p, const Golden&, test::LayerValues* v) {
    stacks(p, "experts.gate_up_proj", "experts.down_proj", v);
  });
  matches_golden("qwen2_moe", plain, [](const Json& p, const Golden&, test::LayerValues* v) {
    stacks(p, "experts.gate_up_proj", "experts.down_proj", v);
    shared(p, "shared_expert.", true, v);
    v->shared_gate = p.at("shared_expert_gate.weight").get<Doubles>();
  });
  matches_golden("deepseek_v3", plain, [](const Json& p, const Golden&, test::LayerValues* v) {
    stacks(p, "experts.gate_up_proj", "experts.down_proj", v);
    shared(p, "shared_experts.", true, v);
  });
  // Input-major, gate and up in turns; biases.
  matches_golden("gpt_oss", form(k::Activation::kSilu, true, 1.702, 0.75, 1),
                 [](const Json& p, const Golden& g, test::LayerValues* v) {
                   v->gate_up.weight =
                       halves(transposed(p.at("experts.gate_up_proj").get<Doubles>(), g.hidden, 2 * g.width),
                              2 * g.width, g.hidden);
                   v->gate_up.bias = halves(p.at("experts.gate_up_proj_bias").get<Doubles>(), 2 * g.width, 1);
                   v->down.weight = transposed(p.at("experts.down_proj").get<Doubles>(), g.width, g.hidden);
                   v->down.bias = p.at("experts.down_proj_bias").get<Doubles>();
                 });
  matches_golden("nemotron_h", form(k::Activation::kRelu2, false),
                 [](const Json& p, const Golden&, test::LayerValues* v) {
                   stacks(p, "experts.up_proj", "experts.down_proj", v);
                   shared(p, "shared_experts.", false, v);
                 });
  matches_golden("deepseek_v4_experts", form(k::Activation::kSilu, true, 1, 0.75),
                 [](const Json& p, const Golden&, test::LayerValues* v) { stacks(p, "gate_up_proj", "down_proj", v); });
}

/// Weights on the inputs; input-major, gate and up in halves; the shared expert as wide as the others.
BOOST_AUTO_TEST_CASE(block_of_llama_4) {
  matches_golden("llama4", {}, [](const Json& p, const Golden& g, test::LayerValues* v) {
    v->weight_on = k::WeightOn::kInput;
    v->gate_up.weight = transposed(p.at("experts.gate_up_proj").get<Doubles>(), g.hidden, 2 * g.width);
    v->down.weight = transposed(p.at("experts.down_proj").get<Doubles>(), g.width, g.hidden);
    shared(p, "shared_expert.", true, v);
  });
}

/// PEFT's adapters of w1, w2 and w3 as the layer takes them; NaN marks blocks of B that PEFT does not have.
BOOST_AUTO_TEST_CASE(experts_that_peft_adapted) {
  matches_golden("mixtral_lora", {}, [](const Json& p, const Golden& g, test::LayerValues* v) {
    const bool values = &p == &g.block.at("parameters");
    const auto rank = g.block.at("rank").get<std::size_t>();
    for (std::size_t e = 0; e < g.experts; ++e) {
      const auto of = [&](const std::string& matrix, const std::string& part) {
        return p.at("experts." + std::to_string(e) + "." + matrix + "." + part + ".weight").get<Doubles>();
      };
      const auto append = [](Doubles* to, const Doubles& more) { to->insert(to->end(), more.begin(), more.end()); };
      append(&v->gate_up.weight, joined({of("w1", "base_layer"), of("w3", "base_layer")}));
      append(&v->gate_up.lora_a, joined({of("w1", "lora_A.default"), of("w3", "lora_A.default")}));
      for (const std::string matrix : {"w1", "w3"}) {
        const Doubles b = of(matrix, "lora_B.default"), empty(rank, values ? 0.0 : std::nan(""));
        for (std::size_t n = 0; n < g.width; ++n) {
          const Doubles row(b.begin() + static_cast<long>(n * rank), b.begin() + static_cast<long>((n + 1) * rank));
          append(&v->gate_up.lora_b, matrix == "w1" ? joined({row, empty}) : joined({empty, row}));
        }
      }
      append(&v->down.weight, of("w2", "base_layer"));
      append(&v->down.lora_a, of("w2", "lora_A.default"));
      append(&v->down.lora_b, of("w2", "lora_B.default"));
    }
    v->gate_up.rank = 2 * static_cast<std::int64_t>(rank), v->down.rank = static_cast<std::int64_t>(rank);
    v->gate_up.scaling = v->down.scaling = g.block.at("scaling").get<double>();
  });
}

// ---- laws
// ------------------------------------------------------------------------------------------------------------------

/// Experts under other numbers: the same bits, since the sum over the choices runs in the order of rank.
BOOST_AUTO_TEST_CASE(names_of_experts_do_not_matter) {
  LayerShape s{20, 5, 2, 16, 8};
  s.rank = 4, s.bias = true;
  const test::LayerValues v = test::layer_values<float>(s);
  test::LayerValues w = v;
  for (std::int32_t& e : w.chosen) e = e < 0 ? e : (e + 2) % 5;
  const auto turn = [](Doubles& d) {
    const auto each = static_cast<std::ptrdiff_t>(d.size() / 5);
    std::rotate(d.begin(), d.end() - 2 * each, d.end());
  };
  for (test::LinearValues* l : {&w.gate_up, &w.down}) turn(l->weight), turn(l->bias), turn(l->lora_a), turn(l->lora_b);
  Results a = run_of<float>(v), b = run_of<float>(w);
  BOOST_CHECK(a.at("y") == b.at("y"));
  BOOST_CHECK(a.at("d x") == b.at("d x"));
  BOOST_CHECK(a.at("d weights") == b.at("d weights"));
  turn(a.at("d gate_up")), turn(a.at("d down lora B"));
  BOOST_CHECK(a.at("d gate_up") == b.at("d gate_up"));
  BOOST_CHECK(a.at("d down lora B") == b.at("d down lora B"));
}

/// Rows padded to a capacity that drops nothing: the same bits, gradients included.
BOOST_AUTO_TEST_CASE(padding_changes_nothing) {
  LayerShape s{30, 6, 2, 16, 8};
  s.bias = true, s.rank = 4, s.shared_width = 8;
  const test::LayerValues v = test::layer_values<float>(s);
  Ids place(v.chosen.size());
  k::DropArgs<float> d;
  d.chosen = v.chosen.data(), d.tokens = 30, d.experts = 6, d.top_k = 2, d.capacity = 40;
  d.order = k::DropOrder::kTokens;
  BOOST_REQUIRE(k::drop(d, {place.data(), nullptr, nullptr, nullptr, nullptr}) == k::Status::kOk);
  const Results close = run_of<float>(v), padded = run_of<float>(v, place, 40);
  for (const auto& [name, values] : close) {
    if (name == "y" || name.rfind("d ", 0) == 0) BOOST_CHECK_MESSAGE(values == padded.at(name), name);
  }
}

/// W + s B A in one matrix gives what the adapter beside it gives, to rounding; and so do adapters of gate and up on
/// their own as one of twice the rank.
BOOST_AUTO_TEST_CASE(merged_adapters_give_the_same_layer) {
  LayerShape s{10, 3, 2, 8, 6};
  s.rank = 2;
  const test::LayerValues v = test::layer_values<double>(s);
  test::LayerValues merged = v, stacked = v;
  for (test::LinearValues* l : {&merged.gate_up, &merged.down}) {
    const auto rank = static_cast<std::size_t>(l->rank), experts = std::size_t{3},
               inputs = l->lora_a.size() / rank / experts, outputs = l->lora_b.size() / rank / experts;
    for (std::size_t e = 0; e < experts; ++e) {
      for (std::size_t n = 0; n < outputs; ++n) {
        for (std::size_t i = 0; i < inputs; ++i) {
          for (std::size_t q = 0; q < rank; ++q)
            l->weight[(e * outputs + n) * inputs + i] +=
                l->scaling * l->lora_b[(e * outputs + n) * rank + q] * l->lora_a[(e * rank + q) * inputs + i];
        }
      }
    }
    l->lora_a.clear(), l->lora_b.clear(), l->rank = 0;
  }
  // A of [gate; up] one above the other, B in blocks: the first rank for gate rows, the second for up rows.
  stacked.gate_up.rank = 4;
  stacked.gate_up.lora_a.clear();
  stacked.gate_up.lora_b.assign(v.gate_up.lora_b.size() * 2, 0.0);
  for (std::size_t e = 0; e < 3; ++e) {
    for (int half = 0; half < 2; ++half)
      stacked.gate_up.lora_a.insert(stacked.gate_up.lora_a.end(), v.gate_up.lora_a.begin() + static_cast<long>(e) * 16,
                                    v.gate_up.lora_a.begin() + static_cast<long>(e + 1) * 16);
    for (std::size_t n = 0; n < 12; ++n) {
      for (std::size_t q = 0; q < 2; ++q)
        stacked.gate_up.lora_b[(e * 12 + n) * 4 + (n < 6 ? 0 : 2) + q] = v.gate_up.lora_b[(e * 12 + n) * 2 + q];
    }
  }
  const Results beside = run_of<double>(v), inside = run_of<double>(merged), blocks = run_of<double>(stacked);
  const test::LayerErrors least = test::RunningLayer(v, host_arithmetic<double>()).run();
  const test::NamedRows bound = test::named(least);
  for (const std::string name : {"y", "d x", "d weights", "d gate_up", "d down"}) {
    for (std::size_t i = 0; i < beside.at(name).size(); ++i) {
      const double limit = 4 * (*bound.at(name))[i].error;  // both sides, and the merge
      BOOST_CHECK_SMALL(beside.at(name)[i] - inside.at(name)[i], limit);
      BOOST_CHECK_SMALL(beside.at(name)[i] - blocks.at(name)[i], limit);
    }
  }
}

/// What is not finite stays with its token: the others keep their bits. Its experts' gradients go bad.
BOOST_AUTO_TEST_CASE(what_is_not_finite_stays_with_its_token) {
  LayerShape s{8, 4, 2, 8, 8};
  s.shared_width = 8, s.shared_gate = true;
  for (const double bad : {std::nan(""), kInf, -kInf}) {
    const test::LayerValues v = test::layer_values<float>(s);
    test::LayerValues w = v;
    w.x[3 * 8 + 5] = bad;
    const Results a = run_of<float>(v), b = run_of<float>(w);
    bool spoilt = false;
    for (std::size_t i = 0; i < 64; ++i) {
      const bool own = i / 8 == 3;
      if (!own) BOOST_CHECK(a.at("y")[i] == b.at("y")[i] && a.at("d x")[i] == b.at("d x")[i]);
      spoilt |= own && !std::isfinite(b.at("y")[i]);
    }
    BOOST_CHECK(spoilt);
    for (std::int32_t e = 0; e < 4; ++e) {
      const bool used = v.chosen[6] == e || v.chosen[7] == e;
      bool all_same = true;
      for (std::size_t i = 0; i < 128; ++i) {
        const std::size_t at = static_cast<std::size_t>(e) * 128 + i;
        all_same &= a.at("d gate_up")[at] == b.at("d gate_up")[at];
      }
      BOOST_CHECK(all_same == !used);
    }
  }
}

// ---- chunks of tokens, one after the other (MPipeMoE, arXiv 2506.22175; micro-batches; pipelined dispatch)
// ---------------------------------------------------------------------------------------------------------------------

/// Tokens [first, first + count).
test::LayerValues slice(const test::LayerValues& v, std::int64_t first, std::int64_t count) {
  test::LayerValues w = v;
  const auto cut = [&](auto& values, std::int64_t each) {
    values.erase(values.begin() + (first + count) * each, values.end());
    values.erase(values.begin(), values.begin() + first * each);
  };
  w.tokens = count;
  cut(w.x, v.hidden), cut(w.d_y, v.hidden), cut(w.weights, v.top_k), cut(w.chosen, v.top_k);
  return w;
}

/// Results of `chunks` equal chunks: what belongs to tokens side by side, gradients of weights added up. places: of
/// each chunk on its own, capacity shared out evenly; empty: dropless.
Results in_chunks(const test::LayerValues& v, std::int64_t chunks,
                  const std::function<Ids(const test::LayerValues&)>& places, std::int64_t capacity) {
  Results all;
  for (std::int64_t c = 0; c < chunks; ++c) {
    const test::LayerValues part = slice(v, c * v.tokens / chunks, v.tokens / chunks);
    const Results r = places ? run_of<double>(part, places(part), capacity) : run_of<double>(part);
    for (const auto& [name, values] : r) {
      const bool of_tokens = name == "y" || name == "d x" || name == "d weights";
      if (!of_tokens && name.rfind("d ", 0) != 0) continue;
      Doubles& to = all[name];
      if (of_tokens || to.empty()) {
        to.insert(to.end(), values.begin(), values.end());
      } else {
        for (std::size_t i = 0; i < values.size(); ++i) to[i] += values[i];
      }
    }
  }
  return all;
}

BOOST_AUTO_TEST_CASE(dropless_chunks_equal_the_whole_batch) {
  LayerShape s{48, 6, 2, 8, 8};
  s.rank = 2, s.bias = true, s.shared_width = 8, s.shared_gate = true;
  const test::LayerValues v = test::layer_values<double>(s);
  const Results whole = run_of<double>(v);
  const test::LayerErrors least = test::RunningLayer(v, host_arithmetic<double>()).run();
  const test::NamedRows bound = test::named(least);
  for (const std::int64_t chunks : {2, 3, 16, 48}) {  // in the last, most experts see no token
    for (const auto& [name, values] : in_chunks(v, chunks, {}, 0)) {
      // Values of tokens are sums of their own: the same bits. Gradients of weights are the same sum in another order.
      const bool bits = name == "y" || name == "d x" || name == "d weights";
      for (std::size_t i = 0; i < values.size(); ++i) {
        if (bits)
          BOOST_CHECK(values[i] == whole.at(name)[i]);
        else
          BOOST_CHECK_MESSAGE(std::fabs(values[i] - whole.at(name)[i]) <= 2 * (*bound.at(name))[i].error,
                              chunks << " chunks, " << name << " at " << i);
      }
    }
  }
}

struct Kept {
  Ids place;
  std::int64_t dropped = 0;
};
Kept keep(const Ids& chosen, std::int64_t tokens, std::int64_t experts, std::int64_t top_k, std::int64_t places) {
  Kept r;
  r.place.resize(chosen.size());
  k::DropArgs<double> d;
  d.chosen = chosen.data(), d.tokens = tokens, d.experts = experts, d.top_k = top_k, d.capacity = places;
  d.order = k::DropOrder::kTokens;
  BOOST_REQUIRE(k::drop(d, {r.place.data(), nullptr, nullptr, &r.dropped, nullptr}) == k::Status::kOk);
  return r;
}
std::int64_t places_of(std::int64_t tokens, std::int64_t experts, std::int64_t top_k, double factor) {
  k::CapacityArgs a;
  a.tokens = tokens, a.experts = experts, a.top_k = top_k, a.factor = factor;
  std::int64_t places = 0;
  BOOST_REQUIRE(k::capacity(a, &places) == k::Status::kOk);
  return places;
}

/// A capacity for each chunk drops others, and more: sum_c max(0, n_c - C / n) >= max(0, sum_c n_c - C).
BOOST_AUTO_TEST_CASE(capacity_of_each_chunk_is_another_layer) {
  // Experts 0 0 0 1 | 0 1 1 1, factor 1: 4 places for the batch hold all, 2 for each half lose tokens 2 and 7.
  const Ids halves = {0, 0, 0, 1, 0, 1, 1, 1};
  BOOST_TEST(keep(halves, 8, 2, 1, 4).dropped == 0);
  BOOST_TEST(keep({0, 0, 0, 1}, 4, 2, 1, 2).place == (Ids{0, 1, -1, 0}), boost::test_tools::per_element());
  BOOST_TEST(keep({0, 1, 1, 1}, 4, 2, 1, 2).place == (Ids{0, 0, 1, -1}), boost::test_tools::per_element());

  LayerShape s{256, 8, 2, 8, 8};
  test::LayerValues v = test::layer_values<double>(s);
  for (std::size_t i = 0; i < v.chosen.size(); ++i) {  // a routing that drifts: the favourite moves along the batch
    const std::size_t t = i / 2;
    if (t % 3 == 0) v.chosen[i] = static_cast<std::int32_t>((t / 32 + i % 2) % 8);
  }
  const double factor = 1.25;
  const std::int64_t places = places_of(256, 8, 2, factor);
  const Kept all = keep(v.chosen, 256, 8, 2, places);
  const Results whole = run_of<double>(v, all.place, places);
  double size = 0;
  for (const double y : whole.at("y")) size += y * y;
  std::int64_t before = all.dropped;
  for (const std::int64_t chunks : {2, 4, 8, 16}) {
    const std::int64_t tokens = 256 / chunks, each = places_of(tokens, 8, 2, factor);
    BOOST_REQUIRE(each * chunks == places);  // nothing is lost to rounding
    std::int64_t dropped = 0;
    const Results parts = in_chunks(
        v, chunks,
        [&](const test::LayerValues& part) {
          const Kept kept = keep(part.chosen, tokens, 8, 2, each);
          dropped += kept.dropped;
          return kept.place;
        },
        each);
    double off = 0;
    for (std::size_t i = 0; i < parts.at("y").size(); ++i) {
      const double d = parts.at("y")[i] - whole.at("y")[i];
      off += d * d;
    }
    BOOST_TEST_MESSAGE(chunks << " chunks of " << tokens << " tokens: " << dropped << " choices dropped, "
                              << all.dropped << " by the whole batch; y off by " << std::sqrt(off / size)
                              << " of its size");
    BOOST_CHECK(dropped >= before);
    BOOST_CHECK(off > 0);
    before = dropped;
    // The places of the whole batch, handed out chunk by chunk: the whole batch's layer, to the bit.
    std::int64_t first = 0;
    const Results counted_on = in_chunks(
        v, chunks,
        [&](const test::LayerValues& part) {
          const auto from = all.place.begin() + first * 2;
          first += part.tokens;
          return Ids(from, from + part.tokens * 2);
        },
        places);
    BOOST_CHECK(counted_on.at("y") == whole.at("y"));
    BOOST_CHECK(counted_on.at("d x") == whole.at("d x"));
  }
  BOOST_CHECK(before > all.dropped);
}

/// The balance loss is a product of two means over its tokens: over chunks it is another loss, unless counts and
/// probabilities are added up before the product.
BOOST_AUTO_TEST_CASE(balance_loss_of_each_chunk_is_another_loss) {
  const auto loss = [](const Doubles& p, const Ids& chosen, std::int64_t experts, std::int64_t top_k,
                       const std::vector<std::int64_t>& sets, Doubles* gradient) {
    k::BalanceLossArgs<double> a;
    a.probabilities = p.data(), a.chosen = chosen.data();
    a.experts = experts, a.top_k = top_k, a.tokens = static_cast<std::int64_t>(p.size()) / experts;
    a.sets = sets.data(), a.num_sets = static_cast<std::int64_t>(sets.size()) - 1;
    double value = 0;
    gradient->resize(p.size());
    k::BalanceLossResult<double> r;
    r.loss = &value, r.gradient = gradient->data();
    BOOST_REQUIRE(k::balance_loss(a, r) == k::Status::kOk);
    return value;
  };
  Doubles whole, parts;
  // Each half all on one expert: 2 in each, 1 over both, where they balance out. Gradients: 1 / T for either expert
  // over the batch, 2 / T for the one that its half uses in chunks.
  const Doubles p = {1, 0, 1, 0, 0, 1, 0, 1};
  const Ids chosen = {0, 0, 1, 1};
  BOOST_TEST(loss(p, chosen, 2, 1, {0, 4}, &whole) == 1.0);
  BOOST_TEST(loss(p, chosen, 2, 1, {0, 2, 4}, &parts) == 2.0);
  BOOST_TEST(whole == Doubles(8, 0.25), boost::test_tools::per_element());
  BOOST_TEST(parts == (Doubles{0.5, 0, 0.5, 0, 0, 0.5, 0, 0.5}), boost::test_tools::per_element());

  // Softmax routing of 256 tokens whose favourite moves along the batch.
  std::vector<float> g(256 * 8);
  k::unit_gaussians(23, 77, 0, 256 * 8, g.data());
  Doubles soft;
  Ids best;
  for (std::size_t t = 0; t < 256; ++t) {
    Doubles z(8);
    double sum = 0;
    for (std::size_t e = 0; e < 8; ++e)
      sum += z[e] = std::exp(static_cast<double>(g[t * 8 + e]) + (t / 32 == e ? 1.5 : 0));
    for (std::size_t e = 0; e < 8; ++e) soft.push_back(z[e] / sum);
    best.push_back(static_cast<std::int32_t>(std::max_element(z.begin(), z.end()) - z.begin()));
  }
  const double together = loss(soft, best, 8, 1, {0, 256}, &whole);
  for (const std::int64_t chunks : {2, 4, 8, 16}) {
    std::vector<std::int64_t> sets;
    for (std::int64_t c = 0; c <= chunks; ++c) sets.push_back(c * 256 / chunks);
    const double apart = loss(soft, best, 8, 1, sets, &parts);
    double off = 0, size = 0;
    for (std::size_t i = 0; i < whole.size(); ++i)
      off += (parts[i] - whole[i]) * (parts[i] - whole[i]), size += whole[i] * whole[i];
    BOOST_TEST_MESSAGE("balance loss " << together << " over 256 tokens, " << apart << " over " << chunks
                                       << " chunks; its gradient off by " << std::sqrt(off / size) << " of its size");
    BOOST_CHECK(apart > together * 1.05);
    BOOST_CHECK(off > 0.01 * size);
  }
  // f over the batch, P over each chunk: the mean over chunks is the loss of the batch (global-batch form).
  std::vector<std::int64_t> counts(8), sets = {0, 64, 128, 192, 256}, all, tokens(4, 256);
  for (const std::int32_t e : best) ++counts[static_cast<std::size_t>(e)];
  for (int c = 0; c < 4; ++c) all.insert(all.end(), counts.begin(), counts.end());
  k::BalanceLossArgs<double> a;
  a.probabilities = soft.data(), a.tokens = 256, a.experts = 8, a.top_k = 1, a.sets = sets.data(), a.num_sets = 4;
  a.counts = all.data(), a.counted_tokens = tokens.data();
  double value = 0;
  k::BalanceLossResult<double> r;
  r.loss = &value;
  BOOST_REQUIRE(k::balance_loss(a, r) == k::Status::kOk);
  BOOST_CHECK_SMALL(value - together, together * k::bounds::balance_loss_in_any_order(256, 8, 4) * 2);
}

BOOST_AUTO_TEST_CASE(refusals) {
  LayerShape s{4, 4, 2, 8, 8};
  const test::LayerValues v = test::layer_values<float>(s);
  const auto status = [&v](auto&& change) {
    Memory<float> m(v);
    change(m);
    return k::moe_layer(m.args, m.state, m.y);
  };
  BOOST_CHECK(status([](auto&) {}) == k::Status::kOk);
  BOOST_CHECK(status([](auto& m) { m.args.x = nullptr; }) == k::Status::kNullPointer);
  BOOST_CHECK(status([](auto& m) { m.args.routed.down.weight = nullptr; }) == k::Status::kNullPointer);
  BOOST_CHECK(status([](auto& m) { m.state.routed.activated = nullptr; }) == k::Status::kNullPointer);
  BOOST_CHECK(status([](auto& m) { m.state.permutation.offsets = nullptr; }) == k::Status::kNullPointer);
  BOOST_CHECK(status([](auto& m) { m.args.routed.gate_up.rank = 2; }) == k::Status::kNullPointer);
  BOOST_CHECK(status([](auto& m) { m.args.routed.gate_up.rank = -1; }) == k::Status::kBadShape);
  BOOST_CHECK(status([](auto& m) { m.args.routed.width = 0; }) == k::Status::kBadShape);
  BOOST_CHECK(status([](auto& m) { m.args.experts = 2; }) == k::Status::kBadShape);  // an id beyond them
  BOOST_CHECK(status([](auto& m) { m.args.top_k = 0; }) == k::Status::kBadTopK);
  BOOST_CHECK(status([](auto& m) { m.args.form.limit = 0; }) == k::Status::kBadOption);
  BOOST_CHECK(status([](auto& m) { m.args.form.alpha = std::nan(""); }) == k::Status::kBadOption);
  BOOST_CHECK(status([](auto& m) { m.args.shared_gate = m.args.x; }) == k::Status::kBadOption);
  k::GroupedGemmArgs<float> g;
  const std::vector<std::int64_t> offsets = {0, 3, 2};
  const std::vector<float> some(64, 1.0f);
  std::vector<float> out(64);
  g.left = some.data(), g.right = some.data(), g.out = out.data(), g.offsets = offsets.data();
  g.experts = 2, g.rows = 4, g.inputs = 2, g.outputs = 2;
  BOOST_CHECK(k::grouped_gemm(g) == k::Status::kBadShape);
  g.product = k::GroupedProduct::kInput, g.bias = some.data();
  BOOST_CHECK(k::grouped_gemm(g) == k::Status::kBadOption);
}

}  // namespace
