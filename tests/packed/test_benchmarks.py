"""The benchmarks of packed folders: loading beside the folder that was packed, and a large model's plans."""

import pytest

from tests.benchmarks import llama_bytes, packed_loading


def test_loading_is_measured_for_both_kinds_of_folder(build, capsys):
    folders = {"unpacked": build("coded").model, "packed": build("coded").packed}
    found = {kind: [packed_loading.load(kind, folder)] * 2 for kind, folder in folders.items()}
    assert all(one["all"] >= one["load"] > 0 and one["peak"] >= one["above"] >= 0 for [one, _] in found.values())
    found["unpacked"] = [{"load": 2.0, "all": 4.0, "peak": 100.0, "above": 10.0} for _ in range(2)]
    found["packed"] = [{"load": load, "all": 2.0, "peak": 50.0, "above": 10.0} for load in (1.0, 3.0)]
    packed_loading.show(found, folders)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert [cell.strip() for cell in rows[3]] == [
        "load, s",
        "2.00 (2.00 to 2.00)",
        "2.00 (1.00 to 3.00)",
        "1.00 (0.50 to 1.50)",
    ]
    sizes = [sum(path.stat().st_size for path in folder.rglob("*.*")) for folder in folders.values()]
    assert [int(cell.replace(",", "")) for cell in rows[2][1:3]] == sizes


def test_the_codings_are_compared_by_component(build, tmp_path, capsys):
    folders = packed_loading.codings(build("coded").packed, tmp_path)
    packed_loading.show_bytes(folders)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line]
    found = {name: cells for name, *cells in rows[2:]}
    for place, folder in enumerate(folders.values()):
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert int(found["all"][place].replace(",", "")) == size
    fixed, entropy, ratio, bound, above = (float(cell.replace(",", "")) for cell in found["values"])
    assert bound < entropy < fixed and ratio == pytest.approx(entropy / fixed, abs=1e-4)
    assert above == pytest.approx(entropy / bound, abs=1e-4) and above < 1.05
    assert packed_loading.load("entropy", folders["entropy"])["load"] > 0


def test_the_benchmark_of_a_large_model_prints_its_table(capsys):
    llama_bytes.show()
    output = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    sizes = {(linears, embedding): int(size.replace(",", "")) for linears, embedding, size, *_ in rows[2:]}
    assert len(sizes) == 10
    parameters, table = 1_235_814_400, 128_256 * 2048  # as published; the embedding
    assert 0 < sizes["bf16", "bf16"] - 2 * parameters < 20_000
    for bits in (4, 3):  # codes and a float16 scale per 128; norms
        linears = (parameters - table - 33 * 2048) * (bits + 16 / 128) / 8 + 33 * 2048 * 2
        assert 0 < sizes[f"{bits} bit", "fp16"] - linears - 2 * table < 20_000
        assert 0 < sizes[f"{bits} bit", "int4"] - linears - table * (4 + 16 / 32) / 8 < 20_000
