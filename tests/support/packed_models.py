"""Small models to be packed: quantised by gptqmodel, with masks and branches; or random ones of any format."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from safetensors import safe_open

from tasks.algorithms.model import families
from tasks.algorithms.model.shape import shape_of_config
from tasks.algorithms.quantisation import gptq_walk, gptqmodel_settings, masked_gptq, rounding
from tasks.models import gptq_folder, streamed_folder, tensor_files
from tasks.packed.layout import divisor
from tasks.packed.stored_model import Linear, Model, zero_codes

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


def quantise_linears(model, dense, target, windows, keep, config, settings=masked_gptq.PLAIN):
    """A model opened from the folder `dense`, quantised -> target; what became of each linear."""
    found = {}
    with gptq_folder.writing(model, config, dense, target) as write:

        def done(name, quantised):
            write(name, quantised.tensors)
            found[name] = quantised

        gptq_walk.quantise(model, windows, keep, config, done, settings)
    return found


def quantise(folder, windows, keep, settings, embedding=16, steps=None):
    """folder/dense -> folder/model and folder/embedding.safetensors."""
    settings = SETTINGS | settings
    if "widths" in settings:
        names = [f"model.layers.{i}.{name}" for i in range(2) for name in families._LLAMA.linears]
        widths = settings.pop("widths") * len(names)
        settings["bits"] = dict(zip(names, widths, strict=False))
    model = streamed_folder.open_dense(folder / "dense")
    coded = {}
    if embedding < 16:
        tied = model.config.tie_word_embeddings
        for name, place in [("embedding", "model.embed_tokens"), *([] if tied else [("head", "lm_head")])]:
            weight = model.get_submodule(place).weight
            coded[name] = rounding.quantise(weight, embedding, 32, steps)
            weight.data = rounding.values(coded[name])
    config = gptqmodel_settings.config(**settings)
    quantise_linears(model, folder / "dense", folder / "model", windows, keep, config, masked_gptq.Settings(steps))
    save_coded(folder / "embedding.safetensors", coded, embedding)


def branches(model, ranks, bits):
    """Random branches: name -> factors, and name.a, name.b -> codes."""
    factors, coded = {}, {}
    for place, (name, linear) in enumerate(families.block_linears(model).items()):
        rank, sides = ranks[place % len(ranks)], (linear.in_features, linear.out_features)
        matrices = [0.1 * normal(rank, side, seed=place) for side in sides]
        if bits < 16 and rank:
            own = [rounding.quantise(matrix, bits, divisor(matrix.shape[1], 40)) for matrix in matrices]
            coded |= {f"{name}.a": own[0], f"{name}.b": own[1]}
            matrices = [rounding.values(one) for one in own]
        factors[name] = (matrices[0].half(), matrices[1].T.half())
    return factors, coded


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


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


@dataclass(frozen=True)
class Recipe:
    """How a random model is stored; `bits` and `rank` may be lists, repeated over the linears.

    Attributes:
        scales: scales are that many powers of 2 ** (1 / 4); None: any.
    """

    bits: int | Sequence[int] = 4
    pattern: str = "2:4"
    group: int = 32
    embedding_bits: int = 8
    zeros: bool = False
    order: bool = False
    rank: int | Sequence[int] = 0
    adapter_bits: int = 16
    scales: int | None = None
    tied: bool = True

    def at(self, place):
        """(bits, rank) of the linear at a place."""
        lists = ([value] if isinstance(value, int) else value for value in (self.bits, self.rank))
        return tuple(values[place % len(values)] for values in lists)


def random_linear(shape, recipe, place, seed):
    """The linear at a place of the model, of random codes, scales and factors."""
    (rows, cols), (bits, rank) = shape, recipe.at(place)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
    size = cols if recipe.group == -1 else recipe.group
    grid = (rows, cols // size)
    linear = Linear(codes=codes, bits=bits, group_size=size, pattern=recipe.pattern)
    if recipe.scales is None:
        linear.scales = torch.rand(grid, generator=generator).half()
    else:
        linear.scales = (2.0 ** (-torch.randint(recipe.scales, grid, generator=generator) / 4)).half()
    if recipe.zeros:
        linear.zeros = torch.randint(0, 2**bits, grid, generator=generator, dtype=torch.uint8)
    if recipe.order:
        linear.group_index = torch.randperm(cols, generator=generator) // size
    if recipe.pattern != "dense":
        linear.keep = mask_of(normal(rows, cols, seed=seed) / 3, recipe.pattern)
        zero = torch.from_numpy(zero_codes(linear, rows, cols))
        linear.codes = torch.where(linear.keep, codes, zero)
    if rank:
        a, b = normal(rank, cols, seed=seed), normal(rank, rows, seed=seed)
        if recipe.adapter_bits < 16:
            linear.adapter = tuple(rounding.quantise(side, recipe.adapter_bits, 64) for side in (a, b))
        else:
            linear.adapter = a.half(), b.T.half()
    return linear


def realistic(**settings):
    """A random model of the demo's shape, by a `Recipe`'s settings."""
    recipe = Recipe(**settings)
    config = REALISTIC | {"tie_word_embeddings": recipe.tied}
    blocks, place = [], 0
    for layer in range(10):
        block = {}
        for name, shape in shape_of_config(config).linears.items():
            block[f"model.layers.{layer}.{name}"] = random_linear(shape, recipe, place, seed=place)
            place += 1
        blocks.append(block)
    table = normal(2048, 128, seed=99)
    if recipe.embedding_bits == 16:
        embedding = table.half()
    else:
        embedding = rounding.quantise(table, recipe.embedding_bits, 32, recipe.scales and 2)
    norms = [f"model.layers.{layer}.{name}" for layer in range(10) for name in families._LLAMA.norms]
    rest = {f"{name}.weight": torch.ones(128, dtype=torch.float16) for name in [*norms, "model.norm"]}
    return Model(config, blocks, embedding, None if recipe.tied else embedding, rest)


def skewed(**settings):
    """The same with codes as a quantiser of normal weights gives them, not uniform ones."""
    model = realistic(**settings)
    for place, block in enumerate(model.blocks):
        for name, linear in block.items():
            middle = 2 ** (linear.bits - 1)
            codes = middle + normal(*linear.shape, seed=1000 * place + len(name)) * middle / 2.6
            codes = codes.round().clamp(0, 2**linear.bits - 1).to(torch.uint8)
            zero = torch.from_numpy(zero_codes(linear, *linear.shape))
            linear.codes = codes if linear.keep is None else torch.where(linear.keep, codes, zero)
    return model


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


def packed_tensors(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}
