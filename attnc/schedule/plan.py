"""The plan: the kernels of one call, forward and backward, as a networkx graph with the tensors on its edges.

Nodes are kernels, and the two ends `inputs` and `results`. An edge (a, b) says that b reads what a writes; its attribute
`tensors` names them. A node's attribute `does` says in a few words what it computes. Backends may join neighbours (one loop
for dq and the table partials, say); what must be computed before what is the same for all of them.
"""

from __future__ import annotations

import networkx as nx

from attnc import ir
from attnc.analysis.derivative import learned

INPUTS, RESULTS = "inputs", "results"


def plan(program: ir.Program, *, union: bool = False) -> nx.DiGraph:
    """The graph of a program. Names are those of the report: forward, backward_dq, backward_dkv, helpers after them.

    union: the program runs as disjoint parts (see schedule.split) whose results a further step merges.
    """
    if isinstance(program.attend, ir.Channel):
        return _channel()
    if program.attend.normalizer.over == "queries":
        return _surrounded(_over_queries(program.attend), program.attend)
    return _surrounded(_attend(program, program.attend, union), program.attend)


def _link(g: nx.DiGraph, source: str, target: str, *tensors: str) -> None:
    """Add tensors to the edge; none add none."""
    if tensors:
        seen = g.edges[source, target]["tensors"] if g.has_edge(source, target) else ()
        g.add_edge(source, target, tensors=(*seen, *(t for t in tensors if t not in seen)))


def _surrounded(g: nx.DiGraph, a: ir.Attend) -> nx.DiGraph:
    """The graph with what surrounds the kernels: row maps before them, a sink after them, and their gradients."""
    mapped = tuple(t for t, m in (("q", a.q_map), ("k", a.k_map)) if m is not None)
    if mapped:
        g.add_node("row_maps", does="the maps of rows, once per row")
        g.add_node("backward_row_maps", does="gradients through the maps of rows")
    for t in mapped:
        _rename(g, INPUTS, "row_maps", t, f"mapped {t}")
        _link(g, INPUTS, "row_maps", t)
        _link(g, INPUTS, "backward_row_maps", t)
        _move(g, f"d{t}", f"d mapped {t}", "backward_row_maps")
    sink = a.normalizer.sink
    if sink is not None and a.normalizer.over == "keys":
        g.add_node("sink", does="the sink joins each row's sum, once")
        g.add_node("backward_sink", does="gradients through it: of what the kernels gave, and of the sink, summed over rows")
        for t in ("out", "lse"):
            _move(g, t, f"kernels' {t}", "sink")
            for x in [x for x in g if x not in ("sink", INPUTS, RESULTS)]:
                _rename(g, x, x, t, f"kernels' {t}")
                if any(f"kernels' {t}" in d["tensors"] for _, _, d in g.out_edges(x, data=True)):
                    _link(g, x, "backward_sink", f"kernels' {t}")
            _rename(g, INPUTS, "backward_sink", f"grad_{t}", f"kernels' grad_{t}")
        _link(g, INPUTS, "sink", sink)
        _link(g, INPUTS, "backward_sink", "grad_out", "grad_lse", sink)
        _link(g, "backward_sink", RESULTS, f"d{sink}")
    g.remove_edges_from([(x, y) for x, y, d in g.edges(data=True) if not d["tensors"]])
    return g


def _rename(g: nx.DiGraph, source: str, now: str, tensor: str, name: str) -> None:
    """What nodes read as `tensor` from `source` they read as `name` from `now`."""
    for _, b, d in list(g.out_edges(source, data=True)):
        if tensor in d["tensors"] and b not in (RESULTS, now):
            d["tensors"] = tuple(t for t in d["tensors"] if t != tensor)
            _link(g, now, b, name)


def _move(g: nx.DiGraph, result: str, inner: str, through: str) -> None:
    """What kernels gave as `result` they give as `inner` to the node `through`, which gives the result."""
    for x, _, d in list(g.in_edges(RESULTS, data=True)):
        if result in d["tensors"]:
            d["tensors"] = tuple(t for t in d["tensors"] if t != result)
            _link(g, x, through, inner)
    _link(g, through, RESULTS, result)


def _over_queries(a: ir.Attend) -> nx.DiGraph:
    """Softmax over queries: the kernels of the statement with queries and keys exchanged (see runtime.over_queries)."""
    g: nx.DiGraph = nx.DiGraph(name=a.name)
    tables = a.tables
    for node, does in (
        (INPUTS, "what the caller passes"),
        ("forward_lse", "the same with queries and keys exchanged: one log-sum-exp per key"),
        ("forward", "its backward with v as the output's gradient: what that gives the values is out"),
        (RESULTS, "what the caller gets"),
        ("backward_dv", "exchanged again, with grad_out as the values: its output is dv"),
        ("backward", "its backward with v as the output's gradient: dk, dq and the tables' gradients"),
    ):
        g.add_node(node, does=does)
    _link(g, INPUTS, "forward_lse", "q", "k", *tables)
    _link(g, INPUTS, "forward", "q", "k", "v", *tables)
    _link(g, "forward_lse", "forward", "lse")
    _link(g, "forward", RESULTS, "out")
    _link(g, INPUTS, "backward_dv", "q", "k", *tables, "grad_out")
    _link(g, INPUTS, "backward", "q", "k", "v", *tables, "grad_out")
    _link(g, "forward_lse", "backward", "lse")
    _link(g, "backward_dv", "backward", "dv")
    _link(g, "backward_dv", RESULTS, "dv")
    _link(g, "backward", RESULTS, "dq", "dk", *(f"d{t}" for t in learned(a)))
    return g


def _attend(program: ir.Program, a: ir.Attend, union: bool) -> nx.DiGraph:
    g: nx.DiGraph = nx.DiGraph(name=a.name)
    padded = program.keys.pad is not None or program.keys.pad_multiple is not None
    rows = (*(t for t in a.tables if t != a.normalizer.sink), *(("pad_k", "pad_v") if padded else ()))
    in_score = tuple(t for t in learned(a) if t != a.normalizer.sink)
    softmax = a.normalizer.kind == "softmax"
    saved = ("out", "lse") if softmax else ("out",)

    g.add_node(INPUTS, does="what the caller passes")
    g.add_node("forward", does=f"grid queries over the keys they see{', once per part' if union else ''}")
    _link(g, INPUTS, "forward", "q", "k", "v", *rows)
    last = "merge" if union else "forward"
    if union:
        joined = "parts joined exactly through their log-sum-exp; their backwards read the joined out and lse"
        g.add_node("merge", does=joined if softmax else "parts added")
        _link(g, "forward", "merge", *(f"{t} of each part" for t in saved))
    forwards = [last]
    if program.queries.prefix:
        g.add_node("forward_prefix", does="prefix queries over all keys")
        _link(g, INPUTS, "forward_prefix", "q", "k", "v")
        forwards.append("forward_prefix")
    g.add_node(RESULTS, does="what the caller gets")
    for f in forwards:
        _link(g, f, RESULTS, *saved)

    if softmax:
        g.add_node("backward_delta", does="one number per query: the row sum of out * grad_out, less grad_lse")
        _link(g, INPUTS, "backward_delta", "grad_out", "grad_lse")
        for f in forwards:
            _link(g, f, "backward_delta", "out")
    kernels = [
        ("backward_dq", f"weights again per query tile: dq{', partial sums of table gradients' if in_score else ''}", ("dq",)),
        ("backward_dkv", "weights again per key tile, over the queries that see it: dk and dv", ("dk", "dv")),
    ]
    if program.queries.prefix:
        kernels += [
            ("backward_dq_prefix", "the same for prefix queries", ("dq",)),
            ("backward_dkv_prefix", "what prefix queries add to every key", ("dk", "dv")),
        ]
    for name, does, writes in kernels:
        prefix = name.endswith("_prefix")
        g.add_node(name, does=does)
        _link(g, INPUTS, name, "q", "k", "v", *(() if prefix else rows), "grad_out")
        if softmax:
            _link(g, "forward_prefix" if prefix else last, name, "lse")
            _link(g, "backward_delta", name, "delta")
        if name != "backward_dkv" or not program.queries.prefix:
            _link(g, name, RESULTS, *writes)
    if program.queries.prefix:  # the second kernel adds to what the first one wrote
        _link(g, "backward_dkv", "backward_dkv_prefix", "dk", "dv")
    if in_score:
        g.add_node("backward_table", does="second stage: adds the programs' partial sums in a fixed order")
        _link(g, "backward_dq", "backward_table", *(f"partial d{t}" for t in in_score))
        _link(g, "backward_table", RESULTS, *(f"d{t}" for t in in_score))
    if padded:
        _link(g, "backward_dkv", RESULTS, "dpad_k", "dpad_v")
    return g


def _channel() -> nx.DiGraph:
    g: nx.DiGraph = nx.DiGraph(name="channel")
    for node, does in (
        (INPUTS, "what the caller passes"),
        ("forward_scores", "q^T k summed over the tokens, then softmax over channels"),
        ("forward", "each token's channels mixed by the weights"),
        (RESULTS, "what the caller gets"),
        ("backward_scores", "grad_out^T v summed over the tokens, through the softmax"),
        ("backward", "dq, dk and dv per token"),
    ):
        g.add_node(node, does=does)
    _link(g, INPUTS, "forward_scores", "q", "k")
    _link(g, INPUTS, "forward", "v")
    _link(g, "forward_scores", "forward", "weights")
    _link(g, "forward", RESULTS, "out")
    _link(g, INPUTS, "backward_scores", "v", "grad_out")
    _link(g, "forward_scores", "backward_scores", "weights")
    _link(g, INPUTS, "backward", "q", "k", "grad_out")
    _link(g, "forward_scores", "backward", "weights")
    _link(g, "backward_scores", "backward", "dscores")
    _link(g, "backward", RESULTS, "dq", "dk", "dv")
    return g


def ordered(g: nx.DiGraph) -> list[str]:
    """Kernels in an order that respects the edges, ties by the order they were added; without the two ends."""
    place = {n: i for i, n in enumerate(g)}
    return [n for n in nx.lexicographical_topological_sort(g, key=place.__getitem__) if n not in (INPUTS, RESULTS)]


def reads(g: nx.DiGraph, node: str) -> tuple[str, ...]:
    """Tensors on the edges into a node, each once."""
    return tuple(dict.fromkeys(t for _, _, d in g.in_edges(node, data=True) for t in d["tensors"]))


def writes(g: nx.DiGraph, node: str) -> tuple[str, ...]:
    """Tensors on the edges out of a node, each once."""
    return tuple(dict.fromkeys(t for _, _, d in g.out_edges(node, data=True) for t in d["tensors"]))
