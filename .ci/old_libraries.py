"""Makes a folder of stub libraries, against which the compiler of this machine links a library for older machines.

    python .ci/old_libraries.py build/old-libraries
    g++ -shared ... -Lbuild/old-libraries -Wl,-z,defs

glibc and libstdc++ keep every version of a function that has changed, and the linker binds to the newest. A stub has
the names of such a library without their code, each in the newest version that manylinux_2_28 allows: the linker binds
to that. Names that came later are not there. Those of libstdc++ are linked in from the static library, as Red Hat's
compilers do it; what glibc lacks, -z defs reports.
"""

import collections
import pathlib
import re
import subprocess
import sys

NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}  # of manylinux_2_28, as auditwheel has them
# As they are loaded, and where the linker looks for what they lack.
LIBRARIES = {
    "libc.so.6": ["libc_nonshared.a", "later.a", "ld-linux-x86-64.so.2"],
    "libm.so.6": [],
    "libpthread.so.0": [],
    "libdl.so.2": [],
    "librt.so.1": [],
    "libstdc++.so.6": ["libstdc++.a"],
}
# What glibc has moved to libc.so.6 since 2.28, under a new version. It was in these, so that they have to be loaded.
MOVED = {
    "libpthread.so.0": r"_*pthread_|sem_|thrd_|mtx_|cnd_|tss_|call_once",
    "libdl.so.2": r"dl",
    "librt.so.1": r"aio_|lio_|mq_|shm_|timer_",
}
# later.a: libstdc++'s headers ask a glibc that can tell whether there is one thread, to count without atomics. No.
LATER = 'char __libc_single_threaded __attribute__((visibility("hidden"))) = 0;\n'

SYMBOL = re.compile(r" (FUNC|IFUNC|OBJECT|TLS) +\S+ +DEFAULT +\d+ ([\w.]+)@@?([A-Z]+)_([\d.]+)$", re.MULTILINE)
FUNCTION = ".text; .type {0}, @function"
OTHERS = {"OBJECT": ".data; .type {0}, @object", "TLS": '.section .tbss, "awT", @nobits; .type {0}, @tls_object'}


def run(*command: str | pathlib.Path, text: str = "") -> str:
    return subprocess.run(command, input=text, stdout=subprocess.PIPE, check=True, text=True).stdout


def find(name: str) -> str:
    return run("g++", f"-print-file-name={name}").strip()


def choose() -> dict[str, dict[str, tuple[str, str]]]:
    """The names of each stub, with version and type."""
    chosen: dict[str, dict[str, tuple[str, str]]] = {library: {} for library in LIBRARIES}
    for library in LIBRARIES:
        versions = collections.defaultdict(list)
        for kind, name, family, number in SYMBOL.findall(run("readelf", "-W", "--dyn-syms", find(library))):
            versions[name].append((tuple(map(int, number.split("."))), f"{family}_{number}", kind))
        for name, found in versions.items():
            allowed = [each for each in found if each[0] <= NEWEST.get(each[1].split("_")[0], ())]
            if allowed:
                has_moved = library == "libc.so.6" and len(allowed) < len(found)
                before = (each for each, names in MOVED.items() if has_moved and re.match(names, name))
                chosen[next(before, library)][name] = max(allowed)[1:]
    return chosen


def make(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    run("gcc", "-c", "-x", "c", "-", "-o", folder / "later.o", text=LATER)
    run("ar", "rcs", folder / "later.a", folder / "later.o")
    for library, symbols in choose().items():
        names = collections.defaultdict(list)
        for name, (version, _) in symbols.items():
            names[version].append(name)
        script = folder / f"{library}.map"
        script.write_text("".join(f"{version} {{ {'; '.join(each)}; }};\n" for version, each in names.items()))
        code = [
            f"{OTHERS.get(kind, FUNCTION).format(name)}; .globl {name}; {name}:" for name, (_, kind) in symbols.items()
        ]
        stub, options = folder / library, [f"-Wl,--version-script={script}", f"-Wl,-soname={library}"]
        run("gcc", "-shared", "-nostdlib", *options, "-x", "assembler", "-", "-o", stub, text="\n".join([*code, ""]))
        others = [str(folder / each) if each == "later.a" else find(each) for each in LIBRARIES[library]]
        (folder / library[: library.rindex(".")]).write_text(f"GROUP ( {' '.join([str(stub), *others])} )\n")


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]).resolve())
