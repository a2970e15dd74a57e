"""The command's table of bytes, against `stat` and against the plan."""

import argparse
import json

import pytest

from tasks.algorithms.errors import InputError
from tasks.cli import size
from tasks.packed.layout import COMPONENTS
from tasks.packed.plan import Plan, planned_bytes
from tasks.packed.writer import save
from tests.support.packed_models import REALISTIC, realistic


def run(*words):
    """The command with these words."""
    parser = argparse.ArgumentParser()
    size.arguments(parser)
    size.main(parser.parse_args([str(word) for word in words]))


def test_the_table_of_a_packed_folder_has_its_bytes(tmp_path, capsys):
    save(realistic(rank=4), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    run(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*COMPONENTS, "content", "total"]
    assert int(lines[-1].split()[1]) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_the_table_of_a_config_has_the_plan_s_bytes(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(REALISTIC))
    for words, plan in (
        ("--bits 3 --pattern 2:4 --embedding-bits 8 --rank 4", Plan(bits=3, pattern="2:4", embedding_bits=8, rank=4)),
        ("--scale-steps 2 --asymmetric", Plan(distinct_scales=16, zeros=True)),
        ("--bits 3", Plan(bits=3)),
    ):
        run(tmp_path, *words.split())
        lines = capsys.readouterr().out.splitlines()
        assert int(lines[-1].split()[1]) == planned_bytes(REALISTIC, plan)
        run(tmp_path / "config.json", *words.split())
        assert capsys.readouterr().out.splitlines() == lines


def test_what_can_not_be_planned_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(REALISTIC))
    for words, message in (
        ("--group-size 7", "group_size = 7"),
        ("--bits 9", "bits = 9: input should be less than or equal to 8"),
        ("--pattern 2-4", "--pattern 2-4 is no pattern: expected keep:of"),
        ("--pattern 5:4", "--pattern 5:4 is no pattern"),
        ("--pattern unstructured --sparsity 2", "--sparsity 2 is no share of zeros"),
        ("--pattern unstructured --sparsity nan", "--sparsity nan is no share of zeros"),
        ("--rank -1", "rank = -1"),
        ("--scale-steps 0", "--scale-steps 0 is no number of steps"),
        ("--scale-steps -1", "--scale-steps -1 is no number of steps"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path, *words.split())
    with pytest.raises(InputError, match="name a packed folder"):
        run(tmp_path / "nothing.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        run(tmp_path)
