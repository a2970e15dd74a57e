"""The table of all commands of `edgepress`: the name, what it does in a line, and the module that is imported for it.

A command's module has two functions: `arguments(parser)` declares what it takes, `main(given)` does it, prints the
answer and returns the exit code (None: 0). Modules are text here: `edgepress --help` imports none of them, and what is
in flows/ stays out of the imports of tasks/, as it needs Prefect.
"""

from __future__ import annotations

from typing import NamedTuple

from tasks.cli import exit_codes


class Command(NamedTuple):
    """A command.

    Attributes:
        help: one line, as the list of commands shows it.
        group: heading of the list that it stands below.
        refused, wrong_call: its exit codes where it refuses, and where it was called wrongly.
        told: it tells what the machine refuses itself; any other error is a mistake and keeps its traceback.
        project: it runs in the project's folder, wherever below it is called.
    """

    name: str
    group: str
    help: str
    module: str
    refused: int = exit_codes.REFUSED
    wrong_call: int = exit_codes.WRONG_CALL
    told: bool = False
    project: bool = True


PIPELINE, MODEL, EVIDENCE, REGISTRY, NIGHTS, PROJECT = (
    "pipeline",
    "a model folder",
    "what a run has shown",
    "registry of models",
    "every night",
    "the project itself",
)
COMMANDS = {
    command.name: command
    for command in (
        Command("run", PIPELINE, "run the DAG as a Prefect flow, then print table and verdict", "flows.run"),
        Command("stage", PIPELINE, "run one stage, as dvc.yaml does", "flows.stage", told=True),
        Command("status", PIPELINE, "which stages are up to date, and what runs now", "tasks.cli.status"),
        Command("report", PIPELINE, "the report's table and verdict", "tasks.cli.report"),
        Command("mend", PIPELINE, "put right what a kill or a failing disk left behind", "tasks.cli.mend"),
        Command(
            "fit",
            MODEL,
            "whether it fits a device, and what would make it fit",
            "tasks.cli.fit",
            refused=exit_codes.FIT_REFUSED,
            wrong_call=exit_codes.FIT_REFUSED,
            project=False,
        ),
        Command(
            "size", MODEL, "its bytes by what they are for, and the least possible", "tasks.cli.size", project=False
        ),
        Command(
            "profile", MODEL, "measure this machine as a device that `fit` can take", "tasks.cli.profile", project=False
        ),
        Command("export", MODEL, "write it for ONNX Runtime GenAI or llama.cpp", "tasks.cli.export", project=False),
        Command("compare", EVIDENCE, "what differs between two versions or revisions", "tasks.cli.compare"),
        Command("gate", EVIDENCE, "judge a revision by the gate's limits", "tasks.cli.gate"),
        Command("attribution", EVIDENCE, "what each stage changed: perplexity, bytes, speed", "tasks.cli.attribution"),
        Command(
            "lineage",
            EVIDENCE,
            "who made an artifact, from what; hash all of it again",
            "tasks.cli.lineage",
            refused=exit_codes.LINEAGE_REFUSED,
        ),
        Command(
            "verify",
            EVIDENCE,
            "whether what is on disk is what a commit names",
            "tasks.cli.verify",
            refused=exit_codes.VERIFY_REFUSED,
        ),
        Command("registry", REGISTRY, "list, promote, roll back and verify versions", "tasks.cli.registry"),
        Command("canary", REGISTRY, "a candidate with a share of the requests", "tasks.cli.canary"),
        Command(
            "update",
            REGISTRY,
            "signed updates from one version's folder to another's",
            "tasks.cli.update",
            project=False,
        ),
        Command("night", NIGHTS, "serve the schedule, run one night, list or apply them", "flows.schedule"),
        Command("ui", NIGHTS, "serve the Prefect UI of this project", "flows.server.ui"),
        Command("retention", NIGHTS, "remove what nights left and nobody needs", "flows.retention"),
        Command("notify", NIGHTS, "tell the nights' verdicts to a webhook or by e-mail", "flows.notification"),
    )
}
GROUPS = tuple(dict.fromkeys(command.group for command in COMMANDS.values()))
