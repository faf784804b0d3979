"""Builds the C++ core. No torch is linked and no -march is set: SIMD levels are chosen by cpuid at run time."""

import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ParallelCompile().install()

packages = [
    *(name for name in find_packages(include=["shallowfusion", "shallowfusion.*"]) if ".kernels" not in name),
    "shallowfusion.kernels",
]

setup(
    packages=packages,
    package_dir={"shallowfusion.kernels": "kernels"},
    package_data={
        "shallowfusion": ["py.typed"],
        "shallowfusion.demo": ["*.json", "*.txt", "models/*/*", "clips/*", "dev/*"],
    },
    ext_modules=[
        Pybind11Extension(
            "shallowfusion._native",
            sorted(glob.glob("csrc/*.cc")),
            include_dirs=["csrc"],
            depends=sorted(glob.glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"],
            extra_link_args=["-pthread", "-ldl"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
