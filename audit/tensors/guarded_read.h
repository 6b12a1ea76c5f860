// Reading memory-mapped files that may fail under the reader: a file that became shorter, a disk or network that gives
// an error. The kernel says so with SIGBUS; here it becomes a return value.
#pragma once

#include <csetjmp>

namespace moeaudit {

/// While one lives, guarded() turns a SIGBUS into false. A SIGBUS outside guarded() ends the process as ever.
class ReadGuard {
 public:
  ReadGuard();
  ~ReadGuard();
  ReadGuard(const ReadGuard&) = delete;
  ReadGuard& operator=(const ReadGuard&) = delete;

  /// Runs `read`, which may read mapped files; false if a page of them could not be read. `read` is left in the middle
  /// then: it must own nothing (no allocation, no lock).
  template <class F>
  bool guarded(F&& read) const {
    sigjmp_buf here;
    if (sigsetjmp(here, 0) != 0) {
      leave();
      return false;
    }
    enter(&here);
    read();
    leave();
    return true;
  }

 private:
  static void enter(sigjmp_buf* here);
  static void leave();
};

}  // namespace moeaudit
