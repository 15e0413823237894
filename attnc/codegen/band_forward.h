// ---- bands forward: a group's scores are all kept, so softmax looks at each row once ----------------------------------------
namespace band {
struct Forward : Band {
    Grid q_grid, out_grid, lse_grid;
    real *q, *o, *s;                         // [row][channel][L], [row][channel][L], [row][line][key][L]
    Item here, next;
    bool dense;                              // a token's channels are one run of memory
    int rows;                                // of the group at hand
    int64_t count[GROUP];                    // keys that each of them sees
    // what the next group needs, token by token
    struct Ahead { const element *k, *v, *q, *out; int lines, rows, columns, line, column, pace; } ahead;

    Forward(const Problem& P, const Plan& plan, Arena& arena)
        : Band(P, plan, false), q_grid(plan, P.q_layout), out_grid(plan, P.out_layout), lse_grid(plan, P.lse_layout) {
        dense = P.q_layout.channel == 1 && P.k_layout.channel == 1 && P.v_layout.channel == 1 && P.out_layout.channel == 1;
        arena.reserve(bytes() + sizeof(real) * (plan.scores() + GROUP * L * (D + DV)) + plan.planes * 16 + 64 * 8);
        allocate(arena);
        q = arena.take<real>(GROUP * D * L); o = arena.take<real>(GROUP * DV * L); s = arena.take<real>(plan.scores());
        for (Item* i : {&here, &next}) i->plane = arena.take<int64_t>(plan.planes);
    }
    // item number `item` of the call
    bool aim_next(int64_t item) {
        int64_t rest = item;
        auto take = [&](int64_t n) { const int64_t i = rest % n; rest /= n; return i; };
        const int64_t chunk = take(plan.chunks), strip = take(plan.strips);
        for (int a = RANK - 1; a >= 0; a--) next.residue[a] = take(min(P.axes[a].split, P.q_grid[a]));
        for (int a = Y - 1; a >= 0; a--) next.index[a] = take(tokens_of(P.q_grid[a], P.axes[a].split, 0));
        // with tables, a head's elements serve its whole batch
        next.b = LOADS ? take(P.batch) : 0; next.h = take(P.heads);
        if (!LOADS) next.b = rest;
        for (int a = 0; a < Y; a++) if (next.index[a] >= tokens_of(P.q_grid[a], P.axes[a].split, next.residue[a])) return false;
        return next.aim(P, plan, strip, chunk);
    }
    // While the block from column x on is computed: the same columns of the next group, which may be the next item's first.
    void aim_ahead(int64_t x, int64_t row, bool more) {
        const bool same = row + GROUP < here.y_to;
        ahead.columns = 0;
        if (!dense || !(same || more)) return;
        const Item& item = same ? here : next;
        const int64_t from = same ? row + GROUP : item.y_from, to = min(from + GROUP, item.y_to);
        const int64_t at = item.x_from + (x - here.x_from);
        const int64_t line = same ? item.y_hi[from - 1] + 1 : item.y_lo[from];
        if (at >= item.x_to) return;
        ahead.columns = min<int64_t>(L, item.x_to - at);
        ahead.lines = item.y_hi[to - 1] + 1 - line; ahead.rows = to - from;
        ahead.k = P.k + item.key_place(P, P.k_layout, item.plane[item.planes - 1]) + k_grid.at(line, item.x_lo[at]);
        ahead.v = P.v + item.key_place(P, P.v_layout, item.plane[item.planes - 1]) + v_grid.at(line, item.x_lo[at]);
        ahead.q = P.q + item.place(P, P.q_layout) + q_grid.at(from, at);
        ahead.out = P.out + item.place(P, P.out_layout) + out_grid.at(from, at);
        ahead.line = ahead.column = 0;
        ahead.pace = max(ahead.lines, ahead.rows) * ahead.columns / (line_count * up(DV, SUMS) / SUMS) + 1;
    }
    INLINE void look_ahead() {
        for (int n = 0; n < ahead.pace && ahead.column < ahead.columns; n++) {
            if (ahead.line < ahead.lines) {
                prefetch<D>(ahead.k + k_grid.at(ahead.line, ahead.column), 1);
                prefetch<DV>(ahead.v + v_grid.at(ahead.line, ahead.column), 1);
            }
            if (ahead.line < ahead.rows) {
                prefetch<D>(ahead.q + q_grid.at(ahead.line, ahead.column), 1);
                prefetch<DV>(ahead.out + out_grid.at(ahead.line, ahead.column), 1);
            }
            if (++ahead.line >= max(ahead.lines, ahead.rows)) { ahead.line = 0; ahead.column++; }
        }
    }
    template <Way WAY, int N> __attribute__((noinline)) void channels(int d, const V* factor) {
        sums<DV, WAY, N>(d, values, s, factor, o, [&]() __attribute__((always_inline)) { look_ahead(); });
    }
    template <Way WAY> void attend(V* log_sum) {
        V best[GROUP], factor[GROUP];
        products<D, WAY, (LOADS > 0)>(q, keys, s, best);
        for (int r = 0; r < GROUP; r++) factor[r] = V{};
        for (int r = 0; r < rows; r++) {
            real* p = s + r * plan.row_scores();
            const V shift = PLAIN_SCORE ? best[r] * unit : best[r];
            V total{};
            for (int64_t i = 0; i < count[r]; i++) {
                const V e = exp2_vector(exponent(load(p + i * L), shift, unit));
                total += e;
                store(p + i * L, e);
            }
            const I none = total <= V{};
            factor[r] = select(none, V{}, splat(1) / total);
            const V logs = PLAIN_SCORE ? (shift + log2(total)) * splat(LN2) : shift + log2(total) * splat(LN2);
            log_sum[r] = select(none, splat(-INF), logs);
        }
        int d = 0;
        for (; d + SUMS <= DV; d += SUMS) channels<WAY, SUMS>(d, factor);
        if constexpr (DV % SUMS != 0) channels<WAY, DV % SUMS>(d, factor);
    }
    void run(bool more) {
        const element* q_from = P.q + here.place(P, P.q_layout);
        element* out_from = P.out + here.place(P, P.out_layout);
        real* lse_from = P.lse ? P.lse + here.place(P, P.lse_layout) : nullptr;
        if (LOADS) table.aim(here);
        aim_blocks(here);
        int64_t have = 0;                    // lines before it are in the rings, or no longer needed
        for (int64_t row = here.y_from; row < here.y_to; row += GROUP) {
            rows = min<int64_t>(GROUP, here.y_to - row);
            const int64_t end = here.y_hi[row + rows - 1] + 1;
            load_lines(here, max<int64_t>(have, here.y_lo[row]), end);
            have = end;
            list_lines(here, row, rows, 0, [&](int64_t r) { return r * plan.row_scores(); });
            for (int r = 0; r < rows; r++) count[r] = here.planes * (here.y_hi[row + r] - here.y_lo[row + r] + 1) * BAND;
            block = blocks;
            for (int64_t x = here.x_from; x < here.x_to; x += L, block++) {
                const int wide = block->count;
                for (int r = 0; r < rows; r++)
                    load_columns<D>(q_from + q_grid.at(row + r, x), q_grid.step, q_grid.channel, wide, q + r * D * L, L);
                if (LOADS) aim_elements();
                aim_ahead(x, row, more);
                V log_sum[GROUP];
                if (block->way == EASY) attend<EASY>(log_sum); else attend<HARD>(log_sum);
                for (int r = 0; r < rows; r++) {
                    element* out = out_from + out_grid.at(row + r, x);
                    store_columns<DV>(o + r * DV * L, L, out, out_grid.step, out_grid.channel, wide);
                    if (!lse_from) continue;
                    real* lse = lse_from + lse_grid.at(row + r, x);
                    for (int i = 0; i < wide; i++) lse[i * lse_grid.step] = log_sum[r][i];
                }
            }
        }
    }
};
static bool forward(const Problem& P) {
    Plan plan(P, false);
    if (!plan.fits || P.continues) return false;
    int64_t items = P.batch * P.heads * plan.classes * plan.q_planes * plan.strips;
    if (items && items % P.threads && items < 8 * P.threads) plan.chunks = min(plan.groups, (4 * P.threads + items - 1) / items);
    items *= plan.chunks;
#pragma omp parallel num_threads(P.threads)
    {
        static thread_local Arena arena;
        Forward work(P, plan, arena);
        const int64_t n = omp_get_num_threads(), me = omp_get_thread_num(), stop = items * (me + 1) / n;
        int64_t item = items * me / n;
        auto find = [&] { while (item < stop) if (work.aim_next(item++)) return true; return false; };
        for (bool more = find(); more;) {
            std::swap(work.here, work.next);
            more = find();
            work.run(more);
        }
    }
    return true;
}
}
// false: this call's tokens are no band, and nothing was written
extern "C" bool attend_forward(const Problem* problem) { return band::forward(*problem); }
