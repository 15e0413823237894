// ---- backward: weights from the saved lse; an item owns the keys of one segment, so nothing is shared and every sum has one order ---
// P = exp(score - lse), dP = dO V^T, dS = P (dP - delta) with delta = rowsum(dO O) - d lse; dQ = dS K, dK = dS^T Q, dV = P^T dO.
struct Segment {
    Box box;                       // its keys
    int64_t rows;                  // of its sums: prefix tokens first where it holds all keys
    int64_t piece[RANK], end[RANK];
};
// segments [from, to) of axis 0 (which overlap or follow each other) and segment `other[a]` of each other axis as one
INLINE Segment segment_of(const Problem& P, int64_t from, int64_t to, const int64_t* other) {
    Segment s;
    for (int a = 0; a < RANK; a++) {
        const int32_t *x = P.axes[a].segment + 5 * (a ? other[a] : from), *y = P.axes[a].segment + 5 * (a ? other[a] : to - 1);
        s.piece[a] = x[0]; s.end[a] = y[1];
        s.box.first[a] = x[2]; s.box.step[a] = x[3]; s.box.extent[a] = y[4] ? (y[2] - x[2]) / x[3] + y[4] : 0;
    }
    s.box.close();
    s.rows = s.box.count + (P.whole ? P.k_prefix : 0);
    return s;
}
struct Item {                  // one segment of one (batch, key head): its tiles, for each query head of the group
    int64_t b, kv, number, tiles, each, count;
    Segment segment;
    bool alone;                // one tile: what it computes are the sums
    void aim(const Problem& P, const Order& order, int64_t item, int64_t segments) {
        int64_t other[RANK];
        order.item(P, P.kv_heads, item, segments, b, kv, number);
        for (int64_t a = RANK - 1, s = number; a >= 0; s /= P.axes[a].segments, a--) other[a] = s % P.axes[a].segments;
        segment = segment_of(P, other[0], other[0] + 1, other);
        tiles = 1;
        for (int a = 0; a < RANK; a++) tiles *= segment.end[a] - segment.piece[a];
        each = tiles + (P.whole && other[0] == 0 ? (P.q_prefix + TILE - 1) / TILE : 0);
        count = each * (P.heads / P.kv_heads);
        alone = !P.split && !P.whole && count == 1 && segment.rows <= CHUNK;
@LISTS@        alone &= !P.list_offset;
@GAPS@        alone &= !P.gaps;       // keys that the tile passes over have rows, too
    }
    int64_t head(const Problem& P, int64_t n) const { return kv * (P.heads / P.kv_heads) + n / each; }
};
struct Aimed {                 // a tile, its first chunk of keys, and where its rows lie in each (batch, head)
    Tile tile;
    Keys keys;
    int64_t *q_offset, *out_offset, *grad_offset, *lse_offset, *grad_lse_offset, *dq_offset, segment, number;
    int64_t *dk_offset, *dv_offset;     // of the keys, where the item is one tile
    static size_t bytes() { return Tile::bytes() + Keys::bytes() + 6 * (TILE * 8 + 64) + 2 * (CHUNK * 8 + 64); }
    void allocate(Arena& arena) {
        tile.allocate(arena); keys.allocate(arena);
        for (int64_t** p : {&q_offset, &out_offset, &grad_offset, &lse_offset, &grad_lse_offset, &dq_offset}) *p = arena.take<int64_t>(TILE);
        dk_offset = arena.take<int64_t>(CHUNK); dv_offset = arena.take<int64_t>(CHUNK);
        segment = number = -1;
    }
    bool is_at(const Item& item, int64_t n) const { return segment == item.number && number == n % item.each; }
    // tile number n of an item
    void aim(const Problem& P, const Item& item, int64_t n) {
        segment = item.number; number = n % item.each;
        int64_t left = number, from = 0;
        if (left < item.tiles) {
            int64_t piece[RANK];
            for (int a = RANK - 1; a >= 0; a--) {
                const int64_t count = item.segment.end[a] - item.segment.piece[a];
                piece[a] = item.segment.piece[a] + left % count;
                left /= count;
            }
            tile.aim(P, piece);
        } else {
            from = (left - item.tiles) * TILE;
            tile.aim_prefix(P, from, min(P.q_prefix, from + TILE));
        }
        tile.place(P, P.q_layout, from, q_offset);
        tile.place(P, P.dq_layout, from, dq_offset);
        tile.place(P, P.out_layout, from, out_offset);
        tile.place(P, P.grad_out_layout, from, grad_offset);
        tile.place(P, P.lse_layout, from, lse_offset);
        if (P.grad_lse) tile.place(P, P.grad_lse_layout, from, grad_lse_offset);
        keys.count = 0;
        if (tile.chunks(P)) keys.aim(P, tile, 0);
        if (item.alone) {
            int64_t before[RANK];
            for (int a = 0; a < RANK; a++) before[a] = P.axes[a].keys_before;
            offsets(P.dk_layout, tile.k_box, before, P.k_grid, 0, keys.count, dk_offset);
            offsets(P.dv_layout, tile.k_box, before, P.k_grid, 0, keys.count, dv_offset);
        }
    }
};
struct Backward {
    const Problem& P;
    Aimed aimed[2], *here = aimed, *next = aimed + 1;
    Keys places;                   // of what is written at a segment's end
    Loads loads;
    Masks masks;
    Numbers numbers;
    Panels k_panels, v_panels;
    real *q, *g, *dq, *k, *v, *weights, *slopes, *dk, *dv, *row_lse, *row_rest, *delta, *lse_slope, *rounding, *spare;
    double* table_sums[TABLES + 1];
    int64_t* sum_row;
    int64_t stride;                // of rows of `weights` and `slopes`
    element* dq_corner;
    bool whole_rows;               // all of a row's weights are in one chunk
    bool direct, dq_direct;        // dk and dv, dq are written as they are computed
    int odd;                       // keys that are in no panel
    struct Ahead {                 // what the next tile needs, prefetched a few rows at a time: all at once would fill the line buffers
        const element *q, *k, *v, *out, *grad_out, *dq, *dk, *dv;
        int query, key, queries, keys, pace;
    } ahead;

    static constexpr int64_t WIDEST = CHUNK + 2 * L;
    Backward(const Problem& P, Arena& arena) : P(P), loads(P) {
        arena.reserve(2 * Aimed::bytes() + Keys::bytes() + Masks::bytes() + loads.bytes(true) + 64 * 32 + 8 * CHUNK
                      + sizeof(real) * (TILE * (2 * DP + VP + 5 + 2 * WIDEST) + CHUNK * (3 * DP + 3 * VP + LOADS)));
        aimed[0].allocate(arena); aimed[1].allocate(arena); places.allocate(arena);
        loads.allocate(arena, true);
        masks.rows = arena.take<real>(Masks::MOST * CHUNK);
        spare = arena.take<real>(LOADS * CHUNK);
        q = arena.take<real>(TILE * DP); dq = arena.take<real>(TILE * DP); g = arena.take<real>(TILE * VP);
        row_lse = arena.take<real>(TILE); row_rest = arena.take<real>(TILE); delta = arena.take<real>(TILE);
        lse_slope = arena.take<real>(TILE); rounding = arena.take<real>(TILE);
        weights = arena.take<real>(TILE * WIDEST); slopes = arena.take<real>(TILE * WIDEST);
        sum_row = arena.take<int64_t>(CHUNK);
        k = arena.take<real>(CHUNK * DP); k_panels.data = arena.take<real>(CHUNK * DP); dk = arena.take<real>(CHUNK * DP);
        v = arena.take<real>(CHUNK * VP); v_panels.data = arena.take<real>(CHUNK * VP); dv = arena.take<real>(CHUNK * VP);
    }

    // Weights and score gradients of one query over the keys [from, to), in place of q . k and dP.
    template <bool PLAIN> INLINE void row(int i, int r, int from, int to) {
        const Tile& tile = here->tile;
        const Keys& keys = here->keys;
        real *w = weights + i * stride, *d = slopes + i * stride;
        const real* elements[LOADS + 1];
        if (!PLAIN) loads.rows(P, numbers, tile, keys, i, r, from, to, elements);
        const V shift = splat(row_lse[i]), rest = splat(row_rest[i]), mean = splat(delta[i]), unit = unit_of(numbers);
        V total{}, balance{};
        each_score<PLAIN>(P, numbers, tile, keys, masks, elements, w, i, from, to, [&](int j, V s, V x, bool) __attribute__((always_inline)) {
            const V units = natural(x, numbers), e = SOFTMAX ? exp2_vector(exponent(x, shift, unit) - rest) : weight_of(units);
            V dp = load(d + j), weight = e, post_dp = dp;
            if constexpr (SOFTMAX) total += e;
@DROPOUT@            const V kept = dropout(P, numbers, tile.terms[i], keys.terms, j);
@DROPOUT@            weight *= kept; dp *= kept; post_dp *= kept;
            if constexpr (!PLAIN && POST) {
                const V factor = post(P, numbers, tile.terms[i], keys.terms, elements, j);
                weight *= factor; post_dp *= factor;
            }
            V ds = SOFTMAX ? e * (post_dp - mean) : post_dp * weight_slope(units, e);
            if constexpr (SOFTMAX) balance += ds;
            if constexpr (!PLAIN && LOADS > 0) {
                V slope[LOADS + 1], post_slope[LOADS + 1];
                load_slopes(P, numbers, tile.terms[i], keys.terms, elements, j, s, slope);
                if constexpr (POST) post_slopes(P, numbers, tile.terms[i], keys.terms, elements, j, post_slope);
                for (int l = 0; l < LOADS; l++) {
                    V change = ds * slope[l];
                    if constexpr (POST) change += e * dp * post_slope[l];
                    change = select(e > V{}, change, V{});      // a pair that is not there may have an infinite slope
                    if (loads.expansion[l]) {
                        real* sums = loads.expansion[l]->sums + loads.expansion[l]->place[i] + j;
                        store(sums, load(sums) + change);
                    } else store(spare + l * CHUNK + j, change);
                }
            }
            if constexpr (!PLAIN && SCORE_SLOPE) ds = select(e > V{}, ds * score_slope(P, numbers, tile.terms[i], keys.terms, elements, j, s), V{});
            store(w + j, weight);
            store(d + j, ds);
        });
        if constexpr (SOFTMAX) if (whole_rows) {
            const V sums = fold_rows<2>({total, balance}, [](V a, V b) { return a + b; });
            const real off = sums[0] - 1;
            if ((off < 0 ? -off : off) <= rounding[i]) {
                const real factor = 1 - off;       // 1 / sums[0], as good as it
                // Gradients of scores add up to that of lse. What rounding adds to that sum would move dq by as much of the keys' mean,
                // which is all there is of it where keys are alike.
                real surplus = !PLAIN && (POST || SCORE_SLOPE) ? 0 : sums[1] * factor - lse_slope[i];
@DROPOUT@                surplus = 0;
                for (int j = from; j < to; j += L) {
                    const V weight = load(w + j) * splat(factor);
                    store(w + j, weight);
                    store(d + j, load(d + j) * splat(factor) - weight * splat(surplus));
                }
            }
        }
        if constexpr (!PLAIN) for (int l = 0; l < LOADS; l++) if (!loads.expansion[l]) {
            double* sums = table_sums[LOAD_TABLE[l]];
            for (int j = from; j < min(to, keys.count); j++) if (spare[l * CHUNK + j] != 0) sums[loads.offset(P, numbers, tile, keys, l, i, j)] += spare[l * CHUNK + j];
        }
    }
    // Products of m rows of `a` with the one or two keys (or values) after the last whole vector, which a vector of their own would
    // mostly waste: sums over lanes of channels.
    template <int W> INLINE void odd_products(int m, const real* a, const real* b, real* to) const {
        if constexpr (ROWS <= L) {
            constexpr int width = up(W, L);
            V dot[2];
            for (int t = 0; t < odd; t++, b += width) {
                V s[ROWS];
                UNROLL for (int r = 0; r < ROWS; r++) {
                    s[r] = V{};
                    if (r < m) for (int d = 0; d < W; d += L) s[r] += load(a + r * width + d) * load(b + d);
                }
                dot[t] = fold_rows<ROWS>(s, [](V x, V y) { return x + y; });
            }
            UNROLL for (int r = 0; r < ROWS; r++) if (r < m)
                store(to + r * stride, odd > 1 ? select(lanes() < splat_integer(1), lane(dot[0], r), lane(dot[1], r)) : lane(dot[0], r));
        }
    }
    // m queries from i on against the packed chunk
    void rows(int i, int m) {
        const Tile& tile = here->tile;
        const Keys& keys = here->keys;
        const Run run = run_of_rows(tile, keys, i, m);
        const int width = up(keys.count, L), first = run.begin / L, last = (run.end + L - 1) / L;
        const int from = min(first * L, width), to = run.begin < run.end ? last * L : from;
        if (from > 0 || to < width) for (int r = i; r < i + m; r++) for (real* x : {weights + r * stride, slopes + r * stride}) {
            memset(x, 0, sizeof(real) * from);
            memset(x + to, 0, sizeof(real) * (width - to));
        }
        if (from == to) { if (dq_direct) write_dq(i, m); return; }
        const bool plain = tile.prefix || keys.prefix;
        const int whole = keys.count - odd;
        if (odd) odd_products<D>(m, q + i * DP, k + whole * DP, weights + i * stride + whole);
        if (odd) odd_products<DV>(m, g + i * VP, v + whole * VP, slopes + i * stride + whole);
        if (USES_SCORE || plain) multiply_panels<D>(m, q + i * DP, k_panels, first, last, weights + i * stride, stride);
        else for (int r = i; r < i + m; r++) memset(weights + r * stride, 0, sizeof(real) * width);
        multiply_panels<DV>(m, g + i * VP, v_panels, first, last, slopes + i * stride, stride);
        for (int r = 0; r < m; r++) if ((PLAIN_SCORE && !tile.asks()) || plain) row<true>(i + r, r, from, to); else row<false>(i + r, r, from, to);
        const Scalars slope{slopes + i * stride + run.begin, stride, 1};
        if (dq_direct && run.end - run.begin <= LONGEST_SUM)
            return multiply_out<D>(m, slope, run.end - run.begin, k + run.begin * DP, dq_corner, here->dq_offset + i, real(P.scale));
        if (USES_SCORE || plain) multiply<D>(m, slope, run.end - run.begin, k + run.begin * DP, dq + i * DP, true);
        if (dq_direct) write_dq(i, m);
    }
    void write_dq(int i, int m) { for (int r = i; r < i + m; r++) write_row<D>(P.continues & 1, dq_corner + here->dq_offset[r], P.dq_layout, dq + r * DP, P.scale); }
    template <int W> static INLINE void write_row(bool add, element* to, const Layout& t, const real* row, real factor) {
        if (add) add_row<W>(to, t.channel, row, factor); else store_row<W>(to, t.channel, row, factor);
    }
    INLINE void look_ahead() {
        for (int n = 0; n < ahead.pace && ahead.query < ahead.queries; n++, ahead.query++) {
            prefetch<D>(ahead.q + next->q_offset[ahead.query], P.q_layout.channel);
            prefetch<DV>(ahead.out + next->out_offset[ahead.query], P.out_layout.channel);
            prefetch<DV>(ahead.grad_out + next->grad_offset[ahead.query], P.grad_out_layout.channel);
            prefetch_for_writing<D>(ahead.dq + next->dq_offset[ahead.query], P.dq_layout.channel);
        }
        for (int n = 0; n < ahead.pace && ahead.key < ahead.keys; n++, ahead.key++) {
            if (PADDED && !next->keys.real_key[ahead.key]) continue;
            prefetch<D>(ahead.k + next->keys.k_offset[ahead.key], P.k_layout.channel);
            prefetch<DV>(ahead.v + next->keys.v_offset[ahead.key], P.v_layout.channel);
            if (direct) {
                prefetch_for_writing<D>(ahead.dk + next->dk_offset[ahead.key], 1);
                prefetch_for_writing<DV>(ahead.dv + next->dv_offset[ahead.key], 1);
            }
        }
    }
    template <class T> static INLINE T* corner(T* data, const Layout& t, int64_t b, int64_t h) { return data + b * t.batch + h * t.head; }
    // One tile, `here`, of (b, h): writes dq, adds to the segment's sums of dk and dv (`alone`: the sums are this tile's only).
    // `more`: `next` follows, of (next_b, next_h).
    void run(int64_t b, int64_t h, const Segment& segment, real* dk_sums, real* dv_sums, bool alone, bool more, int64_t next_b, int64_t next_h) {
        Tile& tile = here->tile;
        Keys& keys = here->keys;
        const int64_t *q_offset = here->q_offset, *out_offset = here->out_offset, *grad_offset = here->grad_offset, *lse_offset = here->lse_offset;
        tile.look_at(P, b, h);
        numbers = numbers_of(P, tile);
        const int64_t kv = tile.kv_head, next_kv = next_h / (P.heads / P.kv_heads);
        const element *q_corner = corner(P.q, P.q_layout, b, h), *k_corner = corner(P.k, P.k_layout, b, kv), *v_corner = corner(P.v, P.v_layout, b, kv);
        const element *out_corner = corner(P.out, P.out_layout, b, h), *grad_corner = corner(P.grad_out, P.grad_out_layout, b, h);
        const real *lse_corner = corner(P.lse, P.lse_layout, b, h), *grad_lse_corner = corner(P.grad_lse, P.grad_lse_layout, b, h);
        dq_corner = corner(P.dq, P.dq_layout, b, h);
        dq_direct = !(P.continues & 1) && tile.chunks(P) == 1 && P.dq_layout.channel == 1 && (USES_SCORE || tile.prefix);
        ahead = {corner(P.q, P.q_layout, next_b, next_h), corner(P.k, P.k_layout, next_b, next_kv), corner(P.v, P.v_layout, next_b, next_kv),
                 corner(P.out, P.out_layout, next_b, next_h), corner(P.grad_out, P.grad_out_layout, next_b, next_h), corner(P.dq, P.dq_layout, next_b, next_h),
                 corner(P.dk, P.dk_layout, next_b, next_kv), corner(P.dv, P.dv_layout, next_b, next_kv), 0, 0, more ? next->tile.queries : 0, more ? next->keys.count : 0, 0};
        ahead.pace = (max(ahead.queries, ahead.keys) * ROWS + 3 * tile.queries - 1) / (3 * tile.queries);
        memset(dq, 0, sizeof(real) * tile.queries * DP);
        for (int i = 0; i < tile.queries; i++) {
            load_query(P, q_corner + q_offset[i], q + i * DP);
            load_row<DV>(grad_corner + grad_offset[i], P.grad_out_layout.channel, g + i * VP);
            alignas(64) real out[VP];
            load_row<DV>(out_corner + out_offset[i], P.out_layout.channel, out);
            V dot{};
            for (int d = 0; d < VP; d += L) dot += load(out + d) * load(g + i * VP + d);
            const real lse = lse_corner[lse_offset[i]];
            lse_slope[i] = P.grad_lse && lse != -INF ? grad_lse_corner[here->grad_lse_offset[i]] : 0;
            delta[i] = sum(dot) - lse_slope[i];
            const double in_units = PLAIN_SCORE ? lse * 1.4426950408889634 : lse;
            row_lse[i] = lse == -INF ? INF : real(in_units);
            row_rest[i] = lse == -INF ? 0 : real(in_units - row_lse[i]);     // what rounding took: a weight depends on it
            rounding[i] = lse == -INF ? 0 : (2 + (lse < 0 ? -lse : lse)) * EPSILON;
        }
        whole_rows = tile.chunks(P) == 1;
        for (int64_t n = 0; n < tile.chunks(P); n++) {
            if (keys.chunk != n) keys.aim(P, tile, n);
            keys.look_at(P, tile);
            odd = keys.count % L;
            if (odd > 2 || keys.count < L || ROWS > L || !USES_SCORE || !tile.uniform || tile.asks() || PADDED || tile.prefix || keys.prefix) odd = 0;
            keys.gather<D>(k_corner, P.k_layout.channel, keys.k_offset, P.pad_k + kv * P.pad_k_head, k);
            pack_panels<D>(k_panels, k, keys.count - odd);
            keys.pack<DV>(v_corner, P.v_layout.channel, keys.v_offset, P.pad_v + kv * P.pad_v_head, v, v_panels, odd);
            for (int t = keys.count - odd; t < keys.count; t++) load_row<DV>(v_corner + keys.v_offset[t], P.v_layout.channel, v + t * VP);
            masks.aim(tile, keys);
            loads.aim(P, numbers, tile, keys, table_sums);
            stride = up(keys.count, L) + L;
            if (stride / L % 2 == 0) stride += L;      // rows that lie a power of two apart would share cache sets
            const bool last = n + 1 == tile.chunks(P);
            for (int i = 0, m; i < tile.queries; i += m) {
                m = share(tile.queries - i, ROWS);
                rows(i, m);
                if (last) look_ahead();
            }
            const bool product = USES_SCORE || tile.prefix || keys.prefix;
            real *dk_here = alone ? dk_sums : dk, *dv_here = alone ? dv_sums : dv;
            for (int j = 0, m; j < keys.count; j += m) {
                m = share(keys.count - j, ROWS);
                const Scalars slope{slopes + j, 1, stride}, weight{weights + j, 1, stride};
                if (!direct) {
                    if (product) multiply<D>(m, slope, tile.queries, q, dk_here + j * DP, false);
                    multiply<DV>(m, weight, tile.queries, g, dv_here + j * VP, false);
                } else {
                    multiply_out<D>(m, slope, tile.queries, q, corner(P.dk, P.dk_layout, b, kv), here->dk_offset + j, real(P.scale < 0 ? -P.scale : P.scale));
                    if (last) look_ahead();
                    multiply_out<DV>(m, weight, tile.queries, g, corner(P.dv, P.dv_layout, b, kv), here->dv_offset + j, 1);
                }
                if (last) look_ahead();
            }
            if (direct) continue;
            if (alone) {
                if (!product) memset(dk_here, 0, sizeof(real) * keys.count * DP);
                continue;
            }
            rows_of(segment);
            for (int j = 0; j < keys.count; j++) {
@LISTS@                if (sum_row[j] < 0) continue;
                real *x = dk_sums + sum_row[j] * DP, *y = dv_sums + sum_row[j] * VP;
                if (product) for (int d = 0; d < DP; d += L) store(x + d, load(x + d) + load(dk + j * DP + d));
                for (int d = 0; d < VP; d += L) store(y + d, load(y + d) + load(dv + j * VP + d));
            }
        }
        if (!dq_direct || !tile.chunks(P)) write_dq(0, tile.queries);
    }
    // rows of the chunk's keys among the segment's sums
    void rows_of(const Segment& segment) {
        const Tile& tile = here->tile;
        const Keys& keys = here->keys;
        if (keys.prefix) { for (int j = 0; j < keys.count; j++) sum_row[j] = keys.begin + j; return; }
@LISTS@        if (tile.list) return rows_of_block(segment);
        int64_t inner[RANK];
        inner[RANK - 1] = 1;
        for (int a = RANK - 1; a > 0; a--) inner[a - 1] = inner[a] * segment.box.extent[a];
        tile.boxes(keys.begin, keys.end, [&](const Box& box, int64_t from, int64_t to, int64_t at) {
            box.runs(from, to, [&](int64_t n, const int64_t* index, int64_t length) {
                int64_t base = segment.rows - segment.box.count;
                for (int a = 0; a < RANK; a++) base += (box.first[a] + box.step[a] * index[a] - segment.box.first[a]) / segment.box.step[a] * inner[a];
                const int64_t step = box.step[RANK - 1] / segment.box.step[RANK - 1];
                for (int64_t i = 0; i < length; i++) sum_row[at + n + i] = base + i * step;
            });
        });
    }
@LISTS@    // the same for a listed block, which may hold keys that no query of the segment sees: -1
@LISTS@    void rows_of_block(const Segment& segment) {
@LISTS@        const Box& box = here->keys.box;
@LISTS@        box.runs(0, box.count, [&](int64_t n, const int64_t* index, int64_t length) {
@LISTS@            for (int64_t i = 0; i < length; i++) {
@LISTS@                int64_t row = 0;
@LISTS@                for (int a = 0; a < RANK; a++) {
@LISTS@                    const int64_t away = box.first[a] + box.step[a] * (index[a] + (a == RANK - 1 ? i : 0)) - segment.box.first[a];
@LISTS@                    const int64_t at = away / segment.box.step[a];
@LISTS@                    row = row < 0 || away < 0 || at >= segment.box.extent[a] ? -1 : row * segment.box.extent[a] + at;
@LISTS@                }
@LISTS@                sum_row[n + i] = row < 0 ? -1 : segment.rows - segment.box.count + row;
@LISTS@            }
@LISTS@        });
@LISTS@    }
    // Writes dk and dv of the sums' rows [from, to), given from row `from` on; virtual keys add to the gradients of their rows.
    void finish(int64_t b, int64_t kv, const Segment& segment, int64_t from, int64_t to, const real* dk_rows, const real* dv_rows, double* pads) {
        Keys& keys = this->places;
        const real magnitude = P.scale < 0 ? -P.scale : P.scale;     // q carried the sign
        const int64_t prefix = segment.rows - segment.box.count;
        int64_t before[RANK];
        for (int a = 0; a < RANK; a++) before[a] = P.axes[a].keys_before;
        for (int64_t n = from; n < to; n += CHUNK) {
            const int64_t stop = min(to, n + CHUNK), middle = min(max(prefix, n), stop), length = stop - n;
            prefix_offsets(P.dk_layout, n, middle, keys.k_offset);
            prefix_offsets(P.dv_layout, n, middle, keys.v_offset);
            offsets(P.dk_layout, segment.box, before, P.k_grid, middle - prefix, stop - prefix, keys.k_offset + (middle - n));
            offsets(P.dv_layout, segment.box, before, P.k_grid, middle - prefix, stop - prefix, keys.v_offset + (middle - n));
            for (int64_t i = 0; i < length; i++) keys.real_key[i] = true;
            if (PADDED) for (int a = 0; a < RANK; a++) {
                coordinates(segment.box, a, segment.box.first[a] - before[a], segment.box.step[a], middle - prefix, stop - prefix, keys.c[a] + (middle - n));
                for (int64_t i = middle - n; i < length; i++) keys.real_key[i] &= keys.c[a][i] >= 0 && keys.c[a][i] < P.axes[a].real_keys;
            }
            element *to_k = P.dk + b * P.dk_layout.batch + kv * P.dk_layout.head, *to_v = P.dv + b * P.dv_layout.batch + kv * P.dv_layout.head;
            for (int64_t i = 0; i < length; i++) {
                const real *x = dk_rows + (n - from + i) * DP, *y = dv_rows + (n - from + i) * VP;
                if (keys.real_key[i]) {
                    write_row<D>(P.continues & 2, to_k + keys.k_offset[i], P.dk_layout, x, magnitude);
                    write_row<DV>(P.continues & 2, to_v + keys.v_offset[i], P.dv_layout, y, 1);
                } else {
                    double* sums = pads + kv * (DP + VP);
                    for (int d = 0; d < DP; d++) sums[d] += x[d] * magnitude;
                    for (int d = 0; d < VP; d++) sums[DP + d] += y[d];
                }
            }
        }
    }
};
extern "C" bool attend_backward(const Problem* problem) {
    const Problem& P = *problem;
    int64_t segments = 1, others = 1, table_size = 0;
    for (int a = 0; a < RANK; a++) segments *= P.axes[a].segments;
    for (int a = 1; a < RANK; a++) others *= P.axes[a].segments;
    for (int t = 0; t < TABLES; t++) table_size += up(P.tables[t].last + 1, L);
    const int64_t items = P.batch * P.kv_heads * segments;
    const int64_t sums = P.sum_rows * (DP + VP), pad_size = PADDED ? P.kv_heads * (DP + VP) : 0;
    // one thread's sums each of a segment (of every segment where they share keys), of the tables, of the virtual keys' rows
    real* all_sums = (real*)aligned_alloc(64, sizeof(real) * max<int64_t>(sums, L) * (P.split ? items : P.threads));
    double* shared = (double*)aligned_alloc(64, sizeof(double) * max<int64_t>(P.threads * (table_size + pad_size), L));
    memset(shared, 0, sizeof(double) * P.threads * (table_size + pad_size));
#pragma omp parallel num_threads(P.threads)
    {
        static thread_local Arena arena;
        const int64_t thread = omp_get_thread_num();
        Backward work(P, arena);
        double *tables = shared + thread * (table_size + pad_size), *pads = tables + table_size;
        for (int64_t t = 0, at = 0; t < TABLES; at += up(P.tables[t].last + 1, L), t++) work.table_sums[t] = tables + at;
        const int64_t n = omp_get_num_threads(), stop = items * (thread + 1) / n;
        Item now, then;
        int64_t item = items * thread / n;
        const Order& order = work.loads.order;
        if (item < stop) { then.aim(P, order, item, segments); work.here->aim(P, then, 0); }
        for (; item < stop; item++) {
            now = then;
            if (item + 1 < stop) then.aim(P, order, item + 1, segments);
            real *dk = all_sums + (P.split ? item : thread) * sums, *dv = dk + P.sum_rows * DP;
            if (!now.alone) { memset(dk, 0, sizeof(real) * now.segment.rows * DP); memset(dv, 0, sizeof(real) * now.segment.rows * VP); }
            for (int64_t t = 0; t < now.count; t++) {
                const bool inside = t + 1 < now.count;
                const Item& following = inside ? now : then;
                const int64_t n = inside ? t + 1 : 0;
                work.next = work.here->is_at(following, n) ? work.here : work.here == work.aimed ? work.aimed + 1 : work.aimed;
                if (!work.next->is_at(following, n)) work.next->aim(P, following, n);
                work.direct = now.alone && !PADDED && !(P.continues & 2) && USES_SCORE && P.dk_layout.channel == 1 && P.dv_layout.channel == 1;
                work.run(now.b, now.head(P, t), now.segment, dk, dv, now.alone, inside || item + 1 < stop, following.b, following.head(P, n));
                work.here = work.next;
            }
            if (!P.split && !work.direct) work.finish(now.b, now.kv, now.segment, 0, now.segment.rows, dk, dv, pads);
        }
        work.loads.flush();
        if (P.split) {      // add up what the segments of one owner have for each key, in their order
#pragma omp barrier
            const int64_t owners = P.axes[0].owners, prefix = P.whole ? P.k_prefix : 0;
            int64_t lines = 1;
            for (int64_t o = 0; o < owners; o++) {
                const int64_t zero[RANK] = {};
                lines = max(lines, segment_of(P, P.axes[0].owner[2 * o], P.axes[0].owner[2 * o + 1], zero).box.extent[0]);
            }
#pragma omp for schedule(static)
            for (int64_t item = 0; item < P.batch * P.kv_heads * owners * others * lines; item++) {
                int64_t rest = item, other[RANK] = {};
                const int64_t line = rest % lines; rest /= lines;
                int64_t s = rest % others; rest /= others;
                const int64_t o = rest % owners; rest /= owners;
                const int64_t b = rest / P.kv_heads, kv = rest % P.kv_heads, other_number = s;
                for (int a = RANK - 1; a > 0; s /= P.axes[a].segments, a--) other[a] = s % P.axes[a].segments;
                const int64_t begin = P.axes[0].owner[2 * o], end = P.axes[0].owner[2 * o + 1];
                const Segment whole = segment_of(P, begin, end, other);
                const int64_t inner = whole.box.extent[0] ? whole.box.count / whole.box.extent[0] : 0;
                auto add = [&](int64_t from, int64_t to, int64_t line, bool in_prefix) {       // rows [from, to) of `whole`
                    for (int64_t n = from; n < to; n += CHUNK) {
                        const int64_t stop = min(to, n + CHUNK);
                        memset(work.dk, 0, sizeof(real) * (stop - n) * DP); memset(work.dv, 0, sizeof(real) * (stop - n) * VP);
                        for (int64_t part = begin; part < end; part++) {
                            const Segment x = segment_of(P, part, part + 1, other);
                            const int64_t first = (x.box.first[0] - whole.box.first[0]) / whole.box.step[0];
                            if (!in_prefix && (line < first || line >= first + x.box.extent[0])) continue;
                            const int64_t number = order.index(P, P.kv_heads, b, kv, part * others + other_number, segments);
                            const int64_t row = in_prefix ? n : n - first * inner;
                            const real *dk = all_sums + number * sums + row * DP, *dv = all_sums + number * sums + P.sum_rows * DP + row * VP;
                            for (int64_t i = 0; i < (stop - n) * DP; i += L) store(work.dk + i, load(work.dk + i) + load(dk + i));
                            for (int64_t i = 0; i < (stop - n) * VP; i += L) store(work.dv + i, load(work.dv + i) + load(dv + i));
                        }
                        work.finish(b, kv, whole, n, stop, work.dk, work.dv, pads);
                    }
                };
                if (line == 0) add(0, prefix, 0, true);
                if (line < whole.box.extent[0]) add(prefix + line * inner, prefix + (line + 1) * inner, line, false);
            }
        }
    }
    const int64_t each = table_size + pad_size;
    auto total = [&](int64_t at) { double sum = 0; for (int64_t thread = 0; thread < P.threads; thread++) sum += shared[thread * each + at]; return real(sum); };
    for (int64_t t = 0, at = 0; t < TABLES; at += up(P.tables[t].last + 1, L), t++)
        for (int64_t i = 0; i <= P.tables[t].last; i++) P.tables[t].gradient[i] += total(at + i);
    if (PADDED) for (int64_t kv = 0; kv < P.kv_heads; kv++) {
        const int64_t at = table_size + kv * (DP + VP);
        for (int d = 0; d < D; d++) P.pad_k_gradient[kv * D + d] += total(at + d);
        for (int d = 0; d < DV; d++) P.pad_v_gradient[kv * DV + d] += total(at + DP + d);
    }
    free(all_sums);
    free(shared);
    return true;
}
