"""List the code that each of the other stages needs, file by file with its hash: data/code/NAME.json.

It looks at all of tasks/ after every edit, for less than a second, so that DVC runs again only those stages whose own
code changed. What counts as a stage's code: `tasks.runtime.code`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.runtime import code, files

if TYPE_CHECKING:
    from tasks.runtime.stage import Stage


def run(stage: Stage) -> None:
    """Write a list for every other stage."""
    tasks, folder = stage.input("tasks"), stage.output("code")
    folder.mkdir()
    names = sorted(path.stem for path in tasks.glob("*.py") if not path.stem.startswith("__"))
    names.remove(code.STAGE)
    for name in names:
        files.write_json(folder / f"{name}.json", code.listing(name, tasks.parent))
    print(f"the code of {len(names)} stages is listed")
