// Where a replay of routers or of a trace, or the health of a trace, runs: on a CUDA device where that pays, else on the host.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "audit/measures/measure.h"
#include "kernels/backend.h"

namespace moeaudit {

/// Seconds of work on the host from which Device::kAuto asks for a device: its first call takes up to half of one.
inline constexpr double kWorthADevice = 1.0;

/// The gate, the route, the losses and the counts of routers on a device, and the host for a call that the device does not do. After a device error the
/// host does everything, and warning() says so. Device and host give the same bits, so results do not depend on any of
/// this. Calls may come from several threads.
class ReplayBackend final : public kernels::Backend {
 public:
  ReplayBackend(Device device, OpenDevice open, double host_seconds);
  ReplayBackend(const MeasureContext& ctx, double host_seconds)
      : ReplayBackend(ctx.device, ctx.open_device, host_seconds) {}
  std::string name() const override;  // of all that took part
  /// Of a measure of which `part` alone goes through here: "host avx2", or "host avx2; PART: cuda NVIDIA H200".
  std::string name_beside_host(std::string_view part) const;
  bool on_device() const override { return device_ != nullptr; }
  std::string warning() const;  // empty, or why the device was of no use
  /// Tokens that are worth one call.
  std::int64_t tile() const;

  kernels::Status gate_logits(const kernels::GateArgs<float, float>& a) override;
  kernels::Status gate_logits(const kernels::GateArgs<float, double>& a) override;
  kernels::Status route(const kernels::RouteArgs<float>& a, const kernels::RouteResult<float>& r) override;
  kernels::Status route(const kernels::RouteArgs<double>& a, const kernels::RouteResult<double>& r) override;
  kernels::Status sparse_mixer(const kernels::SparseMixerArgs<float>& a,
                               const kernels::SparseMixerResult<float>& r) override;
  kernels::Status sparse_mixer(const kernels::SparseMixerArgs<double>& a,
                               const kernels::SparseMixerResult<double>& r) override;
  kernels::Status balance_loss(const kernels::BalanceLossArgs<double>& a,
                               const kernels::BalanceLossResult<double>& r) override;
  kernels::Status z_loss(const kernels::ZLossArgs<double>& a, const kernels::ZLossResult<double>& r) override;
  kernels::Status count_choices(const kernels::CountArgs<std::int32_t>& a, std::int64_t* counts,
                                std::int64_t* outside) override;

 private:
  template <class Call>
  kernels::Status first_that_can(const Call& call);
  void fail();

  kernels::Backend host_;
  std::unique_ptr<kernels::Backend> device_;
  std::atomic<bool> failed_ = false, host_took_part_ = false, device_took_part_ = false;
  mutable std::mutex mutex_;
  std::string warning_;
};

}  // namespace moeaudit
