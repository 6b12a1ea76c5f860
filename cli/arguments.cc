#include "cli/arguments.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <thread>

namespace moeaudit {
namespace {

/// One value a use: `--model A --model B`, so that a positional path can follow an option.
CLI::Option* one_each(CLI::Option* option) { return option->allow_extra_args(false); }

const Writer* find_writer(std::string_view name) {
  for (int i = 0; i < kNumWriters; ++i) {
    if (kWriters[i]->name == name) return kWriters[i];
  }
  return nullptr;
}

std::string writer_names() {
  std::string names;
  for (int i = 0; i < kNumWriters; ++i) names += (i ? ", " : "") + std::string(kWriters[i]->name);
  return names;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::string part;
  for (char c : text) {
    if (c == separator) {
      parts.push_back(part);
      part.clear();
    } else {
      part += c;
    }
  }
  parts.push_back(part);
  return parts;
}

}  // namespace

CLI::Option* add_device_option(CLI::App& app, Device& device) {
  static const std::map<std::string, Device> kDevices = {{"auto", Device::kAuto}, {"cpu", Device::kCpu}, {"cuda", Device::kCuda}};
  return app.add_option("--device", device, "Where kernels run: auto, cpu, cuda; the verdict does not depend on it (default auto)")
      ->transform(CLI::CheckedTransformer(kDevices).description("{auto,cpu,cuda}"))->type_name("DEVICE");
}

std::unique_ptr<kernels::Backend> open_cuda_or_throw() {
  std::string why;
  std::unique_ptr<kernels::Backend> device = kernels::open_cuda(&why);
  if (device == nullptr) throw UsageError{"--device cuda: " + why + "; use --device auto or cpu: the verdict is the same"};
  return device;
}

void add_input_options(CLI::App& app, Arguments& a) {
  app.add_option("PATH", a.run.paths,
                 "Model directory, training config, adapter, checkpoint or run folder, lock file, trainer_state.json; "
                 "all paths together are one run");
  const char* group = "What the paths are, said outright";
  one_each(app.add_option("--model", a.run.models, "Model directory or .safetensors file"))->group(group)->type_name("DIR");
  one_each(app.add_option("--base", a.run.bases, "Base model that the run starts from"))->group(group)->type_name("DIR");
  one_each(app.add_option("--adapter", a.run.adapters, "Adapter directory (adapter_config.json)"))->group(group)->type_name("DIR");
  one_each(app.add_option("--config", a.run.configs, "Training config: Axolotl, TRL, TrainingArguments; YAML or JSON"))
      ->group(group)->type_name("FILE");
  one_each(app.add_option("--env", a.run.envs, "Package versions: pip freeze, requirements.txt, uv.lock"))
      ->group(group)->type_name("FILE");
  one_each(app.add_option("--log", a.run.logs, "Training log: trainer_state.json, JSON lines, CSV, or the text that Megatron-LM prints"))->group(group)->type_name("FILE");
  app.add_option("--hidden-states", a.run.hidden_states,
                 "Router inputs for the precision measure: safetensors [tokens, hidden]")->group(group)->type_name("FILE");

  app.add_option("--trace", a.run.trace, "Recorded steps of the run: a folder with trace.json, or another format of docs/trace.md")
      ->group(group)->type_name("DIR");
  app.add_option("--rollout", a.run.rollout,
                 "Experts that an inference engine chose for the tokens of --trace: .npy, [tokens, layers, k]")
      ->group(group)->type_name("FILE");

  group = "What no file says";
  one_each(app.add_option("--assume", a.assume, "Package versions, e.g. transformers=4.57.1,peft=0.18.0"))
      ->group(group)->type_name("PKG=VERSION[,...]");
  app.add_option("--world-size", a.run.world_size, "Data-parallel processes")
      ->group(group)->type_name("N")->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 24));
  app.add_option("--sequence-length", a.run.sequence_length, "Longest sequence in tokens")
      ->group(group)->type_name("N")->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 30));

  group = "How to run";
  app.add_flag("--full", a.engine.full,
               "Read every weight, whatever the size; without it only files of up to 2 GB together are read whole")->group(group);
  app.add_flag("--all", a.run.all_checkpoints, "Audit every checkpoint-N of a run folder, not only the latest")->group(group);
  a.engine.threads = std::max(1u, std::thread::hardware_concurrency());
  app.add_option("--threads", a.engine.threads, "Threads; the result does not depend on it")
      ->group(group)->type_name("N")->check(CLI::Range(1, 1024));
  add_device_option(app, a.engine.device)->group(group);
  app.add_flag("-v,--verbose", a.verbose, "Text: say of every rule that was not applicable, or could not be judged, why")->group(group);
  app.add_flag("--no-progress", a.no_progress, "No progress bar on stderr")->group(group);
  app.add_option("--color", a.color, "auto, always or never (NO_COLOR is respected)")
      ->group(group)->check(CLI::IsMember({"auto", "always", "never"}))->type_name("WHEN");
}

void add_output_options(CLI::App& app, Arguments& a) {
  const char* group = "Verdict and report";
  static const std::map<std::string, FailOn> kLevels = {
      {"error", FailOn::kError}, {"warning", FailOn::kWarning}, {"note", FailOn::kNote}, {"never", FailOn::kNever}};
  one_each(app.add_option("--select", a.engine.select, "Only these rules: id, id prefix (BL) or name"))
      ->group(group)->type_name("RULE")->delimiter(',');
  one_each(app.add_option("--ignore", a.engine.ignore, "Not these rules: id, id prefix or name"))
      ->group(group)->type_name("RULE")->delimiter(',');
  app.add_option("--fail-on", a.engine.fail_on, "Exit 1 from this severity on: error, warning, note, never (default error)")
      ->group(group)->transform(CLI::CheckedTransformer(kLevels, CLI::ignore_case))->type_name("LEVEL");
  app.add_flag("--strict", a.engine.strict, "Exit 2 if a rule cannot tell")->group(group);
  app.add_flag_callback("--static", [&a] { a.engine.replays = false; },
                        "Headers, configs and router rows only: no replay of the routers, no scan of the weights")
      ->group(group)->excludes("--full");
  app.add_option("--baseline", a.baseline,
                 "Findings accepted earlier: they are listed and do not count. Write one with --format baseline=FILE")
      ->group(group)->type_name("FILE");
  app.add_flag_callback("--no-suppressions", [&a] { a.engine.comments = false; },
                        "Comments '# moe-audit: ignore[RULE] reason' in files suppress nothing")->group(group);
  one_each(app.add_option("--format", a.formats, writer_names() + "; to stdout, or =FILE to a file: json=report.json"))
      ->group(group)->type_name("FORMAT[=FILE]");
}

void finish(Arguments& a) {
  for (const std::string& text : a.assume) {
    for (const std::string& item : split(text, ',')) {
      const std::size_t equals = item.find('=');
      const std::string package = item.substr(0, equals);
      std::string version = equals == std::string::npos ? std::string() : item.substr(equals + 1);
      while (!version.empty() && version[0] == '=') version.erase(0, 1);  // "peft==0.18.0" means the same
      if (package.empty() || version.empty() || !VersionSet::parse(version)) {
        throw UsageError{"--assume '" + item + "': expected PACKAGE=VERSION, e.g. transformers=4.57.1 or peft=>=0.17,<0.19"};
      }
      a.run.assume.emplace_back(package, version);
    }
  }
  for (const auto& patterns : {&a.engine.select, &a.engine.ignore}) {
    for (const std::string& pattern : *patterns) {
      if (pattern.empty() || selects_nothing(pattern)) {
        throw UsageError{"no rule is called '" + pattern + "' or begins with it; `moe-audit rules` lists them"};
      }
    }
  }
  if (a.engine.device == Device::kCuda) open_cuda_or_throw();
  if (a.formats.empty()) a.formats.push_back("text");
  int to_stdout = 0;
  for (const std::string& format : a.formats) {
    const std::size_t equals = format.find('=');
    if (!find_writer(format.substr(0, equals))) {
      throw UsageError{"--format '" + format + "': known formats are " + writer_names() + ", each also as FORMAT=FILE"};
    }
    if (equals == std::string::npos) ++to_stdout;
    else if (equals + 1 == format.size()) throw UsageError{"--format '" + format + "': a file name must follow ="};
  }
  if (to_stdout > 1) throw UsageError{"--format: only one format can go to stdout, write the others as FORMAT=FILE"};
}

WriterOptions terminal_options(const Arguments& a) {
  WriterOptions options;
  options.full = a.engine.full;
  options.verbose = a.verbose;
  const char* no_color = std::getenv("NO_COLOR");
  const bool refused = no_color && *no_color;
  options.color = a.color == "always" || (a.color == "auto" && !refused && isatty(STDOUT_FILENO));
  winsize size{};
  if (isatty(STDOUT_FILENO) && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col >= 40) {
    options.width = std::min<int>(size.ws_col, 120);
  }
  return options;
}

ProgressBar::ProgressBar(bool enabled) : enabled_(enabled && isatty(STDERR_FILENO)) {}

ProgressBar::~ProgressBar() {
  if (drawn_) std::cerr << "\r\033[K" << std::flush;
}

void ProgressBar::operator()(std::string_view stage, double done) {
  if (!enabled_) return;
  const int percent = static_cast<int>(std::clamp(done, 0.0, 1.0) * 100);
  if (percent == last_percent_ && stage == last_stage_) return;
  last_percent_ = percent;
  last_stage_ = std::string(stage);
  drawn_ = true;
  constexpr int kCells = 30;
  const int full = percent * kCells / 100;
  std::cerr << "\r\033[K" << stage << " [" << std::string(full, '#') << std::string(kCells - full, ' ') << "] " << percent
            << "%" << std::flush;
}

AuditResult audit(Arguments& a) {
  if (a.run.paths.empty() && a.run.models.empty() && a.run.bases.empty() && a.run.adapters.empty() && a.run.configs.empty() &&
      a.run.logs.empty() && a.run.trace.empty()) {
    throw UsageError{"nothing to audit: give a PATH (a model directory, training config, adapter or run folder); see --help"};
  }
  if (InputProblem problem; !a.baseline.empty() && !read_baseline(a.baseline, &a.engine.baseline, &problem)) {
    throw UsageError{"--baseline " + a.baseline + (problem.line ? ":" + std::to_string(problem.line) : "") + ": " +
                     problem.what + "; " + problem.remedy};
  }
  ProgressBar bar(!a.no_progress);
  a.engine.progress = [&bar](std::string_view stage, double done) { bar(stage, done); };
  std::vector<RunResult> results;
  for (LoadedRun& run : load_runs(a.run)) results.push_back(audit_run(std::move(run), a.engine));
  a.engine.progress = nullptr;
  AuditResult result = conclude(std::move(results), a.engine);
  result.all_checkpoints = a.run.all_checkpoints;
  return result;
}

bool write_file(const std::string& path, const std::function<void(std::ostream&)>& write) {
  std::ofstream file(path, std::ios::binary);
  if (file) {
    write(file);
    file.flush();
  }
  if (!file) {
    std::cerr << "moe-audit: " << path << ": cannot be written: " << std::strerror(errno) << "\n";
    return false;
  }
  return true;
}

bool write_reports(const AuditResult& result, const Arguments& a) {
  const WriterOptions options = terminal_options(a);
  bool ok = true;
  for (const std::string& format : a.formats) {
    const std::size_t equals = format.find('=');
    const Writer* writer = find_writer(format.substr(0, equals));
    if (equals == std::string::npos) {
      writer->write(result, options, std::cout);
      std::cout.flush();
      continue;
    }
    WriterOptions plain;
    plain.full = a.engine.full;
    ok &= write_file(format.substr(equals + 1), [&](std::ostream& out) { writer->write(result, plain, out); });
  }
  return ok;
}

}  // namespace moeaudit
