"""The kernels, in C; all else is in pyproject.toml.

They are optional: where there is no C compiler the plugin installs all the same, and says that it
cannot be used.
"""

import sys
from glob import glob

from setuptools import Extension, setup

NATIVE = "lorakit_x86/native"

setup(
    ext_modules=[
        Extension(
            "lorakit_x86._kernels",
            sorted(glob(f"{NATIVE}/*.c")),
            depends=sorted(glob(f"{NATIVE}/*.h")),
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args=["-std=gnu11", "-O3", "-Wall", "-Wextra"],
            libraries=["m"] if sys.platform == "linux" else [],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
