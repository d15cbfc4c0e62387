"""How the package is built: what an sdist has, which torch and which nvcc are taken, the environment's settings."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time

import pytest
import setuptools

ROOT = pathlib.Path(__file__).parents[1]
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
SETTINGS = ("WEIGHTALIGN_", "TORCH_CUDA", "CUDA", "CMAKE_", "MAX_JOBS", "PYTHON", "CXX")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)} | {"PATH": PATH}


def run(*command, cwd=ROOT, **settings):
    settings = {name: str(value) for name, value in settings.items()}
    return subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env=ENVIRONMENT | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_sdist_has_all_files(tmp_path):
    listed = run("git", "ls-files")
    if listed.returncode:
        pytest.skip("this is no git repository")
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = run(sys.executable, "-c", "import setup; setup.build_sdist('dist')", cwd=tmp_path)
    assert done.returncode == 0 and "deprecat" not in (done.stdout + done.stderr).lower(), done.stdout + done.stderr
    (archive,) = tmp_path.glob("dist/*.tar.gz")
    with tarfile.open(archive) as tar:
        assert set(files) - {name.partition("/")[2] for name in tar.getnames()} == {".gitignore"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A Python environment without torch, its folder of packages, and one with setuptools alone."""
    folder, overlay = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("overlay")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in pathlib.Path(setuptools.__file__).parents[1].glob("*"):
        if path.name.startswith(("setuptools", "_distutils_hack")):
            (overlay / path.name).symlink_to(path)
    return folder / "bin" / "python", packages, overlay


@pytest.fixture
def ask(environment, tmp_path):
    """Runs `script` after `import setup` as pip's isolated build does, with this torch in sight by way of a .pth file.
    -S: the process itself does not see the environment's packages."""
    python, packages, overlay = environment

    def ask(script, torch):
        (packages / "torch.pth").write_text(str(tmp_path))
        if torch:
            (tmp_path / "torch").mkdir()
            (tmp_path / "torch/__init__.py").touch()
            (tmp_path / "torch/version.py").write_text(f"__all__ = ['__version__']\n__version__ = '{torch}'\n")
        (tmp_path / "source").mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tmp_path / "source")
        script = f"import sys; sys.path[:0] = ['', {str(overlay)!r}]; import setup; {script}"
        return run(python, "-S", "-c", script, cwd=tmp_path / "source")

    return ask


@pytest.mark.parametrize(
    ("torch", "asked"), [("", ["torch>=2.11"]), ("2.10.0+cu128", ["torch>=2.11"]), ("2.11.0a0+git1", []), ("3.0.0", [])]
)
def test_torch_is_asked_for_only_where_there_is_none_to_build_against(ask, torch, asked):
    hooks = ("wheel", "editable", "sdist")
    done = ask(f"print([getattr(setup, 'get_requires_for_build_' + hook)() for hook in {hooks}])", torch)
    assert done.stdout.splitlines()[-1:] == [str([asked, asked, []])], done.stderr


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("", "torch is not installed, 2.11 or later is needed: pip install 'torch>=2.11'"),
        ("2.9.1", "torch 2.9.1 is installed, 2.11 or later is needed: pip install 'torch>=2.11'"),
    ],
)
def test_build_without_a_torch_that_serves(ask, torch, said):
    assert ask("setup.torch_to_build_against()", torch).stderr == f"weightalign_cuda: {said}\n"


def test_torch_behind_pip_s_isolation(ask, tmp_path):
    assert ask("print(setup.torch_to_build_against())", "2.15.0").stdout == f"{tmp_path / 'torch'}\n"


@pytest.fixture
def build(tmp_path):
    """Runs setup.py's build with a cmake and a ninja that write down how they are called: a dict of their arguments."""
    for name in ("cmake", "ninja"):
        program(tmp_path / "bin" / name, f'echo {name} "$@" >> "{tmp_path}/calls"')

    def build(**settings):
        settings["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{PATH}"
        done = run(sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", **settings)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "calls").read_text().splitlines()

    return build


def test_settings_of_the_environment(build):
    configure, compile_, install = build(
        TORCH_CUDA_ARCH_LIST="8.6+PTX 9.0",
        MAX_JOBS=3,
        CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-O1 -g' -DX=1",
        WEIGHTALIGN_CUDA=1,
    )
    assert configure.startswith("cmake --fresh -S ")  # an earlier choice of compilers does not stay
    assert configure.endswith("-DWA_CUDA=ON -DWA_CUDA_ARCHITECTURES=8.6+PTX 9.0 -DCMAKE_CXX_FLAGS=-O1 -g -DX=1")
    assert compile_.startswith("ninja -C ") and compile_.endswith(" -j3")
    assert install.startswith("cmake --install ")


def test_own_settings_come_first(build):
    configure, compile_, _ = build(
        TORCH_CUDA_ARCH_LIST="8.0", WEIGHTALIGN_CUDA_ARCHS="90", CMAKE_BUILD_PARALLEL_LEVEL=2
    )
    assert configure.endswith("-DWA_CUDA=AUTO -DWA_CUDA_ARCHITECTURES=90") and compile_.endswith(" -j2")


ENDLESS = """
rule compile
  command = echo $$$$ > pid; exec sleep 300
build object: compile
"""


@pytest.mark.parametrize("victim", ["build", "who asked for it"])
def test_a_killed_install_leaves_no_compilers(tmp_path, victim):
    (tmp_path / "build.ninja").write_text(ENDLESS)
    run_ninja = [sys.executable, "-c", f"import setup; setup.run('ninja', '-C', {str(tmp_path)!r})"]
    command = run_ninja if victim == "build" else ["sh", "-c", '"$@"; true', "sh", *run_ninja]
    asking = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
    compiler = int(pid.read_text())
    os.kill(compiler, 0)
    asking.send_signal(signal.SIGKILL)
    asking.wait()

    def has_ended():
        with contextlib.suppress(ProcessLookupError):
            os.kill(compiler, 0)
            return False
        return True

    wait_for(has_ended)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


CHOOSE = f"""cmake_minimum_required(VERSION 3.25)
include("{ROOT}/csrc/cuda/nvcc.cmake")
wa_find_nvcc()
wa_check_nvcc()
wa_read_architectures("$ENV{{ASKED}}" chosen)
message("${{WA_NVCC}} of CUDA ${{WA_CUDA_VERSION}} for ${{chosen}}")
"""


@pytest.fixture
def choose(tmp_path):
    """What nvcc.cmake says, in one line."""
    (tmp_path / "choose.cmake").write_text(CHOOSE)

    def choose(asked="", **settings):
        settings = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{PATH}", "ASKED": asked} | settings
        return " ".join(run("cmake", "-P", tmp_path / "choose.cmake", cwd=tmp_path, **settings).stderr.split())

    return choose


def toolkit(folder, version="12.8", known=(75, 80, 86, 90, 100, 120)):
    """A fake nvcc."""
    listed = "".join(rf"sm_{each}\n" for each in known)
    script = f'case "$*" in --version) echo "release {version}, V{version}.1";; *) printf "{listed}";; esac'
    return program(folder / "bin" / "nvcc", script)


def test_which_nvcc(choose, tmp_path):
    """The order of the documentation; what a variable names is never passed over."""
    on_path, other, third = (toolkit(tmp_path / name) for name in (".", "other", "third"))
    home = str(other.parents[1])
    assert choose().startswith(f"{on_path} of CUDA 12.8")
    assert choose(CUDA_HOME=home).startswith(f"{other} of")
    assert choose(CUDA_PATH=home).startswith(f"{other} of")
    assert choose(CUDA_HOME=home, CUDACXX=third).startswith(f"{third} of")
    assert choose(CUDA_HOME=home, CUDACXX="nvcc").startswith(f"{on_path} of")
    assert f"CUDA_HOME: want an nvcc, got {tmp_path}/none; WEIGHTALIGN_CUDA=0" in choose(CUDA_HOME=f"{tmp_path}/none")
    assert "CUDACXX: want an nvcc, got nvcc-11; WEIGHTALIGN_CUDA=0" in choose(CUDACXX="nvcc-11")


def test_a_cuda_that_is_too_old(choose, tmp_path):
    nvcc = toolkit(tmp_path, "12.0")
    assert (
        f"CUDA 12.1 or later is needed, {nvcc} is 12.0: set CUDA_HOME to a later one, or WEIGHTALIGN_CUDA=0" in choose()
    )
    toolkit(tmp_path, "12.1")
    assert choose().startswith(f"{nvcc} of CUDA 12.1 for")


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ("", "75;80;90;100+PTX;120+PTX"),
        ("80,90", "80;90+PTX"),
        ("90;75", "75;90+PTX"),
        ("8.6+PTX 9.0", "86+PTX;90"),
        ("9.0a", "90+PTX"),
        ("10.0f;12.0", "100;120+PTX"),
        ("5.2 7.0 7.5 8.0+PTX", "75;80+PTX"),
        ("native", "86;90+PTX"),
    ],
)
def test_architectures(choose, tmp_path, asked, chosen):
    toolkit(tmp_path)
    program(tmp_path / "bin/nvidia-smi", "printf '9.0\\n8.6\\n9.0\\n'")
    assert choose(asked).endswith(f" for {chosen}")


def test_architectures_of_an_older_nvcc(choose, tmp_path):
    toolkit(tmp_path, "12.4", known=(75, 80, 86, 90))
    assert choose().endswith(" for 75;80;90+PTX")  # the last has PTX, for later GPUs


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("Hopper", "want entries such as 9.0, 90, 8.6+PTX or native, got 'Hopper'"),
        ("13.0", "does not know 13.0; it knows 75;80;86;90;100;120"),
        ("5.2", "want 7.5 or later, got '5.2'"),
        ("native", "native is for the GPUs of this machine, but nvidia-smi finds none"),
    ],
)
def test_architectures_that_cannot_be(choose, tmp_path, asked, said):
    toolkit(tmp_path)
    program(tmp_path / "bin/nvidia-smi", "exit 9")
    assert re.search(f"WEIGHTALIGN_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST: .*{re.escape(said)}", choose(asked))


def test_configuration_without_cuda(tmp_path):
    """A torch without CUDA leaves the kernels out; CMake itself sees to compiler launchers."""
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "torch/version.py").write_text("cuda: Optional[str] = None\nhip = None\n")
    toolkit(tmp_path)
    build, launcher = tmp_path / "build", program(tmp_path / "launcher", '"$@"')
    command = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DWA_TORCH={tmp_path / 'torch'}"]
    done = run(*command, CUDA_HOME=tmp_path, CMAKE_CXX_COMPILER_LAUNCHER=launcher)
    assert done.returncode == 0, done.stderr
    said = "CUDA kernels are left out, as torch is built without CUDA; WEIGHTALIGN_CUDA=1 compiles them"
    assert said in done.stdout
    assert str(launcher) in (build / "build.ninja").read_text()
