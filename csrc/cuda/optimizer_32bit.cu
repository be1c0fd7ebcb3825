// Optimizer updates with 32-bit state: one pass over parameter, gradient and state.
//
// Memory bound, 28 bytes per element for Adam in float32 and 22 in bfloat16, with instructions to spare: the arithmetic
// is exact, as on the CPU. A warp takes a block of 256 elements at a time and loads all its streams before it uses any;
// many resident warps keep memory busy.

#include "loaded_block.cuh"

namespace bnb {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;

// CTAs per multiprocessor: as many as have registers for all their streams.
template <class Rule>
constexpr int kCtas = Rule::kStates == 1   ? 4
                      : Rule::kStates == 2 ? 3
                                           : 2;

template <class Rule, class P, class G>
__device__ __forceinline__ void update_block(
    const Place<Rule, P, G, float>& place, const StepScalars<float>& h, const Dice& dice, uint32_t block) {
    Loaded<Rule, P, G, float> loaded;
    loaded.template load<true>(place, block);
    float moved[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const float g_raw = loaded.g.get(i), p_old = loaded.p.get(i);
        float state[Rule::kStates];
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) state[k] = loaded.states[k].values[i];
        const float direction = Rule::direction(gradient_of<Rule>(h, g_raw, p_old), state, h);
        moved[i] = h.moved(p_old, direction, h.step_size);
        if (h.skip_zeros && g_raw == 0.0f) {
            moved[i] = p_old;
            continue;
        }
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) loaded.states[k].values[i] = state[k];
    }
#pragma unroll
    for (int i = 0; i < kPerLane; i += 2)
        round_pair(loaded.p, i, moved[i], moved[i + 1], dice, uint64_t(block) * kOptimizerBlock);
    P* p_target = block_of(place.p, block);
    if (block < place.whole) {
        loaded.p.store(p_target);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) loaded.states[k].store(block_of(place.states[k], block));
    } else {
        const int64_t rest = place.rest_of(block);
        loaded.p.store_some(p_target, rest);
#pragma unroll
        for (int k = 0; k < Rule::kStates; ++k) loaded.states[k].store_some(block_of(place.states[k], block), rest);
    }
}

template <class Rule, class P, class G>
__global__ void __launch_bounds__(kThreads, kCtas<Rule>)
    optimizer_32bit_kernel(const __grid_constant__ OptimizerStep step) {
    const int64_t end = step.blocks * (blockIdx.x + 1) / gridDim.x;
    int64_t next = step.blocks * blockIdx.x / gridDim.x + threadIdx.x / kWarpLanes;
    while (next < end) {
        const auto place = place_of<Rule, P, G, float>(step, next);
        const StepScalars<float> h = scalars_of<Rule, float>(step, place.index);
        const Dice dice = dice_of<Place<Rule, P, G, float>::kGroup>(step, place.index);
        const uint32_t stop = static_cast<uint32_t>(min(end - place.first, int64_t(place.blocks)));
        uint32_t block = static_cast<uint32_t>(next - place.first);
        for (; block < stop; block += kWarps) update_block<Rule, P, G>(place, h, dice, block);
        next = place.first + block;
    }
}

}  // namespace

void optimizer_update_32bit(const OptimizerStep& step, const OptimizerKind& kind, cudaStream_t stream) {
    if (step.blocks == 0) return;
    visit_kind(kind, [&](auto rule, auto p, auto g) {
        const int64_t ctas = (step.blocks + kWarps - 1) / kWarps;
        const int64_t all = int64_t(kCtas<decltype(rule)>) * current_device().multiprocessors;
        optimizer_32bit_kernel<decltype(rule), typename decltype(p)::type, typename decltype(g)::type>
            <<<grid_size(ctas < all ? ctas : all), kThreads, 0, stream>>>(step);
        check_launch("optimizer_32bit");
    });
}

}  // namespace bnb
