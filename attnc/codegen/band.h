// ---- bands: columns of tokens, and the two products ---------------------------------------------------------------------------
namespace band {
// Tokens src[i * step], i < count <= L, to columns: dst[d * stride + i]. Lanes from `count` on repeat the last token.
template <int W> __attribute__((noinline))
void load_columns(const element* src, int64_t step, int64_t channel, int count, real* dst, int64_t stride) {
    if (W >= L && channel == 1) {
        const element* token[L];
        UNROLL for (int i = 0; i < L; i++) { token[i] = src; src += i + 1 < count ? step : 0; }
        for (int c = 0; c < W; c += L) {
            const int d = min(c, W - L);          // the last vector of channels may overlap the one before
            V x[L];
            UNROLL for (int i = 0; i < L; i++) x[i] = load_elements(token[i] + d);
            transpose(x);
            UNROLL for (int i = 0; i < L; i++) store(dst + (d + i) * stride, x[i]);
        }
    } else for (int i = 0; i < L; i++) {
        const element* token = src + min(i, count - 1) * step;
        for (int d = 0; d < W; d++) dst[d * stride + i] = get(token[d * channel]);
    }
}
// columns src[d * stride + i], i < count <= L, to tokens
template <int W> __attribute__((noinline))
void store_columns(const real* src, int64_t stride, element* dst, int64_t step, int64_t channel, int count) {
    if (W >= L && channel == 1) {
        for (int c = 0; c < W; c += L) {
            const int d = min(c, W - L);
            V x[L];
            UNROLL for (int i = 0; i < L; i++) x[i] = load(src + (d + i) * stride);
            transpose(x);
            element* token = dst + d;
            UNROLL for (int i = 0; i < L; i++) if (i < count) { store_elements(token, x[i]); token += step; }
        }
    } else for (int i = 0; i < count; i++) for (int d = 0; d < W; d++) dst[i * step + d * channel] = put(src[d * stride + i]);
}

// A line that rows a .. b - 1 of a group see: its place in the rings, and where the rows' scores of it lie. With a table: how it lies
// to each row, and where the block's elements are.
struct Line { int64_t slot, cell[GROUP], relation[GROUP], base[GROUP], elements[GROUP]; int a, b; };

// What both directions share: the lines of keys, the block of queries at hand, and the two products.
struct Band {
    const Problem& P;
    const Plan& plan;
    Grid k_grid, v_grid;
    real *keys, *values;                     // rings [plane][line][channel][key]
    Lanes *blocks, *block;                   // of the columns of the item at hand; the one at hand
    int64_t x_residue = -1, x_strip;         // what `blocks` were aimed at
    Line* lines;                             // that the group at hand meets
    int line_count;
    Elements table;
    const bool backwards;
    V scale, unit;                           // of a product; of what makes an exponent of 2 (see tile.h)

    Band(const Problem& P, const Plan& plan, bool backwards)
        : P(P), plan(plan), k_grid(plan, P.k_layout), v_grid(plan, P.v_layout), table(P, plan), backwards(backwards) {
        scale = splat(real(P.scale)); unit = unit_of({real(P.scale), real(P.scale * 1.4426950408889634), 0, 0});
    }
    size_t bytes() const {
        return sizeof(real) * plan.ring() + plan.planes * plan.lines * sizeof(Line) + plan.blocks * sizeof(Lanes) + 512
               + (LOADS ? table.bytes(backwards) : 0);
    }
    void allocate(Arena& arena) {
        keys = arena.take<real>(plan.planes * plan.lines * plan.stride * D);
        values = arena.take<real>(plan.planes * plan.lines * plan.stride * DV + 2 * L);
        lines = arena.take<Line>(plan.planes * plan.lines);
        blocks = arena.take<Lanes>(plan.blocks);
        if (LOADS) table.allocate(arena, backwards);
    }
    INLINE int64_t slot(int plane, int64_t line) const { return plane * plan.lines + line % plan.lines; }
    void load_lines(const Item& item, int64_t from, int64_t to) {
        for (int plane = 0; plane < item.planes; plane++) {
            const element *k_from = P.k + item.key_place(P, P.k_layout, item.plane[plane]);
            const element *v_from = P.v + item.key_place(P, P.v_layout, item.plane[plane]);
            for (int64_t line = from; line < to; line++) {
                const element *k = k_from + k_grid.at(line, item.key_from), *v = v_from + v_grid.at(line, item.key_from);
                real *to_k = keys + slot(plane, line) * D * plan.stride, *to_v = values + slot(plane, line) * DV * plan.stride;
                for (int64_t i = 0; i < item.key_to - item.key_from; i += L) {
                    const int count = min<int64_t>(L, item.key_to - item.key_from - i);
                    load_columns<D>(k + i * k_grid.step, k_grid.step, k_grid.channel, count, to_k + i, plan.stride);
                    load_columns<DV>(v + i * v_grid.step, v_grid.step, v_grid.channel, count, to_v + i, plan.stride);
                }
            }
        }
    }
    // The lines from `from` on that `rows` rows from `row` on see; row r keeps its scores from cell(r) on, [line][plane][key][L].
    template <class Cell> void list_lines(const Item& item, int64_t row, int rows, int64_t from, Cell cell) {
        const int32_t *lo = item.y_lo + row, *hi = item.y_hi + row;
        line_count = 0;
        for (int64_t line = max<int64_t>(lo[0], from), a = 0, b = 0; line <= hi[rows - 1]; line++) {
            while (hi[a] < line) a++;
            while (b < rows && lo[b] <= line) b++;
            if (a == b) continue;                           // (the ends are monotone: rows that see a line are a run)
            for (int plane = 0; plane < item.planes; plane++) {
                Line& x = lines[line_count++];
                x.slot = slot(plane, line); x.a = a; x.b = b;
                for (int64_t r = a; r < b; r++) {
                    x.cell[r] = cell(r) + ((line - lo[r]) * item.planes + plane) * BAND * L;
                    if (!LOADS) continue;
                    x.relation[r] = table.relation(item, row + r, line, item.plane[plane]);
                    x.base[r] = table.query_base(item, row + r) + table.key_base(item, line, item.plane[plane]);
                }
            }
        }
    }
    void aim_blocks(const Item& item) {
        if (x_residue == item.residue[X] && x_strip == item.x_from) return;
        x_residue = item.residue[X]; x_strip = item.x_from;
        if (LOADS) table.make_room((item.x_to - item.x_from + L - 1) / L);
        for (int64_t x = item.x_from; x < item.x_to; x += L) {
            Lanes& lanes = blocks[(x - item.x_from) / L];
            lanes.aim(item, x);
            if (LOADS) lanes.pattern = table.find(item, lanes, x);
        }
    }
    // finds the block's table elements
    void aim_elements() {
        for (Line* n = lines; n < lines + line_count; n++)
            for (int r = n->a; r < n->b; r++) n->elements[r] = table.at(block->pattern, n->relation[r], n->base[r]);
    }
    // keys t .. t + T - 1 of every lane, out of a ring's row
    template <Way WAY, int T> INLINE void spread(const real* row, const I (&at)[T], int t, V (&z)[T]) const {
        if constexpr (PERMUTES) {
            const V x = load(row), y = WAY == HARD ? load(row + L) : V{};
            UNROLL for (int i = 0; i < T; i++) z[i] = WAY == HARD ? permute(x, y, at[i]) : permute(x, at[i]);
        } else UNROLL for (int i = 0; i < T; i++) {
            z[i] = load(row + t + i);
            if (WAY == HARD) z[i] = permute(z[i], at[0]);
        }
    }
    // Keys that N rows take at a time. Besides their sums there must be room for the rows' channels or the keys', whichever are fewer,
    // one more operand, and how to permute.
    static constexpr int keys_at_once(Way way, int n, int from) {
        int keys = 1;
        while (n * (keys + 1) + min(n, keys + 1) + 1 + (PERMUTES ? keys + 1 : way == HARD) <= REGISTERS - (PERMUTES ? 3 : 0)) keys++;
        return share(BAND - from, keys);
    }
    // N rows of x[W][L] against keys FROM .. of a line, as many at a time as registers hold: products or, with a TABLE, scores
    template <int W, Way WAY, bool TABLE, int N, int FROM = 0>
    INLINE void dots(const real* x, const real* row, real* s, const int64_t* cell, const int64_t* elements, V* best) const {
        constexpr int T = keys_at_once(WAY, N, FROM);
        constexpr int part = (W + (W + 63) / 64 - 1) / ((W + 63) / 64);      // long sums are cut
        for (int from = 0; from < W; from += part) {
            const int to = min(from + part, W);
            V a[N][T];
            I at[T];
            UNROLL for (int t = 0; t < T; t++) { at[t] = block->key[FROM + t]; keep(at[t]); }
            UNROLL for (int r = 0; r < N; r++) UNROLL for (int t = 0; t < T; t++) a[r][t] = V{};
            const real* channel = row + from * plan.stride;
            _Pragma("GCC unroll 1") for (int d = from; d < to; d++, channel += plan.stride) {
                V y[N], z[T];
                if constexpr (PERMUTES || N <= T) {
                    UNROLL for (int r = 0; r < N; r++) { y[r] = load(x + (r * W + d) * L); keep(y[r]); }
                    spread<WAY, T>(channel, at, FROM, z);
                    UNROLL for (int t = 0; t < T; t++) UNROLL for (int r = 0; r < N; r++) a[r][t] += y[r] * z[t];
                } else {
                    spread<WAY, T>(channel, at, FROM, z);
                    UNROLL for (int t = 0; t < T; t++) keep(z[t]);
                    UNROLL for (int r = 0; r < N; r++) {
                        y[r] = load(x + (r * W + d) * L);
                        keep(y[r]);
                        UNROLL for (int t = 0; t < T; t++) a[r][t] += y[r] * z[t];
                    }
                }
            }
            UNROLL for (int r = 0; r < N; r++) UNROLL for (int t = 0; t < T; t++) {
                real* place = s + cell[r] + (FROM + t) * L;
                if (from) a[r][t] += load(place);
                if (TABLE && to == W) a[r][t] = a[r][t] * scale + load(table.values + elements[r] + (FROM + t) * L);
                if (to == W) best[r] = larger(best[r], a[r][t]);
                store(place, a[r][t]);
            }
        }
        if constexpr (FROM + T < BAND) dots<W, WAY, TABLE, N, FROM + T>(x, row, s, cell, elements, best);
    }
    // The same for the group's rows x[GROUP][W][L] and all keys that they see, and each row's largest.
    template <int W, Way WAY, bool TABLE> __attribute__((noinline))
    void products(const real* x, const real* ring, real* s, V* best) const {
        for (int r = 0; r < GROUP; r++) best[r] = splat(LOWEST);
        for (const Line* n = lines; n < lines + line_count; n++) {
            const real *row = ring + n->slot * W * plan.stride + block->first, *from = x + n->a * W * L;
            switch (n->b - n->a) {
                case 1: dots<W, WAY, TABLE, 1>(from, row, s, n->cell + n->a, n->elements + n->a, best + n->a); break;
                case 2: dots<W, WAY, TABLE, 2>(from, row, s, n->cell + n->a, n->elements + n->a, best + n->a); break;
                case 3: dots<W, WAY, TABLE, 3>(from, row, s, n->cell + n->a, n->elements + n->a, best + n->a); break;
                default: dots<W, WAY, TABLE, 4>(from, row, s, n->cell, n->elements, best);
            }
        }
    }
    // sum[r] += weights of row r times the keys of a line, N channels from `row` on
    template <Way WAY, int A, int B, int N>
    INLINE void add(const real* row, const real* s, const int64_t* cell, V (&sum)[GROUP][N]) const {
        const real* p[GROUP];
        UNROLL for (int r = A; r < B; r++) p[r] = s + cell[r];
        _Pragma("GCC unroll 1") for (int t = 0; t < BAND; t++) {
            V w[GROUP];
            I at[1] = {block->key[t]};
            keep(at[0]);
            if constexpr (REGISTERS == 16) {     // one weight at a time
                V z[N][1];
                UNROLL for (int d = 0; d < N; d++) { spread<WAY, 1>(row + d * plan.stride, at, t, z[d]); keep(z[d][0]); }
                UNROLL for (int r = A; r < B; r++) {
                    w[r] = load(p[r] + t * L);
                    keep(w[r]);
                    UNROLL for (int d = 0; d < N; d++) sum[r][d] += w[r] * z[d][0];
                }
                continue;
            }
            UNROLL for (int r = A; r < B; r++) { w[r] = load(p[r] + t * L); keep(w[r]); }
            UNROLL for (int d = 0; d < N; d++) {
                V z[1];
                spread<WAY, 1>(row + d * plan.stride, at, t, z);
                UNROLL for (int r = A; r < B; r++) sum[r][d] += w[r] * z[0];
            }
        }
    }
    // o[r][W][L] = factor * sum over keys of weight * value, N channels from d on; `meanwhile` runs once per line
    template <int W, Way WAY, int N, class F>
    INLINE void sums(int d, const real* ring, const real* s, const V* factor, real* o, F meanwhile) const {
        V sum[GROUP][N];
        UNROLL for (int r = 0; r < GROUP; r++) UNROLL for (int i = 0; i < N; i++) sum[r][i] = V{};
        for (const Line* n = lines; n < lines + line_count; n++) {
            meanwhile();
            const real* row = ring + (n->slot * W + d) * plan.stride + block->first;
            switch (n->a * 8 + n->b) {      // (every run of rows is a case, so that the sums stay in registers)
                case 1: add<WAY, 0, 1>(row, s, n->cell, sum); break;
                case 2: add<WAY, 0, 2>(row, s, n->cell, sum); break;
                case 3: add<WAY, 0, 3>(row, s, n->cell, sum); break;
                case 4: add<WAY, 0, 4>(row, s, n->cell, sum); break;
                case 10: add<WAY, 1, 2>(row, s, n->cell, sum); break;
                case 11: add<WAY, 1, 3>(row, s, n->cell, sum); break;
                case 12: add<WAY, 1, 4>(row, s, n->cell, sum); break;
                case 19: add<WAY, 2, 3>(row, s, n->cell, sum); break;
                case 20: add<WAY, 2, 4>(row, s, n->cell, sum); break;
                case 28: add<WAY, 3, 4>(row, s, n->cell, sum); break;
            }
        }
        UNROLL for (int r = 0; r < GROUP; r++) UNROLL for (int i = 0; i < N; i++)
            store(o + (r * W + d + i) * L, sum[r][i] * factor[r]);
    }
};
}
