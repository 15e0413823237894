// ---- table elements that enter a score ----------------------------------------------------------------------------------------------
// values[i][k] = table[offset of query i + offset of key k + offset of the head]. Tiles of one shape (windows) look at the same
// elements and find them expanded; their gradients are summed in the same places.
struct Shape {
    int64_t *queries, *keys;        // offsets
    int rows = 0, columns = 0, version = 0;
    int64_t least = 0, most = 0;    // sums of the two
    int64_t place = 0;              // of its first expansion
    int64_t size() const { return rows * up(columns, L); }
    bool holds(const Tile& tile, const Keys& chunk, const int64_t* q, const int64_t* k) const {
        bool same = rows == tile.queries && columns == chunk.count;
        const int64_t base = q[0];
        for (int i = 0; same && i < rows; i++) same = queries[i] == q[i] - base;
        for (int i = 0; same && i < columns; i++) same = keys[i] == k[i] + base;
        return same;
    }
    void take(const Tile& tile, const Keys& chunk, const int64_t* q, const int64_t* k) {
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
    }
};
struct Expansion {
    real *values, *sums;
    double* gradient;
    int64_t shift, last;
    int stride = 0, tiles = 0, version = 0;     // of the shape that it was filled for; 0: none
    int64_t offset(const Shape& s, int i, int k) const { return min(max<int64_t>(s.queries[i] + s.keys[k] + shift, 0), last); }
    // adds the sums to the table's gradient: now and then, so that they stay short and exact
    void flush(const Shape& s) {
        if (!sums || !version) return;
        for (int i = 0; i < s.rows; i++) for (int k = 0; k < s.columns; k++) gradient[offset(s, i, k)] += sums[i * stride + k];
        memset(sums, 0, sizeof(real) * s.rows * stride);
        tiles = 0;
    }
    void fill(const Shape& s, const Table& t, real* room, bool backward, double* into, int64_t head) {
        values = room; sums = backward ? room + s.size() : nullptr; gradient = into; last = t.last; shift = head; stride = up(s.columns, L); version = s.version; tiles = 0;
        const bool inside = s.least + shift >= 0 && s.most + shift <= last;
        const int columns = s.columns;
        for (int i = 0; i < s.rows; i++) {
            real* const row = values + i * stride;
            if (inside) {
                const real* const from = t.data + (s.queries[i] + shift);
                for (int k = 0; k < columns; k++) row[k] = from[s.keys[k]];
            } else for (int k = 0; k < columns; k++) row[k] = t.data[offset(s, i, k)];
            for (int k = columns; k < stride; k++) row[k] = 0;
        }
        if (sums) memset(sums, 0, sizeof(real) * s.rows * stride);
    }
};

// In which order tiles and heads are walked, and how many expanded tiles are kept on the way.
struct Order {
    static constexpr int WAYS = 9;      // shapes of tiles that take turns: of two axes the inside, and what each border cuts
    bool heads_inner;                   // tiles hardly share keys: a tile is aimed at once for all heads, whose rows are neighbours
    int64_t queries = 1, keys = 1;      // most of a tile
    int64_t heads = 0, room = 0;        // expansions of each load and shape, and elements in all of them
    explicit Order(const Problem& P) {
        double reuse = 1;               // tiles that meet a key
        for (int a = 0; a < RANK; a++) {
            const Axis& x = P.axes[a];
            int64_t sum = 0, longest = 0, widest = 0;
            for (int64_t p = 0; p < x.pieces; p++) {
                const int32_t* piece = x.piece + 3 * p;
                const int64_t n = max(x.hi[piece[0] * x.columns + piece[2] - 1] - x.lo[piece[0] * x.columns + piece[1]] + 1, 0);
                sum += n; widest = max(widest, n); longest = max<int64_t>(longest, piece[2] - piece[1]);
            }
            queries *= longest; keys *= widest;
            reuse *= double(sum) / max<int64_t>(x.real_keys, 1);
        }
        const int64_t fit = LOADS ? EXPANSION / max<int64_t>(queries * up(keys, L), 1) : 0;
        heads_inner = reuse < 2 && (!LOADS || fit >= P.heads);
        if (!fit || P.k_prefix + keys > CHUNK) return;
        heads = heads_inner ? P.heads : 1;
        room = min<int64_t>(EXPANSION, WAYS * heads * queries * up(keys, L));
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
                        + ways() * (sizeof(Shape) + 8 * (order.queries + order.keys) + 64 * 2) + 64 * 4);
    }
    void allocate(Arena& arena, bool is_backward) {
        backward = is_backward;
        spare = arena.take<real>(LOADS * BATCH * CHUNK);
        shapes = arena.take<Shape>(LOADS * ways());
        all = arena.take<Expansion>(LOADS * ways() * order.heads);
        for (int64_t i = 0; i < LOADS * ways(); i++) {
            shapes[i] = Shape();
            shapes[i].queries = arena.take<int64_t>(order.queries); shapes[i].keys = arena.take<int64_t>(order.keys);
        }
        for (int64_t i = 0; i < LOADS * ways() * order.heads; i++) all[i] = Expansion();
        for (int l = 0; l < LOADS; l++) { room[l] = arena.take<real>(order.room * (backward ? 2 : 1)); used[l] = filled[l] = 0; }
    }
    Expansion& slot(int l, int64_t way, int64_t head) const { return all[(l * Order::WAYS + way) * order.heads + head]; }
    void aim(const Problem& P, const Numbers& numbers, Tile& t, const Keys& keys, double* const* gradients) {
        for (int l = 0; l < LOADS; l++) {
            expansion[l] = nullptr;
            if (!LOAD_APART[l] || !order.heads || t.prefix || keys.prefix || t.chunks(P) != t.prefix_chunks(P) + 1) continue;
@LISTS@            if (t.list) continue;      // whose blocks have no shape in common
            Shape* const shape = shapes + l * Order::WAYS;
            if (t.version[l] < 0 || shape[t.way[l]].version != t.version[l]) find(l, t, keys);
            const Shape& mine = shape[t.way[l]];
            const int64_t head = order.heads_inner ? t.head : 0, shift = head_offset(P, numbers, l);
            Expansion& x = slot(l, t.way[l], head);
            if (x.version != mine.version || x.shift != shift) {
                x.flush(mine);      // (of another head)
                real* const place = room[l] + (mine.place + head * mine.size()) * (backward ? 2 : 1);
                x.fill(mine, P.tables[LOAD_TABLE[l]], place, backward, gradients ? gradients[LOAD_TABLE[l]] : nullptr, shift);
            }
            if (++x.tiles == 32) x.flush(mine);
            expansion[l] = &x;
        }
    }
    // the tile's shape among those that are kept; where there is no room for another, all begin anew
    void find(int l, Tile& t, const Keys& keys) {
        Shape* const shape = shapes + l * Order::WAYS;
        int w = 0;
        while (w < filled[l] && !shape[w].holds(t, keys, t.load_offset[l], keys.load_offset[l])) w++;
        if (w == filled[l]) {
            const int64_t size = order.heads * t.queries * up(keys.count, L);
            if (w == Order::WAYS || used[l] + size > order.room) {
                flush(l);
                for (w = 0; w < filled[l]; w++) {
                    shape[w].version++;
                    for (int64_t head = 0; head < order.heads; head++) slot(l, w, head).version = 0;
                }
                used[l] = w = 0;
            }
            shape[w].take(t, keys, t.load_offset[l], keys.load_offset[l]);
            shape[w].place = used[l];
            used[l] += size; filled[l] = w + 1;
        }
        t.way[l] = w; t.version[l] = shape[w].version;
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
            if (expansion[l]) { out[l] = expansion[l]->values + (int64_t)i * expansion[l]->stride; continue; }
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
