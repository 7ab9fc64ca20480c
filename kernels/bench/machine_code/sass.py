"""NVIDIA machine code as ``cuobjdump -sass`` prints it: instructions, branches and the loops they form.

A loop is found in the graph of jumps, not in the listing: ptxas moves waits and rare paths out of line, so a jump
backwards is not always a loop, and a loop is not always one stretch of the listing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
ASYNC_COPY = re.compile(r"LDGSTS|UTMALDG|UBLKCP")
SPILL = re.compile(r"STL|LDL")

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", re.MULTILINE)
INSTRUCTION = re.compile(r"(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*)([\w.]*)\s*(.*)", re.DOTALL)
JUMPS = {"BRA", "JMP", "CALL", "JMPXU"}
ENDS = {"EXIT", "RET"}


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``op`` "HMMA", ``full`` "HMMA.16816.F32.BF16", ``goal`` the address it may jump to, its operands.

    ``always``: no predicate guards it and no operand is a condition, so a jump is taken and an EXIT ends the thread.
    """

    address: int
    op: str
    full: str
    goal: int | None
    always: bool
    operands: str = ""

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow. A CALL may return; ptxas also uses it as a long jump."""
        return not (self.always and (self.op in ENDS or (self.op in JUMPS and self.op != "CALL")))


def parse(address: str, text: str) -> Instruction:
    match = INSTRUCTION.match(text)
    if match is None:
        raise ValueError(f"cannot read the instruction {text!r} at 0x{address}")
    guard, op, suffix, operands = match.groups()
    goal = re.search(r"(?<![\w\[])0x([0-9a-f]+)\s*$", operands) if op in JUMPS else None
    always = not guard and "," not in operands
    return Instruction(int(address, 16), op, op + suffix, int(goal[1], 16) if goal else None, always, operands)


def functions(sass: str) -> Iterator[list[Instruction]]:
    """The instructions of every function of a listing; addresses start anew in each."""
    for section in re.split(r"^\s*Function : .*$", sass, flags=re.MULTILINE):
        listing = [parse(address, text) for address, text in LINE.findall(section)]
        if listing:
            yield listing


@dataclass(frozen=True)
class Graph:
    """The jumps of one function, instruction by instruction, as indices into ``listing``."""

    listing: list[Instruction]

    @cached_property
    def blocks(self) -> list[range]:
        """Stretches that are entered at the first instruction only and left at the last only."""
        index = {instruction.address: i for i, instruction in enumerate(self.listing)}
        goals = [index[x.goal] for x in self.listing if x.goal in index]
        after = [i + 1 for i, x in enumerate(self.listing) if x.goal is not None or not x.falls_through]
        edges = sorted({0, len(self.listing), *goals, *after})
        return [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]

    @cached_property
    def successors(self) -> list[list[int]]:
        block_at = {self.listing[block[0]].address: i for i, block in enumerate(self.blocks)}
        following = []
        for i, block in enumerate(self.blocks):
            last = self.listing[block[-1]]
            next_block = [i + 1] if last.falls_through and i + 1 < len(self.blocks) else []
            following.append(next_block + ([block_at[last.goal]] if last.goal in block_at else []))
        return following

    @cached_property
    def dominators(self) -> list[set[int]]:
        """For every block, the blocks that each way to it from the entry passes, itself included.

        A block that no way leads to has all of them, and so takes none from the blocks that it jumps to.
        """
        before = predecessors(self.successors)
        everything = set(range(len(self.blocks)))
        found = [everything if i else {i} for i in everything]
        changed = True
        while changed:
            changed = False
            for i in everything:
                if i and before[i]:
                    new = set.intersection(*(found[j] for j in before[i])) | {i}
                    changed, found[i] = changed or new != found[i], new
        return found

    @cached_property
    def loops(self) -> list[set[int]]:
        """The blocks of every natural loop; two ways back to one head are one loop."""
        before, bodies = predecessors(self.successors), {}
        for tail, heads in enumerate(self.successors):
            for head in heads:
                if head in self.dominators[tail]:
                    bodies.setdefault(head, {head}).update(reaching(tail, head, before))
        return list(bodies.values())

    def instructions(self, loop: set[int]) -> list[Instruction]:
        return [self.listing[i] for block in sorted(loop) for i in self.blocks[block]]


def predecessors(successors: list[list[int]]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in successors]
    for i, following in enumerate(successors):
        for j in following:
            before[j].append(i)
    return before


def reaching(tail: int, head: int, before: list[list[int]]) -> set[int]:
    """The blocks from which ``tail`` is reached without passing ``head``."""
    body, waiting = {head}, [tail]
    while waiting:
        block = waiting.pop()
        if block not in body:
            body.add(block)
            waiting.extend(before[block])
    return body


def count(pattern: re.Pattern[str], listing: list[Instruction]) -> int:
    return sum(bool(pattern.fullmatch(x.op)) for x in listing)


def loops(sass: str) -> list[list[Instruction]]:
    """The instructions of every loop of a listing, inner loops also within the loops around them."""
    graphs = [Graph(listing) for listing in functions(sass)]
    return [graph.instructions(loop) for graph in graphs for loop in graph.loops]


def tensor_core_loops(sass: str) -> list[list[Instruction]]:
    """The loops with a tensor-core instruction and no further such loop inside; a waiting loop inside belongs to it."""
    found = []
    for graph in (Graph(listing) for listing in functions(sass)):
        busy = [loop for loop in graph.loops if count(TENSOR_CORE, graph.instructions(loop))]
        found += [graph.instructions(loop) for loop in busy if not any(other < loop for other in busy)]
    return found
