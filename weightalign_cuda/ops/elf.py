"""What is wrong with the file of a shared library, before the loader maps it. The loader reads a truncated one beyond
its end, which ends the process (bus error), and calls one for another architecture a missing file."""

import pathlib
import platform
import struct

MACHINES = {"x86_64": 62, "aarch64": 183}
# e_machine, e_phoff, e_shoff, e_phnum, e_shentsize, e_shnum; of a segment: p_offset, p_filesz
HEADER = struct.Struct("=18xH12xQQ8xHHH2x")
SEGMENT = struct.Struct("=8xQ16xQ16x")


def check(path: pathlib.Path) -> None:
    """Raises OSError if the file is not a whole library for this machine."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(b"\x7fELF\x02"):
            raise OSError(f"{path.name} is not a 64-bit ELF library")
        machine, segments, sections, segment_count, section_size, section_count = HEADER.unpack(header)
        if MACHINES.get(platform.machine(), machine) != machine:
            raise OSError(f"{path.name} is not for {platform.machine()}, but for ELF's machine {machine}")
        file.seek(segments)
        table = file.read(segment_count * SEGMENT.size)
    ends = [sections + section_count * section_size, segments + segment_count * SEGMENT.size]
    complete = len(table) // SEGMENT.size * SEGMENT.size
    ends += [offset + length for offset, length in SEGMENT.iter_unpack(table[:complete])]
    if max(ends) > path.stat().st_size:
        raise OSError(f"{path.name} is truncated: {path.stat().st_size} bytes of {max(ends)} or more")
