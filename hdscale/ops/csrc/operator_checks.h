// Shape and type checks shared by the CPU and CUDA operators. A wrong call raises; it never reads out of bounds.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <vector>

#include "cpu_kernels.h"

namespace hdscale {

using torch::stable::Tensor;

inline void expect_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const Tensor& like,
                         const char* name) {
  bool same = tensor.dim() == int64_t(shape.size()) && tensor.scalar_type() == like.scalar_type() &&
              tensor.device() == like.device();
  int64_t index = 0;
  if (same)
    for (const int64_t size : shape) same = same && tensor.size(index++) == size;
  STD_TORCH_CHECK(same, "hdscale: ", name, " has the wrong shape, dtype or device for the other arguments");
}

inline void expect_floats(const Tensor& tensor, int64_t rows, int64_t columns, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns &&
                      tensor.scalar_type() == torch::headeronly::ScalarType::Float && tensor.device() == like.device(),
                  "hdscale: ", name, " has the wrong shape or device for the other arguments, or is not float32");
}

inline void expect_element(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == torch::headeronly::ScalarType::Float || type == torch::headeronly::ScalarType::BFloat16,
                  "hdscale: the compiled operator takes float32 and bfloat16");
}

inline void expect_heads(const Sizes& s, const Tensor& code, const Tensor& down_weight, const Tensor& up_weight,
                         const Tensor& like) {
  expect_element(like);
  expect_shape(code, {s.B, s.K}, like, "code");
  expect_shape(down_weight, {s.D * s.A, s.K}, like, "down_weight");
  expect_shape(up_weight, {s.D * s.A, s.K}, like, "up_weight");
}

inline Sizes check_forward(const Tensor& x, const Tensor& code, const Tensor& down_weight, const Tensor& down_bias,
                           const Tensor& up_weight, const Tensor& up_bias, const Tensor& hidden_bias,
                           const Tensor& out_bias) {
  STD_TORCH_CHECK(x.dim() == 3 && code.dim() == 2 && hidden_bias.dim() == 2, "hdscale: x is [B, T, D], code [B, K]");
  const Sizes s{x.size(0), x.size(1), x.size(2), hidden_bias.size(1), code.size(1)};
  expect_heads(s, code, down_weight, up_weight, x);
  expect_shape(down_bias, {s.D * s.A}, x, "down_bias");
  expect_shape(up_bias, {s.D * s.A}, x, "up_bias");
  expect_floats(hidden_bias, s.B, s.A, x, "hidden_bias");
  expect_floats(out_bias, s.B, s.D, x, "out_bias");
  return s;
}

inline Sizes check_backward(const Tensor& dy, const Tensor& hidden, const Tensor& code, const Tensor& down_weight,
                            const Tensor& down_bias, const Tensor& up_weight, const Tensor& up_bias) {
  STD_TORCH_CHECK(dy.dim() == 3 && code.dim() == 2 && hidden.dim() == 3, "hdscale: dy is [B, T, D], code [B, K]");
  const Sizes s{dy.size(0), dy.size(1), dy.size(2), hidden.size(2), code.size(1)};
  expect_heads(s, code, down_weight, up_weight, dy);
  expect_shape(hidden, {s.B, s.T, s.A}, dy, "hidden");
  expect_shape(down_bias, {s.D * s.A}, dy, "down_bias");
  expect_shape(up_bias, {s.D * s.A}, dy, "up_bias");
  return s;
}

inline Sizes check_heads_backward(const std::vector<Tensor>& x, const std::vector<Tensor>& dz,
                                  const std::vector<Tensor>& hidden, const std::vector<Tensor>& dy,
                                  const Tensor& code, const Tensor& down_weight, const Tensor& up_weight) {
  STD_TORCH_CHECK(code.dim() == 3, "hdscale: code is [N, B, K]");
  const size_t N = size_t(code.size(0));
  STD_TORCH_CHECK(N > 0 && x.size() == N && dz.size() == N && hidden.size() == N && dy.size() == N &&
                      x[0].dim() == 3 && dz[0].dim() == 3,
                  "hdscale: x, dz, hidden and dy are one [B, T, :] tensor for each of the N layers of code");
  const Sizes s{x[0].size(0), x[0].size(1), x[0].size(2), dz[0].size(2), code.size(2)};
  expect_element(code);
  expect_shape(code, {int64_t(N), s.B, s.K}, code, "code");
  expect_shape(down_weight, {s.D * s.A, s.K}, code, "down_weight");
  expect_shape(up_weight, {s.D * s.A, s.K}, code, "up_weight");
  for (size_t layer = 0; layer < N; ++layer) {
    expect_shape(x[layer], {s.B, s.T, s.D}, code, "x");
    expect_shape(dz[layer], {s.B, s.T, s.A}, code, "dz");
    expect_shape(hidden[layer], {s.B, s.T, s.A}, code, "hidden");
    expect_shape(dy[layer], {s.B, s.T, s.D}, code, "dy");
  }
  return s;
}

inline Tensor empty_floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  const torch::headeronly::IntHeaderOnlyArrayRef sizes(shape.begin(), shape.size());
  return torch::stable::new_empty(like, sizes, torch::headeronly::ScalarType::Float);
}

inline Tensor zero_floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  const torch::headeronly::IntHeaderOnlyArrayRef sizes(shape.begin(), shape.size());
  return torch::stable::new_zeros(like, sizes, torch::headeronly::ScalarType::Float);
}

template <class... Tensors>
void make_contiguous(Tensors&... tensors) {
  ((tensors = torch::stable::contiguous(tensors)), ...);
}

}  // namespace hdscale
