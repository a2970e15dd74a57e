"""Stage overlap: how much of the test and calibration texts stands in the text that recovery is trained on.

Two questions, each by evidence. *Was it copied?* Documents that stand in train word for word (white space apart), and
runs of `words` consecutive words (13: GPT-3's measure, Brown et al. 2020, appendix C), with the share of documents that
have such a run. *Is it the same domain?* A split is in-domain where it comes from the same source (the same file, or
the same hub data set and configuration), or where it shares at least `in_domain` times as many short runs
(`domain_words`) with train as train's own documents share with each other; the latter is measured on `sample` of them.

The number that says so stands in overlap.json beside the verdict. The text that the base model was trained on isn't
known, and so isn't searched. Train passes by document by document and may be of any size; the other splits are held.
It changes nothing and refuses nothing: what a leak means is for the gate of the nightly run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.algorithms.text import overlap
from tasks.runtime import files
from tasks.sources import json_lines

if TYPE_CHECKING:
    from tasks.parameters.source_sections import Overlap
    from tasks.runtime.stage import Stage

TRAIN = "train"
IN_DOMAIN, OUT_OF_DOMAIN = "in-domain", "out-of-domain"


def run(stage: Stage) -> None:
    """Write overlap.json."""
    folder, p = stage.input("corpora"), stage.params.overlap
    sources = json.loads(stage.input("source.json").read_text(encoding="utf-8"))["corpora"]
    splits = {path.stem: json_lines.read(path) for path in sorted(folder.glob("*.jsonl")) if path.stem != TRAIN}
    found = measure(folder / f"{TRAIN}.jsonl", splits, sources, p)
    _write(stage, found)
    for split, one in found["splits"].items():
        print(f"{split}: {one['domain']}, {one['because']}; {one['verbatim']} of {one['documents']} documents copied")


def skip(stage: Stage) -> None:
    """Say that nothing was measured."""
    _write(stage, {"measured": False, "splits": {}})


def measure(train: Path, splits: Mapping[str, list[str]], sources: Mapping[str, Any], p: Overlap) -> dict[str, Any]:
    """The content of overlap.json.

    Args:
        splits: documents by split.
        sources: of each corpus, train too, as source.json has them.
    """
    rows = sum(1 for _ in json_lines.documents(train))
    chosen = {index * rows // p.sample for index in range(p.sample)}
    sample = [text for index, text in enumerate(json_lines.documents(train)) if index in chosen]
    asked = [text for texts in splits.values() for text in texts]
    copies, domain = overlap.Search(asked, p.words), overlap.Search([*asked, *sample], p.domain_words)
    wanted = {_content(text) for text in asked}
    copied = set()
    for text in json_lines.documents(train):
        copies.add(text)
        domain.add(text)
        copied |= {_content(text)} & wanted
    own = overlap.share(domain, sample, least=2)  # in another document than the run's own
    found = {}
    for split, texts in splits.items():
        found[split] = _copies(copies, texts, copied)
        found[split] |= _domain(overlap.share(domain, texts), own, p.in_domain, same(sources[split], sources[TRAIN]))
    return {"measured": True, **p.model_dump(exclude={"enabled"}), "train": {"documents": rows, "own_share": own}} | {
        "splits": found
    }


def same(source: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """What two corpora have in common by their records in source.json, None if nothing that is known."""
    if source["sha256"] == other["sha256"]:
        return "the same text"
    if source["kind"] == other["kind"] == "hub":
        keys = ("hub", "config")
        if all(source.get(key) == other.get(key) for key in keys):
            return "data set " + " ".join(source[key] for key in keys if source.get(key))
    elif source.get("path") and (source["path"], source["field"]) == (other.get("path"), other["field"]):
        return f"file {source['path']}"
    return None


def _copies(search: overlap.Search, texts: list[str], copied: set[bytes]) -> dict[str, Any]:
    verbatim = sum(_content(text) in copied for text in texts)
    dirty = sum(bool(search.found(text).any()) for text in texts)
    return {
        "documents": len(texts),
        "verbatim": verbatim,
        "verbatim_share": verbatim / len(texts),
        "contaminated": dirty,
        "contaminated_share": dirty / len(texts),
        "run_share": overlap.share(search, texts),
    }


def _domain(share: float | None, own: float | None, limit: float, source: str | None) -> dict[str, Any]:
    similarity = share / own if share is not None and own else None
    measured = "too little text to compare" if similarity is None else f"similarity {similarity:.3f}, limit {limit:g}"
    inside = source is not None or (similarity is not None and similarity >= limit)
    return {
        "same_source": source,
        "domain_share": share,
        "similarity": similarity,
        "domain": IN_DOMAIN if inside else OUT_OF_DOMAIN,
        "because": f"{source} as train" if source else measured,
    }


def _content(text: str) -> bytes:
    """A document's words as they are, as a hash."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _write(stage: Stage, found: dict[str, Any]) -> None:
    files.write_json(stage.output("overlap.json"), found)
