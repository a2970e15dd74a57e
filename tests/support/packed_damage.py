"""Damage to packed folders: bytes and JSON changed at random, with wrong checksums and with repaired ones."""

import hashlib
import json

from tasks.packed.blob_header import header_bytes


def repair(data, text):
    """The safetensors file and model.json with all checksums made right for blobs of whatever size they now are."""
    description = json.loads(text)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    bodies = {name: data[8 + length :][slice(*header[name]["data_offsets"])] for name in names}
    return bodies, description


def assemble(bodies, description):
    description["sha256"] = {name: hashlib.sha256(body).hexdigest() for name, body in bodies.items()}
    text = json.dumps(description, separators=(",", ":")).encode()
    sizes = {name: len(body) for name, body in bodies.items()}
    return header_bytes(sizes, hashlib.sha256(text).hexdigest()) + b"".join(bodies.values()), text


VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 5, 7, 9, 33, 64, 2**20, 2**31, 2**63, 10**30, 0.5, -1.5, 1e300),
    *("", "2:4", "4:8", "0:0", "31:32", "unstructured", "dense", "F32", "gelu", "a" * 300),
    *([], {}, [4], [[]], {"a": 1}),
]


def places(value, path=()):
    """All paths into a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def change_json(chance, description):
    """Replace, remove or add one entry."""
    description = json.loads(json.dumps(description))
    path = chance.choice([path for path in places(description) if path])
    inner = description
    for key in path[:-1]:
        inner = inner[key]
    how = chance.random()
    if how < 0.7:
        inner[path[-1]] = chance.choice(VALUES)
    elif how < 0.85:
        del inner[path[-1]]
    elif isinstance(inner, dict):
        inner[
            chance.choice(["x", "rope_theta", "num_labels", "_attn_implementation", "layer_types", "dtypes", "head"])
        ] = chance.choice(VALUES)
    return description


def change_bytes(chance, data):
    """Flip bits, insert, delete, overwrite, cut or append bytes."""
    data, at = bytearray(data), chance.randrange(max(1, len(data)))
    how = chance.randrange(6)
    if how == 0 and data:
        for _ in range(chance.choice([1, 1, 4])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == 1:
        data[at:at] = chance.randbytes(chance.choice([1, 1, 8, 100]))
    elif how == 2:
        del data[at : at + chance.choice([1, 1, 8, 100])]
    elif how == 3:
        del data[at:]
    elif how == 4:
        data[at : at + 4] = chance.choice([b"\x00" * 4, b"\xff" * 4, chance.randbytes(4)])
    else:
        data += chance.choice([b"\x00", data[:8], chance.randbytes(100)])
    return bytes(data)


def swap(chance, bodies):
    """Two blobs in each other's place."""
    first, second = chance.sample(list(bodies), 2)
    return bodies | {first: bodies[second], second: bodies[first]}


def mutate(chance, folders):
    """(model.safetensors, model.json, the changed blobs if all checksums fit or None, place of the folder)."""
    place = chance.randrange(len(folders))
    (data, text), (other, other_text) = folders[place], folders[place - 1]
    how = chance.random()
    if how < 0.25:
        return change_bytes(chance, data), text, None, place
    if how < 0.35:  # the header is a small part of the file
        length = int.from_bytes(data[:8], "little") + 8
        return change_bytes(chance, data[:length]) + data[length:], text, None, place
    if how < 0.45:
        return data, change_bytes(chance, text), None, place
    if how < 0.53:
        return data, json.dumps(change_json(chance, json.loads(text)), separators=(",", ":")).encode(), None, place
    if how < 0.56:  # files of two folders
        return *chance.choice([(other, text), (data, other_text), (text, data)]), None, place
    bodies, description = repair(data, text)
    if how < 0.6:
        bodies = swap(chance, bodies)
        sizes = {name: len(body) for name, body in bodies.items()}
        header = header_bytes(sizes, hashlib.sha256(text).hexdigest())
        return header + b"".join(bodies.values()), text, None, place
    if how < 0.78:
        changed = {chance.choice(list(bodies))}
        bodies |= {name: change_bytes(chance, bodies[name]) for name in changed}
    elif how < 0.82:
        before = bodies
        bodies = swap(chance, bodies)
        changed = {name for name in bodies if bodies[name] != before[name]}
    else:
        for _ in range(chance.choice([1, 1, 1, 1, 2])):
            description = change_json(chance, description)
        if not isinstance(description, dict):
            return data, json.dumps(description).encode(), None, place
        changed = {"model.json"}
    return *assemble(bodies, description), changed, place
