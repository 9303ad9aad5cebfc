"""Exchange between the lanes of a warp, barriers of warps and blocks, matrices in and out of registers."""

from .instruction_table import Context, instruction
from .ops_memory import bracketed
from .ptx_parser import SIZES, split


@instruction("shfl")
def shuffle(c: Context) -> str:
    c.need("sync")
    mode = {"up": "kUp32", "down": "kDown32", "bfly": "kButterfly32", "idx": "kIndex32"}[
        c.need("up", "down", "bfly", "idx")
    ]
    c.types()
    to, _, predicate = c.operands[0].partition("|")
    values = ", ".join([c.value(1, "b32"), c.value(2, "b32"), c.value(3, "b32"), c.value(4, "b32")])
    text = f"{{ bool valid; {c.set(to.strip(), 'b32', f'shuffle(t, {mode}, {values}, valid, {c.site})')}"
    if predicate:
        text += " " + c.set(predicate.strip(), "pred", "valid")
    return text + " }"


@instruction("vote")
def vote(c: Context) -> str:
    c.need("sync")
    mode = c.need("all", "any", "uni", "ballot")
    c.types()
    votes = f"ballot(t, {c.value(1, 'pred')}, {c.value(2, 'b32')}, {c.site})"
    if mode == "ballot":
        return c.assign(0, "b32", votes)
    there = "voters"
    result = {"all": f"votes == {there}", "any": "votes != 0", "uni": f"votes == {there} || !votes"}[mode]
    mask = c.value(2, "b32")
    # Lanes that have exited have no vote.
    text = f"{{ const u32 votes = {votes}, voters = {mask} & ~t.warp->exited; "
    return text + c.assign(0, "pred", f"({result})") + " }"


@instruction("match")
def match(c: Context) -> str:
    mode = c.need("any", "all")
    c.need("sync")
    type_ = c.type()
    value, mask = c.value(1, type_), c.value(2, "b32")
    if mode == "any":
        return c.assign(0, "b32", f"match_any(t, {value}, {mask}, {c.site})")
    to, _, predicate = c.operands[0].partition("|")
    text = f"{{ bool all; {c.set(to.strip(), 'b32', f'match_all(t, {value}, {mask}, all, {c.site})')}"
    if predicate:
        text += " " + c.set(predicate.strip(), "pred", "all")
    return text + " }"


@instruction("redux")
def reduce(c: Context) -> str:
    c.need("sync")
    operation = {"add": "kAdd", "min": "kMin", "max": "kMax", "and": "kAnd", "or": "kOr", "xor": "kXor"}[
        c.need("add", "min", "max", "and", "or", "xor")
    ]
    type_ = c.type()
    if SIZES[type_] != 4 or type_ == "f32":
        c.fail("type not supported")
    name = "reduce_s32" if type_ == "s32" else "reduce_u32"
    return c.assign(0, type_, f"{name}(t, {operation}, {c.value(1, type_)}, {c.value(2, 'b32')}, {c.site})")


@instruction("elect")
def elect(c: Context) -> str:
    c.need("sync")
    to, _, predicate = c.operands[0].partition("|")
    elected = c.set(predicate.strip(), "pred", f"elect(t, {c.value(1, 'b32')}, leader, {c.site})")
    return f"{{ u32 leader; {elected} {c.set(to.strip(), 'b32', 'leader')} }}"


@instruction("activemask")
def active_mask(c: Context) -> str:
    c.types()
    # Fibers do not run in step, so only the lane itself is surely there.
    return c.assign(0, "b32", "(1u << t.lane)")


@instruction("bar", "barrier")
def barrier(c: Context) -> str:
    c.drop("aligned", "cta")
    if c.flag("warp"):
        c.need("sync")
        return f"sync_warp(t, {c.value(0, 'b32')}, {c.site});"
    if c.flag("cluster"):
        # A cluster of one block: arriving changes nothing, waiting is a barrier of the block.
        mode = c.need("arrive", "wait")
        c.drop("acquire", "release", "relaxed")
        return f"bar_sync(t, 15, 0, {c.site});" if mode == "wait" else ";"
    mode = c.need("sync", "arrive", "red")
    if mode != "red":
        count = c.value(1, "u32") if len(c.operands) > 1 else "0"
        return f"bar_{mode}(t, {c.value(0, 'u32')}, {count}, {c.site});"
    operation = c.need("popc", "and", "or")
    c.types()
    rest = c.operands[2:]
    count = c.get(rest[0], "u32") if len(rest) > 1 else "0"
    id_ = c.value(1, "u32")
    text = f"{{ const u32 id = {id_}; bar_sync(t, id, {count}, {c.site}, {c.get(rest[-1], 'pred')}); "
    if operation == "popc":
        return text + c.assign(0, "u32", "barrier_popcount(t, id)") + " }"
    return text + c.assign(0, "pred", f"barrier_{'all' if operation == 'and' else 'any'}(t, id)") + " }"


def _matrices(c: Context) -> tuple[int, bool]:
    c.need("sync")
    c.need("aligned")
    c.need("m8n8")
    count = int(c.need("x1", "x2", "x4")[1:])
    transposed = c.flag("trans")
    c.need("shared", "shared::cta")
    c.need("b16")
    return count, transposed


@instruction("ldmatrix")
def load_matrix(c: Context) -> str:
    count, transposed = _matrices(c)
    parts = split(c.operands[0].strip("{}"))
    address = bracketed(c, c.operands[1])
    text = f"{{ u32 r[4]; load_matrices(t, {count}, {str(transposed).lower()}, {address}, r, {c.site}); "
    return text + " ".join(c.set(p, "b32", f"r[{i}]") for i, p in enumerate(parts)) + " }"


@instruction("stmatrix")
def store_matrix(c: Context) -> str:
    count, transposed = _matrices(c)
    values = ", ".join(c.get(p, "b32") for p in split(c.operands[1].strip("{}")))
    address = bracketed(c, c.operands[0])
    store = f"store_matrices(t, {count}, {str(transposed).lower()}, {address}, r, {c.site});"
    return f"{{ const u32 r[4] = {{{values}}}; {store} }}"


@instruction("movmatrix")
def transpose_matrix(c: Context) -> str:
    for name in ("sync", "aligned", "m8n8", "trans", "b16"):
        c.need(name)
    return c.assign(0, "b32", f"move_matrix(t, {c.value(1, 'b32')}, {c.site})")
