// (x @ down) @ up for a few rows of float32 at a time, so that each number of the two matrices is loaded once for all.

// sums[i] += rows[i] @ matrix[:, k : k + wide vectors] over d rows of the matrix.
template <int count, int wide, class M>
HOT void project_tile(const float* rows, long row_stride, const M* matrix, long ranks, long d, float* sums) {
  constexpr long chain = 64;  // additions in a row: longer chains lose digits
  for (long first = 0; first < d; first += chain) {
    const long last = first + chain < d ? first + chain : d;
    Reg sum[count][wide];
    UNROLL for (int i = 0; i < count; ++i)
      UNROLL for (int j = 0; j < wide; ++j) sum[i][j] = Vector::set1(0.0f);
    for (long c = first; c < last; ++c) {
      Reg column[wide];
      UNROLL for (int j = 0; j < wide; ++j) column[j] = Vector::load(matrix + c * ranks + j * lanes);
      UNROLL for (int i = 0; i < count; ++i) {
        const Reg x = Vector::set1(rows[i * row_stride + c]);
        UNROLL for (int j = 0; j < wide; ++j) sum[i][j] = Vector::multiply_add(x, column[j], sum[i][j]);
      }
    }
    UNROLL for (int i = 0; i < count; ++i)
      UNROLL for (int j = 0; j < wide; ++j) {
        float* total = sums + i * ranks + j * lanes;
        Vector::store(total, first == 0 ? sum[i][j] : Vector::add(Vector::load(total), sum[i][j]));
      }
  }
}

// rows[i][c ...] += sums[i] @ matrix[:, c : c + wide vectors] over the ranks.
template <int count, int wide, class M>
HOT void lift_tile(float* rows, long row_stride, const float* sums, long sums_stride, const M* matrix, long rank,
                   long d) {
  Reg v[count][wide];
  UNROLL for (int i = 0; i < count; ++i)
    UNROLL for (int j = 0; j < wide; ++j) v[i][j] = Vector::load(rows + i * row_stride + j * lanes);
  for (long k = 0; k < rank; ++k) {
    Reg row[wide];
    UNROLL for (int j = 0; j < wide; ++j) row[j] = Vector::load(matrix + k * d + j * lanes);
    UNROLL for (int i = 0; i < count; ++i) {
      const Reg t = Vector::set1(sums[i * sums_stride + k]);
      UNROLL for (int j = 0; j < wide; ++j) v[i][j] = Vector::multiply_add(t, row[j], v[i][j]);
    }
  }
  UNROLL for (int i = 0; i < count; ++i)
    UNROLL for (int j = 0; j < wide; ++j) Vector::store(rows + i * row_stride + j * lanes, v[i][j]);
}

// The low-rank term of `count` rows; ranks is the rank, rounded up to whole vectors (down is padded with zeros to that).
template <int count, class M>
void project_rows(const float* rows, long d, const M* down, long ranks, float* sums) {
  long k = 0;
  for (; k + 2 * lanes <= ranks; k += 2 * lanes) project_tile<count, 2>(rows, d, down + k, ranks, d, sums + k);
  if (k < ranks) project_tile<count, 1>(rows, d, down + k, ranks, d, sums + k);
}

template <int count, class M>
void lift_rows(float* rows, long d, const float* sums, long ranks, const M* up, long rank) {
  long c = 0;
  for (; c + 2 * lanes <= d; c += 2 * lanes) lift_tile<count, 2>(rows + c, d, sums, ranks, up + c, rank, d);
  if (c < d) lift_tile<count, 1>(rows + c, d, sums, ranks, up + c, rank, d);
}

constexpr long together = Vector::rows_together;

// sums[i] = rows[i] @ down, and rows[i] += sums[i] @ up: as many rows as fit at once, or singly.
void project(const float* rows, long count, const LowRank& term, long d, float* sums) {
  with_type(term.down_dtype, [&]<class M>(const M*) {
    const M* down = static_cast<const M*>(term.down);
    if (count == together) return project_rows<together>(rows, d, down, term.ranks, sums);
    for (long i = 0; i < count; ++i) project_rows<1>(rows + i * d, d, down, term.ranks, sums + i * term.ranks);
  });
}

void lift(float* rows, long count, const float* sums, const LowRank& term, long d) {
  with_type(term.up_dtype, [&]<class M>(const M*) {
    const M* up = static_cast<const M*>(term.up);
    if (count == together) return lift_rows<together>(rows, d, sums, term.ranks, up, term.rank);
    for (long i = 0; i < count; ++i) lift_rows<1>(rows + i * d, d, sums + i * term.ranks, term.ranks, up, term.rank);
  });
}
