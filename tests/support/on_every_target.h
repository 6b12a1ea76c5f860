// Runs a test once for every instruction set of this CPU.
#pragma once

#include <hwy/targets.h>

#include <cstdint>

namespace moeaudit::test {

/// How many there were.
template <class F>
int on_every_target(F&& f) {
  int seen = 0;
  for (std::int64_t left = hwy::SupportedTargets(); left != 0; left &= left - 1) {
    hwy::SetSupportedTargetsForTest(left & ~(left - 1));
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    f();
    ++seen;
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return seen;
}

}  // namespace moeaudit::test
