"""The packed folder against gptqmodel's own loading, against the bound, against a plan, and against damage."""

import contextlib
import hashlib
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from safetensors import safe_open

from tasks.algorithms import packing
from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.algorithms.quantisation import masked_gptq, rounding
from tasks.models import dense_folder, gptq_folder, mask_files, tensor_files
from tasks.packed import file_format, reader
from tasks.runners import any_folder
from tests.benchmarks import llama_bytes, packed_loading
from tests.support.paths import ROOT

SETTINGS = {"bits": 4, "group_size": 32, "symmetric": True, "damp": 0.05, "act_order": "none"}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,  # gptqmodel adds a token for padding to some tokenizers
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CASES = {
    "coded": {"pattern": "2:4", "embedding": 8, "ranks": [4, 0, 2], "adapter": 4},
    "asymmetric": {
        "architecture": "Qwen2ForCausalLM",  # biases
        "config": {"tie_word_embeddings": False},
        "settings": {"bits": 2, "symmetric": False, "act_order": "descending"},
        "pattern": "unstructured",
        "embedding": 4,
        "ranks": [3],
        "adapter": 16,
    },
    "mixed": {
        "architecture": "Qwen3ForCausalLM",  # norms of heads
        "config": {"head_dim": 16},
        "settings": {"bits": 3, "group_size": -1, "widths": [2, 3, 4, 8]},
    },
    "grid": {
        "architecture": "MistralForCausalLM",
        "pattern": "4:8",
        "steps": 2,
        "embedding": 4,
        "settings": {"bits": 3},
    },
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(weight, pattern):
    """The largest of each group; unstructured: about a third of all."""
    if pattern == "unstructured":
        return weight.abs() > 0.2
    keep, of = map(int, pattern.split(":"))
    groups = weight.abs().reshape(-1, of)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(keep).indices, True)
    return mask.reshape(weight.shape)


def random_dense(folder, tokenizer, architecture="LlamaForCausalLM", pattern=None, config=()):
    """A random pruned model with a tokenizer -> (model, masks)."""
    kind = getattr(transformers, architecture)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**SIZES | dict(config))).eval()
    for name, tensor in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # transformers starts them at 0 and 1
            tensor.data += 0.1 * normal(*tensor.shape, seed=len(name))
    keep = {}
    for name, linear in families.block_linears(model).items():
        if pattern:
            keep[name] = mask_of(linear.weight.detach(), pattern)
            linear.weight.data *= keep[name]
    model.save_pretrained(folder)
    for path in tokenizer.iterdir():
        if "token" in path.name:
            shutil.copyfile(path, folder / path.name)
    return model, keep


def save_coded(path, coded, bits):
    tensors = {f"{name}.codes": one.codes for name, one in coded.items()}
    tensors |= {f"{name}.scales": one.scales for name, one in coded.items()}
    tensor_files.save_tensors(path, tensors, {"bits": str(bits), "group_size": "32"})


def quantise(folder, windows, keep, settings, embedding=16, steps=None):
    """folder/dense -> folder/model and folder/embedding.safetensors."""
    settings = SETTINGS | settings
    if "widths" in settings:
        names = [f"model.layers.{i}.{name}" for i in range(2) for name in families._LLAMA.linears]
        widths = settings["widths"] * len(names)
        settings["widths"] = dict(zip(names, widths, strict=False))
    model = gptq_folder.load_for_quantisation(folder / "dense", masked_gptq.config(**settings))
    coded = {}
    if embedding < 16:
        tied = model.model.config.tie_word_embeddings
        for name, place in [("embedding", "model.embed_tokens"), *([] if tied else [("head", "lm_head")])]:
            weight = model.model.get_submodule(place).weight
            coded[name] = rounding.quantise(weight, embedding, 32, steps)
            weight.data = rounding.values(coded[name])
    masked_gptq.quantise(model, windows, keep, masked_gptq.Settings(scale_steps=steps))
    gptq_folder.save_quantised(model, folder / "dense", folder / "model")
    save_coded(folder / "embedding.safetensors", coded, embedding)


def branches(model, ranks, bits):
    """Random branches: name -> factors, and name.a, name.b -> codes."""
    factors, coded = {}, {}
    for place, (name, linear) in enumerate(families.block_linears(model).items()):
        rank, sides = ranks[place % len(ranks)], (linear.in_features, linear.out_features)
        matrices = [0.1 * normal(rank, side, seed=place) for side in sides]
        if bits < 16 and rank:
            own = [rounding.quantise(matrix, bits, file_format.divisor(matrix.shape[1], 40)) for matrix in matrices]
            coded |= {f"{name}.a": own[0], f"{name}.b": own[1]}
            matrices = [rounding.values(one) for one in own]
        factors[name] = (matrices[0].half(), matrices[1].T.half())
    return factors, coded


@pytest.fixture(scope="module")
def tokenizer(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 257, (6, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.fixture(scope="module")
def build(tokenizer, windows, tmp_path_factory):
    """build(case) -> what the stages hand to the package, and it packed."""
    made = {}

    def build(case):
        if case in made:
            return made[case]
        chosen, folder = CASES[case], tmp_path_factory.mktemp(case)
        dense = {key: chosen[key] for key in ("architecture", "pattern", "config") if key in chosen}
        model, keep = random_dense(folder / "dense", tokenizer, **dense)
        mask_files.save_masks(folder / "masks.safetensors", keep, chosen.get("pattern", "dense"))
        quantise(folder, windows, keep, chosen.get("settings", {}), chosen.get("embedding", 16), chosen.get("steps"))
        factors, coded = branches(model, chosen.get("ranks", [0]), chosen.get("adapter", 16))
        gptq_folder.save_adapter(folder / "model", factors)
        save_coded(folder / "adapter.safetensors", coded, chosen.get("adapter", 16))
        parts = [folder / f"{name}.safetensors" for name in ("masks", "embedding", "adapter")]
        reader.save(reader.read(folder / "model", *parts), folder / "packed")
        reader.copy_tokenizer(folder / "model", folder / "packed")
        made[case] = SimpleNamespace(model=folder / "model", parts=parts, packed=folder / "packed", keep=keep)
        return made[case]

    return build


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_gptqmodel_bit_by_bit(build, windows, case):
    made = build(case)
    assert reader.is_packed(made.packed) and not reader.is_packed(made.model)
    loaded, expected = reader.load_model(made.packed), gptq_folder.load_model(made.model)
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    for ids in (windows.long(), windows[:1, :7].long(), windows[:1, :1].long()):
        assert torch.equal(logits(loaded, ids), logits(expected, ids))
    generated = [
        model.generate(windows[:1, :5].long(), max_new_tokens=6, do_sample=False) for model in (loaded, expected)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_gptqmodel_and_pruned_ones_zero(build, case):
    made = build(case)
    expected = gptq_folder.block_weights(gptq_folder.load_model(made.model))
    found = any_folder.block_weights(reader.load_model(made.packed))
    assert list(found) == list(expected)
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
        if made.keep:
            assert weight[~made.keep[name]].count_nonzero() == 0
    blocks = dict(reader.stream(made.packed))
    assert list(blocks) == [0, 1]
    streamed = {name: linear for block in blocks.values() for name, linear in block.items()}
    for name, linear in streamed.items():
        assert torch.equal(linear.values(), expected[name])
        if made.keep:
            assert torch.equal(linear.keep, made.keep[name])
    assert dense_folder.parameter_count(reader.load_model(made.packed)) == dense_folder.parameter_count(
        gptq_folder.load_model(made.model)
    )


def test_streaming_reads_a_block_at_a_time(build, tmp_path):
    folder = shutil.copytree(build("coded").packed, tmp_path / "copy")
    size = (folder / reader.FILE).stat().st_size
    with safe_open(folder / reader.FILE, framework="np") as file:
        rest = sum(file.get_tensor(name).size for name in ("embedding", "rest", "scales") if name in set(file.keys()))
    with (folder / reader.FILE).open("r+b") as file:  # the first byte of the embedding: no block's concern
        file.seek(size - rest)
        byte = file.read(1)
        file.seek(size - rest)
        file.write(bytes([byte[0] ^ 1]))
    assert [index for index, _ in reader.stream(folder)] == [0, 1]
    with pytest.raises(InputError, match="the checksum of embedding"):
        reader.load_model(folder)


@pytest.mark.parametrize("case", CASES)
def test_saving_what_was_streamed_gives_the_same_bytes(build, tmp_path, case):
    made = build(case)
    reader.save(reader.read(made.model, *made.parts), tmp_path / "again")
    again = reader.read(made.model, *made.parts)
    again.blocks = (linears for _, linears in reader.stream(made.packed))
    reader.save(again, tmp_path / "streamed")
    for name in (reader.FILE, reader.DESCRIPTION):
        written = (made.packed / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes() == written
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [reader.DESCRIPTION, reader.FILE]


@pytest.mark.parametrize("case", CASES)
def test_components_sum_to_the_files_and_none_is_below_its_bound(build, case):
    folder = build(case).packed
    found, least = reader.component_bytes(folder), reader.bound(folder)
    assert tuple(found) == tuple(least) == reader.COMPONENTS
    assert sum(found.values()) == sum(path.stat().st_size for path in folder.iterdir())
    assert all(8 * found[name] >= least[name] - 1e-6 for name in found)
    chosen = CASES[case]
    assert (found["zeros"] > 0) == (not chosen.get("settings", {}).get("symmetric", True))
    assert (found["adapter"] > 0) == ("adapter" in chosen)
    assert (found["positions"] > 0) == ("pattern" in chosen)


def test_the_tokenizer_shrinks_and_tokenises_the_same(build):
    made = build("coded")
    small, large = ((folder / "tokenizer.json").stat().st_size for folder in (made.packed, made.model))
    assert small < 0.8 * large
    text = 'The pump shall ≥ 3 µm, naïve — "ok"\n\t日本'
    first, second = (dense_folder.load_tokenizer(folder) for folder in (made.packed, made.model))
    assert first(text).input_ids == second(text).input_ids
    assert first.get_vocab() == second.get_vocab() and first.decode([5, 9]) == second.decode([5, 9])


@pytest.mark.parametrize("pattern", [None, "4:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_that_is_not_quantised_packs_losslessly(tokenizer, windows, tmp_path, pattern, dtype):
    model, keep = random_dense(tmp_path / "dense", tokenizer, pattern=pattern)
    model.to(dtype).save_pretrained(tmp_path / "dense")
    mask_files.save_masks(tmp_path / "masks.safetensors", keep, pattern or "dense")
    reader.save(reader.read(tmp_path / "dense", tmp_path / "masks.safetensors"), tmp_path / "packed")
    loaded, expected = reader.load_model(tmp_path / "packed"), dense_folder.load_dense(tmp_path / "dense")
    assert torch.equal(logits(loaded, windows.long()), logits(expected, windows.long()))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    sizes = reader.component_bytes(tmp_path / "packed")
    weights = sum(linear.weight.numel() for linear in families.block_linears(model).values())
    assert sizes["values"] == weights // (2 if pattern else 1) * dtype.itemsize
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


REALISTIC = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def random_linear(rows, cols, bits, pattern, group, zeros, order, rank, adapter_bits, scales, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
    size = cols if group == -1 else group
    grid = (rows, cols // size)
    linear = reader.Linear(codes=codes, bits=bits, group_size=size, pattern=pattern)
    found = (
        torch.rand(grid, generator=generator) if scales is None else torch.randint(scales, grid, generator=generator)
    )
    linear.scales = found.half() if scales is None else (2.0 ** (-found / 4)).half()
    if zeros:
        linear.zeros = torch.randint(0, 2**bits, grid, generator=generator, dtype=torch.uint8)
    if order:
        linear.group_index = torch.randperm(cols, generator=generator) // size
    if pattern != "dense":
        linear.keep = mask_of(normal(rows, cols, seed=seed) / 3, pattern)
        zero = torch.from_numpy(file_format.zero_codes(linear, rows, cols))
        linear.codes = torch.where(linear.keep, codes, zero)
    if rank:
        a, b = normal(rank, cols, seed=seed), normal(rank, rows, seed=seed)
        if adapter_bits < 16:
            linear.adapter = tuple(rounding.quantise(side, adapter_bits, 64) for side in (a, b))
        else:
            linear.adapter = a.half(), b.T.half()
    return linear


def realistic(
    bits=4,
    pattern="2:4",
    group=32,
    embedding_bits=8,
    zeros=False,
    order=False,
    rank=0,
    adapter_bits=16,
    scales=None,
    tied=True,
):
    """A random model of the demo's shape; `bits` and `rank` may be lists, repeated over the linears."""
    config = REALISTIC | {"tie_word_embeddings": tied}
    bits, rank = ([value] if isinstance(value, int) else value for value in (bits, rank))
    blocks, place = [], 0
    for layer in range(10):
        block = {}
        for name, (rows, cols) in families.linear_shapes(config).items():
            own, r = bits[place % len(bits)], rank[place % len(rank)]
            linear = random_linear(rows, cols, own, pattern, group, zeros, order, r, adapter_bits, scales, place)
            block[f"model.layers.{layer}.{name}"] = linear
            place += 1
        blocks.append(block)
    table = normal(2048, 128, seed=99)
    embedding = table.half() if embedding_bits == 16 else rounding.quantise(table, embedding_bits, 32, scales and 2)
    norms = [f"model.layers.{layer}.{name}" for layer in range(10) for name in families._LLAMA.norms]
    rest = {f"{name}.weight": torch.ones(128, dtype=torch.float16) for name in [*norms, "model.norm"]}
    return reader.Model(config, blocks, embedding, None if tied else embedding, rest)


SHAPES = [
    {},
    {"bits": 3},
    {"bits": 2, "pattern": "4:8", "embedding_bits": 4},
    {"bits": 8, "pattern": "dense", "group": -1, "embedding_bits": 16},
    {"bits": [2, 3, 4, 8], "pattern": "7:8", "rank": [4, 0, 8], "adapter_bits": 4},
    {"pattern": "1:4", "group": 128, "zeros": True, "order": True, "rank": 16, "adapter_bits": 8},
    {"embedding_bits": 4, "tied": False, "rank": 4},
    {"pattern": "unstructured", "bits": 2},
    {"pattern": "unstructured", "bits": 4},
]


@pytest.mark.parametrize("chosen", SHAPES, ids=str)
def test_a_realistic_model_is_within_2_percent_of_the_bound(tmp_path, chosen):
    model = realistic(**chosen)
    reader.save(model, tmp_path)
    found, least = reader.component_bytes(tmp_path), reader.bound(tmp_path)
    assert sum(found.values()) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 8 * sum(found.values()) < 1.02 * sum(least.values())
    if chosen.get("bits", 4) == 4 and not chosen.get("zeros"):
        linears = [linear for block in model.blocks for linear in block.values()]
        count = sum(linear.codes.numel() for linear in linears)
        kept = sum(int(linear.keep.sum()) for linear in linears)
        assert least["values"] == 4 * kept
        positions = {"2:4": count / 4 * math.log2(6)}.get(chosen.get("pattern", "2:4"))
        if positions is None:
            sizes = [(linear.codes.numel(), int(linear.keep.sum())) for linear in linears]
            positions = sum(
                math.log2(math.comb(n, k)) if n < 2**14 else packing.log2_combinations(n, k) for n, k in sizes
            )
        assert least["positions"] == pytest.approx(positions)


@pytest.mark.parametrize("chosen", [one for one in SHAPES if one.get("pattern") != "unstructured"], ids=str)
def test_the_plan_is_the_size_of_the_files_to_the_byte(tmp_path, chosen):
    model = realistic(**chosen)
    reader.save(model, tmp_path)
    names = [name for block in model.blocks for name in block]
    settings = {"pattern": chosen.get("pattern", "2:4"), "group_size": chosen.get("group", 32)}
    settings |= {key: chosen[key] for key in ("zeros", "order", "adapter_bits") if key in chosen}
    settings |= {"embedding_bits": chosen.get("embedding_bits", 8)}
    for key, default in (("bits", 4), ("rank", 0)):
        value = chosen.get(key, default)
        settings[key] = value if isinstance(value, int) else dict(zip(names, value * len(names), strict=False))
    found = sum(path.stat().st_size for path in tmp_path.iterdir())
    description = json.loads((tmp_path / reader.DESCRIPTION).read_text())
    if "scales" in description:
        settings |= {"distinct_scales": description["scales"]["values"], "kinds": description["scales"]["kinds"]}
    assert reader.planned_bytes(model.config, **settings) == found
    sizes, least = reader.planned(model.config, **settings)
    assert sizes == reader.component_bytes(tmp_path)
    assert least == pytest.approx(reader.bound(tmp_path))


def test_few_distinct_scales_go_into_a_table_and_come_back(tmp_path):
    model = realistic(scales=16, embedding_bits=16)
    reader.save(model, tmp_path / "few")
    sizes = reader.component_bytes(tmp_path / "few")
    count = sum(linear.scales.numel() for block in model.blocks for linear in block.values())
    assert sizes["scales"] == count // 2 + 2 * 16
    streamed = {name: linear for _, block in reader.stream(tmp_path / "few") for name, linear in block.items()}
    for block in model.blocks:
        for name, linear in block.items():
            assert torch.equal(streamed[name].scales, linear.scales)
    sizes, _ = reader.planned(model.config, 4, "2:4", 32, 16, distinct_scales=16)
    assert sizes == reader.component_bytes(tmp_path / "few")
    reader.save(realistic(embedding_bits=16), tmp_path / "many")
    assert reader.component_bytes(tmp_path / "many")["scales"] <= 2 * count


def test_the_unstructured_plan_is_close(tmp_path):
    model = realistic(pattern="unstructured")
    linears = [linear for block in model.blocks for linear in block.values()]
    kept = sum(int(linear.keep.sum()) for linear in linears) / sum(linear.keep.numel() for linear in linears)
    reader.save(model, tmp_path)
    table = json.loads((tmp_path / reader.DESCRIPTION).read_text())["scales"]
    settings = {"distinct_scales": table["values"], "kinds": table["kinds"], "sparsity": 1 - kept}
    plan = reader.planned_bytes(model.config, 4, "unstructured", 32, 8, **settings)
    assert plan == pytest.approx(sum(path.stat().st_size for path in tmp_path.iterdir()), rel=0.001)


def test_plans_that_make_no_sense_are_refused():
    for changed, message in (
        ({"group_size": 48}, "group_size = 48 doesn't divide rows of 128"),
        ({"pattern": "2:48"}, "pattern 2:48 can't be packed"),
        ({"pattern": "3:7"}, "128 inputs, not divisible by groups of 3:7"),
        ({"rank": 65}, "has rank 65, above the smaller side"),
        ({"embedding_bits": 5}, "4, 8 or 16 bits, not 5"),
    ):
        with pytest.raises(InputError, match=message):
            reader.planned_bytes(REALISTIC, **changed)
    with pytest.raises(InputError, match="supported are"):
        reader.planned_bytes(REALISTIC | {"architectures": ["GPT2LMHeadModel"]})


def test_the_command_prints_a_table(build, tmp_path, capsys):
    folder = build("coded").packed
    reader.main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*reader.COMPONENTS, "content", "total"]
    assert int(lines[-1].split()[1]) == sum(path.stat().st_size for path in folder.iterdir())
    (tmp_path / "config.json").write_text(json.dumps(REALISTIC))
    reader.main([str(tmp_path), "--bits", "3", "--pattern", "2:4", "--embedding-bits", "8", "--rank", "4"])
    total = int(capsys.readouterr().out.splitlines()[-1].split()[1])
    assert total == reader.planned_bytes(REALISTIC, 3, "2:4", 32, 8, rank=4)
    reader.main([str(tmp_path / "config.json"), "--scale-steps", "2", "--asymmetric"])
    command = [sys.executable, "-m", "tasks.packed.reader", str(tmp_path), "--bits", "3"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert int(shown[-1].split()[1]) == reader.planned_bytes(REALISTIC, 3)
    with pytest.raises(SystemExit, match="error: group_size = 7"):
        reader.main([str(tmp_path), "--group-size", "7"])
    with pytest.raises(SystemExit, match="name a packed folder"):
        reader.main([str(tmp_path / "nothing.json")])


def test_loading_draws_no_random_numbers(build):
    before = torch.get_rng_state()
    reader.load_model(build("coded").packed)
    assert torch.equal(torch.get_rng_state(), before)


def replaced(**changed):
    """The demo's model with a change to its first linear."""
    model = realistic()
    name, linear = next(iter(model.blocks[0].items()))
    for key, value in changed.items():
        setattr(linear, key, value(linear) if callable(value) else value)
    return model, name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codes": lambda one: one.codes.fill_(3)}, "pruned weights of .* are not zero"),
        ({"keep": lambda one: one.keep.fill_(True)}, "don't keep exactly 2"),
        ({"keep": None}, "has the pattern 2:4 and no mask"),
        ({"pattern": "dense"}, "has the pattern dense and a mask"),
        ({"scales": lambda one: one.scales[:, :2]}, "the scales of .* are"),
        ({"scales": lambda one: one.scales.float()}, "float32, not float16"),
        ({"bias": torch.zeros(128)}, "has a bias where its config has none"),
        ({"adapter": (torch.zeros(2, 128), torch.zeros(2, 128))}, "has factors"),
        ({"codes": lambda one: one.codes[:, :64]}, "linears of block 0 are not those of the config"),
    ],
)
def test_linears_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, changed, message):
    model, _ = replaced(**changed)
    with pytest.raises(InputError, match=message):
        reader.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_tied_model_stays_tied_and_an_untied_one_untied(tmp_path, tokenizer):
    model = realistic()
    model.head = model.embedding
    with pytest.raises(InputError, match="ties the head"):
        reader.save(model, tmp_path / "out")
    model = realistic(tied=False)
    model.head = None
    with pytest.raises(InputError, match="ties the head"):
        reader.save(model, tmp_path / "out")
    random_dense(tmp_path / "dense", tokenizer)
    path = tmp_path / "dense/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in packed_tensors(path).items()}
    tensor_files.save_tensors(path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, {})
    with pytest.raises(InputError, match="has a head of its own, but its config ties it"):
        reader.read(tmp_path / "dense")
    untied = random_dense(tmp_path / "untied", tokenizer, config={"tie_word_embeddings": False})[0]
    reader.save(reader.read(tmp_path / "untied"), tmp_path / "packed")
    loaded = reader.load_model(tmp_path / "packed")
    assert torch.equal(loaded.lm_head.weight, untied.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def packed_tensors(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def test_codes_that_are_not_the_folder_s_are_refused(build, tmp_path):
    made = build("coded")
    for place, message in ((1, "codes of the embedding aren't"), (2, "codes of the adapter of .* aren't")):
        tensors = packed_tensors(made.parts[place])
        name = next(name for name in sorted(tensors) if name.endswith("codes"))
        tensors[name][0, 0] += 1
        tensor_files.save_tensors(tmp_path / "changed.safetensors", tensors, {"bits": "8" if place == 1 else "4"})
        parts = list(made.parts)
        parts[place] = tmp_path / "changed.safetensors"
        with pytest.raises(InputError, match=message):
            reader.save(reader.read(made.model, *parts), tmp_path / "out")
    mask_files.save_masks(tmp_path / "m.safetensors", {"model.layers.7.x": torch.ones(2, 8, dtype=torch.bool)}, "2:4")
    with pytest.raises(InputError, match=r"a mask or an adapter for model.layers.7.x"):
        reader.read(made.model, tmp_path / "m.safetensors")


def test_a_reader_of_another_version_says_so(build, tmp_path):
    folder = shutil.copytree(build("coded").packed, tmp_path / "copy")
    for changed, message in (
        ({"version": 2}, "version: Input should be 1"),
        ({"format": "zip"}, "format: Input should be"),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"bits": "4"}, "bits"),
        ({"pattern": "2²:4"}, "pattern"),
    ):
        content = json.loads((build("coded").packed / reader.DESCRIPTION).read_text()) | changed
        (folder / reader.DESCRIPTION).write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            reader.load_model(folder)
    for text in ("[" * 100_000, '{"format": ' * 5_000, "", "\x00", '{"version": 1' + "0" * 5_000 + "}"):
        (folder / reader.DESCRIPTION).write_text(text)
        with pytest.raises(InputError, match="describes no packed model"):
            reader.load_model(folder)
    (folder / reader.DESCRIPTION).write_bytes(b" " * (2**24 + 1))
    with pytest.raises(InputError, match="more than 16777216"):
        reader.load_model(folder)
    shutil.copyfile(build("grid").packed / reader.DESCRIPTION, folder / reader.DESCRIPTION)
    with pytest.raises(InputError, match="belongs to another model.json"):
        reader.load_model(folder)
    (folder / reader.FILE).unlink()
    with pytest.raises(InputError, match="can't be read"):
        reader.load_model(folder)


@pytest.mark.parametrize(
    "text", ["[]", "", "{", "[" * 100_000, '{"watermarking_config": 5}', '{"compile_config": 3}', " " * (2**24 + 1)]
)
def test_settings_for_generation_that_are_none_are_refused(tiny, tmp_path, text):
    folder = shutil.copytree(tiny[0], tmp_path / "copy")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config.json (can't be read|has 16777217 bytes)"):
        reader.load_model(folder)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert reader.load_model(folder).generation_config.max_new_tokens == 7


def test_merges_are_stored_as_strings_and_make_the_same_tokenizer(tmp_path):
    source = ROOT / "data/base_model/model"
    reader.copy_tokenizer(source, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    given = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(content["model"]["merges"]) > 1000 and all(" " in merge for merge in content["model"]["merges"])
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    assert content == given
    first, second = (dense_folder.load_tokenizer(folder) for folder in (tmp_path, source))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    text = (ROOT / "data/grammar/prose.jsonl").read_text(encoding="utf-8")[:20_000]
    assert first(text).input_ids == second(text).input_ids


def test_a_tokenizer_that_is_no_bpe_or_has_merges_with_blanks_stays_as_it_is(tmp_path):
    blank = tokenizers.models.BPE({"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4}, [("a", " "), ("a ", "b")])
    for place, model in enumerate((tokenizers.models.WordLevel({"a b": 0, "?": 1}, unk_token="?"), blank)):
        source, folder = tmp_path / f"source{place}", tmp_path / f"folder{place}"
        source.mkdir()
        given = tokenizers.Tokenizer(model)
        given.save(str(source / "tokenizer.json"))
        assert reader.copy_tokenizer(source, folder) == ["tokenizer.json"]
        found = (folder / "tokenizer.json").read_text()
        assert tokenizers.Tokenizer.from_str(found).to_str() == given.to_str()
        assert json.loads(found) == json.loads((source / "tokenizer.json").read_text())


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


def test_a_file_that_is_cut_longer_or_has_another_header_is_told_so(tiny, tmp_path):
    folder = shutil.copytree(tiny[0], tmp_path / "copy")
    data = (folder / reader.FILE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    blanks = end.to_bytes(8, "little") + data[8:end] + b" " * 8 + data[end:]  # as safetensors allows it
    for changed, message in (
        (data[:-1], "truncated"),
        (data + b"x", "truncated"),
        (blanks, "its header is not the one"),
        (data[:4], "its header is not the one"),
    ):
        (folder / reader.FILE).write_bytes(changed)
        with pytest.raises(InputError, match=message):
            reader.config(folder)


def test_blobs_that_unpack_to_a_multiple_of_their_bytes_are_refused(tmp_path):
    model = realistic(embedding_bits=16)
    for block in model.blocks:
        for name, linear in block.items():
            empty = torch.zeros(linear.shape)
            block[name] = reader.Linear(weight=empty.half(), keep=empty.bool(), pattern="unstructured")
    with pytest.raises(InputError, match="layers.0 in .* has 56 bytes for 196608 weights"):
        reader.save(model, tmp_path)


# Damage


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
    return file_format.header(sizes, hashlib.sha256(text).hexdigest()) + b"".join(bodies.values()), text


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
        header = file_format.header(sizes, hashlib.sha256(text).hexdigest())
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


@pytest.mark.parametrize("kind", [0, 1])
def test_signed_blobs_with_bytes_that_are_no_content_are_refused(tiny, tmp_path, kind):
    folder = shutil.copytree(tiny[kind], tmp_path / "copy")
    bodies, description = repair(*((folder / name).read_bytes() for name in (reader.FILE, reader.DESCRIPTION)))
    for name in bodies:
        data, text = assemble(bodies | {name: bodies[name] + b"\x00"}, description)
        (folder / reader.FILE).write_bytes(data)
        (folder / reader.DESCRIPTION).write_bytes(text)
        with pytest.raises(InputError, match=rf"{name} in .* has {len(bodies[name]) + 1} bytes"):
            reader.load_model(folder)


@contextlib.contextmanager
def limits():
    """At most 1 GiB more of address space, and a minute; beyond either the block raises."""

    def late(*_):
        raise TimeoutError("a damaged file took longer than a minute")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def blob_of(parameter):
    """The blob that a parameter or buffer of a loaded model comes from."""
    if parameter.startswith("model.layers.") and "norm" not in parameter:
        return f"layers.{parameter.split('.')[2]}"
    return "embedding" if parameter in ("model.embed_tokens.weight", "lm_head.weight") else "rest"


def check_loaded(model, whole, changed, expected):
    """A damaged file that loads is the same model; one that was signed anew differs in the changed blobs alone."""
    state, found = model.state_dict(), logits(model, TOKENS)
    assert found.shape == expected.shape and (changed or torch.equal(found, expected))
    if changed is None or "model.json" not in changed:
        assert list(state) == list(whole)
        for name, tensor in state.items():
            other = changed and ("scales" in changed or blob_of(name) in changed)
            assert tensor.shape == whole[name].shape and (other or torch.equal(tensor, whole[name])), name


TOKENS = torch.arange(9)[None]


def fuzz(folders, scratch, count, seed):
    """Load `count` damaged copies: -> what became of those with wrong and with repaired checksums."""
    chance = random.Random(seed)
    files = [tuple((folder / name).read_bytes() for name in (reader.FILE, reader.DESCRIPTION)) for folder in folders]
    models = [reader.load_model(folder) for folder in folders]
    whole = [(model.state_dict(), logits(model, TOKENS)) for model in models]
    found = {"refused": 0, "same": 0, "repaired, refused": 0, "repaired, loaded": 0}
    scratch.mkdir(exist_ok=True)
    for _ in range(count):
        data, text, changed, place = mutate(chance, files)
        (scratch / reader.FILE).write_bytes(data)
        (scratch / reader.DESCRIPTION).write_bytes(text)
        kind = "" if changed is None else "repaired, "
        with contextlib.redirect_stderr(None), warnings.catch_warnings(action="ignore"), limits():
            try:
                model = reader.load_model(scratch)
            except InputError as error:
                assert len(str(error)) > 20
                found[f"{kind}refused"] += 1
                continue
        check_loaded(model, whole[place][0], changed, whole[place][1])
        found["repaired, loaded" if changed else "same"] += 1
    return found


@pytest.fixture(scope="module")
def tiny(build, tmp_path_factory):
    """Small packed folders: one with every feature, one with entropy coded positions."""
    folders = []
    for pattern, bits in (("2:4", 4), ("unstructured", 2)):
        config = REALISTIC | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
        config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        linears = [
            {
                f"model.layers.{layer}.{name}": random_linear(
                    *shape, bits, pattern, 8, True, layer == 0, 0, 4, 5 if layer else 6, 7 * layer + place
                )
                for place, (name, shape) in enumerate(families.linear_shapes(config).items())
            }
            for layer in range(2)
        ]
        for block in linears:
            for linear in block.values():
                linear.adapter = tuple(rounding.quantise(normal(2, side), 4, 8) for side in linear.shape[::-1])
        norms = [f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in families._LLAMA.norms]
        rest = {name: torch.ones(16, dtype=torch.float16) for name in [*norms, "model.norm.weight"]}
        folder = tmp_path_factory.mktemp("tiny")
        reader.save(reader.Model(config, linears, rounding.quantise(normal(20, 16), 8, 16), None, rest), folder)
        folders.append(folder)
    return folders


def check_fuzz(folders, scratch, count, seed):
    found = fuzz(folders, scratch, count, seed)
    print(", ".join(f"{value} {key}" for key, value in found.items()))
    assert sum(found.values()) == count
    assert found["refused"] > 0.4 * count and found["repaired, refused"] > 0.1 * count
    assert found["repaired, loaded"] > 0.02 * count  # so that what is behind the checksums was reached


def test_damaged_files_are_refused_or_load_the_same(tiny, tmp_path):
    check_fuzz(tiny, tmp_path / "damaged", 2_000, seed=1)


@pytest.mark.slow
def test_many_damaged_files_are_refused_or_load_the_same(tiny, tmp_path):
    check_fuzz(tiny, tmp_path / "damaged", 10_000, seed=2)


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
