"""Models given back as files of other programs: batches, outputs of every form, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets import errors
from manifold_nets.conversion import export as exporting
from manifold_nets.conversion.export import export_model


class Net(nn.Module):
    """Convolutions and a normalization; outputs in a nested dictionary, one of them integer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout()

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
        y = self.drop(self.norm(self.conv(x)).relu())
        return {"maps": y, "heads": [y.mean((2, 3)) * scale, y.flatten(1).argmax(1)]}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)))
        return y


def trained(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = Net().to(dtype)
    net.norm.running_mean.uniform_(-1, 1)
    net.norm.running_var.uniform_(0.5, 2)
    return net


INPUTS = ((torch.randn(4, 2, 5, 5),), {"scale": torch.rand(4, 1)})


def run(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    if path.suffix == ".pt2":
        out = torch.export.load(path).module()(inputs[0], scale=inputs[1])
        return [out["maps"], *out["heads"]]
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, given)]


def check_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("file_format", ["onnx", "pt2"])
def test_nested_outputs_and_keyword_inputs(tmp_path: Path, file_format: Any) -> None:
    if file_format == "onnx":
        pytest.importorskip("onnxscript")
    converted = mn.convert(trained(), INPUTS)
    path = tmp_path / f"net.{file_format}"
    record = export_model(converted, path, INPUTS, format=file_format)
    assert record.batch == "any"
    assert record.reverted == 1
    assert record.file_difference is not None
    x, scale = torch.randn(7, 2, 5, 5), torch.rand(7, 1)
    out = trained().eval()(x, scale)
    expected = [out["maps"].detach(), out["heads"][0].detach(), out["heads"][1].detach()]
    check_close(run(path, (x, scale)), expected)
    expected[1] = expected[1] * 1.001
    with pytest.raises(AssertionError):
        check_close(run(path, (x, scale)), expected)


@pytest.mark.parametrize("inputs", [torch.randn(4, 2, 5, 5), torch.randn(1, 2, 5, 5)])
def test_the_batch_that_a_file_takes(tmp_path: Path, inputs: Tensor) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, -1) if x.shape[0] == 4 else x.flatten(1)

    record = export_model(Fixed(), tmp_path / "net.pt2", inputs, format="pt2")
    assert record.batch == inputs.shape[0]
    with pytest.raises(Exception, match=r"shape|Guard"):
        torch.export.load(tmp_path / "net.pt2").module()(torch.randn(6, 2, 5, 5))


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    converted = mn.convert(trained(), INPUTS).train()
    before = {name: value.clone() for name, value in converted.state_dict().items()}
    state = torch.get_rng_state()
    for file_format in ("safetensors", "pt2"):
        export_model(converted, tmp_path / "net", INPUTS, format=file_format)
    assert converted.training
    assert len(list(mn.constraints.constrained_weights(converted))) == 1
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(dtype)
    record = export_model(net, tmp_path / "net.pt2", torch.randn(4, 4, dtype=dtype), format="pt2")
    assert record.file_difference == 0
    if dtype == torch.bfloat16:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        with pytest.raises(errors.ExportError, match="Cast half precision"):
            export_model(net, tmp_path / "net.onnx", torch.randn(4, 4, dtype=dtype), format="onnx")
        assert not (tmp_path / "net.onnx").exists()


def test_tied_weights_are_written_once_and_read_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Tied()
    record = export_model(net, tmp_path / "net.safetensors", torch.randn(4, 4))
    assert record.file_difference == 0
    fresh = Tied()
    safetensors.torch.load_model(fresh, tmp_path / "net.safetensors")
    assert torch.equal(fresh.second.weight, net.first.weight)


def test_what_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(errors.ExportError, match=r"net\.pt2: torch\.export failed on the model"):
        export_model(Branching(), tmp_path / "net.pt2", torch.randn(4, 4), format="pt2")
    assert list(tmp_path.iterdir()) == []


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match="format"):
        export_model(trained(), tmp_path / "net", INPUTS, format="h5")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="folder"):
        export_model(trained(), tmp_path / "gone" / "net", INPUTS)
    with pytest.raises(errors.ExampleInputsError):
        export_model(trained(), tmp_path / "net", torch.randn(4, 2, 5, 5))
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_other_values_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.export.save

    def faulty(program: torch.export.ExportedProgram, stream: Any) -> None:
        program.state_dict["norm.bias"] = nn.Parameter(program.state_dict["norm.bias"] + 0.1)
        real(program, stream)

    monkeypatch.setattr(torch.export, "save", faulty)
    (tmp_path / "net.pt2").write_bytes(b"precious")
    with pytest.raises(errors.FunctionChangedError, match=r"net\.pt2.*No file was written\. .* the safetensors format"):
        exporting.export_model(trained(), tmp_path / "net.pt2", INPUTS, format="pt2")
    assert (tmp_path / "net.pt2").read_bytes() == b"precious"
    assert len(list(tmp_path.iterdir())) == 1
    record = exporting.export_model(trained(), tmp_path / "net.safetensors", INPUTS, format="safetensors")
    assert record.file_difference == 0.0
