// The weight of the balance loss in a logged loss.
#pragma once

#include <optional>
#include <string>

#include "audit/facts/fact_sheet.h"

namespace moeaudit {

/// (loss - cross-entropy) / aux_loss of the log among `facts`, by every entry; nothing, with why, where no one number
/// fits them.
std::optional<LogBalance> balance_in(const FactSheet& facts, std::string* why);

}  // namespace moeaudit
