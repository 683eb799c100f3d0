"""The collectives and the memory traffic of one chip in a compiled program, read from its optimised HLO.

XLA's cost analysis counts the body of a loop once, although nearly all work of a step lies in loops over layers. Here
every instruction counts as often as the loops around it run.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_HEADER = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_FREE = set(
    "parameter constant tuple get-tuple-element bitcast while conditional call partition-id replica-id after-all "
    "opt-barrier async-start async-update async-done".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip does in one run of a program.

    counts, sent: for each kind of collective, how many there are and the bytes that the chip sends. memory: bytes that
    are read and written outside its on-chip memory. unknown: loops whose number of turns is not in the text; they count
    once.
    """

    counts: Mapping[str, int]
    sent: Mapping[str, int]
    memory: int
    unknown: int = 0

    def times(self, n: int) -> "Work":
        """The work of n runs."""
        counts, sent = ({kind: n * value for kind, value in part.items()} for part in (self.counts, self.sent))
        return Work(counts, sent, n * self.memory, self.unknown)

    def __add__(self, other: "Work") -> "Work":
        # Not as Counters, whose sum has no entry for a kind that sends nothing: a collective over one device.
        counts, sent = (
            {kind: ours.get(kind, 0) + theirs.get(kind, 0) for kind in {**ours, **theirs}}
            for ours, theirs in ((self.counts, other.counts), (self.sent, other.sent))
        )
        return Work(counts, sent, self.memory + other.memory, self.unknown + other.unknown)


def read_work(text: str) -> Work:
    """The work of a program from `compiled.as_text()`.

    Every branch of a conditional counts. A collective that is spread over several instructions counts once.
    """
    module = _Module(text)
    counts, sent, memory, channels = Counter(), Counter(), 0, set()
    for computation, times in module.executed.items():
        for op in module.computations[computation]:
            kind = op.collective
            if kind and not (op.channel in channels and computation in module.fused):
                channels.add(op.channel)
                counts[kind] += times
                sent[kind] += times * module.sent(op, kind)
            if computation not in module.fused:
                memory += times * module.moved(op)
    return Work(dict(counts), dict(sent), memory, module.unknown)


@dataclasses.dataclass(frozen=True)
class _Op:
    computation: str
    root: bool
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    @property
    def collective(self) -> str | None:
        kind = self.opcode.removesuffix("-start")
        if kind == "all-reduce" and self.computation.startswith("all-reduce-scatter"):
            return "reduce-scatter"  # what TPUs run for a sum of which each chip keeps a part
        return kind if kind in COLLECTIVES else None

    @property
    def channel(self) -> str:
        found = re.search(r"channel_id=(\d+)", self.rest)
        return found[1] if found else self.name

    def called(self, attribute: str) -> list[str]:
        """Names of the computations in an attribute."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.-]+)", self.rest)
        return re.findall(r"%([\w.-]+)", found[1]) if found else []


class _Module:
    """computations: their instructions; executed: how often each runs, fused ones included."""

    def __init__(self, text: str):
        self.computations: dict[str, list[_Op]] = {}
        self.unknown = 0
        entry = self._parse(text)
        ops = [op for ops in self.computations.values() for op in ops]
        self.by_name = {op.name: op for op in ops}
        self.fused = {name for op in ops if op.opcode == "fusion" for name in op.called("calls")}
        devices = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(devices[1]) if devices else 1
        self.executed: Counter[str] = Counter()
        self._execute(entry, 1)

    def sent(self, op: _Op, kind: str) -> int:
        """Bytes that one chip sends in a collective around a ring: each part passes every chip of the group but one."""
        size = sum(_bytes(self.by_name[name].type) for name in op.operands)
        n = _group_size(op.rest, self.devices)
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
        return round(size * share)

    def moved(self, op: _Op) -> int:
        """Bytes that an instruction outside a fusion reads from and writes to the chip's main memory."""
        if op.opcode in _FREE or op.opcode.endswith("-done"):
            return 0
        operands = [self.by_name[name] for name in op.operands]
        if op.opcode == "fusion":
            return self._moved_by_fusion(op, operands)
        if op.opcode in _SLICES:
            return 2 * _main(op.type)
        if op.opcode == "dynamic-update-slice":
            return 2 * _main(operands[1].type)
        read = sum(_main(operand.type) for operand in operands)
        return 2 * read if op.opcode.endswith("-start") else read + _main(op.type)

    def _moved_by_fusion(self, op: _Op, operands: list[_Op]) -> int:
        """An operand that is only sliced counts with its slices, one that is only updated in place with its updates."""
        ops = self.computations[op.called("calls")[0]]
        parameters = {int(inner.rest.partition(")")[0]): inner.name for inner in ops if inner.opcode == "parameter"}
        updated = {self._origin(inner.operands[0]): inner for inner in ops if inner.opcode == "dynamic-update-slice"}
        total = _main(op.type)
        for number, operand in enumerate(operands):
            whole, parameter = _main(operand.type), parameters[number]
            if parameter in updated and whole:
                total += 2 * _bytes(self.by_name[updated[parameter].operands[1]].type) - whole
                continue
            users = [inner for inner in ops if parameter in inner.operands]
            sliced = users and all(inner.opcode in _SLICES and inner.operands[0] == parameter for inner in users)
            total += min(whole, sum(_bytes(inner.type) for inner in users)) if sliced else whole
        return max(total, 0)

    def _origin(self, name: str) -> str:
        """The array of which the named one is a view or a copy."""
        while self.by_name[name].opcode in ("bitcast", "copy", "reshape"):
            name = self.by_name[name].operands[0]
        return name

    def _parse(self, text: str) -> str:
        """Fill `computations` and return the name of the entry."""
        name = entry = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[1]
                self.computations[name] = []
                entry = name if line.startswith("ENTRY") else entry
            elif name and (found := _INSTRUCTION.match(line)):
                root, op, kind, opcode, rest = found.groups()
                self.computations[name].append(_Op(name, bool(root), op, kind, opcode, rest))
        return entry

    def _execute(self, computation: str, times: int) -> None:
        self.executed[computation] += times
        for op in self.computations[computation]:
            for name, turns in self._callees(op):
                self._execute(name, times * turns)

    def _callees(self, op: _Op) -> Iterator[tuple[str, int]]:
        match op.opcode:
            case "while":
                yield op.called("body")[0], self._turns(op)
            case "conditional":
                for attribute in ("branch_computations", "true_computation", "false_computation"):
                    yield from ((name, 1) for name in op.called(attribute))
            case "fusion" | "async-start":
                yield from ((name, 1) for name in op.called("calls"))
            case "call":
                yield from ((name, 1) for name in op.called("to_apply"))

    def _turns(self, loop: _Op) -> int:
        """Turns of a loop, as the compiler notes them, or from the start, step and limit of its counter."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        test = next(op for op in self.computations[loop.called("condition")[0]] if op.root)
        if test.opcode == "compare" and "direction=LT" in test.rest:
            counter, limit = (self.by_name[name] for name in test.operands)
            element = re.search(r"index=(\d+)", counter.rest)
            if counter.opcode == "get-tuple-element" and limit.opcode == "constant" and element:
                index = int(element[1])
                start, step = self._start(loop, index), self._step(loop, index)
                return math.ceil((_value(limit) - start) / step)
        self.unknown += 1
        return 1

    def _start(self, loop: _Op, index: int) -> int:
        carried = self.by_name[loop.operands[0]]
        first = self.by_name[self._origin(carried.operands[index])] if carried.opcode == "tuple" else None
        return _value(first) if first and first.opcode == "constant" else 0

    def _step(self, loop: _Op, index: int) -> int:
        """What a turn adds to the counter (unrolled loops take larger steps); 1 where no constant is found."""
        root = next(op for op in self.computations[loop.called("body")[0]] if op.root)
        following = self.by_name[self._origin(root.operands[index])] if root.opcode == "tuple" else root
        added = [self.by_name[name] for name in following.operands] if following.opcode == "add" else []
        return next((_value(op) for op in added if op.opcode == "constant"), 1)


def _value(constant: _Op) -> int:
    return int(constant.rest.partition(")")[0])


def _bytes(kind: str) -> int:
    """Bytes of an array or a tuple of arrays."""
    return sum(_array_bytes(*found[:2]) for found in _ARRAY.findall(kind))


def _main(kind: str) -> int:
    """Bytes of the arrays in main memory; the layout of an array elsewhere names its memory, such as S(1)."""
    return sum(_array_bytes(*found[:2]) for found in _ARRAY.findall(kind) if "S(" not in found[2])


def _array_bytes(dtype: str, dimensions: str) -> int:
    width = re.search(r"\d+", dtype)  # bf16, s8, f8e4m3fn; pred takes a byte
    elements = math.prod(int(n) for n in dimensions.split(",") if n)
    return 0 if dtype in ("token", "opaque") else elements * int(width[0] if width else 8) // 8


def _group_size(attributes: str, devices: int) -> int:
    """Number of chips in a group of a collective, from any of the forms in which XLA writes groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    return devices
