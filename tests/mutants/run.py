"""A mutation run: mutmut changes `training/methods` in small ways, and the tests of the methods must notice.

It works on a copy of the repository in a folder, which also holds the results. So an interrupted run continues, and
the next run tests mutants of changed functions and those that survived. Mutants that ran out of time run a second time,
because the machine may have been busy. `[tool.mutmut]` of `pyproject.toml` says which files are changed and which
tests run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import libcst as cst

ROOT = Path(__file__).parents[2]
COPIED = ("benchmarks", "export", "serving", "tdm_runtime", "tests", "training", "pyproject.toml")
MUTATED = Path("training/methods")
DETECTED = ("killed", "timeout", "segfault", "suspicious")
"""Results of mutants that no test run passes with. `suspicious` is an unusual exit code of pytest."""


class DecoratorsAfter(cst.CSTTransformer):
    """Rewrite of `@d` above `def f` as `f = d(f)` below it, because mutmut leaves out functions with decorators."""

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.FlattenSentinel[cst.BaseStatement]:
        if not updated_node.decorators:
            return updated_node
        decorated: cst.BaseExpression = updated_node.name
        for decorator in reversed(updated_node.decorators):
            decorated = cst.Call(decorator.decorator, [cst.Arg(decorated)])
        assignment = cst.Assign([cst.AssignTarget(updated_node.name)], decorated)
        plain = updated_node.with_changes(decorators=())
        return cst.FlattenSentinel([plain, cst.SimpleStatementLine([assignment])])


def update_copy(folder: Path) -> None:
    """Bring the copy up to date. Files that did not change keep their times, by which mutmut knows them."""
    for name in COPIED:
        source = ROOT / name
        files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if "__pycache__" not in p.parts)
        wanted = {file.relative_to(ROOT) for file in files if file.is_file()}
        for stale in {p.relative_to(folder) for p in (folder / name).rglob("*") if p.is_file()} - wanted:
            (folder / stale).unlink()
            (folder / "mutants" / stale).unlink(missing_ok=True)
        for path in wanted:
            content = content_of(path)
            target = folder / path
            if not target.is_file() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)


def content_of(path: Path) -> bytes:
    content = (ROOT / path).read_bytes()
    if path.parent == MUTATED:
        content = cst.parse_module(content).visit(DecoratorsAfter()).bytes
    return content


def mutmut(folder: Path, *arguments: str, capture: bool = False) -> str:
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    done = subprocess.run(command, cwd=folder, check=True, text=True, stdout=subprocess.PIPE if capture else None)
    return done.stdout if capture else ""


def results(folder: Path) -> dict[str, str]:
    """Return mutant -> result, or nothing before the first run."""
    if not (folder / "mutants").is_dir():
        return {}
    listed = mutmut(folder, "results", "--all", "true", capture=True)
    return dict(re.findall(r"^ +(\S+): (.+)$", listed, re.MULTILINE))


def print_table(found: dict[str, str]) -> None:
    by_file: dict[str, Counter[str]] = {}
    for name, result in found.items():
        by_file.setdefault(re.split(r"\.xǁ|\.x_", name)[0].replace(".", "/") + ".py", Counter())[result] += 1
    by_file["all"] = sum(by_file.values(), Counter())
    print(f"{'file':<36} {'mutants':>8} {'detected':>9} {'timeout':>8} {'survived':>9} {'rest':>5}")
    for file, counts in by_file.items():
        detected = sum(counts[result] for result in DETECTED)
        rest = counts.total() - detected - counts["survived"]
        columns = (counts.total(), detected, counts["timeout"], counts["survived"], rest)
        print(f"{file:<36} " + " ".join(f"{n:>{w}}" for n, w in zip(columns, (8, 9, 8, 9, 5), strict=True)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/mutants"), help="copy and results")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(arguments)
    run = ("run", "--max-children", str(args.processes))
    survived = {name for name, result in results(args.folder).items() if result == "survived"}
    update_copy(args.folder)
    mutmut(args.folder, *run)
    again = [name for name, result in results(args.folder).items() if result == "timeout" or name in survived]
    if again:
        mutmut(args.folder, *run, *again)
    found = results(args.folder)
    survivors = [name for name, result in found.items() if result not in DETECTED]
    diffs = [mutmut(args.folder, "show", name, capture=True) for name in survivors]
    (args.folder / "survivors.diff").write_text("\n".join(diffs), encoding="utf-8")
    print_table(found)
    print(f"{len(survivors)} changes that no test noticed: {args.folder / 'survivors.diff'}")


if __name__ == "__main__":
    main()
