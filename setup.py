"""Packaging for pip and for Debian.

The native CPU backend, vllmlite/_cpu, is built where there is a C++ compiler; without one, or if the build fails, the
Python package is installed alone. The CUDA backend, vllmlite/_cuda, is built on request. A variable decides for each:

    VLLMLITE_CPU=0 pip install .            without it
    VLLMLITE_CPU=1 pip install .            with it, and a failure to build it is an error
    VLLMLITE_CUDA=1 pip install .           the same for CUDA

pip shows what is said here with -v, or after an error; `python3 -m vllmlite env` says what is there.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NATIVE = {"_cpu": "VLLMLITE_CPU", "_cuda": "VLLMLITE_CUDA"}
OFF = {"0", "off", "no", "false"}


def version() -> str:
    """The package's version, read as text: importing the package must not be needed to build it."""
    text = (HERE / "vllmlite" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__(?:: \w+)? = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('setup.py: vllmlite/__init__.py has no line __version__ = "…"')
    return found.group(1)


def say(what: str) -> None:
    """A line between the lines of the tools."""
    print(f"setup.py: {what}", file=sys.stderr, flush=True)


def asked_for(name: str) -> bool | None:
    """Whether the module's variable says yes or no; None if it is not set."""
    value = os.environ.get(NATIVE[name], "").lower()
    return value not in OFF if value else None


def missing_for_cpu() -> str | None:
    """Say what a build of ``_cpu`` lacks on this machine; None if it can be tried."""
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return "no C++ compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no headers of Python"
    return None


def wanted() -> list[str]:
    """The modules to build."""
    names = [name for name in NATIVE if asked_for(name)]
    if asked_for("_cpu") is None:
        if missing := missing_for_cpu():
            say(f"{missing}: vllmlite._cpu is not built; VLLMLITE_CPU=1 makes that an error")
        else:
            names.append("_cpu")
    elif not asked_for("_cpu"):
        say(f"VLLMLITE_CPU={os.environ['VLLMLITE_CPU']}: vllmlite._cpu is not built")
    return names


class CMakeBuild(build_ext):
    """Builds each module with CMake. A failure stops the installation if the module was asked for."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install one module in the place that setuptools chose."""
        name = ext.name.rpartition(".")[2]
        say(f"building {ext.name}")
        build = Path(self.build_temp).resolve() / name
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = [
            "cmake", "-S", str(HERE), "-B", str(build), *generator,
            "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
            f"-D{NATIVE[name]}=ON", f"-DCMAKE_INSTALL_PREFIX={target.parent}",
        ]  # fmt: skip
        compile = ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)]
        try:
            for command in (configure, compile, ["cmake", "--install", str(build)]):
                subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if asked_for(name):
                raise SystemExit(
                    f"setup.py: {NATIVE[name]} asks for {ext.name}, and it cannot be built: {error}"
                ) from None
            say(f"{ext.name} cannot be built, and the Python package is installed without it: {error}")
        else:
            say(f"built {ext.name}")


modules = wanted()
setup(
    name="vllmlite",
    version=version(),
    description="A small paged-cache inference engine for language models, with vLLM's interface",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["vllmlite", "vllmlite.*"]),
    package_data={"vllmlite": ["py.typed", "data/**", "models/config_keys.json", "server/page.html"]},
    setup_requires=["cmake>=3.25", "ninja", "pybind11>=2.12"] if modules else [],
    # An optional module that was not built is none: nothing looks for its file.
    ext_modules=[Extension(f"vllmlite.{name}", sources=[], optional=not asked_for(name)) for name in modules],
    cmdclass={"build_ext": CMakeBuild},
    entry_points={"console_scripts": ["vllmlite = vllmlite.__main__:main"]},
    install_requires=["huggingface-hub", "jinja2", "numpy", "pyyaml", "tokenizers"],
    extras_require={
        "torch": [
            "torch",
            "transformers",
        ],  # the reference backend; models and tokenizers of transformers' own
        "server": ["fastapi", "uvicorn", "prometheus-client", "httpx"],
        "guided": ["xgrammar"],
    },
)
