"""Matmul FLOPs of a compiled program, counted in XLA's own HLO with loops multiplied by their trips.

XLA's `cost_analysis` visits a loop body once, so that eight scanned layers count as one; this walks the program.
"""

import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_OPCODE = re.compile(r"^(?:\([^=]*?\)|\S+) ([\w\-]+)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class HloCount(NamedTuple):
    """flops: of all dots. unknown_loops: loops whose trips only the run decides; their bodies count as zero trips."""

    flops: float
    unknown_loops: int


def count_flops(hlo_text: str) -> HloCount:
    """Counts `compiled.as_text()`. A conditional counts as its dearest branch.

    Dots that a backend replaced by library calls (as on GPU) are not seen: compile for CPU to count.
    """
    computations, entry = _parse(hlo_text)
    done: dict[str, HloCount] = {}

    def visit(name: str) -> HloCount:
        if name not in done:
            flops, unknown = 0.0, 0
            shapes = {result: _dims(body) for result, body in computations[name]}
            for _, body in computations[name]:
                match = _OPCODE.match(body)
                opcode = match.group(1) if match else ""
                if opcode == "dot":
                    flops += _dot_flops(body, shapes)
                branches = _BRANCHES.search(body)
                called = [visit(c) for c in _CALLED.findall(body) if c in computations]
                if opcode == "conditional" and branches:
                    called.append(max(visit(c.strip().lstrip("%")) for c in branches.group(1).split(",")))
                trips = 1
                if opcode == "while":
                    known = _TRIPS.search(body)
                    trips = int(known.group(1)) if known else 0
                    unknown += 0 if known else 1
                flops += trips * sum(count.flops for count in called)
                unknown += sum(count.unknown_loops for count in called)
            done[name] = HloCount(flops, unknown)
        return done[name]

    return visit(entry)


def _parse(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    computations: dict[str, list[tuple[str, str]]] = {}
    entry = current = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header.group(2)
            computations[current] = []
            entry = current if header.group(1) else entry
        elif current and (instruction := _INSTRUCTION.match(_COMMENT.sub("", line))):
            computations[current].append((instruction.group(1), instruction.group(2)))
    if not entry:
        raise ValueError("no ENTRY computation: expected the text of a compiled HLO module")
    return computations, entry


def _dims(body: str) -> list[int]:
    match = _SHAPE.match(body)
    return [int(d) for d in match.group(1).split(",") if d] if match else []


def _dot_flops(body: str, shapes: dict[str, list[int]]) -> float:
    operands = re.search(r" dot\(([^)]*)\)", body)
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", body)
    assert operands, body
    first = operands.group(1).split("%")[1] if "%" in operands.group(1) else operands.group(1)
    lhs = shapes[re.split(r"[,\s]", first.strip())[0]]
    contracted = [int(d) for d in contracting.group(1).split(",") if d] if contracting else []
    return 2.0 * math.prod(_dims(body)) * math.prod(lhs[d] for d in contracted)
