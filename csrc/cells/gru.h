// The GRU cell (Cho et al. 2014; torch.nn.GRU's definition, the reset gate after the recurrent
// product), for V one number or a SIMD vector of hidden units. WHAT is computed; cpu/ and cuda/ say
// how.
#pragma once

#include "math.h"

namespace fusedrnn {
namespace {

struct Gru {
  static constexpr int kGates        = 3;  // r, z, n
  static constexpr int kGradGates    = 4;  // of n_h, r, z, n_x
  static constexpr int kRecurrentRow = 2;  // grad_gates begins with n_h: weight_hh's row block 2
  static constexpr bool kHasCell     = false;
  static constexpr bool kHasExtra    = true;  // a_hn
  static constexpr bool kHasCarry    = true;  // grad_h z
  static constexpr bool kPrevIsH     = true;  // the `prev` of forward and backward is h_prev

  // Whether gate g is a sigmoid's result.
  static FUSEDRNN_CELL constexpr bool is_sigmoid(int g) { return g < 2; }

  // begin, then finish, which waits for it, and reads the gates from kFinishFrom on.
  template <class V>
  struct Forward {
    V gates[kGates], extra, h;
  };
  static constexpr int kFinishFrom = 1;

  template <class V>
  static FUSEDRNN_CELL Forward<V> begin(const V* gates_x, const V* gates_h, V) {
    // r = sigmoid(a_xr + a_hr)   z = sigmoid(a_xz + a_hz)   a_n = a_xn + r a_hn
    const V r    = sigmoid(gates_x[0] + gates_h[0]);
    const V z    = sigmoid(gates_x[1] + gates_h[1]);
    const V a_hn = gates_h[2];
    return {{r, z, fma(r, a_hn, gates_x[2])}, a_hn, V{}};
  }
  template <class V>
  static FUSEDRNN_CELL void finish(Forward<V>* units, V h_prev) {
    // n = tanh(a_n)   h = (1 - z) n + z h_prev
    units->gates[2] = tanh(units->gates[2]);
    units->h        = hidden(units->gates, units->extra, h_prev);
  }

  // h = (1 - z) n + z h_prev = n + z (h_prev - n), from what is saved: backward computes it again.
  template <class V>
  static FUSEDRNN_CELL V hidden(const V* gates, V, V h_prev) {
    const V z = gates[1], n = gates[2];
    return fma(z, h_prev - n, n);
  }

  template <class V>
  struct Backward {
    V grad_gates[kGradGates], carry;
  };

  // carry comes in and goes out as the part of the gradient of h_prev that does not pass through
  // weight_hh; grad_h is the rest.
  template <class V>
  static FUSEDRNN_CELL Backward<V> backward(const V* gates, V a_hn, V h_prev, V grad_h, V carry) {
    // d_a_n  = d_h (1 - z) tanh'(a_n)           d_a_z = d_h (h_prev - n) sigmoid'(a_z)
    // d_a_hn = d_a_n r                          d_a_r = d_a_n a_hn       sigmoid'(a_r)
    // d_h_prev = d_h z + (through weight_hh)
    const V r = gates[0], z = gates[1], n = gates[2];
    grad_h         = grad_h + carry;
    const V grad_n = grad_h * (1 - z) * d_tanh(n);
    const V grad_z = grad_h * (h_prev - n) * d_sigmoid(z);
    const V grad_r = grad_n * a_hn * d_sigmoid(r);
    return {{grad_n * r, grad_r, grad_z, grad_n}, grad_h * z};
  }
};

}  // namespace
}  // namespace fusedrnn
