// The vanilla RNN cell (Elman 1990; torch.nn.RNN's definition) with tanh or relu, for V one number
// or a SIMD vector of hidden units. WHAT is computed; cpu/ and cuda/ say how.
#pragma once

#include "math.h"

namespace fusedrnn {
namespace {

template <bool kRelu>
struct Rnn {
  static constexpr int kGates        = 1;
  static constexpr int kGradGates    = 1;
  static constexpr int kRecurrentRow = 0;
  static constexpr bool kHasCell     = false;
  static constexpr bool kHasExtra    = false;
  static constexpr bool kHasCarry    = false;
  static constexpr bool kPrevIsH     = false;

  // Whether gate g is a sigmoid's result.
  static FUSEDRNN_CELL constexpr bool is_sigmoid(int) { return false; }

  template <class V>
  struct Forward {
    V gates[kGates], extra, h;
  };
  static constexpr int kFinishFrom = 0;

  template <class V>
  static FUSEDRNN_CELL Forward<V> begin(const V* gates_x, const V* gates_h, V) {
    return {{gates_x[0] + gates_h[0]}, V{}, V{}};
  }
  template <class V>
  static FUSEDRNN_CELL void finish(Forward<V>* units, V) {
    // h = tanh(gates_x + gates_h) or relu(gates_x + gates_h)
    V& a = units->gates[0];
    if constexpr (kRelu) {
      a = relu(a);
    } else {
      a = tanh(a);
    }
    units->h = a;
  }

  template <class V>
  static FUSEDRNN_CELL V hidden(const V* gates, V, V) {
    return gates[0];
  }

  template <class V>
  struct Backward {
    V grad_gates[kGradGates], carry, h;
  };

  template <class V>
  static FUSEDRNN_CELL Backward<V> backward(const V* gates, V, V, V grad_h, V) {
    // d_a = d_h tanh'(a) or d_h relu'(a); relu's derivative at NaN is 1, as torch's
    const V h = gates[0];
    V grad_a;
    if constexpr (kRelu) {
      grad_a = h <= 0 ? V{} : grad_h;
    } else {
      grad_a = grad_h * d_tanh(h);
    }
    return {{grad_a}, V{}, h};
  }
};

}  // namespace
}  // namespace fusedrnn
