// Runs the CUDA kernels of the generated-adapter operator in the emulator, on random inputs of a shape, and prints the
// relative error ||out - ref|| / ||ref|| of every result against double precision (gradients with the kernels' own ReLU
// mask and hidden activations): `name error` lines.
#include "warp_emulator.h"

#include "gpu_launch.h"

#include <cmath>
#include <random>
#include <string>

using namespace hdscale;
using emulator::Guarded;
using gpu::Brain;

namespace {

std::mt19937 generator;

struct Tensor {
  size_t count;
  Guarded<Brain> bits;
  std::vector<double> values;

  explicit Tensor(size_t n) : count(n), bits(n), values(n) {}
  Tensor& random(double scale, bool positive = false) {
    std::normal_distribution<double> normal(0, scale);
    for (size_t i = 0; i < count; ++i) {
      double v = normal(generator);
      if (positive && v < 0) v = 0;
      bits.data()[i] = gpu::narrow(float(v));
    }
    return fetch();
  }
  Tensor& fetch() {
    for (size_t i = 0; i < count; ++i) values[i] = gpu::widen(bits.data()[i]);
    return *this;
  }
  double operator[](size_t i) const { return values[i]; }
};

struct Floats {
  size_t count;
  Guarded<float> values;

  explicit Floats(size_t n) : count(n), values(n) {}
  Floats& random(double scale) {
    std::normal_distribution<double> normal(0, scale);
    for (size_t i = 0; i < count; ++i) values.data()[i] = float(normal(generator));
    return *this;
  }
  float operator[](size_t i) { return values.data()[i]; }
};

// `takes`: one line "B T D A K N" in, 1 or 0 out.
int say_what_is_taken() {
  long long B, T, D, A, K, N;
  while (scanf("%lld %lld %lld %lld %lld %lld", &B, &T, &D, &A, &K, &N) == 6)
    printf("%d\n", int(gpu::takes(Sizes{B, T, D, A, K}, N)));
  return 0;
}

void report(const char* name, Tensor& out, const std::vector<double>& reference) {
  out.fetch();
  double difference = 0, norm = 0;
  for (size_t i = 0; i < out.count; ++i) {
    difference += (out[i] - reference[i]) * (out[i] - reference[i]);
    norm += reference[i] * reference[i];
  }
  printf("%s %.6e\n", name, std::sqrt(difference / (norm > 0 ? norm : 1)));
}

struct EmulatedLaunch {
  template <class Arguments>
  void operator()(void (*kernel)(Arguments), gpu::Grid grid, int bytes, const Arguments& arguments) {
    emulator::launch(kernel, grid, unsigned(gpu::kThreads), bytes, arguments);
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "takes") return say_what_is_taken();
  if (argc != 8) emulator::fail("usage: run_kernels B T D A K N seed");
  const Sizes s{atol(argv[1]), atol(argv[2]), atol(argv[3]), atol(argv[4]), atol(argv[5])};
  const int64_t B = s.B, T = s.T, D = s.D, A = s.A, K = s.K, N = atol(argv[6]);
  generator.seed(unsigned(atol(argv[7])));
  if (!gpu::takes(s, N)) emulator::fail("the kernels do not take this shape");

  Tensor code(N * B * K), down_weight(D * A * K), down_bias(D * A), up_weight(D * A * K), up_bias(D * A);
  code.random(1, true);
  down_weight.random(1 / std::sqrt(double(D * K)));
  up_weight.random(1 / std::sqrt(double(A * K)));
  down_bias.random(1 / std::sqrt(double(D)));
  up_bias.random(1 / std::sqrt(double(A)));
  std::vector<std::unique_ptr<Tensor>> x, dy, hidden, dz;
  std::vector<const void*> pointers[4];
  EmulatedLaunch launch;
  Guarded<float> workspace(size_t(gpu::contract_workspace(s)));
  // generated weights of (layer, instance) in double precision
  const auto generated = [&](const Tensor& weight, const Tensor& bias, int64_t m, std::vector<double>& out) {
    for (int64_t r = 0; r < D * A; ++r) {
      double sum = bias[r];
      for (int64_t k = 0; k < K; ++k) sum += weight[r * K + k] * code[m * K + k];
      out[r] = sum;
    }
  };
  std::vector<double> down(D * A), up(D * A), dcode(N * B * K), ddown_weight(D * A * K), dup_weight(D * A * K),
      ddown_bias(D * A), dup_bias(D * A);
  for (int64_t layer = 0; layer < N; ++layer) {
    x.emplace_back(new Tensor(B * T * D)), dy.emplace_back(new Tensor(B * T * D));
    hidden.emplace_back(new Tensor(B * T * A)), dz.emplace_back(new Tensor(B * T * A));
    Tensor &x_l = x.back()->random(1), &dy_l = dy.back()->random(1), &hidden_l = *hidden.back(), &dz_l = *dz.back();
    Tensor y(B * T * D), dx(B * T * D);
    Floats hidden_bias(B * A), out_bias(B * D), dhidden_bias(B * A);
    hidden_bias.random(0.3), out_bias.random(0.3);
    Brain* layer_code = code.bits.data() + layer * B * K;
    gpu::forward(launch,
                 ForwardArguments{s, Element::bfloat16, x_l.bits.data(), layer_code, down_weight.bits.data(),
                                  down_bias.bits.data(), up_weight.bits.data(), up_bias.bits.data(),
                                  hidden_bias.values.data(), out_bias.values.data(), y.bits.data(), hidden_l.bits.data()},
                 workspace.data());
    gpu::backward(launch,
                  BackwardArguments{s, Element::bfloat16, dy_l.bits.data(), hidden_l.bits.data(), layer_code,
                                    down_weight.bits.data(), down_bias.bits.data(), up_weight.bits.data(),
                                    up_bias.bits.data(), dx.bits.data(), dz_l.bits.data(),
                                    dhidden_bias.values.data()},
                  workspace.data());
    hidden_l.fetch(), dz_l.fetch();
    std::vector<double> ref_hidden(B * T * A), ref_y(B * T * D), ref_dz(B * T * A), ref_dx(B * T * D);
    for (int64_t n = 0; n < B; ++n) {
      generated(down_weight, down_bias, layer * B + n, down);
      generated(up_weight, up_bias, layer * B + n, up);
      for (int64_t t = 0; t < T; ++t) {
        const int64_t row = n * T + t;
        for (int64_t a = 0; a < A; ++a) {
          double z = hidden_bias[n * A + a], dh = 0;
          for (int64_t d = 0; d < D; ++d) {
            z += x_l[row * D + d] * down[d * A + a];
            dh += dy_l[row * D + d] * up[a * D + d];
          }
          const bool on = hidden_l[row * A + a] > 0;
          ref_hidden[row * A + a] = on ? z : 0;
          ref_dz[row * A + a] = on ? dh : 0;
        }
        for (int64_t d = 0; d < D; ++d) {
          double out = out_bias[n * D + d], back = 0;
          for (int64_t a = 0; a < A; ++a) {
            out += ref_hidden[row * A + a] * up[a * D + d];
            back += ref_dz[row * A + a] * down[d * A + a];
          }
          ref_y[row * D + d] = out;
          ref_dx[row * D + d] = back;
        }
      }
    }
    report("hidden", hidden_l, ref_hidden);
    report("y", y, ref_y);
    report("dz", dz_l, ref_dz);
    report("dx", dx, ref_dx);
    // a sum over tokens of either sign: judged beside the root of its terms' squares, since what rounding the generated
    // weights to bfloat16 does to each term does not cancel where the terms do
    double difference = 0, terms = 0;
    for (int64_t n = 0; n < B; ++n)
      for (int64_t a = 0; a < A; ++a) {
        double sum = 0;
        for (int64_t t = 0; t < T; ++t) {
          const double term = ref_dz[(n * T + t) * A + a];
          sum += term, terms += term * term;
        }
        difference += (dhidden_bias[n * A + a] - sum) * (dhidden_bias[n * A + a] - sum);
      }
    printf("dhidden_bias %.6e\n", std::sqrt(difference / (terms > 0 ? terms : 1)));
    for (int64_t n = 0; n < B; ++n) {
      const int64_t m = layer * B + n;
      for (int64_t head = 0; head < 2; ++head) {
        const Tensor &in = head == 0 ? x_l : hidden_l, &grad = head == 0 ? dz_l : dy_l;
        const Tensor& weight = head == 0 ? down_weight : up_weight;
        const int64_t O = head == 0 ? D : A, I = head == 0 ? A : D;
        std::vector<double>&dweight = head == 0 ? ddown_weight : dup_weight, &dbias = head == 0 ? ddown_bias : dup_bias;
        for (int64_t o = 0; o < O; ++o)
          for (int64_t i = 0; i < I; ++i) {
            double g = 0;
            for (int64_t t = 0; t < T; ++t) g += in[(n * T + t) * O + o] * grad[(n * T + t) * I + i];
            const int64_t r = o * I + i;
            dbias[r] += g;
            for (int64_t k = 0; k < K; ++k) {
              dweight[r * K + k] += g * code[m * K + k];
              dcode[m * K + k] += g * weight[r * K + k];
            }
          }
      }
    }
  }
  for (int64_t layer = 0; layer < N; ++layer) {
    std::unique_ptr<Tensor>* tensors[4] = {&x[layer], &dz[layer], &hidden[layer], &dy[layer]};
    for (int which = 0; which < 4; ++which) pointers[which].push_back((*tensors[which])->bits.data());
  }
  Tensor out_dcode(N * B * K), out_ddown(D * A * K), out_dup(D * A * K), out_ddown_bias(D * A), out_dup_bias(D * A);
  Guarded<float> heads_workspace(size_t(gpu::heads_workspace(s, N)));
  gpu::heads_backward(launch,
                      HeadsBackwardArguments{s, N, Element::bfloat16, pointers[0].data(), pointers[1].data(),
                                             pointers[2].data(), pointers[3].data(), code.bits.data(),
                                             down_weight.bits.data(), up_weight.bits.data(), out_dcode.bits.data(),
                                             out_ddown.bits.data(), out_ddown_bias.bits.data(), out_dup.bits.data(),
                                             out_dup_bias.bits.data()},
                      heads_workspace.data());
  report("dcode", out_dcode, dcode);
  report("ddown_weight", out_ddown, ddown_weight);
  report("ddown_bias", out_ddown_bias, ddown_bias);
  report("dup_weight", out_dup, dup_weight);
  report("dup_bias", out_dup_bias, dup_bias);
  return 0;
}
