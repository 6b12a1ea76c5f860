// Metrics of routing in float64 on LibTorch: the truth that kernels/host/routing_metrics.h answers to, by one-hot
// matrices and sorts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>

namespace moeaudit::reference {

/// Least chosen minus largest other of choice [T, E]; chosen int64 [T, k], negative: dropped. [T].
at::Tensor routing_margins(const at::Tensor& choice, const at::Tensor& chosen);

/// saturation, changed, jaccard, identical, same_first of the sets now [T, k] and reference [T, j], int64, negative:
/// dropped; and their _chance for `experts`, by counting all pairs of subsets of sizes k and j (small numbers alone).
std::map<std::string, double> agreement(const at::Tensor& now, const at::Tensor& reference, std::int64_t experts,
                                        bool with_chance);

/// counts int64 [L, E] of chosen [T, k] by labels [T].
at::Tensor count_by_label(const at::Tensor& chosen, const at::Tensor& labels, std::int64_t num_labels,
                          std::int64_t experts);

/// int64 [S]: tokens of first [S, T] that hold their last row's choice from row s on, and no earlier.
at::Tensor count_settled(const at::Tensor& first);

/// Values at rank floor(share (n - 1)), ascending.
at::Tensor order_statistics(const at::Tensor& values, const at::Tensor& shares);

/// micro, step and pooled _max_violation and _cv of counts [S, M, E], none of them empty.
std::map<std::string, double> load_scopes(const at::Tensor& counts);

/// Share of the choices that the `busiest` most chosen experts got.
double coverage(const at::Tensor& counts, std::int64_t busiest);

/// ideal, slowest, max_over_mean, slowest_rank, idle_ranks and even_router (kernels/host/routing_metrics.h, Placement)
/// of counts int64 [E] whose experts lie where slot_expert and slot_rank [slots] say; speed [R]; top_k choices each of
/// `tokens`, 0: without end. And loads, the choices of each rank [R], where the pointer is given.
std::map<std::string, double> placement_load(const at::Tensor& counts, const at::Tensor& slot_expert,
                                             const at::Tensor& slot_rank, const at::Tensor& speed, std::int64_t top_k,
                                             std::int64_t tokens, at::Tensor* loads = nullptr);

/// H(labels) + H(experts) - H(both), nats, of a table of counts.
double mutual_information(const at::Tensor& table);

/// n_rc N / (n_r n_c).
at::Tensor lift(const at::Tensor& table);

}  // namespace moeaudit::reference
