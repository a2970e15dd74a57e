"""params.yaml: the project's own is valid, each bad value has its sentence, its sections are the stages of dvc.yaml."""

import copy
import typing
from pathlib import Path

import pytest
import yaml

from tasks.algorithms.errors import InputError
from tasks.parameters import schema
from tests.support.paths import ROOT

RAW = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
REMOVED = object()


def changed(values: dict) -> dict:
    raw = copy.deepcopy(RAW)
    for key, value in values.items():
        *sections, last = key.split(".")
        place = raw
        for section in sections:
            place = place[section]
        if value is REMOVED:
            del place[last]
        else:
            place[last] = value
    return raw


def sentences(values: dict) -> list[str]:
    try:
        schema.parse(changed(values), "params.yaml")
    except InputError as error:
        return str(error).splitlines()
    return []


def test_the_project_s_own_file_is_valid() -> None:
    assert schema.load(ROOT / "params.yaml").model_dump() == RAW


def fields(model: type[schema.Section], prefix: str = "") -> typing.Iterator[tuple[str, typing.Any]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, schema.Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


FIELDS = dict(fields(schema.Params))
SECTIONS = tuple(name for name in schema.Params.model_fields if name not in schema.SHARED)


def test_fields_are_found() -> None:
    assert len(FIELDS) > 60 and len(SECTIONS) > 20 + len(schema.OPERATIONS)


def test_no_field_has_a_default() -> None:
    assert [key for key, field in FIELDS.items() if not field.is_required()] == []


@pytest.mark.parametrize("key", [*FIELDS, *SECTIONS])
def test_a_missing_parameter(key: str) -> None:
    assert sentences({key: REMOVED}) == [f"params.yaml: parameter `{key}` is missing"]


@pytest.mark.parametrize("key", FIELDS)
def test_a_value_of_the_wrong_type(key: str) -> None:
    wrong = 7.5 if key == "gptq.joint" else {"a": 1}  # joint is null or a section of its own
    (sentence,) = sentences({key: wrong})
    assert sentence.startswith(f"params.yaml: `{key}` = {wrong}: ")


@pytest.mark.parametrize(
    "section", ["", *(f"{section}." for section in SECTIONS), "lora.distillation.", "fetch.corpora.test."]
)
def test_an_unknown_key(section: str) -> None:
    (sentence,) = sentences({f"{section}rnak": 1})
    said, module = sentence.split(" against ")
    assert said == f"params.yaml: unknown parameter `{section}rnak`; check its spelling"
    named = schema.Params.model_fields[section.partition(".")[0]].annotation if section else schema.Params
    assert f"class {named.__name__}(Section):" in (ROOT / module).read_text(encoding="utf-8")


def out_of_range(key: str, value: object, expected: str) -> tuple[dict, str]:
    return {key: value}, f"params.yaml: `{key}` = {value!r}: {expected}"


ONE, ZERO = "input should be greater than or equal to 1", "input should be greater than or equal to 0"
ABOVE_ZERO, BELOW_ONE = "input should be greater than 0", "input should be less than 1"
BAD = [
    out_of_range("corpus.train_bytes", 0, ONE),
    out_of_range("nightly.cron", "at two", "string should match pattern '^\\S+( \\S+){4}$'"),
    (
        {"nightly.timezone": "Zurich"},
        "params.yaml: nightly.timezone: not a time zone of the IANA data base, such as UTC or Europe/Zurich",
    ),
    out_of_range("nightly.overlap", "kill", "input should be 'cancel' or 'queue'"),
    out_of_range("nightly.retention.nights", 0, ONE),
    out_of_range("gate.perplexity_ratio.test", 0.0, ABOVE_ZERO),
    out_of_range("gate.resamples", 99, "input should be greater than or equal to 100"),
    out_of_range("corpus.seed", -1, ZERO),
    out_of_range("corpus.seed", 2**31, "input should be less than 2147483648"),
    out_of_range("base_model.vocabulary", 100, "input should be greater than or equal to 300"),
    out_of_range("base_model.architecture", "gpt", "input should be 'llama' or 'gpt2'"),
    (
        {"base_model.architecture": "gpt2"},
        "params.yaml: base_model: `kv_heads` = 2: gpt2 has as many as `heads` (4)",
    ),
    out_of_range("base_model.warmup", 1.1, "input should be less than or equal to 1"),
    out_of_range("calibrate.windows", 0, ONE),
    out_of_range("calibrate.windows", 2.5, "input should be a valid integer"),
    out_of_range("calibrate.windows", "10", "input should be a valid integer"),
    out_of_range("calibrate.enabled", "yes", "input should be a valid boolean"),
    out_of_range("calibrate.length", 7, "input should be greater than or equal to 8"),
    out_of_range("importance.method", "taylr", "input should be 'magnitude', 'taylor'"),
    out_of_range("depth_prune.remove", -1, ZERO),
    out_of_range("depth_prune.schedule", "gready", "input should be 'one_shot' or 'greedy'"),
    out_of_range("wanda.method", "sparsegpt", "input should be 'wanda' or 'wanda_alpha'"),
    out_of_range("wanda.of", 64, "input should be less than or equal to 32"),
    out_of_range("wanda.sparsity", 1.0, BELOW_ONE),
    out_of_range("lora.rank", 0, ONE),
    out_of_range("lora.learning_rate", 0.0, ABOVE_ZERO),
    out_of_range("lora.learning_rate", float("nan"), "input should be a finite number"),
    out_of_range("lora.dropout", 1.0, BELOW_ONE),
    out_of_range("lora.targets", "all", "input should be 'all-linear', 'attention' or 'mlp'"),
    out_of_range("lora.distillation.temperature", 0.0, ABOVE_ZERO),
    out_of_range("lora.distillation.weight", 2.0, "input should be less than or equal to 1"),
    out_of_range("gptq.bits", 5, "input should be 2, 3, 4 or 8"),
    out_of_range("gptq.group_size", 48, "input should be -1, 16, 32, 64 or 128"),
    out_of_range("gptq.damp", 0.0, ABOVE_ZERO),
    out_of_range("eora.rank", -1, ONE),
    out_of_range("eora.teacher", "base", "input should be 'lora' or 'fetch'"),
    out_of_range("hardware_fit.device", "../x", "string should match pattern"),
    out_of_range("hardware_fit.kv_bits", 5, "input should be 4, 8, 16 or 32"),
    out_of_range("fetch.model.revision", "main", "string should match pattern '^[0-9a-f]{40}$'"),
    out_of_range("fetch.model.hub", "gpt2", "string should match pattern"),
    (
        {"wanda.keep": 4, "wanda.of": 4},
        "params.yaml: wanda: keep = 4 must be below of = 4: otherwise nothing is pruned",
    ),
    (
        {"wanda.keep": 5, "wanda.of": 4},
        "params.yaml: wanda: keep = 5 must be below of = 4: otherwise nothing is pruned",
    ),
    (
        {"wanda.of": 8},
        "params.yaml: wanda: keep = auto is a choice of 4, and of = 8: give a number, or set of to 4",
    ),
    ({"wanda.pattern": "n_m", "wanda.keep": None}, "params.yaml: wanda: pattern n_m needs `keep` and `of`"),
    (
        {"wanda.pattern": "unstructured", "wanda.sparsity": None},
        "params.yaml: wanda: pattern unstructured needs `sparsity`",
    ),
    ({"wanda.method": "wanda_alpha", "wanda.pattern": "n_m"}, "params.yaml: wanda: method wanda_alpha searches"),
    (
        {"fetch.model.hub": "a/b"},
        "params.yaml: fetch.model: `hub` and `revision` go together: name both, or leave both null",
    ),
    ({"fetch.corpora.test.split": "test"}, "params.yaml: fetch.corpora.test: a hub data set needs its `split`"),
    (
        {"evaluate.stride": 600, "evaluate.length": 512},
        "params.yaml: evaluate: stride = 600 above length = 512 would skip",
    ),
    out_of_range("kv_cache.residual", 6, "input should be a multiple of 4"),
    (
        {"kv_cache.bits": [4, 3]},
        "params.yaml: `kv_cache.bits.1` = 3: input should be 2, 4 or 8",
    ),
    (
        {"kv_cache.tokens": 511, "kv_cache.contexts": [512]},
        "params.yaml: kv_cache: tokens = 511 is less than one window of 512 of `contexts`",
    ),
    (
        {"kv_cache.residual": 128, "kv_cache.contexts": [256, 128]},
        "params.yaml: kv_cache: contexts has 128, of which residual = 128 leaves nothing to be read from a quantised",
    ),
    ({"calibrate.enabled": False}, "params.yaml: calibrate is switched off, but importance, wanda, gptq, eora need"),
    ({"importance.enabled": False}, "params.yaml: importance is switched off, but depth_prune needs its scores"),
    ({"gptq.enabled": False}, "params.yaml: gptq is switched off, but eora compensates its error: switch eora off too"),
    (
        {"gptq.enabled": False, "eora.enabled": False},
        "params.yaml: gptq is switched off, but qad trains its codes: switch qad off too",
    ),
    (
        {"importance.windows": 11, "calibrate.windows": 10},
        "params.yaml: importance.windows = 11 is above calibrate.windows = 10",
    ),
    (
        {"gptq.masked": False, "wanda.enforce": True},
        "params.yaml: gptq.masked = false breaks wanda's pattern: set wanda.enforce to false, too",
    ),
    (
        {"gptq.joint": {"keep": 2, "of": 4}, "wanda.enabled": True},
        "params.yaml: gptq.joint chooses the masks itself: switch wanda off",
    ),
    (
        {"gptq.joint": {"keep": 4, "of": 4}, "wanda.enabled": False},
        "params.yaml: gptq.joint: keep = 4 must be below of = 4: otherwise nothing is pruned",
    ),
    (
        {"gptq.joint": {"keep": 2, "of": 4}, "gptq.masked": False, "wanda.enforce": False, "wanda.enabled": False},
        "params.yaml: gptq: joint chooses masks, so it needs masked: true",
    ),
    (
        {"eora.rank": 4, "eora.budget_bytes": 1000},
        "params.yaml: eora: give either `rank` or `budget_bytes`, and null for the other",
    ),
    (
        {"eora.rank": None, "eora.budget_bytes": None},
        "params.yaml: eora: give either `rank` or `budget_bytes`, and null for the other",
    ),
    ({"harness.tasks": ["mmlu"]}, "params.yaml: `harness.tasks.0` = 'mmlu': input should be 'corpus', 'hellaswag'"),
    ({"harness.tasks": ["piqa", "piqa"]}, "params.yaml: harness: tasks = ['piqa', 'piqa'] names a task twice"),
    out_of_range("harness.tasks", [], "list should have at least 1 item"),
    out_of_range("harness.limit", 0, ONE),
    ({"harness_data.enabled": False}, "params.yaml: harness_data is switched off, but harness needs its documents"),
    out_of_range("gptq.act_order", True, "input should be 'none', 'descending' or 'group_aware'"),
    out_of_range("gptq.embedding.bits", 3, "input should be 4, 8 or 16"),
    out_of_range("gptq.scale_steps", 0, ONE),
    out_of_range("lora.distillation.hidden", -0.1, ZERO),
    out_of_range("registry.keep", 1, "input should be greater than or equal to 2"),
    out_of_range("registry.canary.share", 1.0, BELOW_ONE),
    out_of_range("registry.canary.confidence", 0.5, "input should be greater than 0.5"),
]


@pytest.mark.parametrize(("values", "sentence"), BAD, ids=lambda value: str(value)[:60])
def test_every_bad_value_has_its_sentence(values: dict, sentence: str) -> None:
    said = sentences(values)
    assert len(said) == 1 and said[0].startswith(sentence)


def test_every_problem_at_once() -> None:
    assert len(sentences({"lora.rank": 0, "gptq.bits": 5, "wnada": {}})) == 3


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read {path}: No such file or directory; run from the project's folder"),
        ("a: [", "{path} is not valid YAML: "),
        ("", "{path} holds nothing, expected one section per stage"),
        ("- a", "{path} holds list, expected one section per stage"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        schema.load(path)
    assert str(caught.value).startswith(sentence.format(path=path)) and "\n" not in str(caught.value)
