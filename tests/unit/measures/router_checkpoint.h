// Small checkpoints with routers, and the router-precision measure on them.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "audit/measures/measure.h"
#include "kernels/backend.h"
#include "kernels/host/gaussian.h"

namespace moeaudit {
extern const Measure measure_router_precision;
namespace test {

/// A safetensors file of bfloat16 or float32 tensors.
class Weights {
 public:
  void add(const std::string& name, const std::vector<std::int64_t>& shape, const std::vector<float>& values,
           bool bf16 = true) {
    const std::size_t begin = data_.size();
    for (const float v : values) {
      const auto bits = std::bit_cast<std::uint32_t>(v);
      for (int byte = bf16 ? 2 : 0; byte < 4; ++byte) data_ += static_cast<char>(bits >> (8 * byte) & 0xff);
    }
    std::string dims;
    for (const std::int64_t n : shape) dims += (dims.empty() ? "" : ",") + std::to_string(n);
    header_ += (header_.empty() ? "" : ",") +
               ("\"" + name + "\":{\"dtype\":\"" + (bf16 ? "BF16" : "F32") + "\",\"shape\":[" + dims +
                "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(data_.size()) + "]}");
  }
  TensorStore open(const std::string& stem) const {
    const std::string path = testing::TempDir() + "router_precision_" + stem + ".safetensors";
    std::ofstream out(path, std::ios::binary);
    const std::string header = "{" + header_ + "}";
    const std::uint64_t length = header.size();
    for (int byte = 0; byte < 8; ++byte) out.put(static_cast<char>(length >> (8 * byte) & 0xff));
    out << header << data_;
    out.close();
    std::vector<WeightProblem> problems;
    TensorStore store = TensorStore::open(path, "model", &problems);
    EXPECT_TRUE(problems.empty());
    return store;
  }

 private:
  std::string header_, data_;
};

/// n Gaussian numbers that bfloat16 holds.
inline std::vector<float> bf16_gaussians(std::int64_t n, std::uint64_t stream, double scale) {
  std::vector<float> v(static_cast<std::size_t>(n));
  kernels::unit_gaussians(99, stream, 0, n, v.data());
  for (float& x : v) x = static_cast<float>(kernels::round_to(x * scale, kernels::Float::kBF16));
  return v;
}

struct Model {
  int layers = 4;
  std::int64_t experts = 8, hidden = 512, top_k = 2;
};

inline std::string gate_name(int layer) { return "model.layers." + std::to_string(layer) + ".mlp.gate.weight"; }

/// Gates whose logits have deviation 1 on inputs of unit RMS, and a norm weight of 1.
inline Weights weights_of(const Model& m) {
  Weights w;
  for (int layer = 0; layer < m.layers; ++layer) {
    w.add(gate_name(layer), {m.experts, m.hidden},
          bf16_gaussians(m.experts * m.hidden, static_cast<std::uint64_t>(layer),
                         1 / std::sqrt(static_cast<double>(m.hidden))));
    w.add("model.layers." + std::to_string(layer) + ".norm.weight", {m.hidden},
          std::vector<float>(static_cast<std::size_t>(m.hidden), 1.0f));
  }
  return w;
}

inline FactSheet facts_of(const Model& m) {
  FactSheet f;
  RouterTable t;
  for (int layer = 0; layer < m.layers; ++layer) {
    t.layer.push_back(layer);
    t.tensor.push_back(gate_name(layer));
    t.file.push_back("model.safetensors");
    t.dtype.push_back(DType::kBF16);
    t.experts.push_back(m.experts);
    t.hidden.push_back(m.hidden);
    t.expert_count.push_back(m.experts);
    t.expert_hidden.push_back(m.hidden);
    t.fused.push_back(0);
    t.bias.push_back("");
  }
  f.routers.set(t, Origin::kMeasured, {});
  Routing r;
  r.renormalise = true;
  r.input_norm_tensor = "model.layers.{L}.norm.weight";
  f.routing.set(r, Origin::kFamily, {});
  f.top_k.set(m.top_k, Origin::kStated, {});
  return f;
}

struct Measured {
  FactSheet facts;
  std::vector<MeasureRecord> records;
  const PrecisionTable& table() const { return facts.router_precision.value(); }
};
inline Measured measure(FactSheet facts, const TensorStore& model, const TensorStore& states = {}, int threads = 2,
                        bool replays = true, Device device = Device::kAuto,
                        std::unique_ptr<kernels::Backend> (*open_device)(std::string*) = kernels::open_cuda) {
  Measured m{std::move(facts), {}};
  const TensorStore none;
  MeasureContext ctx{m.facts, model, none, none, states, threads, replays, {}, m.records};
  ctx.device = device, ctx.open_device = open_device;
  measure_router_precision.run(ctx);
  return m;
}
inline void expect_same_tables(const Measured& one, const Measured& other) {
  ASSERT_TRUE(one.facts.router_precision.known() && other.facts.router_precision.known());
  const PrecisionTable &a = one.table(), &b = other.table();
  EXPECT_EQ(a.layer, b.layer);
  EXPECT_EQ(a.mode, b.mode);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.flipped, b.flipped);
  EXPECT_EQ(a.low, b.low);
  EXPECT_EQ(a.near_ties, b.near_ties);
  EXPECT_EQ(a.weight_error, b.weight_error);
  EXPECT_EQ(a.max_abs_logit, b.max_abs_logit);
  EXPECT_EQ(a.overflowed, b.overflowed);
}

}  // namespace test
}  // namespace moeaudit
