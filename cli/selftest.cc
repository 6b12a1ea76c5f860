// moe-audit selftest: stored vectors on every backend that is present, and what that proves.
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <memory>
#include <sstream>

#include "cli/arguments.h"
#include "cli/stored_vectors.h"
#include "cli/subcommand.h"

extern char** environ;

namespace moeaudit {
namespace {

using Outputs = std::map<std::string, Values>;

/// Of one stem on one backend.
struct StemTally {
  std::size_t vectors = 0, numbers = 0;
  double error = 0, of_bound = 0;  // largest error, and largest error over its bound
};
struct Failure {
  std::string vector, what;
};
struct BackendRun {
  std::string name;    // "host avx2"
  std::string absent;  // why it did not run; empty: it did
  std::map<std::string, StemTally> stems;
  std::vector<std::string> left_out;  // vectors that this backend has no form of
  std::vector<Failure> failures;
  std::map<std::string, Values> rows;  // of the catalogue, by vector
};

std::string number(double v) {
  std::ostringstream out;
  out << std::setprecision(9) << v;
  return out.str();
}

/// A vector's outputs against the stored ones, and its row of the catalogue against the published digits.
void compare(const StoredVector& v, const Outputs& got, BackendRun* run) {
  StemTally& stem = run->stems[v.stem];
  ++stem.vectors;
  for (const auto& [name, want] : v.outputs) {
    const auto at = got.find(name);
    if (at == got.end() || at->second.size() != want.values.size()) {
      run->failures.push_back({v.id, name + " is missing or has another size"});
      continue;
    }
    std::size_t wrong = 0, first = 0;
    for (std::size_t i = 0; i < want.values.size(); ++i) {
      const double error = std::fabs(at->second[i] - want.values[i]);
      if (!(error <= want.bound) && ++wrong == 1) first = i;  // a NaN is wrong
      if (std::isnan(error)) continue;
      stem.error = std::max(stem.error, error);
      if (want.bound > 0) stem.of_bound = std::max(stem.of_bound, error / want.bound);
    }
    stem.numbers += want.values.size();
    if (wrong == 0) continue;
    std::ostringstream what;
    what << std::setprecision(17) << name << "[" << first << "] is " << at->second[first] << ", not " << want.values[first]
         << " within " << std::setprecision(3) << want.bound;
    if (wrong > 1) what << ", and " << wrong - 1 << " more";
    run->failures.push_back({v.id, what.str()});
  }
  if (!v.row) return;
  const auto output = got.find(v.row->output);
  if (output == got.end() || output->second.size() < v.row->first + v.row->count) return;  // said above
  const auto begin = output->second.begin() + static_cast<std::ptrdiff_t>(v.row->first);
  const Values values(begin, begin + static_cast<std::ptrdiff_t>(v.row->count));
  run->rows[v.id] = values;
  for (std::size_t i = 0; i < v.row->published.size() && i < values.size(); ++i) {
    const std::string& digits = v.row->published[i];
    const double half = 0.5 * std::pow(10.0, -static_cast<double>(digits.size() - 1 - digits.find('.')));
    if (std::fabs(values[i] - std::stod(digits)) <= half * (1 + 1e-6)) continue;
    run->failures.push_back({v.id, "published as " + digits + ", computed as " + number(values[i])});
  }
}

BackendRun run_kernels(const StoredVectors& all, kernels::Backend& backend) {
  BackendRun run;
  run.name = backend.name();
  for (const StoredVector& v : all.vectors) {
    if (backend.on_device() && host_only(v)) {
      run.left_out.push_back(v.id);
      continue;
    }
    try {
      compare(v, run_vector(v, backend), &run);
    } catch (const std::runtime_error& e) {
      run.failures.push_back({v.id, e.what()});
    }
  }
  return run;
}

// ---- the reference: a program of its own beside this one

/// Runs `program`, gives it `input`, and returns what it wrote, or (in `error`) why not.
std::string talk_to(const std::string& program, std::string_view input, std::string* error) {
  int to[2], from[2];
  if (pipe2(to, O_CLOEXEC) != 0 || pipe2(from, O_CLOEXEC) != 0) {
    *error = std::strerror(errno);
    return {};
  }
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, to[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, from[1], STDOUT_FILENO);
  std::string name = program, check = "--check", standard_input = "-", json = "--json";
  char* arguments[] = {name.data(), check.data(), standard_input.data(), json.data(), nullptr};
  pid_t child = 0;
  const int failed = posix_spawn(&child, program.c_str(), &actions, nullptr, arguments, environ);
  posix_spawn_file_actions_destroy(&actions);
  close(to[0]), close(from[1]);
  std::string answer;
  if (failed == 0) {
    // It reads everything before it writes anything. If it dies early, the write fails; its exit code says more.
    const auto old = std::signal(SIGPIPE, SIG_IGN);
    while (!input.empty()) {
      const ssize_t n = write(to[1], input.data(), input.size());
      if (n <= 0) break;
      input.remove_prefix(static_cast<std::size_t>(n));
    }
    std::signal(SIGPIPE, old);
  }
  close(to[1]);
  if (failed == 0) {
    char piece[65536];
    for (ssize_t n = 0; (n = read(from[0], piece, sizeof piece)) > 0;) answer.append(piece, static_cast<std::size_t>(n));
    int status = 0;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) > 1) {
      *error = program + " ended with " + (WIFEXITED(status) ? "exit code " + std::to_string(WEXITSTATUS(status))
                                                             : "signal " + std::to_string(WTERMSIG(status)));
    }
  } else {
    *error = program + ": " + std::strerror(failed);
  }
  close(from[0]);
  return answer;
}

std::filesystem::path own_folder() {
  std::error_code ignored;
  return std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path();
}

BackendRun run_reference(const StoredVectors& all, std::string_view text, bool* broken) {
  BackendRun run;
  run.name = "reference";
  const std::filesystem::path program = own_folder() / "moe-audit-reference";
  if (access(program.c_str(), X_OK) != 0) {
    run.absent = "no moe-audit-reference beside this binary (it is built where LibTorch is found: libtorch-dev)";
    return run;
  }
  std::string error;
  const std::string answer = talk_to(program.string(), text, &error);
  const Json values = Json::parse(answer, nullptr, /*allow_exceptions=*/false);
  if (!error.empty() || !values.is_object()) {
    run.absent = error.empty() ? program.string() + " gave no answer" : error;
    *broken = true;
    return run;
  }
  run.name = "reference LibTorch " + values.at("torch").get<std::string>();
  for (const StoredVector& v : all.vectors) {
    Outputs got;
    for (const auto& [name, output] : values.at("outputs").at(v.id).items()) got[name] = output.at("values").get<Values>();
    compare(v, got, &run);
  }
  return run;
}

// ---- rows that share a value

struct RowClass {
  std::string stem;
  std::vector<std::string> values;  // 9 digits
  std::vector<std::string> rows;
};

std::vector<RowClass> classes_of(const StoredVectors& all, const BackendRun& run) {
  std::vector<RowClass> classes;
  for (const StoredVector& v : all.vectors) {
    const auto at = run.rows.find(v.id);
    if (at == run.rows.end()) continue;
    std::vector<std::string> values;
    for (const double value : at->second) values.push_back(number(std::fabs(value) < 1e-15 ? 0.0 : value));
    const auto same = [&](const RowClass& c) { return c.stem == v.stem && c.values == values; };
    auto c = std::find_if(classes.begin(), classes.end(), same);
    if (c == classes.end()) c = classes.insert(classes.end(), {v.stem, values, {}});
    c->rows.push_back(v.row->id);
  }
  return classes;
}

// ---- what is printed

std::string joined(const std::vector<std::string>& v) {
  std::string text;
  for (const std::string& s : v) text += (text.empty() ? "" : ", ") + s;
  return text;
}

std::vector<std::string> stems_of(const StoredVectors& all) {
  std::vector<std::string> stems;
  for (const StoredVector& v : all.vectors) {
    if (std::find(stems.begin(), stems.end(), v.stem) == stems.end()) stems.push_back(v.stem);
  }
  return stems;
}

std::size_t published_rows(const StoredVectors& all) {
  return static_cast<std::size_t>(std::count_if(all.vectors.begin(), all.vectors.end(), [](const StoredVector& v) {
    return v.row && !v.row->published.empty();
  }));
}

void print_text(const StoredVectors& all, const std::vector<BackendRun>& runs, bool passed) {
  std::cout << all.vectors.size() << " stored vectors, values of " << all.written_by << " in float64\n\n";
  std::cout << std::left << std::setw(20) << "stem" << std::setw(30) << "backend" << std::right << std::setw(8) << "vectors"
            << std::setw(9) << "numbers" << std::setw(15) << "largest error" << std::setw(14) << "of its bound" << "\n";
  for (const std::string& stem : stems_of(all)) {
    for (const BackendRun& run : runs) {
      const auto at = run.stems.find(stem);
      if (at == run.stems.end()) continue;
      std::cout << std::left << std::setw(20) << stem << std::setw(30) << run.name << std::right << std::setw(8)
                << at->second.vectors << std::setw(9) << at->second.numbers << std::setw(15) << std::setprecision(2)
                << at->second.error << std::setw(13) << std::fixed << std::setprecision(1) << 100 * at->second.of_bound << "%"
                << std::defaultfloat << "\n";
    }
  }
  std::cout << "\n";
  for (const BackendRun& run : runs) {
    if (!run.absent.empty()) {
      std::cout << "not run: " << run.name << ": " << run.absent << "\n";
      continue;
    }
    for (const Failure& f : run.failures) std::cout << "FAILED " << f.vector << " on " << run.name << ": " << f.what << "\n";
    if (!run.left_out.empty())
      std::cout << run.name << ": " << run.left_out.size() << " vectors left out, of operations that run on the host alone\n";
  }
  const BackendRun& host = runs.front();
  std::cout << "\nCatalogue of wrong formulas on the closed-form vector: " << host.rows.size() << " rows, " << published_rows(all)
            << " with digits computed apart.\nRows that share a value, so that the vector cannot tell them apart:\n";
  for (const RowClass& c : classes_of(all, host)) {
    if (c.rows.size() > 1) std::cout << "  " << c.stem << " " << joined(c.values) << ": " << joined(c.rows) << "\n";
  }
  std::cout << "Rows it does not reach:";
  for (const Json& n : all.not_reached) std::cout << " " << joined(n.at("rows").get<std::vector<std::string>>());
  std::cout << "\n\n" << (passed ? "passed" : "FAILED") << "\n";
}

void print_json(const StoredVectors& all, const std::vector<BackendRun>& runs, bool passed) {
  Json backends = Json::array(), rows = Json::array(), classes = Json::array();
  for (const BackendRun& run : runs) {
    Json stems = Json::array(), failures = Json::array();
    for (const std::string& stem : stems_of(all)) {
      const auto at = run.stems.find(stem);
      if (at == run.stems.end()) continue;
      const StemTally& t = at->second;
      stems.push_back({{"stem", stem}, {"vectors", t.vectors}, {"numbers", t.numbers}, {"largest_error", t.error},
                       {"largest_share_of_bound", t.of_bound}});
    }
    for (const Failure& f : run.failures) failures.push_back({{"vector", f.vector}, {"what", f.what}});
    Json j = {{"name", run.name}, {"ran", run.absent.empty()}};
    if (!run.absent.empty()) j["reason"] = run.absent;
    j["stems"] = std::move(stems), j["left_out"] = run.left_out, j["failures"] = std::move(failures);
    backends.push_back(std::move(j));
  }
  for (const StoredVector& v : all.vectors) {
    const auto at = runs.front().rows.find(v.id);
    if (at == runs.front().rows.end()) continue;
    rows.push_back({{"stem", v.stem}, {"row", v.row->id}, {"formula", v.row->formula}, {"seen_in", v.source},
                    {"values", at->second}, {"published", v.row->published}});
  }
  for (const RowClass& c : classes_of(all, runs.front()))
    classes.push_back({{"stem", c.stem}, {"values", c.values}, {"rows", c.rows}});
  std::cout << Json{{"tool_version", MOE_AUDIT_VERSION}, {"passed", passed}, {"vectors", all.vectors.size()},
                    {"written_by", all.written_by}, {"backends", backends}, {"rows", rows}, {"classes", classes},
                    {"not_reached", all.not_reached}}
                   .dump(2)
            << "\n";
}

/// The vectors of a file; of this binary where none is named.
StoredVectors read_vectors(const std::string& path, std::string* text) {
  if (path.empty()) {
    *text = kStoredVectors;
    return parse_vectors(*text);
  }
  std::ifstream file(path, std::ios::binary);
  text->assign(std::istreambuf_iterator<char>(file), {});
  if (!file) throw UsageError{"--vectors " + path + ": cannot be read"};
  return parse_vectors(*text);
}

int run(Device device, bool json, const std::string& path) {
  std::string text;
  const StoredVectors all = read_vectors(path, &text);
  std::vector<BackendRun> runs;
  kernels::Backend host;
  runs.push_back(run_kernels(all, host));
  BackendRun cuda;
  cuda.name = "cuda";
  cuda.absent = "--device cpu";
  if (device != Device::kCpu) {
    const std::unique_ptr<kernels::Backend> backend =
        device == Device::kCuda ? open_cuda_or_throw() : kernels::open_cuda(&cuda.absent);
    if (backend != nullptr) cuda = run_kernels(all, *backend);
  }
  runs.push_back(std::move(cuda));
  bool broken = false;
  runs.push_back(run_reference(all, text, &broken));
  const bool passed = std::all_of(runs.begin(), runs.end(), [](const BackendRun& r) { return r.failures.empty(); });
  json ? print_json(all, runs, passed && !broken) : print_text(all, runs, passed && !broken);
  return broken ? 2 : passed ? 0 : 1;
}

/// What a file of the user's lacks is no fault of this binary.
int selftest(Device device, bool json, const std::string& path) {
  if (path.empty()) return run(device, json, path);
  try {
    return run(device, json, path);
  } catch (const std::exception& e) {
    throw UsageError{"--vectors " + path + ": " + e.what() + "; write one with moe-audit-reference --write-vectors"};
  }
}

std::function<int()> define(CLI::App& app) {
  auto device = std::make_shared<Device>(Device::kAuto);
  auto format = std::make_shared<std::string>("text");
  add_device_option(app, *device);
  app.add_option("--format", *format, "text or json")->check(CLI::IsMember({"text", "json"}))->type_name("FORMAT");
  auto vectors = std::make_shared<std::string>();
  app.add_option("--vectors", *vectors, "Other vectors than those of this binary, as moe-audit-reference writes them")
      ->type_name("FILE");
  app.footer(
      "Runs stored vectors on the host, on a CUDA device where there is one, and through moe-audit-reference (LibTorch,\n"
      "float64) where it lies beside this binary; a backend that is not there is named with the reason.\n"
      "Exit code: 0 every value is within its bound; 1 one is not, and is named; 2 wrong usage, --device cuda without a\n"
      "device, or a reference that cannot run; 3 internal error.");
  return [device, format, vectors] { return selftest(*device, *format == "json", *vectors); };
}

}  // namespace

extern const Subcommand subcommand_selftest;
const Subcommand subcommand_selftest = {"selftest", "Prove the kernels on stored vectors, on every backend present", define};

}  // namespace moeaudit
