// ---- forward: softmax in one pass over the key chunks, with a running maximum and sum per query -----------------------------------
struct Forward {
    const Problem& P;
    Tile tile;
    Keys keys;
    Loads loads;
    Expansion expansions[LOADS + 1];
    Numbers numbers;
    Panels panels;
    real *q, *k, *v, *scores, *o, *maximum, *total;
    bool* started;
    int64_t *q_offset, *out_offset, *lse_offset;

    explicit Forward(const Problem& P, Arena& arena) : P(P) {
        arena.reserve(Tile::bytes() + Keys::bytes() + LOADS * Expansion::bytes(false) + 64 * 16 + TILE * 25
                      + sizeof(real) * (TILE * (DP + VP + 2) + CHUNK * (2 * DP + VP + ROWS + LOADS * ROWS)));
        tile.allocate(arena); keys.allocate(arena);
        for (int l = 0; l < LOADS; l++) expansions[l].allocate(arena, false);
        loads.expansion = expansions;
        loads.spare = arena.take<real>(LOADS * ROWS * CHUNK);
        q = arena.take<real>(TILE * DP); o = arena.take<real>(TILE * VP);
        maximum = arena.take<real>(TILE); total = arena.take<real>(TILE); started = arena.take<bool>(TILE);
        q_offset = arena.take<int64_t>(TILE); out_offset = arena.take<int64_t>(TILE); lse_offset = arena.take<int64_t>(TILE);
        k = arena.take<real>(CHUNK * DP); panels.data = arena.take<real>(CHUNK * DP); v = arena.take<real>(CHUNK * VP);
        scores = arena.take<real>(ROWS * CHUNK);
    }

    // Scores of one query over the keys [from, to), in place. Gives their maximum.
    template <bool PLAIN> INLINE real row_scores(real* row, int i, int r, int from, int to) {
        const real* elements[LOADS + 1];
        if (!PLAIN) loads.rows(P, numbers, tile, keys, i, r, from, to, elements);
        V best = splat(LOWEST);
        each_score<PLAIN>(P, numbers, tile, keys, elements, row, i, from, to, [&](int j, V, V x, bool masked) __attribute__((always_inline)) {
            best = larger(best, x);
            if (!PLAIN_SCORE || masked) store(row + j, x);
        });
        return PLAIN_SCORE ? largest(best) * numbers.scale_log2e : largest(best);
    }
    // m queries from i on against the packed chunk
    void rows(int i, int m) {
        const Run run = run_of_rows(tile, keys, i, m);
        if (run.begin >= run.end) return;
        const int first = run.begin / L, last = (run.end + L - 1) / L, from = first * L, to = last * L;
        if (USES_SCORE || tile.prefix || keys.prefix) multiply_panels<D>(m, q + i * DP, panels, first, last, scores, CHUNK);
        else memset(scores, 0, sizeof(real) * m * CHUNK);
        const bool plain = tile.prefix || keys.prefix;
        for (int r = 0; r < m; r++) {
            real* row = scores + r * CHUNK;
            const real here = PLAIN_SCORE || plain ? row_scores<true>(row, i + r, r, from, to) : row_scores<false>(row, i + r, r, from, to);
            const real now = max(maximum[i + r], here);
            V sums{};
            const V shift = splat(now), unit = unit_of(numbers);
            for (int j = from; j < to; j += L) {
                const V e = exp2_vector(exponent(load(row + j), shift, unit));
                sums += e;
                store(row + j, e);
            }
            if (POST && !plain) {
                const real* elements[LOADS + 1];
                loads.rows(P, numbers, tile, keys, i + r, r, from, to, elements);
                for (int j = from; j < to; j += L) store(row + j, load(row + j) * post(P, numbers, tile.terms[i + r], keys.terms, elements, j));
            }
            if (started[i + r]) {
                const real factor = exp2_vector(splat((maximum[i + r] - now) * (PLAIN_SCORE ? 1 : LOG2E)))[0];
                total[i + r] = total[i + r] * factor + sum(sums);
                for (int d = 0; d < VP; d += L) store(o + (i + r) * VP + d, load(o + (i + r) * VP + d) * splat(factor));
            } else total[i + r] = sum(sums);
            maximum[i + r] = now;
        }
        multiply<DV>(m, {scores + run.begin, CHUNK, 1}, run.end - run.begin, v + run.begin * VP, o + i * VP, started[i]);
        for (int r = 0; r < m; r++) started[i + r] = true;
    }
    void run(int64_t prefix_from) {
        numbers = numbers_of(P, tile);
        tile.place(P, P.q_layout, prefix_from, q_offset);
        tile.place(P, P.out_layout, prefix_from, out_offset);
        tile.place(P, P.lse_layout, prefix_from, lse_offset);
        for (int i = 0; i < tile.queries; i++) {
            load_query(P, P.q + q_offset[i], q + i * DP);
            maximum[i] = LOWEST; total[i] = 0; started[i] = false;
        }
        const int64_t chunks = tile.chunks(P), kv = tile.kv_head;
        for (int64_t n = 0; n < chunks; n++) {
            keys.aim(P, tile, n);
            keys.gather<D>(P.k + tile.batch * P.k_layout.batch + kv * P.k_layout.head, P.k_layout.channel, keys.k_offset, P.pad_k + kv * P.pad_k_head, k);
            keys.gather<DV>(P.v + tile.batch * P.v_layout.batch + kv * P.v_layout.head, P.v_layout.channel, keys.v_offset, P.pad_v + kv * P.pad_v_head, v);
            pack_panels<D>(panels, k, keys.count);
            loads.aim(P, tile, keys, nullptr);
            for (int i = 0, m; i < tile.queries; i += m) { m = share(tile.queries - i, ROWS); rows(i, m); }
        }
        for (int i = 0; i < tile.queries; i++) {
            const bool some = total[i] > 0;
            if (!started[i] || !some) for (int d = 0; d < VP; d++) o[i * VP + d] = 0;
            store_row<DV>(P.out + out_offset[i], P.out_layout.channel, o + i * VP, some ? 1 / total[i] : !(total[i] <= 0) ? total[i] : 0);
            P.lse[lse_offset[i]] = some ? real(PLAIN_SCORE ? (maximum[i] + __builtin_log2(total[i])) * 0.6931471805599453 : maximum[i] + __builtin_log(total[i])) : total[i] <= 0 ? -INF : total[i];
        }
    }
};
extern "C" void attend_forward(const Problem* problem) {
    const Problem& P = *problem;
    int64_t tiles = 1;
    for (int a = 0; a < RANK; a++) tiles *= P.axes[a].pieces;
    const int64_t all = tiles + (P.q_prefix + TILE - 1) / TILE, items = P.batch * P.heads * all;
#pragma omp parallel num_threads(P.threads)
    {
        static thread_local Arena arena;
        Forward work(P, arena);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; item++) {
            int64_t t = item % all, rest = item / all;
            const int64_t b = HEADS_FIRST ? rest % P.batch : rest / P.heads, h = HEADS_FIRST ? rest / P.batch : rest % P.heads;
            int64_t prefix_from = 0;
            if (t < tiles) {
                int64_t piece[RANK];
                for (int a = RANK - 1; a >= 0; t /= P.axes[a].pieces, a--) piece[a] = t % P.axes[a].pieces;
                work.tile.aim(P, b, h, piece);
            } else {
                prefix_from = (t - tiles) * TILE;
                work.tile.aim_prefix(P, b, h, prefix_from, min(P.q_prefix, prefix_from + TILE));
            }
            work.run(prefix_from);
        }
    }
}
