"""Load checkpoints with whatever transformers is first on the path: `python read_with_4.py FOLDER INPUTS OUTPUTS`.

FOLDER has a checkpoint in each of its folders; INPUTS is a safetensors file with `ids`; OUTPUTS gets the logits by the
folders' names. Prints a JSON object: the library's version, and of each checkpoint that could not be loaded why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(folder: Path, inputs: Path, outputs: Path) -> None:
    """Load all of them, each with its tokenizer."""
    ids, found, failed = load_file(inputs)["ids"], {}, {}
    for path in sorted(folder.iterdir()):
        try:
            model, said = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
            assert not any(said.values()), said
            assert transformers.AutoTokenizer.from_pretrained(path)("Pump 7 stops.").input_ids
            with torch.no_grad():
                found[path.name] = model.eval()(input_ids=ids).logits.contiguous()
        except Exception as error:  # reported, whatever it is
            failed[path.name] = str(error)
    save_file(found, outputs)
    print(json.dumps({"version": transformers.__version__, "failed": failed}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
