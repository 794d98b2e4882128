"""Check: whether a kit is, byte for byte, what was packed.

In: a kit's folder. Out: its problems. Every file stands in SHA256SUMS, which `sha256sum -c` reads and which must say what
manifest.json says; verify.sh in the kit does the same in any POSIX shell, the page in any browser. A signature, made and checked by
ssh-keygen (https://man.openbsd.org/ssh-keygen#Y), says who packed it: hashes alone only find accidents.
Run: `emergency-kit kit --verify outputs/kit`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from emergency_kit.artifacts import MANIFEST, hash_file, hash_json, load_manifest
from emergency_kit.errors import ExportError, UsageError

SUMS, SIGNATURE, PAGE_SUMS = "SHA256SUMS", "SHA256SUMS.sig", "page/sums.txt"
NAMESPACE = "emergency-kit"  # of signatures: one made for another purpose is not taken
SIGNER = "packer"


def list_sums(folder: Path, without: tuple[str, ...] = (SUMS, SIGNATURE)) -> str:
    """SHA256SUMS of a folder: a line a file, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return "".join(f"{hash_file(path)}  {name}\n" for name, path in names.items() if name not in without)


def verify_kit(folder: Path, signer: Path | None = None) -> None:
    """Check every byte and print what was found.

    signer: the public key that must have signed it. Raises ExportError where anything differs, is missing or is there
    beside what was packed, or where the signature is not the signer's.
    """
    folder = Path(folder)
    problems = find_problems(folder)
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ExportError(f"{folder}: NOT as packed, do not use it: {'; '.join(problems[:12])}{more}. Next: copy it again from where it was made, or pack it anew")
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB, every byte as packed")
    if signer:
        check_signature(folder, signer)
    elif (folder / SIGNATURE).is_file():
        print(f"Signed; to see by whom: emergency-kit kit --verify {folder} --signer PUBLIC_KEY")


def find_problems(folder: Path) -> list[str]:
    """Files that differ from what was packed, are missing, or were not packed; every file is read once. Raises ExportError for what is no kit."""
    if not (folder / SUMS).is_file() and not (folder / MANIFEST).is_file():
        raise ExportError(f"{folder}: no kit: neither {SUMS} nor {MANIFEST} is there; next: emergency-kit kit --output {folder}")
    found = list_sums(folder)
    listed = (folder / SUMS).read_bytes() if (folder / SUMS).is_file() else b""
    now = {line[66:]: line[:64] for line in found.splitlines()}
    packed = {line[66:]: line[:64] for line in listed.decode(errors="replace").splitlines()}
    problems = [f"{name}: is missing" if name not in now else f"{name}: was not packed" if name not in packed else f"{name}: differs from {SUMS}"
                for name in sorted(packed.keys() | now.keys()) if packed.get(name) != now.get(name)]
    if listed != found.encode() and not problems:
        problems.append(f"{SUMS}: is not as it was written")
    manifest = load_manifest(folder)
    described = manifest and {key: value for key, value in manifest.items() if key != "self"}
    if not manifest or manifest.get("stage") != "kit" or manifest.get("self") != hash_json(described):
        problems.append(f"{MANIFEST}: is not as it was written")
    elif manifest["files"] != {name: digest for name, digest in packed.items() if name != MANIFEST}:
        problems.append(f"{SUMS}: does not say what {MANIFEST} says")
    return problems


def sign(folder: Path, key: Path) -> None:
    """Sign SHA256SUMS with an SSH key (`ssh-keygen -t ed25519`); raises ExportError where that fails."""
    done = _run(["ssh-keygen", "-Y", "sign", "-f", str(key), "-n", NAMESPACE, str(folder / SUMS)])
    if done.returncode or not (folder / SIGNATURE).is_file():
        raise ExportError(f"--sign-key {key}: ssh-keygen could not sign ({' '.join(done.stderr.split())[:300]}); next: name a private key that it can read")


def check_signature(folder: Path, signer: Path) -> None:
    """Raise ExportError unless the holder of a public key signed this kit."""
    try:
        key = " ".join(Path(signer).read_text(encoding="utf-8").split()[:2])
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--signer {signer}: not readable as a public key ({error}); expected a file like id_ed25519.pub") from None
    with tempfile.TemporaryDirectory() as scratch:
        allowed = Path(scratch) / "allowed"
        allowed.write_text(f'{SIGNER} namespaces="{NAMESPACE}" {key}\n', encoding="utf-8")
        if not (folder / SIGNATURE).is_file():
            raise ExportError(f"{folder}: not signed")
        done = _run(["ssh-keygen", "-Y", "verify", "-f", str(allowed), "-I", SIGNER, "-n", NAMESPACE, "-s", str(folder / SIGNATURE)], (folder / SUMS).read_bytes())
    if done.returncode:
        raise ExportError(f"{folder}: NOT signed by the holder of {signer} ({' '.join((done.stderr + done.stdout).split())[:200]})")
    print(f"Signed by the holder of {signer}")


def _run(command: list[str], given: bytes = b"") -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise ExportError(f"{command[0]} is not installed; next: install OpenSSH, which signs and checks signatures")
    done = subprocess.run(command, input=given, capture_output=True)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
