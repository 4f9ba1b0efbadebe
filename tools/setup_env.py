"""Makes .venv from requirements.lock, installs Detectron2 and this project; does nothing when that is up to date.

Runs on the standard library of Python 3.11 or 3.12, before anything is installed. ``--lock`` writes requirements.lock.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements.lock"
STAMP = VENV / "karvis-setup.sha256"
INPUTS = (LOCK, ROOT / "pyproject.toml", Path(__file__).resolve(), ROOT / "tools" / "install_detectron2.py")
UV = "uv==0.13.8"
FREE_BYTES = 6 * 10**9

LOCK_HEADER = "# Made by `make lock` from pyproject.toml (uv pip compile --universal). Do not edit.\n"
# The CUDA build of these two also runs on a CPU; pyproject.toml allows newer ones.
LOCK_CONSTRAINTS = "torch==2.11.0\ntorchvision==0.26.0\n"


def main() -> int:
    """Installs, or with --lock resolves; returns the exit code."""
    if not (3, 11) <= sys.version_info < (3, 13):
        return fail(
            f"Python {sys.version.split()[0]} is not supported. Run it with Python 3.11 or 3.12: make PYTHON=..."
        )
    if "--lock" in sys.argv[1:]:
        return make_lock()
    wanted = fingerprint()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return 0

    # An interrupted install leaves no stamp, so that the next call starts over.
    STAMP.unlink(missing_ok=True)
    if shutil.disk_usage(ROOT).free < FREE_BYTES and not PYTHON.exists():
        return fail(f"{ROOT} has less than {FREE_BYTES / 1e9:.0f} GB free, and .venv needs 5.3 GB. Free some space.")
    start = time.time()
    try:
        make_venv()
        install_lock()
        run([PYTHON, ROOT / "tools" / "install_detectron2.py"])
        install_project()
    except subprocess.CalledProcessError as error:
        command = " ".join(str(part) for part in error.cmd)
        return fail(f"`{command}` failed ({error.returncode}). Solve what it says above and run `make setup` again.")
    temporary = STAMP.with_suffix(".part")
    temporary.write_text(wanted)
    temporary.replace(STAMP)
    print(f"setup: .venv is ready ({time.time() - start:.0f} s)", flush=True)
    return 0


def fingerprint() -> str:
    """What the installed environment depends on: the files above, the interpreter, and where the checkout lies."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}".encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make_venv() -> None:
    """Creates .venv with pip and uv, or keeps one whose interpreter works and has this script's version."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    probe = [PYTHON, "-c", "import pip, sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        usable = subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip() == version
    except (OSError, subprocess.CalledProcessError):
        usable = False
    if not usable:
        say(f"making .venv with Python {sys.version.split()[0]}")
        # When .venv itself is activated, this script may run under it; a new one needs the interpreter below it.
        run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", "--clear", VENV])
    run([PYTHON, "-m", "pip", "install", "--quiet", UV])


def install_lock() -> None:
    """Makes the packages those of the lock file, with uv, or with pip where uv cannot reach its index."""
    say("installing the packages of requirements.lock")
    try:
        run([PYTHON, "-m", "uv", "pip", "sync", "--quiet", "--python", PYTHON, LOCK])
    except subprocess.CalledProcessError:
        say("uv could not install them; trying pip, which reads pip's own settings")
        run([PYTHON, "-m", "pip", "install", "--quiet", "-r", LOCK])


def install_project() -> None:
    """The project in editable mode; its dependencies are the lock file's."""
    say("installing this project (editable)")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "-e", ROOT]
    run([PYTHON, "-m", "pip", "install", *flags])


def make_lock() -> int:
    """Writes requirements.lock from pyproject.toml, for every platform and Python version the project supports."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(LOCK_CONSTRAINTS)
        output = Path(folder) / "requirements.lock"
        # Pins that are in the file stay unless pyproject.toml or --upgrade asks for others.
        if LOCK.exists():
            shutil.copy(LOCK, output)
        flags = ["--universal", "--python-version", "3.11", "--extra", "dev", "--constraints", constraints, "--quiet"]
        flags += ["--no-header", *sys.argv[2:]]
        run([PYTHON, "-m", "uv", "pip", "compile", *flags, "pyproject.toml", "-o", output])
        lines = output.read_text().splitlines(keepends=True)
    # The constraint file's name is a temporary path of this machine.
    lines = [line for line in lines if not line.strip().startswith("#   -c ")]
    temporary = LOCK.with_suffix(".part")
    temporary.write_text(LOCK_HEADER + "".join(lines))
    temporary.replace(LOCK)
    say("wrote requirements.lock; `make setup` installs it")
    return 0


def run(command: list) -> None:
    """Runs a command in the checkout; raises CalledProcessError when it fails."""
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, stdin=subprocess.DEVNULL)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the next `make setup` starts over")
