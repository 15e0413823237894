// ---- table elements that enter a score ----------------------------------------------------------------------------------------------
// values[i][k] = table[offset of query i + offset of key k + offset of the head]. Tiles of one shape (windows) look at the same
// elements and find them expanded; their gradients are summed in the same places. Where a step along the lead axis takes queries as
// far through the table as keys, and back (relative positions), rows of queries a step apart are parts of one strip.
struct Shape {
    int64_t *queries, *keys;        // offsets
    int64_t* place;                 // [queries] where their rows begin in an expansion
    int rows = 0, columns = 0, version = 0;
    int phases, steps, key_step;    // strips, rows in each of them, and how far apart these begin
    int64_t strip;                  // elements of one
    int64_t least, most;            // sums of two offsets
    int64_t first = 0;              // where its first expansion begins
    int64_t size() const { return phases * strip; }
    bool holds(const Tile& tile, const Keys& chunk, const int64_t* q, const int64_t* k) const {
        bool same = rows == tile.queries && columns == chunk.count;
        const int64_t base = q[0];
        for (int i = 0; same && i < rows; i++) same = queries[i] == q[i] - base;
        for (int i = 0; same && i < columns; i++) same = keys[i] == k[i] + base;
        return same;
    }
    // often: many tiles will find it, so that rows on vectors' boundaries are worth their filling, if they fit the L1 cache
    void take(const Tile& tile, const Keys& chunk, const int64_t* q, const int64_t* k, bool often) {
        rows = tile.queries; columns = chunk.count; version++;
        const int64_t base = q[0];
        for (int i = 0; i < rows; i++) queries[i] = q[i] - base;
        for (int i = 0; i < columns; i++) keys[i] = k[i] + base;
        least = most = 0;
        for (const auto& [part, count] : {std::pair(queries, rows), std::pair(keys, columns)}) {
            int64_t low = part[0], high = part[0];
            for (int i = 1; i < count; i++) { low = min(low, part[i]); high = max(high, part[i]); }
            least += low; most += high;
        }
        phases = rows; steps = 1; key_step = columns;
        if (!often || rows * up(columns, L) > 8192) join(tile);
        strip = up((steps - 1) * key_step + up(columns, L), L);
        for (int i = 0; i < rows; i++) place[i] = i % phases * strip + (steps - 1 - i / phases) * key_step;
    }
    void join(const Tile& t) {
        int lead = 0;
        while (lead < RANK - 1 && t.q_box.extent[lead] == 1) lead++;
        int64_t step = 1, along = 1;
        for (int a = lead + 1; a < RANK; a++) { step *= t.q_box.extent[a]; along *= t.k_box.extent[a]; }
        bool same = !POST && step < rows && along <= columns;       // (what lies behind a row counts for nothing, but as a factor)
        for (int i = step; same && i < rows; i++) same = queries[i] - queries[i - step] == queries[step] - queries[0];
        for (int i = along; same && i < columns; i++) same = keys[i] - keys[i - along] == queries[0] - queries[step];
        if (same) { phases = step; steps = rows / step; key_step = along; }
    }
    // f(place, query, key) for each element of an expansion
    template <class F> INLINE void each(F f) const {
        for (int p = 0; p < phases; p++) for (int m = 0; m < steps; m++) {
            const int i = (steps - 1 - m) * phases + p, n = m == steps - 1 ? columns : key_step;
            for (int k = 0; k < n; k++) f(p * strip + m * key_step + k, i, k);
        }
    }
};
struct Expansion {
    real *values, *sums;
    double* gradient;
    const int64_t* place;
    int64_t shift, last;
    int added = 0, version = 0;     // version: of the shape that it was filled for; 0: none
    int64_t offset(const Shape& s, int i, int k) const { return min(max<int64_t>(s.queries[i] + s.keys[k] + shift, 0), last); }
    // adds the sums to the table's gradient: now and then, so that they stay short and exact
    void flush(const Shape& s) {
        if (!sums || !version) return;
        s.each([&](int64_t at, int i, int k) __attribute__((always_inline)) { gradient[offset(s, i, k)] += sums[at]; });
        memset(sums, 0, sizeof(real) * s.size());
        added = 0;
    }
    void fill(const Shape& s, const Table& t, real* room, bool backward, double* into, int64_t head) {
        values = room; sums = backward ? room + s.size() : nullptr; gradient = into; place = s.place;
        last = t.last; shift = head; version = s.version; added = 0;
        memset(room, 0, sizeof(real) * s.size() * (backward ? 2 : 1));
        const real* const data = t.data;
        const bool inside = s.least + shift >= 0 && s.most + shift <= last;
        if (inside) s.each([&](int64_t at, int i, int k) __attribute__((always_inline)) { room[at] = data[s.queries[i] + s.keys[k] + shift]; });
        else s.each([&](int64_t at, int i, int k) __attribute__((always_inline)) { room[at] = data[offset(s, i, k)]; });
    }
};

// In which order tiles and heads are walked, and how many expanded tiles are kept on the way.
struct Order {
    static constexpr int WAYS = 9;      // shapes of tiles that take turns: of two axes the inside, and what each border cuts
    bool heads_inner;                   // tiles hardly share keys: a tile is aimed at once for all heads, whose rows are neighbours
    int64_t queries = 1, keys = 1;      // most of a tile
    int64_t heads = 0, room = 0;        // expansions of each load and shape, and elements in all of them
    bool often = false;                 // a thread finds each of them again, and again
    explicit Order(const Problem& P) {
        double reuse = 1;               // tiles that meet a key
        int64_t tiles = P.batch;
        for (int a = 0; a < RANK; a++) {
            const Axis& x = P.axes[a];
            int64_t sum = 0, longest = 0, widest = 0;
            for (int64_t p = 0; p < x.pieces; p++) {
                const int32_t* piece = x.piece + 3 * p;
                const int64_t n = max(x.hi[piece[0] * x.columns + piece[2] - 1] - x.lo[piece[0] * x.columns + piece[1]] + 1, 0);
                sum += n; widest = max(widest, n); longest = max<int64_t>(longest, piece[2] - piece[1]);
            }
            queries *= longest; keys *= widest; tiles *= x.pieces;
            reuse *= double(sum) / max<int64_t>(x.real_keys, 1);
        }
        const int64_t fit = LOADS ? EXPANSION / max<int64_t>(queries * up(keys, L), 1) : 0;
        heads_inner = reuse < 2 && (!LOADS || fit >= P.heads);
        bool any = false;
        for (int l = 0; l < LOADS; l++) any |= LOAD_APART[l];
        if (!any) return;
        heads = heads_inner ? P.heads : 1;
        often = tiles >= 16 * P.threads;
        room = min<int64_t>(EXPANSION, WAYS * heads * queries * up(keys, L));
        keys = min<int64_t>(keys, CHUNK);
    }
    // item number n of a call with so many tiles
    void item(const Problem& P, int64_t heads, int64_t n, int64_t tiles, int64_t& b, int64_t& h, int64_t& tile) const {
        if (heads_inner) { h = n % heads; n /= heads; tile = n % tiles; b = n / tiles; }
        else if (LOADS) { tile = n % tiles; n /= tiles; b = n % P.batch; h = n / P.batch; }
        else { tile = n % tiles; n /= tiles; h = n % heads; b = n / heads; }
    }
    int64_t index(const Problem& P, int64_t heads, int64_t b, int64_t h, int64_t tile, int64_t tiles) const {
        return heads_inner ? (b * tiles + tile) * heads + h : ((LOADS ? h * P.batch + b : b * heads + h) * tiles + tile);
    }
};

// Where a row's table elements lie: in an expansion, or read into `spare` for the rows at hand.
struct Loads {
    Order order;
    bool backward;
    Shape* shapes;                              // [LOADS][WAYS]
    Expansion *all, *expansion[LOADS + 1];      // [LOADS][WAYS][heads]; the tile's, null where its elements are not expanded
    real* room[LOADS + 1];
    int64_t used[LOADS + 1];
    int filled[LOADS + 1];                      // ways
    real* spare;                                // [LOADS][BATCH][CHUNK]

    explicit Loads(const Problem& P) : order(P) {}
    int64_t ways() const { return order.heads ? Order::WAYS : 0; }
    size_t bytes(bool backward) const {
        return LOADS * (sizeof(real) * (order.room * (backward ? 2 : 1) + BATCH * CHUNK) + ways() * order.heads * sizeof(Expansion)
                        + ways() * (sizeof(Shape) + 8 * (2 * order.queries + order.keys) + 64 * 3) + 64 * 4);
    }
    void allocate(Arena& arena, bool is_backward) {
        backward = is_backward;
        spare = arena.take<real>(LOADS * BATCH * CHUNK);
        shapes = arena.take<Shape>(LOADS * ways());
        all = arena.take<Expansion>(LOADS * ways() * order.heads);
        for (int64_t i = 0; i < LOADS * ways(); i++) {
            shapes[i] = Shape();
            for (int64_t** p : {&shapes[i].queries, &shapes[i].place}) *p = arena.take<int64_t>(order.queries);
            shapes[i].keys = arena.take<int64_t>(order.keys);
        }
        for (int64_t i = 0; i < LOADS * ways() * order.heads; i++) all[i] = Expansion();
        for (int l = 0; l < LOADS; l++) { room[l] = arena.take<real>(order.room * (backward ? 2 : 1)); used[l] = filled[l] = 0; }
    }
    Expansion& slot(int l, int64_t way, int64_t head) const { return all[(l * Order::WAYS + way) * order.heads + head]; }
    void aim(const Problem& P, const Numbers& numbers, Tile& t, const Keys& keys, double* const* gradients) {
        for (int l = 0; l < LOADS; l++) {
            expansion[l] = nullptr;
            if (!LOAD_APART[l] || !order.heads || t.prefix || keys.prefix) continue;
@LISTS@            if (t.list) continue;      // whose blocks have no shape in common
            Shape* const shape = shapes + l * Order::WAYS;
            const bool one = t.chunks(P) == t.prefix_chunks(P) + 1;     // chunk: its shape is the tile's
            const int way = one && t.version[l] >= 0 && shape[t.way[l]].version == t.version[l] ? t.way[l] : find(l, t, keys, one);
            if (way < 0) continue;
            t.way[l] = way; t.version[l] = shape[way].version;
            const Shape& mine = shape[way];
            const int64_t head = order.heads_inner ? t.head : 0, shift = head_offset(P, numbers, l);
            Expansion& x = slot(l, way, head);
            if (x.version != mine.version || x.shift != shift) {
                x.flush(mine);      // (of another head)
                real* const place = room[l] + (mine.first + head * mine.size()) * (backward ? 2 : 1);
                x.fill(mine, P.tables[LOAD_TABLE[l]], place, backward, gradients ? gradients[LOAD_TABLE[l]] : nullptr, shift);
            }
            if ((x.added += mine.steps) >= 32) x.flush(mine);
            expansion[l] = &x;
        }
    }
    // The chunk's shape among those that are kept; where there is no room for another, all begin anew. -1: it is not expanded.
    int find(int l, const Tile& t, const Keys& keys, bool one) {
        Shape* const shape = shapes + l * Order::WAYS;
        int w = 0;
        while (w < filled[l] && !shape[w].holds(t, keys, t.load_offset[l], keys.load_offset[l])) w++;
        if (w < filled[l]) return w;
        if (w == Order::WAYS) w = begin_anew(l);
        shape[w].take(t, keys, t.load_offset[l], keys.load_offset[l], order.often);
        const int64_t size = order.heads * shape[w].size();
        if (size > order.room || (!one && shape[w].steps == 1)) return -1;      // (rows of many chunks would be read once each)
        if (used[l] + size > order.room) {
            if (const int old = w; (w = begin_anew(l)) != old) shape[w].take(t, keys, t.load_offset[l], keys.load_offset[l], order.often);
        }
        shape[w].first = used[l];
        used[l] += size; filled[l] = w + 1;
        return w;
    }
    int begin_anew(int l) {
        flush(l);
        for (int w = 0; w < filled[l]; w++) {
            shapes[l * Order::WAYS + w].version++;
            for (int64_t head = 0; head < order.heads; head++) slot(l, w, head).version = 0;
        }
        used[l] = filled[l] = 0;
        return 0;
    }
    void flush(int l) {
        for (int w = 0; w < filled[l]; w++) for (int64_t head = 0; head < order.heads; head++) slot(l, w, head).flush(shapes[l * Order::WAYS + w]);
    }
    void flush() { for (int l = 0; l < LOADS; l++) flush(l); }
    int64_t offset(const Problem& P, const Numbers& numbers, const Tile& t, const Keys& keys, int l, int i, int k) const {
        int64_t at = t.load_offset[l][i] + keys.load_offset[l][k] + head_offset(P, numbers, l);
        if (!LOAD_APART[l]) at += mixed_offset(P, numbers, t.terms[i], keys.terms, l, k);
        return min(max<int64_t>(at, 0), P.tables[LOAD_TABLE[l]].last);
    }
    // out[l]: the elements for query i = first + r, keys [from, to) at least
    INLINE void rows(const Problem& P, const Numbers& numbers, const Tile& t, const Keys& keys, int i, int r, int from, int to, const real** out) const {
        for (int l = 0; l < LOADS; l++) {
            if (expansion[l]) { out[l] = expansion[l]->values + expansion[l]->place[i]; continue; }
            real* row = spare + ((int64_t)l * BATCH + r) * CHUNK;
            if (!t.prefix && !keys.prefix) {
                const real* table = P.tables[LOAD_TABLE[l]].data;
                for (int k = from; k < min(to, keys.count); k++) row[k] = table[offset(P, numbers, t, keys, l, i, k)];
                for (int k = keys.count; k < to; k++) row[k] = 0;
            }
            out[l] = row;
        }
    }
};
