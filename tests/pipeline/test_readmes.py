"""What the READMEs promise is there: links, headings, paths, commands with their options, stages, parameters.

Nothing that a README names is run; a command is held to the parser that would take it.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser

from tasks.cli import exit_codes
from tasks.cli.commands import COMMANDS
from tasks.cli.dispatch import Parser, WrongCall
from tests.support.paths import ROOT

FRONT = ROOT / "README.md"
DAG = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
PARAMETERS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
PROGRAMS = ("edgepress", "make", "dvc", "python", "pytest")
UNCHECKED = (".", "prefect")
"""Programs of code blocks whose arguments nothing here knows."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ASSIGNMENT = re.compile(r"[A-Z_]+=")


def git(*arguments: str) -> list[str]:
    """Lines that git prints, those of files that are not added yet included."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True, check=True)
    return done.stdout.splitlines()


NAMES = sorted(set(git("ls-files", "--cached", "--others", "--exclude-standard", "--", "*README.md")))
READMES = [ROOT / name for name in NAMES]
TOP = {name.partition("/")[0] for name in git("ls-files")}
each_readme = pytest.mark.parametrize("readme", READMES, ids=NAMES)


def without_blocks(readme: Path) -> str:
    return FENCE.sub("", readme.read_text(encoding="utf-8"))


def spans(readme: Path) -> list[str]:
    """What stands in backticks outside of code blocks, on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(readme))]


class Command(NamedTuple):
    """One command of a README. An inline one may leave out arguments that it needs."""

    readme: str
    words: tuple[str, ...]
    inline: bool

    def __str__(self) -> str:
        return f"{self.readme}: {' '.join(self.words)}"


def split(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of a shell line, without comments and settings of the environment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if token in (";", "&&"):
            if words:
                yield tuple(words)
            words = []
        elif words or not ASSIGNMENT.match(token):
            words.append(token)


def commands(readme: Path) -> Iterator[Command]:
    """Every command of a README's code blocks and backticks. Of a session the lines after a prompt."""
    name = str(readme.relative_to(ROOT))
    for language, block in FENCE.findall(readme.read_text(encoding="utf-8")):
        lines = block.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        elif language or not (lines[0].split()[0] in (*PROGRAMS, *UNCHECKED) or ASSIGNMENT.match(lines[0])):
            continue  # a table, a drawing, a file
        yield from (Command(name, words, inline=False) for line in lines for words in split(line))
    for span in spans(readme):
        words = re.sub(r"[\[\]]|\.\.\.|…", " ", span)
        if words.split()[:1] and words.split()[0] in PROGRAMS and " " in words.strip():
            yield from (Command(name, found, inline=True) for found in split(words))


SHOWN = [command for readme in READMES for command in commands(readme)]


def of(program: str) -> list[Command]:
    return [command for command in SHOWN if command.words[0] == program]


# the shape of the READMEs


def test_there_is_something_to_check() -> None:
    assert len(READMES) >= 20
    assert len(SHOWN) >= 100 and len(of("edgepress")) >= 50 and len(of("dvc")) >= 15
    assert len(of("make")) >= 8 and len(of("python")) >= 20
    assert sum(len(list(links(readme))) for readme in READMES) >= 60
    assert sum(len(list(paths(readme))) for readme in READMES) >= 100


def test_the_front_page_fits() -> None:
    lines = FRONT.read_text(encoding="utf-8").splitlines()
    assert 100 < len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("room", sorted(path.parent for path in ROOT.glob("tasks/*/__init__.py")), ids=lambda r: r.name)
def test_every_room_has_a_readme_that_the_rooms_table_links(room: Path) -> None:
    assert (room / "README.md").is_file()
    assert f"| [{room.name}]({room.name}/README.md) |" in (ROOT / "tasks/README.md").read_text(encoding="utf-8")


@each_readme
def test_a_readme_of_a_package_begins_as_its_docstring_does(readme: Path) -> None:
    module = readme.parent / "__init__.py"
    if not module.exists() or "tests" in module.relative_to(ROOT).parts:
        assert readme.parent.name in {ROOT.name, "data", "tests", "benchmarks"}
        return
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    first = re.match(r".*?\.(?=\s|$)", docstring, re.DOTALL)
    title, text = readme.read_text(encoding="utf-8").split("\n\n", 1)
    assert title == f"# {readme.parent.name}"
    assert first and " ".join(text.split()).startswith(" ".join(first[0].split()))


def test_the_front_page_names_every_room() -> None:
    tree = FENCE.findall(FRONT.read_text(encoding="utf-8"))[-1][1]
    rooms = {path.parent.name for path in ROOT.glob("tasks/*/README.md")}
    assert set(re.findall(r"(\w+)/(?= |\n)", tree)) - {"flows", "tasks", "data", "tests", "benchmarks"} == rooms


# links and paths


def links(readme: Path) -> Iterator[tuple[Path, str]]:
    """File and heading of every link that stays in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(readme)):
        if "://" not in target:
            file, _, heading = target.partition("#")
            yield ((readme.parent / file).resolve() if file else readme), heading


def headings(readme: Path) -> set[str]:
    """The anchors that GitHub gives to a file's headings."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(readme), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_readme
def test_every_link_leads_somewhere(readme: Path) -> None:
    for file, heading in links(readme):
        assert file.is_relative_to(ROOT) and file.exists(), file
        assert not heading or heading in headings(file), f"{file}#{heading}"


def paths(readme: Path) -> Iterator[str]:
    """What looks like a path from the root, up to its first placeholder: `data/evaluate/<model>/…` is data/evaluate."""
    for span in spans(readme):
        if re.fullmatch(r"[\w./<>*-]+", span) and span.partition("/")[0] in TOP:
            whole, placeholder, _ = span.partition("<")
            yield whole.rpartition("/")[0] if placeholder else whole.rstrip("/")


@functools.cache
def made() -> frozenset[str]:
    """The outputs of dvc.yaml and what others read of them, up to their first placeholder."""
    stages = DAG["stages"].values()
    outs = [out if isinstance(out, str) else next(iter(out)) for stage in stages for out in stage["outs"]]
    read = [dep for stage in stages for dep in stage["deps"] if any(dep.startswith(f"{out}/") for out in outs)]
    return frozenset(name.partition("${")[0].rstrip("/") for name in [*outs, *read, *DAG["metrics"]])


def written_by_commands(path: str) -> bool:
    """Whether what isn't a stage's (the registry, the scratch folder, this machine's profile) is named by the code."""
    code = "".join(file.read_text(encoding="utf-8") for file in [ROOT / ".dvcignore", *ROOT.glob("tasks/**/*.py")])
    return any(str(part) in code for part in [Path(path), *Path(path).parents] if len(part.parts) >= 2)


@each_readme
def test_every_path_exists_or_is_made_by_a_stage(readme: Path) -> None:
    for path in paths(readme):
        if "*" in path:
            assert any(ROOT.glob(path)) or any(fnmatch(out, path) for out in made()), path
            continue
        declared = any(f"{path}/".startswith(f"{out}/") or out.startswith(f"{path}/") for out in made())
        shown = (ROOT / path).exists() or declared or path.startswith(".dvc/tmp/")
        assert shown or (path.startswith("data/") and written_by_commands(path)), path


# the DAG


def test_the_front_page_draws_edges_of_the_dag_and_tells_every_stage() -> None:
    text = FRONT.read_text(encoding="utf-8")
    drawing = next(block for language, block in FENCE.findall(text) if language == "mermaid")
    edges = set()
    for line in drawing.splitlines()[1:]:
        groups = [group.split(" & ") for group in line.strip().split(" --> ")]
        edges |= {(a, b) for before, after in zip(groups, groups[1:], strict=False) for a in before for b in after}
    assert {stage for edge in edges for stage in edge} == set(DAG["stages"])
    assert len(edges) >= 30 and edges <= dependencies()
    rows = re.findall(r"^\| ([a-z_, ]+) \|", text.partition("```mermaid")[2], re.MULTILINE)
    assert {name for row in rows for name in row.split(", ")} - {"stage", "command"} == set(DAG["stages"])


def dependencies() -> set[tuple[str, str]]:
    """Which stage reads what which other one writes, the items of a matrix taken together."""
    edges = set()
    for name, stage in DAG["stages"].items():
        items = [str(item) for item in stage.get("matrix", {}).get("model", [])] or [""]
        for dependency in stage["deps"]:
            for item in items:
                path = dependency.replace("${item.model}", item)
                if path.startswith("${fetch."):
                    path = functools.reduce(lambda part, key: part[key], path[2:-1].split("."), PARAMETERS)
                edges |= {(other, name) for other in DAG["stages"] if path.startswith(f"data/{other}/")}
                edges |= {(other, name) for other in DAG["stages"] if path == f"data/{other}"}
    return {(before, after) for before, after in edges if before != after}


# commands


@pytest.mark.parametrize("command", [c for c in SHOWN if not c.inline], ids=str)
def test_a_command_of_a_code_block_is_of_a_program_that_is_checked(command: Command) -> None:
    assert command.words[0] in (*PROGRAMS, *UNCHECKED)


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_make_has_the_target(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in command.words[1:]:
        name, setting, _ = word.partition("=")
        assert re.search(rf"^{name} \?=" if setting else rf"^{name}:", makefile, re.MULTILINE), word


@pytest.mark.parametrize("command", of("dvc"), ids=str)
def test_dvc_takes_the_command_and_knows_its_stages_and_parameters(command: Command, caplog) -> None:
    given = parse(get_main_parser(), command, caplog)
    if given is None:
        return
    for stage in getattr(given, "targets", None) or []:
        assert stage in DAG["stages"], stage
    for setting in getattr(given, "set_param", None) or []:
        key = setting.partition("=")[0].split(".")
        functools.reduce(lambda part, name: part[name], key, PARAMETERS)  # KeyError: no such parameter


def parse(parser: argparse.ArgumentParser, command: Command, caplog) -> argparse.Namespace | None:
    """What a parser makes of a command; None where an inline one is cut short, whose options are looked up."""
    leaf = parser
    for word in command.words[1:]:
        choices = next((a.choices for a in leaf._actions if isinstance(a, argparse._SubParsersAction)), None)
        if not choices or word.startswith("-"):
            break
        assert word in choices, f"{command}: `{word}` is none of {', '.join(choices)}"
        leaf = choices[word]
    for word in command.words[1:]:
        assert not word.startswith("-") or word in leaf._option_string_actions, f"{command}: no option {word}"
    try:
        return parser.parse_args(command.words[1:])
    except (SystemExit, DvcParserError, WrongCall) as error:
        said = f"{error} {caplog.text}"  # DVC logs what it refuses
        assert command.inline and "arguments are required" in said, f"{command}: {said}"
        return None


def defined_options(module: Path) -> set[str]:
    """The options that a module, and the benchmarks' shared command line if it uses that, give to argparse."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    added = {call.args[0].value for call in calls if call.func.attr == "add_argument"}
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    shared = any(n.module.endswith(".table") and "main" in {a.name for a in n.names} for n in imported)
    return added | (defined_options(module.with_name("table.py")) if shared else set())


@pytest.mark.parametrize("command", of("python") + of("pytest"), ids=str)
def test_python_has_the_module_and_the_options_and_pytest_the_tests(command: Command) -> None:
    words = list(command.words if command.words[0] == "pytest" else command.words[2:])
    assert command.words[0] == "pytest" or command.words[1] == "-m"
    if words[0] == "pytest":
        folders = [word for word in words if word.startswith("tests")]
        assert folders and all((ROOT / folder).exists() for folder in folders)
        files = [file for folder in folders for file in (ROOT / folder).rglob("test_*.py")]
        keyword = words[words.index("-k") + 1] if "-k" in words else ""
        assert any(re.search(rf"def test\w*{keyword}", file.read_text(encoding="utf-8")) for file in files)
        return
    if words[0] in ("tasks", "flows.stage"):
        return  # the dispatcher, the same as `edgepress`; the command of dvc.yaml's stages
    assert words[0].startswith("tests.benchmarks.")
    options = defined_options(ROOT / f"{words[0].replace('.', '/')}.py")
    assert options and {word for word in words if word.startswith("-")} <= options


@functools.cache
def edgepress(name: str) -> Parser:
    """The parser of one command, as the dispatcher makes it."""
    parser = Parser(prog=f"edgepress {name}")
    importlib.import_module(COMMANDS[name].module).arguments(parser)
    return parser


@pytest.mark.parametrize("command", of("edgepress"), ids=str)
def test_edgepress_has_the_command_and_takes_its_arguments(command: Command, caplog) -> None:
    name, *words = command.words[1:]
    if name != "--help":
        numbers = ["0" if word == "PORT" else word for word in words]
        parse(edgepress(name), command._replace(words=(name, *numbers)), caplog)


def test_the_front_page_and_the_commands_page_name_every_command() -> None:
    for page in ("README.md", "tasks/cli/README.md"):
        named = {command.words[1] for command in of("edgepress") if command.readme == page}
        assert named - {"--help"} == set(COMMANDS), page


def test_the_exit_codes_are_those_of_the_commands() -> None:
    table = (exit_codes.__doc__ or "").partition("\n\n")[2].strip("\n")
    assert len(table) > 200 and table in (ROOT / "tasks/cli/README.md").read_text(encoding="utf-8")
