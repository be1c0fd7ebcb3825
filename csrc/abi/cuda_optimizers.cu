// bnb_cuda_optimizer_*: check the arguments and call the launcher, as abi/cuda.cu does for the other operations.

#include "../bnb.h"
#include "../common/error.h"
#include "../cuda/optimizer.h"
#include "arguments.h"
#include "guard.h"

namespace bnb {
namespace {

constexpr int64_t kBlock = 256;

OptimizerKind checked_kind(bnb_rule rule, bnb_dtype p_dtype, bnb_dtype g_dtype) {
    require(
        g_dtype == p_dtype || g_dtype == BNB_DTYPE_FLOAT32, "g must have the dtype of p or be float32, got dtypes ",
        int(g_dtype), " and ", int(p_dtype));
    return {rule, p_dtype, g_dtype};
}

bool has_second(bnb_rule rule) { return rule == BNB_RULE_ADAM || rule == BNB_RULE_ADEMAMIX; }

OptimizerStep step_on(const bnb_optimizer_tensor& tensor, const bnb_optimizer_config* config) {
    require(tensor.n >= 0, "n must not be negative, got ", tensor.n);
    require(config != nullptr, "config must not be null");
    OptimizerStep step{};
    step.count = 1;
    step.blocks = (tensor.n + kBlock - 1) / kBlock;
    step.tensor = tensor;
    step.config = *config;
    return step;
}

// Enforce the limits, with norms and step sizes in the scratch memory.
void limit(OptimizerStep& step, const OptimizerKind& kind, bool relative, void* scratch, cudaStream_t stream) {
    auto* partials = static_cast<double*>(scratch);
    auto* sizes = reinterpret_cast<float*>(partials + 2 * optimizer_partials(step.count));
    limit_optimizer_step(step, kind, relative, partials, sizes, stream);
    step.sizes = sizes;
}

}  // namespace
}  // namespace bnb

using namespace bnb;

extern "C" {

bnb_status bnb_cuda_optimizer_update_32bit(
    const void* g, bnb_dtype g_dtype, void* p, bnb_dtype p_dtype, float* state1, float* state2, float* unorm,
    void* scratch, int64_t n, bnb_rule rule, const bnb_optimizer_config* config, bnb_stream stream) {
    return guarded("bnb_cuda_optimizer_update_32bit", [&] {
        const OptimizerKind kind = checked_kind(rule, p_dtype, g_dtype);
        require(n == 0 || (g && p && state1), "null pointer for ", n, " values");
        require((state2 != nullptr) == has_second(rule) || n == 0, "state2 does not fit rule ", int(rule));
        require(!unorm || scratch, "unorm needs scratch");
        OptimizerStep step = step_on({g, p, state1, state2, nullptr, nullptr, unorm, nullptr, n, 0, 0, 0, -1}, config);
        if (unorm) limit(step, kind, false, scratch, as_stream(stream));
        optimizer_update_32bit(step, kind, as_stream(stream));
    });
}

bnb_status bnb_cuda_optimizer_update_8bit_blockwise(
    const void* g, bnb_dtype g_dtype, const float* qmap1, const float* qmap2, void* p, bnb_dtype p_dtype,
    uint8_t* state1, uint8_t* state2, float* absmax1, float* absmax2, int64_t n, bnb_rule rule,
    const bnb_optimizer_config* config, bnb_stream stream) {
    return guarded("bnb_cuda_optimizer_update_8bit_blockwise", [&] {
        const OptimizerKind kind = checked_kind(rule, p_dtype, g_dtype);
        require(n == 0 || (g && p && state1 && absmax1 && qmap1), "null pointer for ", n, " values");
        const bool second = state2 && absmax2 && qmap2;
        require(second == has_second(rule) || n == 0, "state2 does not fit rule ", int(rule));
        OptimizerStep step =
            step_on({g, p, state1, state2, absmax1, absmax2, nullptr, nullptr, n, 0, 0, 0, -1}, config);
        step.qmap1 = qmap1;
        step.qmap2 = qmap2;
        optimizer_update_8bit(step, kind, as_stream(stream));
    });
}

bnb_status bnb_cuda_optimizer_begin(
    const int64_t* gradients, const bnb_optimizer_hyper* hyper, bnb_optimizer_tensor* tensors,
    bnb_optimizer_config* configs, int64_t count, bnb_rule rule, bnb_stream stream) {
    return guarded("bnb_cuda_optimizer_begin", [&] {
        require(count >= 0, "count must not be negative, got ", count);
        if (count == 0) return;
        require(gradients && hyper && tensors && configs, "null pointer for ", count, " tensors");
        begin_optimizer_step(gradients, *hyper, rule, tensors, configs, count, as_stream(stream));
    });
}

bnb_status bnb_cuda_optimizer_update_many(
    const bnb_optimizer_tensor* tensors, const bnb_optimizer_config* configs, bnb_dtype g_dtype, bnb_dtype p_dtype,
    const float* qmap1, const float* qmap2, void* scratch, int64_t count, int64_t blocks, bnb_rule rule,
    bnb_stream stream) {
    return guarded("bnb_cuda_optimizer_update_many", [&] {
        const OptimizerKind kind = checked_kind(rule, p_dtype, g_dtype);
        require(count >= 0 && blocks >= 0, "count and blocks must not be negative, got ", count, ", ", blocks);
        if (count == 0) return;
        require(tensors && configs, "null pointer for ", count, " tensors");
        require(!qmap1 || !has_second(rule) || qmap2, "rule ", int(rule), " needs qmap2");
        OptimizerStep step{tensors, configs, nullptr, qmap1, qmap2, count, blocks, {}, {}};
        if (scratch) limit(step, kind, true, scratch, as_stream(stream));
        if (qmap1) {
            optimizer_update_8bit(step, kind, as_stream(stream));
        } else {
            optimizer_update_32bit(step, kind, as_stream(stream));
        }
    });
}

int64_t bnb_cuda_optimizer_scratch(int64_t count) {
    return 2 * sizeof(double) * optimizer_partials(count) + sizeof(float) * count;
}

}  // extern "C"
