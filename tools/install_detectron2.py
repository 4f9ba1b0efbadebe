"""Installs Detectron2 into the Python that runs this: from its official source, else from a wheel; says which and why.

The wheel is tagged for another Python but is plain Python apart from an optional compiled module, which is removed:
ViTDet, Mask R-CNN, Cascade and COCO evaluation do not need it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCE = "https://github.com/facebookresearch/detectron2"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
REACH_SECONDS = 15
BUILD_SECONDS = 900


def main() -> int:
    """Tries the official source, then the wheel; returns the exit code."""
    problem = install_source()
    if problem is None:
        print(f"setup: Detectron2 from its official source, commit {COMMIT[:12]}")
        return 0
    print(f"setup: Detectron2 from the wheel {WHEEL}, because {problem}", flush=True)
    problem = install_wheel()
    if problem:
        print(f"error: Detectron2 could not be installed: {problem}", file=sys.stderr)
        return 2
    return 0


def install_source() -> str | None:
    """Builds the official source; returns why that did not work, or None."""
    if shutil.which("git") is None:
        return "git is not installed"
    # No prompt for a name or password, and no long wait where the host cannot be reached.
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true", "GIT_SSH_COMMAND": "ssh -oBatchMode=yes"}
    try:
        subprocess.run(
            ["git", "ls-remote", SOURCE, "HEAD"],
            env=env, capture_output=True, check=True, timeout=REACH_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return f"{SOURCE} cannot be reached"
    print("setup: building Detectron2 from its official source (about a minute)", flush=True)
    target = f"detectron2 @ git+{SOURCE}@{COMMIT}"
    try:
        pip("install", "--quiet", "--no-deps", "--no-build-isolation", target, env=env, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        return f"building the official source took longer than {BUILD_SECONDS} s"
    except subprocess.CalledProcessError:
        return "building the official source failed (see above)"
    return None


def install_wheel() -> str | None:
    """Downloads the wheel, checks its hash, unpacks it beside the other packages; returns what failed, or None."""
    site = Path(sysconfig.get_paths()["purelib"])
    # Its tag names Python 3.10, which pip has to be told to accept; that works only with a target folder.
    foreign = ("--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.10")
    with tempfile.TemporaryDirectory() as folder:
        try:
            pip("download", *foreign, "--dest", folder, WHEEL)
        except subprocess.CalledProcessError:
            return f"`pip download {WHEEL}` failed (see above); check the network and pip's settings"
        wheel = next(Path(folder).glob("*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            return f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}; the index served another file"
        unpacked = Path(folder) / "unpacked"
        pip("install", *foreign, "--no-index", "--no-compile", "--target", str(unpacked), str(wheel))
        # A package `tools` would shadow this project's folder; the compiled module is for another Python.
        shutil.rmtree(unpacked / "tools", ignore_errors=True)
        for module in (unpacked / "detectron2").glob("_C*.so"):
            module.unlink()
        for part in unpacked.iterdir():
            shutil.rmtree(site / part.name, ignore_errors=True)
            shutil.move(str(part), site / part.name)
    return None


def pip(*arguments: str, env: dict[str, str] | None = None, timeout: float | None = None) -> None:
    """Runs pip of this Python; raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", "pip", *arguments]
    subprocess.run(command, env=env, check=True, timeout=timeout, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
