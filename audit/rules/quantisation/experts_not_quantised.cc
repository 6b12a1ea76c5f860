// QU002: the configuration quantises the model and the routed experts stay in 16 bit.
#include <algorithm>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Weights are configured to be quantised to 4 or 8 bits, and the routed experts are not: in memory they are stacked parameters,
which bitsandbytes passes over, or in a checkpoint that says it is quantised they are stored in 16 or 32 bits.

## Why it matters
The experts are nearly all of a sparse model: 45.1 of Mixtral-8x7B's 46.7 billion weights. transformers 5 holds them as one 3-D
parameter a projection; load_in_4bit replaces nn.Linear modules only, leaves the stacks in 16 bit and says nothing
(bitsandbytes issue 1849; run on both major releases: fixtures/oracle/quantised_experts.json). QLoRA then needs the memory of
LoRA: 127 GiB instead of 23 GiB in Axolotl's case (pull request 3439), and its numbers are not those of a 4-bit base.

## How to fix
Axolotl 0.15 and later quantise stacks on request (quantize_moe_experts). Elsewhere stay on transformers 4, where each expert
is an nn.Linear, or plan for 16 bit.

## Limits
Bytes are computed from the sizes in config.json, of routed experts alone, without the quantiser's scales. Formats with their
own expert kernels (mxfp4, fp8, GPTQ, AWQ, compressed-tensors) are judged by what is stored, not by what a loader does.
)md";

std::string gigabytes(double bytes) {
  if (bytes < 1e9) return say::number(std::max(bytes / 1e6, 0.0)) + " MB";
  return say::number(static_cast<double>(static_cast<std::int64_t>(bytes / 1e7 + 0.5)) / 100) + " GB";
}

bool is_wide(DType d) { return d == DType::kBF16 || d == DType::kF16 || d == DType::kF32 || d == DType::kF64; }

std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/') + 1); }

/// The config.json beside the weights says that they are quantised. The one that a run wrote says how the run loaded its
/// base model, whose weights lie elsewhere. Weights that are not at hand may be anything.
bool files_claim_it(Facts& f) {
  const Source& source = f->quant_bits.known() ? f->quant_bits.source() : f->quant_method.source();
  const bool config = source.role == Role::kBaseModelConfig || source.role == Role::kCheckpointConfig;
  const bool stored = f.want(f->expert_storage);
  if (!stored) return source.role == Role::kBaseModelConfig;
  return config && folder_of(source.file) == folder_of(f->expert_storage.source().file);
}

std::string claim(Facts& f) {
  const std::string* method = f.want(f->quant_method);
  const std::int64_t* bits = f.want(f->quant_bits);
  return (method ? *method : std::string("a quantiser")) + (bits && *bits > 0 ? " (" + std::to_string(*bits) + " bits)" : "");
}

void add_claim(Facts& f, Finding* finding) {
  if (f.want(f->quant_bits)) finding->evidence.push_back(say::evidence(f->quant_bits));
  if (f.want(f->quant_method)) finding->evidence.push_back(say::evidence(f->quant_method));
}

std::string remedy(Facts& f) {
  const std::string* framework = f.want(f->framework);
  if (framework && framework->rfind("axolotl", 0) == 0) {
    return "In the Axolotl config (0.15.0 or later):\n    quantize_moe_experts: true";
  }
  return "Use the last release that has one nn.Linear an expert:\n    pip install \"transformers==4.57.6\"";
}

Finding left_in_memory(Facts& f, std::int64_t parameters) {
  const std::int64_t bits = f->quant_bits.value();
  const double now = 2.0 * static_cast<double>(parameters), wanted = static_cast<double>(bits) / 8 * static_cast<double>(parameters);
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = claim(f) + say::at(f->quant_bits.source()) + " does not reach the routed experts: they are stacked parameters in " +
                    "this release of transformers, no nn.Linear, and stay in 16 bit. " + say::count(parameters) + " weights take " +
                    gigabytes(now) + " instead of " + gigabytes(wanted) + ".";
  finding.evidence = {say::evidence(f->experts_quantised), say::evidence(f->expert_parameters)};
  add_claim(f, &finding);
  if (f.want(f->experts_fused)) finding.evidence.push_back(say::evidence(f->experts_fused));
  if (f.want(f->transformers)) finding.evidence.push_back(say::evidence(f->transformers));
  finding.remedy = remedy(f);
  finding.does_not_show = "How much memory the run has left, or that training in 16 bit ends worse.";
  finding.locations = {location_of(f->quant_bits.source())};
  finding.sources = say::sources({f->experts_fused.source().cite, "fixtures/oracle/quantised_experts.json",
                                  "bitsandbytes-foundation/bitsandbytes issue 1849", "axolotl-ai-cloud/axolotl pull request 3439"});
  return finding;
}

Finding left_in_files(Facts& f, const ExpertStorage& s, std::size_t row, std::int64_t bytes) {
  const Source& where = f->quant_bits.known() && f->quant_bits.value() > 0 ? f->quant_bits.source() : f->quant_method.source();
  const std::int64_t* bits = f.want(f->quant_bits);
  Finding finding;
  finding.severity = Severity::kWarning;
  finding.message = "The config of these files says " + claim(f) + say::at(where) + ", and " + gigabytes(static_cast<double>(bytes)) +
                    " of routed experts are stored in " + name_of(s.dtype[row]) + " (" + s.example[row] + ")";
  if (bits && *bits > 0) {
    const double width = static_cast<double>(s.bytes[row]) / static_cast<double>(std::max<std::int64_t>(s.elements[row], 1));
    finding.message += ": " + gigabytes(static_cast<double>(bytes) * static_cast<double>(*bits) / 8 / width) + " if they were quantised";
  }
  finding.message += ".";
  add_claim(f, &finding);
  finding.evidence.push_back({"routed experts stored in " + std::string(name_of(s.dtype[row])), say::plural(s.tensors[row], "tensor", "tensors"),
                              {f->expert_storage.source().file, 0, "", s.example[row]}});
  finding.remedy = "Quantise the 16-bit model again with a release that has one nn.Linear an expert:\n    "
                   "pip install \"transformers==4.57.6\"";
  finding.does_not_show = "What a loader with kernels of its own makes of the stacks.";
  finding.locations = {location_of(where), {f->expert_storage.source().file, 0, "", s.example[row]}};
  finding.sources = {"fixtures/oracle/quantised_experts.json", "bitsandbytes-foundation/bitsandbytes issue 1849"};
  return finding;
}

/// The configuration leaves the experts out on purpose.
bool skips_experts(Facts& f) {
  const std::vector<std::string>* skip = f.want(f->quant_skip);
  return skip && std::any_of(skip->begin(), skip->end(), [](const std::string& s) { return s.find("experts") != std::string::npos; });
}

Outcome check(Facts& f) {
  const bool* moe = f.want(f->has_moe);
  if (moe && !*moe) return Outcome::not_applicable("the model has no routed experts");
  const std::int64_t* bits = f.want(f->quant_bits);
  const std::string* method = f.want(f->quant_method);
  if (bits && *bits == 0) return Outcome::not_applicable("no quantisation is configured");
  if (skips_experts(f)) return Outcome::not_applicable("the configuration leaves the experts out of quantisation");
  if (files_claim_it(f)) {
    const ExpertStorage* storage = f.require(f->expert_storage);
    if (f.missing()) return f.cannot_tell();
    std::size_t most = 0;
    std::int64_t bytes = 0;
    for (std::size_t i = 0; i < storage->dtype.size(); ++i) {
      if (!is_wide(storage->dtype[i])) continue;
      if (bytes == 0 || storage->bytes[i] > storage->bytes[most]) most = i;
      bytes += storage->bytes[i];
    }
    if (bytes > 0) return Outcome::finding(left_in_files(f, *storage, most, bytes));
    return Outcome::pass("the routed experts are stored quantised: " + to_text(*storage));
  }
  if (method && method->rfind("bitsandbytes", 0) != 0) return Outcome::not_applicable(*method + " loads experts with kernels of its own");
  f.require(f->quant_bits);
  const bool* quantised = f.require(f->experts_quantised);
  if (f.missing()) return f.cannot_tell();
  if (*quantised) return Outcome::pass("the routed experts are quantised");
  const std::int64_t* parameters = f.require(f->expert_parameters);
  if (f.missing()) return f.cannot_tell();
  return Outcome::finding(left_in_memory(f, *parameters));
}

}  // namespace

extern const Rule rule_experts_not_quantised;
const Rule rule_experts_not_quantised = {
    .id = "QU002",
    .name = "experts-not-quantised",
    .since = "0.2.0",
    .severity = Severity::kWarning,
    .summary = "Quantisation is configured and the routed experts stay in 16 bit.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
