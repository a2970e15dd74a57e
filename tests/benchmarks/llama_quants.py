"""llama.cpp's own roundings of the fetched model: bytes and perplexity, by the protocol and the windows of evaluate.

    python -m tests.benchmarks.llama_quants --model smollm2-135m --folder DIR [--only Q4]

The weights go into a GGUF file as float32, llama.cpp rounds them (`model_quantize` of cyllama 0.2.18; no importance
matrix, which that binding can't hand over) and computes. `bytes` are the file's by `stat`, its tokenizer included;
`tensor_bytes` those of its tensors. k-quants are blocks of 256: where a row isn't so many values, llama.cpp takes
another type, and `types` says which share of the tensors' values has which. The row "f32" is the engine's own, to
compare with stage evaluate's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tasks.algorithms.scoring import likelihood, protocols
from tasks.export import export
from tasks.models import dense_folder
from tasks.parameters import preflight, rules
from tasks.runners import engines
from tests.benchmarks.chain import Chain
from tests.benchmarks.table import Row, Subject, main

FILE_TYPES = {
    "f32": None,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q4_K_M": 15,
    "IQ4_NL": 25,
    "Q4_0": 2,
    "Q3_K_M": 12,
    "IQ3_S": 26,
    "Q2_K": 10,
}
"""llama.cpp's name -> its number (`enum llama_ftype` in llama.h)."""
COLUMNS = ["point", "bytes", "tensor_bytes", "ppl_test", "ppl_ood", "types"]


def rows(base: Chain, subject: Subject) -> Iterator[Row]:
    """One row per file type."""
    for name, number in FILE_TYPES.items():
        yield {"point": name}, partial(_measured, base, name, number)


def _measured(chain: Chain, name: str, number: int | None) -> Mapping[str, Any]:
    import gguf

    folder = _rounded(chain, name, number)
    tensors = gguf.GGUFReader(folder / engines.GGUF).tensors
    values = Counter()
    for tensor in tensors:
        values[tensor.tensor_type.name] += int(tensor.n_elements)
    engine = engines.load(folder, torch.get_num_threads())
    return {
        "bytes": (folder / engines.GGUF).stat().st_size,
        "tensor_bytes": sum(int(tensor.n_bytes) for tensor in tensors),
        **{f"ppl_{split}": engines.perplexity(engine, cut) for split, cut in _windows(chain).items()},
        "types": ", ".join(f"{kind} {count / sum(values.values()):.0%}" for kind, count in values.most_common()),
    }


def _rounded(chain: Chain, name: str, number: int | None) -> Path:
    """A folder with the model as GGUF, rounded by llama.cpp."""
    source = chain.output("fetch") / "model"
    whole = chain.derive(
        "gguf-f32", {"model": source}, lambda folder: export.export(source, "gguf-f32", folder / "f32")
    )
    if number is None:
        return whole / "f32"

    def make(folder: Path) -> None:
        from cyllama.llama import llama_cpp

        settings = llama_cpp.LlamaModelQuantizeParams()
        settings.ftype, settings.nthread = number, torch.get_num_threads()
        llama_cpp.disable_logging()
        llama_cpp.model_quantize(str(whole / "f32" / engines.GGUF), str(folder / engines.GGUF), settings)

    return chain.derive(f"llama.cpp-{name}", {"model": source}, make)


def _windows(chain: Chain) -> dict[str, list[Any]]:
    """Split -> the windows that stage evaluate measures, int [length] each; no token of them counts twice."""
    fetched = chain.output("fetch")
    shape = preflight.model_shape(preflight.read_config(fetched / "model"))
    chosen = rules.settle(chain.everything.evaluate, shape, chain.everything.device)
    protocol = protocols.protocol(chosen.protocol, chosen.length, chosen.stride)
    tokenizer, cut = dense_folder.load_tokenizer(fetched / "model"), {}
    for split, name in (("test", "test"), ("ood", "test_ood")):
        lines = (fetched / f"corpora/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        documents = [json.loads(line)["text"] for line in lines]
        prepared = likelihood.prepare(protocol, tokenizer, documents, chosen.max_windows)
        if any(window.first != window.start + 1 for window in prepared.windows):
            raise ValueError(f"windows of {protocol.label} overlap: this script compares ones side by side")
        cut[split] = [prepared.ids[window.text][window.start : window.stop].numpy() for window in prepared.windows]
    return cut


if __name__ == "__main__":
    main("llama_quants", COLUMNS, rows)
