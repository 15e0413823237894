"""Prints a kernel's masks and scores: which pairs of a chunk are allowed, what their products start from, and loads of tables."""

from __future__ import annotations

from typing import Literal, NamedTuple

from attnc import ir
from attnc.codegen import triton_expr
from attnc.codegen.triton_plan import AxisPlan, lanes, terms
from attnc.codegen.triton_shapes import INF, Shapes, long
from attnc.schedule.walks import Tile

Kind = Literal["forward", "backward_dq", "backward_dkv", "backward_table"]

READ = '''\
@triton.jit
def @@(pointers, mask):
    """Rows of a tensor, zeros where masked; float32 for bfloat16 in the interpreter, which multiplies that wrongly."""
    x = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)
    return x.to(tl.float32) if INTERPRETED and x.dtype == tl.bfloat16 else x
'''
READ_AGAIN = '''\
@triton.jit
def @@(pointers, mask):
    """The same rows once more: what is multiplied before a loop and in it would stay in registers, beside the loop's own."""
    x = tl.load(pointers, mask=mask, other=None if mask is None else 0.0, cache_modifier=".cg")
    return x.to(tl.float32) if INTERPRETED and x.dtype == tl.bfloat16 else x
'''


WORDS = '''\
@triton.jit
def @@(low, high, b, h, token):
    """Two words of Philox-4x32-10, whose key is a seed's halves and whose counter is (token, b, h, 0)."""
    token = token.to(tl.uint32)
    zero = token * 0
    b, h = zero + b.to(tl.uint32), zero + h.to(tl.uint32)
    first, second, _, _ = tl.philox_impl(token, b, h, zero, low.to(tl.uint32), high.to(tl.uint32))
    return first, second
'''
BITS = '''\
@triton.jit
def @@(first, second, token):
    """31 bits of two words and of a token's number."""
    x = token.to(tl.uint32) + first
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11) ^ second) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return ((x ^ (x >> 14)) >> 1).to(tl.int32)
'''


class Part(NamedTuple):
    """Channels of a tensor that one load, product or store is of."""

    suffix: str  # of the names of what is of it
    first: int
    lanes: int


def dot(a: str, b: str, acc: str = "") -> str:
    """A matrix product as text."""
    return f"tl.dot({a}, {b}{f', acc={acc}' if acc else ''}, input_precision=PRECISION)"


class Scores(Shapes):
    """The score half of a kernel printer: what is loaded, masked and multiplied for one chunk."""

    kind: Kind
    tile_choice: Tile
    fused: bool  # all gradients of a group in one program
    hoist: bool  # geometry, mask and bias once, before rows are loaded
    registers: bool  # table gradients stay in registers
    tiled: bool  # the bias is one tile per head, made beforehand
    repeats: bool  # surplus columns repeat the last one
    outer: list[AxisPlan]
    inner: AxisPlan
    reach: str  # which columns of the chunk exist
    seen: bool  # the program says which of its columns exist, as `seen`
    ok: str  # which pairs are allowed
    how: str  # what the product starts from
    allowed: bool = False  # a list says that all pairs of the chunk are allowed
    index: str = ""  # of a chunk's columns, where they are prefix tokens

    # ------------------------------------------------------------------------------------------------------------------- pieces
    def dim(self, tensor: str) -> int:
        """Channels of a tensor."""
        return self.spec.value_dim if tensor in ("v", "o", "g", "dv") else self.spec.head_dim

    def parts(self, tensor: str) -> list[Part]:
        """The channels of a tensor: all of them, but for an output and its values where they are summed in parts of as many
        channels as the tile has rows (see `Tiles.sync`)."""
        dim, bm, tile = self.dim(tensor), self.bm, self.tile_choice
        parted = self.kind == "forward" and tensor in ("v", "o") and self.spec.tiles.sync
        if not parted or not 1 < tile.warps <= bm // 16 or bm >= dim:
            return [Part("", 0, lanes(dim))]
        return [Part(str(i), i * bm, bm) for i in range(-(-dim // bm))]

    def channels(self, tensor: str, part: Part | None = None) -> str:
        """Mask over channels in registers, "" where there are no more than the tensor has."""
        part = part or Part("", 0, lanes(self.dim(tensor)))
        left = self.dim(tensor) - part.first
        return "" if part.lanes <= left else f"(tl.arange(0, {part.lanes}) < {left})[None, :]"

    def base(self, tensor: str, part: Part | None) -> tuple[str, str, str, int]:
        """Where rows of a tensor begin: its pointer, at the first channel of a part, its strides, its head, and its lanes."""
        part = part or Part("", 0, lanes(self.dim(tensor)))
        away = f" + {part.first} * {long(f'{tensor}_st[{len(self.plans) + 2}]', self.spec.wide)}" if part.first else ""
        return f"{tensor.upper()}{away}", f"{tensor}_st", self.head(tensor), part.lanes

    def head(self, tensor: str) -> str:
        """The head whose rows are meant: keys may be shared by a group of query heads."""
        if tensor in ("dk", "dv"):
            return "h" if self.fused else "hk"
        if tensor not in ("k", "v"):
            return "h"
        return "hk" if self.side == "k" else "h // GROUP"

    def load(self, pointers: str, *masks: str) -> str:
        """A load of rows that reads zeros where masked."""
        some = [m for m in masks if m]
        return f"{self.module.use('read', READ)}({pointers}, {' & '.join(some) or 'None'})"

    def own(self, tensor: str, part: Part | None = None) -> str:
        """Pointers to the tile's rows of a tensor. A group's rows are its columns, and so share their offsets."""
        if self.fused:
            return self.chunk_of(tensor)
        return self.own_rows(*self.base(tensor, part))

    def chunk_of(self, tensor: str, part: Part | None = None) -> str:
        """Pointers to the chunk's rows of a tensor."""
        return self.chunk_rows(*self.base(tensor, part))

    def store(self, pointers: str, value: str, tensor: str, mask: str, part: Part | None = None) -> None:
        """Print a store of rows."""
        masks = " & ".join(m for m in (mask, self.channels(tensor, part)) if m)
        if self.spec.adds & (2 if tensor in ("dk", "dv") else 1):
            value = f"{value} + {self.load(pointers, masks)}.to(tl.float32)"
        value = value if value.isidentifier() else f"({value})"
        masks = f", mask={masks}" if masks else ""
        self.put(f"tl.store({pointers}, {value}.to({tensor.upper()}.dtype.element_ty){masks})")

    @property
    def raw(self) -> bool:
        """Plain or affine score: kept unscaled until exp2."""
        return self.spec.bias is not None

    @property
    def residual(self) -> ir.Expr:
        """The condition on pairs that no axis explains, and that tiles do not pass over."""
        return ir.TRUE if any(p.others for p in self.plans) else self.spec.residual

    @property
    def per_pair(self) -> bool:
        """Something is evaluated for each pair."""
        return self.residual != ir.TRUE or self.spec.scored

    def has_full(self) -> bool:
        """Chunks without a mask exist and get a loop of their own."""
        fills = self.chunk_count() == self.bn
        return fills and self.inner.full and all(p.exact for p in self.outer) and not self.inner.columns and not self.hoist

    def from_tile(self, p: AxisPlan) -> bool:
        """A first group cut by the axis: columns are counted from the tile's origin, as the rows are."""
        return (self.registers or self.fused or self.tiled or p.wrap) and p.start != ir.ZERO

    # ------------------------------------------------------------------------------------------------------- masks and scores
    def mask(self, full: bool) -> str:
        """Print what the chunk's mask needs. "" where all pairs are allowed, "bias" for an additive tile, else a condition."""
        spec, self.reach = self.spec, ""
        pairs = (self.per_pair and not self.tiled) or spec.attend.dropout is not None or (spec.padded and self.side == "q")
        if full:
            if pairs:
                self.columns(self.plans)
            return ""
        if self.vector:
            open_ended = [p for p in self.plans if not p.exact]
            self.columns(self.plans if pairs else [p for p in self.plans if p.wrap or not p.exact])
            tests = [f"({self.other}{p.name} >= {p.name}_from)" for p in self.plans if self.from_tile(p) and not p.wrap]
            ends = ((p, self.bound(p, self.other)[1] if p.others else f"{p.name}_to") for p in open_ended)
            tests += [f"({self.other}{p.name} < {end})" for p, end in ends]
            if self.chunk_count() != self.bn:
                index = f"tl.arange(0, {self.bn})" if self.repeats else "n"
                tests.append(f"({index} < {self.chunk_count()})" if tests else f"{index} < {self.chunk_count()}")
            beside = self.beside()
            self.seen = bool(tests)
            if tests:
                self.put(f"seen = {' & '.join(tests)}")
                self.reach = "" if self.repeats else "seen[:, None]"
            if beside:
                self.put(f"ok = ({beside}) & seen[None, :]" if tests else f"ok = {beside}")
                return "ok"
            return "seen[None, :]" if tests else ""
        over = [p for p in self.plans if p.overruns or (p is self.inner and self.has_full() and not p.exact and p.passes)]
        self.columns(self.plans if pairs else over)
        if over:
            tests = [f"({self.other}{p.name} < {self.bound(p, self.other)[1]})" for p in over]
            self.put(f"reach = {' & '.join(tests)}")
            self.reach = "reach[:, None]"
        additive = spec.bias == ir.ZERO and self.residual == ir.TRUE
        self.put(f"{'bias' if additive else 'ok'} = {self.mask_call(additive)}")
        return "bias" if additive else "ok"

    def score(self, ok: str) -> str:
        """Print tiles the product starts from. Gives "bias" (an accumulator), "seen" (masked after), "" or "general"."""
        spec = self.spec
        self.addresses: dict[ir.Expr, str] = {}  # those of another loop's chunks are not known here
        # a mask and terms of the chunk's columns alone have one row, and a product starts from all of them
        flat = ok == "seen[None, :]" and not any(map(self.by_row, (self.residual, spec.bias or ir.ZERO)))
        if self.tiled:
            self.ok = ok
            self.bias_tile(ok)
            return "bias"
        if self.residual != ir.TRUE and not self.allowed:
            test = self.pair(self.residual, ok)
            if self.of_one_row(self.residual):  # the interpreter makes integers of it, and takes none as a mask
                test = f"({test}) != 0"
            name = "asked" if self.side == "k" and self.hoist else "ok"  # each query head asks anew, of the same geometry
            self.put(f"{name} = {ok} & ({test})" if ok else f"{name} = tl.broadcast_to({test}, [{self.bm}, {self.bn}])")
            ok = name
        self.ok = ok
        if spec.bias is None:
            return "general"
        shape = f"[{self.bm}, {self.bn}]"
        if spec.bias != ir.ZERO:
            self.tables_at(spec.bias)
            value = f"({self.pair(spec.bias, ok)}) * (1.0 / scale)"
            if self.repeats and self.residual == ir.TRUE and any(p.wrap for p in self.plans):
                value += f" + tl.where({ok}, 0.0, {INF})"
            elif self.repeats and self.residual == ir.TRUE:  # every load is in range: -inf is added, not selected
                value += f" + tl.where(seen, 0.0, {INF})[None, :]"
            elif ok:
                value = f"tl.where({ok}, {value}, {INF})"
            self.put(f"bias = tl.broadcast_to({value}, {shape})" if flat or not ok else f"bias = {value}")
            return "bias"
        if ok in ("", "bias"):
            self.ok = "" if ok == "bias" else ok
            return ok
        if ok == "ok" or self.hoist:
            zero = "0.0" if ok in ("ok", "asked") and not flat else f"tl.zeros({shape}, tl.float32)"
            self.put(f"bias = tl.where({ok}, {zero}, {INF})")
            return "bias"
        return "seen"

    def of_one_row(self, e: ir.Expr) -> bool:
        """A comparison in it reads the tile's own place alone, on axes where a tile is one row."""
        one = {p.axis for p in self.plans if p.rows == 1}
        tests = (n for n in ir.walk(e) if n.op in ("eq", "ne", "lt", "le"))
        places = ({c.args for c in ir.walk(t) if c.op == "coord"} for t in tests)
        return any(p and all(role == self.side and axis in one for role, axis in p) for p in places)

    def bias_tile(self, ok: str) -> None:
        """Print the load of the head's bias, with what masks this very group."""
        size = self.bm * self.bn
        self.put(f"bias = tl.load(Bias + h * {size} + tl.arange(0, {size})).reshape({self.bm}, {self.bn})")
        if ok and not (ok == "seen[None, :]" and all(p.exact for p in self.plans)):  # else the tile has these columns at -inf
            self.put(f"bias += tl.where({ok}, 0.0, {INF})")

    def by_row(self, e: ir.Expr) -> bool:
        """The rows of a tile differ in it."""
        several = {p.axis for p in self.plans if p.rows > 1}
        return any(n.op == "coord" and n.args[0] == self.side and n.args[1] in several for n in ir.walk(e))

    def scores(self, rows: str, columns: str) -> None:
        """s: the masked scores of a chunk, unscaled; or t, of a score that is more than SCORE plus a bias: scores in base 2 for
        softmax, else as they are."""
        product = dot(rows, f"{columns}.T", "bias" if self.how == "bias" else "")
        if self.how != "general":
            self.put(f"s = {product}")
            if self.how == "seen":
                self.put(f"s = tl.where({self.ok}, s, {INF})")
            return
        score = self.spec.score
        if any(n == ir.SCORE for n in ir.walk(score)):
            self.put(f"s = {product} * scale")
            value = self.pair(score, self.ok)
        else:
            value = f"tl.zeros([{self.bm}, {self.bn}], tl.float32) + ({self.pair(score, self.ok)})"
        t = f"({value}) * LOG2E" if self.spec.softmax else value
        self.put(f"t = tl.where({self.ok}, {t}, {INF})" if self.ok else f"t = {t}")

    def pair_names(self) -> dict[ir.Expr, str]:
        """Coordinates of rows and columns as text that broadcasts to all pairs."""
        out = dict(self.spec.size_names) | {ir.HEAD: "h", ir.HEADS: "H", ir.BATCH: "b", ir.SCORE: "s"}
        for p in self.plans:
            row = f"{self.side}{p.name}[:, None]" if p.rows > 1 else self.first(p)
            out[ir.coord(self.side, p.axis)] = self.coordinate(row, p, self.side)
            out[ir.coord(self.other, p.axis)] = self.coordinate(f"{self.other}{p.name}[None, :]", p, self.other)
        return out

    def pair(self, e: ir.Expr, ok: str) -> str:
        """A score, predicate or slope over all pairs."""
        return self.module.scan(triton_expr.text(e, self.pair_names(), lambda n, _: self.table(n, ok)))

    # ------------------------------------------------------------------------------------------------------------------- dropout
    def words(self, *, of_rows: bool) -> None:
        """Print the two words that each query of a tile (or of a chunk) has in dropout, where there is one."""
        dropout = self.spec.attend.dropout
        if dropout is None:
            return
        _, *counter = next(n for n in ir.walk(dropout) if n.op == "philox").children
        role = next(n.args[0] for n in ir.walk(counter[-1]) if n.op == "index")
        if of_rows == (role == self.side):
            names = self.dropout_names()
            args = ", ".join(triton_expr.text(e, names, lambda n, _: self.table(n, "")) for e in counter)
            self.put(self.module.scan(f"word0, word1 = {self.module.use('random_words', WORDS)}({args})"))

    def dropped(self) -> str:
        """What dropout multiplies the weights of a chunk by."""
        dropout = self.spec.attend.dropout
        assert dropout is not None
        mixed = next(n for n in ir.walk(dropout) if n.op == "mix")
        number = self.module.scan(triton_expr.text(mixed.args[2], self.dropout_names()))
        bits = f"{self.module.use('random_bits', BITS)}(word0, word1, {number})"
        last = next(n for n in ir.walk(dropout) if n.op == "load" and n.args[1] == ir.const(2))
        return triton_expr.text(dropout, {mixed: bits, last: "last"})

    def dropout_names(self) -> dict[ir.Expr, str]:
        """`index` of rows and columns as text that broadcasts to all pairs."""
        names = self.pair_names()
        out = {**names, **{ir.var(n): n for n in self.spec.lengths}}
        for role in ir.ROLES:
            out[ir.index(role)] = triton_expr.text(self.spec.lowered(ir.index(role)), names)
        if self.index:
            out[ir.index(self.other)] = self.index
        return out

    def tables_at(self, e: ir.Expr) -> None:
        """Print the parts of a table's index that queries and keys decide apart, where the sum splits that way."""
        for n in dict.fromkeys(x for x in ir.walk(e) if x.op == "load"):
            parts = self.address_parts(n, f"{n.args[0]}_st")
            if parts[""] or not parts["q"] or not parts["k"]:
                continue
            name = n.args[0] if len(self.addresses) == 0 else f"{n.args[0]}{len(self.addresses)}"
            for role, what in (("q", "query"), ("k", "key")):
                self.put(f"{name}_{what} = {' + '.join(parts[role])}")
            self.addresses[n] = f"{name}_query - {name}_key" if self.negative(n) else f"{name}_query + {name}_key"

    @staticmethod
    def negative(n: ir.Expr) -> bool:
        """Every key term of a table's index is subtracted (query - key, the usual form)."""
        signs = [s for e in n.children for s, t in terms(e) if any(m.op == "coord" and m.args[0] == "k" for m in ir.walk(t))]
        return all(s < 0 for s in signs)

    def address_parts(self, n: ir.Expr, strides: str, ok: str = "") -> dict[str, list[str]]:
        """Terms of a table element's offset by who decides them: queries (and constants), keys, or both.

        `ok` masks the loads of integers that an index reads.
        """
        parts: dict[str, list[str]] = {"q": [], "k": [], "": []}
        names, flip = self.pair_names(), self.negative(n)
        for d, e in enumerate(n.children):
            split: dict[str, ir.Expr] = {}
            for sign, t in terms(e):
                roles = {m.args[0] for m in ir.walk(t) if m.op == "coord"}
                role = roles.pop() if len(roles) == 1 else "q" if not roles else ""
                sign = -sign if role == "k" and flip else sign
                have = split.get(role, ir.ZERO)
                split[role] = t if have == ir.ZERO and sign > 0 else ir.make("add" if sign > 0 else "sub", have, t)
            for role, x in split.items():
                if x != ir.ZERO:
                    text = self.module.scan(triton_expr.text(x, names, lambda n, _: self.table(n, ok)))
                    text = f"({text})" if " " in text or text.startswith("-") else text
                    parts[role].append(f"{long(text, self.spec.wide)} * {strides}[{d}]")
        return parts

    def address(self, n: ir.Expr, strides: str, ok: str = "") -> str:
        """Offset of a table's element."""
        if strides == f"{n.args[0]}_st" and n in getattr(self, "addresses", {}):
            return self.addresses[n]
        parts = self.address_parts(n, strides, ok)
        plus = " + ".join([*parts["q"], *parts[""]])
        keys = " + ".join(parts["k"])
        if not keys:
            return plus or "0"
        if not self.negative(n):
            return f"{plus} + ({keys})" if plus else keys
        return f"{plus} - ({keys})" if plus else f"-({keys})"

    def table(self, n: ir.Expr, ok: str) -> str:
        """The load of a table's element, masked where pairs outside the relation might read beyond the table."""
        roles = {m.args[0] for i in n.children for m in ir.walk(i) if m.op == "coord"}
        mask = ok if roles == {"q", "k"} and not self.repeats else ""
        if roles == {self.other} and self.reach:
            mask = self.reach.replace("[:, None]", "[None, :]")
        at = f"{n.args[0]}_table + {self.address(n, f'{n.args[0]}_st', ok)}"
        out = f"tl.load({at}, mask={mask}, other=0)" if mask else f"tl.load({at})"
        return f"{out}.to(tl.float32)" if n.kind == "real" else out
