// Checks gpu_tiles.h over odd shapes: every share, fragment, shared-memory index and grid covers what it should exactly
// once and stays within bounds. Prints nothing and returns 0 if all is well.
#include "gpu_tiles.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <utility>
#include <vector>

using namespace hdscale::gpu;

namespace {

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);           \
      exit(1);                                                                  \
    }                                                                           \
  } while (0)

void check_shares() {
  for (int count = 0; count <= 70; ++count)
    for (int parts = 1; parts <= 40; ++parts) {
      int next = 0;
      for (int part = 0; part < parts; ++part) {
        const Range range = share(count, parts, part);
        CHECK(range.begin == next && range.end >= range.begin && range.end - range.begin <= count / parts + 1);
        next = range.end;
      }
      CHECK(next == count);
    }
}

// Each operand of m16n8k16: lanes and registers hold every element exactly once.
void check_fragments() {
  std::map<std::pair<int, int>, int> a, b, d;
  for (int lane = 0; lane < 32; ++lane)
    for (int half = 0; half < 2; ++half) {
      for (int low = 0; low < 2; ++low) {
        for (int row = 0; row < 2; ++row) ++a[{fragment_row(lane, row), fragment_step(lane, half) + low}];
        ++b[{fragment_step(lane, half) + low, fragment_column(lane)}];
        ++d[{fragment_row(lane, half), result_column(lane) + low}];
      }
    }
  CHECK(a.size() == 16 * 16 && b.size() == 16 * 8 && d.size() == 16 * 8);
  for (const auto* operand : {&a, &b, &d})
    for (const auto& [place, times] : *operand) {
      CHECK(times == 1);
      CHECK(place.first >= 0 && place.first < 16 && place.second >= 0 && place.second < 16);
    }
}

// Reordered sums and columns: a block of 32 k's is covered by two multiplications, 16 columns by even and odd ones.
void check_reorderings() {
  std::set<int> k, columns;
  for (int lane = 0; lane < 4; ++lane)
    for (int word = 0; word < 4; ++word)
      for (int low = 0; low < 2; ++low) k.insert(code_offset(lane) + 2 * word + low);
  CHECK(int(k.size()) == kCodeBlock && *k.begin() == 0 && *k.rbegin() == kCodeBlock - 1);
  for (int column = 0; column < 8; ++column)
    for (int odd = 0; odd < 2; ++odd) columns.insert(paired_column(column, odd));
  CHECK(columns.size() == 16 && *columns.begin() == 0 && *columns.rbegin() == 15);
}

void check_shared_memory() {
  for (const int T : {1, 8, 9, 32, 33, 500}) {
    const ContractBlock block = contract_block(T);
    CHECK(block.instances * block.tokens == 512 && block.instances % kWarps == 0 && block.tokens % 8 == 0);
    for (const int K : {1, 2, 31, 32, 33, 128, 256, kMaxCode}) {
      CHECK(code_stride(K) >= round_up(K, kCodeBlock) && code_stride(K) * 2 % 16 == 0);  // rows of 16-byte loads
      std::set<int> seen;
      for (int n = 0; n < block.instances; ++n)
        for (int column = 0; column < kTile; ++column)
          for (int step = 0; step < kTile; ++step) seen.insert(generated_index(n, column, step));
      CHECK(int(seen.size()) == block.instances * kTileRows);
      CHECK(*seen.begin() == 0);
      CHECK(block.instances * code_stride(K) + *seen.rbegin() < contract_shared(block.instances, K));
      CHECK(contract_shared(block.instances, K) * 2 <= 99 * 1024);  // what compute capability 8.6 gives a block
    }
  }
  CHECK(generated_index(1, 1, 2) % 2 == 0);  // pairs are loaded as words
  CHECK((kTileRows - 1) * kSampleStride + kSamples - 1 < kTileRows * kSampleStride);
  CHECK(weight_gradient_shared() - kTileRows * kSampleStride == kSamples * kCodeColumnStride);
  CHECK(weight_gradient_shared() * 2 <= 99 * 1024 && code_gradient_shared() * 2 <= 99 * 1024);
  CHECK(kSampleStride % 2 == 0 && kTileRowStride % 2 == 0 && kCodeColumnStride % 2 == 0 && kStepStride % 2 == 0);
}

// The contraction's grid: every (instance, token, column) belongs to one block, warp and register; every step to one
// split; and every head row of a tile to one warp's row of registers.
void check_contraction(int B, int T, int O, int I, bool over_outer) {
  const int columns = over_outer ? I : O, steps = over_outer ? O : I;
  const ContractBlock block = contract_block(T);
  const int mine = block.instances / kWarps, token_blocks = ceil_div(T, block.tokens);
  std::vector<int> results(size_t(B) * T * columns, 0);
  for (int z = 0; z < ceil_div(B, block.instances) * token_blocks; ++z)
    for (int x = 0; x < ceil_div(columns, kTile); ++x)
      for (int thread = 0; thread < kThreads; ++thread)
        for (int instance = 0; instance < mine; ++instance)
          for (int t8 = 0; t8 < block.tokens / 8; ++t8)
            for (int half = 0; half < 2; ++half)
              for (int c = 0; c < 2; ++c) {
                const int lane = thread % 32, warp = thread / 32;
                const int n = z / token_blocks * block.instances + warp * mine + instance;
                const int t = z % token_blocks * block.tokens + t8 * 8 + result_column(lane) + c;
                const int column = x * kTile + fragment_row(lane, half);
                if (n < B && t < T && column < columns) ++results[(size_t(n) * T + t) * columns + column];
              }
  for (const int times : results) CHECK(times == 1);

  std::vector<int> rows(size_t(O) * I, 0);
  const int parts = splits(ceil_div(steps, kTile), ceil_div(columns, kTile), 264);
  CHECK(parts >= 1 && parts <= 32 && parts <= ceil_div(steps, kTile));
  for (int split = 0; split < parts; ++split) {
    const Range range = share(ceil_div(steps, kTile), parts, split);
    for (int step = range.begin; step < range.end; ++step)
      for (int x = 0; x < ceil_div(columns, kTile); ++x)
        for (int warp = 0; warp < kWarps; ++warp)
          for (int j = 0; j < 2; ++j)
            for (int lane = 0; lane < 32; lane += 4)  // the four lanes of a row share it
              for (int half = 0; half < 2; ++half) {
                const int o = (over_outer ? step : x) * kTile + 2 * warp + j;
                const int i = (over_outer ? x : step) * kTile + fragment_row(lane, half);
                if (o < O && i < I) ++rows[size_t(o) * I + i];
              }
  }
  for (const int times : rows) CHECK(times == 1);
}

// The heads' gradient: every (row, k) of dweight, every row of dbias and every (sample, k) of the codes' gradient once.
void check_gradients(int O, int I, int K, int samples) {
  std::vector<int> weight(size_t(O) * I * K, 0), bias(size_t(O) * I, 0), code(size_t(samples) * K, 0);
  const int inner = ceil_div(I, kTile);
  for (int x = 0; x < ceil_div(O, kTile) * inner; ++x)
    for (int y = 0; y < ceil_div(K, kCodeColumns); ++y)
      for (int thread = 0; thread < kThreads; ++thread) {
        const int lane = thread % 32, warp = thread / 32, o0 = x / inner * kTile, i0 = x % inner * kTile;
        for (int j = 0; j < 2; ++j)
          for (int block = 0; block < kCodeColumns / 8; ++block)
            for (int half = 0; half < 2; ++half)
              for (int c = 0; c < 2; ++c) {
                const int row = 32 * warp + 16 * j + fragment_row(lane, half);
                const int o = o0 + row / kTile, i = i0 + row % kTile;
                const int k = y * kCodeColumns + block / 2 * 16 + paired_column(result_column(lane) + c, block % 2);
                if (o < O && i < I && k < K) ++weight[(size_t(o) * I + i) * K + k];
              }
        const int o = o0 + thread / kTile, i = i0 + thread % kTile;
        if (y == 0 && o < O && i < I) ++bias[size_t(o) * I + i];
      }
  for (int x = 0; x < ceil_div(samples, kSamples); ++x)
    for (int z = 0; z < ceil_div(K, kCodeColumns); ++z)
      for (int thread = 0; thread < kThreads; ++thread) {
        const int lane = thread % 32, warp = thread / 32;
        for (int block = 0; block < kCodeColumns / 16; ++block)
          for (int half = 0; half < 2; ++half)
            for (int c = 0; c < 2; ++c) {
              const int sample = x * kSamples + warp % 4 * kTile + fragment_row(lane, half);
              const int k = z * kCodeColumns + warp / 4 * (kCodeColumns / 2) + block / 2 * 16 +
                            paired_column(result_column(lane) + c, block % 2);
              if (sample < samples && k < K) ++code[size_t(sample) * K + k];
            }
      }
  for (const std::vector<int>* counts : {&weight, &bias, &code})
    for (const int times : *counts) CHECK(times == 1);
}

}  // namespace

int main() {
  check_shares();
  check_fragments();
  check_reorderings();
  check_shared_memory();
  for (const int B : {1, 3, 16, 65, 129})
    for (const int T : {1, 4, 9, 33, 130})
      for (const auto& [O, I] : {std::pair<int, int>{8, 1}, {17, 5}, {64, 40}, {33, 16}})
        for (const bool over_outer : {false, true}) check_contraction(B, T, O, I, over_outer);
  for (const int K : {1, 7, 128, 130, 256})
    for (const auto& [O, I] : {std::pair<int, int>{8, 1}, {17, 5}, {33, 16}, {40, 70}})
      for (const int samples : {1, 63, 129}) check_gradients(O, I, K, samples);
  return 0;
}
