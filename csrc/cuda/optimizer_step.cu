// What happens before an update: gradients and hyper-parameters reach the device, and the scalars derive from them
// there, so that nothing waits for it and a CUDA graph can replay the step.

#include "../common/optimizer_scalars.h"
#include "../common/stochastic_rounding.h"
#include "device.cuh"
#include "optimizer.h"

namespace bnb {
namespace {

constexpr int kGradients = 448;  // addresses in one launch's arguments, of which there may be 4 KB

struct Gradients {
    int64_t addresses[kGradients];
};

template <class Rule>
__global__ void begin_step_kernel(
    const __grid_constant__ Gradients gradients, const __grid_constant__ bnb_optimizer_hyper hyper,
    bnb_optimizer_tensor* tensors, bnb_optimizer_config* configs, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    tensors[i].g = reinterpret_cast<const void*>(gradients.addresses[i]);
    const int64_t step = *tensors[i].step + 1;
    *tensors[i].step = step;
    tensors[i].key = hyper.rounds ? rounding_key(hyper.seed, tensors[i].place, step) : -1;
    configs[i] = step_config<Rule>(hyper, hyper.lr_address ? double(*hyper.lr_address) : hyper.lr, step);
}

}  // namespace

void begin_optimizer_step(
    const int64_t* gradients, const bnb_optimizer_hyper& hyper, bnb_rule rule, bnb_optimizer_tensor* tensors,
    bnb_optimizer_config* configs, int64_t count, cudaStream_t stream) {
    visit_rule(rule, [&](auto kind) {
        for (int64_t first = 0; first < count; first += kGradients) {
            constexpr int kThreads = 64;
            const int part = static_cast<int>(count - first < kGradients ? count - first : kGradients);
            Gradients addresses;
            for (int i = 0; i < part; ++i) addresses.addresses[i] = gradients[first + i];
            begin_step_kernel<decltype(kind)><<<(part + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
                addresses, hyper, tensors + first, configs + first, part);
            check_launch("begin_step");
        }
    });
}

}  // namespace bnb
