// Optimizer updates of many tensors of one kind: their blocks of 256 elements stand in one range, which the threads
// share, so that small tensors cost neither a call nor a wake-up each, and the maps are prepared once.

BNB_NAMESPACE_BEGIN

inline int64_t blocks_of(int64_t n) { return (n + kOptimizerBlock - 1) / kOptimizerBlock; }

// Call body(tensor, first, last) for the blocks of each tensor, some of them at a time.
template <class Body>
void for_blocks_of_many(const bnb_optimizer_tensor* tensors, int64_t count, int32_t threads, const Body& body) {
    const int64_t base = tensors[0].first_block;
    const int64_t blocks = tensors[count - 1].first_block - base + blocks_of(tensors[count - 1].n);
    const int64_t grain = optimizer_grain(blocks * kOptimizerBlock) / kOptimizerBlock;
    parallel_for(blocks, grain, threads, [&](int64_t begin, int64_t end) {
        int64_t tensor = 0, beyond = count;  // tensor is the last that starts at `begin` or before
        while (beyond - tensor > 1) {
            const int64_t middle = tensor + (beyond - tensor) / 2;
            (tensors[middle].first_block - base <= begin ? tensor : beyond) = middle;
        }
        for (int64_t block = begin; block < end; ++tensor) {
            const int64_t start = tensors[tensor].first_block - base, stop = start + blocks_of(tensors[tensor].n);
            const int64_t last = stop < end ? stop : end;
            if (block < last) body(tensor, block - start, last - start);
            block = last;
        }
    });
}

template <class T>
void optimizer_update_many(const UpdateMany<T>& problem, int32_t threads) {
    const bnb_optimizer_tensor* tensors = problem.tensors;
    const auto element = [](const bnb_optimizer_tensor& t) { return static_cast<const T*>(t.g); };
    visit_rule(problem.rule, [&](auto rule) {
        using Rule = decltype(rule);
        if (!problem.qmap1) {
            for_blocks_of_many(tensors, problem.count, threads, [&](int64_t i, int64_t first, int64_t last) {
                const bnb_optimizer_tensor& t = tensors[i];
                const Updater32bit<Rule, T> updater(
                    {element(t), static_cast<T*>(t.p), static_cast<float*>(t.state1), static_cast<float*>(t.state2),
                     nullptr, t.n, problem.rule, problem.configs + i});
                const int64_t end = last * kOptimizerBlock;
                updater.run(first * kOptimizerBlock, end < t.n ? end : t.n);
            });
            return;
        }
        const bnb_optimizer_tensor& final = tensors[problem.count - 1];
        const int64_t amount = (final.first_block - tensors[0].first_block) * kOptimizerBlock + final.n;
        const StateMaps maps(problem.qmap1, Rule::kStates > Rule::kFirst ? problem.qmap2 : nullptr, amount);
        for_blocks_of_many(tensors, problem.count, threads, [&](int64_t i, int64_t first, int64_t last) {
            const bnb_optimizer_tensor& t = tensors[i];
            const Updater8bit<Rule, T> updater(
                {element(t), problem.qmap1, problem.qmap2, static_cast<T*>(t.p), static_cast<uint8_t*>(t.state1),
                 static_cast<uint8_t*>(t.state2), t.absmax1, t.absmax2, t.n, problem.rule, problem.configs + i},
                maps);
            updater.run(first, last);
        });
    });
}

BNB_NAMESPACE_END
