"""Opening a packed folder: other versions, other headers, blobs of other sizes."""

import json
import shutil

import pytest

from tasks.algorithms.errors import InputError
from tasks.packed import packed_folder, reader
from tasks.packed.description import DESCRIPTION, FILE
from tests.support.packed_damage import assemble, repair


def test_a_reader_of_another_version_says_so(build, tmp_path):
    folder = shutil.copytree(build("coded").packed, tmp_path / "copy")
    for changed, message in (
        ({"version": 2}, "version: Input should be 1"),
        ({"format": "zip"}, "format: Input should be"),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"bits": "4"}, "bits"),
        ({"pattern": "2²:4"}, "pattern"),
    ):
        content = json.loads((build("coded").packed / DESCRIPTION).read_text()) | changed
        (folder / DESCRIPTION).write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            reader.load_model(folder)
    for text in ("[" * 100_000, '{"format": ' * 5_000, "", "\x00", '{"version": 1' + "0" * 5_000 + "}"):
        (folder / DESCRIPTION).write_text(text)
        with pytest.raises(InputError, match="describes no packed model"):
            reader.load_model(folder)
    (folder / DESCRIPTION).write_bytes(b" " * (2**24 + 1))
    with pytest.raises(InputError, match="more than 16777216"):
        reader.load_model(folder)
    shutil.copyfile(build("grid").packed / DESCRIPTION, folder / DESCRIPTION)
    with pytest.raises(InputError, match="belongs to another model.json"):
        reader.load_model(folder)
    (folder / FILE).unlink()
    with pytest.raises(InputError, match="can't be read"):
        reader.load_model(folder)


def test_a_file_that_is_cut_longer_or_has_another_header_is_told_so(tiny, tmp_path):
    folder = shutil.copytree(tiny[0], tmp_path / "copy")
    data = (folder / FILE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    blanks = end.to_bytes(8, "little") + data[8:end] + b" " * 8 + data[end:]  # as safetensors allows it
    for changed, message in (
        (data[:-1], "truncated"),
        (data + b"x", "truncated"),
        (blanks, "its header is not the one"),
        (data[:4], "its header is not the one"),
    ):
        (folder / FILE).write_bytes(changed)
        with pytest.raises(InputError, match=message):
            packed_folder.config(folder)


@pytest.mark.parametrize("kind", [0, 1])
def test_signed_blobs_with_bytes_that_are_no_content_are_refused(tiny, tmp_path, kind):
    folder = shutil.copytree(tiny[kind], tmp_path / "copy")
    bodies, description = repair(*((folder / name).read_bytes() for name in (FILE, DESCRIPTION)))
    for name in bodies:
        data, text = assemble(bodies | {name: bodies[name] + b"\x00"}, description)
        (folder / FILE).write_bytes(data)
        (folder / DESCRIPTION).write_bytes(text)
        with pytest.raises(InputError, match=rf"{name} in .* has {len(bodies[name]) + 1} bytes"):
            reader.load_model(folder)
