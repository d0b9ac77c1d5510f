// Launches, and what an error of CUDA's means to a user.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace fusedrnn {

// The architectures that this build has code for: "80, 86, 89, 90a".
#if defined(FUSEDRNN_CUDA_ARCHS)
constexpr const char* kArchitectures = FUSEDRNN_CUDA_ARCHS;
#else
constexpr const char* kArchitectures = "none";
#endif

inline std::string device_name(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "sm_" + std::to_string(major) + std::to_string(minor);
}

// Throws std::runtime_error, saying what to do, unless `error` is none.
inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that our next check does not find it too
  std::string message = std::string("fusedrnn on CUDA: ") + cudaGetErrorName(error) + ", " +
                        cudaGetErrorString(error);
  int device = 0, driver = 0, runtime = 0;
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      cudaGetDevice(&device);
      message += ". This build has code for sm_" + std::string(kArchitectures) +
                 ", this GPU is of " + device_name(device) +
                 ". Rebuild where the GPU is seen, or name it: FUSEDRNN_CUDA_ARCHS=" +
                 device_name(device).substr(3) + " pip install --force-reinstall --no-deps .";
      break;
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      cudaDriverGetVersion(&driver);
      cudaRuntimeGetVersion(&runtime);
      message += ". The driver is for CUDA " + std::to_string(driver / 1000) + "." +
                 std::to_string(driver % 1000 / 10) + ", this build needs " +
                 std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10) +
                 ": update the driver, or rebuild with an older CUDA toolkit.";
      break;
    case cudaErrorMemoryAllocation:
      message += ". Take a smaller batch or shorter sequences, or recompute_gates = True.";
      break;
    default:
      message +=
          ". Errors of kernels launched before this one show up here too: "
          "CUDA_LAUNCH_BLOCKING=1 finds the right one.";
  }
  throw std::runtime_error(message);
}

// Whatever device was current before is so again afterwards.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_));
    if (device != before_) check(cudaSetDevice(device));
  }
  ~CurrentDevice() {
    int now = before_;
    if (cudaGetDevice(&now) == cudaSuccess && now != before_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&)            = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
};

inline int multiprocessors_of(int device) {
  int found = 0;
  check(cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device));
  return found;
}

constexpr int kSharedWithoutAsking = 48 * 1024;

// kernel(arguments...) on `stream`. `overlaps`: it begins while the kernel before it still runs, and
// waits for it itself (wait_for_previous_kernel).
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
            cudaStream_t stream, bool overlaps, const std::decay_t<Parameters>&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim          = grid;
  config.blockDim         = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream           = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs                                         = &attribute;
  config.numAttrs                                      = overlaps ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Whether a kernel can have so much dynamic shared memory on this device; from then on it may have
// all there is, so that no other thread's call takes back what this one was promised.
template <class Kernel>
bool allow_shared(Kernel* kernel, int64_t bytes) {
  if (bytes <= kSharedWithoutAsking) return true;
  int device = 0, most = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (bytes > most) return false;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  return true;
}

// Whether wait_for_previous_kernel waits in the code that runs: in code for older architectures,
// also where a newer one runs it, it does nothing, and kernels must not overlap.
template <class Kernel>
bool can_overlap(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

}  // namespace fusedrnn
