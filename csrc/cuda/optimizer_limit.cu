// Step sizes that keep the norms of updates within limits, on the device.
//
// A limit costs one more pass over gradient, parameter and state, which recomputes the direction instead of storing it,
// and is as memory bound as the update. Each CTA sums over its own range of blocks, one partial sum for each tensor it
// meets, and one warp per tensor adds those up in order: the same tensors give the same norms, run after run.

#include "loaded_block.cuh"

namespace bnb {
namespace {

constexpr int kThreads = 768;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kMostCtas = 4096;

// Sums of squares: of the direction, and of the parameter.
struct Partial {
    double update;
    double parameter;
};

__device__ double sum_of_warp(double value) {
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(~0u, value, distance);
    }
    return value;
}

// In thread 0.
__device__ Partial sum_of_cta(Partial sum) {
    __shared__ Partial sums[kWarps];
    sum.update = sum_of_warp(sum.update);
    sum.parameter = sum_of_warp(sum.parameter);
    __syncthreads();  // the last sum was read
    if (threadIdx.x % kWarpLanes == 0) sums[threadIdx.x / kWarpLanes] = sum;
    __syncthreads();
    for (int warp = 1; warp < kWarps && threadIdx.x == 0; ++warp) {
        sum.update += sums[warp].update;
        sum.parameter += sums[warp].parameter;
    }
    return sum;
}

// The direction of element i of a lane; 0 where it does not count.
template <class Rule, class P, class G, class State>
__device__ __forceinline__ float direction_of(
    const Loaded<Rule, P, G, State>& block, const StateTables& tables, const StepScalars<RealFor<State>>& h, int i) {
    using Real = RealFor<State>;
    const float g = block.g.get(i);
    Real state[Rule::kStates];
#pragma unroll
    for (int k = 0; k < Rule::kStates; ++k) state[k] = Real(block.state(tables, k, i));
    const Real direction = Rule::direction(gradient_of<Rule>(h, Real(g), Real(block.p.get(i))), state, h);
    float u = value_of(direction);
    if constexpr (sizeof(State) == 1) {  // an element with bad state will not move, nor a skipped one
        // A quotient by a bad state is zero, or bad itself.
        if (!Rule::kQuotient && !isfinite(value_of(state[0]))) u = 0.0f;
        if (h.skip_zeros && g == 0.0f) u = 0.0f;
    }
    return u;
}

// `rest` elements of the tensor follow the lane's first one.
template <class Rule, class P, class G, class State>
__device__ __forceinline__ void add_block(
    const Loaded<Rule, P, G, State>& block, const StateTables& tables, const StepScalars<RealFor<State>>& h, bool whole,
    int64_t rest, Partial& sum) {
    float update = 0.0f, parameter = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const float u = direction_of(block, tables, h, i), p = block.p.get(i);
        update = __fmaf_rn(u, u, update);
        parameter = __fmaf_rn(p, p, parameter);
    }
    if (whole && isfinite(update) && isfinite(parameter)) {
        sum.update += double(update);
        sum.parameter += double(parameter);
        return;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        if (element<Place<Rule, P, G, State>::kGroup>(i) >= rest) continue;
        const float u = direction_of(block, tables, h, i);
        const double p = block.p.get(i);
        if (isfinite(u)) sum.update += double(u) * double(u);  // others must not spread from their own element
        sum.parameter += p * p;
    }
}

__device__ __forceinline__ int64_t first_block_of(const OptimizerStep& step, int64_t cta, int64_t ctas) {
    return step.blocks * cta / ctas;
}

template <class Rule, class P, class G, class State>
__global__ void __launch_bounds__(kThreads, 1)
    partial_norms_kernel(const __grid_constant__ OptimizerStep step, Partial* partials) {
    extern __shared__ uint32_t shared[];
    StateTables tables{};
    if constexpr (sizeof(State) == 1) {
        tables = build_state_tables<kMaps<Rule> == 2, false>(shared, step.qmap1, step.qmap2);
    }
    const int64_t end = first_block_of(step, blockIdx.x + 1, gridDim.x);
    int64_t next = first_block_of(step, blockIdx.x, gridDim.x);
    while (next < end) {
        const auto place = place_of<Rule, P, G, State>(step, next);
        const auto h = scalars_of<Rule, RealFor<State>>(step, place.index);
        const uint32_t stop = static_cast<uint32_t>(min(end - place.first, int64_t(place.blocks)));
        uint32_t block = static_cast<uint32_t>(next - place.first) + threadIdx.x / kWarpLanes;
        Partial sum = {0.0, 0.0};
        Loaded<Rule, P, G, State> ahead;
        if (block < stop) ahead.template load<true>(place, block);
        for (; block < stop; block += kWarps) {
            const Loaded<Rule, P, G, State> loaded = ahead;
            if (block + kWarps < stop) ahead.template load<true>(place, block + kWarps);
            add_block(loaded, tables, h, block < place.whole, place.rest_of(block), sum);
        }
        sum = sum_of_cta(sum);
        // Either index grows from one pair to the next, so no two pairs share a sum of both.
        if (threadIdx.x == 0) partials[blockIdx.x + place.index] = sum;
        next = place.first + stop;
    }
}

__global__ void __launch_bounds__(kWarpLanes) step_sizes_kernel(
    const __grid_constant__ OptimizerStep step, const Partial* partials, int64_t ctas, bool relative, float* sizes) {
    const uint32_t index = blockIdx.x;
    const bnb_optimizer_tensor& tensor = tensor_of(step, index);
    const int64_t first = tensor.first_block;
    const int64_t last = first + (tensor.n + kOptimizerBlock - 1) / kOptimizerBlock - 1;
    Partial sum = {0.0, 0.0};
    if (last >= first) {
        // CTAs start at first_block_of: these are the ones that the first and the last block fall to.
        const int64_t from = ((first + 1) * ctas - 1) / step.blocks;
        const int64_t to = ((last + 1) * ctas - 1) / step.blocks;
        for (int64_t cta = from + threadIdx.x; cta <= to; cta += kWarpLanes) {
            if (first_block_of(step, cta, ctas) == first_block_of(step, cta + 1, ctas)) continue;  // it had no block
            sum.update += partials[cta + index].update;
            sum.parameter += partials[cta + index].parameter;
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
void partial_norms(
    const OptimizerStep& step, const OptimizerKind& kind, Partial* partials, int ctas, cudaStream_t stream) {
    visit_kind(kind, [&](auto rule, auto p, auto g) {
        using Rule = decltype(rule);
        constexpr int kShared = sizeof(State) == 1 ? StateTables::bytes(kMaps<Rule>) : 0;
        auto* kernel = partial_norms_kernel<Rule, typename decltype(p)::type, typename decltype(g)::type, State>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), "partial_norms");
        kernel<<<ctas, kThreads, kShared, stream>>>(step, partials);
        check_launch("partial_norms");
    });
}

}  // namespace

int64_t optimizer_partials(int64_t count) { return kMostCtas + count; }

void limit_optimizer_step(
    const OptimizerStep& step, const OptimizerKind& kind, bool relative, double* partials, float* sizes,
    cudaStream_t stream) {
    if (step.count == 0) return;
    auto* pairs = reinterpret_cast<Partial*>(partials);
    const int multiprocessors = current_device().multiprocessors;
    const int ctas = multiprocessors < kMostCtas ? multiprocessors : kMostCtas;
    if (step.blocks > 0 && step.qmap1) {
        partial_norms<uint8_t>(step, kind, pairs, ctas, stream);
    } else if (step.blocks > 0) {
        partial_norms<float>(step, kind, pairs, ctas, stream);
    }
    step_sizes_kernel<<<grid_size(step.count), kWarpLanes, 0, stream>>>(step, pairs, ctas, relative, sizes);
    check_launch("step_sizes");
}

}  // namespace bnb
