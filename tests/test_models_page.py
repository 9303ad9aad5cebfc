"""What docs/models.md says is true where a machine can tell: names, files, links, and the options of its commands."""

from __future__ import annotations

import glob
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import pykernels
from bench import __main__ as bench
from kit.config import parse
from pykernels import models

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
TEXT = PAGE.read_text(encoding="utf-8")
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))
COMMANDS = [code for code in INLINE if code.startswith(("python ", "pytest "))]
COMMANDS += [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")]


def model_classes() -> list[str]:
    """Networks among the public names; those of the language models are classes only where transformers is there."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    public = ((name, getattr(models, name)) for name in models.__all__)
    return [name for name, value in public if isinstance(value, type) and issubclass(value, nn.Module)]


def test_every_model_has_a_row_and_a_command() -> None:
    classes = model_classes()
    assert len(classes) >= 11
    described = [row[2] for row in ROWS if len(row) == 8]
    reproduced = [row[0] for row in ROWS if len(row) == 2]
    for name in [*classes, "ChildTuningAdamW", "loraplus_param_groups"]:
        assert any(f"`{name}`" in cell for cell in described), f"{name} has no row"
        assert any(f"`{name}`" in cell for cell in reproduced), f"{name} has no command"


def test_names_exist() -> None:
    known = {*pykernels.__all__, *models.__all__}
    # A whole cell of classes or operators, which are nothing else.
    cells = [cell for row in ROWS if len(row) == 8 for cell in row[2:4]]
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 20 and not [name for name in names if name not in known]
    loose = [code for code in INLINE if re.fullmatch(r"[A-Z]\w+", code)]
    assert not [name for name in loose if name not in known]


def anchors(path: Path) -> set[str]:
    """GitHub's, of the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    articles = {target for target in targets if target.startswith("https://")}
    numbers = ("5409", "5716", "6671", "6906", "7292", "7718", "8764", "10001")
    assert articles == {f"https://kexue.fm/archives/{number}" for number in numbers}
    for target in set(targets) - articles:
        path, _, anchor = target.partition("#")
        assert (PAGE.parent / path).exists(), target
        assert not anchor or anchor in anchors(PAGE.parent / path), target
    assert "docs/models.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def check_example(script: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses with the example's own options, and its own checks of their values; nothing runs."""
    module = importlib.import_module(script.stem)
    parsed: list[Any] = []
    if hasattr(module, "run_example"):

        def only_parse(cls: type, work: object, argv: Any, *, script: str, **more: Any) -> int:
            parsed.append(parse(cls, argv, **more))
            return 0

        monkeypatch.setattr(module, "run_example", only_parse)
        assert module.main(argv) == 0 and len(parsed) == 1
    else:
        assert module.main(argv) == 2  # after the arguments: there is no such folder


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_commands_are_accepted(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)
    if words[0] == "pytest":
        text = (ROOT / words[1]).read_text(encoding="utf-8")
        assert words[2] == "-k" and f"def test_{words[3]}_" in text
        return
    if words[1:3] == ["-m", "bench"]:
        args = bench.parser().parse_args(words[3:])
        assert args.operator and set(args.operator) <= set(bench.operators())
        return
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(tmp_path)  # nothing may lie where a command looks for a trained model
    if words[1] == "-m":
        assert importlib.import_module(words[2]).main(words[3:]) == 2
        assert "does not exist" in capsys.readouterr().err
        return
    script = ROOT / words[1]
    assert script.is_file()
    check_example(script, words[2:], monkeypatch)


def test_there_are_commands_and_wrong_options_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert len(COMMANDS) > 20
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        check_example(ROOT / "examples/train_lm.py", ["--data", "x.json", "--epoch", "6"], monkeypatch)
    assert "--epoch" in capsys.readouterr().err


def test_files_that_it_names_exist() -> None:
    named = {word for command in COMMANDS for word in shlex.split(command) if word.endswith(".py")}
    assert named and all((ROOT / name).is_file() for name in named)
    examples = {Path(path).name for path in glob.glob(str(ROOT / "examples" / "train_*.py"))}
    assert examples <= {Path(name).name for name in named}, "every training example is on the page"


def test_speed_is_measured_of_every_model() -> None:
    from bench import bench_models

    cases = [case.name for case in bench_models.cases(quick=False)]
    for name in model_classes():
        if name != "GaussianMixture":  # no operator of ours in it
            assert any(case.startswith(f"{name} ") for case in cases), name
    assert {name.split()[0] for name in cases} >= {case.name.split()[0] for case in bench_models.cases(quick=True)}
