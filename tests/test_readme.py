"""What README.md shows runs as it is written."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    whole = names["gated_conv1d"](names["x"], names["weight"], names["bias"], dilation=2, padding="causal")
    assert torch.equal(names["y"], whole[:, -names["y"].shape[1] :]), "the last streamed chunk"
    assert all(layer.weight.grad is not None for layer in names["layers"])
    assert names["pooled"].shape == (8, 128) and torch.allclose(names["scores"].sum(1), torch.ones(8), atol=1e-5)
    assert all(p.grad is not None for p in names["pool"].parameters())
    assert names["out"].shape == names["q"].shape == (8, 300, 768)
    assert all(p.grad is not None for p in names["adapted"].parameters() if p.requires_grad)
    assert len(names["optimizer"].state) == 4 and (tmp_path / "adapter" / "adapter_config.json").exists()
