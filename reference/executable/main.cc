// moe-audit-reference: the float64 reference on LibTorch, as a program. `moe-audit selftest` runs it where it is found.
#include <torch/version.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <exception>
#include <fstream>
#include <iostream>
#include <string>

#include "reference/executable/vectors.h"

namespace {

using moeaudit::reference::Json;

constexpr const char* kUsage =
    "usage: moe-audit-reference --check VECTORS [--json]   recompute every stored vector, and compare\n"
    "       moe-audit-reference --write-vectors FILE       write the vectors with the values of this LibTorch\n"
    "\n"
    "VECTORS is fixtures/selftest/vectors.json, or - for the standard input. --json: print the recomputed values.\n"
    "Exit code: 0 every value is within its bound; 1 one is not; 2 wrong usage, or a file that cannot be read.\n";

moeaudit::reference::Outputs outputs_of(const Json& file, const Json& vector) {
  moeaudit::reference::Inputs inputs;
  for (const auto& [role, name] : vector.at("inputs").items())
    inputs[role] = moeaudit::reference::tensor_of(file.at("tensors").at(name.get<std::string>()));
  return moeaudit::reference::compute(vector.at("operation"), vector.at("options"), inputs);
}

int write(const std::string& path) {
  Json file = {{"about",
                "Inputs and right values of the kernels, for `moe-audit selftest`. Written by moe-audit-reference "
                "--write-vectors; a value may differ by n u / (1 - n u) scale, n = roundings, u = 2^-53."},
               {"written_by", std::string("LibTorch ") + TORCH_VERSION}};
  file.update(moeaudit::reference::make_vectors());
  for (Json& v : file["vectors"]) {
    Json outputs = Json::object();
    for (const auto& [name, output] : outputs_of(file, v)) {
      Json o = moeaudit::reference::json_of(output.values);
      o["roundings"] = output.roundings, o["scale"] = output.scale;
      outputs[name] = std::move(o);
    }
    v["outputs"] = std::move(outputs);
  }
  // One line a tensor and a vector: a change shows where it is.
  std::ofstream out(path);
  out << "{\n";
  for (const auto& [key, value] : file.items()) {
    if (value.is_string()) {
      out << "\"" << key << "\": " << value.dump() << ",\n";
      continue;
    }
    out << "\"" << key << "\": " << (value.is_array() ? "[\n" : "{\n");
    bool first = true;
    for (const auto& [name, each] : value.items()) {
      out << (first ? "" : ",\n") << "  " << (value.is_array() ? std::string() : Json(name).dump() + ": ") << each.dump();
      first = false;
    }
    out << (value.is_array() ? "\n]" : "\n}") << (key == "not_reached" ? "\n" : ",\n");
  }
  out << "}\n";
  out.flush();
  if (!out) {
    std::cerr << "moe-audit-reference: " << path << " cannot be written\n";
    return 2;
  }
  return 0;
}

int check(std::istream& in, bool print) {
  const Json file = Json::parse(in);
  Json recomputed = Json::object();
  int failed = 0, count = 0;
  for (const Json& v : file.at("vectors")) {
    const std::string id = v.at("id");
    for (const auto& [name, output] : outputs_of(file, v)) {
      const Json& stored = v.at("outputs").at(name);
      const at::Tensor want = moeaudit::reference::tensor_of(stored).to(at::kDouble), got = output.values.to(at::kDouble);
      const double n = stored.at("roundings").get<double>() * 0x1p-53;
      const double bound = n / (1 - n) * stored.at("scale").get<double>();
      ++count;
      const bool same = got.sizes() == want.sizes() && (got - want).abs().le(bound).all().item<bool>();
      if (!same) ++failed, std::cerr << id << " " << name << ": not the stored value\n";
      recomputed[id][name] = moeaudit::reference::json_of(output.values);
    }
  }
  if (print) std::cout << Json{{"torch", TORCH_VERSION}, {"outputs", recomputed}}.dump() << "\n";
  else std::cout << count - failed << " of " << count << " outputs of " << file.at("vectors").size() << " vectors agree\n";
  return failed > 0 ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  try {
    at::set_num_threads(1);
    if (what == "--write-vectors" && argc == 3) return write(argv[2]);
    const bool json = argc == 4 && std::string(argv[3]) == "--json";
    if (what == "--check" && (argc == 3 || json)) {
      if (std::string(argv[2]) == "-") return check(std::cin, json);
      std::ifstream in(argv[2]);
      if (!in) return std::cerr << "moe-audit-reference: " << argv[2] << " cannot be read\n", 2;
      return check(in, json);
    }
    (what == "--help" ? std::cout : std::cerr) << kUsage;
    return what == "--help" ? 0 : 2;
  } catch (const std::exception& e) {
    std::cerr << "moe-audit-reference: " << (argc > 2 ? std::string(argv[2]) + ": " : "") << e.what() << "\n";
    return 2;
  }
}
