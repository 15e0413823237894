"""Prints a statement as C++ for the CPU: the expressions of this file inside the loops of the headers beside it.

One source per direction, with a plain C interface. What is fixed when it is printed: the statement, the head dimensions, the dtype,
whether keys may be virtual. Sizes, strides, tile borders and interval ends are arguments, so one built kernel serves every grid.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from attnc import ir
from attnc.analysis.derivative import derivative, loads
from attnc.analysis.structure import Structure, analyse
from attnc.codegen import around
from attnc.codegen.cpp_expr import Printer, Terms, depends, summands
from attnc.errors import UnsupportedError
from attnc.ir import Expr
from attnc.schedule.boxes import Kernel
from attnc.schedule.geometry import geometry
from attnc.schedule.list_choice import Limits

ELEMENTS = {"float32": "FLOAT", "float64": "DOUBLE", "bfloat16": "BFLOAT16", "float16": "HALF"}
LANES = 16  # what tile choices assume; the register length itself is the compiler's to say
BUFFERS = {False: 320 * 1024, True: 256 * 1024}  # bytes of a chunk's packed rows, forward and backward: a part of the L2 cache


@dataclass(frozen=True)
class Spec:
    """What one kernel is printed for."""

    program: ir.Program
    dim: int
    value_dim: int
    dtype: str  # "float32", ...

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Kept, because every call looks up what was made for its spec."""
        return hash((self.program, self.dim, self.value_dim, self.dtype))

    @property
    def attend(self) -> ir.Attend:
        """The statement."""
        assert isinstance(self.program.attend, ir.Attend)
        return self.program.attend

    @property
    def structure(self) -> Structure:
        """Its normal form, as the geometry has it."""
        return analyse(around.core(self.attend), self.same_grid, self.padded)

    @property
    def same_grid(self) -> bool:
        """Keys lie on the queries' grid."""
        return self.program.same_grid

    @property
    def padded(self) -> bool:
        """Keys may be virtual."""
        return self.program.keys.pad is not None or self.program.keys.pad_multiple is not None

    @property
    def rank(self) -> int:
        """Axes of the geometry: 1 where it is flat."""
        return len(self.structure.axes)

    @property
    def listed(self) -> bool:
        """Tiles may be told which blocks they visit."""
        return bool(self.structure.residual != ir.TRUE)

    @property
    def gaps(self) -> bool:
        """Axes may tell what their intervals contain too much, and all that the relation asks beyond them."""
        return self.structure.by_axis

    @property
    def tables(self) -> tuple[str, ...]:
        """Real tables (with gradients), in order."""
        a = self.attend
        return tuple(t for t in a.tables if t not in a.int_tables)

    @property
    def int_tables(self) -> tuple[str, ...]:
        """Tables that the relation reads."""
        return self.attend.int_tables

    @property
    def table_rank(self) -> int:
        """Most dimensions of any table."""
        return max([1, *(self.attend.table_rank(t) for t in self.attend.tables)])

    @property
    def band(self) -> int:
        """Keys of the last axis that every query sees, 0 where that is no one number. (Calls on shorter axes look again.)"""
        a, s = self.attend, self.structure
        tokens = (self.program.queries, self.program.keys)
        simple = s.residual == ir.TRUE and a.post is None and not any(s.unknown) and not a.int_tables and a.normalizer == ir.SOFTMAX
        simple &= a.q_map is None and a.k_map is None
        if not simple or s.flat or self.padded or any(t.prefix for t in tokens):
            return 0
        if not _plain_or_relative(a.score, s):
            return 0
        grid = (1024,) * self.rank
        last = geometry(self.program, grid, grid).axes[-1]
        r, j = np.arange(1024) % last.split, np.arange(1024) // last.split
        lo, hi = last.lo[r, j], last.hi[r, j]
        width = int((hi - lo).max()) + 1
        if width != int((hi - lo).min()) + 1 or not 1 < width <= LANES + 1:
            return 0
        own = last.block == width and bool(((lo <= j) & (j <= hi)).all())
        return 0 if own else width  # blocks see themselves: tiles need no permutation

    def kernel(self, backward: bool) -> Kernel:
        """Tile limits: how many queries a tile and how many keys a chunk may have."""
        size = 8 if self.dtype == "float64" else 4
        d, v = (-(-n // LANES) * LANES for n in (self.dim, self.value_dim))
        row = size * (3 * (d + v) if backward else 2 * d + v)
        keys = min(max(BUFFERS[backward] // row // 32 * 32, 64), 256 if backward else 512)
        queries = 128 if backward or d + v > 256 else 256
        return Kernel(queries, keys, LANES, 6, self.dim, self.value_dim, backward, self.band)

    def list_limits(self, backward: bool) -> Limits:
        """The same for tiles that walk lists of blocks."""
        k = self.kernel(backward)
        return Limits(min(k.queries, 128), min(k.keys, 128))


def _plain_or_relative(score: Expr, s: Structure) -> bool:
    """The score is SCORE, or SCORE plus a table element whose place depends on key - query (in units of the split) per axis."""
    if score == ir.SCORE:
        return True
    if score.op != "add" or ir.SCORE not in score.args:
        return False
    element = next(e for e in score.args if e != ir.SCORE)
    if element.op != "load" or element.kind != "real":
        return False
    for index in element.args[1:]:
        moves: Counter[Expr] = Counter()
        for sign, term in summands(index):
            places = {n for n in ir.walk(term) if n.op == "coord"}
            if not places:
                continue
            if len(places) > 1 or not _counts_along(term, s):
                return False
            (place,) = places
            moves[ir.substitute(term, {place: ir.coord("q", place.args[1])})] += sign
        if any(moves.values()):
            return False
    return True


def _counts_along(term: Expr, s: Structure) -> bool:
    """A coordinate, its index in the residue class, or a multiple of one of them."""
    if term.op == "mul":
        return any(a.op == "const" and _counts_along(b, s) for a, b in (term.args, term.args[::-1]))
    if term.op == "floordiv":
        return term.args[0].op == "coord" and bool(term.args[1] == s.axes[term.args[0].args[1]].split)
    return term.op == "coord"


def refuse(spec: Spec) -> None:
    """Raise UnsupportedError for what this printer does not lower."""
    a = spec.attend
    way = 'backend "cpp" does not lower it; backend="eager" does'
    if a.normalizer.over == "queries":
        raise UnsupportedError(
            f"pattern {a.name}: no C++ kernel is printed for softmax over queries; an operator (attnc.compile, any backend=) runs "
            "it by the kernels of the statement with queries and keys exchanged"
        )
    assert around.within(a), "other row maps and sinks surround the kernels"
    for name, dim in (("head dimension", spec.dim), ("value dimension", spec.value_dim)):
        if not 1 <= dim <= 256:
            raise UnsupportedError(f"pattern {a.name}: {name} {dim} is not between 1 and 256; {way}")
    if spec.dtype not in ELEMENTS:
        raise UnsupportedError(f'pattern {a.name}: dtype {spec.dtype}; backend "cpp" takes {", ".join(ELEMENTS)}')


@lru_cache(maxsize=64)
def header(name: str) -> str:
    """Text of a header of this folder."""
    return (Path(__file__).parent / name).read_text().rstrip() + "\n"


@lru_cache(maxsize=1)
def kernels_version() -> str:
    """Changes with the text of the kernels: what was measured of another version says nothing of this one."""
    names = sorted(p.name for p in Path(__file__).parent.glob("*.h"))
    return hashlib.sha256("".join(map(header, names)).encode()).hexdigest()[:16]


def _placed(spec: Spec, e: Expr) -> Expr:
    """An expression over coordinates of the geometry's axes."""
    if spec.structure.flat:
        return ir.rewrite(e, lambda n: ir.coord(n.args[0], 0) if n.op == "index" else None)
    return ir.flatten_index(e, spec.attend.rank, spec.same_grid)


def preamble(spec_dtype: str) -> str:
    """Types and numbers that the headers build on."""
    wide = spec_dtype == "float64"
    names = " ".join(f"#define {n} {i}\n" for i, n in enumerate(ELEMENTS.values())).replace("\n ", "\n")
    return (
        "#include <omp.h>\n#include <stdint.h>\n#include <stdlib.h>\n#include <string.h>\n"
        "#include <initializer_list>\n#include <utility>\n"
        f"{names}#define ELEMENT {ELEMENTS[spec_dtype]}\n#define REAL_BITS {64 if wide else 32}\n"
        f"namespace attnc {{\ntypedef {'double' if wide else 'float'} real;       // what sums are kept in\n"
        f"typedef {'int64_t' if wide else 'int32_t'} integer;  // of the same width: one per lane\n"
    )


def _wrapped(comment: list[str]) -> str:
    return "".join(f"// {line}\n" if line else "//\n" for line in comment)


def describe(spec: Spec, backward: bool) -> list[str]:
    """The head of a source: what it computes and for which shapes."""
    a, s = spec.attend, spec.structure
    what = "gradients of the queries, keys, values and tables" if backward else "output and log-sum-exp"
    axes = ", ".join(f"{f.kind}" for f in s.axes)
    return [
        f"Attention `{a.name}`: {what}.",
        "",
        f"  keys of a query   {ir.show(a.relation)}",
        f"  score             {ir.show(a.score)}" + (f", weight times {ir.show(a.post)}" if a.post is not None else ""),
        *(["                    of rows divided by their length"] if a.q_map is not None or a.k_map is not None else []),
        *(["                    weights are dropped out by a seed"] if a.dropout is not None else []),
        f"  per axis          {axes}; residual {ir.show(s.residual)}" + ("; axes flattened to one" if s.flat else ""),
        f"  shapes            head dim {spec.dim}, value dim {spec.value_dim}, {spec.dtype}; any grid, batch, heads, strides",
        "",
        "Tiles of queries run over chunks of the box of keys that they see; sums in "
        + ("float64." if spec.dtype == "float64" else "float32."),
    ]


def _hooks(spec: Spec, backward: bool) -> tuple[str, list[int], list[bool], bool, Terms]:
    a, s = spec.attend, spec.structure
    axes = ir.AXES.get(spec.rank, tuple(f"axis{i}" for i in range(spec.rank)))
    terms = Terms(axes, spec.tables, spec.int_tables)
    p = Printer(terms)
    score = _placed(spec, a.score)
    post = None if a.post is None else _placed(spec, a.post)
    for e in (score, *(() if post is None else (post,))):
        for node in loads(e):
            if backward or depends(node) != {"t"}:  # (what is one for a head is a term of it, and needs no more without gradients)
                terms.load_number(node)
    pair = "const Problem& P, const Numbers& numbers, const QueryTerms& q, const KeyTerms& keys"
    vector = f"{pair}, const real* const* elements, int k"
    raw = "    const V raw = s * splat(numbers.scale);\n"
    out: list[str] = []

    def function(head: str, body: str, needs_raw: bool = False) -> None:
        out.append(f"INLINE {head} {{\n{raw if needs_raw else ''}    return {body};\n}}\n")

    text = p.real(score)
    out.append("// the score of one query and L keys, s = q . k\n")
    function(f"V score({vector}, V s)", text, "raw" in text)
    out.append("// the part of the relation that no interval expresses\n" if s.residual != ir.TRUE else "")
    of_relation = Printer(terms, learned=False)
    function(f"I allowed({pair}, int k)", of_relation.wide(of_relation.vector(s.residual), "bool"))
    if post is not None:
        out.append("// factor of the weight\n")
    function(f"V post({vector})", p.real(post) if post is not None else "splat(1)")
    if backward:
        out.append("// d score / d SCORE\n")
        text = p.real(derivative(score, ir.SCORE))
        function(f"V score_slope({vector}, V s)", text, "raw" in text)
        for name, e in (("load_slopes", score), ("post_slopes", post)):
            lines = [p.real(derivative(e, node) if e is not None else ir.const(0.0)) for node in terms.loads]
            body = "".join(f"    slope[{i}] = {x};\n" for i, x in enumerate(lines))
            args = f"{vector}, V s, V* slope" if name == "load_slopes" else f"{vector}, V* slope"
            out.append(f"// d {'score' if name == 'load_slopes' else 'factor'} / d each table element\n" if lines else "")
            out.append(f"INLINE void {name}({args}) {{\n{raw if 'raw' in body else ''}{body}}}\n")
    offsets = [p.load_offset(node) for node in terms.loads]
    ones = "".join(f"        case {i}: return {o[2]};\n" for i, o in enumerate(offsets) if o[2] != "0")
    out.append("// the part of a table offset that is the same for all pairs of a head\n" if ones else "")
    cases = f"    switch (load) {{\n{ones}    }}\n" if ones else ""
    out.append(f"INLINE int64_t head_offset(const Problem& P, const Numbers& numbers, int load) {{\n{cases}    return 0;\n}}\n")
    mixed = [f"        case {i}: return {o[3]};\n" for i, o in enumerate(offsets) if o[3] is not None]
    out.append("// the part of a table offset that mixes query and key\n" if mixed else "")
    cases = f"    switch (load) {{\n{''.join(mixed)}    }}\n" if mixed else ""
    out.append(f"INLINE int64_t mixed_offset({pair}, int load, int k) {{\n{cases}    return 0;\n}}\n")
    if a.dropout is not None:
        out.append("// factor of the weight that dropout gives\n")
        function(f"V dropout({pair}, int k)", p.real(_placed(spec, a.dropout)))
    structs = _term_structs(p, offsets, once=a.dropout is not None) + _prefix_terms(spec, p)
    apart = [o[3] is None and "numbers." not in o[0] + o[1] for o in offsets]
    hooks = _head_terms(p) + structs + "".join(out)
    return hooks, [terms.tables.index(n.args[0]) for n in terms.loads], apart, "numbers." in structs, terms


def _head_terms(p: Printer) -> str:
    """What expressions need to know of a (batch, head)."""
    head = p.terms.head
    kinds = {"int": "integer", "bool": "bool", "real": "real"}
    members = "".join(f" {kinds[e.kind]} {n};" for e, n in head.items())
    body = "".join(f"    numbers.{n} = {p.at_point(e)};\n" for e, n in head.items())
    return (
        f"struct Numbers {{ real scale, scale_log2e; int64_t batch, head;{members} }};   // scale > 0: its sign is given to q\n"
        f"INLINE void head_terms(const Problem& P, Numbers& numbers) {{\n{body}}}\n\n"
    )


def _term_structs(p: Printer, offsets: list[tuple[str, str, str, str | None]], once: bool) -> str:
    """The terms per query and per key, and what computes them.

    once: those of a query are stored together at the end, so that what two of them share (the words of dropout) is computed once: a
    store might change what the next one reads.
    """
    query, key = p.terms.query, p.terms.key
    kinds = {"int": "integer", "bool": "integer", "real": "real"}
    args = "const Problem& P, const Numbers& numbers, const integer* c"
    out = ["// what expressions need to know of one query\nstruct QueryTerms {\n"]
    out += [f"    {'bool' if e.kind == 'bool' else kinds[e.kind]} {n};\n" for e, n in query.items()]
    out.append("};\n// of each key of a chunk\nstruct KeyTerms {\n")
    out += [f"    {kinds[e.kind]}* {n};\n" for e, n in key.items()]
    take = "".join(f" {n} = arena.take<{kinds[e.kind]}>(CHUNK);" for e, n in key.items())
    pad = "".join(f" {n}[i] = {n}[0];" for n in key.values())
    out.append(f"    void allocate(Arena& arena) {{{take} }}\n")
    out.append(f"    void pad(int count) {{ for (int i = count; i < up(count, L); i++) {{{pad} }} }}\n}};\n")
    out.append(
        f"// terms of the query at coordinates c, and its part of each table offset\n"
        f"INLINE void query_terms({args}, QueryTerms& {'found' if once else 'q'}, int64_t* offset) {{\n"
    )
    out += ["    QueryTerms q;\n"] if once else []
    out += [f"    q.{n} = {p.at_point(e)};\n" for e, n in query.items()]
    out += ["    found = q;\n"] if once else []
    out += [f"    offset[{i}] = {o[0]};\n" for i, o in enumerate(offsets)]
    out.append(f"}}\nINLINE void key_terms({args}, KeyTerms& keys, int k, int64_t* offset) {{\n")
    for e, n in key.items():
        text = p.at_point(e)
        out.append(f"    keys.{n}[k] = {f'-integer({text})' if e.kind == 'bool' else text};\n")
    out += [f"    offset[{i}] = {o[1]};\n" for i, o in enumerate(offsets)]
    out.append("}\n")
    return "".join(out)


def _prefix_terms(spec: Spec, p: Printer) -> str:
    """What computes the terms of dropout for a prefix token, whose `index` is *c."""
    if spec.attend.dropout is None:
        return ""
    lines: dict[str, list[str]] = {"q": [], "k": []}
    for e in dict.fromkeys(ir.walk(spec.attend.dropout)):
        placed, alone = _placed(spec, e), ir.rewrite(e, lambda n: ir.coord(n.args[0], 0) if n.op == "index" else None)
        if placed in p.terms.query:
            lines["q"].append(f"    q.{p.terms.query[placed]} = {p.at_point(alone)};\n")
        if placed in p.terms.key:
            lines["k"].append(f"    keys.{p.terms.key[placed]}[k] = {p.at_point(alone)};\n")
    args = "const Problem& P, const Numbers& numbers, const integer* c"
    return (
        "// the same of a prefix token, whose index is *c, for dropout\n"
        f"INLINE void prefix_query_terms({args}, QueryTerms& q) {{\n{''.join(lines['q'])}}}\n"
        f"INLINE void prefix_key_terms({args}, KeyTerms& keys, int k) {{\n{''.join(lines['k'])}}}\n"
    )


def _tagged(text: str, spec: Spec) -> str:
    """The text of a header with the lines that its statement needs: for dropout, lists of blocks, gaps between keys."""
    kept = {"DROPOUT": spec.attend.dropout is not None, "LISTS": spec.listed, "GAPS": spec.gaps, "BOXES": not spec.gaps}
    for tag, keep in kept.items():
        text = re.sub(rf"^@{tag}@" + ("" if keep else ".*\n"), "", text, flags=re.M)
    return text


def source(spec: Spec, backward: bool, band: bool = False) -> str:
    """The whole C++ source of one direction: boxes of keys, which any call can take, or `band` (where the spec has one)."""
    refuse(spec)
    a, s = spec.attend, spec.structure
    hooks, tables, apart, by_head, terms = _hooks(spec, backward)
    k = spec.kernel(backward)
    plain = a.score == ir.SCORE and a.post is None
    slope = derivative(_placed(spec, a.score), ir.SCORE)
    uses = any(n.op == "score" for n in ir.walk(a.score))
    softmax, power = a.normalizer.kind == "softmax", a.normalizer.power if a.normalizer.kind == "relu" else 0

    def flag(b: bool) -> str:
        return "true" if b else "false"

    shortest = [0.0 if m is None else m.eps for m in (a.q_map, a.k_map)]
    numbers = "".join(
        [
            f"constexpr int D = {spec.dim}, DV = {spec.value_dim};   // channels of q and k, of v\n",
            f"constexpr int RANK = {spec.rank}, GRID = {spec.attend.rank};   // axes of the geometry, of the tensors' grid\n",
            f"constexpr int TABLES = {len(spec.tables)}, INT_TABLES = {len(spec.int_tables)}, TABLE_RANK = {spec.table_rank};\n",
            f"constexpr int TILE = {k.queries}, CHUNK = {k.keys};   // most queries of a tile, keys of a chunk\n",
            f"constexpr int LOADS = {len(tables)};   // table elements that a score reads\n",
            f"constexpr int LOAD_TABLE[] = {{{', '.join(map(str, [*tables, 0]))}}};\n",
            f"constexpr bool LOAD_APART[] = {{{', '.join(map(flag, [*apart, False]))}}};",
            "   // offset = a query's part + a key's part + the head's\n",
            "constexpr int64_t EXPANSION = 131072;   // most table elements that a thread keeps expanded, of each load\n",
            f"constexpr int QUERY_TERMS = {len(terms.query)}, KEY_TERMS = {len(terms.key)};\n",
            f"constexpr bool TERMS_BY_HEAD = {flag(by_head)};\n",
            f"constexpr bool PADDED = {flag(spec.padded)}, RESIDUAL = {flag(s.residual != ir.TRUE)};\n",
            f"constexpr bool POST = {flag(a.post is not None)};   // a factor of the weights\n",
            f"constexpr bool PLAIN_SCORE = {flag(plain)}, USES_SCORE = {flag(uses)}, "
            f"SCORE_SLOPE = {flag(slope != ir.const(1.0))};\n",
            f"constexpr bool UNIT_Q = {flag(a.q_map is not None)}, UNIT_K = {flag(a.k_map is not None)};"
            "   // rows are divided by their length, at least\n",
            f"constexpr real SHORTEST_Q = {shortest[0]!r}, SHORTEST_K = {shortest[1]!r};\n",
            f"constexpr bool SOFTMAX = {flag(softmax)};\n",
            f"constexpr int RELU = {power};   // without softmax, weights are max(score, 0) to this power; 0: its sigmoid\n",
        ]
    )
    random = header("random.h") if a.dropout is not None else ""
    tile = header("tile.h").replace("@SCORE@\n", hooks) + (header("lists.h") if spec.listed else "")
    body = random + tile + header("tables.h")
    direction = "backward.h" if backward else "forward.h"
    loop = header(direction)
    if band:
        numbers += f"constexpr int BAND = {spec.band};   // keys of the last axis that a query sees, on grids long enough\n"
        loop = "".join(map(header, ("band_plan.h", "band_table.h", "band.h", f"band_{direction}")))
    parts = [_wrapped(describe(spec, backward)) + preamble(spec.dtype) + header("vec.h"), numbers, body, loop + "}\n"]
    text = _tagged("\n".join(parts), spec)
    return re.sub(r"\n{3,}", "\n\n", text)


HALVES = """#if defined(__AVX512VL__) && (defined(__znver3__) || defined(__znver4__))
#define HALF_REGISTERS   // fewer lanes are padding, and a Zen 4 (a Zen 3 to older compilers) does two halves in the time of a whole
#endif
"""


def _halves(dtype: str, *dims: int) -> str:
    """HALVES where whole registers would be padded by an eighth more than half registers."""
    lanes = 8 if dtype == "float64" else 16
    whole, half = (sum(-(-d // n) * n for d in dims) for n in (lanes, lanes // 2))
    return HALVES if 8 * whole > 9 * half else ""


def channel_source(dtype: str, dim: int, key_dim: int, backward: bool) -> str:
    """Channel attention: dim channels of q (rows), key_dim channels of k and v (columns)."""
    what = "gradients of q, k and v" if backward else "output"
    head = [
        f"Channel attention: {what}.",
        "",
        "  S[i][j] = scale * sum over tokens n of q[n][i] k[n][j];  A = softmax of S over j",
        "  out[n][i] = sum over j of A[i][j] v[n][j]",
        f"  shapes    {dim} channels of q, {key_dim} of k and v, {dtype}; any number of tokens, batch, heads, strides",
    ]
    numbers = f"constexpr int D = {dim}, K = {key_dim};   // channels of q, of k and v\n"
    numbers += f"constexpr bool BACKWARD = {str(backward).lower()};\n"
    begin = _wrapped(head) + preamble(dtype) + _halves(dtype, dim, key_dim) + header("vec.h")
    return "\n".join([begin, numbers, header("channel.h") + "}\n"])
