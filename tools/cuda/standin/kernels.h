// What libkernels.so gives: the kernels' PTX, translated to C++ by ptx.py, and the threads they run on (kernels.cpp).
#pragma once

typedef struct {
    const char* name;
    unsigned parameters;
    const unsigned* sizes;  // bytes of each parameter
    unsigned static_shared;
} KernelInfo;

extern "C" {
// NULL where there is none.
const KernelInfo* kernel_find(const char* name);
// Runs a launch to its end; NULL, or what went wrong. `parameters` are the addresses of the values, as in cuLaunchKernel.
const char* kernel_run(const KernelInfo* kernel, void* const* parameters, const unsigned grid[3], const unsigned block[3],
                       unsigned dynamic_shared);
// From now on every access of global memory is checked.
void kernel_memory(bool (*valid)(const void* address, unsigned long bytes));
}
