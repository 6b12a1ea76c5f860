// CK001: a tensor holds NaN or infinity.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "audit/rules/rule.h"
#include "audit/rules/say.h"

namespace moeaudit {
namespace {

constexpr std::string_view kDoc = R"md(
## What it checks
Every value of every tensor in the checkpoint is a finite number (of routers alone, if the files hold more than 2 GB
and `--full` is not given). A finding names file, tensor, layer, expert, and row and column of the first value.

## Why it matters
One NaN in a router weight makes that expert's logit NaN for every token, and the softmax over all experts with it:
the layer's output is NaN for the whole batch. One NaN in an expert reaches the tokens routed to it: with top-2 of 8
and even load a quarter of all tokens in that layer, so an evaluation on few tokens can miss it and training cannot.
The checkpoint cannot be trained on nor served. It usually means that the loss was NaN for steps before the save
(LG001): Trainer's logging_nan_inf_filter, on by default, keeps that out of the logged loss (huggingface/trl issue
6702).

A buffer (a selection bias such as `e_score_correction_bias`) that is not finite is a note: transformers loads it and
never updates it, and a bias of -inf can be a way to switch an expert off. A tensor that the family does not know is a
note, too: nothing loads it.

## How to fix
Go back to the last checkpoint whose tensors are finite, and find out why the loss left the finite numbers.

## Limits
Where only routers were read, the verdict says so. Packed codes (GPTQ, AWQ, nf4) can hold no NaN; their scales can,
and are read. When it happened is not in the file.
)md";

constexpr std::size_t kSingle = 3;  // this many tensors of one part and layer are reported one by one
constexpr std::size_t kLayers = 4;  // and this many layers of one part; more become one finding

/// One tensor, or one expert's slice of a stack, that is not finite.
struct Bad {
  Severity severity;
  Part part;
  int layer, expert;  // -1 none
  std::string tensor, file;
  std::int64_t count, first;  // how many values; flat index of the first one in the tensor
  std::string position;       // the same in words
};

/// "row 3 (expert 3), column 17" of a router weight, "expert 5" of a bias.
std::string router_position(Facts& f, const RouterValues& values, std::size_t i) {
  const std::int64_t index = values.first_index[i];
  const std::int64_t* hidden = f.want(f->hidden_size);
  if (values.is_buffer[i]) return "expert " + std::to_string(index);
  if (!hidden || *hidden < 1) return "element " + std::to_string(index);
  return "element " + std::to_string(index) + " (expert " + std::to_string(index / *hidden) + ", column " +
         std::to_string(index % *hidden) + ")";
}

/// Row and column, in the expert's own matrix where the tensor is a stack of them.
std::string scan_position(const WeightScan& scan, std::size_t i) {
  const std::int64_t columns = scan.columns[i], inside = scan.first_index[i] - scan.first[i];
  if (columns < 1 || columns >= scan.elements[i]) return "element " + std::to_string(scan.first_index[i]);
  return "[row " + std::to_string(inside / columns) + ", column " + std::to_string(inside % columns) + "]";
}

std::vector<Bad> bad_tensors(Facts& f, const RouterValues* routers, const WeightScan* scan) {
  std::vector<Bad> bad;
  std::set<std::string> judged;
  for (std::size_t i = 0; routers && i < routers->tensor.size(); ++i) {
    judged.insert(routers->tensor[i]);
    if (routers->non_finite[i] == 0) continue;
    bad.push_back({routers->is_buffer[i] ? Severity::kNote : Severity::kError, Part::kRouter, routers->layer[i], -1,
                   routers->tensor[i], routers->file[i], routers->non_finite[i], routers->first_index[i],
                   router_position(f, *routers, i)});
  }
  const TensorDiff* diff = f.want(f->tensor_diff);
  std::set<std::string> unknown;
  if (diff) unknown.insert(diff->unexpected.begin(), diff->unexpected.end());
  for (std::size_t i = 0; scan && i < scan->tensor.size(); ++i) {
    if (scan->non_finite[i] == 0 || judged.count(scan->tensor[i])) continue;
    bad.push_back({unknown.count(scan->tensor[i]) ? Severity::kNote : Severity::kError, scan->part[i], scan->layer[i],
                   scan->expert[i], scan->tensor[i], scan->file[i], scan->non_finite[i], scan->first_index[i],
                   scan_position(*scan, i)});
  }
  return bad;
}

std::string values_that_are(std::int64_t n) {
  return say::plural(n, "value that is", "values that are") + " NaN or infinite";
}

/// " (layer 3, expert 5)"
std::string owner(const Bad& b) {
  if (b.layer < 0 || b.expert < 0) return {};
  return " (layer " + std::to_string(b.layer) + ", expert " + std::to_string(b.expert) + ")";
}

std::string words(Part part) {
  std::string text = name_of(part);
  std::replace(text.begin(), text.end(), '_', ' ');
  return text;
}

/// One finding for all of `bad`, which are of one part and severity.
Finding describe(const std::vector<Bad>& bad) {
  const Bad& first = bad.front();
  std::int64_t total = 0;
  std::vector<std::string> names;
  std::vector<std::int64_t> layers;
  Finding finding;
  for (const Bad& b : bad) {
    total += b.count;
    names.push_back(b.tensor + owner(b));
    if (b.layer >= 0 && (layers.empty() || layers.back() != b.layer)) layers.push_back(b.layer);
    if (finding.locations.size() < 8) finding.locations.push_back({b.file, 0, "", b.tensor});
  }
  const Location where = finding.locations.front();
  finding.severity = first.severity;
  if (bad.size() == 1) {
    finding.message = names[0] + " holds " + values_that_are(total) + ", first at " + first.position + ".";
  } else {
    finding.message = say::count(static_cast<std::int64_t>(bad.size())) + " " + words(first.part) + " tensors" +
                      (layers.empty() ? "" : (layers.size() == 1 ? " of layer " : " of layers ") + to_text(layers)) +
                      " hold " + values_that_are(total) + ": " + say::some(names) + "; the first at " + first.position +
                      " of " + first.tensor + ".";
  }
  finding.evidence = {{"non-finite values", say::count(total), where},
                      {"first index", std::to_string(first.first), where}};
  finding.remedy =
      "Resume from a checkpoint before this one, whose tensors are finite:\n"
      "    trainer.train(resume_from_checkpoint=\"checkpoint-N\")";
  finding.does_not_show = "When it happened: compare with earlier checkpoints and the log.";
  finding.sources = {"huggingface/trl issue 6702 (NaN steps hidden from the log)"};
  return finding;
}

/// One finding a tensor; one a layer where it has many; one a part where many layers have some.
std::vector<Finding> aggregate(const std::vector<Bad>& bad) {
  std::map<std::tuple<Severity, Part>, std::map<int, std::vector<Bad>>> groups;
  for (const Bad& b : bad) groups[{b.severity, b.part}][b.layer].push_back(b);
  std::vector<Finding> findings;
  for (auto group = groups.rbegin(); group != groups.rend(); ++group) {  // errors first
    std::vector<Bad> all;
    for (const auto& [layer, of_layer] : group->second) {
      all.insert(all.end(), of_layer.begin(), of_layer.end());
      if (group->second.size() > kLayers) continue;
      if (of_layer.size() > kSingle) {
        findings.push_back(describe(of_layer));
      } else {
        for (const Bad& b : of_layer) findings.push_back(describe({b}));
      }
    }
    if (group->second.size() > kLayers) findings.push_back(describe(all));
  }
  return findings;
}

Outcome check(Facts& f) {
  const WeightScan* scan = f.want(f->weight_scan);
  const RouterValues* routers = scan ? f.want(f->router_values) : f.require(f->router_values);
  if (f.missing()) return f.cannot_tell();
  if (!scan && routers->tensor.empty()) return Outcome::not_applicable("the weight files hold no router");
  const std::string what = scan ? "all " +
                                      say::plural(static_cast<std::int64_t>(scan->tensor.size()),
                                                  "tensor or expert slice is", "tensors and expert slices are") +
                                      " finite"
                                : "all " + std::to_string(routers->tensor.size()) +
                                      " router tensors are finite; only routers were read, --full reads every tensor";
  return Outcome::findings_or_pass(aggregate(bad_tensors(f, routers, scan)), what);
}

}  // namespace

extern const Rule rule_non_finite_weights;
const Rule rule_non_finite_weights = {
    .id = "CK001",
    .name = "non-finite-weights",
    .since = "0.1.0",
    .severity = Severity::kError,
    .summary = "A router, an expert or another tensor holds NaN or infinity.",
    .doc = kDoc,
    .check = check,
};

}  // namespace moeaudit
