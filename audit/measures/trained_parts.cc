// What the adapter trains: does a gradient reach the router, does one reach routed experts?
#include <algorithm>
#include <array>

#include "audit/measures/measure.h"

namespace moeaudit {
namespace {

constexpr std::array<std::string_view, 2> kSupplies = {"training.router_trains", "training.experts_train"};
constexpr std::array<std::string_view, 1> kWants = {"adapter.modules"};

bool reaches(const AdapterModules& modules, Part part) {
  return std::find(modules.part.begin(), modules.part.end(), part) != modules.part.end();
}

void run(MeasureContext& context) {
  FactSheet& f = context.facts;
  if (f.router_trains.known() || !f.method.known() || f.method.value() == Method::kFull) return;
  if (!f.adapter_modules.known()) {
    f.router_trains.explain_unknown(f.adapter_modules.why_unknown());
    f.experts_train.explain_unknown(f.adapter_modules.why_unknown());
    return;
  }
  // The base is frozen under an adapter; modules_to_save and adapters are all that trains.
  f.router_trains.set(reaches(f.adapter_modules.value(), Part::kRouter), Origin::kDerived, f.adapter_modules.source());
  f.experts_train.set(reaches(f.adapter_modules.value(), Part::kRoutedExpert), Origin::kDerived, f.adapter_modules.source());
}

}  // namespace

extern const Measure measure_trained_parts;
const Measure measure_trained_parts = {.name = "trained_parts", .supplies = kSupplies, .wants = kWants, .run = run};

}  // namespace moeaudit
