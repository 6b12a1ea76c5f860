#include "audit/tensors/guarded_read.h"

#include <signal.h>

#include <mutex>

namespace moeaudit {
namespace {

thread_local sigjmp_buf* volatile current = nullptr;
std::mutex mutex;
int guards = 0;
struct sigaction before;

void on_sigbus(int) {
  if (current != nullptr) siglongjmp(*current, 1);
  ::signal(SIGBUS, SIG_DFL);  // not ours: the access is repeated and ends the process
}

}  // namespace

ReadGuard::ReadGuard() {
  const std::scoped_lock lock(mutex);
  if (guards++ > 0) return;
  struct sigaction action = {};
  action.sa_handler = on_sigbus;
  action.sa_flags = SA_NODEFER;  // the handler is left by a jump that restores no signal mask
  ::sigaction(SIGBUS, &action, &before);
}

ReadGuard::~ReadGuard() {
  const std::scoped_lock lock(mutex);
  if (--guards == 0) ::sigaction(SIGBUS, &before, nullptr);
}

void ReadGuard::enter(sigjmp_buf* here) { current = here; }
void ReadGuard::leave() { current = nullptr; }

}  // namespace moeaudit
