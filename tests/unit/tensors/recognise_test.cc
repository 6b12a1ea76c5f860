// Experts found by shape in models nobody described.
#include "audit/tensors/recognise.h"

#include "tests/unit/measures/fixture_model.h"

namespace moeaudit {
namespace {

using namespace test;

Recognised recognise(const std::function<void(WeightFile&)>& fill) {
  const TempTree tree;
  WeightFile file;
  fill(file);
  return recognise_moe(open_weights(tree.write("model.safetensors", file.text())));
}

/// Layers 1 and 2 of Megatron-like names: attention, a router, experts.
void add_layer(WeightFile& f, int layer, int experts, const std::string& experts_name, const std::string& router) {
  const std::string at = "decoder.layers." + std::to_string(layer) + ".";
  f.add_zeros(at + "self_attention.linear_qkv.weight", {48, 16});
  for (int e = 0; e < experts; ++e) {
    f.add_zeros(at + experts_name + "." + std::to_string(e) + ".linear_fc1.weight", {24, 16});
    f.add_zeros(at + experts_name + "." + std::to_string(e) + ".linear_fc2.weight", {16, 12});
  }
  if (!router.empty()) f.add_zeros(at + router, {experts, 16});
}

TEST(Recognise, ExpertsByNumber) {
  const Recognised r = recognise([](WeightFile& f) {
    f.add_zeros("decoder.layers.0.mlp.linear_fc1.weight", {24, 16});
    add_layer(f, 1, 4, "mlp.experts.local_experts", "mlp.router.weight");
    add_layer(f, 2, 4, "mlp.experts.local_experts", "mlp.router.weight");
  });
  EXPECT_EQ(r.layers, 2);
  EXPECT_EQ(r.experts, 4);
  EXPECT_EQ(r.hidden, 16);
  EXPECT_EQ(r.moe_layers, (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(r.router_tensor, "decoder.layers.1.mlp.router.weight");
  EXPECT_EQ(r.table.fused, (std::vector<char>{0, 0}));
}

TEST(Recognise, AMatrixOfTheRightShapeWillDoForARouter) {
  const Recognised r = recognise([](WeightFile& f) { add_layer(f, 3, 6, "ffn.experts", "ffn.layer_switch.weight"); });
  EXPECT_EQ(r.router_tensor, "decoder.layers.3.ffn.layer_switch.weight");
}

TEST(Recognise, ANamedRouterWinsOverAnotherMatrixOfItsShape) {
  const Recognised r = recognise([](WeightFile& f) {
    add_layer(f, 0, 6, "ffn.experts", "ffn.router.weight");
    f.add_zeros("decoder.layers.0.a.weight", {6, 16});
  });
  EXPECT_EQ(r.router_tensor, "decoder.layers.0.ffn.router.weight");
}

TEST(Recognise, StacksWithAndWithoutTheWord) {
  const Recognised named = recognise([](WeightFile& f) {
    f.add_zeros("model.layers.0.mlp.experts.gate_up_proj", {8, 24, 16});
    f.add_zeros("model.layers.0.mlp.switch.weight", {8, 16});
  });
  EXPECT_EQ(named.experts, 8);
  EXPECT_EQ(named.table.fused, std::vector<char>{1});
  const Recognised granite = recognise([](WeightFile& f) {
    f.add_zeros("model.layers.0.block_sparse_moe.input_linear.weight", {8, 24, 16});
    f.add_zeros("model.layers.0.block_sparse_moe.router.layer.weight", {8, 16});
  });
  EXPECT_EQ(granite.experts, 8);
  EXPECT_EQ(granite.router_tensor, "model.layers.0.block_sparse_moe.router.layer.weight");
}

TEST(Recognise, TheSelectionBiasIsFound) {
  const Recognised r = recognise([](WeightFile& f) {
    add_layer(f, 0, 4, "mlp.experts", "mlp.gate.weight");
    f.add_zeros("decoder.layers.0.mlp.gate.e_score_correction_bias", {4});
  });
  EXPECT_EQ(r.table.bias, std::vector<std::string>{"decoder.layers.0.mlp.gate.e_score_correction_bias"});
}

TEST(Recognise, WhatIsNotAnExpertLayer) {
  EXPECT_EQ(recognise([](WeightFile& f) { add_layer(f, 0, 4, "mlp.experts", ""); }).layers, 0);               // no router
  EXPECT_EQ(recognise([](WeightFile& f) { add_layer(f, 0, 4, "mlp.shared_experts", "mlp.gate.weight"); }).layers, 0);
  EXPECT_EQ(recognise([](WeightFile& f) { add_layer(f, 0, 1, "mlp.experts", "mlp.gate.weight"); }).layers, 0);  // one expert
  EXPECT_EQ(recognise([](WeightFile& f) {  // a convolution of a state-space layer and a matrix with as many rows
              f.add_zeros("model.layers.0.mamba.conv1d.weight", {32, 1, 4});
              f.add_zeros("model.layers.0.mamba.in_proj.weight", {32, 4});
            }).layers, 0);
  EXPECT_EQ(recognise([](WeightFile& f) {  // expert 2 of 4 is missing: not counted as three
              add_layer(f, 0, 2, "mlp.experts", "");
              f.add_zeros("decoder.layers.0.mlp.experts.3.linear_fc1.weight", {24, 16});
              f.add_zeros("decoder.layers.0.mlp.gate.weight", {3, 16});
            }).layers, 0);
  EXPECT_EQ(recognise_moe(TensorStore()).layers, 0);
}

}  // namespace
}  // namespace moeaudit
