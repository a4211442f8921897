"""Names the packages, and builds hiper_fast._C by driving CMake; CMakeLists.txt is the one list of sources and flags.

The package works without the extension, on the slower torch reference. So a missing compiler does not
fail the installation: the reason is printed here, and a warning comes when hiper_fast.ops is imported.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        # The target's own folder: the source tree in an editable install, else the wheel's staging folder.
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # A cache from an earlier isolated build points at programs that are gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        output.unlink(missing_ok=True)
        configure = [
            "cmake", "-S", str(Path(__file__).resolve().parent), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DOUTPUT_DIR={output.parent}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def run(self) -> None:
        try:
            super().run()
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"hiper_fast: the C++ kernels were not built ({error}); the torch reference will be used",
                file=sys.stderr,
            )
            # Nothing was built, so there is nothing for the later steps to copy or register.
            self.extensions = []


setup(
    # The Triton kernels lie in kernels/ops: a package `kernels` at the root would shadow Hugging Face's.
    packages=[*find_packages(include=["hiper_fast*"]), "hiper_fast.kernels"],
    package_dir={"hiper_fast.kernels": "kernels/ops"},
    ext_modules=[Extension("hiper_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
