"""Packaging for pip and for Debian.

The Python package alone is built by default. A native extension is built when asked for, through the CMake project,
and an extension that was asked for and cannot be built is an error (pip shows what is said here with -v, or at one):

    VLLMLITE_CPU=1 pip install .
    VLLMLITE_CUDA=1 pip install .
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NATIVE = {"_cpu": "VLLMLITE_CPU", "_cuda": "VLLMLITE_CUDA"}
OFF = {"", "0", "off", "no", "false"}


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


class CMakeBuild(build_ext):
    """Hands the wanted modules to CMake, which stops the installation when one of them does not build."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install one module in the place that setuptools chose."""
        name = ext.name.rpartition(".")[2]
        say(f"building {ext.name}, which {NATIVE[name]} asks for")
        build = Path(self.build_temp).resolve() / name
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            "cmake", "-S", str(HERE), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
            f"-D{NATIVE[name]}=ON", f"-DCMAKE_INSTALL_PREFIX={target.parent}",
        ]  # fmt: skip
        compile = ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)]
        for command in (configure, compile, ["cmake", "--install", str(build)]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"setup.py: {NATIVE[name]} asks for {ext.name}, and it cannot be built: {error}"
                ) from None
        say(f"built {ext.name}")


wanted = [name for name, switch in NATIVE.items() if os.environ.get(switch, "").lower() not in OFF]
if not wanted:
    say(
        f"the Python package alone; {' or '.join(f'{switch}=1' for switch in NATIVE.values())} adds an extension"
    )

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
    package_data={"vllmlite": ["py.typed", "data/**", "server/page.html"]},
    setup_requires=["cmake>=3.25", "pybind11>=2.12"] if wanted else [],
    ext_modules=[Extension(f"vllmlite.{name}", sources=[]) for name in wanted],
    cmdclass={"build_ext": CMakeBuild},
    entry_points={"console_scripts": ["vllmlite = vllmlite.__main__:main"]},
    install_requires=["huggingface-hub", "jinja2", "numpy", "pyyaml", "tokenizers", "torch"],
    # Reads tokenizers that come without a tokenizer.json.
    extras_require={
        "transformers": ["transformers"],
        "server": ["fastapi", "uvicorn", "prometheus-client", "httpx"],
        "guided": ["xgrammar"],
    },
)
