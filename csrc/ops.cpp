// Every operator that PyTorch sees. Names begin with an underscore: these are raw kernels without gradients; the public functions of the
// Python package check, choose a backend and differentiate.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

TORCH_LIBRARY(pykernels, m) {
  // One 64-bit seed from PyTorch's default generator, a 0-d int64 tensor.
  m.def("_seed() -> Tensor", {at::Tag::nondeterministic_seeded});

  // The 16-bit Philox draws of rows of activations, int32 [rows, n].
  m.def("_random_bits(Tensor seed, int rows, int n, int stream, int step) -> Tensor");

  // y, and for backward the activated value and the gate in one tensor [2, ...] (empty unless save).
  m.def(
      "_gated_conv_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? gate_weight, Tensor? gate_bias, Tensor? cond, Tensor? mask, "
      "Tensor? lengths, Tensor? cu_seqlens, Tensor? seed, Tensor? packed, int dilation, str padding, str residual, str value_act, "
      "str split, float gate_dropout, float gate_noise, bool save) -> (Tensor y, Tensor saved)");

  // dx, dweight, dbias, dgate_weight, dgate_bias, dcond; those that are not needed are empty. Without saved the forward is recomputed.
  m.def(
      "_gated_conv_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? gate_weight, Tensor? gate_bias, Tensor? cond, "
      "Tensor? mask, Tensor? lengths, Tensor? cu_seqlens, Tensor? seed, Tensor? saved, int dilation, str padding, str residual, "
      "str value_act, str split, float gate_dropout, float gate_noise, bool[6] needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dgate_weight, Tensor dgate_bias, Tensor dcond)");

  // The weights in the layout of this process's kernels, for inference with constant weights.
  m.def("_gated_conv_pack(Tensor weight, Tensor? gate_weight, str split) -> Tensor");

  // out, raw scores (empty unless saved or returned), softmax scores (empty unless returned), and for backward their largest and
  // the sum of e^(s - largest), out before it was rounded (empty where nothing is rounded), and what the activation and the sigmoid are
  // taken of, x's rows by H or 2 H (empty unless keep).
  m.def(
      "_attention_pool_fwd(Tensor x, Tensor weight, Tensor query, Tensor? bias, Tensor? gate_weight, Tensor? gate_bias, Tensor? mask, "
      "Tensor? lengths, Tensor? cu_seqlens, str activation, str return_scores, bool save, bool keep) "
      "-> (Tensor out, Tensor scores, Tensor weights, Tensor max_sum, Tensor pooled, Tensor kept)");

  // dx, dweight, dquery, dbias, dgate_weight, dgate_bias; those that are not needed are empty. dscores is the gradient of the scores that
  // return_scores names. Without kept the activations are computed again.
  m.def(
      "_attention_pool_bwd(Tensor? dout, Tensor? dscores, Tensor x, Tensor weight, Tensor query, Tensor? bias, Tensor? gate_weight, "
      "Tensor? gate_bias, Tensor? mask, Tensor? lengths, Tensor? cu_seqlens, Tensor scores, Tensor max_sum, Tensor pooled, Tensor? kept, "
      "str activation, str return_scores, bool[6] needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dquery, Tensor dbias, Tensor dgate_weight, Tensor dgate_bias)");

  // y, and for backward S = drop(x) A^T in the arithmetic type [rows, R] and the bits of dropout, one for each element of x (empty
  // without dropout). With adapter_index the adapters are [E, R, K] and [E, N, R]; scales [E], or [1] without it, stand for scale.
  m.def(
      "_lora_linear_fwd(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? scales, Tensor? adapter_index, "
      "Tensor? seed, float scale, float dropout) -> (Tensor y, Tensor s, Tensor keep)");

  // dx, dweight, dlora_a, dlora_b, dbias; those that are not needed are empty.
  m.def(
      "_lora_linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? scales, "
      "Tensor? adapter_index, Tensor? seed, Tensor s, Tensor keep, float scale, float dropout, bool[5] needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dlora_a, Tensor dlora_b, Tensor dbias)");

  // Several projections of one x: y, s and keep of each; dx, then dweight, dlora_a, dlora_b, dbias of each. saved: s and keep of each.
  m.def(
      "_lora_linear_stacked_fwd(Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor?[] biases, Tensor? seed, "
      "float[] scales, float dropout) -> Tensor[]");
  m.def(
      "_lora_linear_stacked_bwd(Tensor?[] dys, Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor?[] biases, "
      "Tensor? seed, Tensor[] saved, float[] scales, float dropout, bool[] needs) -> Tensor[]");

  // One step of ChildTuning's AdamW or SGD, in place. Moments are float32 (float64 for float64), of all elements or of those that the mask
  // selects; steps float32, each one more after. masks: uint8, a bit an element; runs: rows (start, length, stride) that say which elements
  // of the whole parameter a shard has. reserve_p: masks are drawn, with the streams. square_sum: of the gradients, for max_grad_norm.
  m.def(
      "_child_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
      "Tensor?[] masks, Tensor?[] runs, int[] streams, Tensor? grad_scale, Tensor? found_inf, Tensor? square_sum, Tensor lr, "
      "Tensor weight_decay, float beta1, float beta2, float eps, float? reserve_p, float max_grad_norm, int seed, str where, str decay, "
      "str order, bool correct_bias, bool maximize, bool stochastic_rounding) -> ()");
  m.def(
      "_child_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] steps, Tensor?[] masks, "
      "Tensor?[] runs, int[] streams, Tensor? grad_scale, Tensor? found_inf, Tensor? square_sum, Tensor lr, Tensor weight_decay, "
      "float momentum, float dampening, bool nesterov, float? reserve_p, float max_grad_norm, int seed, str where, str decay, "
      "bool maximize, bool stochastic_rounding) -> ()");

  // Sum of squares, a 0-d float64 tensor.
  m.def("_child_square_sum(Tensor[] grads) -> Tensor");
}
