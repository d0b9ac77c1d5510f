// The CUDA kernels on the emulation, as a Python module with the functions of fusedrnn._C that
// fusedrnn/cuda.py calls, and those that control the emulation.
#include <string>

#include "cuda/bindings.h"
#include "emulation.h"

PYBIND11_MODULE(cuda_on_cpu, m) {
  namespace py = pybind11;
  fusedrnn::add_cuda(m);
  m.def("reset", emulation_reset);
  m.def("synchronize", [] { return emulation_synchronize() == 0; });
  m.def("error", []() -> std::string {
    const char* error = emulation_error();
    return error ? error : "";
  });
  m.def("register", [](std::uintptr_t address, size_t bytes) {
    emulation_register(reinterpret_cast<void*>(address), bytes);
  });
  m.def("clear_regions", emulation_clear_regions);
  m.def("set_device", emulation_set_device);
  m.def("num_ctas", emulation_num_ctas);
  m.def("sites", [] {
    py::list sites;
    for (int i = 0; i < emulation_num_sites(); ++i) sites.append(emulation_site(i));
    return sites;
  });
  m.def("disable_site", [](const py::object& site) {
    static std::string name;
    name = site.is_none() ? "" : site.cast<std::string>();
    emulation_disable_site(site.is_none() ? nullptr : name.c_str());
  });
}
