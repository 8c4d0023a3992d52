// NCCL between the processes of one machine: every rank has a slot in shared memory. A collective copies its data there
// piece by piece; all ranks must call the same one with the same size, or the run ends with what each of them called.
#include "simulator.h"

#include <fcntl.h>
#include <nccl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

using namespace sim;

namespace {
constexpr size_t kPiece = 4 << 20;
constexpr int kMostRanks = 16;

struct Call {
  char name[32];
  size_t bytes;
};
struct Shared {
  pthread_barrier_t barrier;
  Call calls[kMostRanks];
  int numbers[kMostRanks][2];  // the physical device at first; then colour and key of a split
};
}  // namespace

struct ncclComm {
  Shared* shared;
  char* slots;
  int rank, size, device, children;
  std::string name;

  char* slot(int of) const { return slots + kPiece * size_t(of); }
  void meet() const { pthread_barrier_wait(&shared->barrier); }
};

namespace {
std::string path_of(const std::string& name) { return "/dev/shm/simulated_nccl_" + name; }

ncclResult_t join(ncclComm_t* out, const std::string& name, int size, int rank) {
  if (size > kMostRanks) return ncclInvalidArgument;
  const std::string path = path_of(name), unready = path + ".new";
  const size_t bytes = sizeof(Shared) + kPiece * size_t(size);
  const auto mapped = [bytes](int file) {
    void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return static_cast<Shared*>(start);
  };
  Shared* shared;
  if (rank == 0) {
    const int file = open(unready.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (file < 0 || ftruncate(file, off_t(bytes))) return ncclSystemError;
    shared = mapped(file);
    pthread_barrierattr_t between_processes;
    pthread_barrierattr_init(&between_processes);
    pthread_barrierattr_setpshared(&between_processes, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&shared->barrier, &between_processes, unsigned(size));
    rename(unready.c_str(), path.c_str());
  } else {
    int file;
    while ((file = open(path.c_str(), O_RDWR)) < 0) usleep(1000);
    shared = mapped(file);
  }
  auto* comm = new ncclComm{shared, reinterpret_cast<char*>(shared + 1), rank, size, current(), 0, name};
  shared->numbers[rank][0] = physical(current());
  comm->meet();
  if (rank == 0) unlink(path.c_str());
  bool twice = false;
  for (int a = 0; a < size; ++a)
    for (int b = 0; b < a; ++b) twice |= shared->numbers[a][0] == shared->numbers[b][0];
  comm->meet();
  if (twice) {
    fault("two ranks of a communicator have one GPU");
    return ncclInvalidUsage;
  }
  *out = comm;
  return ncclSuccess;
}

size_t width(ncclDataType_t type) {
  switch (type) {
    case ncclInt8: case ncclUint8: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    default: return 8;
  }
}

float widened(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}
uint16_t rounded(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
void reduce_as(char* into, const char* other, size_t count, ncclRedOp_t op) {
  T* a = reinterpret_cast<T*>(into);
  const T* b = reinterpret_cast<const T*>(other);
  for (size_t i = 0; i < count; ++i) {
    if (op == ncclMax) a[i] = std::max(a[i], b[i]);
    else if (op == ncclMin) a[i] = std::min(a[i], b[i]);
    else if (op == ncclProd) a[i] = T(a[i] * b[i]);
    else a[i] = T(a[i] + b[i]);
  }
}
// One rank's numbers into the sum (or the largest, the smallest, the product).
void reduce(char* into, const char* other, size_t count, ncclDataType_t type, ncclRedOp_t op) {
  switch (type) {
    case ncclInt8: return reduce_as<int8_t>(into, other, count, op);
    case ncclUint8: return reduce_as<uint8_t>(into, other, count, op);
    case ncclInt32: return reduce_as<int32_t>(into, other, count, op);
    case ncclInt64: return reduce_as<int64_t>(into, other, count, op);
    case ncclFloat32: return reduce_as<float>(into, other, count, op);
    case ncclFloat64: return reduce_as<double>(into, other, count, op);
    case ncclBfloat16: {
      auto* a = reinterpret_cast<uint16_t*>(into);
      const auto* b = reinterpret_cast<const uint16_t*>(other);
      for (size_t i = 0; i < count; ++i) {
        float sum = widened(a[i]);
        const float more = widened(b[i]);
        reduce_as<float>(reinterpret_cast<char*>(&sum), reinterpret_cast<const char*>(&more), 1, op);
        a[i] = rounded(sum);
      }
      return;
    }
    default: fault("a reduction of numbers of type " + std::to_string(int(type))); abort();
  }
}
void divide(char* sum, size_t count, ncclDataType_t type, int by) {
  for (size_t i = 0; i < count; ++i) {
    if (type == ncclFloat32) reinterpret_cast<float*>(sum)[i] /= float(by);
    else if (type == ncclFloat64) reinterpret_cast<double*>(sum)[i] /= by;
    else if (type == ncclBfloat16) {
      auto& value = reinterpret_cast<uint16_t*>(sum)[i];
      value = rounded(widened(value) / float(by));
    }
  }
}

void check(ncclComm_t comm, const char* name, const void* data, size_t bytes) {
  count(std::string("collective ") + name);
  count(std::string("collective bytes ") + name, long(bytes));
  {
    Lock lock(mutex());
    const Block* block = block_of(data);
    if (bytes && (!block || block->type != cudaMemoryTypeDevice || block->device != comm->device))
      fault(std::string(name) + ": its memory is not of the communicator's device");
  }
  Call& mine = comm->shared->calls[comm->rank];
  snprintf(mine.name, sizeof mine.name, "%s", name);
  mine.bytes = bytes;
  comm->meet();
  for (int rank = 0; rank < comm->size; ++rank) {
    const Call& other = comm->shared->calls[rank];
    if (!strcmp(other.name, mine.name) && other.bytes == mine.bytes) continue;
    fault("rank " + std::to_string(comm->rank) + " calls " + mine.name + " of " + std::to_string(mine.bytes) +
          " bytes, rank " + std::to_string(rank) + " " + other.name + " of " + std::to_string(other.bytes));
    abort();
  }
  comm->meet();
}

// `bytes` of every rank's `data` in pieces: `read(offset, bytes)` may look into all slots.
void exchange(ncclComm_t comm, const char* data, size_t bytes, const std::function<void(size_t, size_t)>& read) {
  for (size_t at = 0; at < bytes; at += kPiece) {
    const size_t piece = std::min(kPiece, bytes - at);
    memcpy(comm->slot(comm->rank), data + at, piece);
    comm->meet();
    read(at, piece);
    comm->meet();
  }
}

// The reduction of all slots' first bytes, into `out`.
void reduce_slots(ncclComm_t comm, char* out, size_t bytes, ncclDataType_t type, ncclRedOp_t op) {
  const size_t numbers = bytes / width(type);
  std::vector<char> sum(comm->slot(0), comm->slot(0) + bytes);
  for (int rank = 1; rank < comm->size; ++rank) reduce(sum.data(), comm->slot(rank), numbers, type, op);
  if (op == ncclAvg) divide(sum.data(), numbers, type, comm->size);
  memcpy(out, sum.data(), bytes);
}
}  // namespace

API ncclResult_t ncclGetVersion(int* out) { return *out = NCCL_VERSION_CODE, ncclSuccess; }
API const char* ncclGetErrorString(ncclResult_t) { return "error of the simulated NCCL"; }
API const char* ncclGetLastError(ncclComm_t) { return ""; }
API ncclResult_t ncclGetUniqueId(ncclUniqueId* out) {
  static int made = 0;
  *out = {};
  const long now = std::chrono::steady_clock::now().time_since_epoch().count();
  snprintf(out->internal, sizeof out->internal, "%d_%d_%lx", getpid(), ++made, now);
  return ncclSuccess;
}
API ncclResult_t ncclCommInitRank(ncclComm_t* out, int size, ncclUniqueId id, int rank) {
  return join(out, id.internal, size, rank);
}
API ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int size, ncclUniqueId id, int rank, ncclConfig_t*) {
  return join(out, id.internal, size, rank);
}
API ncclResult_t ncclCommInitRankScalable(ncclComm_t* out, int size, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
  return join(out, ids->internal, size, rank);
}
API ncclResult_t ncclCommSplit(ncclComm_t comm, int colour, int key, ncclComm_t* out, ncclConfig_t*) {
  auto& numbers = comm->shared->numbers;
  numbers[comm->rank][0] = colour, numbers[comm->rank][1] = key;
  comm->meet();
  std::vector<std::pair<int, int>> members;
  for (int rank = 0; rank < comm->size; ++rank)
    if (numbers[rank][0] == colour) members.emplace_back(numbers[rank][1], rank);
  comm->meet();
  const std::string name = comm->name + "_" + std::to_string(++comm->children) + "_" + std::to_string(colour);
  if (colour < 0) return *out = nullptr, ncclSuccess;
  std::sort(members.begin(), members.end());
  const auto mine = std::find(members.begin(), members.end(), std::make_pair(key, comm->rank));
  return join(out, name, int(members.size()), int(mine - members.begin()));
}
API ncclResult_t ncclCommDestroy(ncclComm_t) { return ncclSuccess; }
API ncclResult_t ncclCommAbort(ncclComm_t) { return ncclSuccess; }
API ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
API ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* out) { return *out = ncclSuccess, ncclSuccess; }
API ncclResult_t ncclCommCount(ncclComm_t comm, int* out) { return *out = comm->size, ncclSuccess; }
API ncclResult_t ncclCommUserRank(ncclComm_t comm, int* out) { return *out = comm->rank, ncclSuccess; }
API ncclResult_t ncclCommRegister(ncclComm_t, void*, size_t, void** out) { return *out = nullptr, ncclSuccess; }
API ncclResult_t ncclCommDeregister(ncclComm_t, void*) { return ncclSuccess; }
API ncclResult_t ncclGroupStart() { return ncclSuccess; }
API ncclResult_t ncclGroupEnd() { return ncclSuccess; }

API ncclResult_t ncclAllReduce(const void* in, void* out, size_t numbers, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t) {
  const size_t bytes = numbers * width(type);
  check(comm, "AllReduce", in, bytes);
  exchange(comm, static_cast<const char*>(in), bytes, [&](size_t at, size_t piece) {
    reduce_slots(comm, static_cast<char*>(out) + at, piece, type, op);
  });
  return ncclSuccess;
}
API ncclResult_t ncclReduce(const void* in, void* out, size_t numbers, ncclDataType_t type, ncclRedOp_t op, int root,
                            ncclComm_t comm, cudaStream_t) {
  const size_t bytes = numbers * width(type);
  check(comm, "Reduce", in, bytes);
  exchange(comm, static_cast<const char*>(in), bytes, [&](size_t at, size_t piece) {
    if (comm->rank == root) reduce_slots(comm, static_cast<char*>(out) + at, piece, type, op);
  });
  return ncclSuccess;
}
API ncclResult_t ncclBroadcast(const void* in, void* out, size_t numbers, ncclDataType_t type, int root,
                               ncclComm_t comm, cudaStream_t) {
  const size_t bytes = numbers * width(type);
  check(comm, "Broadcast", out, bytes);
  const void* mine = comm->rank == root ? in : out;
  exchange(comm, static_cast<const char*>(mine), bytes, [&](size_t at, size_t piece) {
    memcpy(static_cast<char*>(out) + at, comm->slot(root), piece);
  });
  return ncclSuccess;
}
API ncclResult_t ncclBcast(void* data, size_t numbers, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return ncclBroadcast(data, data, numbers, type, root, comm, stream);
}
API ncclResult_t ncclAllGather(const void* in, void* out, size_t numbers, ncclDataType_t type, ncclComm_t comm,
                               cudaStream_t) {
  const size_t bytes = numbers * width(type);
  check(comm, "AllGather", in, bytes);
  exchange(comm, static_cast<const char*>(in), bytes, [&](size_t at, size_t piece) {
    for (int rank = 0; rank < comm->size; ++rank)
      memcpy(static_cast<char*>(out) + size_t(rank) * bytes + at, comm->slot(rank), piece);
  });
  return ncclSuccess;
}
API ncclResult_t ncclReduceScatter(const void* in, void* out, size_t numbers, ncclDataType_t type, ncclRedOp_t op,
                                   ncclComm_t comm, cudaStream_t) {
  const size_t bytes = numbers * width(type);
  check(comm, "ReduceScatter", in, bytes);
  std::vector<char> part(bytes);  // `out` may be a part of `in`, which later rounds read
  for (int owner = 0; owner < comm->size; ++owner) {
    exchange(comm, static_cast<const char*>(in) + size_t(owner) * bytes, bytes, [&](size_t at, size_t piece) {
      if (comm->rank == owner) reduce_slots(comm, part.data() + at, piece, type, op);
    });
  }
  memcpy(out, part.data(), bytes);
  return ncclSuccess;
}
