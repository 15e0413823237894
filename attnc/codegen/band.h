// ---- bands: where every query sees BAND consecutive keys of the last axis ------------------------------------------------------
// Lanes are L queries of one row (one residue class), and key t of a lane is key lo + t of its own, so a box of keys is neither
// masked nor padded. The keys of L queries lie in two vectors that start at the first lane's: key t of all lanes is one permutation
// of them (or, where permuting is slow and lo grows by one per lane, one load). A group of GROUP rows of queries walks down the
// rows; each row of keys that it meets, a line, is transposed once, into a ring of lines [channel][key]. A clamped border and the
// interior are the same code.
#if defined(__AVX512F__)
constexpr bool PERMUTES = true;    // a permutation of two vectors is one instruction, a load across cache lines takes two turns
#else
constexpr bool PERMUTES = false;
#endif
constexpr int REGISTERS = ROWS > 4 ? 32 : 16;
constexpr int GROUP = REGISTERS == 32 ? 4 : 2, SUMS = 4;         // rows of queries; channels of output that are summed at once
constexpr int64_t RING = 384 << 10, CELLS = 192 << 10;           // bytes of a ring (a part of the L2 cache), most bytes of scores
constexpr int Y = max(RANK - 2, 0), X = RANK - 1;                // axis of the rows, axis along a row
// where a block's keys are: in two vectors, or easier: in one (PERMUTES), or where loads from key t on give them
enum Way { EASY, TWO };

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

// The axis of the rows and the one along them; a call of one axis has a single row.
constexpr int32_t nothing = 0;
INLINE Axis row_axis(const Problem& P) {
    return RANK > 1 ? P.axes[Y] : Axis{1, 1, 0, 0, 1, 1, 1, 1, &nothing, &nothing, nullptr, nullptr, nullptr};
}
INLINE int64_t row_count(const Problem& P, const int64_t* grid) { return RANK > 1 ? grid[Y] : 1; }
// tokens of one residue class
INLINE int64_t tokens_of(int64_t length, int64_t split, int64_t residue) {
    return residue < length ? (length - residue + split - 1) / split : 0;
}

// How a call's tokens are cut, from its tables; `fits`: they are a band that this kernel takes.
struct Plan {
    bool fits = false;
    Axis x, y;
    int64_t nx, ny;              // their queries
    int64_t planes = 1;          // most products of keys of the axes before Y
    int64_t lines = 1, seen = 1; // most lines that a group, that a row meets in one plane
    int64_t strips = 1;          // parts of a row: a ring holds one part
    int64_t stride = 0;          // of a ring's channels
    int64_t chunks = 1;          // parts of the rows, so that every thread has some
    int64_t items = 0;

    explicit Plan(const Problem& P) : x(P.axes[X]), y(row_axis(P)), nx(P.q_grid[X]), ny(row_count(P, P.q_grid)) {
        if (!(P.scale > 0) || P.q_prefix || P.k_prefix) return;
        items = P.batch * P.heads;
        for (int a = 0; a < RANK; a++) {
            const Axis& axis = P.axes[a];
            int64_t most = 1;
            for (int64_t r = 0; r < axis.split; r++) {
                const int32_t *lo = axis.lo + r * axis.columns, *hi = axis.hi + r * axis.columns;
                const int64_t n = tokens_of(P.q_grid[a], axis.split, r);
                for (int64_t j = 0; j < n; j++) {
                    if (hi[j] < lo[j] || (j && (lo[j] < lo[j - 1] || hi[j] < hi[j - 1]))) return;
                    if (a == X && hi[j] - lo[j] + 1 != BAND) return;
                    if (a == X && j % L == 0 && hi[min(j + L, n) - 1] - lo[j] >= 2 * L) return;
                    if (a == Y && a != X && j % GROUP == 0) lines = max<int64_t>(lines, hi[min(j + GROUP, n) - 1] - lo[j] + 1);
                    most = max<int64_t>(most, hi[j] - lo[j] + 1);
                }
            }
            if (a < Y) { planes *= most; items *= P.q_grid[a]; }
            if (a == Y && a != X) seen = most;
            if (a >= Y) items *= min(axis.split, P.q_grid[a]);
        }
        if (scores() * (int64_t)sizeof(real) > CELLS) return;
        const int64_t blocks = (tokens_of(nx, x.split, 0) + L - 1) / L;
        for (strips = 1;; strips++) {
            int64_t span = 1;
            for (int64_t r = 0; r < x.split; r++) for (int64_t s = 0; s < strips; s++) {
                const int64_t n = tokens_of(nx, x.split, r);
                const int64_t from = blocks * s / strips * L, to = min(blocks * (s + 1) / strips * L, n);
                if (from < to) span = max<int64_t>(span, x.hi[r * x.columns + to - 1] - x.lo[r * x.columns + from] + 1);
            }
            stride = up(span, L);
            if (stride / L % 2 == 0) stride += L;      // rows a power of two apart would share cache sets
            if (strips >= blocks || (int64_t)sizeof(real) * ring() <= RING) break;
        }
        items *= strips;
        const int64_t groups = (tokens_of(ny, y.split, 0) + GROUP - 1) / GROUP;
        if (items && items % P.threads && items < 8 * P.threads) chunks = min(groups, (4 * P.threads + items - 1) / items);
        items *= chunks;
        fits = true;
    }
    int64_t row_scores() const { return planes * seen * BAND * L; }
    int64_t scores() const { return GROUP * row_scores(); }
    int64_t ring() const { return planes * lines * stride * (D + DV) + 2 * L; }
};

// One tensor as rows of tokens of a residue class: token (row, column) lies row * line + column * step behind the class's first.
struct Grid {
    int64_t line, step, channel;
    Grid(const Plan& plan, const Layout& t)
        : line(RANK > 1 ? plan.y.split * t.axis[Y] : 0), step(plan.x.split * t.axis[X]), channel(t.channel) {}
    INLINE int64_t at(int64_t row, int64_t column) const { return row * line + column * step; }
};
// The queries of an item: rows and columns of one plane of one class, and the keys that they see.
struct Item {
    int64_t b, h, kv, x_from, x_to, y_from, y_to, key_from, key_to;
    const int32_t *x_lo, *y_lo, *y_hi;
    int64_t residue[RANK], index[RANK];
    int planes;
    int64_t *k_plane, *v_plane;              // where the planes of keys start
    bool aim(const Problem& P, const Plan& plan, int64_t item) {
        int64_t rest = item;
        auto take = [&](int64_t n) { const int64_t i = rest % n; rest /= n; return i; };
        const int64_t chunk = take(plan.chunks), strip = take(plan.strips);
        for (int a = RANK - 1; a >= 0; a--) {
            const int64_t split = P.axes[a].split;
            if (a >= Y) residue[a] = take(min(split, P.q_grid[a]));
            else { const int64_t c = take(P.q_grid[a]); residue[a] = c % split; index[a] = c / split; }
        }
        h = take(P.heads); b = rest; kv = h / (P.heads / P.kv_heads);
        const int64_t x_residue = residue[X], y_residue = RANK > 1 ? residue[Y] : 0;
        const int64_t blocks = (tokens_of(plan.nx, plan.x.split, 0) + L - 1) / L;
        const int64_t groups = (tokens_of(plan.ny, plan.y.split, 0) + GROUP - 1) / GROUP;
        const int64_t columns = tokens_of(plan.nx, plan.x.split, x_residue), rows = tokens_of(plan.ny, plan.y.split, y_residue);
        x_from = blocks * strip / plan.strips * L; x_to = min(blocks * (strip + 1) / plan.strips * L, columns);
        y_from = groups * chunk / plan.chunks * GROUP; y_to = min(groups * (chunk + 1) / plan.chunks * GROUP, rows);
        if (x_from >= x_to || y_from >= y_to) return false;
        x_lo = plan.x.lo + x_residue * plan.x.columns;
        y_lo = plan.y.lo + y_residue * plan.y.columns; y_hi = plan.y.hi + y_residue * plan.y.columns;
        key_from = x_lo[x_from]; key_to = x_lo[x_to - 1] + BAND;
        planes = 1;
        k_plane[0] = corner(P.k_layout, kv); v_plane[0] = corner(P.v_layout, kv);
        for (int a = 0; a < Y; a++) {       // each axis multiplies the planes by its interval
            const Axis& axis = P.axes[a];
            const int64_t query = residue[a] * axis.columns + index[a], begin = axis.lo[query], n = axis.hi[query] - begin + 1;
            for (int64_t i = planes * n - 1; i >= 0; i--) {
                const int64_t coordinate = residue[a] + axis.split * (begin + i % n);
                k_plane[i] = k_plane[i / n] + coordinate * P.k_layout.axis[a];
                v_plane[i] = v_plane[i / n] + coordinate * P.v_layout.axis[a];
            }
            planes *= n;
        }
        return true;
    }
    // offset of the class's first token: of any plane, of the plane of the queries
    int64_t corner(const Layout& t, int64_t head) const {
        int64_t at = b * t.batch + head * t.head + t.start;
        for (int a = Y; a < RANK; a++) at += residue[a] * t.axis[a];
        return at;
    }
    int64_t place(const Problem& P, const Layout& t) const {
        int64_t at = corner(t, h);
        for (int a = 0; a < Y; a++) at += (residue[a] + P.axes[a].split * index[a]) * t.axis[a];
        return at;
    }
};
// A line that rows a .. b - 1 of a group see: its place in the rings, and where the rows' scores of it lie.
struct Line { int64_t slot, cell[GROUP]; int a, b; };

// What both directions share: the lines of keys, the block of queries at hand, and the two products.
struct Band {
    const Problem& P;
    const Plan& plan;
    Grid k_grid, v_grid;
    real *keys, *values;                     // rings [plane][line][channel][key]
    I lane[BAND];                            // where key t of each lane lies in the two vectors
    int64_t first;                           // the block's first key in a ring's line
    Line* lines;                             // that the group at hand meets
    int line_count;

    Band(const Problem& P, const Plan& plan) : P(P), plan(plan), k_grid(plan, P.k_layout), v_grid(plan, P.v_layout) {}
    static size_t bytes(const Plan& plan) { return sizeof(real) * plan.ring() + plan.planes * plan.lines * sizeof(Line) + 256; }
    void allocate(Arena& arena) {
        keys = arena.take<real>(plan.planes * plan.lines * plan.stride * D);
        values = arena.take<real>(plan.planes * plan.lines * plan.stride * DV + 2 * L);
        lines = arena.take<Line>(plan.planes * plan.lines);
    }
    INLINE int64_t slot(int plane, int64_t line) const { return plane * plan.lines + line % plan.lines; }
    void load_lines(const Item& item, int64_t from, int64_t to) {
        for (int64_t line = from; line < to; line++) for (int plane = 0; plane < item.planes; plane++) {
            const element *k = P.k + item.k_plane[plane] + k_grid.at(line, item.key_from);
            const element *v = P.v + item.v_plane[plane] + v_grid.at(line, item.key_from);
            real *to_k = keys + slot(plane, line) * D * plan.stride, *to_v = values + slot(plane, line) * DV * plan.stride;
            for (int64_t i = 0; i < item.key_to - item.key_from; i += L) {
                const int count = min<int64_t>(L, item.key_to - item.key_from - i);
                load_columns<D>(k + i * k_grid.step, k_grid.step, k_grid.channel, count, to_k + i, plan.stride);
                load_columns<DV>(v + i * v_grid.step, v_grid.step, v_grid.channel, count, to_v + i, plan.stride);
            }
        }
    }
    // The lines that `rows` rows from `row` on see; cell(r, n): where row r keeps the scores of the n-th line that it sees.
    template <class Cell> void list_lines(const Item& item, int64_t row, int rows, Cell cell) {
        const int32_t *lo = item.y_lo + row, *hi = item.y_hi + row;
        line_count = 0;
        for (int plane = 0; plane < item.planes; plane++) for (int64_t line = lo[0], a = 0, b = 0; line <= hi[rows - 1]; line++) {
            while (hi[a] < line) a++;
            while (b < rows && lo[b] <= line) b++;
            if (a == b) continue;                           // (the ends are monotone: rows that see a line are a run)
            Line& x = lines[line_count++];
            x.slot = slot(plane, line); x.a = a; x.b = b;
            for (int64_t r = a; r < b; r++) x.cell[r] = cell(r, plane * (hi[r] - lo[r] + 1) + line - lo[r]);
        }
    }
    // The block of `count` queries from column x on.
    Way aim(const Item& item, int64_t x, int count) {
        first = item.x_lo[x] - item.key_from;
        bool straight = true;
        int last = 0;
        for (int i = 0; i < L; i++) {
            const int from = item.x_lo[x + min(i, count - 1)] - item.x_lo[x];
            straight &= i >= count || from == i;
            last = from + BAND - 1;
            for (int t = 0; t < BAND; t++) lane[t][i] = from + t;
        }
        return (PERMUTES ? last < L : straight) ? EASY : TWO;
    }
    // keys FROM .. FROM + T - 1 of every lane, out of a ring's row
    template <Way WAY, int T> INLINE void spread(const real* row, const I (&at)[T], int t, V (&z)[T]) const {
        if constexpr (WAY == EASY && !PERMUTES) { UNROLL for (int i = 0; i < T; i++) z[i] = load(row + t + i); }
        else {
            const V x = load(row);
            if constexpr (WAY == EASY) { UNROLL for (int i = 0; i < T; i++) z[i] = permute(x, at[i]); }
            else {
                const V y = load(row + L);
                UNROLL for (int i = 0; i < T; i++) z[i] = permute(x, y, at[i]);
            }
        }
    }
    // N rows of x[W][L] against keys FROM .. of a line, as many at a time as registers hold: s + cell[r] = the products
    template <int W, Way WAY, int N, int FROM = 0>
    INLINE void dots(const real* x, const real* row, real* s, const int64_t* cell, V* best) const {
        constexpr int T = share(BAND - FROM, max(1, (REGISTERS - N - 4) / (N + 1)));
        constexpr int part = (W + (W + 63) / 64 - 1) / ((W + 63) / 64);      // long sums are cut
        for (int from = 0; from < W; from += part) {
            const int to = min(from + part, W);
            V a[N][T];
            I at[T];
            UNROLL for (int t = 0; t < T; t++) { at[t] = lane[FROM + t]; keep(at[t]); }
            UNROLL for (int r = 0; r < N; r++) UNROLL for (int t = 0; t < T; t++) a[r][t] = V{};
            const real* channel = row + from * plan.stride;
            _Pragma("GCC unroll 1") for (int d = from; d < to; d++, channel += plan.stride) {
                V y[N], z[T];
                UNROLL for (int r = 0; r < N; r++) { y[r] = load(x + (r * W + d) * L); keep(y[r]); }
                spread<WAY, T>(channel, at, FROM, z);
                UNROLL for (int t = 0; t < T; t++) UNROLL for (int r = 0; r < N; r++) a[r][t] += y[r] * z[t];
            }
            UNROLL for (int r = 0; r < N; r++) UNROLL for (int t = 0; t < T; t++) {
                real* place = s + cell[r] + (FROM + t) * L;
                if (from) a[r][t] += load(place);
                if (to == W) best[r] = larger(best[r], a[r][t]);
                store(place, a[r][t]);
            }
        }
        if constexpr (FROM + T < BAND) dots<W, WAY, N, FROM + T>(x, row, s, cell, best);
    }
    // Products of the group's rows x[GROUP][W][L] with the keys that they see, and each row's largest.
    template <int W, Way WAY> __attribute__((noinline))
    void products(const real* x, const real* ring, real* s, V* best) const {
        for (int r = 0; r < GROUP; r++) best[r] = splat(LOWEST);
        for (const Line* n = lines; n < lines + line_count; n++) {
            const real *row = ring + n->slot * W * plan.stride + first, *from = x + n->a * W * L;
            switch (n->b - n->a) {
                case 1: dots<W, WAY, 1>(from, row, s, n->cell + n->a, best + n->a); break;
                case 2: dots<W, WAY, 2>(from, row, s, n->cell + n->a, best + n->a); break;
                case 3: if constexpr (GROUP > 2) dots<W, WAY, 3>(from, row, s, n->cell + n->a, best + n->a); break;
                default: if constexpr (GROUP > 3) dots<W, WAY, 4>(from, row, s, n->cell + n->a, best + n->a);
            }
        }
    }
    // sum[r] += weights of row r times the keys of a line, N channels from `row` on
    template <Way WAY, int A, int B, int N>
    INLINE void add(const real* row, const real* s, const int64_t* cell, V (&sum)[GROUP][N]) const {
        if constexpr (B <= GROUP) {
            const real* p[GROUP];
            UNROLL for (int r = A; r < B; r++) p[r] = s + cell[r];
            _Pragma("GCC unroll 1") for (int t = 0; t < BAND; t++) {
                V w[GROUP];
                I at[1] = {lane[t]};
                keep(at[0]);
                UNROLL for (int r = A; r < B; r++) { w[r] = load(p[r] + t * L); keep(w[r]); }
                UNROLL for (int d = 0; d < N; d++) {
                    V z[1];
                    spread<WAY, 1>(row + d * plan.stride, at, t, z);
                    UNROLL for (int r = A; r < B; r++) sum[r][d] += w[r] * z[0];
                }
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
            const real* row = ring + (n->slot * W + d) * plan.stride + first;
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
