#include "audit/variants/naming.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace moeaudit::variants {
namespace {

/// What a bare factor means where it stands. The first row whose quantity and text match.
constexpr FactorRow kFactorRows[] = {
    {"aux_loss", "L", "A1", "summed over layers instead of averaged", "Megatron-DeepSpeed"},
    {"aux_loss", "k", "A3", "layers in one set, not divided by k", "transformers", "A2"},
    {"aux_loss", "k", "A4", "not divided by k", "Megatron-LM before core 0.5, MaxText"},
    {"aux_loss", "1 / k", "A5", "divided by k twice", "Megatron-LM main of June 2024"},
    {"aux_loss", "1 / E", "A6", "not multiplied by E", "arXiv 2006.16668 as written"},
    {"aux_loss", "S", "A14", "summed over sequences instead of averaged", "user code"},
    {"aux_loss", "M", "A22", "summed over micro-batches", "Automodel 3359, ms-swift 5627"},
    {"aux_loss", "W", "A26", "the counts all-reduced, the tokens not", ""},
    {"aux_loss", "1 / W", "A26", "the tokens multiplied, the counts not all-reduced", ""},
    {"aux_loss", "2", "A31", "recorded twice (activation recomputation)", "Megatron-LM to 0.11"},
    {"aux_loss", "L / layers", "A35", "divided by all layers, dense ones too", "Megatron-LM 2197"},
    {"aux_loss", "coefficient", "", "already multiplied by the coefficient", "MegaBlocks, OLMo-core"},
    {"aux_loss", "0", "A33", "zero", "Megatron-Bridge 4909"},
    {"aux_weight", "M", "A22", "not divided by the accumulation steps",
     "huggingface/transformers 38780, ms-swift 5627"},
    {"aux_weight", "W", "A32", "multiplied by the number of ranks", "huggingface/transformers 48690"},
    {"aux_weight", "2", "A28", "added twice: by the model and by the trainer", "huggingface/trl 4070"},
    {"aux_weight", "coefficient", "A28", "multiplied by the coefficient twice", "ms-swift 5375"},
    {"aux_weight", "1 / coefficient", "A29", "never multiplied by the coefficient", "Automodel 1408"},
    {"aux_weight", "0", "A30", "not in what was back-propagated", "Automodel 1408, Megatron-LM January 2024"},
    {"aux_weight", "1 / M", "G9", "divided by the accumulation steps twice", "huggingface/trl 6083"},
    {"aux_weight", "1 / W", "A27", "divided by the ranks twice", "Megatron-LM 3672"},
    {"aux_weight", "1 / CP", "G7", "the cross-entropy multiplied by the context-parallel size, this not",
     "Megatron-LM 2217"},
    {"aux_weight", "1 / (TP CP)", "G4", "scaled by the tokens of one sequence-parallel rank", "Megatron-LM 1652, 5047"},
    {"aux_weight", "TP CP", "G6", "scaled by a token count that was already reduced", "Megatron-LM 7452"},
    {"aux_weight", "1 / S", "G5", "scaled by the tokens of one sequence", "Megatron-LM 5798"},
    {"aux_weight", "T / labels", "G8", "weighted by all tokens, the cross-entropy by labels", ""},
    {"aux_weight", "1 / (M T)", "G3", "divided by the tokens as the summed cross-entropy is", "Megatron-LM to 0.11"},
    {"z_loss", "L", "Z2", "summed over layers instead of averaged", "MegaBlocks"},
    {"z_loss", "1 / k", "Z8", "divided by k", "the OLMoE run"},
    {"z_loss", "TP", "Z15", "not divided by the tensor-parallel size", "Megatron-LM before 0.7"},
    {"z_loss", "1 / TP", "Z15", "divided by the tensor-parallel size", "Megatron-LM 0.7"},
    {"z_loss", "1 / (TP CP)", "Z15", "divided by the tensor- and context-parallel size", "Megatron-LM 0.12 to 0.18"},
    {"z_loss", "CP", "Z15", "not divided by the context-parallel size", ""},
    {"router_grad_aux", "0", "A30", "zero", "Automodel 1408"},
    {"router_grad_aux", "M", "A22", "not divided by the accumulation steps", "huggingface/transformers 38780"},
    {"router_grad_aux", "W", "A32", "multiplied by the number of ranks", "huggingface/transformers 48690"},
    {"router_grad_aux", "2", "A28", "added twice: by the model and by the trainer", "huggingface/trl 4070"},
    {"router_grad_aux", "coefficient", "A28", "multiplied by the coefficient twice", "ms-swift 5375"},
    {"router_grad_aux", "1 / coefficient", "A29", "never multiplied by the coefficient", "Automodel 1408"},
    {"router_grad_aux", "1 / M", "G9", "divided by the accumulation steps twice", "huggingface/trl 6083"},
    {"router_grad_aux", "1 / W", "A27", "divided by the ranks twice", "Megatron-LM 3672"},
    {"aux_in_loss", "0", "A37", "absent from the model's loss", "output_router_logits off"},
    {"loss_weight", "M", "G2", "not divided by the accumulation steps", "huggingface/transformers 35663"},
    {"loss_weight", "1 / M", "G9", "divided by the accumulation steps twice", "huggingface/transformers 45305"},
    {"loss_weight", "W", "G11", "summed over ranks where a mean was expected", ""},
    {"loss_weight", "1 / W", "G7", "divided by the ranks twice", ""},
    {"loss_weight", "0", "", "zero", ""},
    {"weights", "scaling", "W8", "scaling factor applied twice", "DeepSeek-V2"},
    {"weights", "1 / scaling", "W8", "scaling factor left out", "DeepSeek-V2"},
    {"bias_step", "0", "B17", "the bias did not move", ""},
};

double distance_of(double value, double recorded, double band) {
  if (value == recorded) return 0;  // infinities, too
  if (std::isnan(value) || std::isnan(recorded)) return std::numeric_limits<double>::infinity();
  const double off = std::fabs(value - recorded);
  // A recorded zero has no scale of its own: only a zero is equal to it.
  const double scale = band * std::max(std::fabs(value), std::fabs(recorded));
  return std::isfinite(off) ? off / scale : std::numeric_limits<double>::infinity();
}

struct Tried {
  std::size_t formula = 0, factor = 0;
  int deviations = 0;
  double distance = 0;
};

std::string text_of(std::string_view quantity, const Formula& f, const Factor& c) {
  std::string text = f.id.empty() ? "" : f.id + " " + f.name;
  if (f.id.empty() && c.terms == 0) return f.name;
  if (c.terms == 0) return text;
  for (const FactorRow& row : factor_rows()) {
    if (f.id == row.of && row.quantity == quantity && row.text == c.text) {
      text = std::string(row.id) + (row.id.empty() ? "" : " ") + std::string(row.name);
    }
  }
  return text + (text.empty() ? "" : ", ") + "times " + c.text;
}

}  // namespace

std::span<const FactorRow> factor_rows() { return kFactorRows; }

std::vector<Factor> factors_of(std::span<const Symbol> symbols) {
  std::vector<Factor> all = {{"", 1, 0, ""}, {"0", 0, 1, ""}};
  const auto add = [&](std::string text, double value, int terms) {
    if (!(value > 0) || !std::isfinite(value)) return;
    for (Factor& f : all) {
      if (std::fabs(f.value - value) > 1e-12 * value) continue;
      if (f.terms == terms && f.text != text) f.equals += (f.equals.empty() ? "" : ", ") + text;
      return;
    }
    all.push_back({std::move(text), value, terms, ""});
  };
  std::vector<Symbol> known;
  for (const Symbol& s : symbols) {
    if (s.value > 0 && s.value != 1.0) known.push_back(s);
  }
  for (const Symbol& s : known) add(s.text, s.value, 1);
  for (const Symbol& s : known) add("1 / " + s.text, 1 / s.value, 1);
  for (std::size_t i = 0; i < known.size(); ++i) {
    for (std::size_t j = i; j < known.size(); ++j) {
      if ((known[i].alone || known[j].alone) && (i != j || known[i].text.find('/') != std::string::npos)) continue;
      const std::string text = i == j ? known[i].text + "^2" : known[i].text + " " + known[j].text;
      add(text, known[i].value * known[j].value, 2);
      add("1 / " + (i == j ? text : "(" + text + ")"), 1 / (known[i].value * known[j].value), 2);
      if (i == j) continue;
      add(known[i].text + " / " + known[j].text, known[i].value / known[j].value, 2);
      add(known[j].text + " / " + known[i].text, known[j].value / known[i].value, 2);
    }
  }
  return all;
}

Name name_formula(std::string_view quantity, const Observations& seen, std::span<const Formula> formulas,
                  std::span<const Factor> factors) {
  std::vector<Tried> tried;
  for (std::size_t f = 0; f < formulas.size(); ++f) {
    for (std::size_t c = 0; c < factors.size(); ++c) {
      // Zero is zero, whatever the formula.
      if (!formulas[f].id.empty() && (factors[c].value == 0.0 || (formulas[f].alone && factors[c].terms > 0))) continue;
      Tried t{f, c, static_cast<int>(!formulas[f].id.empty()) + factors[c].terms, 0};
      for (std::size_t i = 0; i < seen.recorded.size(); ++i) {
        t.distance =
            std::max(t.distance, distance_of(formulas[f].values[i] * factors[c].value, seen.recorded[i], seen.band[i]));
      }
      tried.push_back(t);
    }
  }
  // Within the band the simplest comes first: distances below one band say nothing.
  std::stable_sort(tried.begin(), tried.end(), [](const Tried& a, const Tried& b) {
    const bool in = a.distance <= 1, in_b = b.distance <= 1;
    if (in != in_b) return in;
    if (in && a.deviations != b.deviations) return a.deviations < b.deviations;
    return a.distance < b.distance;
  });
  Name name;
  if (tried.empty()) return name;
  const Tried& best = tried.front();
  name.found = best.distance <= 1;
  for (const Tried& t : tried) {
    if (t.distance <= 1 && name.found) continue;
    // The formula found times something else is no other candidate.
    if (name.found && !formulas[t.formula].id.empty() && formulas[t.formula].id == formulas[best.formula].id) continue;
    name.runner_up = text_of(quantity, formulas[t.formula], factors[t.factor]);
    name.runner_up_fit = t.distance;
    break;
  }
  if (!name.found) return name;
  const Formula& f = formulas[best.formula];
  const Factor& c = factors[best.factor];
  name.id = f.id;
  name.name = f.name;
  name.factor = c.text;
  name.factor_value = c.value;
  name.fit = best.distance;
  for (const FactorRow& row : factor_rows()) {
    if (f.id == row.of && c.terms > 0 && row.quantity == quantity && row.text == c.text) {
      name.id = row.id;
      name.name = row.name;
      break;
    }
  }
  for (const Tried& t : std::span(tried).subspan(1)) {
    if (t.distance > 1 || t.deviations != best.deviations) break;
    name.also += (name.also.empty() ? "" : "; ") + text_of(quantity, formulas[t.formula], factors[t.factor]);
  }
  if (!c.equals.empty()) name.also += (name.also.empty() ? "" : "; ") + std::string("a factor of ") + c.equals;
  return name;
}

}  // namespace moeaudit::variants
