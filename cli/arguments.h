// Options that `check` and `facts` share, and what the terminal can do.
#pragma once

#include <iosfwd>
#include <memory>
#include <string>
#include <vector>

#include "audit/engine/engine.h"
#include "audit/inputs/inputs.h"
#include "kernels/backend.h"
#include "reports/writer.h"

namespace CLI {
class App;
class Option;
}

namespace moeaudit {

struct Arguments {
  RunOptions run;
  EngineOptions engine;
  std::vector<std::string> assume;       // "transformers=4.57.1", split at commas
  std::vector<std::string> formats;      // "text", "json", "json=report.json"
  std::string baseline;                  // file
  std::string color = "auto";
  bool verbose = false;
  bool no_progress = false;
};

/// Wrong usage: message on stderr, exit code 2.
struct UsageError {
  std::string message;
};

/// --device auto|cpu|cuda.
CLI::Option* add_device_option(CLI::App& app, Device& device);
/// The CUDA device that --device cuda asks for. Throws UsageError, with why there is none and what to do.
std::unique_ptr<kernels::Backend> open_cuda_or_throw();

void add_input_options(CLI::App& app, Arguments& arguments);
void add_output_options(CLI::App& app, Arguments& arguments);

/// Turns --assume texts into RunOptions::assume. Throws UsageError with what is accepted.
void finish(Arguments& arguments);

WriterOptions terminal_options(const Arguments& arguments);

/// A progress bar on stderr while it lives; silent unless stderr is a terminal.
class ProgressBar {
 public:
  explicit ProgressBar(bool enabled);
  ~ProgressBar();
  void operator()(std::string_view stage, double done);

 private:
  bool enabled_;
  bool drawn_ = false;
  int last_percent_ = -1;
  std::string last_stage_;
};

/// Reads and judges every run the arguments name.
AuditResult audit(Arguments& arguments);

/// Writes the result in every format asked for. Returns false (message on stderr) if a file could not be written.
bool write_reports(const AuditResult& result, const Arguments& arguments);

/// Opens `path` for writing and runs `write`; false with a message on stderr.
bool write_file(const std::string& path, const std::function<void(std::ostream&)>& write);

}  // namespace moeaudit
