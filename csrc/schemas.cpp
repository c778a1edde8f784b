// The raw operators: complete launches that need no Python, one schema for the CPU and for CUDA. The contracts are
// those of the families of the same name in fused_resnet/ops. An absent result is an empty tensor.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet, m) {
  m.def(
      "_bn_act(Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps, str activation, "
      "Tensor? residual, Tensor? r_gamma, Tensor? r_beta, Tensor? r_mean, Tensor? r_var, float r_eps) -> "
      "(Tensor y, Tensor mask)");
  m.def(
      "_bn_act_sums(Tensor dy, Tensor? mask, Tensor x, Tensor mean, Tensor var, float eps, Tensor? residual, "
      "Tensor? r_mean, Tensor? r_var, float r_eps) -> Tensor");
  m.def(
      "_bn_act_grad(Tensor dy, Tensor? mask, Tensor x, Tensor? gamma, Tensor mean, Tensor var, float eps, "
      "Tensor means, bool shortcut, Tensor? residual, Tensor? r_gamma, Tensor? r_mean, Tensor? r_var, float r_eps, "
      "Tensor? r_means) -> (Tensor dx, Tensor dr)");
  m.def(
      "_conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, "
      "Tensor? residual, Tensor? pre_gamma, Tensor? pre_beta, Tensor? pre_mean, Tensor? pre_var, float eps, "
      "float pre_eps, str activation, str prologue, int[2] stride, int[2] padding, int[2] dilation, int groups, "
      "int tile=-1) -> Tensor");
  // conv_bn_act on the CPU in two halves. Packed weights serve one method ("direct", "winograd2", "winograd4": F(m x m,
  // 3 x 3), "grouped") on one kind of processor; y may be the residual.
  m.def(
      "_conv_pack(Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps, "
      "int[2] dilation, int groups, str method, str isa='') -> Tensor");
  m.def("_image(Tensor x, int[4] size) -> Tensor");  // uninitialised, channels_last, with dtype and device of x
  m.def(
      "_conv_packed(Tensor(a!) y, Tensor x, Tensor pack, Tensor? residual, int[2] kernel, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, str activation, str method) -> ()");
  // The CPU's launches on 8-bit values, in channels_last memory. weight is int8; scale and shift have taken in the
  // scales of x and of the result; low and high are in steps of the result where that is uint8 (`narrow`), which else
  // is fp32. `filters` is K, R, S.
  m.def("_conv_int8_pack(Tensor weight, Tensor scale, Tensor shift, int dilation_w, int x_zero, str isa='') -> Tensor");
  m.def(
      "_conv_int8(Tensor x, Tensor pack, Tensor? residual, int[3] filters, int[2] stride, int[2] padding, "
      "int[2] dilation, float residual_scale, int residual_zero, int y_zero, float low, float high, bool narrow) -> "
      "Tensor");
  m.def("_quantize(Tensor x, float inverse, int zero) -> Tensor");
  m.def("_max_pool(Tensor x, int[2] kernel, int[2] stride, int[2] padding) -> Tensor");
  m.def("_mean_pool(Tensor x) -> Tensor");  // of whole maps: [N, C, 1, 1]
  // Launches of the CPU's operators above, recorded by fused_resnet/tape.py, which knows the layout of entries and
  // numbers.
  m.def("_play(Tensor[] given, Tensor[] packs, Tensor entries, Tensor numbers, int[] results) -> Tensor[]");
  m.def("_is_finite(Tensor x) -> bool");  // x is dense and of floating point
  m.def(
      "_stem(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps, "
      "str activation, int[2] stride, int[2] padding) -> Tensor");
  // A batch's statistics from the moments of tiles of `span` of its `count` elements a channel, the last one shorter:
  // means - pivot and sums of squared differences from them, [tiles, K]. num_batches_tracked counts this batch; it
  // decides the weight where momentum is None. var is the biased one, running_var learns the unbiased one.
  m.def(
      "_bn_finalise(Tensor means, Tensor squares, int count, int span, Tensor? pivot, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor? num_batches_tracked, float? momentum, float eps) -> "
      "(Tensor mean, Tensor var, Tensor inverse_std)");
}
