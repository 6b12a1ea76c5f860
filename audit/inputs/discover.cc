// From the paths of the command line to the files of each run.
#include "audit/inputs/discover.h"

#include <algorithm>
#include <filesystem>
#include <memory>

#include "audit/families/family.h"
#include "audit/inputs/files.h"
#include "audit/inputs/plan_builder.h"
#include "audit/inputs/readers.h"
#include "audit/tensors/tensor_store.h"
#include "audit/traces/trace.h"

namespace moeaudit {

const char* const kAcceptedInputs =
    "give a model folder (config.json, *.safetensors), an adapter folder (adapter_config.json), a checkpoint or run "
    "folder "
    "(checkpoint-N, trainer_state.json, training_args.bin), a training config (.yml, .yaml, .json), a requirements or "
    "lock "
    "file, a .safetensors file, or a recorded trace (trace.json)";

namespace {

using Rank = Slot::Rank;

bool is_adapter_file(const std::string& path) {
  std::vector<WeightProblem> ignored;  // the file is opened again, and its problems kept, when it is read
  const TensorStore store = TensorStore::open(path, "model", &ignored);
  for (std::size_t i = 0; i < store.size(); ++i) {
    if (store[i].name.find(".lora_") != std::string_view::npos) return true;
  }
  return store.size() == 0 && file_name_of(path).find("adapter") != std::string::npos;
}

/// "." and ".." have names too, where it matters whether a folder is called checkpoint-N.
std::string own_name(const std::string& path) {
  const std::string name = file_name_of(path);
  if (name != "." && name != "..") return name;
  std::error_code ec;
  return std::filesystem::canonical(path, ec).filename().string();
}

std::string parent_of(const std::string& path) {
  const std::string name = file_name_of(path);
  return name == "." || name == ".." ? path + "/.." : folder_of(path);
}

bool known_hub_id(const std::string& text) {
  std::string note;
  return looks_like_hub_id(text) && (find_hub_model(text) || !find_in_hub_cache(text, "", &note).empty());
}

/// Folders right below that would have been recognised: somebody gave the folder above.
std::string recognised_below(const std::string& path) {
  std::string found;
  int n = 0;
  std::error_code ec;
  std::vector<std::string> names;
  for (std::filesystem::directory_iterator it(path, ec), end; !ec && it != end && names.size() < 200;
       it.increment(ec)) {
    if (it->is_directory(ec)) names.push_back(it->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  for (const std::string& name : names) {
    const Folder below = look_into(join_path(path, name));
    if (!below.has_adapter() && !below.has_model() && !below.trained() && below.checkpoints.empty()) continue;
    if (++n <= 3) found += (n > 1 ? ", " : "") + below.path;
  }
  return n == 0 ? "" : "; did you mean " + found + (n > 3 ? ", ..." : "") + "?";
}

class Discovery {
 public:
  explicit Discovery(const RunOptions& options) : options_(options) {}

  std::vector<RunPlan> run() {
    take_options();
    // Files first: a config that is named outranks the ones that lie in a folder.
    for (const std::string& path : options_.paths) take_path(without_slash(path), PathKind::kFile);
    for (const std::string& path : options_.paths) take_path(without_slash(path), PathKind::kFolder);
    if (run_folder_) return expand_checkpoints();
    place_models(&plan_);
    finish(&plan_);
    std::vector<RunPlan> plans;
    plans.push_back(std::move(plan_));
    return plans;
  }

 private:
  /// False, with a problem, unless `path` is a file or a folder.
  bool exists(const std::string& path, PathKind* kind, const std::string& remedy) {
    std::string why;
    *kind = path_kind(path, &why);
    if (*kind == PathKind::kFile || *kind == PathKind::kFolder) return true;
    build_.problem(path, why.empty() ? "no such file or folder" : why, remedy);
    return false;
  }

  // ---- explicit options ------------------------------------------------------------------------------------------
  void take_options() {
    for (const std::string& p : options_.configs) take_config(p);
    for (const std::string& p : options_.envs) {
      if (is_file(p, "--env takes a file: the output of pip freeze, a requirements or a lock file"))
        plan_.given_version_files.push_back(p);
    }
    for (const std::string& p : options_.logs) take_log(without_slash(p));
    for (const std::string& p : options_.bases) take_model(without_slash(p), true);
    for (const std::string& p : options_.models) take_model(without_slash(p), false);
    for (const std::string& p : options_.adapters) take_adapter(without_slash(p));
    const std::string& x = options_.hidden_states;
    if (!x.empty() && is_file(x, "--hidden-states takes a .safetensors file with a tensor [tokens, hidden]")) {
      plan_.hidden_states = {x, Rank::kOption};
    }
    if (!options_.trace.empty()) take_trace(without_slash(options_.trace));
    if (!options_.rollout.empty() && is_file(options_.rollout, "--rollout takes an array of expert ids, saved with numpy.save"))
      plan_.rollout = {options_.rollout, Rank::kOption};
  }

  bool is_file(const std::string& path, const std::string& remedy) {
    PathKind kind;
    if (!exists(path, &kind, remedy)) return false;
    if (kind == PathKind::kFolder) build_.problem(path, "is a folder", remedy);
    return kind == PathKind::kFile;
  }

  void take_model(const std::string& path, bool base) {
    const std::string remedy = std::string(base ? "--base" : "--model") +
                               " takes a folder with config.json and *.safetensors, or a hub id ORG/NAME";
    std::string why;
    if (path_kind(path, &why) == PathKind::kMissing && why.empty() && looks_like_hub_id(path)) {
      return build_.claim(&plan_.base_id, path, Rank::kOption, "base model");
    }
    PathKind kind;
    if (!exists(path, &kind, remedy)) return;
    Folder folder;
    folder.path = path;
    if (kind == PathKind::kFolder) {
      folder = look_into(path);
      build_.keep_problems(folder);
    } else {
      (has_ending(path, ".safetensors") || has_ending(path, ".index.json") ? folder.weights : folder.config) = path;
    }
    if (!folder.has_model()) {
      return build_.problem(path, "holds neither config.json nor *.safetensors" + unread_weights_of(folder), remedy);
    }
    const bool run_wrote = !base && (folder.trained() || !options_.bases.empty());
    build_.claim_model(folder, run_wrote, Rank::kOption);
    if (run_wrote) build_.claim_trainer_files(folder, Rank::kPath);
    not_read_.insert(not_read_.end(), folder.other_weights.begin(), folder.other_weights.end());
  }

  void take_adapter(const std::string& path) {
    PathKind kind;
    const std::string remedy = "--adapter takes a folder with adapter_config.json and adapter_model.safetensors";
    if (!exists(path, &kind, remedy)) return;
    if (kind == PathKind::kFile) {
      Slot* slot = has_ending(path, ".safetensors") ? &plan_.adapter_weights : &plan_.adapter_config;
      return build_.claim(slot, path, Rank::kOption, "adapter");
    }
    const Folder folder = look_into(path);
    build_.keep_problems(folder);
    if (!folder.has_adapter()) {
      return build_.problem(
          path, "holds neither adapter_config.json nor adapter_model.safetensors" + unread_weights_of(folder), remedy);
    }
    take_trained_folder(folder, Rank::kOption);
  }

  void take_trace(const std::string& path) {
    PathKind kind;
    if (!exists(path, &kind, "--trace takes a folder with trace.json")) return;
    if (recognise_trace(path) != TraceFormat::kNone) return build_.claim(&plan_.trace, path, Rank::kOption, "trace");
    build_.problem(path, "is no trace that moe-audit knows",
                   "--trace takes a folder with trace.json, or another format of docs/trace.md");
  }

  void take_config(const std::string& path) {
    if (!is_file(path, "--config takes a training config (.yml, .yaml, .json) or training_args.bin")) return;
    if (has_ending(path, ".bin")) return build_.claim(&plan_.training_args, path, Rank::kOption, "training_args.bin");
    plan_.training_configs.push_back(path);
  }

  void take_log(const std::string& path) {
    PathKind kind;
    const char* const remedy = "--log takes a trainer_state.json, metrics as JSON lines or CSV, or the text that Megatron-LM prints";
    if (!exists(path, &kind, remedy)) return;
    const std::string file = kind == PathKind::kFolder ? look_into(path).trainer_state : path;
    if (file.empty()) return build_.problem(path, "holds no trainer_state.json", remedy);
    build_.claim(&plan_.trainer_state, file, Rank::kOption, "log");
  }

  // ---- positional paths ------------------------------------------------------------------------------------------
  void take_path(const std::string& path, PathKind turn) {
    std::string why;
    const PathKind kind = path_kind(path, &why);
    if (kind == PathKind::kFolder || turn == PathKind::kFolder) {
      if (kind == turn) take_folder(path);
    } else if (kind == PathKind::kFile) {
      take_file(path);
    } else if (why.empty() && known_hub_id(path)) {
      build_.claim(&plan_.base_id, path, Rank::kPath, "base model");
    } else {
      build_.problem(path, why.empty() ? "no such file or folder" : why, kAcceptedInputs);
    }
  }

  void take_file(const std::string& path) {
    const std::string name = file_name_of(path);
    if (recognise_trace(path) != TraceFormat::kNone) return build_.claim(&plan_.trace, path, Rank::kPath, "trace");
    if (has_ending(name, ".safetensors") && is_adapter_file(path)) {
      return build_.claim(&plan_.adapter_weights, path, Rank::kPath, "adapter");
    }
    if (has_ending(name, ".safetensors") || has_ending(name, ".safetensors.index.json")) return take_weight_file(path);
    if (name == "training_args.bin") return build_.claim(&plan_.training_args, path, Rank::kPath, "training_args.bin");
    std::error_code ec;
    const std::uintmax_t size = std::filesystem::file_size(path, ec);
    if (!ec && size == 0) {
      return build_.problem(path, "is empty (0 bytes)",
                            "restore the file: a full disk or an interrupted copy leaves such files");
    }
    if (has_ending(name, ".json") || has_ending(name, ".yml") || has_ending(name, ".yaml")) return take_tree(path);
    if (is_training_log(path)) return build_.claim(&plan_.trainer_state, path, Rank::kPath, "log");
    std::string text, error;
    const bool small = !ec && size <= (std::uintmax_t{64} << 20);
    if (small && read_file(path, &text, &error) && recognise_versions(path, text) != VersionFile::kNone) {
      return plan_.given_version_files.push_back(path);
    }
    const bool pickle =
        has_ending(name, ".bin") || has_ending(name, ".pt") || has_ending(name, ".pth") || has_ending(name, ".ckpt");
    build_.problem(path,
                   pickle ? "looks like pickled tensors, which moe-audit neither reads nor executes"
                          : "is of no kind that moe-audit knows",
                   kAcceptedInputs);
  }

  /// One weight file by its path: a shard stands for its whole model, and config.json beside it describes it.
  void take_weight_file(const std::string& path) {
    Folder found;
    found.path = folder_of(path);
    found.weights = path;
    const std::string index = join_path(found.path, "model.safetensors.index.json");
    std::string why, text, error;
    if (index != path && path_kind(index, &why) == PathKind::kFile && read_file(index, &text, &error) &&
        text.find("\"" + file_name_of(path) + "\"") != std::string::npos) {
      found.weights = index;
      plan_.inputs.push_back({path, "shard", "all shards of " + index + " are read"});
    }
    const std::string config = join_path(found.path, "config.json");
    if (path_kind(config, &why) == PathKind::kFile) found.config = config;
    plain_models_.push_back(std::move(found));
  }

  void take_tree(const std::string& path) {
    Material probe;
    Node root;
    if (!read_tree(path, &root, &probe)) {
      plan_.problems.insert(plan_.problems.end(), probe.problems.begin(), probe.problems.end());
      return;
    }
    if (root.find("log_history")) return build_.claim(&plan_.trainer_state, path, Rank::kPath, "log");
    if (root.find("peft_type")) return build_.claim(&plan_.adapter_config, path, Rank::kPath, "adapter");
    if (find_config_reader(root)) return plan_.training_configs.push_back(path);
    if (root.find("model_type") || root.find("architectures")) {
      Folder found;
      found.path = folder_of(path);
      found.config = path;
      return plain_models_.push_back(std::move(found));
    }
    build_.problem(
        path,
        "is a " + std::string(has_ending(path, ".json") ? "JSON" : "YAML") + " file of no kind that moe-audit knows",
        kAcceptedInputs);
  }

  void take_folder(const std::string& path) {
    if (recognise_trace(path) != TraceFormat::kNone) return build_.claim(&plan_.trace, path, Rank::kPath, "trace");
    Folder folder = look_into(path);
    build_.keep_problems(folder);
    not_read_.insert(not_read_.end(), folder.other_weights.begin(), folder.other_weights.end());
    if (!folder.checkpoints.empty()) {
      if (!run_folder_) {
        run_folder_ = std::make_unique<Folder>(std::move(folder));
      } else {
        build_.problem(path, "is a second run folder beside " + run_folder_->path + ": one invocation audits one run",
                       "audit them one after the other");
      }
      return;
    }
    if (metrics_.empty()) metrics_ = folder.metrics;
    const bool trained = folder.trained() || folder.has_adapter() || checkpoint_number(own_name(path));
    if (trained)
      take_trained_folder(folder, Rank::kFound);
    else if (folder.has_model())
      plain_models_.push_back(folder);
    const bool config = build_.choose_config(folder);
    if (trained || config || !folder.has_model()) build_.add_version_files(folder);
    const bool empty = folder.has_model() + folder.has_adapter() + folder.trained() == 0;
    if (empty && !config && folder.version_files.empty()) {
      build_.problem(path,
                     "nothing in this folder is of a kind that moe-audit knows" + unread_weights_of(folder) +
                         recognised_below(path),
                     kAcceptedInputs);
    }
  }

  void take_trained_folder(const Folder& folder, Rank rank) {
    const bool checkpoint = checkpoint_number(own_name(folder.path)).has_value();
    build_.take_checkpoint(folder, folder.trained() || checkpoint, rank);
    if (checkpoint) build_.fill_from_run_folder(look_into(parent_of(folder.path)));
    if (plan_.name.empty()) plan_.name = folder.path;
  }

  // ---- putting it together ---------------------------------------------------------------------------------------
  /// A model folder without trainer files is the base, unless --base named another: then it is what was trained.
  void place_models(RunPlan* plan) {
    PlanBuilder build(plan);
    const bool base_named = !options_.bases.empty();
    if (plain_models_.size() > 1 && !base_named) {
      build.problem(plain_models_[1].path,
                    "is a second model beside " + plain_models_[0].path + ", and neither holds trainer files",
                    "say which is which: --base BASE_MODEL --model TRAINED_MODEL");
    }
    const std::size_t n = base_named ? plain_models_.size() : std::min<std::size_t>(plain_models_.size(), 1);
    for (std::size_t i = 0; i < n; ++i) build.claim_model(plain_models_[i], base_named, Rank::kFound);
  }

  std::vector<RunPlan> expand_checkpoints() {
    const Folder& parent = *run_folder_;
    std::vector<RunPlan> plans;
    std::vector<Folder> usable;
    for (auto it = parent.checkpoints.rbegin(); it != parent.checkpoints.rend(); ++it) {
      Folder folder = look_into(it->second);
      if (!folder.trained() && !folder.has_adapter() && !folder.has_model()) {
        build_.problem(it->second,
                       "holds nothing that moe-audit knows (an interrupted save?)" + unread_weights_of(folder) +
                           "; it is passed over",
                       "look at the disk and at the last lines of the training log", false);
        continue;
      }
      usable.push_back(std::move(folder));
      if (!options_.all_checkpoints) break;
    }
    if (usable.empty()) {
      build_.problem(parent.path, "none of its checkpoints could be recognised", kAcceptedInputs);
      finish(&plan_);
      plans.push_back(std::move(plan_));
      return plans;
    }
    std::reverse(usable.begin(), usable.end());
    for (const Folder& folder : usable) {
      RunPlan plan = plan_;
      PlanBuilder build(&plan);
      build.keep_problems(folder);
      build.take_checkpoint(folder, true, Rank::kFound);
      build.fill_from_run_folder(parent);
      place_models(&plan);
      plan.name = folder.path;
      const std::size_t count = parent.checkpoints.size();
      plan.inputs.push_back(
          {folder.path, "checkpoint",
           options_.all_checkpoints || count == 1 ? "" : "latest of " + std::to_string(count) + " checkpoints"});
      finish(&plan);
      plans.push_back(std::move(plan));
    }
    return plans;
  }

  void finish(RunPlan* plan) {
    if (plan->name.empty() && !options_.paths.empty()) plan->name = without_slash(options_.paths.front());
    for (const auto* list :
         {&options_.adapters, &options_.models, &options_.bases, &options_.configs, &options_.logs, &options_.envs}) {
      if (plan->name.empty() && !list->empty()) plan->name = without_slash(list->front());
    }
    if (plan->name.empty()) plan->name = without_slash(options_.trace);
    if (plan->trainer_state.empty() && !metrics_.empty()) {
      PlanBuilder(plan).problem(metrics_, "is a training log by its name, and was not read: beside a model it may be another run's",
                                "if it is this run's, give it, too: --log " + metrics_, false);
    }
    const bool weights = !plan->base_weights.empty() || !plan->run_weights.empty() || !plan->adapter_weights.empty();
    if (weights || not_read_.empty()) return;
    PlanBuilder(plan).problem(
        not_read_.front(), "weights in this format are not read (moe-audit reads .safetensors, and executes no pickle)",
        "save the model with save_pretrained(..., safe_serialization=True)", false);
  }

  const RunOptions& options_;
  RunPlan plan_;
  PlanBuilder build_{&plan_};
  std::vector<Folder> plain_models_;
  std::vector<std::string> not_read_;
  std::string metrics_;
  std::unique_ptr<Folder> run_folder_;
};

}  // namespace

std::vector<RunPlan> discover(const RunOptions& options) { return Discovery(options).run(); }

}  // namespace moeaudit
