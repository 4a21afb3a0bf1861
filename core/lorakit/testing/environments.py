"""Fresh Python environments, for testing what a user sees who installs a plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from attrs import frozen


@frozen
class Environment:
    """A virtual environment of its own, in which lorakit and its dependencies can be imported.

    Attributes:
        path: Its directory.
    """

    path: Path

    @classmethod
    def create(cls, path: Path) -> Environment:
        """Makes it at `path`, with a `lorakit` command."""
        venv.create(path, with_pip=False, symlinks=True)
        made = cls(path)
        # Torch alone is gigabytes: the packages of the running environment are seen from in
        # there instead of installed again.  --system-site-packages would give those of the
        # system's Python, not of the environment the tests run in; and a bare path in a .pth
        # file would not follow the .pth files of editable installs, which addsitedir does.
        here = sysconfig.get_path("purelib")
        line = f"import site; site.addsitedir({here!r})\n"
        (made.packages / "running_environment.pth").write_text(line, encoding="utf-8")
        command = path / "bin" / "lorakit"
        command.write_text(
            f"#!{made.python}\nfrom lorakit.cli import main\nmain()\n", encoding="utf-8"
        )
        command.chmod(0o755)
        return made

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def packages(self) -> Path:
        """site-packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.path / "lib" / version / "site-packages"

    def variables(self) -> dict[str, str]:
        """What a shell has in which the environment is active."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        bin_path = str(self.path / "bin") + os.pathsep + kept.get("PATH", "")
        return {**kept, "PATH": bin_path, "VIRTUAL_ENV": str(self.path)}

    def run(
        self, *command: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment (`lorakit`, `python`) to its end, output captured."""
        return subprocess.run(
            [str(self.path / "bin" / command[0]), *command[1:]],
            cwd=cwd or self.path,
            env={**self.variables(), **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def install(self, wheel: Path) -> None:
        """Installs a wheel, without its dependencies and without an index.

        Raises:
            RuntimeError: pip refused.
        """
        # pip is the running environment's, which is importable in there.
        done = self.run(
            "python", "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel)
        )
        if done.returncode:
            raise RuntimeError(f"pip install {wheel}: {done.stderr}")

    def plant(self, distribution: str, source: str, *, version: str = "1.0", name: str = "") -> str:
        """Puts a one-module plugin there as an installer would, without building a wheel.

        Args:
            distribution: Such as `lorakit-broken`; its module is `lorakit_broken`.
            source: The module's text.
            version: The distribution's.
            name: The entry point's; by default the distribution's without `lorakit-`.

        Returns:
            The module's name.
        """
        return plant_plugin(self.packages, distribution, source, version=version, name=name)


def plant_plugin(
    folder: Path, distribution: str, source: str, *, version: str = "1.0", name: str = ""
) -> str:
    """Writes a module and its dist-info into a folder that is on a module search path; see
    `Environment.plant`."""
    module = distribution.replace("-", "_")
    name = name or distribution.removeprefix("lorakit-")
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[lorakit]\n{name} = {module}\n", encoding="utf-8")
    return module


def build_wheel(project: Path, destination: Path) -> Path:
    """Builds a plugin's wheel with the build backend that is installed here.

    Raises:
        RuntimeError: It could not be built.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--quiet", "--wheel-dir", str(destination), str(project)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"pip wheel {project}: {done.stderr}")
    (wheel,) = destination.glob("*.whl")
    return wheel
