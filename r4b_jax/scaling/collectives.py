"""What devices send each other, read from the text of a program compiled for TPUs.

What `compiled.as_text()` of libtpu 0.0.52 writes, and how it is read here:

    all-gather, reduce-scatter, all-reduce, all-to-all    synchronous: the device waits
    x-start ... x-done                                    overlapped, if work stands between them
    async-collective-start, fusions that each hold the    one collective in pieces, overlapped with
      same all-gather beside a product, ...-done            what those fusions compute
    fusion that calls %all-reduce-scatter                 a reduce-scatter
    loops of products with collective-permutes            a gather or a reduce-scatter in pieces
      (windowed_dot_general)                                ("windowed einsum")
    send to the host, "is_host_transfer"                  between slices, by the data-centre network

The text does not tell how often a loop runs: its condition compares a counter with a constant.
Channel ids do not tell collectives apart: all those that a `shard_map` writes have id 1.
"""

import dataclasses
import math
import re

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "send",
)
PIECES = "chain_id="  # in the pieces of a collective that is spread over fusions
SCATTER = "all-reduce-scatter"  # in the name of what such a fusion calls
SMALL = 2**16  # bytes: what gives no more is no work to wait beside


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str  # of KINDS
    devices: int  # that take part together
    result: float  # bytes that a device has after it, of one run
    runs: float  # times a step
    overlapped: bool
    unknown_runs: bool  # it is in a loop whose length only the device knows

    @property
    def wire(self) -> float:
        """Bytes that a device sends in all runs, by the best algorithm on a ring."""
        n = self.devices
        share = {
            "all-gather": (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-reduce": 2 * (n - 1) / n,
            "all-to-all": (n - 1) / n,
        }
        return self.runs * self.result * share.get(self.kind, 1)


def collectives(text: str, unknown_trips: float = 1) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text; both branches of a
    conditional are taken to run.

    Args:
      text: `compiled.as_text()`.
      unknown_trips: how often a loop runs whose length the text does not tell.
    """
    module = _Module(text, unknown_trips)
    module.visit(module.entry, 1.0, False, {})
    return module.found


def summary(found: list[Collective]) -> list[dict]:
    """One line for each kind, overlapped or not.

    Returns:
      dicts of kind, overlapped, count (in the text), runs (a step), bytes (of the results of all
      runs) and wire (bytes that a device sends in all runs); most bytes sent first.
    """
    lines = {}
    for c in found:
        start = {"kind": c.kind, "overlapped": c.overlapped}
        start |= dict.fromkeys(("count", "runs", "bytes", "wire"), 0)
        line = lines.setdefault((c.kind, c.overlapped), start)
        line["count"] += 1
        line["runs"] += c.runs
        line["bytes"] += c.result * c.runs
        line["wire"] += c.wire
    return sorted(lines.values(), key=lambda line: -line["wire"])


def wire_bytes(found: list[Collective]) -> tuple[float, float]:
    """Bytes that a device sends to others of its slice in a step: (all, of which nothing runs
    beside)."""
    near = [c for c in found if c.kind != "send"]
    return sum(c.wire for c in near), sum(c.wire for c in near if not c.overlapped)


# The text


@dataclasses.dataclass(frozen=True)
class _Op:
    """A line: `%name = shape code(operands), attributes`."""

    name: str
    shape: str
    code: str
    operands: tuple[str, ...]
    rest: str  # the line from the operands on

    def attribute(self, key: str) -> str:
        """The computation that an attribute names, or ""."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


_NAME = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
_CODE = re.compile(r"\s*([\w\-]+)\(")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,<=]*)\]")


def _closing(text: str, start: int) -> int:
    """Where the bracket closes that opens at `start`; the end of the text if it does not."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _parse(line: str) -> _Op | None:
    """An operation, or None for a line that is none."""
    name = _NAME.match(line)
    if not name:
        return None
    start = name.end()
    is_tuple = line.startswith("(", start)
    end = _closing(line, start) + 1 if is_tuple else line.find(" ", start)
    code = _CODE.match(line, end) if end > start else None
    if not code:
        return None
    rest = line[code.end() - 1 :]
    names = re.findall(r"%([\w.\-]+)", rest[: _closing(rest, 0)])
    return _Op(name[1], line[start:end], code[1], tuple(names), rest)


def shape_bytes(shape: str) -> float:
    """Bytes of a shape, all parts of a tuple together: `bf16[36,1,4096]{2,1,0}` -> 294912."""
    total = 0.0
    for kind, bits, dims in _ARRAY.findall(shape):
        sizes = [int(n.strip("<=")) for n in dims.split(",") if n]
        total += math.prod(sizes) * (1 if kind == "pred" else int(bits) / 8)
    return total


def _devices(rest: str, everyone: int) -> int:
    """How many devices a group has: {{0,1},{2,3}}, [2,4]<=[8] or mesh['x'=2,'y'=4] {'y'}."""
    found = re.search(r"replica_groups=(\S+(?: \{[^}]*\})?)", rest)
    groups = found[1] if found else ""
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return listed[1].count(",") + 1
    if tiled := re.match(r"\[\d+,(\d+)\]", groups):
        return int(tiled[1])
    if mesh := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", groups):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])  # 'x', or a part 'x':(1)2
        return math.prod(int(part) if part else sizes.get(axis, 1) for axis, part in axes)
    return everyone


class _Module:
    """A program as computations, lists of operations in the order in which they run."""

    def __init__(self, text: str, unknown_trips: float):
        self.unknown_trips = unknown_trips
        self.computations, self.entry, self.found = {}, "", []
        current = None
        for line in text.splitlines():
            if current is None:
                if head := _HEAD.match(line):
                    current = self.computations.setdefault(head[2], {})
                    self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif op := _parse(line):
                current[op.name] = op
        devices = re.search(r"num_partitions=(\d+)", text[:100_000])
        self.devices = int(devices[1]) if devices else 1

    def visit(self, name: str, runs: float, unknown: bool, slots: dict[int, int]):
        """Note the collectives of `runs` runs of a computation; `slots`: the parts of its parameter
        that are known numbers."""
        ops = self.computations.get(name, {})
        pieces = set()
        for op in ops.values():
            if op.code == "while":
                trips, inner = self._loop(op, ops, slots)
                times = self.unknown_trips if trips is None else trips
                body = op.attribute("body")
                self.visit(body, runs * times, unknown or trips is None, inner)
            elif op.code in ("call", "conditional"):
                for part in self._called(op):
                    self.visit(part, runs, unknown, {})
            elif op.code in ("fusion", "async-start"):
                for part in self._called(op):
                    self._inside(op, part, ops, runs, unknown, pieces)
            elif (kind := op.code.removesuffix("-start")) in KINDS:
                self._note(kind, op, op, ops, runs, unknown)

    def _called(self, op: _Op) -> list[str]:
        """The computations that an operation runs once."""
        names = [op.attribute(key) for key in ("calls", "to_apply")]
        names += [op.attribute(f"{value}_computation") for value in ("true", "false")]
        if branches := re.search(r"branch_computations=\{([^}]*)\}", op.rest):
            names += re.findall(r"[\w.\-]+", branches[1])
        return [name for name in names if name in self.computations]

    def _inside(self, caller: _Op, name: str, ops, runs, unknown, pieces: set):
        """The collectives of what a fusion or an async operation calls."""
        for op in self.computations[name].values():
            kind = op.code.removesuffix("-start")
            if kind not in KINDS:
                continue
            if PIECES in op.rest:
                piece = re.search(rf'{PIECES}"?(\w+)', op.rest)[1]
                if piece not in pieces:
                    self._add(kind, op, shape_bytes(op.shape), runs, True, unknown)
                pieces.add(piece)
            elif SCATTER in name:
                self._add("reduce-scatter", op, shape_bytes(caller.shape), runs, False, unknown)
            elif caller.code == "async-start":
                self._note(kind, op, caller, ops, runs, unknown)
            else:
                self._add(kind, op, shape_bytes(op.shape), runs, False, unknown)

    def _note(self, kind: str, op: _Op, start: _Op, ops, runs, unknown):
        """A collective, synchronous or between a start and its done."""
        if not start.code.endswith("-start") and kind != "send":
            return self._add(kind, op, shape_bytes(op.shape), runs, False, unknown)
        after = list(ops.values())
        after = after[after.index(start) + 1 :]
        done = next((i for i, x in enumerate(after) if self._ends(x, start)), None)
        overlapped = any(self._works(x) for x in after[:done])
        # Of a start's parts (operand, result, flags), should its done be elsewhere; a send's done
        # gives nothing.
        parts = max(map(shape_bytes, re.findall(r"\w+\[[\d,]*\]", start.shape)), default=0)
        is_told = done is not None and kind != "send"
        result = shape_bytes(after[done].shape) if is_told else parts
        self._add(kind, op, result, runs, overlapped, unknown)

    @staticmethod
    def _ends(op: _Op, start: _Op) -> bool:
        return op.code.endswith("-done") and start.name in op.operands

    def _works(self, op: _Op) -> bool:
        """Whether an operation computes enough for something to run beside it."""
        if op.code == "custom-call":
            return 'custom_call_target="tpu_custom_call"' in op.rest  # a Pallas kernel
        if op.code not in ("fusion", "convolution", "dot", "while"):
            return False
        holds = (op.code for name in self._called(op) for op in self.computations[name].values())
        return shape_bytes(op.shape) > SMALL and not any(
            code.removesuffix("-start") in KINDS for code in holds
        )

    def _add(self, kind: str, op: _Op, result: float, runs, overlapped: bool, unknown: bool):
        devices = _devices(op.rest, self.devices)
        self.found.append(Collective(kind, devices, result, runs, overlapped, unknown))

    # Loops

    def _loop(self, loop: _Op, ops, slots: dict[int, int]) -> tuple[float | None, dict[int, int]]:
        """How often a loop runs, or None; and what is known of its body's parameter: the parts that
        start as a number and stay as they are."""
        start = ops.get(loop.operands[0]) if loop.operands else None
        names = start.operands if start and start.code == "tuple" else ()
        first = {i: _number(n, ops, slots) for i, n in enumerate(names)}
        body = self.computations.get(loop.attribute("body"), {})
        root = list(body.values())[-1] if body else None  # the text puts the root last
        last = root.operands if root and root.code == "tuple" else ()
        kept = {i for i, name in enumerate(last) if _slot(name, body) == i}
        same = {i: n for i, n in first.items() if n is not None and i in kept}
        told = re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest)
        return (int(told[1]) if told else self._trips(loop, first, same, body, last)), same

    def _trips(self, loop: _Op, first, same, body, last) -> float | None:
        """From `counter < bound`, where the counter starts and what each run adds to it."""
        condition = self.computations.get(loop.attribute("condition"), {})
        root = list(condition.values())[-1] if condition else None
        if root is None or "direction=LT" not in root.rest or len(root.operands) != 2:
            return None
        slot = _slot(root.operands[0], condition)
        bound = _number(root.operands[1], condition, same)
        step = _source(last[slot], body) if slot is not None and slot < len(last) else None
        if None in (bound, step, first.get(slot)) or step.code != "add":
            return None
        adds = [_number(n, body, same) for n in step.operands if _slot(n, body) != slot]
        if len(adds) != 1 or not adds[0]:
            return None
        return max(0, math.ceil((bound - first[slot]) / adds[0]))


def _source(name: str, ops: dict[str, _Op]) -> _Op | None:
    """What an operation gives, behind copies of it."""
    op = ops.get(name)
    while op and op.code in ("copy", "copy-start", "copy-done", "bitcast", "convert"):
        op = ops.get(op.operands[0])
    return op


def _slot(name: str, ops: dict[str, _Op]) -> int | None:
    """Which part of the computation's parameter an operation gives, if it does."""
    op = _source(name, ops)
    if op is None or op.code != "get-tuple-element":
        return None
    of = ops.get(op.operands[0])
    found = re.search(r"index=(\d+)", op.rest)
    return int(found[1]) if found and of and of.code == "parameter" else None


def _number(name: str, ops: dict[str, _Op], slots: dict[int, int]) -> int | None:
    """The value of a scalar, if the text tells it."""
    op = _source(name, ops)
    if op is None:
        return None
    if op.code == "constant":
        value = op.rest[1 : _closing(op.rest, 0)]
        return int(value) if re.fullmatch(r"-?\d+", value) else None
    return slots.get(_slot(name, ops))
