"""How much of a multiprocessor a kernel can fill: theoretical occupancy, from what it takes of its registers,
shared memory and threads. The rules are those of CUDA's occupancy calculator.
"""

from __future__ import annotations

from typing import NamedTuple

REGISTERS = 65536  # of a multiprocessor, on all architectures here
_REGISTER_UNIT = 256  # registers are given to a warp in units of so many,
_WARP_UNIT = 4  # to so many warps at a time
_KIB = 1024


class Multiprocessor(NamedTuple):
    warps: int
    blocks: int
    shared: int  # bytes
    shared_unit: int = 128
    reserved: int = _KIB  # bytes of shared memory that each block takes for the system


# CUDA C++ Programming Guide, technical specifications per compute capability.
MULTIPROCESSORS = {
    "75": Multiprocessor(32, 16, 64 * _KIB, shared_unit=256, reserved=0),
    "80": Multiprocessor(64, 32, 164 * _KIB),
    "86": Multiprocessor(48, 16, 100 * _KIB),
    "87": Multiprocessor(48, 16, 164 * _KIB),
    "88": Multiprocessor(48, 24, 100 * _KIB),
    "89": Multiprocessor(48, 24, 100 * _KIB),
    "90": Multiprocessor(64, 32, 228 * _KIB),
    "100": Multiprocessor(64, 32, 228 * _KIB),
    "103": Multiprocessor(64, 32, 228 * _KIB),
    "110": Multiprocessor(48, 24, 228 * _KIB),
    "120": Multiprocessor(48, 24, 100 * _KIB),
    "121": Multiprocessor(48, 24, 100 * _KIB),
}


class Occupancy(NamedTuple):
    blocks: int  # resident at a time
    warps: int
    share: float  # of the warps that there is room for
    limits: tuple[str, ...]  # what there is no more of: "warps", "blocks", "registers", "shared"


def occupancy(architecture: str, registers: int, shared: int, threads: int) -> Occupancy:
    """Of blocks of `threads` with so many `registers` each, and `shared` bytes a block, dynamic ones too."""
    sm = MULTIPROCESSORS[architecture.rstrip("af")]
    warps = -(-threads // 32)
    room = {"warps": sm.warps // warps, "blocks": sm.blocks}
    if registers:
        of_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        fit = REGISTERS // of_warp // _WARP_UNIT * _WARP_UNIT
        room["registers"] = fit // warps
    taken = -(-(shared + sm.reserved) // sm.shared_unit) * sm.shared_unit
    if taken:
        room["shared"] = sm.shared // taken
    blocks = min(room.values())
    limits = tuple(name for name, most in room.items() if most == blocks)
    return Occupancy(blocks, blocks * warps, blocks * warps / sm.warps, limits)
