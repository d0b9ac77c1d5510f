// The part of the CUDA runtime API that the project uses, for a host without CUDA: the names, and
// an emulated device behind them. It is found in place of CUDA's own header; what a thread of the
// device can do is in emulated_ptx.h, how it runs in emulation.h.
#pragma once

#include <math.h>
#include <string.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t {
  cudaSuccess                        = 0,
  cudaErrorInvalidValue              = 1,
  cudaErrorMemoryAllocation          = 2,
  cudaErrorInvalidConfiguration      = 9,
  cudaErrorInsufficientDriver        = 35,
  cudaErrorInvalidDeviceFunction     = 98,
  cudaErrorNoDevice                  = 100,
  cudaErrorInvalidDevice             = 101,
  cudaErrorNoKernelImageForDevice    = 209,
  cudaErrorUnsupportedPtxVersion     = 222,
  cudaErrorIllegalAddress            = 700,
  cudaErrorLaunchFailure             = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported              = 801,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock               = 1,
  cudaDevAttrMaxSharedMemoryPerBlock          = 8,
  cudaDevAttrMultiProcessorCount              = 16,
  cudaDevAttrComputeCapabilityMajor           = 75,
  cudaDevAttrComputeCapabilityMinor           = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch                = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin     = 97,
  cudaDevAttrClusterLaunch                    = 120,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault,
};
using cudaStream_t = struct CUstream_st*;

struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore                          = 0,
  cudaLaunchAttributeCooperative                     = 2,
  cudaLaunchAttributeClusterDimension                = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int device);
cudaError_t cudaDriverGetVersion(int*);
cudaError_t cudaRuntimeGetVersion(int*);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMemsetAsync(void*, int value, size_t bytes, cudaStream_t = nullptr);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t = nullptr);

namespace emulation {
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t get_attributes(cudaFuncAttributes*, const void* kernel);
cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t shared_bytes);
cudaError_t launch(const cudaLaunchConfig_t&, const void* kernel, std::function<void()> body);
}  // namespace emulation

template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  return emulation::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T* kernel) {
  return emulation::get_attributes(attributes, reinterpret_cast<const void*>(kernel));
}

template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T* kernel, int threads,
                                                          size_t shared_bytes) {
  return emulation::occupancy(blocks, reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}

// The parameters are copied now, the kernel may run later.
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A));
  std::tuple<P...> copies{static_cast<P>(std::forward<A>(arguments))...};
  return emulation::launch(*config, reinterpret_cast<const void*>(kernel),
                           [kernel, copies] { std::apply(kernel, copies); });
}
