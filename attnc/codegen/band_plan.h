// ---- bands: where every query sees BAND consecutive keys of the last axis ------------------------------------------------------
// Lanes are L queries of one row (one residue class), and key t of a lane is key lo + t of its own, so a box of keys is neither
// masked nor padded. The keys of L queries lie in two vectors that start at the first lane's: key t of all lanes is one permutation
// of them (or, where permuting is slow and lo grows by one per lane, one load). A group of GROUP rows of queries walks down the
// rows; each row of keys that it meets, a line, is transposed once, into a ring of lines [channel][key]. A clamped border and the
// interior are the same code.
namespace band {
#if defined(__AVX512F__)
constexpr bool PERMUTES = true;      // a permutation of two vectors is one instruction, a load across cache lines takes two turns
#else
constexpr bool PERMUTES = false;
#endif
constexpr int REGISTERS = ROWS * COLUMNS > 12 ? 32 : 16;
constexpr int GROUP = 4, SUMS = REGISTERS == 32 ? 4 : 3;         // rows of queries; channels of output that are summed at once
constexpr int64_t RING = 384 << 10, CELLS = 192 << 10;           // bytes of a ring (a part of the L2 cache), most bytes of scores
constexpr int Y = max(RANK - 2, 0), X = RANK - 1;                // axis of the rows, axis along a row
// How key t of all lanes is found. PERMUTES: by permuting one vector, or two. Else: by a load from key t of the first lane on, which
// gives the keys of lanes that follow each other, or whose lanes are permuted.
enum Way { EASY, HARD };

// The axis of the rows and the one along them; a call of one axis has a single row.
constexpr int32_t nothing = 0;
INLINE Axis row_axis(const Problem& P) {
    return RANK > 1 ? P.axes[Y] : Axis{1, 1, 0, 0, 1, 1, 1, 1, &nothing, &nothing, nullptr, nullptr, nullptr};
}
INLINE int64_t row_count(const int64_t* grid) { return RANK > 1 ? grid[Y] : 1; }
// tokens of one residue class
INLINE int64_t tokens_of(int64_t length, int64_t split, int64_t residue) {
    return residue < length ? (length - residue + split - 1) / split : 0;
}

// How a call's tokens are cut, from its tables; `fits`: they are a band that this kernel takes.
struct Plan {
    bool fits = false;
    Axis x, y;
    int64_t nx, ny;                      // their queries
    int64_t planes = 1, q_planes = 1, k_planes = 1;  // along the axes before Y: most that a query sees, most of a class
    int64_t lines = 1, seen = 1;         // most lines that a group, that a row meets in one plane
    int64_t most[RANK];                  // keys that a query sees along each axis
    int64_t alive = GROUP;               // backward: most rows, whole groups, that are needed again after their own group
    int64_t classes = 1;                 // residue classes, of all axes
    int64_t strips = 1, blocks = 0;      // parts of a row, so that what is kept of one fits into the cache; blocks of a strip
    int64_t stride = 0;                  // of a ring's channels
    int64_t groups = 0, chunks = 1;      // groups of rows; parts of them, so that every thread has some

    Plan(const Problem& P, bool backward) : x(P.axes[X]), y(row_axis(P)), nx(P.q_grid[X]), ny(row_count(P.q_grid)) {
        if (!(P.scale >= LEAST_SCALE) || P.q_prefix || P.k_prefix) return;
        for (int a = 0; a < RANK; a++) {
            const Axis& axis = P.axes[a];
            most[a] = 1;
            for (int64_t r = 0; r < axis.split; r++) {
                const int32_t *lo = axis.lo + r * axis.columns, *hi = axis.hi + r * axis.columns;
                const int64_t n = tokens_of(P.q_grid[a], axis.split, r);
                for (int64_t j = 0, first = 0; j < n; j++) {
                    if (hi[j] < lo[j] || (j && (lo[j] < lo[j - 1] || hi[j] < hi[j - 1]))) return;
                    if (a == X && hi[j] - lo[j] + 1 != BAND) return;
                    const int64_t end = min(j + L, n) - 1;
                    if (a == X && j % L == 0 && (PERMUTES ? hi[end] - lo[j] >= 2 * L : lo[end] - lo[j] >= L)) return;
                    if (a == Y && a != X && j % GROUP == 0) {
                        lines = max<int64_t>(lines, hi[min(j + GROUP, n) - 1] - lo[j] + 1);
                        while (hi[first] < lo[j]) first++;      // the first row that sees a line of this group's
                        alive = max(alive, j + GROUP - first / GROUP * GROUP);
                    }
                    most[a] = max<int64_t>(most[a], hi[j] - lo[j] + 1);
                }
            }
            classes *= min(axis.split, P.q_grid[a]);
            if (a < Y) {
                planes *= most[a];
                q_planes *= tokens_of(P.q_grid[a], axis.split, 0); k_planes *= tokens_of(P.k_grid[a], axis.split, 0);
            }
            if (a == Y && a != X) seen = most[a];
        }
        if (scores() * (int64_t)sizeof(real) > CELLS) return;
        const int64_t all = (tokens_of(nx, x.split, 0) + L - 1) / L;
        for (strips = 1;; strips++) {
            int64_t span = 1;
            for (int64_t r = 0; r < x.split; r++) for (int64_t s = 0; s < strips; s++) {
                const int64_t n = tokens_of(nx, x.split, r);
                const int64_t from = all * s / strips * L, to = min(all * (s + 1) / strips * L, n);
                if (from < to) span = max<int64_t>(span, x.hi[r * x.columns + to - 1] - x.lo[r * x.columns + from] + 1);
            }
            blocks = (all + strips - 1) / strips;
            stride = up(span, L);
            if (stride / L % 2 == 0) stride += L;      // rows a power of two apart would share cache sets
            const int64_t kept = ring() + (backward ? blocks * alive * row() + stride * (D + DV) : 0);
            if (strips >= all || kept * (int64_t)sizeof(real) <= (backward ? 2 * RING : RING)) break;
        }
        groups = (tokens_of(ny, y.split, 0) + GROUP - 1) / GROUP;
        fits = true;
    }
    int64_t row_scores() const { return planes * seen * BAND * L; }
    int64_t scores() const { return GROUP * row_scores(); }
    int64_t ring() const { return planes * lines * stride * (D + DV) + 2 * L; }
    int64_t row() const { return L * (D + DV) + 2 * row_scores(); }        // backward: what is kept of L queries
};

// One tensor as rows of tokens of a residue class: token (row, column) lies row * line + column * step behind the class's first.
struct Grid {
    int64_t line, step, channel;
    Grid(const Plan& plan, const Layout& t)
        : line(RANK > 1 ? plan.y.split * t.axis[Y] : 0), step(plan.x.split * t.axis[X]), channel(t.channel) {}
    INLINE int64_t at(int64_t row, int64_t column) const { return row * line + column * step; }
};
// Queries of one plane of one class: rows [y_from, y_to), columns [x_from, x_to), and the keys that they see.
struct Item {
    int64_t b, h, kv, x_from, x_to, y_from, y_to, key_from, key_to, columns;
    const int32_t *x_lo, *y_lo, *y_hi;
    int64_t residue[RANK], index[RANK];      // class; of the plane: index in the class
    int planes;                              // of keys that the queries see
    int64_t* plane;                          // their numbers in the class,
    int64_t class_planes;                    // which has so many
    // of a strip and a chunk of this (b, h), class and plane; false: there is nothing
    bool aim(const Problem& P, const Plan& plan, int64_t strip, int64_t chunk) {
        kv = h / (P.heads / P.kv_heads);
        const int64_t x_residue = residue[X], y_residue = RANK > 1 ? residue[Y] : 0;
        const int64_t blocks = (tokens_of(plan.nx, plan.x.split, 0) + L - 1) / L;
        const int64_t rows = tokens_of(plan.ny, plan.y.split, y_residue);
        columns = tokens_of(plan.nx, plan.x.split, x_residue);
        x_from = blocks * strip / plan.strips * L; x_to = min(blocks * (strip + 1) / plan.strips * L, columns);
        y_from = plan.groups * chunk / plan.chunks * GROUP; y_to = min(plan.groups * (chunk + 1) / plan.chunks * GROUP, rows);
        if (x_from >= x_to || y_from >= y_to) return false;
        x_lo = plan.x.lo + x_residue * plan.x.columns;
        y_lo = plan.y.lo + y_residue * plan.y.columns; y_hi = plan.y.hi + y_residue * plan.y.columns;
        key_from = x_lo[x_from]; key_to = x_lo[x_to - 1] + BAND;
        planes = class_planes = 1;
        plane[0] = 0;
        for (int a = 0; a < Y; a++) {       // each axis multiplies the planes by its interval
            const Axis& axis = P.axes[a];
            const int64_t length = tokens_of(P.k_grid[a], axis.split, residue[a]), query = residue[a] * axis.columns + index[a];
            const int64_t begin = axis.lo[query], n = axis.hi[query] - begin + 1;
            for (int64_t i = planes * n - 1; i >= 0; i--) plane[i] = plane[i / n] * length + begin + i % n;
            planes *= n; class_planes *= length;
        }
        return true;
    }
    // offset of the first token of the class: of plane number n of the keys, of the queries' plane
    int64_t key_place(const Problem& P, const Layout& t, int64_t n) const {
        int64_t at = b * t.batch + kv * t.head + t.start;
        for (int a = Y; a < RANK; a++) at += residue[a] * t.axis[a];
        for (int a = Y - 1; a >= 0; a--) {
            const int64_t length = tokens_of(P.k_grid[a], P.axes[a].split, residue[a]);
            at += (residue[a] + P.axes[a].split * (n % length)) * t.axis[a];
            n /= length;
        }
        return at;
    }
    int64_t place(const Problem& P, const Layout& t) const {
        int64_t at = b * t.batch + h * t.head + t.start;
        for (int a = 0; a < RANK; a++) at += (residue[a] + (a < Y ? P.axes[a].split * index[a] : 0)) * t.axis[a];
        return at;
    }
};

// A block of L queries of a row, or of the row's end: the first one's first key in a ring's line, and where key t of each lane lies
// from there on.
struct Lanes {
    int count;
    int64_t first;
    int64_t pattern;                     // of the places of its table elements
    Way way;
    I key[BAND];
    void aim(const Item& item, int64_t x) {
        count = min<int64_t>(L, item.x_to - x);
        first = item.x_lo[x] - item.key_from;
        bool straight = true;
        int last = 0;
        for (int i = 0; i < L; i++) {
            const int from = item.x_lo[x + min(i, count - 1)] - item.x_lo[x];
            straight &= i >= count || from == i;
            last = from + BAND - 1;
            for (int t = 0; t < BAND; t++) key[t][i] = PERMUTES ? from + t : from;
        }
        way = (PERMUTES ? last < L : straight) ? EASY : HARD;
    }
};
}
