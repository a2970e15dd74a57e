"""The packed folder against gptqmodel's own loading, bit by bit."""

import shutil

import pytest
import torch
from safetensors import safe_open

from tasks.algorithms.errors import InputError
from tasks.algorithms.model import families
from tasks.models import dense_folder, gptq_folder, mask_files
from tasks.packed import reader, source_folder
from tasks.packed.description import FILE
from tasks.packed.digits import CODERS
from tasks.packed.packed_folder import is_packed
from tasks.packed.sizes import component_bytes
from tasks.packed.writer import save
from tasks.runners import any_folder
from tests.support.packed_models import CASES, logits, random_dense


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_gptqmodel_bit_by_bit(build, windows, case):
    made = build(case)
    assert is_packed(made.packed) and not is_packed(made.model)
    loaded, expected = reader.load_model(made.packed), gptq_folder.load_quantised(made.model)
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    for ids in (windows.long(), windows[:1, :7].long(), windows[:1, :1].long()):
        assert torch.equal(logits(loaded, ids), logits(expected, ids))
    generated = [
        model.generate(windows[:1, :5].long(), max_new_tokens=6, do_sample=False) for model in (loaded, expected)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("case", CASES)
def test_both_codings_hold_the_same_bits(build, windows, case):
    made = build(case)
    assert (made.coded / FILE).stat().st_size < (made.packed / FILE).stat().st_size
    fixed, coded = reader.load(made.packed), reader.load(made.coded)
    for one, other in zip(fixed.blocks, coded.blocks, strict=True):
        for name, linear in one.items():
            for part, value in vars(linear).items():
                assert same(value, getattr(other[name], part)), (name, part)
    assert same(fixed.embedding, coded.embedding) and same(fixed.head, coded.head)
    assert same(tuple(fixed.rest.values()), tuple(coded.rest.values())) and fixed.config == coded.config
    models = [reader.load_model(folder) for folder in (made.packed, made.coded)]
    assert torch.equal(*(logits(model, windows.long()) for model in models))


def same(one, other):
    """Whether two values are the same in type and bits."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_gptqmodel_and_pruned_ones_zero(build, case):
    made = build(case)
    expected = gptq_folder.block_weights(gptq_folder.load_quantised(made.model))
    found = dict(any_folder.block_weights(reader.load_model(made.packed)))
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
        gptq_folder.load_quantised(made.model)
    )


def test_streaming_reads_a_block_at_a_time(build, tmp_path):
    folder = shutil.copytree(build("coded").packed, tmp_path / "copy")
    size = (folder / FILE).stat().st_size
    with safe_open(folder / FILE, framework="np") as file:
        rest = sum(file.get_tensor(name).size for name in ("embedding", "rest", "scales") if name in set(file.keys()))
    with (folder / FILE).open("r+b") as file:  # the first byte of the embedding: no block's concern
        file.seek(size - rest)
        byte = file.read(1)
        file.seek(size - rest)
        file.write(bytes([byte[0] ^ 1]))
    assert [index for index, _ in reader.stream(folder)] == [0, 1]
    with pytest.raises(InputError, match="the checksum of embedding"):
        reader.load_model(folder)


def test_the_tokenizer_shrinks_and_tokenises_the_same(build):
    made = build("coded")
    small, large = ((folder / "tokenizer.json").stat().st_size for folder in (made.packed, made.model))
    assert small < 0.8 * large
    text = 'The pump shall ≥ 3 µm, naïve — "ok"\n\t日本'
    first, second = (dense_folder.load_tokenizer(folder) for folder in (made.packed, made.model))
    assert first(text).input_ids == second(text).input_ids
    assert first.get_vocab() == second.get_vocab() and first.decode([5, 9]) == second.decode([5, 9])


@pytest.mark.parametrize("coding", CODERS)
@pytest.mark.parametrize("pattern", [None, "4:8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_that_is_not_quantised_packs_losslessly(tokenizer, windows, tmp_path, pattern, dtype, coding):
    model, keep = random_dense(tmp_path / "dense", tokenizer, pattern=pattern)
    model.to(dtype).save_pretrained(tmp_path / "dense")
    mask_files.save_masks(tmp_path / "masks.safetensors", keep, pattern or "dense")
    save(source_folder.read(tmp_path / "dense", tmp_path / "masks.safetensors"), tmp_path / "packed", coding)
    loaded, expected = reader.load_model(tmp_path / "packed"), dense_folder.load_dense(tmp_path / "dense")
    assert torch.equal(logits(loaded, windows.long()), logits(expected, windows.long()))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    sizes = component_bytes(tmp_path / "packed")
    weights = sum(linear.weight.numel() for linear in families.block_linears(model).values())
    raw = weights // (2 if pattern else 1) * dtype.itemsize
    assert sizes["values"] == raw if coding == "fixed" else sizes["values"] < 0.95 * raw  # exponents are alike
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_loading_draws_no_random_numbers(build):
    before = torch.get_rng_state()
    reader.load_model(build("coded").packed)
    assert torch.equal(torch.get_rng_state(), before)


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
