"""The memory of stages that walk a dense model is that of one block, however many there are."""

from __future__ import annotations

import json

from tasks.models import tensor_files
from tests.support import peak_memory

MIB = 2**20
PARAMS = {
    "importance": {"method": "taylor", "windows": 2},
    "depth_prune": {"remove": 2, "protect_first": 1, "protect_last": 0, "schedule": "one_shot"},
    "calibrate": {"seed": 0, "windows": 4, "length": 32},
    "wanda": {"method": "wanda", "pattern": "n_m", "keep": 2, "of": 4, "sparsity": None},
}


def test_peaks_are_flat_in_the_number_of_blocks(model_folder, make_windows, tmp_path):
    (tmp_path / "corpora").mkdir()
    text = json.dumps({"text": "The pump shall start. " * 20}) + "\n"
    (tmp_path / "corpora/calibration.jsonl").write_text(text)
    tensor_files.save_tensors(tmp_path / "windows.safetensors", {"input_ids": make_windows(4, 32).int()}, {})
    folders = [peak_memory.large_llama(tmp_path / str(blocks), model_folder, blocks) for blocks in (4, 16)]
    (tmp_path / "scores.csv").write_text("layer,taylor\n" + "".join(f"{index},{index}\n" for index in range(16)))
    names = ("corpora", "windows.safetensors", "scores.csv")
    inputs = {f"fetch/{name}": tmp_path / name for name in names}
    stages = list(PARAMS)
    # the first, tiny one pays for what is imported late
    _, few, many = peak_memory.measured(stages, PARAMS, inputs, [model_folder, *folders])
    for stage, of_few, of_many in zip(stages, few, many, strict=True):
        told = f"{stage}: {of_few / MIB:.0f} MiB of 4 blocks, {of_many / MIB:.0f} of 16"
        if stage != "depth_prune":  # it copies tensor by tensor
            assert of_few > 0.8 * peak_memory.BLOCK_BYTES, told  # a block at least: it is measured
        assert of_many < of_few + peak_memory.BLOCK_BYTES / 2, told
