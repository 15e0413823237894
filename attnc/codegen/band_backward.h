// ---- bands backward: P = exp(score - lse), dP = dO V^T, dS = P (dP - delta) with delta = rowsum(dO O) - d lse -------------------
// A group of rows finds its P and dS as the forward finds its scores, then dQ = dS K. Both are kept until every row that sees a line
// has them. Then dK = dS^T Q and dV = P^T dO of that line are summed over those rows, lane by lane, and only the sums go back from
// lanes to keys: a sum has one order, whatever the threads. A chunk of rows owns the lines before the next chunk's first, and
// computes the rows before it that see its own once more.
namespace band {

// The way from a block's lanes back to the keys. Lanes whose keys are the same (a clamped border) are folded into one of them: the
// last, or at a block's end the first, so that those left follow each other as their keys do.
struct Targets {
    static constexpr int MOST = PERMUTES ? 2 : (L - 2 + BAND) / L + 1;      // vectors in which the keys of a block lie
    int folds, vectors;
    I fold[4], to[MOST][BAND];           // which lane a lane adds; which lane goes to each key of a vector
    bool shifts;                         // no permutation is needed: key t of lane i is key i + t + `shift` of the block,
    int64_t shift;
    I left;                              // for these lanes; the others hold nothing
    void aim(const Item& item, const Lanes& lanes, int64_t x) {
        const int n = lanes.count;
        int64_t from[L] = {};            // first key
        int into[L] = {}, side[L] = {}, longest = 0;
        for (int i = 0; i < n; i++) from[i] = item.x_lo[x + i] - item.x_lo[x];
        for (int i = 0, end; i < n; i = end) {
            for (end = i + 1; end < n && from[end] == from[i];) end++;
            const bool first = i > 0 && end == n;
            for (int l = i; l < end; l++) { into[l] = first ? i : end - 1; side[l] = first ? 1 : -1; }
            longest = max(longest, end - 1 - i);
        }
        vectors = (from[n - 1] + BAND + L - 1) / L;
        for (folds = 0; 1 << folds <= longest; folds++) {
            const int far = 1 << folds;
            fold[folds] = splat_integer(L);
            for (int i = 0; i < n; i++) {
                const int other = i + side[i] * far, distance = side[i] * (i - into[i]);
                if (distance % (2 * far) == 0 && other >= 0 && other < n && into[other] == into[i]) fold[folds][i] = other;
            }
        }
        for (int t = 0; t < BAND; t++) {
            for (int v = 0; v < MOST; v++) to[v][t] = splat_integer(L);
            for (int i = 0; i < n; i++) if (into[i] == i) to[(from[i] + t) / L][t][(from[i] + t) % L] = i;
        }
        shift = from[into[0]] - into[0];
        shifts = !PERMUTES;
        left = I{};
        for (int i = 0; i < n; i++) if (into[i] == i) { shifts &= from[i] == i + shift; left[i] = -1; }
    }
};
// sum of x[i] * y[i] over the channels of L tokens: one per lane
INLINE V token_dots(const element* x, const Grid& x_grid, const element* y, const Grid& y_grid, int count) {
    V sum[L];
    UNROLL for (int i = 0; i < L; i++) {
        const element *a = x + min(i, count - 1) * x_grid.step, *b = y + min(i, count - 1) * y_grid.step;
        sum[i] = V{};
        int d = 0;
        if (x_grid.channel == 1 && y_grid.channel == 1) for (; d + L <= DV; d += L) sum[i] += load_elements(a + d) * load_elements(b + d);
        for (; d < DV; d++) sum[i][0] += get(a[d * x_grid.channel]) * get(b[d * y_grid.channel]);
    }
    transpose(sum);
    V total = sum[0];
    UNROLL for (int i = 1; i < L; i++) total += sum[i];
    return total;
}

// Part of a walk over all queries of one (b, head of k), class and chunk: by strips, then heads, then planes.
struct Walk : Item {
    int64_t item, strip, row_from, line_from, line_to;      // the first row that is needed; the lines whose sums are this chunk's
    bool opens, closes, last_strip;      // the sums: nothing was added yet; nothing more will be
};

struct Backward : Band {
    static constexpr int KEYS = min(BAND, 4), WIDE = REGISTERS == 32 ? 4 : 3;      // sums at once: keys, channels
    Grid q_grid, g_grid, out_grid, lse_grid, grad_lse_grid, dq_grid, dk_grid, dv_grid;
    Walk here, next;
    real *q, *g, *o;                         // [block][row][channel][L], the same, dQ of a block: [row][channel][L]
    real *weights, *slopes;                  // P and dS: [block][row][line][plane][key][L]
    real *line_sums, *carried;               // of dK and dV, [plane][line][channel][key]; those that the next strip adds to
    Targets* targets;
    // sums of TOGETHER channels, [channel][key][lane], with zeros before and behind the lanes
    static constexpr int TOGETHER = 3 * WIDE, BEFORE = up(BAND - 1, L), APART = BEFORE + (Targets::MOST + 1) * L;
    real* apart;
    int64_t *seen_by, *cell;                 // rows that see a line: number in the ring, where their P and dS are
    int64_t first_row;                       // rows before it see no line that is not complete
    bool direct;                             // a line's sums are complete as soon as its rows are
    int64_t all_lines;                       // of a class
    bool dense;                              // a token's channels are one run of memory
    int rows;                                // of the group at hand
    // what the next group reads and writes, and what this one will write, token by token
    struct Ahead {
        const element *q, *g, *out, *dq, *k, *v, *dk, *dv;
        int rows, lines, complete, most, columns, line, column, pace;
    } ahead;

    Backward(const Problem& P, const Plan& plan, Arena& arena)
        : Band(P, plan, true), q_grid(plan, P.q_layout), g_grid(plan, P.grad_out_layout), out_grid(plan, P.out_layout),
          lse_grid(plan, P.lse_layout), grad_lse_grid(plan, P.grad_lse_layout), dq_grid(plan, P.dq_layout),
          dk_grid(plan, P.dk_layout), dv_grid(plan, P.dv_layout) {
        direct = P.heads == P.kv_heads && plan.q_planes == 1;
        dense = true;
        for (const Grid* t : {&q_grid, &g_grid, &out_grid, &dq_grid, &k_grid, &v_grid, &dk_grid, &dv_grid}) dense &= t->channel == 1;
        const int64_t kept = plan.blocks * plan.alive;
        arena.reserve(bytes() + sizeof(real) * (kept * plan.row() + GROUP * D * L + TOGETHER * BAND * APART) + plan.blocks * sizeof(Targets)
                      + plan.alive * 16 + plan.planes * 16 + 64 * 16);
        allocate(arena);
        q = arena.take<real>(kept * D * L); g = arena.take<real>(kept * DV * L); o = arena.take<real>(GROUP * D * L);
        weights = arena.take<real>(kept * plan.row_scores()); slopes = arena.take<real>(kept * plan.row_scores());
        targets = arena.take<Targets>(plan.blocks); apart = arena.take<real>(TOGETHER * BAND * APART);
        memset(apart, 0, sizeof(real) * TOGETHER * BAND * APART);
        seen_by = arena.take<int64_t>(plan.alive); cell = arena.take<int64_t>(plan.alive);
        for (Walk* w : {&here, &next}) w->plane = arena.take<int64_t>(plan.planes);
        // (these may be as large as K and V, so they are given back)
        all_lines = tokens_of(row_count(P.k_grid), plan.y.split, 0);
        const int64_t sums = (direct ? 1 : plan.k_planes * all_lines) * plan.stride * (D + DV) + Targets::MOST * L;
        const int64_t carries = plan.strips > 1 ? plan.k_planes * all_lines * BAND * (D + DV) : 0;
        line_sums = (real*)aligned_alloc(64, up(sizeof(real) * (up(sums, L) + carries), 64));
        carried = line_sums + up(sums, L);
    }
    ~Backward() { free(line_sums); }

    // part number `part` of item number `item`
    bool aim_next(int64_t item, int64_t part) {
        int64_t rest = item;
        auto take = [&](int64_t n) { const int64_t i = rest % n; rest /= n; return i; };
        next.item = item;
        const int64_t chunk = take(plan.chunks), group = P.heads / P.kv_heads;
        for (int a = RANK - 1; a >= 0; a--) next.residue[a] = take(min(P.axes[a].split, P.q_grid[a]));
        next.b = LOADS ? take(P.batch) : 0;      // (with tables, a head's elements serve its whole batch)
        const int64_t kv = take(P.kv_heads);
        if (!LOADS) next.b = rest;
        rest = part;
        next.opens = next.closes = true;
        bool there = true;
        for (int a = Y - 1; a >= 0; a--) {
            const int64_t n = tokens_of(P.q_grid[a], P.axes[a].split, next.residue[a]);
            next.index[a] = take(tokens_of(P.q_grid[a], P.axes[a].split, 0));
            there &= next.index[a] < n; next.opens &= next.index[a] == 0; next.closes &= next.index[a] == n - 1;
        }
        const int64_t head = take(group);
        next.opens &= head == 0; next.closes &= head == group - 1;
        next.h = kv * group + head; next.strip = rest;
        if (!there || !next.aim(P, plan, next.strip, chunk)) return false;
        next.last_strip = next.x_to == next.columns;
        const int64_t all = tokens_of(plan.ny, plan.y.split, RANK > 1 ? next.residue[Y] : 0);
        next.line_from = next.y_lo[next.y_from]; next.line_to = next.y_to < all ? next.y_lo[next.y_to] : next.y_hi[all - 1] + 1;
        next.row_from = 0;
        while (next.y_hi[next.row_from] < next.line_from) next.row_from++;
        next.row_from = next.row_from / GROUP * GROUP;
        return true;
    }
    // While the block from column x on is computed: the same columns of the next group, which may be the next walk's first, and of the
    // lines [done, complete) that are written after this group.
    void aim_ahead(int64_t x, int64_t row, bool more, int64_t done, int64_t complete) {
        const bool same = row + GROUP < here.y_to;
        ahead.columns = ahead.rows = ahead.lines = ahead.complete = ahead.line = ahead.column = 0;
        if (!dense) return;
        if (direct) {
            ahead.complete = complete - done; ahead.columns = block->count;
            ahead.dk = P.dk + here.key_place(P, P.dk_layout, here.plane[0]) + dk_grid.at(done, here.x_lo[x]);
            ahead.dv = P.dv + here.key_place(P, P.dv_layout, here.plane[0]) + dv_grid.at(done, here.x_lo[x]);
        }
        const Walk& walk = same ? here : next;
        const int64_t at = walk.x_from + (x - here.x_from);
        if ((same || more) && at < walk.x_to) {
            const int64_t from = same ? row + GROUP : walk.row_from, to = min(from + GROUP, walk.y_to);
            const int64_t line = same ? max<int64_t>(walk.y_hi[from - 1] + 1, walk.line_from) : max<int64_t>(walk.y_lo[from], walk.line_from);
            ahead.columns = min<int64_t>(L, walk.x_to - at);
            ahead.rows = to - from; ahead.lines = max<int64_t>(walk.y_hi[to - 1] + 1 - line, 0);
            ahead.q = P.q + walk.place(P, P.q_layout) + q_grid.at(from, at);
            ahead.g = P.grad_out + walk.place(P, P.grad_out_layout) + g_grid.at(from, at);
            ahead.out = P.out + walk.place(P, P.out_layout) + out_grid.at(from, at);
            ahead.dq = P.dq + walk.place(P, P.dq_layout) + dq_grid.at(from, at);
            ahead.k = P.k + walk.key_place(P, P.k_layout, walk.plane[walk.planes - 1]) + k_grid.at(line, walk.x_lo[at]);
            ahead.v = P.v + walk.key_place(P, P.v_layout, walk.plane[walk.planes - 1]) + v_grid.at(line, walk.x_lo[at]);
        }
        ahead.most = max(max(ahead.rows, ahead.lines), ahead.complete);
        ahead.pace = ahead.most * ahead.columns / max<int64_t>(line_count * up(D, SUMS) / SUMS, 1) + 1;
    }
    INLINE void look_ahead() {
        for (int n = 0; n < ahead.pace && ahead.column < ahead.columns; n++) {
            if (ahead.line < ahead.rows) {
                prefetch<D>(ahead.q + q_grid.at(ahead.line, ahead.column), 1);
                prefetch<DV>(ahead.g + g_grid.at(ahead.line, ahead.column), 1);
                prefetch<DV>(ahead.out + out_grid.at(ahead.line, ahead.column), 1);
                prefetch<D>(ahead.dq + dq_grid.at(ahead.line, ahead.column), 1);
            }
            if (ahead.line < ahead.lines) {
                prefetch<D>(ahead.k + k_grid.at(ahead.line, ahead.column), 1);
                prefetch<DV>(ahead.v + v_grid.at(ahead.line, ahead.column), 1);
            }
            if (ahead.line < ahead.complete) {
                prefetch<D>(ahead.dk + dk_grid.at(ahead.line, ahead.column), 1);
                prefetch<DV>(ahead.dv + dv_grid.at(ahead.line, ahead.column), 1);
            }
            if (++ahead.line >= ahead.most) { ahead.line = 0; ahead.column++; }
        }
    }
    INLINE real* sums_of(int64_t plane, int64_t line) const {
        return direct ? line_sums : line_sums + (plane * all_lines + line) * plan.stride * (D + DV);
    }
    INLINE real* carry_of(int64_t plane, int64_t line) const { return carried + (plane * all_lines + line) * BAND * (D + DV); }
    template <class F> void each_line(F f) const {
        for (int64_t plane = 0; plane < here.class_planes; plane++)
            for (int64_t line = here.line_from; line < here.line_to; line++) f(plane, line);
    }
    // A line's sums start with what the strip before added to its keys,
    void open_line(int64_t plane, int64_t line) {
        real* sums = sums_of(plane, line);
        memset(sums, 0, sizeof(real) * plan.stride * (D + DV));
        if (!here.strip) return;
        const int64_t both = here.x_lo[here.x_from - 1] + BAND - here.key_from;
        const real* carry = carry_of(plane, line);
        for (int d = 0; d < D + DV; d++) for (int64_t i = 0; i < both; i++) sums[d * plan.stride + i] = carry[d * BAND + i];
    }
    // and end as gradients, but for the keys of the next strip.
    void close_line(int64_t plane, int64_t line) {
        const real *dk = sums_of(plane, line), *dv = dk + D * plan.stride;
        const int64_t mine = (here.last_strip ? here.key_to : here.x_lo[here.x_to]) - here.key_from;
        element* to_k = P.dk + here.key_place(P, P.dk_layout, plane) + dk_grid.at(line, here.key_from);
        element* to_v = P.dv + here.key_place(P, P.dv_layout, plane) + dv_grid.at(line, here.key_from);
        for (int64_t i = 0; i < mine; i += L) {
            const int count = min<int64_t>(L, mine - i);
            store_columns<D>(dk + i, plan.stride, to_k + i * dk_grid.step, dk_grid.step, dk_grid.channel, count);
            store_columns<DV>(dv + i, plan.stride, to_v + i * dv_grid.step, dv_grid.step, dv_grid.channel, count);
        }
        if (here.last_strip) return;
        real* carry = carry_of(plane, line);
        for (int d = 0; d < D + DV; d++) for (int64_t i = mine; i < here.key_to - here.key_from; i++)
            carry[d * BAND + i - mine] = dk[d * plan.stride + i];
    }

    // f(FROM, a[key - FROM][channel]) for some keys after others: N channels of the sum over `count` rows of w[row][key][lane]
    // x[row][channel][lane], lanes with one key folded
    template <int W, int N, int FROM = 0, class F>
    INLINE void each_sum(const Targets& way, const real* x, const real* w, int64_t count, F f) const {
        constexpr int T = share(BAND - FROM, KEYS);
        V a[T][N];
        UNROLL for (int t = 0; t < T; t++) UNROLL for (int i = 0; i < N; i++) a[t][i] = V{};
        for (int64_t r = 0; r < count; r++) {
            const real *p = w + cell[r] + FROM * L, *y = x + seen_by[r] * (W * L);
            V z[N];
            UNROLL for (int i = 0; i < N; i++) { z[i] = load(y + i * L); keep(z[i]); }
            UNROLL for (int t = 0; t < T; t++) {
                V e = load(p + t * L);
                keep(e);
                UNROLL for (int i = 0; i < N; i++) a[t][i] += e * z[i];
            }
        }
        for (int f = 0; f < way.folds; f++) UNROLL for (int t = 0; t < T; t++) UNROLL for (int i = 0; i < N; i++)
            a[t][i] += permute_or_zero(a[t][i], way.fold[f]);
        f(FROM, a);
        if constexpr (FROM + T < BAND) each_sum<W, N, FROM + T>(way, x, w, count, f);
    }
    // adds N channels to a line's sums
    template <int W, int N>
    INLINE void scatter_channels(const Targets& way, const real* x, const real* w, int64_t count, real* to) const {
        V sum[Targets::MOST][N];
        UNROLL for (int v = 0; v < Targets::MOST; v++) UNROLL for (int i = 0; i < N; i++) sum[v][i] = V{};
        each_sum<W, N>(way, x, w, count, [&]<int T>(int from, const V (&a)[T][N]) __attribute__((always_inline)) {
            UNROLL for (int v = 0; v < Targets::MOST; v++) if (v < way.vectors) {
                UNROLL for (int t = 0; t < T; t++) UNROLL for (int i = 0; i < N; i++) sum[v][i] += permute_or_zero(a[t][i], way.to[v][from + t]);
            }
        });
        UNROLL for (int v = 0; v < Targets::MOST; v++) if (v < way.vectors) UNROLL for (int i = 0; i < N; i++) {
            real* y = to + i * plan.stride + v * L;
            store(y, load(y) + sum[v][i]);
        }
    }
    // The same where keys follow each other as lanes do: the lanes' sums are stored between zeros, and loaded again from where the
    // keys of a vector are.
    template <int W, int N>
    INLINE void store_sums(const Targets& way, const real* x, const real* w, int64_t count, real* to) const {
        each_sum<W, N>(way, x, w, count, [&]<int T>(int from, const V (&a)[T][N]) __attribute__((always_inline)) {
            UNROLL for (int t = 0; t < T; t++) UNROLL for (int i = 0; i < N; i++)
                store(to + (i * BAND + from + t) * APART, select(way.left, a[t][i], V{}));
        });
    }
    INLINE void add_shifted(const Targets& way, int channels, real* to) const {
        for (int d = 0; d < channels; d++) for (int v = 0; v < way.vectors; v++) {
            const real* from = apart + BEFORE + d * BAND * APART + v * L - way.shift;
            V sum{};
            UNROLL for (int t = 0; t < BAND; t++) sum += load(from + t * (APART - 1));
            real* y = to + d * plan.stride + v * L;
            store(y, load(y) + sum);
        }
    }
    template <int W> __attribute__((noinline))
    void scatter(const Targets& way, const real* x, const real* w, int64_t count, real* to) const {
        int d = 0;
        if (!PERMUTES && way.shifts) {
            for (int n; d < W; d += n) {
                n = min(W - d, TOGETHER);
                int i = 0;
                for (; i + WIDE <= n; i += WIDE) store_sums<W, WIDE>(way, x + (d + i) * L, w, count, apart + BEFORE + i * BAND * APART);
                if constexpr (W % WIDE != 0) if (i < n) store_sums<W, W % WIDE>(way, x + (d + i) * L, w, count, apart + BEFORE + i * BAND * APART);
                add_shifted(way, n, to + d * plan.stride);
            }
            return;
        }
        for (; d + WIDE <= W; d += WIDE) scatter_channels<W, WIDE>(way, x + d * L, w, count, to + d * plan.stride);
        if constexpr (W % WIDE != 0) scatter_channels<W, W % WIDE>(way, x + d * L, w, count, to + d * plan.stride);
    }
    // adds the plane's rows of queries to a line's sums
    void sum_line(int64_t line) {
        while (first_row < here.y_to && here.y_hi[first_row] < line) first_row++;
        for (int plane = 0; plane < here.planes; plane++) {
            int64_t count = 0;
            for (int64_t row = first_row; row < here.y_to && here.y_lo[row] <= line; row++, count++) {
                seen_by[count] = row % plan.alive;
                cell[count] = seen_by[count] * plan.row_scores() + ((line - here.y_lo[row]) * here.planes + plane) * BAND * L;
            }
            if (direct) open_line(here.plane[plane], line);
            real* sums = sums_of(here.plane[plane], line);
            const int64_t n = (here.x_to - here.x_from + L - 1) / L;
            for (int64_t i = 0; i < n; i++) {
                const int64_t kept = i * plan.alive;
                scatter<D>(targets[i], q + kept * D * L, slopes + kept * plan.row_scores(), count, sums + blocks[i].first);
                real* value_sums = sums + D * plan.stride + blocks[i].first;
                scatter<DV>(targets[i], g + kept * DV * L, weights + kept * plan.row_scores(), count, value_sums);
            }
            if (direct) close_line(here.plane[plane], line);
        }
    }

    template <Way WAY, int N> __attribute__((noinline)) void channels(int d, const real* s) {
        V one[GROUP];
        UNROLL for (int r = 0; r < GROUP; r++) one[r] = splat(1);
        sums<D, WAY, N>(d, keys, s, one, o, [&]() __attribute__((always_inline)) { look_ahead(); });
    }
    // What the weights of L queries need: lse in the exponent's units, what rounding took of it (a weight depends on that), delta.
    struct Row { V lse, rest, delta; };
    void read(int64_t row, int64_t x, int64_t kept, Row& to) {
        const element* q_row = P.q + here.place(P, P.q_layout) + q_grid.at(row, x);
        const element* g_row = P.grad_out + here.place(P, P.grad_out_layout) + g_grid.at(row, x);
        const element* out_row = P.out + here.place(P, P.out_layout) + out_grid.at(row, x);
        load_columns<D>(q_row, q_grid.step, q_grid.channel, block->count, q + kept * D * L, L);
        load_columns<DV>(g_row, g_grid.step, g_grid.channel, block->count, g + kept * DV * L, L);
        to.delta = token_dots(g_row, g_grid, out_row, out_grid, block->count);
        const real* lse = P.lse + here.place(P, P.lse_layout) + lse_grid.at(row, x);
        const real* grad_lse = P.grad_lse ? P.grad_lse + here.place(P, P.grad_lse_layout) + grad_lse_grid.at(row, x) : nullptr;
        for (int i = 0; i < L; i++) {
            const int lane = min(i, block->count - 1);
            const real sum = lse[lane * lse_grid.step];
            const double in_units = PLAIN_SCORE ? sum * 1.4426950408889634 : sum;
            to.lse[i] = sum == -INF ? INF : real(in_units);
            to.rest[i] = sum == -INF ? 0 : real(in_units - real(in_units));
            if (grad_lse && sum != -INF) to.delta[i] -= grad_lse[lane * grad_lse_grid.step];
        }
    }
    // One block of a group: P and dS, and dQ for the chunk's own rows.
    template <Way WAY> void grade(int64_t kept, int64_t row, const Row* row_of) {
        const int64_t slot = row % plan.alive;
        real *w = weights + kept * plan.row_scores(), *s = slopes + kept * plan.row_scores();
        V best[GROUP];
        products<D, WAY, false>(q + (kept + slot) * D * L, keys, w, best);
        products<DV, WAY, false>(g + (kept + slot) * DV * L, values, s, best);
        for (int r = 0; r < rows; r++) for (const Line* n = lines; n < lines + line_count; n++) if (n->a <= r && r < n->b) {
            real *p = w + n->cell[r], *ds = s + n->cell[r];
            UNROLL for (int t = 0; t < BAND; t++) {
                V x = load(p + t * L);
                if (LOADS) x = x * scale + load(table.values + n->elements[r] + t * L);
                const V e = exp2_vector(exponent(x, row_of[r].lse, unit) - row_of[r].rest);
                const V slope = e * (load(ds + t * L) - row_of[r].delta);
                store(p + t * L, e);
                store(ds + t * L, slope * scale);
                if (!LOADS || row < here.y_from) continue;
                real* sum = table.sums + n->elements[r] + t * L;
                store(sum, load(sum) + slope);
            }
        }
        if (row < here.y_from) return;
        int d = 0;
        for (; d + SUMS <= D; d += SUMS) channels<WAY, SUMS>(d, s);
        if constexpr (D % SUMS != 0) channels<WAY, D % SUMS>(d, s);
    }
    void run(bool more) {
        if (LOADS) table.aim(here);
        if (x_residue != here.residue[X] || x_strip != here.x_from) {
            aim_blocks(here);
            for (int64_t x = here.x_from, i = 0; x < here.x_to; x += L, i++) targets[i].aim(here, blocks[i], x);
        }
        element* dq_from = P.dq + here.place(P, P.dq_layout);
        if (!direct && here.opens) each_line([&](int64_t plane, int64_t line) { open_line(plane, line); });
        int64_t have = here.line_from, done = here.line_from;
        first_row = here.row_from;
        for (int64_t row = here.row_from; row < here.y_to; row += GROUP) {
            rows = min<int64_t>(GROUP, here.y_to - row);
            const int64_t end = here.y_hi[row + rows - 1] + 1, slot = row % plan.alive;
            const int64_t complete = row + rows < here.y_to ? min<int64_t>(here.y_lo[row + rows], here.line_to) : here.line_to;
            load_lines(here, max<int64_t>(have, here.y_lo[row]), end);
            have = max(have, end);
            list_lines(here, row, rows, here.line_from, [&](int64_t r) { return (slot + r) * plan.row_scores(); });
            block = blocks;
            for (int64_t x = here.x_from, kept = 0; x < here.x_to; x += L, block++, kept += plan.alive) {
                Row row_of[GROUP];
                for (int r = 0; r < rows; r++) read(row + r, x, kept + slot + r, row_of[r]);
                if (LOADS) aim_elements();
                aim_ahead(x, row, more, done, complete);
                if (block->way == EASY) grade<EASY>(kept, row, row_of); else grade<HARD>(kept, row, row_of);
                if (row >= here.y_from) for (int r = 0; r < rows; r++)
                    store_columns<D>(o + r * D * L, L, dq_from + dq_grid.at(row + r, x), dq_grid.step, dq_grid.channel, block->count);
            }
            if (LOADS && ++table.groups == 16) table.flush();
            for (; done < complete; done++) sum_line(done);
        }
        if (!direct && here.closes) each_line([&](int64_t plane, int64_t line) { close_line(plane, line); });
    }
};
static bool backward(const Problem& P) {
    Plan plan(P, true);
    if (!plan.fits) return false;
    int64_t items = P.batch * P.kv_heads * plan.classes;
    const int64_t parts = plan.strips * (P.heads / P.kv_heads) * plan.q_planes;
    // chunks cost the rows that are computed twice: as many as give the least time
    double best = 0;
    for (int64_t n = 1, most = min<int64_t>(plan.groups, 8 * P.threads); n <= most; n++) {
        const double time = double((items * n + P.threads - 1) / P.threads) / n * (plan.groups + n * (plan.alive / GROUP - 1));
        if (n == 1 || time < best * 0.95) { best = time; plan.chunks = n; }
    }
    items *= plan.chunks;
    // each thread's sums of the table's gradient
    const int64_t table_size = LOADS ? up(P.tables[LOAD_TABLE[0]].last + 1, L) : 0;
    double* table_sums = (double*)calloc(max<int64_t>(P.threads * table_size, 1), sizeof(double));
#pragma omp parallel num_threads(P.threads)
    {
        static thread_local Arena arena;
        Backward work(P, plan, arena);
        work.table.gradient = table_sums + omp_get_thread_num() * table_size;
        const int64_t n = omp_get_num_threads(), me = omp_get_thread_num(), stop = items * (me + 1) / n * parts;
        int64_t part = items * me / n * parts;
        auto find = [&] {
            while (part < stop) {
                const int64_t now = part++;
                if (work.aim_next(now / parts, now % parts)) return true;
            }
            return false;
        };
        for (bool more = find(); more;) {
            std::swap(work.here, work.next);
            more = find();
            work.run(more);
        }
        work.table.flush();
    }
    if (LOADS) for (int64_t i = 0; i <= P.tables[LOAD_TABLE[0]].last; i++) {
        double sum = 0;
        for (int64_t thread = 0; thread < P.threads; thread++) sum += table_sums[thread * table_size + i];
        P.tables[LOAD_TABLE[0]].gradient[i] += sum;
    }
    free(table_sums);
    return true;
}
}
// false: this call's tokens are no band, and nothing was written
extern "C" bool attend_backward(const Problem* problem) { return band::backward(*problem); }
