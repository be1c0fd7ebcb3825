// The optimizer rules: one struct each, from a gradient and the state to the direction of the step.
//
// How the state is stored is no concern of a rule, so the 32-bit kernel, the 8-bit kernel, CPU and GPU share
// it. `Real` is float or a vector of floats. A rule advances its state in place; callers keep states[0 ..
// kFirst) in state1, one after the other, and the last one, if there are more, in state2. The same arithmetic
// in the same order stands in plain torch in backends/default/optimizers.py; tests/optim/test_native.py
// compares the two. kCoupledDecay says that weight decay joins the gradient instead of shrinking the parameter,
// kBiasCorrected that the bias correction is in step_size and eps,
// kQuotient that the direction is a quotient, which may be approximate.
#pragma once

#include <math.h>

#include "../bnb.h"
#include "platform.h"

BNB_NAMESPACE_BEGIN

BNB_HOST_DEVICE inline float sqrt(float x) { return ::sqrtf(x); }

// -1, 0 or 1; 0 for NaN.
BNB_HOST_DEVICE inline float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f; }

// The scalars of bnb_optimizer_config as the type the rules compute with; spread(float) makes one.
template <class Real>
struct StepScalars {
    Real beta1, beta2, beta3, rest1, rest2, rest3, correction1, correction2, alpha, eps;
    Real decay, shrink, step_size, gnorm_scale;
    bool coupled, first_step, skip_zeros;

    template <class Spread>
    BNB_HOST_DEVICE StepScalars(const bnb_optimizer_config& config, const Spread& spread)
        : beta1(spread(config.beta1)),
          beta2(spread(config.beta2)),
          beta3(spread(config.beta3)),
          rest1(spread(config.rest1)),
          rest2(spread(config.rest2)),
          rest3(spread(config.rest3)),
          correction1(spread(config.correction1)),
          correction2(spread(config.correction2)),
          alpha(spread(config.alpha)),
          eps(spread(config.eps)),
          decay(spread(config.decay)),
          shrink(spread(config.shrink)),
          step_size(spread(config.step_size)),
          gnorm_scale(spread(config.gnorm_scale)),
          coupled(config.decay != 0.0f),
          first_step(config.first_step),
          skip_zeros(config.skip_zeros) {}

    // The gradient that a rule sees: scaled, with coupled weight decay added.
    BNB_HOST_DEVICE BNB_INLINE Real gradient(Real g, Real p) const {
        const Real scaled = g * gnorm_scale;
        return coupled ? scaled + p * decay : scaled;
    }

    // The parameter after the step; decoupled weight decay comes first.
    BNB_HOST_DEVICE BNB_INLINE Real moved(Real p, Real direction, Real size) const {
        return p * shrink - direction * size;
    }
};

// Adam (Kingma and Ba, 2015). The bias correction is in step_size and eps. LAMB is this with a limited norm.
struct Adam {
    static constexpr int kStates = 2;
    static constexpr int kFirst = 1;
    static constexpr bool kCoupledDecay = false;
    static constexpr bool kBiasCorrected = true;
    static constexpr bool kQuotient = true;

    template <class Real>
    BNB_HOST_DEVICE static BNB_INLINE Real direction(Real g, Real* states, const StepScalars<Real>& h) {
        Real& m = states[0];
        Real& v = states[1];
        m = m * h.beta1 + g * h.rest1;
        v = v * h.beta2 + g * g * h.rest2;
        return m / (sqrt(v) + h.eps);
    }
};

// AdEMAMix (Pagliardini et al., 2024): Adam with a slow average beside the fast one, which alone is
// bias-corrected.
struct AdEMAMix {
    static constexpr int kStates = 3;
    static constexpr int kFirst = 2;
    static constexpr bool kCoupledDecay = false;
    static constexpr bool kBiasCorrected = false;
    static constexpr bool kQuotient = true;

    template <class Real>
    BNB_HOST_DEVICE static BNB_INLINE Real direction(Real g, Real* states, const StepScalars<Real>& h) {
        Real& fast = states[0];
        Real& slow = states[1];
        Real& v = states[2];
        fast = fast * h.beta1 + g * h.rest1;
        slow = slow * h.beta3 + g * h.rest3;
        v = v * h.beta2 + g * g * h.rest2;
        return (fast / h.correction1 + slow * h.alpha) / (sqrt(v) / h.correction2 + h.eps);
    }
};

// Heavy-ball momentum without dampening; the first step takes the gradient as it is. LARS limits its norm.
struct Momentum {
    static constexpr int kStates = 1;
    static constexpr int kFirst = 1;
    static constexpr bool kCoupledDecay = true;
    static constexpr bool kBiasCorrected = false;
    static constexpr bool kQuotient = false;

    template <class Real>
    BNB_HOST_DEVICE static BNB_INLINE Real direction(Real g, Real* states, const StepScalars<Real>& h) {
        states[0] = h.first_step ? g : states[0] * h.beta1 + g;
        return states[0];
    }
};

// Lion (Chen et al., 2023): the sign of an interpolation; the momentum moves after the step it served.
struct Lion {
    static constexpr int kStates = 1;
    static constexpr int kFirst = 1;
    static constexpr bool kCoupledDecay = false;
    static constexpr bool kBiasCorrected = false;
    static constexpr bool kQuotient = false;

    template <class Real>
    BNB_HOST_DEVICE static BNB_INLINE Real direction(Real g, Real* states, const StepScalars<Real>& h) {
        Real& m = states[0];
        const Real step = sign(m * h.beta1 + g * h.rest1);
        m = m * h.beta2 + g * h.rest2;
        return step;
    }
};

// RMSprop, not centred, no momentum.
struct RMSprop {
    static constexpr int kStates = 1;
    static constexpr int kFirst = 1;
    static constexpr bool kCoupledDecay = true;
    static constexpr bool kBiasCorrected = false;
    static constexpr bool kQuotient = true;

    template <class Real>
    BNB_HOST_DEVICE static BNB_INLINE Real direction(Real g, Real* states, const StepScalars<Real>& h) {
        states[0] = states[0] * h.beta1 + g * g * h.rest1;
        return g / (sqrt(states[0]) + h.eps);
    }
};

// Adagrad (Duchi et al., 2011).
struct Adagrad {
    static constexpr int kStates = 1;
    static constexpr int kFirst = 1;
    static constexpr bool kCoupledDecay = true;
    static constexpr bool kBiasCorrected = false;
    static constexpr bool kQuotient = true;

    template <class Real>
    BNB_HOST_DEVICE static BNB_INLINE Real direction(Real g, Real* states, const StepScalars<Real>& h) {
        states[0] = states[0] + g * g;
        return g / (sqrt(states[0]) + h.eps);
    }
};

// Call body(Rule{}) for the struct behind a rule; false if there is none.
template <class Body>
bool visit_rule(bnb_rule rule, Body&& body) {
    switch (rule) {
        case BNB_RULE_ADAM: body(Adam{}); return true;
        case BNB_RULE_ADEMAMIX: body(AdEMAMix{}); return true;
        case BNB_RULE_MOMENTUM: body(Momentum{}); return true;
        case BNB_RULE_LION: body(Lion{}); return true;
        case BNB_RULE_RMSPROP: body(RMSprop{}); return true;
        case BNB_RULE_ADAGRAD: body(Adagrad{}); return true;
    }
    return false;
}

BNB_NAMESPACE_END
