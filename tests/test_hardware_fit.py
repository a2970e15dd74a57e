"""hardware_fit against bytes counted by hand, `stat`, and the limits' closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tasks import devices, hardware_fit, packed
from tasks.algorithms import families, fit, rounding
from tasks.algorithms.errors import InputError

PROFILES = Path(__file__).resolve().parents[1] / "data" / "devices"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 64,
}
SHAPE = fit.Shape(layers=2, hidden=8, mlp=12, heads=2, kv_heads=1, head_dim=4, vocabulary=20, context_limit=64)
WORK = fit.Workload(context=10, batch=1, kv_bits=16, activation_bits=16)
FILES = fit.Files(weights=1000, metadata=200, streamed=900, adapter_parameters=0, formats=("int4-channel",))
DEVICE = fit.Device(
    name="toy",
    tiers=(
        fit.Tier("rom", 2000, 0, 1000, frozenset({"weights"})),
        fit.Tier("ram", 10000, 0, 500, frozenset({"kv_cache", "activations", "scratch"})),
    ),
    operations_per_second=1_000_000,
    weight_formats=frozenset({"int4-channel"}),
    activation_bits=frozenset({16}),
    time_saving=frozenset(),
    margin=0.1,
)


def with_rom(size: int, margin: float = 0.1) -> fit.Device:
    return replace(DEVICE, tiers=(replace(DEVICE.tiers[0], bytes=size), DEVICE.tiers[1]), margin=margin)


def shipped() -> dict[str, devices.Profile]:
    profiles = devices.load_all(PROFILES)
    assert profiles
    return profiles


def test_shape_from_config() -> None:
    assert fit.shape(CONFIG) == SHAPE
    with pytest.raises(InputError, match="hidden_size"):
        fit.shape({key: value for key, value in CONFIG.items() if key != "hidden_size"})


def test_bytes_by_hand() -> None:
    # KV: keys and values, 2 layers, 1 kv head of 4, 10 tokens, 2 bytes
    assert fit.kv_cache_bytes(SHAPE, WORK) == 2 * 2 * 1 * 4 * 10 * 2 == 320
    # attention 8 + 8 + 4 + 4 + 2 * 10 + 8 = 52; mlp 8 + 12 + 12 = 32; head 8 + 20 = 28; residual 8
    assert fit.activation_bytes(SHAPE, WORK) == (8 + 52) * 2
    # without a context the mlp is the widest: 8 + 32 against 8 + 34 at one token
    assert fit.activation_bytes(SHAPE, replace(WORK, context=1)) == (8 + 34) * 2
    assert fit.activation_bytes(replace(SHAPE, vocabulary=100), WORK) == (8 + 108) * 2
    # two rows of 12 inputs at 2 bytes, 12 sums at 4
    assert fit.scratch_bytes(SHAPE, WORK) == 2 * 12 * 2 + 12 * 4 == 96


@pytest.mark.parametrize(("bits", "factor"), [(4, 0.25), (8, 0.5), (16, 1), (32, 2)])
def test_kv_bits_and_batch_scale_the_cache(bits: int, factor: float) -> None:
    assert fit.kv_cache_bytes(SHAPE, replace(WORK, kv_bits=bits, batch=3)) == 320 * factor * 3


def test_operations_equal_the_matrices_of_a_block() -> None:
    q = o = 8 * 8
    k = v = 8 * 4
    gate = up = down = 8 * 12
    parameters = 2 * (q + k + v + o + gate + up + down) + 20 * 8 + 7
    attention = 2 * (2 * 8 * 10 + 2 * 8 * 10)  # per layer: scores and mixing, a multiply and an add per query element
    assert fit.operations_per_token(SHAPE, replace(FILES, adapter_parameters=7), WORK) == 2 * parameters + attention


@pytest.mark.parametrize(("over", "verdict"), [(0, "FITS"), (1, "DOES_NOT_FIT")])
def test_the_margins_exact_byte(over: int, verdict: str) -> None:
    # 90 % of 2000 is 1800 usable, 200 of them metadata
    result = fit.place(DEVICE, SHAPE, replace(FILES, weights=1600 + over), WORK)
    assert (result.verdict, result.bytes_over, result.headroom_bytes) == (verdict, over, 0)
    assert result.limiting_term == "rom: weights"
    assert result.placement[0].items == {"weights": 1600 + over, "metadata": 200}


def test_usable_is_exact_where_floats_are_not() -> None:
    assert fit.Tier("m", 4 * 2**20, 0, 1, frozenset()).usable(0.1) == 4 * 2**20 * 9 // 10
    assert fit.Tier("m", 1000, 0, 1, frozenset()).usable(0.1) == 900
    assert fit.Tier("m", 1000, 100, 1, frozenset()).usable(0.3) == 630
    assert fit.Tier("m", 1000, 0, 1, frozenset()).usable(0.0) == 1000


def test_the_fullest_tier_limits_when_all_fit() -> None:
    result = fit.place(with_rom(100_000), SHAPE, FILES, WORK)
    assert (result.verdict, result.limiting_term) == ("FITS", "ram: kv_cache")
    assert result.headroom_bytes == 9000 - 320 - 120 - 96


def test_the_kv_cache_can_be_what_does_not_fit() -> None:
    result = fit.place(DEVICE, SHAPE, FILES, replace(WORK, batch=30))
    used = 30 * 320 + 30 * 120 + 48 + 30 * 48
    assert (result.verdict, result.limiting_term, result.bytes_over) == ("DOES_NOT_FIT", "ram: kv_cache", used - 9000)


def test_more_context_never_helps() -> None:
    results = [fit.place(DEVICE, SHAPE, FILES, replace(WORK, context=context)) for context in range(1, 65)]
    used = [result.placement[1].used for result in results]
    speed = [result.tokens_per_second.bound for result in results]
    assert used == sorted(used) and used[0] < used[-1]
    assert speed == sorted(speed, reverse=True)


def test_bandwidth_bound_by_hand() -> None:
    # 900 bytes of weights at 1000 bytes/s beside 320 of KV at 500: the tiers overlap, the weights limit
    speed = fit.place(DEVICE, SHAPE, FILES, WORK).tokens_per_second
    assert speed.bandwidth == pytest.approx(1 / 0.9)
    assert (speed.bound, speed.limited_by, speed.tier) == (speed.bandwidth, "bandwidth", "rom")
    # both in one memory: the reads add up; two sequences share one read of the weights
    ram = replace(DEVICE.tiers[1], bytes=20000, holds=frozenset(fit.ITEMS))
    one = replace(DEVICE, tiers=(ram,))
    assert fit.place(one, SHAPE, FILES, WORK).tokens_per_second.bandwidth == pytest.approx(500 / (900 + 320))
    twice = fit.place(one, SHAPE, FILES, replace(WORK, batch=2)).tokens_per_second
    assert twice.bandwidth == pytest.approx(2 * 500 / (900 + 640))


def test_compute_bound_and_skipped_zeros() -> None:
    slow = replace(DEVICE, operations_per_second=100)
    dense = fit.place(slow, SHAPE, FILES, WORK)
    operations = fit.operations_per_token(SHAPE, FILES, WORK)
    assert dense.tokens_per_second.limited_by == "compute"
    assert dense.tokens_per_second.bound == pytest.approx(100 / operations)
    pruned = replace(FILES, pattern=(2, 4))
    unused = fit.place(slow, SHAPE, pruned, WORK)
    assert unused.tokens_per_second == dense.tokens_per_second
    assert len(unused.notes) == 1 and "2 kept of 4 (50% zeros)" in unused.notes[0]
    sparse = fit.place(replace(slow, time_saving=frozenset({(2, 4)})), SHAPE, pruned, WORK)
    assert sparse.tokens_per_second.compute == pytest.approx(200 / operations)
    assert sparse.notes == []


def test_operations_follow_the_families_shapes() -> None:
    one_token = replace(WORK, context=1)
    deeper = fit.operations_per_token(replace(SHAPE, layers=3), FILES, one_token)
    block = sum(rows * columns for rows, columns in families.linear_shapes(CONFIG).values())
    assert deeper - fit.operations_per_token(SHAPE, FILES, one_token) == 2 * block + 4 * 8


def test_formats_the_device_lacks_are_noted() -> None:
    result = fit.place(DEVICE, SHAPE, replace(FILES, formats=("int4-group", "int4-channel", "int4", "int8")), WORK)
    assert [note.split(" weights:")[0] for note in result.notes] == [
        "toy has no compute unit for int4-group",
        "toy has no compute unit for int8",
    ]
    assert "16 bits, not 8" in fit.place(DEVICE, SHAPE, FILES, replace(WORK, activation_bits=8)).notes[0]


def test_an_assignment_that_fits_is_found() -> None:
    # first fit would put the KV cache (320) into the fast memory and leave no room for the activations (120) elsewhere
    fast = fit.Tier("fast", 400, 0, 1000, frozenset({"kv_cache", "activations", "scratch"}))
    slow = fit.Tier("slow", 330, 0, 100, frozenset({"kv_cache"}))
    device = replace(DEVICE, tiers=(fast, slow, DEVICE.tiers[0]), margin=0.0)
    result = fit.place(device, SHAPE, FILES, WORK)
    assert result.verdict == "FITS"
    assert [set(place.items) for place in result.placement] == [
        {"activations", "scratch"},
        {"kv_cache"},
        {"weights", "metadata"},
    ]


def test_context_above_the_models_positions() -> None:
    with pytest.raises(InputError, match="65 .*max_position_embeddings = 64"):
        fit.place(DEVICE, SHAPE, FILES, replace(WORK, context=65))


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_shipped_profiles(name: str) -> None:
    profile = shipped()[name]
    tiny = fit.place(profile.device(), SHAPE, FILES, WORK)
    assert tiny.verdict == "FITS"
    huge = fit.place(profile.device(), SHAPE, replace(FILES, weights=10**12, streamed=10**12), WORK)
    assert (huge.verdict, huge.limiting_term.split(": ")[1]) == ("DOES_NOT_FIT", "weights")
    assert tiny.tokens_per_second.bound > huge.tokens_per_second.bound > 0
    assert all(row["source"] for row in profile.sources())


def test_the_default_device_is_the_one_described() -> None:
    assert {"siracusa", "raspberry-pi-4", "raspberry-pi-5", "jetson-orin-nano", "phone"} <= set(shipped())
    device = shipped()["siracusa"].device()
    tiers = {tier.name: tier for tier in device.tiers}
    assert tiers["mram"].bytes == tiers["tile_sram"].bytes == 4 * 2**20
    assert tiers["l1"].bytes == 256 * 2**10
    assert tiers["mram"].bandwidth * 8 == 92 * 10**9
    assert (device.operations_per_second, device.margin) == (1_950_000_000_000, 0.1)


def spoil(profile: dict, key: str, value: object) -> dict:
    *path, last = key.split(".")
    place = profile
    for part in path:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    return profile


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tiers.0.bytes.value", -1, "greater than 0"),
        ("tiers.0.bytes.value", "4 MiB", "valid integer"),
        ("tiers.0.reserved.value", 2**40, "leaves nothing"),
        ("tiers.0.holds", ["scratch"], "no tier holds weights"),
        ("tiers.0.holds", ["weight"], "holds"),
        ("tiers.0.bandwidth", {"value": 5}, "bandwidth.source"),
        ("safety_margin", 1.0, "less than 1"),
        ("name", "other", "must be the file's name"),
        ("colour", "red", "colour"),
    ],
)
def test_a_broken_profile_is_refused_in_a_sentence(tmp_path: Path, key: str, value: object, said: str) -> None:
    profile = yaml.safe_load((PROFILES / "siracusa.yaml").read_text(encoding="utf-8"))
    (tmp_path / "siracusa.yaml").write_text(yaml.safe_dump(spoil(profile, key, value)), encoding="utf-8")
    with pytest.raises(InputError, match="siracusa.yaml") as caught:
        devices.load_all(tmp_path)
    assert said in str(caught.value)


def test_no_profile_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no device profile"):
        devices.load_all(tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(InputError, match="bad.yaml is not valid YAML"):
        devices.load_all(tmp_path)


def test_an_unknown_device_lists_those_known() -> None:
    with pytest.raises(InputError, match="'abacus'.*siracusa"):
        devices.pick(shipped(), "abacus")


def model_folder(folder: Path, *, tied: bool = True, quantised: bool = False) -> Path:
    """Tensors of the right names; only their sizes matter here."""
    folder.mkdir(parents=True)
    config = dict(CONFIG)
    tensors = {"model.embed_tokens.weight": torch.zeros(20, 8, dtype=torch.float32)}
    if quantised:
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        tensors["model.layers.0.mlp.gate_proj.qweight"] = torch.zeros(1, 12, dtype=torch.int32)
        tensors["model.layers.0.mlp.gate_proj.scales"] = torch.zeros(1, 12, dtype=torch.float16)
        adapter = {"model.layers.0.mlp.gate_proj.lora_A.weight": torch.zeros(2, 8, dtype=torch.float16)}
        save_file(adapter, folder / "adapter_model.safetensors")
    else:
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(12, 8, dtype=torch.float32)
    if not tied:
        tensors["lm_head.weight"] = torch.zeros(20, 8, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}" * 50, encoding="utf-8")
    return folder


@pytest.mark.parametrize("quantised", [False, True])
def test_sizes_equal_stat(tmp_path: Path, quantised: bool) -> None:
    folder = model_folder(tmp_path / "model", quantised=quantised)
    files = hardware_fit.measure(folder)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert files.weights == sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    assert files.weights + files.metadata == sum(sizes.values())
    if quantised:
        assert files.streamed == 20 * 8 * 4 + 12 * 4 + 12 * 2 + 2 * 8 * 2
        assert (files.adapter_parameters, files.formats) == (16, ("fp16", "fp32", "int4-group"))
    else:
        assert files.streamed == (20 * 8 + 12 * 8) * 4
        assert (files.adapter_parameters, files.formats) == (0, ("fp32",))


def test_an_untied_embedding_is_only_looked_up_in(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", tied=False)
    assert hardware_fit.measure(folder).streamed == (12 * 8 + 20 * 8) * 4
    in_bf16 = hardware_fit.in_bf16(folder)
    assert (in_bf16.weights, in_bf16.streamed) == ((12 * 8 + 2 * 20 * 8) * 2, (12 * 8 + 20 * 8) * 2)


def test_damaged_and_missing_tensor_files(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="cut off"):
        hardware_fit.measure(folder)
    path.unlink()
    with pytest.raises(InputError, match="no .*safetensors"):
        hardware_fit.measure(folder)


@pytest.fixture
def pack(make_model, tmp_path: Path):
    """pack(tied, pattern) -> a packed folder: int4 linears in groups of 16 with adapters of rank 2, int8 embedding."""

    def make(tied: bool = True, pattern: str = "2:4") -> Path:
        model = make_model(tie_word_embeddings=tied)
        blocks = []
        for linears in families.linears_by_block(model):
            block = {}
            for name, linear in linears.items():
                coded = rounding.quantise(linear.weight.detach(), 4, 16)
                keep = torch.tensor([True, False, False, True]).repeat(linear.out_features, linear.in_features // 4)
                codes = coded.codes * keep if pattern == "2:4" else coded.codes
                block[name] = packed.Linear(
                    codes=(codes + 8).to(torch.uint8),
                    scales=coded.scales,
                    bits=4,
                    group_size=16,
                    keep=keep if pattern == "2:4" else None,
                    pattern=pattern,
                    adapter=(torch.ones(2, linear.in_features).half(), torch.ones(linear.out_features, 2).half()),
                )
            blocks.append(block)
        table, head = (model.get_submodule(name).weight.detach() for name in ("model.embed_tokens", "lm_head"))
        rest = {name: weight.detach().half() for name, weight in model.named_parameters() if "norm" in name}
        config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
        coded = rounding.quantise(table, 8, 32), None if tied else head.half()
        packed.save(packed.Model(config, blocks, *coded, rest), tmp_path / "packed")
        (tmp_path / "packed/tokenizer.json").write_text("{}" * 50, encoding="utf-8")
        return tmp_path / "packed"

    return make


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_folder_is_measured_by_its_description(pack, tied: bool) -> None:
    folder = pack(tied)
    files, components = hardware_fit.measure(folder), packed.component_bytes(folder)
    assert files.weights == (folder / "model.safetensors").stat().st_size
    assert files.weights + files.metadata == sum(path.stat().st_size for path in folder.iterdir())
    looked_up = 96 * 32 + 96 * 2  # codes of 8 bits, a scale per row
    assert files.streamed == sum(components.values()) - components["metadata"] - (0 if tied else looked_up)
    inputs_and_outputs = 4 * sum(sum(shape) for shape in families.linear_shapes(packed.config(folder)).values())
    assert files.adapter_parameters == 2 * inputs_and_outputs
    assert files.formats == tuple(sorted({"int4-group", "int8-channel"} | (set() if tied else {"fp16"})))
    assert files.pattern == (2, 4)


def test_a_packed_folder_without_a_pattern(pack) -> None:
    assert hardware_fit.measure(pack(pattern="dense")).pattern is None


class FakeStage:
    """The parts of tasks.stage.Stage that the stage uses, on given folders."""

    def __init__(self, folder: Path, inputs: dict[str, Path], **params: object) -> None:
        given = {"device": "siracusa", "context": 16, "batch": 1, "kv_bits": 16, "activation_bits": 16} | params
        self.params = SimpleNamespace(hardware_fit=SimpleNamespace(**given))
        self.inputs, self.folder = inputs, folder

    def input(self, name: str) -> Path:
        return self.inputs[name]

    def has_input(self, name: str) -> bool:
        return name in self.inputs

    def output(self, name: str) -> Path:
        return self.folder / name


def test_the_stage_writes_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = model_folder(tmp_path / "package" / "model", quantised=True)
    fetched = model_folder(tmp_path / "fetch" / "model")
    inputs = {"devices": PROFILES, "package/model": package, "fetch/model": fetched}
    hardware_fit.run(FakeStage(tmp_path, inputs))
    text = (tmp_path / "fit.json").read_text(encoding="utf-8")
    result = json.loads(text)
    assert (result["device"], result["verdict"], result["bytes_over"]) == ("siracusa", "FITS", 0)
    assert {row["device"] for row in result["all_devices"]} == set(shipped())
    own = next(row for row in result["all_devices"] if row["device"] == "siracusa")
    assert all(own[key] == result[key] for key in ("verdict", "limiting_term", "headroom_bytes", "tokens_per_second"))
    assert result["stored_bytes"] == sum(path.stat().st_size for path in package.iterdir())
    assert result["fetched"]["placement"][0]["items"]["weights"] == (20 * 8 + 12 * 8) * 2
    assert any("int4-group" in note for note in result["notes"])
    assert str(tmp_path) not in text
    assert len(capsys.readouterr().out.splitlines()) == 5
    hardware_fit.run(FakeStage(tmp_path, inputs))
    assert (tmp_path / "fit.json").read_text(encoding="utf-8") == text


def test_does_not_fit_is_a_result(tmp_path: Path) -> None:
    package = model_folder(tmp_path / "package" / "model")
    save_file({"padding": torch.zeros(2**20, dtype=torch.float32)}, package / "more.safetensors")
    hardware_fit.run(FakeStage(tmp_path, {"devices": PROFILES, "package/model": package}))
    result = json.loads((tmp_path / "fit.json").read_text(encoding="utf-8"))
    stored = sum(path.stat().st_size for path in package.iterdir())
    assert (result["verdict"], result["limiting_term"]) == ("DOES_NOT_FIT", "mram: weights")
    assert result["bytes_over"] == stored - 4 * 2**20 * 9 // 10
    assert "fetched" not in result


def test_switched_off(tmp_path: Path) -> None:
    hardware_fit.skip(FakeStage(tmp_path, {}))
    assert json.loads((tmp_path / "fit.json").read_text(encoding="utf-8")) == {"verdict": "NOT_CHECKED"}
