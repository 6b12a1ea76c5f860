#include "audit/facts/values.h"

namespace moeaudit {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kUnknown: return "?";
    case DType::kF64: return "F64";
    case DType::kF32: return "F32";
    case DType::kBF16: return "BF16";
    case DType::kF16: return "F16";
    case DType::kF8E4M3: return "F8_E4M3";
    case DType::kF8E5M2: return "F8_E5M2";
    case DType::kF8E8M0: return "F8_E8M0";
    case DType::kF4: return "F4";
    case DType::kF6E2M3: return "F6_E2M3";
    case DType::kF6E3M2: return "F6_E3M2";
    case DType::kI64: return "I64";
    case DType::kI32: return "I32";
    case DType::kI16: return "I16";
    case DType::kI8: return "I8";
    case DType::kU64: return "U64";
    case DType::kU32: return "U32";
    case DType::kU16: return "U16";
    case DType::kU8: return "U8";
    case DType::kBool: return "BOOL";
    case DType::kC64: return "C64";
  }
  return "?";
}

const char* name_of(Scoring v) {
  switch (v) {
    case Scoring::kSoftmax: return "softmax";
    case Scoring::kSigmoid: return "sigmoid";
    case Scoring::kSqrtSoftplus: return "sqrtsoftplus";
  }
  return "?";
}

const char* name_of(TargetFault v) {
  switch (v) {
    case TargetFault::kNone: return "none";
    case TargetFault::kSplitString: return "split_string";
    case TargetFault::kDropout: return "dropout";
    case TargetFault::kLacksPartner: return "lacks_partner";
    case TargetFault::kElsewhere: return "elsewhere";
    case TargetFault::kRefused: return "refused";
  }
  return "?";
}

const char* name_of(ShapeFault v) {
  switch (v) {
    case ShapeFault::kOther: return "other";
    case ShapeFault::kTransposed: return "transposed";
    case ShapeFault::kSharded: return "sharded";
  }
  return "?";
}

const char* name_of(AdapterFault v) {
  switch (v) {
    case AdapterFault::kNoPair: return "no_pair";
    case AdapterFault::kMisfit: return "misfit";
    case AdapterFault::kRank: return "rank";
    case AdapterFault::kBaseShape: return "base_shape";
    case AdapterFault::kStackOrder: return "stack_order";
  }
  return "?";
}

const char* name_of(GroupScore v) {
  switch (v) {
    case GroupScore::kNone: return "none";
    case GroupScore::kMax: return "max";
    case GroupScore::kTop2Sum: return "top2_sum";
  }
  return "?";
}

const char* name_of(Method v) {
  switch (v) {
    case Method::kFull: return "full";
    case Method::kLora: return "lora";
    case Method::kQlora: return "qlora";
    case Method::kOtherAdapter: return "other_adapter";
  }
  return "?";
}

const char* name_of(Precision v) {
  switch (v) {
    case Precision::kFp32: return "fp32";
    case Precision::kAutocastBf16: return "autocast_bf16";
    case Precision::kAutocastFp16: return "autocast_fp16";
    case Precision::kPureBf16: return "pure_bf16";
    case Precision::kPureFp16: return "pure_fp16";
  }
  return "?";
}

const char* name_of(AuxEffect v) {
  switch (v) {
    case AuxEffect::kAdded: return "added";
    case AuxEffect::kIgnored: return "ignored";
    case AuxEffect::kCrash: return "crash";
    case AuxEffect::kKeywordOnly: return "keyword_only";
    case AuxEffect::kNoField: return "no_field";
  }
  return "?";
}

const char* name_of(Balance v) {
  switch (v) {
    case Balance::kAuxLoss: return "aux_loss";
    case Balance::kBiasUpdate: return "bias_update";
    case Balance::kBiasFrozen: return "bias_frozen";
    case Balance::kNone: return "none";
  }
  return "?";
}

const char* name_of(Part v) {
  switch (v) {
    case Part::kRouter: return "router";
    case Part::kRoutedExpert: return "routed_expert";
    case Part::kSharedExpert: return "shared_expert";
    case Part::kSharedExpertGate: return "shared_expert_gate";
    case Part::kDenseMlp: return "dense_mlp";
    case Part::kAttention: return "attention";
    case Part::kEmbedding: return "embedding";
    case Part::kHead: return "head";
    case Part::kNorm: return "norm";
    case Part::kOther: return "other";
  }
  return "?";
}

}  // namespace moeaudit
