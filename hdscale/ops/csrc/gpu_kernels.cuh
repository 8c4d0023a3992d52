// CUDA kernels of the generated-adapter operator for compute capability 8.0 and later: bfloat16 in, float32 sums on the
// tensor cores (mma.sync.m16n8k16), generated tiles in registers and shared memory only.
//
// Sums that several blocks share are cut into parts with a result each, which a last kernel adds in a fixed order: no
// atomics, the same bits at every run. Shapes need not be multiples of anything.
//
// This file is also compiled by a C++ compiler, against an emulation of warps and barriers (tests/helpers/emulator/): it takes
// from CUDA only what HDSCALE_SHARED, threadIdx, blockIdx, __syncthreads, __byte_perm and multiply_add need.
#pragma once
#include "gpu_tiles.h"

namespace hdscale {
namespace gpu {

typedef uint16_t Brain;  // the bits of a bfloat16

struct alignas(16) Words {
  uint32_t word[4];
};

#if defined(__CUDACC__)
// d += a b for one warp: a [16][16], b [16][8], d [16][8].
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

__device__ __forceinline__ float widen(Brain v) {
  union {
    uint32_t bits;
    float value;
  } u;
  u.bits = uint32_t(v) << 16;
  return u.value;
}
__device__ __forceinline__ Brain narrow(float v) {  // round to nearest even
  union {
    float value;
    uint32_t bits;
  } u;
  u.value = v;
  if ((u.bits & 0x7fffffffu) > 0x7f800000u) return Brain((u.bits >> 16) | 0x40);
  return Brain((u.bits + 0x7fffu + ((u.bits >> 16) & 1u)) >> 16);
}
__device__ __forceinline__ uint32_t pair(Brain low, Brain high) { return uint32_t(low) | uint32_t(high) << 16; }
__device__ __forceinline__ uint32_t shared_pair(const Brain* p) { return *reinterpret_cast<const uint32_t*>(p); }

// row[k .. k + 7] as four words; zero from K on.
__device__ __forceinline__ Words load_eight(const Brain* row, int k, int K, bool wide) {
  Words out = {{0, 0, 0, 0}};
  if (wide) {  // K is a multiple of 8 and the rows are aligned: all eight are there, or none
    if (k < K) out = *reinterpret_cast<const Words*>(row + k);
    return out;
  }
  for (int w = 0; w < 4; ++w) {
    const int at = k + 2 * w;
    out.word[w] = pair(at < K ? row[at] : Brain(0), at + 1 < K ? row[at + 1] : Brain(0));
  }
  return out;
}

// (row[k], row[k + 1]); zero from K on, and for a row that is not there.
__device__ __forceinline__ uint32_t load_two(const Brain* row, int k, int K, bool wide) {
  if (row == nullptr || k >= K) return 0;
  if (wide) return *reinterpret_cast<const uint32_t*>(row + k);
  return pair(row[k], k + 1 < K ? row[k + 1] : Brain(0));
}

struct ContractArguments {
  const Brain *weight, *bias, *code, *in;  // [O*I, K], [O*I], [B, K], [B, T, steps]
  float* partial;                          // [splits][B][T][columns]
  int B, T, O, I, K, splits;
  bool over_outer, wide;
};

// partial[split][n][t][column] = sum over the split's steps of in[n][t][step] * G[n](step, column), where G's outer
// index is the step (over_outer) or the column. Block: 16 columns, INSTANCES instances, TOKENS tokens, one split.
template <int INSTANCES, int TOKENS>
__global__ void __launch_bounds__(kThreads) contract_kernel(ContractArguments a) {
  constexpr int kMine = INSTANCES / kWarps;  // instances a warp applies
  HDSCALE_SHARED(Brain, shared);
  Brain* const code = shared;
  Brain* const generated = shared + INSTANCES * code_stride(a.K);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int columns = a.over_outer ? a.I : a.O, steps = a.over_outer ? a.O : a.I;
  const int column0 = blockIdx.x * kTile;
  const int token_blocks = ceil_div(a.T, TOKENS);
  const int n0 = blockIdx.z / token_blocks * INSTANCES, t0 = blockIdx.z % token_blocks * TOKENS;
  const int stride = code_stride(a.K), padded = round_up(a.K, kCodeBlock);

  for (int index = threadIdx.x; index < INSTANCES * padded; index += kThreads) {
    const int n = index / padded, k = index % padded;
    code[n * stride + k] = n0 + n < a.B && k < a.K ? a.code[int64_t(n0 + n) * a.K + k] : Brain(0);
  }
  float result[kMine][TOKENS / 8][4] = {};
  const Range range = share(ceil_div(steps, kTile), a.splits, blockIdx.y);
  for (int block = range.begin; block < range.end; ++block) {
    const int step0 = block * kTile;
    const int o0 = a.over_outer ? step0 : column0, i0 = a.over_outer ? column0 : step0;
    __syncthreads();  // the codes are there; the last tile has been read
    // generate: rows of one multiplication share o and run over i; a warp has two of them
    float tile[2][INSTANCES / 8][4] = {};
    const Brain* rows[2][2];
    for (int j = 0; j < 2; ++j)
      for (int half = 0; half < 2; ++half) {
        const int o = o0 + 2 * warp + j, i = i0 + fragment_row(lane, half);
        rows[j][half] = o < a.O && i < a.I ? a.weight + (int64_t(o) * a.I + i) * a.K : nullptr;
      }
    for (int k = 0; k < padded; k += kCodeBlock) {
      Words left[2][2];
      for (int j = 0; j < 2; ++j)
        for (int half = 0; half < 2; ++half) {
          left[j][half] = Words{{0, 0, 0, 0}};
          if (rows[j][half] != nullptr) left[j][half] = load_eight(rows[j][half], k + code_offset(lane), a.K, a.wide);
        }
#pragma unroll
      for (int n = 0; n < INSTANCES / 8; ++n) {
        const Words right = *reinterpret_cast<const Words*>(
            code + (n * 8 + fragment_column(lane)) * stride + k + code_offset(lane));
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int w = 0; w < 4; w += 2) {
            const uint32_t words[4] = {left[j][0].word[w], left[j][1].word[w], left[j][0].word[w + 1],
                                       left[j][1].word[w + 1]};
            multiply_add(tile[j][n], words, right.word[w], right.word[w + 1]);
          }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
      for (int half = 0; half < 2; ++half) {
        const int local_o = 2 * warp + j, local_i = fragment_row(lane, half);
        const bool there = rows[j][half] != nullptr;
        const float bias = there ? widen(a.bias[int64_t(o0 + local_o) * a.I + i0 + local_i]) : 0.f;
        const int column = a.over_outer ? local_i : local_o, step = a.over_outer ? local_o : local_i;
#pragma unroll
        for (int n = 0; n < INSTANCES / 8; ++n)
          for (int c = 0; c < 2; ++c)
            generated[generated_index(n * 8 + result_column(lane) + c, column, step)] =
                narrow(tile[j][n][2 * half + c] + bias);
      }
    __syncthreads();
    // apply: 16 columns x 16 steps of an instance times 16 steps x 8 tokens
#pragma unroll
    for (int mine = 0; mine < kMine; ++mine) {
      const int local_n = warp * kMine + mine, n = n0 + local_n;
      uint32_t left[4];
      for (int half = 0; half < 2; ++half)
        for (int row = 0; row < 2; ++row)
          left[2 * half + row] = shared_pair(
              generated + generated_index(local_n, fragment_row(lane, row), fragment_step(lane, half)));
#pragma unroll
      for (int block_t = 0; block_t < TOKENS / 8; ++block_t) {
        const int t = t0 + block_t * 8 + fragment_column(lane);
        uint32_t right[2] = {0, 0};
        if (n < a.B && t < a.T) {
          const Brain* from = a.in + (int64_t(n) * a.T + t) * steps;
          for (int half = 0; half < 2; ++half) {
            const int step = step0 + fragment_step(lane, half);
            right[half] = pair(step < steps ? from[step] : Brain(0), step + 1 < steps ? from[step + 1] : Brain(0));
          }
        }
        multiply_add(result[mine][block_t], left, right[0], right[1]);
      }
    }
  }
#pragma unroll
  for (int mine = 0; mine < kMine; ++mine)
#pragma unroll
    for (int block_t = 0; block_t < TOKENS / 8; ++block_t)
      for (int half = 0; half < 2; ++half)
        for (int c = 0; c < 2; ++c) {
          const int n = n0 + warp * kMine + mine, column = column0 + fragment_row(lane, half);
          const int t = t0 + block_t * 8 + result_column(lane) + c;
          if (n < a.B && t < a.T && column < columns)
            a.partial[((int64_t(blockIdx.y) * a.B + n) * a.T + t) * columns + column] =
                result[mine][block_t][2 * half + c];
        }
}

struct FinishArguments {
  const float* partial;  // [parts][count]
  const float* bias;     // [count / (T * C), C], or null
  const Brain* mask;     // [count]: results whose mask is not positive become zero; or null
  Brain* out;
  int64_t count;
  int parts, T, C;
  bool relu;
};

// out = the sum of the parts, plus a bias, through ReLU or a given ReLU mask.
__global__ void __launch_bounds__(kThreads) finish_kernel(FinishArguments a) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= a.count) return;
  float sum = 0.f;
  for (int part = 0; part < a.parts; ++part) sum += a.partial[part * a.count + index];
  if (a.bias != nullptr) sum += a.bias[index / (int64_t(a.T) * a.C) * a.C + index % a.C];
  if (a.relu && sum < 0.f) sum = 0.f;
  if (a.mask != nullptr && !(widen(a.mask[index]) > 0.f)) sum = 0.f;
  a.out[index] = narrow(sum);
}

struct TokenSumArguments {
  const float* partial;  // [parts][count / (T * C)][T][C]
  const Brain* mask;     // [count]: results whose mask is not positive count as zero
  float* out;            // [count / (T * C)][C]
  int64_t count;
  int parts, T, C;
};

// out = the sum over the tokens of what finish_kernel makes of the same parts, before it rounds.
__global__ void __launch_bounds__(kThreads) token_sum_kernel(TokenSumArguments a) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= a.count / a.T) return;
  float total = 0.f;
  for (int t = 0; t < a.T; ++t) {
    const int64_t at = (index / a.C * a.T + t) * a.C + index % a.C;
    if (!(widen(a.mask[at]) > 0.f)) continue;
    float sum = 0.f;
    for (int part = 0; part < a.parts; ++part) sum += a.partial[part * a.count + at];
    total += sum;
  }
  a.out[index] = total;
}

struct HeadGradientArguments {
  const Brain* in[kMaxLayers];    // per layer [B, T, O]
  const Brain* grad[kMaxLayers];  // per layer [B, T, I]
  const Brain *code, *weight;     // [N * B, K], [O*I, K]
  Brain *dweight, *dbias;         // [O*I, K], [O*I]
  float* partial;                 // [splits][N * B][K], the codes' gradient
  int N, B, T, O, I, K, splits;
  bool wide;                      // K is even and rows start at even elements
};

// The tile (o0, i0) of one sample's generated-weight gradient, sum_t in[t][o] grad[t][i], as two result fragments:
// rows o, columns i = 8 n + ...
__device__ __forceinline__ void sample_tile(const HeadGradientArguments& a, int sample, int o0, int i0, int lane,
                                            float (&tile)[2][4]) {
  const bool there = sample < a.N * a.B;
  const int layer = there ? sample / a.B : 0, n = there ? sample % a.B : 0;
  const Brain* in = a.in[layer] + int64_t(n) * a.T * a.O;
  const Brain* grad = a.grad[layer] + int64_t(n) * a.T * a.I;
  for (int t0 = 0; t0 < a.T; t0 += kTile) {
    uint32_t left[4], right[2][2];
    for (int half = 0; half < 2; ++half) {
      const int t = t0 + fragment_step(lane, half);
      const bool first = there && t < a.T, second = there && t + 1 < a.T;
      for (int row = 0; row < 2; ++row) {
        const int o = o0 + fragment_row(lane, row);
        left[2 * half + row] = pair(first && o < a.O ? in[int64_t(t) * a.O + o] : Brain(0),
                                    second && o < a.O ? in[int64_t(t + 1) * a.O + o] : Brain(0));
      }
      for (int column = 0; column < 2; ++column) {
        const int i = i0 + 8 * column + fragment_column(lane);
        right[column][half] = pair(first && i < a.I ? grad[int64_t(t) * a.I + i] : Brain(0),
                                   second && i < a.I ? grad[int64_t(t + 1) * a.I + i] : Brain(0));
      }
    }
    for (int column = 0; column < 2; ++column) multiply_add(tile[column], left, right[column][0], right[column][1]);
  }
}

// dweight and dbias of one tile and kCodeColumns columns, over all samples of all layers.
__global__ void __launch_bounds__(kThreads) weight_gradient_kernel(HeadGradientArguments a) {
  HDSCALE_SHARED(Brain, shared);
  Brain* const generated = shared;                             // [row of the tile][sample]
  Brain* const code = shared + kTileRows * kSampleStride;      // [sample][column]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int inner_tiles = ceil_div(a.I, kTile);
  const int o0 = blockIdx.x / inner_tiles * kTile, i0 = blockIdx.x % inner_tiles * kTile;
  const int k0 = blockIdx.y * kCodeColumns;
  const int samples = a.N * a.B;
  float sums[2][kCodeColumns / 8][4] = {};
  float bias = 0.f;
  for (int sample0 = 0; sample0 < samples; sample0 += kSamples) {
    __syncthreads();
    for (int index = threadIdx.x; index < kSamples * kCodeColumns; index += kThreads) {
      const int m = index / kCodeColumns, k = index % kCodeColumns;
      code[m * kCodeColumnStride + k] = sample0 + m < samples && k0 + k < a.K
                                            ? a.code[int64_t(sample0 + m) * a.K + k0 + k]
                                            : Brain(0);
    }
    for (int m = warp; m < kSamples; m += kWarps) {
      float tile[2][4] = {};
      sample_tile(a, sample0 + m, o0, i0, lane, tile);
      for (int column = 0; column < 2; ++column)
        for (int half = 0; half < 2; ++half)
          for (int c = 0; c < 2; ++c) {
            const int row = fragment_row(lane, half) * kTile + 8 * column + result_column(lane) + c;
            generated[row * kSampleStride + m] = narrow(tile[column][2 * half + c]);
          }
    }
    __syncthreads();
    for (int m = 0; m < kSamples; ++m) bias += widen(generated[threadIdx.x * kSampleStride + m]);
    for (int step0 = 0; step0 < kSamples; step0 += kTile) {
      uint32_t left[2][4];
      for (int j = 0; j < 2; ++j)
        for (int half = 0; half < 2; ++half)
          for (int row = 0; row < 2; ++row)
            left[j][2 * half + row] =
                shared_pair(generated + (32 * warp + 16 * j + fragment_row(lane, row)) * kSampleStride + step0 +
                            fragment_step(lane, half));
#pragma unroll
      for (int block = 0; block < kCodeColumns / 16; ++block) {
        uint32_t even[2], odd[2];
        for (int half = 0; half < 2; ++half) {
          const Brain* from = code + (step0 + fragment_step(lane, half)) * kCodeColumnStride + block * 16 +
                              paired_column(fragment_column(lane), 0);
          const uint32_t first = shared_pair(from), second = shared_pair(from + kCodeColumnStride);
          even[half] = __byte_perm(first, second, 0x5410);
          odd[half] = __byte_perm(first, second, 0x7632);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          multiply_add(sums[j][2 * block], left[j], even[0], even[1]);
          multiply_add(sums[j][2 * block + 1], left[j], odd[0], odd[1]);
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int block = 0; block < kCodeColumns / 8; ++block)
      for (int half = 0; half < 2; ++half)
        for (int c = 0; c < 2; ++c) {
          const int row = 32 * warp + 16 * j + fragment_row(lane, half);
          const int o = o0 + row / kTile, i = i0 + row % kTile;
          const int k = k0 + block / 2 * 16 + paired_column(result_column(lane) + c, block % 2);
          if (o < a.O && i < a.I && k < a.K)
            a.dweight[(int64_t(o) * a.I + i) * a.K + k] = narrow(sums[j][block][2 * half + c]);
        }
  const int o = o0 + int(threadIdx.x) / kTile, i = i0 + int(threadIdx.x) % kTile;
  if (blockIdx.y == 0 && o < a.O && i < a.I) a.dbias[int64_t(o) * a.I + i] = narrow(bias);
}

// The codes' gradient of kSamples samples and kCodeColumns columns, over one split of the tiles.
__global__ void __launch_bounds__(kThreads) code_gradient_kernel(HeadGradientArguments a) {
  HDSCALE_SHARED(Brain, generated);  // [sample][row of the tile]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int inner_tiles = ceil_div(a.I, kTile), outer_tiles = ceil_div(a.O, kTile);
  const int sample0 = blockIdx.x * kSamples, k0 = blockIdx.z * kCodeColumns + warp / 4 * (kCodeColumns / 2);
  const int my_sample = warp % 4 * kTile;
  const int samples = a.N * a.B;
  float sums[kCodeColumns / 16][4] = {};
  const Range range = share(outer_tiles * inner_tiles, a.splits, blockIdx.y);
  for (int tile_index = range.begin; tile_index < range.end; ++tile_index) {
    const int o0 = tile_index / inner_tiles * kTile, i0 = tile_index % inner_tiles * kTile;
    __syncthreads();
    for (int m = warp; m < kSamples; m += kWarps) {
      float tile[2][4] = {};
      sample_tile(a, sample0 + m, o0, i0, lane, tile);
      for (int column = 0; column < 2; ++column)
        for (int half = 0; half < 2; ++half)
          for (int c = 0; c < 2; ++c) {
            const int row = fragment_row(lane, half) * kTile + 8 * column + result_column(lane) + c;
            generated[m * kTileRowStride + row] = narrow(tile[column][2 * half + c]);
          }
    }
    __syncthreads();
    for (int o = 0; o < kTile; ++o) {  // sixteen steps: the rows (o, i0 ..)
      uint32_t left[4];
      const Brain* rows[2][2];
      for (int half = 0; half < 2; ++half) {
        for (int row = 0; row < 2; ++row)
          left[2 * half + row] = shared_pair(generated + (my_sample + fragment_row(lane, row)) * kTileRowStride +
                                             o * kTile + fragment_step(lane, half));
        for (int next = 0; next < 2; ++next) {
          const int i = i0 + fragment_step(lane, half) + next;
          rows[half][next] =
              o0 + o < a.O && i < a.I ? a.weight + (int64_t(o0 + o) * a.I + i) * a.K : nullptr;
        }
      }
#pragma unroll
      for (int block = 0; block < kCodeColumns / 32; ++block) {
        const int k = k0 + block * 16 + paired_column(fragment_column(lane), 0);
        uint32_t even[2], odd[2];
        for (int half = 0; half < 2; ++half) {
          const uint32_t first = load_two(rows[half][0], k, a.K, a.wide);
          const uint32_t second = load_two(rows[half][1], k, a.K, a.wide);
          even[half] = __byte_perm(first, second, 0x5410);
          odd[half] = __byte_perm(first, second, 0x7632);
        }
        multiply_add(sums[2 * block], left, even[0], even[1]);
        multiply_add(sums[2 * block + 1], left, odd[0], odd[1]);
      }
    }
  }
#pragma unroll
  for (int block = 0; block < kCodeColumns / 16; ++block)
    for (int half = 0; half < 2; ++half)
      for (int c = 0; c < 2; ++c) {
        const int sample = sample0 + my_sample + fragment_row(lane, half);
        const int k = k0 + block / 2 * 16 + paired_column(result_column(lane) + c, block % 2);
        if (sample < samples && k < a.K)
          a.partial[(int64_t(blockIdx.y) * samples + sample) * a.K + k] = sums[block][2 * half + c];
      }
}

}  // namespace gpu
}  // namespace hdscale
