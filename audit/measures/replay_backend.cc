#include "audit/measures/replay_backend.h"

#include "audit/measures/router_replay.h"

namespace moeaudit {

namespace k = kernels;

ReplayBackend::ReplayBackend(Device device, OpenDevice open, double host_seconds) {
  if (device == Device::kCpu || (device == Device::kAuto && host_seconds < kWorthADevice)) return;
  std::string why;
  device_ = open(&why);
  if (device_ == nullptr && device == Device::kCuda) warning_ = "--device cuda: " + why + "; the host did it";
}

std::string ReplayBackend::name() const {
  if (!device_took_part_) return host_.name();
  return device_->name() + (host_took_part_ ? " and " + host_.name() : "");
}

std::string ReplayBackend::name_beside_host(std::string_view part) const {
  return host_.name() + (device_took_part_ ? "; " + std::string(part) + ": " + name() : "");
}

std::string ReplayBackend::warning() const {
  const std::lock_guard lock(mutex_);
  return warning_;
}

std::int64_t ReplayBackend::tile() const { return on_device() ? 1024 : Scratch::kTile; }

void ReplayBackend::fail() {
  const std::lock_guard lock(mutex_);
  if (failed_.exchange(true)) return;
  warning_ = device_->name() + " failed (" + device_->last_error() + "); the host did the rest, with the same results";
}

template <class Call>
k::Status ReplayBackend::first_that_can(const Call& call) {
  if (device_ != nullptr && !failed_) {
    const k::Status status = call(*device_);
    if (status == k::Status::kOk) {
      device_took_part_ = true;
      return status;
    }
    if (status == k::Status::kLaunchFailed) fail();
  }
  host_took_part_ = true;
  return call(host_);
}

k::Status ReplayBackend::gate_logits(const k::GateArgs<float, float>& a) {
  return first_that_can([&](k::Backend& b) { return b.gate_logits(a); });
}
k::Status ReplayBackend::gate_logits(const k::GateArgs<float, double>& a) {
  return first_that_can([&](k::Backend& b) { return b.gate_logits(a); });
}
k::Status ReplayBackend::route(const k::RouteArgs<float>& a, const k::RouteResult<float>& r) {
  return first_that_can([&](k::Backend& b) { return b.route(a, r); });
}
k::Status ReplayBackend::route(const k::RouteArgs<double>& a, const k::RouteResult<double>& r) {
  return first_that_can([&](k::Backend& b) { return b.route(a, r); });
}
k::Status ReplayBackend::sparse_mixer(const k::SparseMixerArgs<float>& a, const k::SparseMixerResult<float>& r) {
  return first_that_can([&](k::Backend& b) { return b.sparse_mixer(a, r); });
}
k::Status ReplayBackend::sparse_mixer(const k::SparseMixerArgs<double>& a, const k::SparseMixerResult<double>& r) {
  return first_that_can([&](k::Backend& b) { return b.sparse_mixer(a, r); });
}
k::Status ReplayBackend::balance_loss(const k::BalanceLossArgs<double>& a, const k::BalanceLossResult<double>& r) {
  return first_that_can([&](k::Backend& b) { return b.balance_loss(a, r); });
}
k::Status ReplayBackend::z_loss(const k::ZLossArgs<double>& a, const k::ZLossResult<double>& r) {
  return first_that_can([&](k::Backend& b) { return b.z_loss(a, r); });
}
k::Status ReplayBackend::count_choices(const k::CountArgs<std::int32_t>& a, std::int64_t* counts, std::int64_t* outside) {
  return first_that_can([&](k::Backend& b) { return b.count_choices(a, counts, outside); });
}

}  // namespace moeaudit
