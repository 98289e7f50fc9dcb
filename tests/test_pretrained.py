"""Models of transformers from folders: named by the folder alone they are diagnosed, converted and read back."""

from __future__ import annotations

import copy
import errno
import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from torch import nn

import manifold_nets as mn
from manifold_nets import errors
from manifold_nets.cli import main
from manifold_nets.sources import guess_inputs, load_model, load_pretrained, save_pretrained

pytest.importorskip("transformers")

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGES = {**_VISION, "image_size": 32, "patch_size": 8}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_SOUND = {
    **_VISION, "vocab_size": 20, "conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_WHISPER = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 16,
    "max_source_positions": 50, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
# Name → class of the model, arguments of its configuration, inputs that it takes.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ResNet": ("ResNetForImageClassification", {**_STAGES, "embedding_size": 8, "layer_type": "basic"}, "pixel_values"),
    "ConvNext": ("ConvNextForImageClassification", {**_STAGES, "image_size": 64}, "pixel_values"),
    "ViT": ("ViTForImageClassification", _IMAGES, "pixel_values"),
    "Swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        "pixel_values",
    ),
    "Bert": ("BertForMaskedLM", _TEXT, "input_ids attention_mask"),
    "GPT2": (
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "eos_token_id": 2},
        "input_ids attention_mask",
    ),
    "Llama": ("LlamaForCausalLM", _DECODER, "input_ids attention_mask"),
    "Qwen3": ("Qwen3ForCausalLM", _DECODER, "input_ids attention_mask"),
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
        "input_ids attention_mask decoder_input_ids",
    ),
    "Wav2Vec2": ("Wav2Vec2ForCTC", _SOUND, "input_values"),
    "Whisper": ("WhisperForConditionalGeneration", _WHISPER, "input_features decoder_input_ids"),
    "CLIP": (
        "CLIPModel",
        {"text_config": _TEXT, "vision_config": _IMAGES, "projection_dim": 16},
        "input_ids attention_mask pixel_values",
    ),
}  # fmt: skip
EVAL_LIMIT = 1e-5  # float32, as in manifold_nets.conversion.verify


Written = tuple[Path, nn.Module, nn.Module, dict[str, torch.Tensor]]


def transformers() -> Any:
    mn.sources.import_torchvision()  # transformers imports it as well, where it is installed
    return importlib.import_module("transformers")


def written(name: str, folder: Path) -> nn.Module:
    """Write a tiny random model of a kind to a folder, as anybody does."""
    class_name, settings, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers(), class_name)(getattr(transformers(), f"{name}Config")(**settings))
    model.save_pretrained(folder)
    return model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="manifold-nets")


def document(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def check_same_values(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def manifolds(model: nn.Module) -> dict[str, Any]:
    return {weight.name: weight.manifold.to_dict() for weight in mn.constraints.constrained_weights(model)}


def check_folder(folder: Path, made: nn.Module, plain: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """A folder gives `from_pretrained` the values of the model that was converted in memory, and us its spheres."""
    reread = type(plain).from_pretrained(folder)
    assert not manifolds(reread)
    check_same_values(mn.revert(made), reread)
    assert mn.verify(plain, reread, inputs).eval_difference <= EVAL_LIMIT
    converted = load_model(f"hf:{folder}")
    check_same_values(made, converted)
    assert manifolds(converted) == manifolds(made)
    assert mn.verify(converted, reread, inputs).eval_difference == 0
    return len(manifolds(converted))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_diagnosed_converted_and_read_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command each; the values and the function that `from_pretrained` reads are the converted model's."""
    made: list[nn.Module] = []

    def keep_and_save(model: nn.Module, folder: Path) -> None:
        made.append(copy.deepcopy(model))
        save_pretrained(model, folder)

    monkeypatch.setattr(mn.sources, "save_pretrained", keep_and_save)
    written(name, tmp_path / "plain")
    report = document("diagnose", f"hf:{tmp_path / 'plain'}")["report"]
    done = document("convert", f"hf:{tmp_path / 'plain'}", "--remedies", "all", "--output", f"{tmp_path / 'out'}/")
    difference = done["verification"]["eval_difference"]
    assert difference <= EVAL_LIMIT
    plain = getattr(transformers(), MODELS[name][0]).from_pretrained(tmp_path / "plain")
    inputs = guess_inputs(plain)
    assert list(inputs) == MODELS[name][2].split()
    spheres = check_folder(tmp_path / "out", made[0], plain, inputs)
    acted = [action for action in done["plan"]["actions"] if action["action"] != "leave"]
    families = sum(family["certificate"]["verdict"] == "invariant" for family in report["families"])
    with capsys.disabled():
        row = (name, report["summary"].get("invariant", 0), families, len(acted), spheres, f"{difference:.1e}")
        print("\n| " + " | ".join(map(str, row)) + " |", end=" ")  # noqa: T201


@pytest.fixture
def converted(tmp_path: Path) -> Written:
    """A folder of a small converted model, this model, the plain one, and inputs."""
    plain = written("Qwen3", tmp_path / "plain").eval()
    inputs = guess_inputs(plain)
    made = mn.convert(plain, inputs)
    save_pretrained(made, tmp_path / "out")
    return tmp_path / "out", made, plain, inputs


def test_the_checks_of_a_folder_can_fail(converted: Written) -> None:
    folder, made, plain, inputs = converted
    assert check_folder(*converted) == 4
    # A folder that fits itself, of a model that differs in the last bit of one value.
    other = copy.deepcopy(made)
    head = other.get_parameter("lm_head.weight").detach()
    head[0, 0] = torch.nextafter(head[0, 0], torch.tensor(torch.inf))
    save_pretrained(other, folder)
    assert manifolds(load_model(f"hf:{folder}")) == manifolds(made)
    with pytest.raises(AssertionError, match=r"lm_head\.weight"):
        check_folder(*converted)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0] += 1
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError):
        check_folder(folder, made, plain, inputs)
    with pytest.raises(errors.CheckpointFormatError, match="delete this file to load them as a plain model"):
        load_model(f"hf:{folder}")
    (folder / "manifold_nets.json").unlink()
    assert not manifolds(load_model(f"hf:{folder}"))


def test_a_damaged_conversion_is_named(converted: Written) -> None:
    folder, _, plain, _ = converted
    for text in ("", "{}", "[]", '{"aliases": {}, "checksum": "", "removed_biases": 3}'):
        (folder / "manifold_nets.json").write_text(text)
        with pytest.raises(errors.CheckpointFormatError, match=r"manifold_nets\.json"):
            load_pretrained(plain, folder)


def test_a_model_that_lost_its_spheres_leaves_a_plain_folder(
    converted: Written,
) -> None:
    folder, _, plain, _ = converted
    save_pretrained(plain, folder)
    assert not (folder / "manifold_nets.json").exists()
    check_same_values(load_model(f"hf:{folder}"), plain)
    with pytest.raises(errors.CheckpointError, match="Linear has no save_pretrained"):
        save_pretrained(nn.Linear(2, 2), folder)


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    class Net(nn.Sequential):
        room = True

        def save_pretrained(self, folder: str) -> None:
            torch.save(self.state_dict(), f"{folder}/weights.pt")
            if not Net.room:
                raise OSError(errno.ENOSPC, "No space left on device")

    net = Net(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    converted = mn.convert(net, torch.randn(16, 4))
    save_pretrained(converted, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"weights.pt", "manifold_nets.json"}
    Net.room = False
    with torch.no_grad():
        converted[2].weight.zero_()
    with pytest.raises(errors.OutputFileError, match="No space left"):
        save_pretrained(converted, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_folder_that_is_read_is_not_written(tmp_path: Path) -> None:
    written("Qwen3", tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    refused = run("convert", f"hf:{tmp_path}", "--output", f"{tmp_path}/")
    assert refused.exit_code == 2
    assert "name the same folder" in " ".join(refused.stderr.replace("│", " ").split())
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---- which class -----------------------------------------------------------------------------------------------------


def test_the_class_is_the_configurations_or_the_one_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written("Bert", tmp_path)
    spec = f"hf:{tmp_path}"
    assert type(load_model(spec)).__name__ == "BertForMaskedLM"
    assert type(load_model(spec, class_name="AutoModelForMaskedLM")).__name__ == "BertForMaskedLM"
    assert type(load_model(spec, class_name="BertModel", kwargs={"add_pooling_layer": False})).__name__ == "BertModel"
    with pytest.raises(errors.ModelNotFoundError, match=r"no class 'BertForMaskedML'. Near matches: .*BertForMaskedLM"):
        load_model(spec, class_name="BertForMaskedML")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "architectures": None}))
    with caplog.at_level(logging.WARNING, logger="manifold_nets"):
        assert type(load_model(spec, kwargs={"add_pooling_layer": False})).__name__ == "BertModel"
    assert "config.json names no architecture; took AutoModel" in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:{}/nothing", "there is no folder"),
        ("hf:{}", "no configuration could be read"),
        ("timm:local-dir:{}", "has no config.json"),
    ],
)
def test_a_folder_that_is_none_is_named(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ModelNotFoundError, match=message):
        load_model(spec.format(tmp_path))


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(errors.ModelNotFoundError, match=r"transformers is not installed.*manifold_nets\[hf\]"):
        load_model("hf:org/name")


def test_a_class_belongs_to_transformers() -> None:
    with pytest.raises(errors.ModelSpecError, match="Leave out the class"):
        load_model("torch.nn:Linear", class_name="AutoModel")
    result = run("diagnose", "torch.nn:Linear", "--class", "AutoModel", "--input-shape", "3")
    assert result.exit_code == 2
    assert "--class works only with hf: models" in result.stderr


# ---- example inputs --------------------------------------------------------------------------------------------------


_SMALL_BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 12,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
# Models that ask for something more: as many ends in every text, frames, spectra, or an image beside a text.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "BartForSequenceClassification": (
        _SMALL_BART, {"input_ids": (12,), "attention_mask": (12,), "decoder_input_ids": (12,)},
    ),
    "ViltModel": (
        {**_TEXT, **_IMAGES}, {"input_ids": (16,), "attention_mask": (16,), "pixel_values": (3, 32, 32)},
    ),
    "VideoMAEModel": ({**_IMAGES, "num_frames": 4}, {"pixel_values": (4, 3, 32, 32)}),
    "ASTModel": ({**_VISION, "max_length": 64, "num_mel_bins": 32}, {"input_values": (64, 32)}),
    "Speech2TextForConditionalGeneration": (
        {**_SMALL_BART, "input_feat_per_channel": 8, "conv_channels": 16},
        {"input_features": (100, 8), "decoder_input_ids": (12,)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_takes_what_is_guessed(name: str) -> None:
    settings, shapes = SHAPES[name]
    model_class = getattr(transformers(), name)
    model = model_class(model_class.config_class(**settings))
    inputs = guess_inputs(model, batch_size=2)
    assert {key: tuple(value.shape) for key, value in inputs.items()} == {k: (2, *v) for k, v in shapes.items()}
    model.eval()(**inputs)


def test_shapes_and_tokens_that_are_given_replace_the_guess(tmp_path: Path) -> None:
    model = written("CLIP", tmp_path)
    inputs = guess_inputs(model, batch_size=2, shapes=[(7,)], token_ids=5)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (2, 7),
        "attention_mask": (2, 7),
        "pixel_values": (2, 3, 32, 32),
    }
    assert inputs["input_ids"].max() < 5
    assert (guess_inputs(model)["input_ids"][:, -1] == 2).all(), "a text ends with its end"
    with pytest.raises(errors.ExampleInputsError, match="3 shapes; the model takes input_ids, pixel_values"):
        guess_inputs(model, shapes=[(7,)] * 3)
    with pytest.raises(errors.ExampleInputsError, match="nothing in Linear tells what it takes"):
        guess_inputs(nn.Linear(2, 2), shapes=[(2,)])


def test_what_export_writes_of_a_language_model_has_no_cache(tmp_path: Path) -> None:
    """The outputs of the file are the logits alone, and the model on disk keeps its settings."""
    written("GPT2", tmp_path / "plain")
    document("export", f"hf:{tmp_path / 'plain'}", "--output", tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    assert len(program.graph_signature.user_outputs) == 1
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["use_cache"] is True


def test_without_the_setting_the_file_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignore: Callable[[nn.Module], None] = lambda model: None  # noqa: E731
    monkeypatch.setattr("manifold_nets.conversion.export.disable_cache", ignore)
    written("GPT2", tmp_path / "plain")
    result = run("export", f"hf:{tmp_path / 'plain'}", "--output", tmp_path / "net.pt2", "--json")
    assert result.exit_code == 1 or len(torch.export.load(tmp_path / "net.pt2").graph_signature.user_outputs) > 1


def test_a_folder_of_timm_has_weights_and_inputs_of_its_own(tmp_path: Path) -> None:
    mn.sources.import_torchvision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    timm.models.save_for_hf(model, tmp_path, model_config={"num_classes": 5})
    for spec in (f"timm:{tmp_path}", f"timm:local-dir:{tmp_path}"):
        check_same_values(load_model(spec), model)
    assert guess_inputs(model, batch_size=2)["x"].shape == (2, *model.pretrained_cfg["input_size"])
