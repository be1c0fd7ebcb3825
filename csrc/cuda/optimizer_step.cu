// What happens before an update: the step's scalars, and the step sizes that keep the updates' norms within limits.
//
// Both run on the device, so that nothing waits for it and a CUDA graph can replay them. A limit costs one more pass
// over gradient, parameter and state, which recomputes the direction instead of storing it. A warp sums over its own
// range of blocks, one partial sum for each tensor it meets, and one warp per tensor adds those up in order: the same
// tensors give the same norms, run after run.

#include "../common/optimizer_scalars.h"
#include "optimizer_blocks.cuh"

namespace bnb {
namespace {

// --- scalars ---

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
    configs[i] = step_config<Rule>(hyper, hyper.lr_address ? double(*hyper.lr_address) : hyper.lr, step);
}

// --- norms ---

constexpr int kNormThreads = 256;
constexpr int kNormWarps = 4096;  // of a launch; fixed, so that the order of a sum is

// Sums of squares: of the direction, and of the parameter.
struct Partial {
    double update;
    double parameter;
};

__device__ float load_as(const void* source, int64_t i, bnb_dtype dtype) {
    switch (dtype) {
        case BNB_DTYPE_FLOAT16: return to_float(static_cast<const Half*>(source)[i]);
        case BNB_DTYPE_BFLOAT16: return to_float(static_cast<const BFloat16*>(source)[i]);
        default: return static_cast<const float*>(source)[i];
    }
}

__device__ double sum_of_warp(double value) {
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(~0u, value, distance);
    }
    return value;
}

template <class State>
__device__ float decode_state(const State* codes, const float* absmax, const float* map, int64_t i) {
    if constexpr (sizeof(State) == 1) {
        return map[codes[i]] * absmax[i / kOptimizerBlock];
    } else {
        return codes[i];
    }
}

template <class Rule, class State>
__device__ void add_block(
    const OptimizerStep& step, const OptimizerKind& kind, const Place<Rule, State>& place, const StepScalars<float>& h,
    int64_t block, int lane, Partial& sum) {
    for (int j = 0; j < kPerLane; ++j) {
        const int64_t i = (block - place.first) * kOptimizerBlock + j * kWarpLanes + lane;
        if (i >= place.n) return;
        const float g = load_as(place.g, i, kind.g_dtype), p = load_as(place.p, i, kind.p_dtype);
        float state[Rule::kStates];
        for (int k = 0; k < Rule::kStates; ++k) {
            const float* map = k < Rule::kFirst ? step.qmap1 : step.qmap2;
            state[k] = decode_state(place.states[k], place.absmax[k], map, i);
        }
        sum.parameter += double(p) * double(p);
        const float u = Rule::direction(h.gradient(g, p), state, h);
        bool counts = isfinite(u);  // what is not finite must not spread from its own element
        if (sizeof(State) == 1) {   // and there it does not move; nor do skipped ones
            for (int k = 0; k < Rule::kStates; ++k) counts = counts && isfinite(state[k]);
            counts = counts && !(h.skip_zeros && g == 0.0f);
        }
        if (counts) sum.update += double(u) * double(u);
    }
}

__device__ __forceinline__ int64_t first_block_of(const OptimizerStep& step, int64_t warp) {
    return step.blocks * warp / kNormWarps;
}

template <class Rule, class State>
__global__ void __launch_bounds__(kNormThreads)
    partial_norms_kernel(const __grid_constant__ OptimizerStep step, OptimizerKind kind, Partial* partials) {
    const int lane = threadIdx.x % kWarpLanes;
    const int64_t warp = int64_t(blockIdx.x) * (kNormThreads / kWarpLanes) + threadIdx.x / kWarpLanes;
    const int64_t end = first_block_of(step, warp + 1);
    int64_t block = first_block_of(step, warp);
    while (block < end) {
        const Place<Rule, State> place = place_of<Rule, State>(step, block);
        StepScalars<float> h(config_of(step, place.index), [](float value) { return value; });
        Partial sum = {0.0, 0.0};
        const int64_t stop = min(end, place.first + place.blocks);
        for (; block < stop; ++block) add_block<Rule, State>(step, kind, place, h, block, lane, sum);
        sum.update = sum_of_warp(sum.update);
        sum.parameter = sum_of_warp(sum.parameter);
        // Either index grows from one pair to the next, so no two pairs share a sum of both.
        if (lane == 0) partials[warp + place.index] = sum;
    }
}

__global__ void __launch_bounds__(kWarpLanes) step_sizes_kernel(
    const __grid_constant__ OptimizerStep step, const Partial* partials, bool relative, float* sizes) {
    const int64_t index = blockIdx.x;
    const bnb_optimizer_tensor& tensor = step.tensors ? step.tensors[index] : step.tensor;
    const int64_t first = tensor.first_block;
    const int64_t last = first + (tensor.n + kOptimizerBlock - 1) / kOptimizerBlock - 1;
    Partial sum = {0.0, 0.0};
    if (last >= first) {
        // Warps start at first_block_of: these are the ones that the first and the last block fall to.
        const int64_t from = ((first + 1) * kNormWarps - 1) / step.blocks;
        const int64_t to = ((last + 1) * kNormWarps - 1) / step.blocks;
        for (int64_t warp = from + threadIdx.x; warp <= to; warp += kWarpLanes) {
            if (first_block_of(step, warp) == first_block_of(step, warp + 1)) continue;  // it had no block
            sum.update += partials[warp + index].update;
            sum.parameter += partials[warp + index].parameter;
        }
    }
    const float norm = static_cast<float>(::sqrt(sum_of_warp(sum.update)));
    const float parameter = static_cast<float>(::sqrt(sum_of_warp(sum.parameter)));
    if (threadIdx.x != 0) return;
    const bnb_optimizer_config& config = config_of(step, index);
    const float limit = relative ? config.limit * parameter : config.limit;
    if (tensor.unorm) *tensor.unorm = norm;
    sizes[index] = limit > 0.0f && norm > limit ? limit / norm * config.step_size : config.step_size;
}

template <class State>
void partial_norms(const OptimizerStep& step, const OptimizerKind& kind, Partial* partials, cudaStream_t stream) {
    visit_rule(kind.rule, [&](auto rule) {
        constexpr int kCtas = kNormWarps * kWarpLanes / kNormThreads;
        partial_norms_kernel<decltype(rule), State><<<kCtas, kNormThreads, 0, stream>>>(step, kind, partials);
        check_launch("partial_norms");
    });
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

int64_t optimizer_partials(int64_t count) { return kNormWarps + count; }

void limit_optimizer_step(
    const OptimizerStep& step, const OptimizerKind& kind, bool relative, double* partials, float* sizes,
    cudaStream_t stream) {
    if (step.count == 0) return;
    auto* pairs = reinterpret_cast<Partial*>(partials);
    if (step.blocks > 0 && step.qmap1) {
        partial_norms<uint8_t>(step, kind, pairs, stream);
    } else if (step.blocks > 0) {
        partial_norms<float>(step, kind, pairs, stream);
    }
    step_sizes_kernel<<<grid_size(step.count), kWarpLanes, 0, stream>>>(step, pairs, relative, sizes);
    check_launch("step_sizes");
}

}  // namespace bnb
