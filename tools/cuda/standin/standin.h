// What the stand-in's driver and libraries share.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace standin {

enum class Mode { Run, Check, Count };
Mode mode();

// Shared memory that a block may have, of an H100.
constexpr int MOST_SHARED = 227 << 10;

typedef std::function<void()> Work;

// Launches of one kind, the bytes of the tensors that they were given, their operations, and the seconds that an H100 would
// need at least: bytes at 3 TB/s or operations at 790 TFLOP/s (60 for f32), whichever is more.
struct Tally {
    size_t launches = 0;
    double bytes = 0, flops = 0, seconds = 0;
};
constexpr double BYTES_A_SECOND = 3e12, HALF_FLOPS = 790e12, F32_FLOPS = 60e12;

// Does `work`, or keeps it for the graph that is being captured.
void submit(const char* name, double bytes, double flops, double seconds, Work work);

// Bytes of allocated device memory from an address on; 0 where there is none.
size_t bytes_from(const void* address);
bool is_device(const void* address, size_t bytes);

// Operations of one of our kernels, by its parameters, and its least seconds.
std::pair<double, double> floor_of(const std::string& name, const std::vector<unsigned long long>& values, unsigned gx, unsigned gy,
                                   unsigned gz, double bytes);

}  // namespace standin
