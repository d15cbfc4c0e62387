"""Linking for the libraries of older machines (.ci/old_libraries.py)."""

import ctypes
import pathlib
import platform
import re
import subprocess
import sys

import pytest

MAKE = pathlib.Path(__file__).parents[1] / ".ci/old_libraries.py"
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the wheel of a release is for x86-64")

# Each has changed since manylinux_2_28: has moved to libc.so.6 (2.34), has a later version (exp 2.29), is later
# (__libc_single_threaded of std::shared_ptr 2.32; the constructor of std::ostringstream, GCC 9).
SOURCE = """
#include <cmath>
#include <dlfcn.h>
#include <memory>
#include <pthread.h>
#include <semaphore.h>
#include <sstream>
#include <sys/mman.h>

std::shared_ptr<double> kept;

static void* store(void* value) {
  kept = std::make_shared<double>(std::exp(*static_cast<double*>(value)));
  return nullptr;
}

extern "C" int check(double value) {
  sem_t semaphore;
  pthread_t thread;
  sem_init(&semaphore, 0, 1);
  if (pthread_create(&thread, nullptr, store, &value) || pthread_join(thread, nullptr) || !dlsym(nullptr, "check")) {
    return 1;
  }
  shm_unlink("/none");
  std::ostringstream text;
  text << std::shared_ptr<double>(kept).use_count() << " " << *kept;
  return text.str() != "2 1" || sem_wait(&semaphore);
}
"""


@pytest.fixture(scope="module")
def link(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    subprocess.run([sys.executable, MAKE, folder / "libraries"], check=True)

    def link(source, *options):
        library = folder / "library.so"
        command = ["g++", "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-", "-o", library, *options]
        libraries = [f"-L{folder / 'libraries'}", "-lrt", "-ldl", "-lpthread", "-Wl,-z,defs"]
        return library, subprocess.run([*command, *libraries], input=source, capture_output=True, text=True)

    return link


@pytest.mark.parametrize("optimized", ["-O0", "-O2"])
def test_versions_and_values(link, optimized):
    library, done = link(SOURCE, optimized, "-Wl,--exclude-libs,ALL")
    assert (done.returncode, done.stderr) == (0, "")
    about = subprocess.run(["readelf", "-W", "-d", "-V", library], capture_output=True, text=True, check=True).stdout
    assert {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libstdc++.so.6"} <= set(
        re.findall(r"NEEDED.*\[(.+)\]", about)
    )
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
    versions = {(f, tuple(map(int, number.split(".")))) for f, number in re.findall(r"Name: ([A-Z]+)_([\d.]+)", about)}
    assert {family for family, _ in versions} >= set(newest)
    assert not [(family, number) for family, number in versions if number > newest.get(family, number)]
    assert ctypes.CDLL(str(library)).check(ctypes.c_double(0)) == 0


def test_what_an_older_glibc_lacks_is_reported(link):
    _, done = link('extern "C" int close_range(unsigned, unsigned, int); int f() { return close_range(0, 1, 2); }')
    assert done.returncode and "undefined reference to `close_range'" in done.stderr
