// SIMD levels of the CPU kernels. Every kernel is compiled once per level; the best level that this
// processor runs is used, unless COREAI_TORCH_CPU_LEVEL, PyTorch's ATEN_CPU_CAPABILITY or
// set_cpu_level() says otherwise. Results have the same bits at every level. Framework-free.
#pragma once

namespace coreai_torch {

int cpu_level_count();  // levels compiled into this library, lowest first
const char* cpu_level_name(int level);
bool cpu_level_supported(int level);  // does this processor run it?
int cpu_level();                      // the level in use

// Forces the level called `name`; nullptr goes back to the automatic choice. Returns false, and
// changes nothing, where there is no such level or this processor does not run it.
bool set_cpu_level(const char* name);

}  // namespace coreai_torch
