// One table decides which 4-bit matmul runs, and in which shape. No device is asked, so it can be tested anywhere.
//
// Few tokens: the weight is what is read, and the tensor-core kernels read its 4 bits once; what they do not take goes
// through the plain kernel if the tokens are very few. Many tokens: arithmetic dominates, so the weight is decoded once
// and the vendor's matmul multiplies. So it is where blocks straddle rows, of which the operator warns.

#include "plan.h"

#include "tuning.h"

namespace bnb {

namespace {

// The first line that the problem and the device fit counts. Measured on an H200:
// benchmarking/results/2026-11-22-gemm-4bit-nvidia-h200.json.
struct Choice {
    int64_t tokens;    // at most
    int64_t weights;   // N * K, at least
    int tuning;        // a position in kMmaTunings, or after those in kWgmmaTunings, or kNone
    int64_t rows = 0;  // N, at least
};

constexpr int kNone = BNB_GEMM_DEQUANTIZE;
constexpr int64_t kMedium = int64_t(16) << 20, kLarge = int64_t(24) << 20, kHuge = int64_t(128) << 20;
constexpr int64_t kManyRows = 7 * 16 * 132 + 1;  // more than seven tiles for each multiprocessor

constexpr int wgmma(int tuning) { return kMmaTuningCount + tuning; }

// From so many tokens on; below, and where there is no workspace, those for every GPU.
constexpr int64_t kFirstWgmmaTokens = 25;

constexpr Choice kWgmmaChoices[] = {
    {32, kLarge, wgmma(0)},    {32, 0, 6},
    {64, kLarge, wgmma(1)},    {64, 0, wgmma(2)},
    {128, kHuge, wgmma(3)},    {128, 0, wgmma(4)},
    {256, kLarge, wgmma(5)},   {256, 0, wgmma(4)},
    {384, kLarge, wgmma(3)},   {384, 0, kNone},
    {512, kMedium, wgmma(5)},  {1024, kLarge, wgmma(5)},
    {640, 0, kNone},           {768, kMedium, wgmma(3)},
    {1024, kMedium, wgmma(5)},
};

// Values of A. More do not stay in L2, and the kernel would read them from memory again and again.
constexpr int64_t kMostWgmmaInputs = int64_t(32) << 20;

// For more than its tokens a kernel reads the weight again, which up to 64 is less than writing and reading it decoded.
constexpr Choice kMmaChoices[] = {
    {8, 0, 0}, {8, 0, 1}, {16, 0, 3, kManyRows}, {16, 0, 2}, {16, 0, 4}, {24, 0, 5}, {64, 0, 6}, {64, 0, 7}, {64, 0, 4},
};

constexpr int kWgmmaCapability = 90;

// Shared memory that a CTA can have.
int shared_memory_kb(int capability) {
    switch (capability) {
        case 80:
        case 87: return 163;
        case 90:
        case 100:
        case 103:
        case 110: return 227;
        default: return capability >= 80 ? 99 : 0;  // 86, 89, 120, 121
    }
}

bool fits(int tuning, const GemmDevice& device) {
    if (tuning == kNone) return true;
    if (tuning >= kMmaTuningCount) return device.capability == kWgmmaCapability;
    return MmaShared(kMmaTunings[tuning], true).bytes() <= shared_memory_kb(device.capability) * 1024;
}

template <size_t kCount>
constexpr int64_t most_tokens(const Choice (&choices)[kCount]) {
    int64_t most = 0;
    for (const Choice& choice : choices) most = choice.tokens > most ? choice.tokens : most;
    return most;
}

static_assert(most_tokens(kWgmmaChoices) == BNB_GEMM_MOST_FUSED_ROWS, "bnb.h tells callers");

template <size_t kCount>
int choose(const Choice (&choices)[kCount], const GemmProblem& p, const GemmDevice& device) {
    for (const Choice& choice : choices) {
        const bool meant = p.M <= choice.tokens && p.N * p.K >= choice.weights && p.N >= choice.rows;
        if (meant && fits(choice.tuning, device)) return choice.tuning;
    }
    return kNone;
}

constexpr int64_t kMaxSize = int64_t(1) << 30;  // of a dimension, which then fits an int with room to spare
constexpr int64_t kSimtTokens = 4;              // it decodes the weight once for as many
constexpr int64_t kMaxSimtTokens = 4 * 65535;

}  // namespace

bool can_multiply_with_simt(const GemmProblem& p) {
    const bool power_of_two = p.blocksize > 0 && (p.blocksize & (p.blocksize - 1)) == 0;
    return p.M > 0 && p.N > 0 && p.K > 0 && p.M <= kMaxSimtTokens && p.N < kMaxSize && p.K < kMaxSize && power_of_two;
}

bool can_multiply_with_mma(const GemmProblem& p) {
    return can_multiply_with_simt(p) && p.dtype != BNB_DTYPE_FLOAT32 && p.blocksize >= 64 && p.K % 64 == 0 &&
           p.K % p.blocksize == 0;
}

int plan_gemm_4bit(const GemmProblem& problem, const GemmDevice& device, bool workspace) {
    if (can_multiply_with_mma(problem)) {
        const bool wgmma = workspace && device.capability == kWgmmaCapability && problem.M >= kFirstWgmmaTokens;
        if (wgmma && problem.M > kMostWgmmaInputs / problem.K) return kNone;
        const int tuning = wgmma ? choose(kWgmmaChoices, problem, device) : choose(kMmaChoices, problem, device);
        if (tuning != kNone) return tuning;
    }
    if (problem.M <= kSimtTokens && can_multiply_with_simt(problem) && problem.K % problem.blocksize == 0) {
        return BNB_GEMM_SIMT;
    }
    return BNB_GEMM_DEQUANTIZE;
}

int64_t workspace_of_gemm_4bit(const GemmProblem& p, int tuning, int multiprocessors) {
    const int index = tuning - kMmaTuningCount;
    if (index < 0 || index >= kWgmmaTuningCount || !can_multiply_with_mma(p) || multiprocessors <= 0) return 0;
    return WgmmaWorkspace(kWgmmaTunings[index], p.M, p.N, p.K, multiprocessors).bytes();
}

}  // namespace bnb
