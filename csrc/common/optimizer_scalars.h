// From what users set to what one step multiplies with; `_formats/rules.py` and `optim/_rules.py` derive the same.
//
// In double precision: 1 - 0.999 taken in float is already off by 5e-5.
#pragma once

#include <math.h>

#include "optimizer_rules.h"

BNB_NAMESPACE_BEGIN

// The decay of AdEMAMix's slow average at a step: its half-life grows linearly from that of beta1.
BNB_HOST_DEVICE inline double scheduled_beta3(const bnb_optimizer_hyper& hyper, double step) {
    if (!(hyper.t_beta3 > 0.0) || step >= hyper.t_beta3) return hyper.beta3;
    const double log1 = ::log(hyper.beta1), log3 = ::log(hyper.beta3), progress = step / hyper.t_beta3;
    const double beta3 = ::exp(log1 * log3 / ((1.0 - progress) * log3 + progress * log1));
    return beta3 < hyper.beta3 ? beta3 : hyper.beta3;
}

// The scalars of step number `step`, which counts from 1. The limit stays relative to the parameter's norm.
template <class Rule>
BNB_HOST_DEVICE inline bnb_optimizer_config step_config(const bnb_optimizer_hyper& hyper, double lr, int64_t step) {
    const double t = static_cast<double>(step);
    const double correction1 = 1.0 - ::pow(hyper.beta1, t), correction2 = ::sqrt(1.0 - ::pow(hyper.beta2, t));
    const double beta3 = scheduled_beta3(hyper, t);
    const bool growing = hyper.t_alpha > 0.0 && t < hyper.t_alpha;
    const double alpha = growing ? t * hyper.alpha / hyper.t_alpha : hyper.alpha;
    bnb_optimizer_config config;
    config.beta1 = static_cast<float>(hyper.beta1);
    config.beta2 = static_cast<float>(hyper.beta2);
    config.beta3 = static_cast<float>(beta3);
    config.rest1 = static_cast<float>(1.0 - hyper.beta1);
    config.rest2 = static_cast<float>(1.0 - hyper.beta2);
    config.rest3 = static_cast<float>(1.0 - beta3);
    config.correction1 = static_cast<float>(correction1);
    config.correction2 = static_cast<float>(correction2);
    config.alpha = static_cast<float>(alpha);
    config.eps = static_cast<float>(Rule::kBiasCorrected ? hyper.eps * correction2 : hyper.eps);
    config.decay = static_cast<float>(Rule::kCoupledDecay ? hyper.weight_decay : 0.0);
    config.shrink = static_cast<float>(Rule::kCoupledDecay ? 1.0 : 1.0 - lr * hyper.weight_decay);
    config.step_size = static_cast<float>(Rule::kBiasCorrected ? lr * correction2 / correction1 : lr);
    config.gnorm_scale = static_cast<float>(hyper.gnorm_scale);
    config.limit = static_cast<float>(hyper.max_unorm);
    config.first_step = step == 1;
    config.skip_zeros = hyper.skip_zeros;
    return config;
}

BNB_NAMESPACE_END
