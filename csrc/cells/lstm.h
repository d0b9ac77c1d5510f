// The LSTM cell (Hochreiter and Schmidhuber 1997, with forget gate; torch.nn.LSTM's definition),
// for V one number or a SIMD vector of hidden units. WHAT is computed; cpu/ and cuda/ say how.
#pragma once

#include "math.h"

namespace fusedrnn {
namespace {

struct Lstm {
  static constexpr int kGates        = 4;  // i, f, g, o
  static constexpr int kGradGates    = 4;  // of i, f, g, o
  static constexpr int kRecurrentRow = 0;  // weight_hh's row block for grad_gates' first
  static constexpr bool kHasCell     = true;
  static constexpr bool kHasExtra    = true;   // c
  static constexpr bool kHasCarry    = true;   // grad_c
  static constexpr bool kPrevIsH     = false;  // the `prev` of forward and backward is c_prev

  // Whether gate g is a sigmoid's result.
  static FUSEDRNN_CELL constexpr bool is_sigmoid(int g) { return g != 2; }

  // begin, then finish, which waits for it, and reads extra and the gates from kFinishFrom on.
  template <class V>
  struct Forward {
    V gates[kGates], extra, h;
  };
  static constexpr int kFinishFrom = 3;

  template <class V>
  static FUSEDRNN_CELL Forward<V> begin(const V* gates_x, const V* gates_h, V c_prev) {
    // i = sigmoid(a_i)   f = sigmoid(a_f)   g = tanh(a_g)   o = sigmoid(a_o)
    // c = f c_prev + i g                                    (a = gates_x + gates_h)
    const V i = sigmoid(gates_x[0] + gates_h[0]);
    const V f = sigmoid(gates_x[1] + gates_h[1]);
    const V g = tanh(gates_x[2] + gates_h[2]);
    const V o = sigmoid(gates_x[3] + gates_h[3]);
    const V c = fma(f, c_prev, i * g);
    return {{i, f, g, o}, c, V{}};
  }
  template <class V>
  static FUSEDRNN_CELL void finish(Forward<V>* units, V) {
    units->h = hidden(units->gates, units->extra, V{});
  }

  // h = o tanh(c), from what is saved: backward computes it again.
  template <class V>
  static FUSEDRNN_CELL V hidden(const V* gates, V c, V) {
    return gates[3] * tanh(c);
  }

  template <class V>
  struct Backward {
    V grad_gates[kGradGates], carry, h;
  };

  // grad_h is the whole gradient of h; carry comes in as the gradient of c from the step after, and
  // goes out as that of c_prev.
  template <class V>
  static FUSEDRNN_CELL Backward<V> backward(const V* gates, V c, V c_prev, V grad_h, V carry) {
    // d_c      = carry + d_h o tanh'(c)
    // d_a_i    = d_c g       sigmoid'(a_i)      d_a_f = d_c c_prev  sigmoid'(a_f)
    // d_a_g    = d_c i       tanh'(a_g)         d_a_o = d_h tanh(c) sigmoid'(a_o)
    // d_c_prev = d_c f
    const V i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const V tanh_c = tanh(c);
    const V grad_c = fma(grad_h * o, d_tanh(tanh_c), carry);
    const V grad_i = grad_c * g * d_sigmoid(i);
    const V grad_f = grad_c * c_prev * d_sigmoid(f);
    const V grad_g = grad_c * i * d_tanh(g);
    const V grad_o = grad_h * tanh_c * d_sigmoid(o);
    return {{grad_i, grad_f, grad_g, grad_o}, grad_c * f, o * tanh_c};
  }
};

}  // namespace
}  // namespace fusedrnn
