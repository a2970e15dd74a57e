"""sensitivity: nothing where nobody chooses by it. What it measures is held to the predictions in test_baseline."""

from __future__ import annotations

import pytest

from tasks import sensitivity
from tasks.compression import block_quantisation
from tasks.packed import source_folder
from tasks.parameters import schema
from tests.support.pruned_model import sections


@pytest.mark.parametrize(("gptq", "baseline"), [(False, True), (True, False)])
def test_nothing_is_measured_where_nobody_chooses_by_it(make_stage, tmp_path, gptq, baseline) -> None:
    params = sections(enabled=gptq) | {"baseline": schema.Baseline(enabled=baseline)}
    sensitivity.run(make_stage(params, {}))  # a model would be a LookupError
    assert block_quantisation.read_harm(tmp_path / "out/sensitivity.csv") == {}
    assert source_folder.read_codes(tmp_path / "out/embedding.safetensors") == {}
