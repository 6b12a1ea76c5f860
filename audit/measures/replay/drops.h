// Choices that were dropped, against the capacity that the settings give and the order in which a framework fills it.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "audit/measures/replay/context.h"

namespace moeaudit::replay {

class Drops {
 public:
  explicit Drops(Context* ctx) : ctx_(*ctx) {}

  void add(const MicroBatch& mb, const Shared& shared, const LayerTensors& t, const v::RoutedLayer* logits);
  void finish();  // into the rows capacity and drop_order

 private:
  /// What a layer of a micro-batch says of its capacity.
  struct Seen {
    Place place;
    std::int64_t tokens = 0, valid = 0, experts = 0, top_k = 0;
    std::int64_t most_kept = 0, most_wanted = 0, dropped = 0;
    bool one_size = true;           // every expert that dropped kept the same number
    bool weighed = false, scored = false;  // weights before the drops are known; scores of all experts are
    std::vector<std::string> orders;  // that drop exactly these
  };
  std::vector<std::string> orders_of(const LayerTensors& t, const v::RoutedLayer* logits,
                                     const std::vector<std::int32_t>& chosen, const std::vector<std::uint8_t>& dropped,
                                     Seen* s) const;  // says as well what it knew
  std::optional<std::int64_t> configured(const Seen& s) const;  // the capacity, where the factor is known

  Context& ctx_;
  std::mutex mutex_;
  std::map<int, std::vector<Seen>> seen_;  // by layer
};

}  // namespace moeaudit::replay
