// From a run's plan to its facts: every file is read by its reader into Material, weakest word first, then resolved.
#include <algorithm>
#include <deque>
#include <filesystem>

#include "audit/families/family.h"
#include "audit/inputs/discover.h"
#include "audit/inputs/files.h"
#include "audit/inputs/inputs.h"
#include "audit/inputs/readers.h"
#include "audit/inputs/resolve.h"

namespace moeaudit {
namespace {

/// A base model that some file names.
struct BaseName {
  std::string name;
  Source source;
};

class Loader {
 public:
  Loader(RunPlan plan, const RunOptions& options) : plan_(std::move(plan)), options_(options) {}

  LoadedRun load() {
    m_.name = plan_.name;
    m_.problems = std::move(plan_.problems);
    m_.inputs = std::move(plan_.inputs);
    read_versions_and_run();
    read_training();
    read_base();
    for (const Parsed& p : configs_) {
      if (p.reader->after_model) p.reader->after_model({p.path, Role::kTrainingConfig, &p.root}, &m_);
    }
    check_model_configs(&m_);
    open_weights();
    order_by_authority();

    LoadedRun run;
    run.name = m_.name;
    resolve(m_, options_, &run.facts);
    resolve_trace(m_.trace.get(), plan_.trace.path, plan_.rollout.path, &run.facts);
    run.model = std::move(m_.model);
    run.base = std::move(m_.base);
    run.adapter = std::move(m_.adapter);
    run.hidden_states = std::move(m_.hidden_states);
    run.trace = std::move(m_.trace);
    run.rollout = std::move(m_.rollout);
    run.inputs = std::move(m_.inputs);
    run.problems = std::move(m_.problems);
    run.suppressions = std::move(m_.suppressions);
    return run;
  }

 private:
  struct Parsed {
    std::string path;
    Node root;
    const ConfigReader* reader;
  };

  void input(const std::string& path, std::string kind, std::string note = {}) {
    m_.inputs.push_back({path, std::move(kind), std::move(note)});
  }
  void remember_base() {
    if (!m_.base_model.empty() && (bases_.empty() || bases_.back().name != m_.base_model)) {
      bases_.push_back({m_.base_model, m_.base_model_source});
    }
  }

  /// Lock files first, then what the run wrote itself, then what the user says.
  void read_versions_and_run() {
    for (const std::string& file : plan_.version_files) {
      if (read_versions(file, &m_)) input(file, "package versions");
    }
    if (!plan_.run_config.empty()) {
      read_model_config(plan_.run_config.path, Role::kCheckpointConfig, plan_.run_config_states_version, &m_);
      input(plan_.run_config.path, "config of the run");
    }
    if (!plan_.adapter_config.empty()) {
      read_adapter_config(plan_.adapter_config.path, &m_);
      input(plan_.adapter_config.path, "adapter config");
      remember_base();
    }
    for (const std::string& file : plan_.model_cards) {
      if (read_versions(file, &m_)) input(file, "model card with framework versions");
    }
    for (const std::string& file : plan_.given_version_files) {
      input(file, "package versions");
      if (read_versions(file, &m_)) continue;
      m_.problems.push_back(
          {file, 0, 0, "states no package version", "give the output of pip freeze, a requirements or a lock file"});
    }
    for (const auto& [package, version] : options_.assume) read_assumption(package, version, &m_);
    // A range says less than a release, whoever says it; only the user on the command line is taken at his word.
    std::stable_partition(m_.versions.begin(), m_.versions.end(), [](const VersionStatement& s) {
      return !s.versions.exact && s.source.role != Role::kCommandLine;
    });
    if (!plan_.trace.empty()) {
      read_trace(plan_.trace.path, &m_);
      input(plan_.trace.path, "recorded trace");
    }
    if (!plan_.rollout.empty()) {
      read_rollout(plan_.rollout.path, &m_);
      input(plan_.rollout.path, "experts of a rollout");
    }
    if (!plan_.trainer_state.empty()) {
      const bool state = has_ending(plan_.trainer_state.path, ".json");
      if (state) read_trainer_state(plan_.trainer_state.path, &m_);
      else read_training_log(plan_.trainer_state.path, &m_);
      input(plan_.trainer_state.path, state ? "trainer state" : "training log");
    }
  }

  void read_training() {
    for (const std::string& path : plan_.training_configs) {
      Node root;
      if (!read_tree(path, &root, &m_)) continue;
      const ConfigReader* reader = find_config_reader(root);
      if (!reader) {
        m_.problems.push_back({path, 0, 0, "is no training config that moe-audit knows",
                               "known are the configs of Axolotl, TRL, LLaMA-Factory, ms-swift, Accelerate and DeepSpeed, and "
                               "TrainingArguments, in YAML or JSON"});
        continue;
      }
      if (!reader->read) {
        input(path, std::string(reader->kind), "not read");
        m_.problems.push_back({path, 0, 0, "is a " + std::string(reader->kind) + ", which moe-audit does not read",
                               std::string(reader->why_not_read), false});
        continue;
      }
      configs_.push_back({path, std::move(root), reader});
      reader->read({path, Role::kTrainingConfig, &configs_.back().root}, &m_);
      input(path, std::string(reader->kind));
      remember_base();
    }
    if (!plan_.training_args.empty()) {
      read_training_args(plan_.training_args.path, &m_);
      input(plan_.training_args.path, "training_args.bin");
    }
    read_engine();
  }

  /// The DeepSpeed settings that `deepspeed:` holds, as a dict or as the path of a JSON file.
  void read_engine() {
    std::vector<Setting> named;
    for (const Setting& s : m_.settings) {
      if (s.name == "deepspeed" || s.name == "deepspeed.file") named.push_back(s);
    }
    for (const Setting& s : named) {
      if (s.value.is_map()) {
        read_deepspeed({s.source.file, s.source.role, &s.value}, s.source.key, &m_);
      } else if (s.value.is_string() && !s.value.text.empty()) {
        read_engine_file(s);
      }
    }
  }

  void read_engine_file(const Setting& named) {
    for (const std::string& place : places_of(named.source.file)) {
      const std::string path = join_path(place, named.value.text);
      std::string why;
      if (path_kind(path, &why) != PathKind::kFile) continue;
      const bool known = std::any_of(configs_.begin(), configs_.end(), [&](const Parsed& p) { return p.path == path; });
      Node root;
      if (known || !read_tree(path, &root, &m_)) return;
      const ConfigReader* reader = find_config_reader(root);
      if (!reader || reader->framework != "" || !reader->read) {
        m_.problems.push_back({path, 0, 0, "is no DeepSpeed config, as " + to_text(named.source) + " says",
                               "give the JSON that the run used with --config FILE", false});
        return;
      }
      configs_.push_back({path, std::move(root), reader});
      reader->read({path, Role::kTrainingConfig, &configs_.back().root}, &m_);
      input(path, std::string(reader->kind), "named by " + to_text(named.source));
      return;
    }
    m_.settings.push_back({"deepspeed.not_found", named.value, named.source});
  }

  // ---- the base model --------------------------------------------------------------------------------------------
  void read_base() {
    const std::size_t run_configs = m_.configs.size();
    std::string note;
    if (plan_.base_config.empty() && plan_.base_weights.empty()) find_base(&note);
    if (!plan_.base_config.empty()) {
      read_model_config(plan_.base_config.path, Role::kBaseModelConfig, false, &m_);
      input(plan_.base_config.path, "base model", note);
    }
    m_.base_model_found = m_.configs.size() > run_configs;
    // Weakest first: the base model's config, then what the run wrote.
    std::rotate(m_.configs.begin(), m_.configs.begin() + static_cast<std::ptrdiff_t>(run_configs), m_.configs.end());
  }

  std::string revision() const {
    std::string found;
    for (const Setting& s : m_.settings) {
      if (s.name == "base_model_revision" && s.value.is_string()) found = s.value.text;
    }
    return found;
  }

  static bool is_model_folder(const std::string& path) {
    std::string why;
    if (path_kind(path, &why) != PathKind::kFolder) return false;
    return look_into(path).has_model();
  }

  void use_base_folder(const std::string& path) {
    const Folder folder = look_into(path);
    plan_.base_config = {folder.config, Slot::Rank::kFound};
    if (folder.config.empty()) plan_.base_config = {};
    if (!folder.weights.empty()) plan_.base_weights = {folder.weights, Slot::Rank::kFound};
  }

  /// Where a path may lie that a file names: beside the file, in the run's folders, in the current directory.
  std::vector<std::string> places_of(const std::string& file) const {
    std::vector<std::string> places;
    if (!file.empty()) places.push_back(folder_of(file));
    places.insert(places.end(), plan_.folders.begin(), plan_.folders.end());
    places.push_back(".");
    return places;
  }

  /// Looks where the framework would, then in the local hub cache.
  bool find_named(const BaseName& base, std::string* note) {
    for (const std::string& place : places_of(base.source.file)) {
      const std::string path = join_path(place, base.name);
      if (!is_model_folder(path)) continue;
      use_base_folder(path);
      *note = "named by " + to_text(base.source);
      return true;
    }
    const std::string cached = find_in_hub_cache(base.name, revision(), note);
    if (cached.empty()) return false;
    use_base_folder(cached);
    return true;
  }

  void find_base(std::string* note) {
    if (!plan_.base_id.empty())
      bases_.push_back({plan_.base_id.path, {Role::kCommandLine, "", 0, 0, plan_.base_id.path, "", ""}});
    for (auto base = bases_.rbegin(); base != bases_.rend(); ++base) {
      m_.base_model = base->name;
      m_.base_model_source = base->source;
      if (find_named(*base, note)) return;
    }
    // Of the names that lead nowhere, the strongest that the committed table of hub ids knows; else the strongest.
    const auto known =
        std::find_if(bases_.rbegin(), bases_.rend(), [](const BaseName& b) { return find_hub_model(b.name); });
    if (bases_.empty()) return;
    const BaseName& base = known != bases_.rend() ? *known : bases_.back();
    m_.base_model = base.name;
    m_.base_model_source = base.source;
    const bool is_path = base.name.front() == '/' || base.name.front() == '.' || base.name.front() == '~';
    if (!is_path || !m_.configs.empty()) return;
    m_.problems.push_back({base.source.file, base.source.line, base.source.column,
                           "the base model " + base.name + " is not here",
                           "give the folder of the base model with --base DIR", false});
  }

  // ---- weights ---------------------------------------------------------------------------------------------------
  void open_weights() {
    const Slot& model = plan_.run_weights.empty() ? plan_.base_weights : plan_.run_weights;
    if (!model.empty()) {
      m_.model = TensorStore::open(model.path, "model", &m_.weight_problems);
      input(model.path, plan_.run_weights.empty() ? "base model weights" : "trained weights");
    }
    if (!plan_.run_weights.empty() && !plan_.base_weights.empty() && plan_.run_weights.path != plan_.base_weights.path) {
      m_.base_asked = plan_.base_weights.rank > Slot::Rank::kFound;
      m_.base = TensorStore::open(plan_.base_weights.path, "model", &m_.weight_problems);
      input(plan_.base_weights.path, "base model weights");
    }
    if (!plan_.adapter_weights.empty()) {
      m_.adapter = TensorStore::open(plan_.adapter_weights.path, "adapter_model", &m_.weight_problems);
      input(plan_.adapter_weights.path, "adapter weights");
      if (!m_.adapter_seen) {
        m_.adapter_seen = true;
        m_.adapter_source.role = Role::kAdapterWeights;
        m_.adapter_source.file = plan_.adapter_weights.path;
      }
    }
    if (plan_.hidden_states.empty()) return;
    std::vector<WeightProblem> problems;
    m_.hidden_states = TensorStore::open(plan_.hidden_states.path, "hidden_states", &problems);
    input(plan_.hidden_states.path, "hidden states");
    for (const WeightProblem& p : problems) {
      m_.problems.push_back({p.file, 0, 0, "hidden states cannot be read: " + p.what,
                             "save one tensor [tokens, hidden] with safetensors.torch.save_file"});
    }
  }

  /// Settings weakest first. Files are read in the order in which they depend on each other, which is another one.
  void order_by_authority() {
    auto rank = [](const Setting& s) {
      switch (s.source.role) {
        case Role::kBaseModelConfig: return 0;
        case Role::kCheckpointConfig: return 1;
        case Role::kAdapterConfig: return 2;
        case Role::kTrainingConfig: return 3;
        case Role::kTrainingArguments:
        case Role::kTrace: return 4;
        default: return 5;  // trainer_state.json: what the Trainer worked out; the command line
      }
    };
    std::stable_sort(m_.settings.begin(), m_.settings.end(),
                     [&](const Setting& a, const Setting& b) { return rank(a) < rank(b); });
  }

  RunPlan plan_;
  const RunOptions& options_;
  Material m_;
  std::deque<Parsed> configs_;  // a deque: readers hold pointers to the roots
  std::vector<BaseName> bases_;
};

}  // namespace

std::vector<LoadedRun> load_runs(const RunOptions& options) {
  std::vector<LoadedRun> runs;
  for (RunPlan& plan : discover(options)) runs.push_back(Loader(std::move(plan), options).load());
  return runs;
}

bool read_tree(const std::string& path, Node* out, Material* material) {
  auto problem = [&](int line, int column, std::string what, std::string remedy, bool fatal = true) {
    material->problems.push_back({path, line, column, std::move(what), std::move(remedy), fatal});
    return false;
  };
  std::string why;
  switch (path_kind(path, &why)) {
    case PathKind::kFile: break;
    case PathKind::kMissing: return problem(0, 0, why.empty() ? "no such file" : why, "check the path");
    case PathKind::kFolder: return problem(0, 0, "is a folder, not a file", "give the file inside it");
    case PathKind::kOther: return problem(0, 0, why, "give a regular file");
  }
  std::string text;
  if (!read_file(path, &text, &why)) return problem(0, 0, why, "make the file readable");
  if (text.find_first_not_of(" \t\r\n") == std::string::npos) {
    return problem(0, 0, text.empty() ? "is empty (0 bytes)" : "is empty",
                   "restore the file: a full disk or an interrupted copy leaves such files");
  }
  const bool yaml = has_ending(path, ".yml") || has_ending(path, ".yaml") ||
                    (!has_ending(path, ".json") && text[text.find_first_not_of(" \t\r\n")] != '{');
  std::vector<DuplicateKey> duplicates;
  TextError error;
  if (!(yaml ? parse_yaml(text, out, &duplicates, &error) : parse_json(text, out, &duplicates, &error))) {
    return problem(error.line, error.column, std::string(yaml ? "YAML" : "JSON") + " error: " + error.what,
                   "repair the file at this place");
  }
  if (yaml) read_suppressions(path, text, material);
  for (const DuplicateKey& d : duplicates) {
    problem(d.line, 0,
            "key " + d.path + " stands twice (lines " + std::to_string(d.first_line) + " and " +
                std::to_string(d.line) + "); the last one counts",
            "delete one of the two lines", false);
  }
  return true;
}

}  // namespace moeaudit
