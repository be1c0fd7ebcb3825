// The launchers of the optimizer kernels: one launch steps any number of tensors that share a rule, their dtypes and
// the kind of their state.
//
// The tensors are described by a table in device memory, so that neither their number nor their sizes cost launches.
// What changes from step to step (gradients, hyper-parameters, the step count) enters through begin_optimizer_step,
// whose arguments a CUDA graph keeps; everything after it reads device memory alone, so a replay advances the step.
#pragma once

#include <cstdint>

#include "../bnb.h"

typedef struct CUstream_st* cudaStream_t;

namespace bnb {

// Tensors of one step. Blocks of 256 elements are numbered through all of them.
struct OptimizerStep {
    const bnb_optimizer_tensor* tensors;  // [count], or null: then it is `tensor` with `config`
    const bnb_optimizer_config* configs;  // [count]
    const float* sizes;                   // [count] step sizes where a norm limits them, else null: the configs'
    const float* qmap1;                   // null for 32-bit state
    const float* qmap2;
    int64_t count;
    int64_t blocks;
    bnb_optimizer_tensor tensor;
    bnb_optimizer_config config;
};

struct OptimizerKind {
    bnb_rule rule;
    bnb_dtype p_dtype;
    bnb_dtype g_dtype;  // p_dtype; or float32 for a 16-bit parameter
};

// Write the gradients' addresses (host memory) into the table, count the step, derive the configs.
void begin_optimizer_step(
    const int64_t* gradients, const bnb_optimizer_hyper& hyper, bnb_rule rule, bnb_optimizer_tensor* tensors,
    bnb_optimizer_config* configs, int64_t count, cudaStream_t stream);

// Write the norms of the updates and the step sizes that respect the limits to `sizes` [count]. A config's limit is
// absolute, or `relative` to the parameter's norm. `partials` has optimizer_partials(count) pairs.
void limit_optimizer_step(
    const OptimizerStep& step, const OptimizerKind& kind, bool relative, double* partials, float* sizes,
    cudaStream_t stream);

int64_t optimizer_partials(int64_t count);

void optimizer_update_32bit(const OptimizerStep& step, const OptimizerKind& kind, cudaStream_t stream);
void optimizer_update_8bit(const OptimizerStep& step, const OptimizerKind& kind, cudaStream_t stream);

}  // namespace bnb
