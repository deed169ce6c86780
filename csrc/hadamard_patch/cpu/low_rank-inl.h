// (x @ down) @ up for rows of float32 in scratch. A few rows at a time share what is loaded of the two matrices (a tile);
// several tiles share a panel, two vectors wide, that is widened and put together once for all of them: the matrices of a
// wide patch fit in no cache that is near, and the rows of `up` lie a power of two apart, in the same sets of it.

constexpr long tile = Vector::rows_together;
constexpr long chain = 64;  // additions in a row: longer chains lose digits

// How many rows to put in scratch: up to four tiles, while they leave room in a second-level cache.
long rows_at_once(const LowRank& term, long d) {
  if (!term.rank) return 1;
  const long fitting = (1L << 17) / d / tile * tile;
  return fitting < tile ? tile : fitting > 4 * tile ? 4 * tile : fitting;
}

long panel_floats(const LowRank& term) { return term.rank ? 2 * lanes * (term.rank < chain ? chain : term.rank) : 0; }

template <int wide, class M>
HOT void pack(const M* matrix, long stride, long length, float* panel) {
  for (long c = 0; c < length; ++c)
    UNROLL for (int j = 0; j < wide; ++j)
      Vector::store(panel + (c * wide + j) * lanes, Vector::load(matrix + c * stride + j * lanes));
}

// sums[i] (+)= rows[i] @ matrix[:, : wide vectors] over `length` rows of the matrix.
template <int count, int wide, class M>
HOT void project_tile(const float* rows, long d, const M* matrix, long stride, long length, float* sums, long ranks,
                      bool first) {
  Reg sum[count][wide];
  UNROLL for (int i = 0; i < count; ++i)
    UNROLL for (int j = 0; j < wide; ++j) sum[i][j] = Vector::set1(0.0f);
  for (long c = 0; c < length; ++c) {
    Reg column[wide];
    UNROLL for (int j = 0; j < wide; ++j) column[j] = Vector::load(matrix + c * stride + j * lanes);
    UNROLL for (int i = 0; i < count; ++i) {
      const Reg x = Vector::set1(rows[i * d + c]);
      UNROLL for (int j = 0; j < wide; ++j) sum[i][j] = Vector::multiply_add(x, column[j], sum[i][j]);
    }
  }
  UNROLL for (int i = 0; i < count; ++i)
    UNROLL for (int j = 0; j < wide; ++j) {
      float* total = sums + i * ranks + j * lanes;
      Vector::store(total, first ? sum[i][j] : Vector::add(Vector::load(total), sum[i][j]));
    }
}

// rows[i][: wide vectors] += sums[i] @ matrix[:, : wide vectors].
template <int count, int wide, class M>
HOT void lift_tile(float* rows, long d, const float* sums, long ranks, const M* matrix, long stride, long rank) {
  Reg v[count][wide];
  UNROLL for (int i = 0; i < count; ++i)
    UNROLL for (int j = 0; j < wide; ++j) v[i][j] = Vector::load(rows + i * d + j * lanes);
  for (long k = 0; k < rank; ++k) {
    Reg row[wide];
    UNROLL for (int j = 0; j < wide; ++j) row[j] = Vector::load(matrix + k * stride + j * lanes);
    UNROLL for (int i = 0; i < count; ++i) {
      const Reg t = Vector::set1(sums[i * ranks + k]);
      UNROLL for (int j = 0; j < wide; ++j) v[i][j] = Vector::multiply_add(t, row[j], v[i][j]);
    }
  }
  UNROLL for (int i = 0; i < count; ++i)
    UNROLL for (int j = 0; j < wide; ++j) Vector::store(rows + i * d + j * lanes, v[i][j]);
}

template <int wide, class M>
void project_columns(const float* rows, long count, long d, const M* down, long ranks, float* sums, float* panel) {
  for (long c = 0; c < d; c += chain) {
    const long length = d - c < chain ? d - c : chain;
    if (count == 1) {
      project_tile<1, wide>(rows + c, d, down + c * ranks, ranks, length, sums, ranks, c == 0);
      continue;
    }
    pack<wide>(down + c * ranks, ranks, length, panel);
    for (long i = 0; i < count; i += tile)
      project_tile<tile, wide>(rows + i * d + c, d, panel, wide * lanes, length, sums + i * ranks, ranks, c == 0);
  }
}

template <int wide, class M>
void lift_columns(float* rows, long count, long d, const float* sums, long ranks, const M* up, long rank, float* panel) {
  if (count == 1) return lift_tile<1, wide>(rows, d, sums, ranks, up, d, rank);
  pack<wide>(up, d, rank, panel);
  for (long i = 0; i < count; i += tile)
    lift_tile<tile, wide>(rows + i * d, d, sums + i * ranks, ranks, panel, wide * lanes, rank);
}

// sums[i] = rows[i] @ down. Of several rows, whole tiles are worked on: the rows that are missing become zeros.
void project(float* rows, long count, const LowRank& term, long d, float* sums, float* panel) {
  const long missing = count == 1 ? 0 : (tile - count % tile) % tile;
  for (long c = count * d; c < (count + missing) * d; c += lanes) Vector::store(rows + c, Vector::set1(0.0f));
  with_type(term.down_dtype, [&]<class M>(const M*) {
    const M* down = static_cast<const M*>(term.down);
    long k = 0;
    for (; k + 2 * lanes <= term.ranks; k += 2 * lanes)
      project_columns<2>(rows, count, d, down + k, term.ranks, sums + k, panel);
    if (k < term.ranks) project_columns<1>(rows, count, d, down + k, term.ranks, sums + k, panel);
  });
}

// rows[i] += sums[i] @ up, in the same tiles.
void lift(float* rows, long count, const float* sums, const LowRank& term, long d, float* panel) {
  with_type(term.up_dtype, [&]<class M>(const M*) {
    const M* up = static_cast<const M*>(term.up);
    long c = 0;
    for (; c + 2 * lanes <= d; c += 2 * lanes)
      lift_columns<2>(rows + c, count, d, sums, term.ranks, up + c, term.rank, panel);
    if (c < d) lift_columns<1>(rows + c, count, d, sums, term.ranks, up + c, term.rank, panel);
  });
}
