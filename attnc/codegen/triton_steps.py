"""Prints what a kernel does with one chunk: online softmax (or weights without a sum), or its gradients, and those of tables."""

from __future__ import annotations

from attnc import ir
from attnc.analysis.derivative import derivative
from attnc.codegen.triton_plan import lanes
from attnc.codegen.triton_scores import Scores, dot
from attnc.codegen.triton_shapes import INF, long
from attnc.schedule.walks import Tile


class Steps(Scores):
    """The arithmetic of one chunk."""

    certain: bool  # every row has a key, and the maximum needs no floor
    with_prefix: bool  # the prefix tokens' keys follow the grid's
    given: bool  # delta comes from the whole output, of all parts of a union
    tile_choice: Tile
    there: str  # which columns of a group's chunk get gradients, "" where all do

    # ------------------------------------------------------------------------------------------------------------------ one chunk
    def chunk(self, *, full: bool) -> None:
        """Load the chunk's columns and do the kernel's arithmetic on them."""
        if not self.hoist:
            self.how = self.score(self.mask(full))
        self.words(of_rows=False)
        reach = "" if full else self.reach
        columns = ("q", "g") if self.side == "k" else ("k",) if self.fused else ("k", "v")
        real = ""
        if self.spec.padded and self.side == "q":
            real = "real[:, None]"
            count = f" & (n < {self.chunk_count()})" if self.chunk_count() != self.bn else ""
            before = [p for p in self.plans if self.from_tile(p) and not self.spec.before(p.axis, "k")]
            count += "".join(f" & (k{p.name} >= 0)" for p in before)  # a first group that the axis cuts
            self.put(f"real = {self.real_keys([f'k{p.name}' for p in self.plans])}{count}")
        for t, part in [(x, part) for x in columns for part in self.parts(x)]:
            value, name = self.load(self.chunk_of(t, part), real or reach, self.channels(t, part)), f"{t}{part.suffix}"
            self.put(f"{name} = tl.where({real}, {value}, pad_{name})" if real else f"{name} = {value}")
        if self.side == "k":
            origin = self.token([self.coordinate(f"c{p.name}", p, "q", real=True) for p in self.plans], "q")
            inside = []
            for at, p in zip(self.column_parts(), self.plans, strict=True):
                later = [self.spec.names[x.axis].real_queries for x in self.plans if x.axis > p.axis]
                if p.wrap or p.cut:
                    inside.append(" * ".join([f"(q{p.name} - c{p.name})" if p.wrap else f"{p.name}_in", *later]))
                elif at != "0":
                    at = self.times_split(at, p)
                    inside.append(" * ".join([f"({at})" if later and " " in at and not at.startswith("(") else at, *later]))
            self.put(f"token = (b * H + h) * N + ({origin}) + {' + '.join(inside)}")
            mask = reach.removesuffix("[:, None]")
            mask = f", mask={mask}, other=0.0" if mask else ""
            if self.spec.softmax:
                self.put(f"lse, less = tl.load(Lse2 + token{mask})[None, :], tl.load(Less + token{mask})[None, :]")
        if self.kind == "forward":
            self.scores("q", "k")
            self.forward_step(first=self.hoist and not self.with_prefix, post=True)
        elif self.side == "k":
            self.scores("k", "q")
            self.backward_step(plain=False)
        else:
            self.scores("q", "k")
            self.backward_step(plain=False)

    def forward_step(self, *, first: bool, post: bool) -> None:
        """One more chunk (or the only one): its weights times its values."""
        if self.spec.softmax:
            self.softmax_step(first=first, post=post)
            return
        self.weights()
        self.sum_values(self.weight(post), "" if first else "{}")

    def sum_values(self, weight: str, before: str) -> None:
        """The output, or each part of its channels: the weighted values on top of a text of what was summed before."""
        for suffix, *_ in self.parts("v"):
            v, acc = f"v{suffix}", f"acc{suffix}"
            self.put(f"{acc} = {dot(f'{weight}.to({v}.dtype)', v, before.format(acc))}")

    def weights(self) -> None:
        """p, the weights of a normalizer without a sum; a pair that is not there has the score -inf, whose weight is 0."""
        n, x = self.spec.attend.normalizer, "s * scale" if self.raw else "t"
        if n.kind == "sigmoid":
            self.put(f"p = tl.sigmoid({x})")
            return
        if self.raw:
            self.put("t = s * scale")
        self.put("r = tl.where(t < 0, 0.0, t)", f"p = {' * '.join(['r'] * n.power)}")

    def weights_slope(self) -> str:
        """d weight / d score, for such a normalizer."""
        n = self.spec.attend.normalizer
        if n.kind == "sigmoid":
            return "p * (1.0 - p)"
        return f"tl.where(r > 0, {' * '.join([f'{n.power}.0', *['r'] * (n.power - 1)])}, 0.0)"

    def softmax_step(self, *, first: bool, post: bool) -> None:
        """Online softmax over one more chunk (or the only one)."""
        s, c = ("s", " * c") if self.raw else ("t", "")
        if first:
            self.put(f"m_i = tl.max({s}, 1)" if self.certain else f"m_i = tl.maximum(tl.max({s}, 1), -1e30)")
            self.put(f"p = tl.exp2({s}{c} - (m_i{c})[:, None])", "l_i = tl.sum(p, 1)")
        else:
            self.put(f"m_new = tl.maximum(m_i, tl.max({s}, 1))", f"p = tl.exp2({s}{c} - (m_new{c})[:, None])")
            self.put(f"alpha = tl.exp2({'(m_i - m_new) * c' if c else 'm_i - m_new'})", "l_i = l_i * alpha + tl.sum(p, 1)")
        self.sum_values(self.weight(post), "" if first else "{} * alpha[:, None]")
        if not first:
            self.put("m_i = m_new")

    def weight(self, post: bool = True) -> str:
        """Print the weight times its post-factor, which pairs with a prefix token do not have, and what dropout gives."""
        drops = self.spec.attend.dropout is not None
        if drops:
            self.put(f"drop = {self.dropped()}")
        if self.spec.post is None or not post:
            if not drops:
                return "p"
            self.put("w = p * drop" if self.spec.softmax else "f, w = drop, p * drop")
            return "w"
        value = self.pair(self.spec.post, self.ok)
        value = f"drop * ({value})" if drops else value
        if not self.spec.softmax:
            self.put(f"f = {f'tl.where({self.ok}, {value}, 0.0)' if self.ok else value}", "w = p * f")
            return "w"
        value = f"p * {value}" if drops else f"p * ({value})"
        self.put(f"w = {f'tl.where({self.ok}, {value}, 0.0)' if self.ok else value}")
        return "w"

    def backward_step(self, *, plain: bool) -> None:
        """Gradients of one chunk. `plain`: pairs with a prefix token, whose score is the product alone."""
        spec, keys = self.spec, self.side == "k"
        row2, column, column2 = ("v", "q", "g") if keys else ("g", "k", "v")
        at = "[:, None]" if self.kind == "backward_dq" else ""
        if spec.softmax:
            self.put(f"p = tl.exp2({'s * c' if self.raw else 't'} - lse{at})")
        else:
            self.weights()
        weight = self.weight(post=not plain)
        add_dv = f"dv = {dot(f'{weight}.to(g.dtype)', 'g', 'dv')}"
        early = keys and lanes(max(spec.head_dim, spec.value_dim)) <= 128
        if early:  # before dp, which need not live beside the weights in half precision
            self.put(add_dv)
        if self.fused:
            self.group_rows(weight)
        starts = not self.fused and spec.softmax and weight == "p"  # the product starts from what dp is less in ds
        start = f"tl.broadcast_to(less{at}, [{self.bm}, {self.bn}])" if starts else ""
        self.put(f"dp = {dot(row2, f'{column2}.T', start)}")
        if keys and not early:
            self.put(add_dv)
        if self.fused and spec.softmax and not self.given:
            if self.weights_first:  # one value of a pair for ds, delta and a table's gradient
                self.put(f"wdp = {weight} * dp", "delta = tl.sum(wdp, 1)[:, None]")
            else:
                self.put(f"delta = tl.sum({weight} * dp, 1)[:, None]")
            with self.block("if GLse is not None:"):
                self.put("delta -= tl.load(GLse + token)[:, None]")
        if not spec.softmax:
            self.put(f"ds = {'f * ' if weight == 'w' else ''}dp * ({self.weights_slope()})")
        elif starts:
            self.put("ds = p * dp")
        elif self.fused and self.weights_first and not self.given:
            self.put("ds = wdp - p * delta")
        elif self.fused:
            self.put("ds = w * dp - p * delta" if weight == "w" else "ds = p * (dp - delta)")
        else:
            self.put(f"ds = w * dp + p * less{at}")
        if not plain:
            self.table_gradients()
        slope = ir.const(1.0) if plain else spec.slope
        if self.kind == "backward_table":
            return
        d = "ds"
        if slope != ir.const(1.0):
            value = f"ds * ({self.pair(slope, self.ok)})"
            self.put(f"dt = {f'tl.where({self.ok}, {value}, 0.0)' if self.ok else value}")
            d = "dt"
        if self.fused:
            self.group_gradients(weight, d)
        else:
            grad = "dk" if keys else "dq"
            self.put(f"{grad} = {dot(f'{d}.to({column}.dtype)', column, grad)}")

    @property
    def weights_first(self) -> bool:
        """A group's dv comes before dp, beside which its weights then live once. At 128 channels that only helps where operands
        come through a pipeline: otherwise rows that are loaded take the registers."""
        return self.tile_choice.stages > 1 or lanes(max(self.spec.head_dim, self.spec.value_dim)) <= 64

    def group_rows(self, weight: str) -> None:
        """Load what a group's gradients need beyond its scores: only now, so that it does not live beside the first product."""
        self.put(f"g = {self.load(self.own('g'), self.reach, self.channels('g'))}")
        if not self.spec.softmax:
            self.put("g = tl.where(live[:, None], g, 0.0)  # rows beyond the group have weights")
        if self.weights_first:
            self.group_values(weight)
        self.put(f"v = {self.load(self.chunk_of('v'), self.reach, self.channels('v'))}")
        if self.given:
            self.put(f"o = {self.load(self.own('o'), self.reach, self.channels('o'))}")
            self.put("delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)[:, None]")
            with self.block("if GLse is not None:"):
                self.put("delta -= tl.load(GLse + token)[:, None]")

    def group_values(self, weight: str) -> None:
        """A group's dv."""
        self.put(f"dv = {dot(f'{weight}.to(g.dtype).T', 'g')}")
        self.store(self.chunk_of("dv"), "dv", "dv", self.there)

    def group_gradients(self, weight: str, d: str) -> None:
        """A group's gradients, one after the other: each is stored before the next, so that no two live in registers together."""
        self.put(f"d = {d}.to(k.dtype)")
        self.put(f"dq = {dot('d', 'k')}")
        self.store(self.own("dq"), "dq * scale", "dq", self.there)
        self.put(f"dk = {dot('d.T', 'q')}")
        self.store(self.chunk_of("dk"), "dk * scale", "dk", self.there)
        if not self.weights_first:
            self.group_values(weight)

    # ------------------------------------------------------------------------------------------------------------- table gradients
    def contributions(self) -> list[tuple[ir.Expr, str]]:
        """Each learned load, and what a pair adds to its element's gradient."""
        spec, out = self.spec, []
        for n in spec.learned:
            slope = derivative(spec.score, n)
            value = "" if slope == ir.const(0.0) else "ds" if slope == ir.const(1.0) else f"ds * ({self.pair(slope, self.ok)})"
            if spec.post is not None and derivative(spec.post, n) != ir.const(0.0):
                drop = "" if spec.attend.dropout is None else "drop * "
                more = f"p * {drop}dp * ({self.pair(derivative(spec.post, n), self.ok)})"
                value = f"{value} + {more}" if value else more
            out.append((n, value))
        return out

    def table_gradients(self) -> None:
        """Add the chunk's share of table gradients."""
        if self.side == "k" or not self.spec.learned:
            return
        live = f"live[:, None]{f' & {self.ok}' if self.ok else ''}"
        for n, value in self.contributions():
            if self.kind == "backward_table":
                parts = self.address(n, f"d_{n.args[0]}_st", self.ok)
                self.put(f"fixed = (({value}) * unit).to(tl.int64)")
                at = f"d_{n.args[0]} + (tl.zeros([{self.bm}, {self.bn}], tl.int32) + {parts})"
                self.put(f'tl.atomic_add({at}, fixed, mask={live}, sem="relaxed")')
            elif self.fused:
                self.put(f"grad += {value}")
            elif self.registers:
                self.put(f"grad += tl.where({live}, {value}, 0.0)")
            else:
                self.put(f"size += tl.sum(tl.where({live}, tl.abs({value}), 0.0), 1)")

    # ---------------------------------------------------------------------------------------------------------------- prefix tokens
    def prefix_columns(self) -> None:
        """Pairs with prefix tokens: every row sees them, with the plain score; a virtual key is not seen by prefix queries."""
        with self.block(f"for i in tl.range(0, tl.cdiv(P, {self.bn}), num_stages={self.tile_choice.stages}):"):
            self.put(f"inside = i * {self.bn} + n < P")
            self.index = f"(i * {self.bn} + n - P)[None, :]"
            self.words(of_rows=False)
            columns = ("q", "g") if self.side == "k" else ("k", "v")
            for t in columns:
                wide = self.spec.wide
                text = (
                    "@triton.jit\ndef @@(base, st, b, h, x, dx, LANES: tl.constexpr):\n"
                    '    """Pointers to channels of the tokens dx away from token (x) of head h of batch item b."""\n'
                    f"    token = base + (b * st[0] + {long('h', wide)} * st[1] + tl.cast(x, tl.int64) * st[2])\n"
                    f"    return token + ({long('dx', wide)} * st[2])[:, None]"
                    f" + {long('tl.arange(0, LANES)[None, :]', wide)} * st[3]\n"
                )
                name = self.module.use("rows_flat", text)
                for part in self.parts(t):
                    away = f" + {part.first} * {long(f'{t}p_st[3]', wide)}" if part.first else ""
                    at = f"{name}({t.upper()}p{away}, {t}p_st, b, {self.head(t)}, i * {self.bn}, n, {part.lanes})"
                    self.put(f"{t}{part.suffix} = {self.load(at, 'inside[:, None]', self.channels(t, part))}")
            if self.side == "k":
                self.put(f"token = (b * H + h) * N + i * {self.bn} + n - P")
            if self.side == "k" and self.spec.softmax:
                for what, pointer in (("lse", "Lse2"), ("less", "Less")):
                    self.put(f"{what} = tl.load({pointer} + token, mask=inside, other=0.0)[None, :]")
            row, column = ("k", "q") if self.side == "k" else ("q", "k")
            self.put(f"s = {dot(row, f'{column}.T')}")
            s, scaled = ("s", "s") if self.raw else ("t", "s * c" if self.spec.softmax else "s * scale")
            there = "inside[None, :] & real[:, None]" if self.spec.padded and self.side == "k" else "inside[None, :]"
            self.put(f"{s} = tl.where({there}, {scaled}, {INF})")
            if self.kind == "forward":
                self.forward_step(first=False, post=False)
            else:
                self.backward_step(plain=True)
            self.index = ""
