"""cp.async: 4, 8 or 16 bytes from global to shared memory, with zero fill."""

from .instruction_table import Context, instruction
from .ops_memory import HINTS, bracketed


@instruction("cp")
def copy(c: Context) -> str:
    if not c.flag("async"):
        c.fail("not supported")
    if c.flag("commit_group"):
        return "copy_commit(t);"
    if c.flag("wait_group"):
        return f"copy_wait(t, {c.operands[0]});"
    if c.flag("wait_all"):
        return "copy_commit(t); copy_wait(t, 0);"
    c.need("ca", "cg")
    c.need("shared", "shared::cta")
    c.need("global")
    c.drop(*HINTS)
    to, source = bracketed(c, c.operands[0]), bracketed(c, c.operands[1])
    bytes_ = c.value(2, "u32")
    wanted = bytes_
    if len(c.operands) > 3:
        register = c.function.register(c.operands[3])
        # The fourth operand is the bytes to read, or a predicate that reads none.
        if register and register[1] == "pred":
            wanted = f"({register[0]} ? 0u : {bytes_})"
        elif not (register and register[1] == "b64" and len(c.operands) == 4 and "L2::cache_hint" in c.item.modifiers):
            wanted = c.value(3, "u32")
    return f"copy_async(t, {to}, {source}, {bytes_}, {wanted}, {c.site});"
