// The gate: logits from inputs, exactly in the host's order, or on tensor cores with the routing in the same kernel;
// and the gradients of the latter.
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/route_warp.cuh"
#include "kernels/cuda/router.h"
#include "kernels/cuda/router_backward.h"
#include "kernels/cuda/tensor_core_tile.cuh"
#include "kernels/cuda/warpgroup_tile.cuh"

namespace moeaudit::kernels::cuda {
namespace {

// ---- in the host's order: 64 tokens by 64 experts a block, 4 by 4 a thread

constexpr int kSide = 64, kStep = 16, kGateThreads = 256;
static_assert(kGateRun % kStep == 0);

template <class In, class Sum>
__global__ void __launch_bounds__(kGateThreads) gate_in_order(GateArgs<In, Sum> a) {
  constexpr std::int64_t kPanel = 64 / sizeof(Sum);
  __shared__ Sum xs[kStep][kSide + 1], ws[kStep][kSide + 1];
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kSide;
  const std::int64_t expert = static_cast<std::int64_t>(blockIdx.y) * kSide;
  const std::int64_t padded = packed_gate_size<Sum>(a.experts, 1);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  Sum total[4][4] = {};
  for (std::int64_t first = 0; first < a.hidden; first += kGateRun) {
    const std::int64_t length = a.hidden - first < kGateRun ? a.hidden - first : kGateRun;
    Sum stretch[4][4] = {};
    for (std::int64_t step = 0; step < length; step += kStep) {
      __syncthreads();
      for (int i = threadIdx.x; i < kSide * kStep; i += kGateThreads) {
        const int at = i % kStep, row = i / kStep;
        const bool inside = token + row < a.tokens && step + at < length;
        xs[at][row] = inside ? static_cast<Sum>(a.x[(token + row) * a.hidden + first + step + at]) : Sum(0);
      }
      for (int i = threadIdx.x; i < kSide * kStep; i += kGateThreads) {
        const int at = i / kSide;
        const std::int64_t e = expert + i % kSide;
        const bool inside = e < padded && step + at < length;
        ws[at][i % kSide] =
            inside ? a.packed[first * padded + e / kPanel * length * kPanel + (step + at) * kPanel + e % kPanel]
                   : Sum(0);
      }
      __syncthreads();
      const int count = length - step < kStep ? static_cast<int>(length - step) : kStep;
      for (int i = 0; i < count; ++i) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
          for (int e = 0; e < 4; ++e) stretch[t][e] = stretch[t][e] + xs[i][ty + 16 * t] * ws[i][tx + 16 * e];
        }
      }
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) total[t][e] = total[t][e] + stretch[t][e];
    }
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const std::int64_t row = token + ty + 16 * t, column = expert + tx + 16 * e;
      if (row >= a.tokens || column >= a.experts) continue;
      a.logits[row * a.experts + column] = a.bias == nullptr ? total[t][e] : total[t][e] + a.bias[column];
    }
  }
}

template <class In, class Sum>
Status launch_in_order(const GateArgs<In, Sum>& a, CUstream_st* stream) {
  if (a.tokens < 0 || a.hidden < 1 || a.experts < 1) return Status::kBadShape;
  if (a.tokens == 0) return Status::kOk;
  if (a.x == nullptr || a.packed == nullptr || a.logits == nullptr) return Status::kNullPointer;
  const std::int64_t across = parts(a.tokens, kSide), down = parts(a.experts, kSide);
  if (across > 2147483647 || down > 65535) return Status::kBadShape;
  queue(gate_in_order<In, Sum>, dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), kGateThreads, 0,
        stream, a);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

// ---- on tensor cores

Matrix matrix(const std::uint16_t* data, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  return {reinterpret_cast<const __nv_bfloat16*>(data), stride, rows, columns};
}

template <int kExperts>
using WarpGate = Tile < 128,
      kExperts, kExperts == 256 ? 2 : 4, kExperts == 64 ? 2 : kExperts<64 ? 1 : kExperts / 64, true, true>;
template <int kExperts>
using WarpgroupGate = WarpgroupTile<128, kExperts, true, true, kExperts == 256 ? 4 : 3, kExperts == 256 ? 1 : 0>;

/// 128 tokens and kExperts experts a block, by a tile T. With kRoutes all experts must be one block's, and each warp
/// routes tokens of the tile.
template <class T, int kExperts, bool kRoutes>
__global__ void __launch_bounds__(T::kThreads, kExperts < 64     ? 3
                                               : kExperts <= 128 ? 2
                                                                 : 1)
    gate_tiles(TensorCoreGateArgs a, RouteArgs<float> route, RouteResult<float> routed, float* logits) {
  MOE_AUDIT_DYNAMIC_SHARED(char, shared);
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * 128;
  const std::int64_t expert = static_cast<std::int64_t>(blockIdx.y) * kExperts;
  const Matrix x = {reinterpret_cast<const __nv_bfloat16*>(a.x), a.hidden, a.tokens, a.hidden};
  const Matrix w = {reinterpret_cast<const __nv_bfloat16*>(a.w), a.hidden, a.experts, a.hidden};
  T tile;
  tile.run(x, w, token, expert, 0, a.hidden, shared);
  const float* c = share(tile, shared);
  const auto finish = [&](auto lanes) {  // by so many lanes a token
    constexpr int P = decltype(lanes)::value, kTokens = kLanes / P, kValues = (kExperts + P - 1) / P;
    const int lane = threadIdx.x % P, warp = threadIdx.x / kLanes, its = threadIdx.x % kLanes / P;
    for (int pass = warp; pass < 128 / kTokens; pass += T::kThreads / kLanes) {
      // Rows two apart where two rows are read at once: they begin 16 banks apart (kCStride).
      const int row = kTokens == 2 ? pass / 2 * 4 + pass % 2 + 2 * its : pass * kTokens + its;
      const bool live = token + row < a.tokens;
      float v[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const int column = lane + P * i;
        const bool inside = column < kExperts && expert + column < a.experts;
        v[i] = inside ? c[row * T::kCStride + column] : 0.0f;
        if (inside && a.bias != nullptr) v[i] += a.bias[expert + column];
        if (inside && live && logits != nullptr) logits[(token + row) * a.experts + expert + column] = v[i];
      }
      if constexpr (kRoutes) {
        if (kExperts % P == 0 && a.experts == kExperts)
          route_registers<P, kValues, true>(route, routed, token + row, live, v);
        else
          route_registers<P, kValues, false>(route, routed, token + row, live, v);
      }
    }
  };
  constexpr int kShared = lanes_for(kExperts);
  if (!kRoutes || kShared == kLanes || (kExperts >= 64 && route.group_score != GroupScore::kNone))
    finish(std::integral_constant<int, kLanes>());  // groups are 32 wide; whole rows of logits leave best
  else
    finish(std::integral_constant<int, kShared>());
}

template <class T, int kExperts, bool kRoutes>
Status launch_tiles(const TensorCoreGateArgs& a, const RouteArgs<float>& route, const RouteResult<float>& routed,
                    float* logits, CUstream_st* stream) {
  constexpr int kBytes = T::kSharedBytesWithC;
  if (cudaFuncSetAttribute(gate_tiles<T, kExperts, kRoutes>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) !=
      cudaSuccess)
    return Status::kLaunchFailed;
  const dim3 grid(static_cast<unsigned>(parts(a.tokens, 128)), static_cast<unsigned>(parts(a.experts, kExperts)));
  queue(gate_tiles<T, kExperts, kRoutes>, grid, T::kThreads, kBytes, stream, a, route, routed, logits);
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

template <bool kRoutes>
Status launch_tiles_for(const TensorCoreGateArgs& a, const RouteArgs<float>& route, const RouteResult<float>& routed,
                        float* logits, CUstream_st* stream) {
  const bool warpgroups = a.cores == TensorCores::kWarpgroup;  // up to 32 experts it is the inputs that take the time
  const auto call = a.experts <= 16                  ? launch_tiles<WarpGate<16>, 16, kRoutes>
                    : a.experts <= 32                ? launch_tiles<WarpGate<32>, 32, kRoutes>
                    : a.experts <= 64 && warpgroups  ? launch_tiles<WarpgroupGate<64>, 64, kRoutes>
                    : a.experts <= 64                ? launch_tiles<WarpGate<64>, 64, kRoutes>
                    : a.experts <= 128 && warpgroups ? launch_tiles<WarpgroupGate<128>, 128, kRoutes>
                    : a.experts <= 128               ? launch_tiles<WarpGate<128>, 128, kRoutes>
                    : warpgroups                     ? launch_tiles<WarpgroupGate<256>, 256, kRoutes>
                                                     : launch_tiles<WarpGate<256>, 256, kRoutes>;
  return call(a, route, routed, logits, stream);
}

/// Whether the device has what is asked for.
bool present(TensorCores cores) { return cores == TensorCores::kWarp || warpgroups_present(); }

Status check(const TensorCoreGateArgs& a) {
  if (a.tokens < 0 || a.hidden < 1 || a.experts < 1 || a.hidden % 8 != 0 || parts(a.tokens, 128) > 2147483647 ||
      a.experts > 65535 * 256LL)
    return Status::kBadShape;
  if (a.tokens > 0 && (a.x == nullptr || a.w == nullptr)) return Status::kNullPointer;
  return present(a.cores) ? Status::kOk : Status::kBadOption;
}

// ---- gradients on tensor cores

/// float64 gradients to bfloat16, each rounded once, rows padded to `stride`.
__global__ void narrow(const double* from, std::int64_t tokens, std::int64_t experts, std::int64_t stride,
                       __nv_bfloat16* to) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= tokens * stride) return;
  const std::int64_t t = at / stride, e = at % stride;
  to[at] = __double2bfloat16(e < experts ? from[t * experts + e] : 0.0);
}

// d_w [experts, hidden] = d_logits^T x, k along the tokens.
using WarpWeights = Tile<128, 128, 2, 2, false, false>;
using WarpgroupWeights = WarpgroupTile<128, 128, false, false, 3, 0>;

/// d_x [tokens, hidden] = d_logits [tokens, experts] w [experts, hidden] for up to kExperts experts: 128 tokens a
/// block, 64 columns at a time. It is writing d_x that takes the time, so the tile leaves by whole rows of 128 bytes,
/// and w's next columns are under way meanwhile.
template <int kExperts>
struct InputTile {
  static constexpr int kThreads = 256, kTokens = 128, kColumns = 64;
  static constexpr int kGStride = kExperts + 8, kWStride = kColumns + 8;
  static constexpr int kGElements = kTokens * kGStride, kWElements = kExperts * kWStride;
  static constexpr int kSharedBytes = 2 * (kGElements + 2 * kWElements + kTokens * kWStride);
};

/// 64 columns of kTokens rows from shared memory to d_x, by 256 threads.
template <int kTokens, int kStride>
__device__ __forceinline__ void store_columns(const __nv_bfloat16* from, std::int64_t token, std::int64_t tokens,
                                              std::int64_t at, std::int64_t hidden, __nv_bfloat16* d_x) {
  const int thread = threadIdx.x, column = thread % 8 * 8;
#pragma unroll
  for (int i = 0; i < kTokens / 32; ++i) {
    const int row = thread / 8 + i * 32;
    if (token + row < tokens && at + column < hidden)
      *reinterpret_cast<uint4*>(d_x + (token + row) * hidden + at + column) =
          *reinterpret_cast<const uint4*>(from + row * kStride + column);
  }
}

template <int kExperts>
__global__ void __launch_bounds__(256, kExperts <= 128 ? 2 : 1)
    input_tiles(Matrix d_logits, Matrix w, std::int64_t hidden, __nv_bfloat16* d_x) {
  MOE_AUDIT_DYNAMIC_SHARED(char, shared);
  using T = InputTile<kExperts>;
  auto* out = reinterpret_cast<__nv_bfloat16*>(shared) + T::kGElements + 2 * T::kWElements;
  const std::uint32_t g = shared_address(shared), ws = g + 2 * T::kGElements;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * T::kTokens;
  for (int i = thread; i < T::kTokens * kExperts / 8; i += T::kThreads) {
    const int row = i / (kExperts / 8), column = i % (kExperts / 8) * 8;
    const bool inside = token + row < d_logits.rows && column < d_logits.columns;  // zeros up to the next multiple of 8
    copy_16(g + 2 * (row * T::kGStride + column),
            inside ? d_logits.data + (token + row) * d_logits.stride + column : d_logits.data, inside);
  }
  const auto fetch = [&](std::int64_t at, int buffer) {
#pragma unroll
    for (int i = 0; i < kExperts * T::kColumns / 8 / T::kThreads; ++i) {
      const int row = thread / 8 + i * (T::kThreads / 8), column = thread % 8 * 8;
      const bool inside = row < w.rows && at + column < hidden;
      copy_16(ws + 2 * (buffer * T::kWElements + row * T::kWStride + column),
              inside ? w.data + row * w.stride + at + column : w.data, inside);
    }
    end_copies();
  };
  fetch(0, 0);
  // Four warps down, two across, 32 by 32 each; see tensor_core_tile.cuh for the matrices.
  const int wm = warp / 2 * 32, wn = warp % 2 * 32, low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
  int buffer = 0;
  for (std::int64_t at = 0; at < hidden; at += T::kColumns, buffer ^= 1) {
    wait_copies<0>();
    __syncthreads();  // these columns are there, and the tile before has left
    if (at + T::kColumns < hidden) fetch(at + T::kColumns, buffer ^ 1);
    const std::uint32_t wb = ws + 2 * buffer * T::kWElements;
    float sum[2][4][4] = {};
#pragma unroll 4
    for (int k = 0; k < kExperts; k += 16) {
      std::uint32_t fa[2][4], fb[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_matrices<false>(g + 2 * ((wm + i * 16 + middle + low) * T::kGStride + k + high), fa[i]);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_matrices<true>(wb + 2 * ((k + middle + low) * T::kWStride + wn + j * 16 + high), fb[j]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add(fa[i], fb[j / 2] + j % 2 * 2, sum[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        __nv_bfloat16* to = out + (wm + i * 16 + lane / 4) * T::kWStride + wn + j * 8 + lane % 4 * 2;
        *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(sum[i][j][0], sum[i][j][1]);
        *reinterpret_cast<__nv_bfloat162*>(to + 8 * T::kWStride) = __floats2bfloat162_rn(sum[i][j][2], sum[i][j][3]);
      }
    }
    __syncthreads();
    store_columns<T::kTokens, T::kWStride>(out, token, d_logits.rows, at, hidden, d_x);
  }
}

/// The same by wgmma, d_logits in registers.
template <int kExperts>
struct InputWarpgroups {
  static constexpr int kThreads = 256, kTokens = 128, kColumns = 64, kOutStride = kColumns + 8, kAlign = 1024;
  using WPlace = SwizzledRows<kExperts>;
  static constexpr int kWBytes = WPlace::kPanelBytes;
  static constexpr int kSharedBytes = kAlign + 2 * kWBytes + 2 * kTokens * kOutStride;
};

template <int kExperts>
__global__ void __launch_bounds__(256, 2)
    input_warpgroups(Matrix d_logits, Matrix w, std::int64_t hidden, __nv_bfloat16* d_x) {
  MOE_AUDIT_DYNAMIC_SHARED(char, shared);
  using T = InputWarpgroups<kExperts>;
  const std::uint32_t begin = shared_address(shared), ws = (begin + T::kAlign - 1) / T::kAlign * T::kAlign;
  auto* out = reinterpret_cast<__nv_bfloat16*>(shared + (ws - begin) + 2 * T::kWBytes);
  const int thread = threadIdx.x, lane = thread % 32, first_row = thread / 32 * 16 + lane / 4,
            first_column = lane % 4 * 2;
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * T::kTokens;
  std::uint32_t g[kExperts / 16][4];
#pragma unroll
  for (int k = 0; k < kExperts / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // eight rows further down, then eight columns further
      const std::int64_t t = token + first_row + i % 2 * 8;
      const int e = k * 16 + first_column + i / 2 * 8;  // zeros up to the next multiple of 8
      g[k][i] = t < d_logits.rows && e < d_logits.columns
                    ? *reinterpret_cast<const std::uint32_t*>(d_logits.data + t * d_logits.stride + e)
                    : 0u;
    }
  }
  const auto fetch = [&](std::int64_t at, int buffer) {
#pragma unroll
    for (int i = 0; i < kExperts * T::kColumns / 8 / T::kThreads; ++i) {
      const int row = thread / 8 + i * (T::kThreads / 8), column = thread % 8 * 8;
      const bool inside = row < w.rows && at + column < hidden;
      copy_16(ws + buffer * T::kWBytes + T::WPlace::at(row, column),
              inside ? w.data + row * w.stride + at + column : w.data, inside);
    }
    end_copies();
  };
  fetch(0, 0);
  int buffer = 0;
  for (std::int64_t at = 0; at < hidden; at += T::kColumns, buffer ^= 1) {
    wait_copies<0>();
    publish_to_warpgroups();
    __syncthreads();  // these columns are there, and the tile before has left
    if (at + T::kColumns < hidden) fetch(at + T::kColumns, buffer ^ 1);
    float sum[32];
#pragma unroll
    for (int j = 0; j < 32; ++j) sum[j] = 0.0f;
    begin_products();
#pragma unroll
    for (int k = 0; k < kExperts / 16; ++k)
      warpgroup_multiply_add<false>(
          g[k], matrix_descriptor(ws + buffer * T::kWBytes + k * 16 * T::WPlace::kRowBytes, T::kWBytes), sum);
    end_products();
    wait_products<0>();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      __nv_bfloat16* to = out + first_row * T::kOutStride + j * 8 + first_column;
      *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(sum[4 * j], sum[4 * j + 1]);
      *reinterpret_cast<__nv_bfloat162*>(to + 8 * T::kOutStride) =
          __floats2bfloat162_rn(sum[4 * j + 2], sum[4 * j + 3]);
    }
    __syncthreads();
    store_columns<T::kTokens, T::kOutStride>(out, token, d_logits.rows, at, hidden, d_x);
  }
}

template <class T>
Status launch_inputs(void (*kernel)(Matrix, Matrix, std::int64_t, __nv_bfloat16*), const Matrix& d_logits,
                     const Matrix& w, std::int64_t hidden, __nv_bfloat16* d_x, CUstream_st* stream) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes) != cudaSuccess)
    return Status::kLaunchFailed;
  queue(kernel, static_cast<unsigned>(parts(d_logits.rows, T::kTokens)), T::kThreads, T::kSharedBytes, stream, d_logits,
        w, hidden, d_x);
  return Status::kOk;
}

template <int kExperts>
Status launch_inputs(TensorCores cores, const Matrix& d_logits, const Matrix& w, std::int64_t hidden,
                     __nv_bfloat16* d_x, CUstream_st* stream) {
  return cores == TensorCores::kWarpgroup
             ? launch_inputs<InputWarpgroups<kExperts>>(input_warpgroups<kExperts>, d_logits, w, hidden, d_x, stream)
             : launch_inputs<InputTile<kExperts>>(input_tiles<kExperts>, d_logits, w, hidden, d_x, stream);
}

/// Block (run of hidden, run of experts, stretch of tokens): a partial d_w.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2)
    weight_tiles(Matrix d_logits, Matrix x, std::int64_t experts, std::int64_t hidden, std::int64_t stretch,
                 float* partial) {
  MOE_AUDIT_DYNAMIC_SHARED(char, shared);
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * 128,
                     expert = static_cast<std::int64_t>(blockIdx.y) * 128;
  const std::int64_t first = blockIdx.z * stretch, end = first + stretch < x.rows ? first + stretch : x.rows;
  T tile;
  tile.run(d_logits, x, expert, at, first, end, shared);
  tile.for_each_pair([&](int row, int column, float left, float right) {
    if (expert + row >= experts || at + column >= hidden) return;
    *reinterpret_cast<float2*>(partial + (blockIdx.z * experts + expert + row) * hidden + at + column) =
        make_float2(left, right);
  });
}

template <class T>
Status launch_weights(const Matrix& d_logits, const Matrix& x, std::int64_t experts, std::int64_t hidden,
                      std::int64_t stretch, float* partial, CUstream_st* stream) {
  if (cudaFuncSetAttribute(weight_tiles<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes) !=
      cudaSuccess)
    return Status::kLaunchFailed;
  const dim3 grid(static_cast<unsigned>(parts(hidden, 128)), static_cast<unsigned>(parts(experts, 128)),
                  static_cast<unsigned>(parts(x.rows, stretch)));
  queue(weight_tiles<T>, grid, T::kThreads, T::kSharedBytes, stream, d_logits, x, experts, hidden, stretch, partial);
  return Status::kOk;
}

__global__ void add_stretches(const float* partial, std::int64_t elements, int stretches, float* d_w) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= elements) return;
  float sum = 0;
  for (int s = 0; s < stretches; ++s) sum += partial[s * elements + at];
  d_w[at] = sum;
}

constexpr std::int64_t kMostStretches = 32, kLeastStretch = 4096;
std::int64_t stretch_of(std::int64_t tokens) {
  const std::int64_t even = parts(parts(tokens, kMostStretches), 64) * 64;
  return even > kLeastStretch ? even : kLeastStretch;
}
std::size_t aligned(std::int64_t bytes) { return static_cast<std::size_t>(parts(bytes, 256) * 256); }

}  // namespace

bool warpgroups_present() {
#ifdef MOE_AUDIT_SM90A
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
#else
  return false;
#endif
}

Status gate_logits(const GateArgs<float, float>& args, CUstream_st* stream) { return launch_in_order(args, stream); }
Status gate_logits(const GateArgs<double, double>& args, CUstream_st* stream) { return launch_in_order(args, stream); }
Status gate_logits(const GateArgs<float, double>& args, CUstream_st* stream) { return launch_in_order(args, stream); }

Status gate_logits(const TensorCoreGateArgs& args, float* logits, CUstream_st* stream) {
  if (const Status status = check(args); status != Status::kOk) return status;
  if (args.tokens == 0) return Status::kOk;
  if (logits == nullptr) return Status::kNullPointer;
  return launch_tiles_for<false>(args, {}, {}, logits, stream);
}

Status gate_and_route(const TensorCoreGateArgs& args, RouteArgs<float> route, const RouteResult<float>& routed,
                      float* logits, CUstream_st* stream) {
  if (const Status status = check(args); status != Status::kOk) return status;
  route.tokens = args.tokens, route.experts = args.experts;
  const float unused = 0;
  route.logits = &unused;  // they never leave the block
  if (const Status status = check_route(route, routed); status != Status::kOk) return status;
  if (args.experts > kMostFusedExperts || !fits_registers(route)) return Status::kBadShape;
  if (args.tokens == 0) return Status::kOk;
  return launch_tiles_for<true>(args, route, routed, logits, stream);
}

std::size_t gate_backward_workspace(std::int64_t tokens, std::int64_t hidden, std::int64_t experts) {
  if (tokens < 1) return 0;
  return aligned(2 * tokens * padded_experts(experts)) +
         aligned(4 * parts(tokens, stretch_of(tokens)) * experts * hidden);
}

Status gate_backward(const TensorCoreGateBackwardArgs& a, float* d_w, std::uint16_t* d_x, void* workspace,
                     CUstream_st* stream) {
  if (a.tokens < 0 || a.hidden < 1 || a.experts < 1 || a.hidden % 8 != 0 || a.experts > kMostFusedExperts ||
      a.tokens > std::int64_t{2147483647} * 128)
    return Status::kBadShape;
  if (a.tokens == 0) return Status::kOk;
  const bool rounded = a.rounded_d_logits != nullptr;
  if ((a.d_logits == nullptr && !rounded) || workspace == nullptr || (d_w != nullptr && a.x == nullptr) ||
      (d_x != nullptr && a.w == nullptr))
    return Status::kNullPointer;
  if (!present(a.cores)) return Status::kBadOption;
  const std::int64_t stride = padded_experts(a.experts);
  auto* narrowed = static_cast<std::uint16_t*>(workspace);
  if (!rounded) {
    queue(narrow, static_cast<unsigned>(parts(a.tokens * stride, 256)), 256, 0, stream, a.d_logits, a.tokens, a.experts,
          stride, reinterpret_cast<__nv_bfloat16*>(narrowed));
  }
  const Matrix g = matrix(rounded ? a.rounded_d_logits : narrowed, a.tokens, a.experts, stride);
  if (d_x != nullptr) {
    const Matrix w = matrix(a.w, a.experts, a.hidden, a.hidden);
    auto* out = reinterpret_cast<__nv_bfloat16*>(d_x);
    const auto call = a.experts <= 32    ? launch_inputs<32>
                      : a.experts <= 64  ? launch_inputs<64>
                      : a.experts <= 128 ? launch_inputs<128>
                                         : launch_inputs<256>;
    const Status status = call(a.cores, g, w, a.hidden, out, stream);
    if (status != Status::kOk) return status;
  }
  if (d_w != nullptr) {
    const std::int64_t stretch = stretch_of(a.tokens), stretches = parts(a.tokens, stretch),
                       elements = a.experts * a.hidden;
    auto* partial = reinterpret_cast<float*>(static_cast<char*>(workspace) + aligned(2 * a.tokens * stride));
    const auto call =
        a.cores == TensorCores::kWarpgroup ? launch_weights<WarpgroupWeights> : launch_weights<WarpWeights>;
    const Status status =
        call(g, matrix(a.x, a.tokens, a.hidden, a.hidden), a.experts, a.hidden, stretch, partial, stream);
    if (status != Status::kOk) return status;
    queue(add_stretches, static_cast<unsigned>(parts(elements, 256)), 256, 0, stream, partial, elements,
          static_cast<int>(stretches), d_w);
  }
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kLaunchFailed;
}

}  // namespace moeaudit::kernels::cuda
