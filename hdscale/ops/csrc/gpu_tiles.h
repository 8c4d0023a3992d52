// Tile and index arithmetic of the CUDA kernels: pure functions for host and device, so that a C++ compiler can check
// them, over all odd shapes, on a machine without a GPU (tests/test_ops_gpu_tiles.py).
//
// A head's weight row r = o * I + i belongs to entry (o, i) of its generated [O, I] matrix. Kernels work on tiles of
// 16 x 16 entries; an mma.sync.m16n8k16 takes 16 of them along one side.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define HDSCALE_BOTH __host__ __device__ __forceinline__
#else
#define HDSCALE_BOTH inline
#endif

namespace hdscale {
namespace gpu {

constexpr int kTile = 16;                   // entries along each side of a tile
constexpr int kTileRows = kTile * kTile;    // head rows of a tile
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSamples = 64;                // samples (instance, layer) of one step of the heads' gradient
constexpr int kCodeColumns = 128;           // columns of K that one block of the heads' gradient covers
constexpr int kMaxLayers = 64;              // layers whose pointers fit a kernel's parameters
constexpr int kMaxCode = 480;               // K whose codes fit in the 99 KB of shared memory that compute capability 8.6 has
constexpr int kPad = 8;                     // bfloat16s that keep rows of shared memory off each other's banks
constexpr int kStepStride = kTile + 2;      // row stride of a generated tile in shared memory

HDSCALE_BOTH int ceil_div(int a, int b) { return (a + b - 1) / b; }
HDSCALE_BOTH int round_up(int a, int b) { return ceil_div(a, b) * b; }

struct Range {
  int begin, end;
};

// Part `index` of `count` things shared out to `parts`, as evenly as can be.
HDSCALE_BOTH Range share(int count, int parts, int index) {
  return {int(int64_t(count) * index / parts), int(int64_t(count) * (index + 1) / parts)};
}

// ---- fragments of mma.sync.aligned.m16n8k16 (row.col), as lane -> coordinates -------------------------------------

// Row of register pair `half` (0, 1) of A and of the result: lane / 4 and 8 further.
HDSCALE_BOTH int fragment_row(int lane, int half) { return lane / 4 + 8 * half; }
// Column of B's fragment.
HDSCALE_BOTH int fragment_column(int lane) { return lane / 4; }
// First of the two steps (of 16) in word `half` (0, 1) of A's row and of B's column.
HDSCALE_BOTH int fragment_step(int lane, int half) { return lane % 4 * 2 + 8 * half; }
// First of the two result columns.
HDSCALE_BOTH int result_column(int lane) { return lane % 4 * 2; }

// A sum over k may run in any order that both operands share. Over a block of 32, lane q = lane % 4 takes the eight
// neighbours k = 8 q .. 8 q + 7 (one 16-byte load); words 2 j and 2 j + 1 of them feed multiplication j.
constexpr int kCodeBlock = 32;
HDSCALE_BOTH int code_offset(int lane) { return lane % 4 * 8; }

// Columns of a result may sit anywhere. Of 16 neighbours, lane / 4 loads columns 2 (lane / 4) and one further as one
// word per row; the even ones form one multiplication's B, the odd ones another's. So result column c of
// multiplication `odd` is neighbour 2 c + odd.
HDSCALE_BOTH int paired_column(int column, int odd) { return 2 * column + odd; }

// ---- shared memory, in bfloat16s ----------------------------------------------------------------------------------

HDSCALE_BOTH int code_stride(int K) { return round_up(K, kCodeBlock) + kPad; }
HDSCALE_BOTH int generated_index(int instance, int column, int step) {
  return (instance * kTile + column) * kStepStride + step;
}
constexpr int kSampleStride = kSamples + kPad;       // [row of the tile][sample]
constexpr int kTileRowStride = kTileRows + kPad;     // [sample][row of the tile]
constexpr int kCodeColumnStride = kCodeColumns + kPad;

HDSCALE_BOTH int contract_shared(int instances, int K) {
  return instances * code_stride(K) + instances * kTile * kStepStride;
}
HDSCALE_BOTH int weight_gradient_shared() { return kTileRows * kSampleStride + kSamples * kCodeColumnStride; }
HDSCALE_BOTH int code_gradient_shared() { return kSamples * kTileRowStride; }

// ---- grids --------------------------------------------------------------------------------------------------------

// Instances and tokens of a block of the contraction: their product is what the registers hold.
struct ContractBlock {
  int instances, tokens;
};
HDSCALE_BOTH ContractBlock contract_block(int T) {
  if (T <= 8) return {64, 8};
  if (T <= 32) return {16, 32};
  return {8, 64};
}

// How many parts a sum over `blocks` tiles is cut into, so that about `target` thread blocks are there to run.
HDSCALE_BOTH int splits(int blocks, int others, int target) {
  const int wanted = ceil_div(target, others < 1 ? 1 : others);
  const int most = blocks < 32 ? blocks : 32;
  return wanted < 1 ? 1 : (wanted > most ? most : wanted);
}

}  // namespace gpu
}  // namespace hdscale
