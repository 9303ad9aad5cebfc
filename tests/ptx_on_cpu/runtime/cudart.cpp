// A stand-in for the CUDA runtime, linked into each library that nvcc's host code goes into, with hidden symbols: so a real libcudart in
// the same process is never called by mistake. Everything runs at once in the calling thread; streams and events are only names.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "memory.h"
#include "simt.h"

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

struct Function {
  std::string name;
  const simt::Kernel* kernel;  // found at the first use: modules may register later than host code
  int dynamic_limit;           // cudaFuncAttributeMaxDynamicSharedMemorySize, -1 before it is set
};

struct Library {
  std::mutex mutex;
  std::map<const void*, Function> functions;
  std::map<const void*, std::string> variables;
  std::vector<const simt::Module*> modules;
};

Library& library() {
  static Library* l = new Library;  // registration runs before the constructors of this file may
  return *l;
}

thread_local std::vector<Configuration> configurations;
thread_local cudaError_t last_error = cudaSuccess;

constexpr size_t kDefaultShared = 48 << 10, kThreadsPerProcessor = 2048, kBlocksPerProcessor = 32;

cudaError_t result(cudaError_t e) {
  if (e != cudaSuccess) last_error = e;
  return e;
}

cudaError_t result(cudaError_t e, const char* message) {
  simt::refuse(simt::Status(e), message);
  return result(e);
}

Function* find(const void* host) {
  Library& l = library();
  std::lock_guard<std::mutex> lock(l.mutex);
  auto it = l.functions.find(host);
  if (it == l.functions.end()) return nullptr;
  Function& f = it->second;
  // Modules of one library may both have an instance of a template, which is the same then.
  for (const simt::Module* m : l.modules)
    for (unsigned i = 0; i < m->kernels && !f.kernel; i++)
      if (f.name == m->kernel[i].name) f.kernel = &m->kernel[i];
  return f.kernel ? &f : nullptr;
}

size_t opt_in() { return simt::shared_limit(simt::ptx_options()->capability); }

simt::Dim to_dim(dim3 d) { return {d.x, d.y, d.z}; }

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void ptx_add_module(const simt::Module* m) { library().modules.push_back(m); }

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  library().functions[host] = {name, nullptr, -1};
}

void __cudaRegisterVar(void**, char* host, char*, const char* name, int, size_t, int, int) { library().variables[host] = name; }

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return result(cudaErrorMissingConfiguration);
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  const Function* f = find(host);
  if (!f) return result(cudaErrorInvalidDeviceFunction, "launch of a kernel that is not in the module's PTX");
  const simt::Kernel& k = *f->kernel;
  const size_t limit = f->dynamic_limit < 0 ? kDefaultShared - std::min<size_t>(kDefaultShared, k.shared_bytes) : size_t(f->dynamic_limit);
  if (shared > limit) {
    const std::string text = std::string(k.name) + ": " + std::to_string(shared) + " bytes of dynamic shared memory exceed " +
                             std::to_string(limit) + ", what cudaFuncSetAttribute allowed or is allowed without it";
    return result(cudaErrorInvalidValue, text.c_str());
  }
  std::vector<unsigned char> parameters(k.parameter_bytes + 16);
  for (unsigned i = 0; i < k.parameters; i++) std::memcpy(parameters.data() + k.layout[2 * i], arguments[i], k.layout[2 * i + 1]);
  return result(cudaError_t(simt::ptx_launch(&k, to_dim(grid), to_dim(block), unsigned(shared), parameters.data())));
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host, void** arguments) {
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension &&
        c->attrs[i].val.clusterDim.x * c->attrs[i].val.clusterDim.y * c->attrs[i].val.clusterDim.z > 1)
      return result(cudaErrorNotSupported, "clusters are not modelled");
  return cudaLaunchKernel(host, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return result(cudaErrorNotSupported, "cooperative launches are not modelled: blocks run one after another");
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  Function* f = find(host);
  if (!f) return result(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) + f->kernel->shared_bytes > opt_in())
    return result(cudaErrorInvalidValue, "cudaFuncSetAttribute: more shared memory than a block may have");
  f->dynamic_limit = value;
  return cudaSuccess;
}

cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* host) {
  const Function* f = find(host);
  if (!f) return result(cudaErrorInvalidDeviceFunction);
  *a = cudaFuncAttributes();
  a->sharedSizeBytes = f->kernel->shared_bytes;
  a->maxThreadsPerBlock = f->kernel->max_threads ? int(f->kernel->max_threads) : 1024;
  a->ptxVersion = a->binaryVersion = simt::ptx_options()->capability;
  a->maxDynamicSharedSizeBytes = f->dynamic_limit < 0 ? int(kDefaultShared) : f->dynamic_limit;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads, size_t shared, unsigned) {
  const Function* f = find(host);
  if (!f || threads <= 0) return result(f ? cudaErrorInvalidValue : cudaErrorInvalidDeviceFunction);
  const size_t bytes = f->kernel->shared_bytes + shared + 1024;  // the system keeps 1 KiB of each block
  *blocks = int(std::min({kBlocksPerProcessor, kThreadsPerProcessor / size_t((threads + 31) / 32 * 32), (opt_in() + 1024) / bytes}));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}

cudaError_t cudaGetLastError() {
  const cudaError_t e = last_error;
  last_error = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorMisalignedAddress: return "cudaErrorMisalignedAddress";
    case cudaErrorLaunchTimeout: return "cudaErrorLaunchTimeout";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorAssert: return "cudaErrorAssert";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    default: return "cudaError";
  }
}

// The message of the launch that failed last says more than CUDA's fixed texts.
const char* cudaGetErrorString(cudaError_t e) {
  const char* message = simt::ptx_message();
  return e == cudaSuccess ? "no error" : *message ? message : cudaGetErrorName(e);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device ? result(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const simt::Options& o = *simt::ptx_options();
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(kDefaultShared); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(opt_in()); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(opt_in() + 1024); break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrMultiProcessorCount: *value = o.processors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = int(kThreadsPerProcessor); break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = int(kBlocksPerProcessor); break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrComputeCapabilityMajor: *value = o.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = o.capability % 10; break;
    case cudaDevAttrL2CacheSize: *value = 40 << 20; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  std::memset(p, 0, sizeof *p);
  std::snprintf(p->name, sizeof p->name, "PTX on CPU");
  auto get = [&](cudaDeviceAttr a) {
    int value = 0;
    cudaDeviceGetAttribute(&value, a, device);
    return value;
  };
  p->major = get(cudaDevAttrComputeCapabilityMajor), p->minor = get(cudaDevAttrComputeCapabilityMinor);
  p->multiProcessorCount = get(cudaDevAttrMultiProcessorCount);
  p->sharedMemPerBlock = kDefaultShared, p->sharedMemPerBlockOptin = opt_in(), p->sharedMemPerMultiprocessor = opt_in() + 1024;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = int(kThreadsPerProcessor), p->warpSize = 32, p->regsPerBlock = 65536;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = bytes ? std::aligned_alloc(256, (bytes + 255) / 256 * 256) : nullptr;
  if (bytes && !*memory) return result(cudaErrorMemoryAllocation);
  if (!bytes) return cudaSuccess;
  std::memset(*memory, 0xFF, bytes);
  simt::ptx_add_range(simt::u64(*memory), bytes, 1);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  if (memory) simt::ptx_remove_range(simt::u64(memory));
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return cudaFree(memory); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return cudaMemset(to, value, bytes); }

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  auto it = library().variables.find(symbol);
  if (it != library().variables.end())
    for (const simt::Module* m : library().modules)
      for (unsigned i = 0; i < m->variables; i++)
        if (it->second == m->variable[i].name) {
          *address = m->variable[i].address;
          return cudaSuccess;
        }
  return result(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind kind) {
  void* address;
  if (const cudaError_t e = cudaGetSymbolAddress(&address, symbol)) return e;
  return cudaMemcpy(static_cast<char*>(address) + offset, from, bytes, kind);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind kind) {
  void* address;
  if (const cudaError_t e = cudaGetSymbolAddress(&address, symbol)) return e;
  return cudaMemcpy(to, static_cast<char*>(address) + offset, bytes, kind);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<char*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new char);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<char*>(event);
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

}  // extern "C"
