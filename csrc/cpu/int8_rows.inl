// The activations of an int8 product.
#pragma once

BNB_NAMESPACE_BEGIN

constexpr int64_t kTaskColumns = 64;  // of a range that is finished at once, at most; a multiple of every kWidth
constexpr int64_t kPadding = 64;      // rows of A end on whole steps, and do not all start in one cache set

// Rows of activations as tiles read them, and for each row what kOffset adds to its sums.
class Int8Rows {
  public:
    Int8Rows(int64_t rows, int64_t K)
        : rows_(rows),
          K_(K),
          stride_((K + 63) / 64 * 64 + kPadding),
          data_(static_cast<size_t>(rows * stride_) * sizeof(Activation)),
          surplus_(static_cast<size_t>(rows) * sizeof(int32_t)) {}

    const Activation* row(int64_t r) const { return data_.as<Activation>() + r * stride_; }
    int64_t rows() const { return rows_; }
    int64_t K() const { return K_; }
    int64_t stride() const { return stride_; }
    int32_t surplus(int64_t r) const { return surplus_.as<int32_t>()[r]; }

    // Take over row r; `codes` has stride() bytes, of which those after K are overwritten.
    void set(int64_t r, int8_t* codes) {
        Activation* target = data_.as<Activation>() + r * stride_;
        memset(codes + K_, 0, static_cast<size_t>(stride_ - K_));
        I32 sum = broadcast(int32_t(0));
        const Weights one = ones();
        for (int64_t k = 0; k < stride_; k += kDotBytes) {
            widen(target + k, codes + k);
            if (kOffset) sum = dot(sum, target + k, one);
        }
        int32_t sums[4];
        const I32 four[4] = {sum, sum, sum, sum};
        store_sums(sums, four);
        surplus_.as<int32_t>()[r] = kOffset * sums[0];
    }

  private:
    int64_t rows_, K_, stride_;
    Scratch data_, surplus_;
};

BNB_NAMESPACE_END
