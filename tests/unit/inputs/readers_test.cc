// What the readers make of single files: the rules of each framework, places, and files that are broken.
#include "audit/inputs/readers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <optional>

#include "audit/behaviours/behaviour.h"
#include "audit/families/family.h"
#include "tests/unit/inputs/temp_tree.h"

namespace moeaudit {
namespace {

Material read_config(const std::string& text, const std::string& name = "c.yml", const std::string& axolotl = "") {
  test::TempTree tree;
  Material m;
  if (!axolotl.empty()) read_assumption("axolotl", axolotl, &m);
  Node root;
  EXPECT_TRUE(read_tree(tree.write(name, text), &root, &m)) << (m.problems.empty() ? "" : m.problems[0].what);
  const ConfigReader* reader = find_config_reader(root);
  EXPECT_TRUE(reader && reader->read) << text;
  if (reader && reader->read) reader->read({name, Role::kTrainingConfig, &root}, &m);
  if (reader && reader->after_model) reader->after_model({name, Role::kTrainingConfig, &root}, &m);
  return m;
}

/// The last statement as text; "-" if there is none.
std::string said(const Material& m, std::string_view name) {
  std::string out = "-";
  for (const Setting& s : m.settings) {
    if (s.name != name) continue;
    const Node& v = s.value;
    out = v.kind == Node::Kind::kBool ? (v.boolean ? "true" : "false")
          : v.is_null()               ? "null"
          : v.is_list()               ? "list"
          : v.is_map()                ? "map"
                                      : v.text;
  }
  return out;
}
const Setting* setting(const Material& m, std::string_view name) {
  for (const Setting& s : m.settings) {
    if (s.name == name) return &s;
  }
  return nullptr;
}

const std::string kAxolotl = "base_model: org/name\nmicro_batch_size: 2\n";

// ---- Axolotl
// ---------------------------------------------------------------------------------------------------------

TEST(Axolotl, PrecisionAsResolveDtypeHasIt) {
  struct Case {
    const char *yaml, *bf16, *fp16, *full, *dtype;
  };
  const Case cases[] = {
      {"bf16: true", "true", "-", "-", "bfloat16"},
      {"bf16: true\nfp16: true", "true", "false", "-", "bfloat16"},
      {"bf16: full", "false", "-", "true", "bfloat16"},
      {"bf16: auto", "auto", "-", "-", "-"},
      {"bf16: auto\nfp16: true", "false", "true", "-", "float16"},
      {"fp16: true", "false", "true", "-", "float16"},
      {"bf16: false\nbfloat16: true", "true", "-", "-", "bfloat16"},
      {"bf16: false\nfp16: false", "false", "false", "-", "float32"},
      {"bf16: false\nfloat16: true", "false", "-", "-", "float16"},
      {"bf16: false\nload_in_8bit: true", "false", "-", "-", "float16"},
      {"tf32: true", "-", "-", "-", "-"},
  };
  for (const Case& c : cases) {
    const Material m = read_config(kAxolotl + c.yaml + "\n");
    EXPECT_EQ(said(m, "bf16"), c.bf16) << c.yaml;
    EXPECT_EQ(said(m, "fp16"), c.fp16) << c.yaml;
    EXPECT_EQ(said(m, "bf16_full_eval"), c.full) << c.yaml;
    EXPECT_EQ(said(m, "torch_dtype"), c.dtype) << c.yaml;
  }
}

TEST(Axolotl, RowsThatNoShippedConfigHas) {
  const Material m =
      read_config(kAxolotl +
                  "overrides_of_model_config:\n  router_aux_loss_coef: 1e-2\n  rope_scaling:\n    factor: 2\n"
                  "adapter: lora\nlora_rank_pattern: {q_proj: 4}\nlora_alpha_pattern: {q_proj: 8}\n"
                  "peft_layers_to_transform: [0, 1]\npeft_use_rslora: true\n"
                  "bnb_config_kwargs:\n  bnb_4bit_quant_type: fp4\n  llm_int8_skip_modules: [gate]\n  other: 1\n"
                  "max_grad_norm: 1.0\nmodel_revision: abc\nmodel_kwargs: {x: 1}\n");
  EXPECT_EQ(said(m, "model_config.router_aux_loss_coef"), "1e-2");
  EXPECT_EQ(said(m, "model_config.rope_scaling.factor"), "2");
  EXPECT_EQ(setting(m, "model_config.router_aux_loss_coef")->source.key,
            "overrides_of_model_config.router_aux_loss_coef");
  EXPECT_EQ(setting(m, "model_config.router_aux_loss_coef")->source.line, 4);
  EXPECT_EQ(said(m, "rank_pattern"), "map");
  EXPECT_EQ(said(m, "alpha_pattern"), "map");
  EXPECT_EQ(said(m, "layers_to_transform"), "list");
  EXPECT_EQ(said(m, "use_rslora"), "true");
  EXPECT_EQ(said(m, "bnb_4bit_quant_type"), "fp4");
  EXPECT_EQ(said(m, "llm_int8_skip_modules"), "list");
  EXPECT_EQ(said(m, "max_grad_norm"), "1.0");
  EXPECT_EQ(said(m, "base_model_revision"), "abc");
  std::string unread;
  for (const UnreadKey& k : m.unread_keys) unread += k.key + " ";
  EXPECT_EQ(unread, "bnb_config_kwargs.other model_kwargs ");
}

TEST(Axolotl, BatchSizeGivesAccumulation) {
  EXPECT_EQ(said(read_config(kAxolotl + "batch_size: 16\n"), "gradient_accumulation_steps"), "8");
  EXPECT_EQ(
      said(read_config(kAxolotl + "batch_size: 16\ngradient_accumulation_steps: 4\n"), "gradient_accumulation_steps"),
      "4");
  EXPECT_EQ(said(read_config(kAxolotl + "batch_size: 1\n"), "gradient_accumulation_steps"), "-");
  EXPECT_EQ(said(read_config("base_model: a/b\nmicro_batch_size: 0\nbatch_size: 4\n"), "gradient_accumulation_steps"),
            "-");
}

TEST(Axolotl, TrainerByRl) {
  struct Case {
    const char *yaml, *trainer, *key;
  };
  const Case cases[] = {{"rl: dpo", "DPOTrainer", "rl"},
                        {"rl: ipo", "DPOTrainer", "rl"},
                        {"rl: kto", "KTOTrainer", "rl"},
                        {"rl: orpo", "ORPOTrainer", "rl"},
                        {"rl: simpo", "CPOTrainer", "rl"},
                        {"rl: grpo", "GRPOTrainer", "rl"},
                        {"rl: ebft", "ebft", "rl"},
                        {"reward_model: true", "RewardTrainer", "reward_model"},
                        {"process_reward_model: true", "PRMTrainer", "process_reward_model"},
                        {"trainer_cls: my.module.Mine", "my.module.Mine", "trainer_cls"}};
  for (const Case& c : cases) {
    const Material m = read_config(kAxolotl + c.yaml + "\n");
    EXPECT_EQ(m.trainer, c.trainer) << c.yaml;
    EXPECT_EQ(m.trainer_source.key, c.key);
    EXPECT_EQ(m.trainer_source.line, 3);
  }
  EXPECT_EQ(read_config(kAxolotl).trainer, "");
  EXPECT_EQ(read_config(kAxolotl).framework, "axolotl");
}

TEST(Axolotl, NullsSayNothing) {
  const Material m = read_config(kAxolotl + "adapter:\nlora_r:\ndeepspeed:\nmodel_config:\nbf16:\n");
  EXPECT_FALSE(m.adapter_seen);
  EXPECT_EQ(m.settings.size(), 1u);
  EXPECT_EQ(m.settings[0].name, "per_device_train_batch_size");
}

const std::string kMisplaced = kAxolotl +
                               "model_config:\n  output_router_logits: true\nrouter_aux_loss_coef: "
                               "0.02\nwandb_project: x\nlora_exclude_modules: [gate]\n";

TEST(Axolotl, MisplacedRouterKeyIsIgnoredByTheFramework) {
  const Material m = read_config(kMisplaced, "c.yml", "0.18.0");
  ASSERT_EQ(m.ignored_keys.size(), 2u);
  const IgnoredKey& aux = m.ignored_keys[0];
  EXPECT_EQ(aux.key, "router_aux_loss_coef");
  EXPECT_EQ(aux.line, 5);
  EXPECT_TRUE(aux.about_moe);
  EXPECT_EQ(aux.framework, "axolotl 0.18.0");
  // Pasting the block must not lose what the file's own block has: PyYAML takes the last of two.
  EXPECT_EQ(aux.instead, "model_config:\n  output_router_logits: true\n  router_aux_loss_coef: 0.02");
  EXPECT_EQ(m.ignored_keys[1].key, "lora_exclude_modules");
  EXPECT_FALSE(m.ignored_keys[1].about_moe);
  EXPECT_EQ(m.ignored_keys[1].instead, "");
  ASSERT_EQ(m.unread_keys.size(), 1u);
  EXPECT_EQ(m.unread_keys[0].key, "wandb_project");
  // Without a block in the file, and for the name that Megatron has for it.
  EXPECT_EQ(read_config(kAxolotl + "moe_aux_loss_coeff: 1e-2\n", "c.yml", "0.18.0").ignored_keys.at(0).instead,
            "model_config:\n  router_aux_loss_coef: 1e-2");
  EXPECT_EQ(read_config(kAxolotl + "output_router_logits: true\n", "c.yml", "0.18.0").ignored_keys.at(0).instead,
            "model_config:\n  output_router_logits: true");
}

TEST(Axolotl, UnknownReleaseMayKnowAnyKey) {
  const Material m = read_config(kMisplaced);
  EXPECT_TRUE(m.ignored_keys.empty());
  EXPECT_EQ(m.unread_keys.size(), 3u);
  EXPECT_EQ(m.keys_not_compared,
            "which keys Axolotl knows depends on its release, and there is no list for an unknown one "
            "(undecided: router_aux_loss_coef and 2 more)");
  EXPECT_EQ(read_config(kMisplaced, "c.yml", "0.18.0").keys_not_compared, "");
}

TEST(Axolotl, ForeignPluginsMayKnowAnyKey) {
  const std::string key = "router_aux_loss_coef: 0.02\n";
  const Material foreign = read_config(kAxolotl + "plugins: [my.plugin.P]\n" + key, "c.yml", "0.18.0");
  EXPECT_TRUE(foreign.ignored_keys.empty());
  EXPECT_EQ(foreign.keys_not_compared,
            "a plugin from outside Axolotl may bring keys of its own (undecided: router_aux_loss_coef)");
  EXPECT_EQ(read_config(kAxolotl + "plugins: [axolotl.integrations.liger.LigerPlugin]\n" + key, "c.yml", "0.18.0")
                .ignored_keys.size(),
            1u);
}

TEST(Axolotl, LoraKeysWithoutAnAdapterDoNothing) {
  const Material m = read_config(kAxolotl + "adapter:\nlora_r: 8\nlora_target_linear: true\n", "c.yml", "0.18.0");
  EXPECT_FALSE(m.adapter_seen);
  EXPECT_EQ(said(m, "r"), "-");
  EXPECT_EQ(said(m, "lora_target_linear"), "-");
  ASSERT_EQ(m.ignored_keys.size(), 1u);
  EXPECT_EQ(m.ignored_keys[0].line, 4);
  EXPECT_NE(m.ignored_keys[0].why.find("lora_r, lora_target_linear do nothing"), std::string::npos);
  EXPECT_EQ(m.ignored_keys[0].instead, "adapter: lora\nlora_r: 8");
  const Material list = read_config(kAxolotl + "lora_target_modules: ['a.*\\d', q_proj, it's]\n", "c.yml", "0.18.0");
  EXPECT_EQ(list.ignored_keys.at(0).instead, "adapter: lora\nlora_target_modules: ['a.*\\d', q_proj, 'it''s']");
}

TEST(Axolotl, OverrideThatNoClassReads) {
  Material m;
  test::TempTree tree;
  Node root;
  const std::string path = tree.write(
      "c.yml",
      kAxolotl + "model_config:\n  aux_loss_coef: 0.02\n  router_z_loss_coef: 0.001\n  router_aux_loss_coef: 0.1\n");
  ASSERT_TRUE(read_tree(path, &root, &m));
  const ConfigReader* reader = find_config_reader(root);
  reader->read({path, Role::kTrainingConfig, &root}, &m);
  reader->after_model({path, Role::kTrainingConfig, &root}, &m);
  EXPECT_TRUE(m.ignored_keys.empty());  // the model is unknown
  read_model_config(test::fixture("models/mixtral-tf4/config.json"), Role::kBaseModelConfig, false, &m);
  reader->after_model({path, Role::kTrainingConfig, &root}, &m);
  ASSERT_EQ(m.ignored_keys.size(), 2u);
  EXPECT_EQ(m.ignored_keys[0].key, "model_config.aux_loss_coef");
  EXPECT_EQ(m.ignored_keys[0].instead, "model_config:\n  router_aux_loss_coef: 0.02");
  EXPECT_EQ(m.ignored_keys[1].key, "model_config.router_z_loss_coef");
  EXPECT_EQ(m.ignored_keys[1].instead, "");
}

// ---- TRL, TrainingArguments
// ------------------------------------------------------------------------------------------

TEST(Trl, Sft) {
  const Material m = read_config(
      "model_name_or_path: mistralai/Mixtral-8x7B-v0.1\nmodel_revision: main\ndataset_name: "
      "trl-lib/Capybara\nuse_peft: true\nlora_r: 32\n"
      "lora_alpha: 16\nlora_dropout: 0.0\nlora_target_modules: [q_proj, gate]\nlora_target_parameters: "
      "[experts.down_proj]\n"
      "lora_modules_to_save: [lm_head]\nuse_rslora: true\nload_in_4bit: true\nload_in_8bit: "
      "false\nbnb_4bit_quant_type: nf4\n"
      "dtype: bfloat16\nmax_length: 2048\npacking: true\nlearning_rate: 2e-5\nrouter_aux_loss_coef: 1e-3\nloss_type: "
      "nll\n"
      "fp16: false\ntf32: true\ngradient_checkpointing_kwargs: {use_reentrant: false}\ngradient_accumulation_steps: "
      "8\nlabel_smoothing_factor: 0.1\naverage_tokens_across_devices: false\nfsdp: [full_shard]\nbf16_full_eval: "
      "false\n");
  EXPECT_EQ(m.framework, "trl");
  EXPECT_EQ(m.trainer, "SFTTrainer");
  EXPECT_EQ(m.trainer_source.key, "packing");
  EXPECT_EQ(m.base_model, "mistralai/Mixtral-8x7B-v0.1");
  EXPECT_TRUE(m.adapter_seen);
  const std::pair<const char*, const char*> want[] = {{"peft_type", "LORA"},
                                                      {"r", "32"},
                                                      {"lora_alpha", "16"},
                                                      {"lora_dropout", "0.0"},
                                                      {"target_modules", "list"},
                                                      {"target_parameters", "list"},
                                                      {"modules_to_save", "list"},
                                                      {"use_rslora", "true"},
                                                      {"load_in_4bit", "true"},
                                                      {"load_in_8bit", "false"},
                                                      {"bnb_4bit_quant_type", "nf4"},
                                                      {"torch_dtype", "bfloat16"},
                                                      {"max_length", "2048"},
                                                      {"learning_rate", "2e-5"},
                                                      {"trl.router_aux_loss_coef", "1e-3"},
                                                      {"loss_type", "nll"},
                                                      {"gradient_accumulation_steps", "8"},
                                                      {"label_smoothing_factor", "0.1"},
                                                      {"average_tokens_across_devices", "false"},
                                                      {"fsdp", "list"},
                                                      {"bf16_full_eval", "false"},
                                                      {"base_model_revision", "main"},
                                                      {"fp16", "false"},
                                                      {"tf32", "true"},
                                                      {"gradient_checkpointing_kwargs", "map"}};
  for (const auto& [name, value] : want) EXPECT_EQ(said(m, name), value) << name;
  EXPECT_TRUE(setting(m, "trl.router_aux_loss_coef")
                  ->value.is_number());  // PyYAML reads 1e-3 as a string, the parser as a float
}

TEST(Trl, OtherNamesAndTrainers) {
  EXPECT_EQ(said(read_config("model_name_or_path: a/b\nmax_seq_length: 512\n"), "max_length"), "512");
  EXPECT_EQ(said(read_config("model_name_or_path: a/b\nuse_peft: false\ntorch_dtype: float16\n"), "torch_dtype"),
            "float16");
  EXPECT_EQ(said(read_config("model_name_or_path: a/b\npacking: false\nmodel_init_kwargs: {dtype: bfloat16}\n"),
                 "torch_dtype"),
            "bfloat16");
  EXPECT_EQ(said(read_config("model_name_or_path: a/b\npacking: false\nmodel_init_kwargs: {torch_dtype: float32}\n"),
                 "torch_dtype"),
            "float32");
  EXPECT_EQ(read_config("model_name_or_path: a/b\nprecompute_ref_log_probs: true\n").trainer, "DPOTrainer");
  EXPECT_EQ(read_config("model_name_or_path: a/b\nnum_generations: 4\n").trainer, "GRPOTrainer");
  EXPECT_EQ(read_config("model_name_or_path: a/b\nnum_generations: 4\npacking: true\n").trainer,
            "");  // contradictory: unknown
  EXPECT_EQ(read_config("model_name_or_path: a/b\ndataset_name: c/d\n").trainer, "");
  const Material off = read_config("model_name_or_path: a/b\nlora_r: 8\nuse_peft: false\n");
  EXPECT_FALSE(off.adapter_seen);
  EXPECT_EQ(said(off, "r"), "-");
  ASSERT_EQ(off.unread_keys.size(), 1u);
  EXPECT_EQ(off.unread_keys[0].key, "lora_r");
}

TEST(TrainingArgumentsFile, Json) {
  const Material m = read_config(
      "{\"output_dir\": \"x\", \"bf16\": true, \"deepspeed\": \"z3.json\", \"lr\": 1,\n \"max_grad_norm\": 0.5, "
      "\"dtype\": \"bfloat16\"}",
      "a.json");
  EXPECT_EQ(m.framework, "transformers");
  EXPECT_EQ(m.trainer, "");
  EXPECT_EQ(said(m, "bf16"), "true");
  EXPECT_EQ(said(m, "deepspeed"), "z3.json");
  EXPECT_EQ(said(m, "torch_dtype"), "bfloat16");
  EXPECT_EQ(setting(m, "max_grad_norm")->source.line, 2);
  ASSERT_EQ(m.unread_keys.size(), 2u);
  EXPECT_EQ(m.unread_keys[0].key, "output_dir");
  EXPECT_EQ(m.unread_keys[1].key, "lr");
}

// ---- LLaMA-Factory
// ---------------------------------------------------------------------------------------------------

const std::string kFactory = "model_name_or_path: org/name\nstage: sft\n";

TEST(LlamaFactory, Rows) {
  const Material m =
      read_config(kFactory +
                  "finetuning_type: lora\nlora_rank: 4\nlora_alpha: 8\nlora_dropout: 0.1\nlora_target: q_proj, v_proj\n"
                  "additional_target: embed_tokens,lm_head\nuse_rslora: true\ncutoff_len: 512\nquantization_bit: "
                  "4\nquantization_type: nf4\n"
                  "disable_gradient_checkpointing: true\n");
  ASSERT_TRUE(setting(m, "target_modules"));
  ASSERT_EQ(setting(m, "target_modules")->value.items.size(), 2u);
  EXPECT_EQ(setting(m, "target_modules")->value.items[1].text, "v_proj");
  ASSERT_EQ(setting(m, "modules_to_save")->value.items.size(), 2u);
  EXPECT_EQ(setting(m, "modules_to_save")->value.items[0].text, "embed_tokens");
  const std::pair<const char*, const char*> want[] = {{"r", "4"},
                                                      {"lora_alpha", "8"},
                                                      {"lora_dropout", "0.1"},
                                                      {"use_rslora", "true"},
                                                      {"max_length", "512"},
                                                      {"load_in_4bit", "true"},
                                                      {"bnb_4bit_quant_type", "nf4"},
                                                      {"gradient_checkpointing", "false"},
                                                      {"lora_target_linear", "-"}};
  for (const auto& [name, value] : want) EXPECT_EQ(said(m, name), value) << name;
  EXPECT_EQ(said(read_config(kFactory + "quantization_bit: 8\n"), "load_in_8bit"), "true");
  EXPECT_EQ(said(read_config(kFactory + "pure_bf16: true\n"), "torch_dtype"), "bfloat16");
  EXPECT_EQ(said(read_config(kFactory + "finetuning_type: oft\n"), "peft_type"), "OFT");
  const Material full = read_config(kFactory + "finetuning_type: full\nlora_rank: 8\n");
  EXPECT_FALSE(full.adapter_seen);
  EXPECT_EQ(said(full, "r"), "-");
  EXPECT_EQ(full.unread_keys.at(0).key, "lora_rank");
  EXPECT_EQ(said(full, "finetuning_type"), "full");
  EXPECT_FALSE(read_config(kFactory + "finetuning_type: freeze\n").adapter_seen);
}

TEST(LlamaFactory, Stages) {
  EXPECT_EQ(read_config("model_name_or_path: a/b\nstage: dpo\n").trainer, "CustomDPOTrainer");
  EXPECT_EQ(read_config("model_name_or_path: a/b\nstage: kto\n").trainer, "CustomKTOTrainer");
  EXPECT_EQ(read_config("model_name_or_path: a/b\nstage: pt\n").trainer, "");
  EXPECT_EQ(read_config(kFactory + "use_mca: true\n").trainer, "McaTrainer");
}

Material factory_with_model(const std::string& yaml, const std::string& config, const std::string& version = "") {
  test::TempTree tree;
  Material m;
  Node root;
  if (!version.empty()) read_assumption("llamafactory", version, &m);
  const std::string path = tree.write("c.yml", kFactory + yaml);
  EXPECT_TRUE(read_tree(path, &root, &m));
  const ConfigReader* reader = find_config_reader(root);
  reader->read({path, Role::kTrainingConfig, &root}, &m);
  if (!config.empty()) read_model_config(test::fixture(config), Role::kBaseModelConfig, false, &m);
  reader->after_model({path, Role::kTrainingConfig, &root}, &m);
  return m;
}

TEST(LlamaFactory, MoeAuxLossCoefDependsOnTheModel) {
  const Material mixtral = factory_with_model("moe_aux_loss_coef: 0.02\n", "models/mixtral-tf4/config.json");
  EXPECT_EQ(said(mixtral, "model_config.output_router_logits"), "true");
  EXPECT_EQ(said(mixtral, "model_config.router_aux_loss_coef"), "0.02");
  EXPECT_EQ(setting(mixtral, "model_config.router_aux_loss_coef")->source.key, "moe_aux_loss_coef");

  // Zero is written before 0.9.3 and ignored since; which of the two is not known without the release.
  const std::string kZero = "moe_aux_loss_coef: 0.0\n", kMixtral = "models/mixtral-tf4/config.json";
  const Material zero = factory_with_model(kZero, kMixtral, "0.9.5");
  EXPECT_EQ(said(zero, "model_config.output_router_logits"), "-");
  ASSERT_EQ(zero.ignored_keys.size(), 1u);
  EXPECT_TRUE(zero.ignored_keys[0].about_moe);
  EXPECT_EQ(zero.ignored_keys[0].line, 3);
  const Material old_zero = factory_with_model(kZero, kMixtral, "0.9.2");
  EXPECT_EQ(said(old_zero, "model_config.router_aux_loss_coef"), "0.0");
  EXPECT_EQ(said(old_zero, "model_config.output_router_logits"), "true");  // switched on unasked
  EXPECT_EQ(factory_with_model(kZero, kMixtral).unread_keys.back().key, "moe_aux_loss_coef");

  // Before 0.9.3 the flag is on without the key; since then nothing touches it.
  const Material unasked = factory_with_model("", kMixtral, "0.9.2");
  EXPECT_EQ(said(unasked, "model_config.output_router_logits"), "true");
  EXPECT_EQ(setting(unasked, "model_config.output_router_logits")->source.role, Role::kBehaviourTable);
  EXPECT_EQ(said(factory_with_model("", kMixtral, "0.9.4"), "model_config.output_router_logits"), "-");
  EXPECT_EQ(said(factory_with_model("", kMixtral), "model_config.output_router_logits"), "-");

  const Material gpt = factory_with_model("moe_aux_loss_coef: 0.02\n", "models/gpt_oss-tf5/config.json");
  EXPECT_TRUE(gpt.ignored_keys.empty());  // the release is unknown: a later one may do it
  ASSERT_FALSE(gpt.unread_keys.empty());
  EXPECT_EQ(gpt.unread_keys.back().key, "moe_aux_loss_coef");
  EXPECT_EQ(
      factory_with_model("moe_aux_loss_coef: 0.02\n", "models/gpt_oss-tf5/config.json", "0.9.4").ignored_keys.size(),
      1u);
  const Material olmoe = factory_with_model("moe_aux_loss_coef: 0.02\n", "models/olmoe-tf4/config.json", "0.9.2");
  EXPECT_EQ(olmoe.ignored_keys.size(), 1u);
  EXPECT_EQ(said(factory_with_model("moe_aux_loss_coef: 0.02\n", "models/olmoe-tf4/config.json", "0.9.3"),
                 "model_config.router_aux_loss_coef"),
            "0.02");
  // Its list has qwen3_vl_moe neither as the model nor as a text_config.
  EXPECT_EQ(factory_with_model("moe_aux_loss_coef: 0.02\n", "models/nested-text-config/config.json", "0.9.5")
                .ignored_keys.size(),
            1u);

  const Material unknown = factory_with_model("moe_aux_loss_coef: 0.02\n", "");
  EXPECT_TRUE(unknown.ignored_keys.empty());
  EXPECT_EQ(unknown.unread_keys.back().key, "moe_aux_loss_coef");
  for (const char* wrong : {"moe_aux_loss_coef: [1]\n", "moe_aux_loss_coef: {a: 1}\n", "moe_aux_loss_coef: much\n"}) {
    const Material m = factory_with_model(wrong, kMixtral, "0.9.5");
    EXPECT_TRUE(m.ignored_keys.empty()) << wrong;
    EXPECT_EQ(m.unread_keys.back().key, "moe_aux_loss_coef") << wrong;
  }
}

TEST(LlamaFactory, UnknownKeysAreRefusedThere) {
  const Material m = factory_with_model("router_aux_loss_coef: 0.02\nlora_ranc: 8\ngradient_clip: 1\n", "", "0.9.5");
  ASSERT_EQ(m.ignored_keys.size(), 3u);
  EXPECT_EQ(m.ignored_keys[0].key, "router_aux_loss_coef");
  EXPECT_TRUE(m.ignored_keys[0].about_moe);
  EXPECT_EQ(m.ignored_keys[0].instead, "moe_aux_loss_coef: 0.02");
  EXPECT_FALSE(m.ignored_keys[1].about_moe);
  EXPECT_TRUE(factory_with_model("router_aux_loss_coef: 0.02\n", "").ignored_keys.empty());  // which release?
  EXPECT_TRUE(factory_with_model("moe_grouped_gemm: true\nmoe_layer_freq: 1\n", "", "0.9.5").ignored_keys.empty());
}

TEST(LlamaFactory, DefaultsOfItsOwn) {
  const Material m = read_config(kFactory + "lora_rank: 4\n");
  EXPECT_TRUE(m.adapter_seen);  // finetuning_type is lora, lora_target all
  EXPECT_EQ(said(m, "lora_target_linear"), "true");
  EXPECT_EQ(setting(m, "lora_target_linear")->source.key, "lora_target");
  EXPECT_EQ(said(read_config(kFactory + "quantization_bit: 4\n"), "bnb_4bit_quant_type"), "nf4");
  EXPECT_EQ(said(read_config(kFactory + "quantization_bit: 4\nquantization_type: fp4\n"), "bnb_4bit_quant_type"), "fp4");
  const Material hqq = read_config(kFactory + "quantization_bit: 6\nquantization_method: hqq\n");
  EXPECT_EQ(said(hqq, "quant_method"), "hqq");
  EXPECT_EQ(said(hqq, "quant_bits"), "6");
  EXPECT_EQ(said(hqq, "load_in_4bit"), "-");
  EXPECT_EQ(read_config(kFactory + "use_dft_loss: true\n").trainer, "CustomSeq2SeqTrainer with a loss of its own");
  EXPECT_EQ(read_config("model_name_or_path: a/b\nstage: rm\n").trainer, "PairwiseTrainer");
}

// ---- config.json
// -----------------------------------------------------------------------------------------------------

TEST(ModelConfig, NestedTextConfig) {
  Material m;
  read_model_config(test::fixture("models/nested-text-config/config.json"), Role::kBaseModelConfig, true, &m);
  ASSERT_EQ(m.configs.size(), 1u);
  ASSERT_TRUE(m.configs[0].text);
  EXPECT_EQ(m.configs[0].text_path, "text_config");
  EXPECT_EQ(*m.configs[0].text->find("model_type")->as_string(), "qwen3_vl_moe_text");
  EXPECT_EQ(m.configs[0].text->find("num_local_experts")->line, 29);
  EXPECT_EQ(*m.configs[0].root.find("model_type")->as_string(), "qwen3_vl_moe");
  ASSERT_EQ(m.versions.size(), 1u);
  EXPECT_EQ(to_text(m.versions[0].versions), "5.23.0");
  // The pointer survives the growth of the vector.
  for (int i = 0; i < 20; ++i)
    read_model_config(test::fixture("models/mixtral-tf4/config.json"), Role::kBaseModelConfig, false, &m);
  EXPECT_EQ(*m.configs[0].text->find("model_type")->as_string(), "qwen3_vl_moe_text");
  EXPECT_EQ(m.versions.size(), 1u);
  EXPECT_EQ(m.configs[7].text, nullptr);
}

TEST(ModelConfig, OtherNests) {
  test::TempTree tree;
  Material m;
  read_model_config(tree.write("a.json", R"({"architectures": ["X"], "llm_config": {"model_type": "qwen3_moe"}})"),
                    Role::kBaseModelConfig, false, &m);
  read_model_config(tree.write("b.json", R"({"model_type": "y", "language_config": {"num_experts": 4}})"),
                    Role::kBaseModelConfig, false, &m);
  read_model_config(
      tree.write("c.json", R"({"model_type": "z", "thinker_config": {"text_config": {"num_experts": 4}}})"),
      Role::kBaseModelConfig, false, &m);
  read_model_config(tree.write("d.json", R"({"model_type": "z", "text_config": {}})"), Role::kBaseModelConfig, false,
                    &m);
  ASSERT_EQ(m.configs.size(), 4u);
  EXPECT_EQ(m.configs[0].text_path, "llm_config");
  EXPECT_EQ(m.configs[1].text_path, "language_config");
  EXPECT_EQ(m.configs[2].text_path, "thinker_config.text_config");
  EXPECT_EQ(m.configs[3].text, nullptr);
}

TEST(ModelConfig, Quantisation) {
  test::TempTree tree;
  Material m;
  read_model_config(tree.write("config.json", R"({"model_type": "mixtral",
  "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false,
    "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["gate", "lm_head"], "bnb_4bit_use_double_quant": true}})"),
                    Role::kBaseModelConfig, false, &m);
  EXPECT_EQ(said(m, "quant_method"), "bitsandbytes");
  EXPECT_EQ(said(m, "load_in_4bit"), "true");
  EXPECT_EQ(said(m, "load_in_8bit"), "false");
  EXPECT_EQ(said(m, "bnb_4bit_quant_type"), "nf4");
  EXPECT_EQ(said(m, "llm_int8_skip_modules"), "list");
  EXPECT_EQ(setting(m, "bnb_4bit_quant_type")->source.line, 3);
  EXPECT_EQ(setting(m, "bnb_4bit_quant_type")->source.key, "quantization_config.bnb_4bit_quant_type");
  EXPECT_EQ(setting(m, "quant_method")->source.role, Role::kBaseModelConfig);
  Material mx;
  read_model_config(
      tree.write(
          "mx.json",
          R"({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["router"]}})"),
      Role::kBaseModelConfig, false, &mx);
  EXPECT_EQ(said(mx, "quant_method"), "mxfp4");
  EXPECT_EQ(said(mx, "llm_int8_skip_modules"), "list");
}

TEST(ModelConfig, KeysOfOtherStacks) {
  test::TempTree tree;
  Material m;
  read_model_config(tree.write("config.json",
                               "{\"model_type\": \"mixtral\",\n \"router_z_loss_coef\": 0.001,\n "
                               "\"moe_aux_loss_coef\": 0.02, \"z_loss_coef\": 0, \"router_aux_loss_coef\": 0.1}"),
                    Role::kCheckpointConfig, false, &m);
  check_model_configs(&m);
  ASSERT_EQ(m.ignored_keys.size(), 2u);
  EXPECT_EQ(m.ignored_keys[0].key, "router_z_loss_coef");
  EXPECT_EQ(m.ignored_keys[0].line, 2);
  EXPECT_TRUE(m.ignored_keys[0].about_moe);
  EXPECT_EQ(m.ignored_keys[1].instead, "\"router_aux_loss_coef\": 0.02");
}

TEST(ModelConfig, KeysOfExpertsThatNobodyHereReadsAreListed) {
  test::TempTree tree;
  Material m;
  read_model_config(tree.write("config.json",
                               "{\"model_type\": \"deepseek_v3\",\n \"ep_size\": 1, \"aux_loss_alpha\": 0.001,\n"
                               " \"moe_layer_freq\": 1, \"router_jitter_noise\": 0.0}"),
                    Role::kBaseModelConfig, false, &m);
  check_model_configs(&m);
  EXPECT_TRUE(m.ignored_keys.empty());
  ASSERT_EQ(m.unread_keys.size(), 2u);
  EXPECT_EQ(m.unread_keys[0].key, "aux_loss_alpha");
  EXPECT_EQ(m.unread_keys[0].line, 2);
  EXPECT_EQ(m.unread_keys[1].key, "moe_layer_freq");
}

TEST(ModelConfig, ShippedConfigsRaiseNoAlarm) {
  namespace fs = std::filesystem;
  int n = 0;
  for (const auto& entry : fs::recursive_directory_iterator(test::fixture(""))) {
    if (entry.path().filename() != "config.json" || entry.path().string().find("/rules/") != std::string::npos) continue;
    Material m;
    read_model_config(entry.path().string(), Role::kBaseModelConfig, false, &m);
    check_model_configs(&m);
    EXPECT_TRUE(m.problems.empty()) << entry.path();
    EXPECT_TRUE(m.ignored_keys.empty()) << entry.path() << " " << m.ignored_keys[0].key;
    ++n;
  }
  EXPECT_GE(n, 20);
}

// ---- broken files
// ----------------------------------------------------------------------------------------------------

TEST(Broken, Trees) {
  test::TempTree tree;
  Node root;
  auto problem = [&](const std::string& path) {
    Material m;
    EXPECT_FALSE(read_tree(path, &root, &m)) << path;
    EXPECT_EQ(m.problems.size(), 1u) << path;
    EXPECT_TRUE(m.problems[0].fatal && !m.problems[0].remedy.empty() && m.problems[0].file == path) << path;
    return m.problems[0];
  };
  const InputProblem json = problem(tree.write("a.json", "{\"model_type\": \"mixtral\",\n  \"num_experts\": }\n"));
  EXPECT_EQ(json.line, 2);
  EXPECT_EQ(json.column, 18);
  const InputProblem yaml = problem(tree.write("a.yml", "base_model: x\nlora_r: [1, 2\nbf16: true\n"));
  EXPECT_GE(yaml.line, 2);
  EXPECT_NE(problem(tree.write("b.json", "")).what.find("0 bytes"), std::string::npos);
  problem(tree.write("c.json", "  \n"));
  problem(tree.folder("config.json"));
  problem(tree.path("missing.json"));
  problem(tree.write("d.json", std::string("{\"a\": \"\xff\"}")));
  std::string deep(100000, '[');
  problem(tree.write("e.json", deep));
}

TEST(Broken, DuplicateKeysAreToldAndNotFatal) {
  test::TempTree tree;
  Node root;
  Material m;
  ASSERT_TRUE(read_tree(tree.write("a.yml", "base_model: x\nlora_r: 4\nlora_r: 8\nadapter: lora\n"), &root, &m));
  ASSERT_EQ(m.problems.size(), 1u);
  EXPECT_FALSE(m.problems[0].fatal);
  EXPECT_EQ(m.problems[0].line, 3);
  EXPECT_NE(m.problems[0].what.find("lines 2 and 3"), std::string::npos) << m.problems[0].what;
  find_config_reader(root)->read({"a.yml", Role::kTrainingConfig, &root}, &m);
  EXPECT_EQ(said(m, "r"), "8");
  int count = 0;
  for (const Setting& s : m.settings) count += s.name == "r";
  ASSERT_EQ(count, 1);
  EXPECT_EQ(setting(m, "r")->source.line, 3);
}

TEST(Broken, FilesOfAnotherKind) {
  test::TempTree tree;
  Material m;
  read_model_config(tree.write("config.json", "[1, 2]"), Role::kBaseModelConfig, false, &m);
  read_model_config(tree.write("config2.json", "{\"a\": 1}"), Role::kBaseModelConfig, false, &m);
  read_adapter_config(tree.write("adapter_config.json", "{\"r\": 8}"), &m);
  read_adapter_config(tree.write("adapter_config2.json", "3"), &m);
  read_trainer_state(tree.write("trainer_state.json", "{\"log_history\": 3}"), &m);
  read_trainer_state(tree.write("trainer_state2.json", "null"), &m);
  EXPECT_EQ(m.problems.size(), 6u);
  for (const InputProblem& p : m.problems) EXPECT_TRUE(p.fatal && !p.remedy.empty()) << p.what;
  EXPECT_TRUE(m.configs.empty() && m.settings.empty() && m.versions.empty() && !m.adapter_seen);
}

TEST(Broken, LogEntriesOfAnyShape) {
  test::TempTree tree;
  Material m;
  read_trainer_state(tree.write("trainer_state.json",
                                "{\"global_step\": 7, \"log_history\": [\n3,\n{\"loss\": Infinity, \"step\": "
                                "1.0},\n{\"step\": \"x\", \"grad_norm\": -Infinity, \"loss\": \"nan\"}]}"),
                     &m);
  EXPECT_TRUE(m.problems.empty());
  ASSERT_EQ(m.log.step.size(), 2u);
  EXPECT_EQ(m.log.line, (std::vector<int>{3, 4}));
  EXPECT_EQ(m.log.step[0], 1);
  EXPECT_EQ(m.log.step[1], -1);
  EXPECT_TRUE(std::isinf(m.log.loss[0]) && m.log.loss[0] > 0 && m.log.has_loss[0]);
  EXPECT_TRUE(std::isinf(m.log.grad_norm[1]) && m.log.grad_norm[1] < 0);
  EXPECT_FALSE(m.log.has_loss[1]);
  EXPECT_EQ(m.global_step, 7);
}

TEST(Broken, TrainingArgsAreNotFatal) {
  test::TempTree tree;
  const std::string whole = test::fixture("runs/mixtral-qlora-broken/checkpoint-10/training_args.bin");
  tree.copy(whole, "cut.bin");
  std::filesystem::resize_file(tree.path("cut.bin"), 1000);
  for (const std::string& path : {tree.write("a.bin", ""), tree.write("b.bin", "not a zip"), tree.path("cut.bin"),
                                  tree.path("missing.bin"), tree.write("c.bin", std::string("\x80\x02N.", 4))}) {
    Material m;
    read_training_args(path, &m);
    ASSERT_EQ(m.problems.size(), 1u) << path;
    EXPECT_FALSE(m.problems[0].fatal);
    EXPECT_TRUE(m.problems[0].what.starts_with("training_args.bin could not be read: ")) << m.problems[0].what;
    EXPECT_TRUE(m.settings.empty() && m.framework.empty());
  }
}

// ---- the hub cache
// ---------------------------------------------------------------------------------------------------

class HubCache : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : kNames) {
      const char* v = ::getenv(name);
      saved_.emplace_back(name, v ? std::optional<std::string>(v) : std::nullopt);
      ::unsetenv(name);
    }
  }
  void TearDown() override {
    for (const auto& [name, value] : saved_)
      value ? ::setenv(name.c_str(), value->c_str(), 1) : ::unsetenv(name.c_str());
  }
  static constexpr const char* kNames[] = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME",
                                           "HOME"};
  std::vector<std::pair<std::string, std::optional<std::string>>> saved_;
  test::TempTree tree_;
  std::string note_;
};

TEST_F(HubCache, EveryPlaceInItsOrder) {
  const std::pair<const char*, const char*> places[] = {{"HOME", ".cache/huggingface/hub"},
                                                        {"XDG_CACHE_HOME", "huggingface/hub"},
                                                        {"HF_HOME", "hub"},
                                                        {"HUGGINGFACE_HUB_CACHE", ""},
                                                        {"HF_HUB_CACHE", ""}};
  for (const auto& [name, below] : places) {  // each outranks the ones before it
    const std::string root = std::string(name) + (*below ? "/" + std::string(below) : "");
    tree_.write(root + "/models--org--name/refs/main", "abc123\n");
    tree_.write(root + "/models--org--name/snapshots/abc123/config.json", "{}");
    ::setenv(name, tree_.path(name).c_str(), 1);
    EXPECT_EQ(find_in_hub_cache("org/name", "", &note_), tree_.path(root + "/models--org--name/snapshots/abc123"))
        << name;
  }
  EXPECT_NE(note_.find("abc123"), std::string::npos);
}

TEST_F(HubCache, Revisions) {
  ::setenv("HF_HUB_CACHE", tree_.path().c_str(), 1);
  EXPECT_EQ(find_in_hub_cache("org/name", "", &note_), "");
  tree_.write("models--org--name/snapshots/aaa111/config.json", "{}");
  const std::string model = tree_.path("models--org--name/snapshots/");
  EXPECT_EQ(find_in_hub_cache("org/name", "", &note_), model + "aaa111");  // the only one
  EXPECT_EQ(find_in_hub_cache("org/name", "v2", &note_), "");
  EXPECT_EQ(find_in_hub_cache("org/name", "aaa111", &note_), model + "aaa111");
  tree_.write("models--org--name/snapshots/bbb222/config.json", "{}");
  EXPECT_EQ(find_in_hub_cache("org/name", "", &note_), "");  // which?
  tree_.write("models--org--name/refs/main", "bbb222");
  tree_.write("models--org--name/refs/v2", "aaa111");
  EXPECT_EQ(find_in_hub_cache("org/name", "", &note_), model + "bbb222");
  EXPECT_EQ(find_in_hub_cache("org/name", "v2", &note_), model + "aaa111");
  tree_.write("models--org--name/refs/main", "../../../etc");
  EXPECT_EQ(find_in_hub_cache("org/name", "main", &note_), "");
}

TEST_F(HubCache, NamesThatAreNoIds) {
  for (const char* id : {"", "name", "a/b/c", "/abs", "../x", "a/..", "./base", "a/", "/b", "a b/c", "-a/b"})
    EXPECT_FALSE(looks_like_hub_id(id)) << id;
  for (const char* id : {"mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen1.5-MoE-A2.7B", "a/b_c"})
    EXPECT_TRUE(looks_like_hub_id(id)) << id;
}

}  // namespace
}  // namespace moeaudit
