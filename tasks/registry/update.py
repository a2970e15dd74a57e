"""Update packages: the signed file that leads from one version's folder to another's, bit by bit.

One safetensors file: its metadata holds `update`, a JSON text, and the text's Ed25519 signature; its tensors are the
new bytes of each file. The text names every file of the old folder and of the new one by sha256, and says what each new
file is made of: it is the same; pieces of the old one and new bytes (tensor files, `tasks.registry.delta`); or text,
deflated with the old file as its dictionary. So an adapter that changed costs the adapter.

Applying trusts nothing: the signature is checked before the text is used, names can't lead out of the folder, it must
be the old version exactly, and no file counts before its sha256 is right. The new folder is built beside the old one,
and they change places in one step (Linux: renameat2); a file system that can't do it takes three renames, after the
first of which the old folder is beside its place. Applying needs no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from tasks.algorithms.errors import InputError
from tasks.registry import contents, signing
from tasks.runtime import files

CHUNK = 2**20
"""Bytes that are copied at once."""
WINDOW = 2**15
"""Bytes of a dictionary that zlib can use: the last ones."""
TEXT = 2**22
"""Bytes of a file that is tried as text, at most."""
TENSORS = ".safetensors"
NEW = -1
"""In a piece's place of a start: its bytes are new."""

Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class File(_Strict):
    """A file of the new folder. pieces: (start in the old one or NEW, bytes); text: from its tensor, deflated."""

    bytes: Size
    sha256: Hash
    made: Literal["same", "pieces", "text"]
    pieces: list[tuple[Annotated[int, Field(ge=NEW, lt=2**63)], Size]] = []


class Update(_Strict):
    """What is signed."""

    format: Literal["edgepress-update"]
    version: Literal[1]
    old: str
    new: str
    base: dict[str, Hash]
    files: dict[str, File]

    def json(self) -> bytes:
        """The text, the same for the same update."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(content, separators=(",", ":"), sort_keys=True).encode()


@dataclass
class Summary:
    """What `make` made.

    Attributes:
        bytes: of the update.
        package: bytes of the new folder.
        files: name -> (how it is made, its bytes in the update), without those that are the same.
        components: of tensor files, what the new bytes are for -> how many.
    """

    bytes: int = 0
    package: int = 0
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=dict)

    @property
    def adapter_only(self) -> bool:
        """Whether the adapter is all that changed, beside texts and headers."""
        return set(self.components) <= {"adapter", "metadata"} and "adapter" in self.components


def make(old: Path, new: Path, names: tuple[str, str], key: Path, target: Path) -> Summary:
    """Write the update from one folder to another; it takes its name when it is complete.

    Args:
        names: of the two versions.
        key: private Ed25519 key.

    Raises:
        InputError: a folder holds what is no ordinary file, the key is none, or the target's folder isn't there.
    """
    base, wanted = _contents(old), _contents(new)
    update = Update(format="edgepress-update", version=1, old=names[0], new=names[1], base=base, files={})
    summary = Summary(package=sum((new / name).stat().st_size for name in wanted))
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is no folder: the update can't be written there")
    with tempfile.TemporaryFile(dir=target.parent) as payload:
        sizes = {}
        for name, digest in wanted.items():
            start, path = payload.tell(), new / name
            made = File(bytes=path.stat().st_size, sha256=digest, made="same")
            if base.get(name) != digest:
                made = _put(made, old / name, path, payload, summary)
                summary.files[name] = made.made, payload.tell() - start
            update.files[name] = made
            sizes[name] = payload.tell() - start
        text = update.json()
        _write(target, text, signing.sign(text, key), {name: size for name, size in sizes.items() if size}, payload)
    summary.bytes = target.stat().st_size
    return summary


def apply(path: Path, key: Path, folder: Path) -> Update:
    """Turn a folder that is the old version into the new one.

    Args:
        key: public Ed25519 key of whoever made the update.

    Raises:
        InputError: the file is damaged or not signed by that key, or the folder is another version; nothing changes.
    """
    folder = folder.absolute()
    update, sizes = _read(path, key)
    with _alone(folder):
        _apply(path, folder, update, sizes)
    return update


def _apply(path: Path, folder: Path, update: Update, sizes: Mapping[str, int]) -> None:
    scratch = folder.with_name(f".{folder.name}.update")
    contents.remove(scratch)  # of a call that was killed, or couldn't remove it
    found = _contents(folder)
    if found == {name: file.sha256 for name, file in update.files.items()}:
        return
    if found != update.base:
        odd = sorted(name for name in found | update.base if found.get(name) != update.base.get(name))
        raise InputError(f"{folder} is not {update.old}, which the update starts from: {odd[0]} is another file")
    try:
        scratch.mkdir()
        for name, file in update.files.items():
            _build(name, file, folder / name, scratch / name, path, sizes.get(name, 0))
        shutil.copymode(folder, scratch)
        _exchange(scratch, folder)
    finally:
        contents.remove(scratch)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that update it."""
    try:
        place = os.open(folder.parent, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder.parent} is no folder: {error.strerror}") from error
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def _contents(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file below a folder."""
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder} is no folder of a package")
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is no ordinary file: a package has no links")
        if path.is_file():
            found[contents.checked_name(path.relative_to(folder).as_posix())] = files.sha256(path)
    return found


def _put(file: File, old: Path, new: Path, payload: BinaryIO, summary: Summary) -> File:
    """Append what a changed file needs to the payload, in the way that takes fewer bytes."""
    deflated = _deflated(old, new) if file.bytes <= TEXT and new.suffix != TENSORS else None
    found, components = _pieces(old, new)
    fresh = sum(size for start, size in found if start == NEW)
    if deflated is not None and len(deflated) < fresh:
        payload.write(deflated)
        return file.model_copy(update={"made": "text"})
    with new.open("rb") as source:
        place = 0
        for start, size in found:
            if start == NEW:
                source.seek(place)
                _copy(source, payload, size)
            place += size
    for name, size in components.items():
        summary.components[name] = summary.components.get(name, 0) + size
    return file.model_copy(update={"made": "pieces", "pieces": found})


def _pieces(old: Path, new: Path) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """The pieces of a file, and its new bytes by component; other files than tensors are new as a whole."""
    if new.suffix != TENSORS or not old.exists():
        return [(NEW, new.stat().st_size)], {"files": new.stat().st_size}
    from tasks.registry import delta  # here, as it imports torch, which `apply` does not need

    found, components = delta.pieces(old, new)
    return [(NEW if piece.start is None else piece.start, piece.size) for piece in found], components


def _deflated(old: Path, new: Path) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_dictionary(old))
    return compressor.compress(new.read_bytes()) + compressor.flush()


def _dictionary(old: Path) -> bytes:
    if not old.exists():
        return b""
    with old.open("rb") as file:
        file.seek(max(0, old.stat().st_size - WINDOW))
        return file.read()


def _write(target: Path, text: bytes, signature: str, sizes: Mapping[str, int], payload: BinaryIO) -> None:
    """A safetensors file with the payload as one uint8 tensor per file."""
    header: dict[str, Any] = {"__metadata__": {"signature": signature, "update": text.decode()}}
    place = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [place, place + size]}
        place += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head = head.ljust(-(-len(head) // 8) * 8)
    payload.seek(0)
    with files.replacing(target) as unfinished, unfinished.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        _copy(payload, file, place)


def _read(path: Path, key: Path) -> tuple[Update, dict[str, int]]:
    """The update, its signature and names checked, and the bytes of each tensor."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no update, or a damaged one: {' '.join(str(error).split())}") from error
    text = metadata.get("update", "").encode()
    if not signing.verify(text, metadata.get("signature", ""), key):
        raise InputError(f"{path} is not signed by {key}: it was changed, or somebody else made it")
    try:
        update = Update.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{path} is an update of another version of edgepress") from error
    for name, file in update.files.items():
        contents.checked_name(name)
        fresh = sum(size for start, size in file.pieces if start == NEW)
        whole = sum(size for _, size in file.pieces)
        if file.made == "same" and update.base.get(name) != file.sha256:
            raise InputError(f"{path} is damaged: {name} is not the same as before")
        given = sizes.get(name, [0])
        if file.made == "pieces" and (given != [fresh] or whole != file.bytes):
            raise InputError(f"{path} is damaged: the bytes of {name} are not those that it names")
    return update, {name: shape[0] for name, shape in sizes.items() if len(shape) == 1}


def _build(name: str, file: File, old: Path, new: Path, update: Path, size: int) -> None:
    """Write one file of the new folder and check its sha256."""
    new.parent.mkdir(parents=True, exist_ok=True)
    if file.made == "same":
        shutil.copyfile(old, new)
    else:
        data = _tensor(update, name, size)
        with new.open("wb") as target:
            for part in _inflated(data, old, file.bytes) if file.made == "text" else _pieced(data, old, file):
                target.write(part)
    if files.sha256(new) != file.sha256:
        raise InputError(f"{name} doesn't come out as it was signed: the update is damaged")
    files.sync(new)


def _tensor(update: Path, name: str, size: int) -> Any:
    """The bytes of a tensor, read when they are used."""
    if not size:
        return b""
    try:
        with safe_open(update, framework="np") as file:
            return memoryview(file.get_tensor(name)).cast("B")
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # AttributeError: a type that NumPy lacks
        raise InputError(f"{update} is damaged: {' '.join(str(error).split())}") from error


def _inflated(data: Any, old: Path, size: int) -> Iterator[bytes]:
    """A deflated text, which may have at most `size` bytes."""
    decompressor = zlib.decompressobj(-15, zdict=_dictionary(old))
    try:
        yield decompressor.decompress(bytes(data), size + 1)
    except zlib.error as error:
        raise InputError("a text of the update can't be read: it is damaged") from error


def _pieced(data: Any, old: Path, file: File) -> Iterator[bytes]:
    place = 0
    with old.open("rb") if old.exists() else open(os.devnull, "rb") as before:
        for start, size in file.pieces:
            if start == NEW:
                yield data[place : place + size]
                place += size
                continue
            before.seek(start)
            for offset in range(0, size, CHUNK):
                yield before.read(min(CHUNK, size - offset))


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        part = source.read(min(size, CHUNK))
        if not part:
            raise InputError("a file became shorter while it was read")
        target.write(part)
        size -= len(part)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change places in one step, or where the file system can't, in two."""
    at_working_folder, exchange = -100, 2
    library = ctypes.CDLL("libc.so.6", use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if library.renameat2(at_working_folder, names[0], at_working_folder, names[1], exchange) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(other))
    aside = one.with_name(f"{one.name}.old")
    os.replace(other, aside)
    os.replace(one, other)
    os.replace(aside, one)
