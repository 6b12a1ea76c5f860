// training_args.bin by class: pickle.dumps(object, protocol=2) of Python 3.11, of objects whose class has the name and
// whose
// __dict__ has the fields that the framework's own class has.
#include <gtest/gtest.h>

#include "audit/inputs/readers.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

template <std::size_t N>
std::string bytes(const char (&text)[N]) {
  return std::string(text, N - 1);
}

const std::string kSft = bytes(
    "\200\002ctrl.trainer.sft_config\012SFTConfig\012q\000)\201q\001}q\002(X\021\000\000\000model_init_kwargsq\003}"
    "q\004X\013\000\000\000torch_dtypeq\005ct"
    "orch\012bfloat16\012q\006sX\024\000\000\000router_aux_loss_coefq\007G\077\204z\341G\256\024{"
    "X\011\000\000\000deepspeedq\010NX\020\000\000\000deepspeed"
    "_pluginq\011caccelerate.utils.dataclasses\012DeepSpeedPlugin\012q\012)\201q\013}q\014X\012\000\000\000zero_"
    "stageq\015K\003sbX\012\000\000\000max_lengt"
    "hq\016NX\011\000\000\000loss_typeq\017X\003\000\000\000nllq\020ub.");
const std::string kInit = bytes(
    "\200\002ctrl.trainer.sft_config\012SFTConfig\012q\000)\201q\001}q\002X\021\000\000\000model_init_kwargsq\003}"
    "q\004X\005\000\000\000dtypeq\005X\007\000"
    "\000\000float16q\006ssb.");
const std::string kAxolotlDpo = bytes(
    "\200\002caxolotl.core.training_args\012AxolotlDPOConfig\012q\000)\201q\001}"
    "q\002X\004\000\000\000bf16q\003\210sb.");
const std::string kFactory = bytes(
    "\200\002cllamafactory.hparams.training_args\012TrainingArguments\012q\000)\201q\001}"
    "q\002X\004\000\000\000bf16q\003\210sb.");
const std::string kOwn =
    bytes("\200\002c__main__\012TrainingArguments\012q\000)\201q\001}q\002X\004\000\000\000bf16q\003\210sb.");
const std::string kSeq2Seq = bytes(
    "\200\002ctransformers.training_args_seq2seq\012Seq2SeqTrainingArguments\012q\000)\201q\001}"
    "q\002X\004\000\000\000bf16q\003\210sb.");
const std::string kUnsloth =
    bytes("\200\002cUnslothSFTTrainer\012UnslothSFTConfig\012q\000)\201q\001}q\002X\004\000\000\000bf16q\003\210sb.");

Material read(const std::string& pickle, Material m = {}) {
  test::TempTree tree;
  read_training_args(tree.write("training_args.bin", pickle), &m);
  EXPECT_TRUE(m.problems.empty()) << m.problems[0].what;
  return m;
}
const Node* said(const Material& m, std::string_view name) {
  const Node* out = nullptr;
  for (const Setting& s : m.settings) {
    if (s.name == name) out = &s.value;
  }
  return out;
}

TEST(TrainingArgs, FieldsOfSftConfig) {
  const Material m = read(kSft);
  ASSERT_TRUE(said(m, "torch_dtype") && said(m, "trl.router_aux_loss_coef") && said(m, "deepspeed") &&
              said(m, "loss_type"));
  EXPECT_EQ(said(m, "torch_dtype")->text, "torch.bfloat16");
  EXPECT_EQ(said(m, "trl.router_aux_loss_coef")->as_double(), 0.01);
  // accelerate's plugin tells of DeepSpeed where the field itself is None.
  ASSERT_TRUE(said(m, "deepspeed")->is_map());
  EXPECT_EQ(said(m, "deepspeed")->find("zero_stage")->as_int(), 3);
  EXPECT_EQ(said(m, "loss_type")->text, "nll");
  EXPECT_EQ(said(m, "max_length"), nullptr);  // None says nothing
  EXPECT_EQ(said(read(kInit), "torch_dtype")->text, "float16");
}

TEST(TrainingArgs, ClassTellsWhoTrains) {
  struct Case {
    const std::string& pickle;
    const char *framework, *trainer;
  };
  const Case cases[] = {{kSft, "trl", "SFTTrainer"},
                        {kAxolotlDpo, "axolotl", "DPOTrainer"},
                        {kFactory, "llama-factory", "LLaMA-Factory trainer of an unknown stage"},
                        {kOwn, "__main__.TrainingArguments", ""},
                        {kSeq2Seq, "transformers", "Seq2SeqTrainer"},
                        {kUnsloth, "unsloth", "SFTTrainer"}};
  for (const Case& c : cases) {
    const Material m = read(c.pickle);
    EXPECT_EQ(m.framework, c.framework);
    EXPECT_EQ(m.trainer, c.trainer) << c.framework;
    EXPECT_EQ(m.framework_source.role, Role::kTrainingArguments);
  }
}

TEST(TrainingArgs, ConfigFileAndClass) {
  auto after = [](const char* framework, const char* trainer, const std::string& pickle) {
    Material m;
    m.framework = framework;
    m.trainer = trainer;
    m = read(pickle, std::move(m));
    return m.framework + " / " + m.trainer;
  };
  EXPECT_EQ(after("llama-factory", "CustomDPOTrainer", kSeq2Seq),
            "llama-factory / CustomDPOTrainer");  // its class of old
  EXPECT_EQ(after("llama-factory", "CustomDPOTrainer", kFactory), "llama-factory / CustomDPOTrainer");
  EXPECT_EQ(after("transformers", "", kSft), "trl / SFTTrainer");  // the look of a file against the class that ran
  EXPECT_EQ(after("transformers", "", kOwn), "__main__.TrainingArguments / ");
  EXPECT_EQ(after("trl", "SFTTrainer", kOwn), "trl / SFTTrainer");
}

}  // namespace
}  // namespace moeaudit
