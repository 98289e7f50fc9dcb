"""Tiny random configurations of transformers' models: what is known of them is found, certified and converted."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.example_modules import example
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.errors import NothingToConvertError
from manifold_nets.running import output_tensors
from manifold_nets.symmetry import exact_mode as certificate_module

# Groups of each invariant weight, by pattern; SYMMETRY: normalized heads, normalized projections, normalized outputs.
WHOLE = dict.fromkeys(("*.v_proj.weight", "*.o_proj.weight", "*.up_proj.weight", "*.down_proj.weight"), 1)
HEADS = {"*.q_proj.weight": 4, "*.k_proj.weight": 2}
EXPECTED: dict[str, dict[str, int]] = {
    "qwen3": HEADS,
    "olmo2": {**WHOLE, "*.q_proj.weight": 1, "*.k_proj.weight": 1},
    "gemma3": {**WHOLE, **HEADS},
    "llama": {},
    "llama, tied": {},
    "mistral": {},
    "mixtral": {},
    "gpt2": {},
    "bert": {},
    "t5": {},
    "vit": {},
    "swin": {"*.patch_embeddings.projection.weight": 1},
    "convnext": {"*.patch_embeddings.weight": 1, "*.dwconv.weight": 1},
    "wav2vec2": {"*.conv_layers.0.conv.weight": 16, "*.parametrizations.weight.original1": 16},
    "wav2vec2, stable": {"*.conv_layers.?.conv.weight": 1, "*.parametrizations.weight.original1": 16},
}
# Networks with many convolutions: how many weights are invariant.
COUNTS = {"segformer": 8, "mobilevit": 32, "regnet": 20}
QUICK = ("gemma3", "gpt2", "bert", "wav2vec2", "a tuple with a cache as the output")
EVAL_LIMIT = 1e-5  # float32, as in manifold_nets.conversion.verify
# Norms that cast to float32 round to it, in a network of a few layers.
BRUTE_FORCE_TOLERANCE = 1e2 * torch.finfo(torch.float32).eps
SHARP = 1e2 * torch.finfo(torch.float64).eps


def build(name: str) -> tuple[nn.Module, Any]:
    networks = example("networks", "transformers", "torchvision")
    torch.manual_seed(0)
    model, inputs = networks.transformers_network(name)
    return model, inputs


def expected_groups(name: str, weight: str) -> int | None:
    return next((n for pattern, n in EXPECTED[name].items() if fnmatchcase(weight, pattern)), None)


def cases(names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", cases([*EXPECTED, *COUNTS]))
def test_model_is_diagnosed_and_converted(name: str) -> None:
    model, inputs = build(name)
    report = mn.diagnose(model, inputs)
    assert not report.disagreements, str(report)
    assert not report.refuted_families
    assert not report.refuted_shifts
    assert report.unexplained_groups == 0
    found = {w.name: None if w.partition is None else w.partition.n_groups for w in report.weights}
    assert not [w.name for w in report.weights if w.status == "unknown"]
    if name in COUNTS:
        assert len(report.invariant) == COUNTS[name]
    else:
        assert found == {weight: expected_groups(name, weight) for weight in found}
    if not report.invariant:
        with pytest.raises(NothingToConvertError):
            mn.convert(model, report)
        return
    converted = mn.convert(model, report)
    assert len(mn.conversion_record(converted).plan.spheres) == len(report.invariant)
    assert mn.verify(model, converted, inputs).eval_difference <= EVAL_LIMIT


def output_change(model: nn.Module, inputs: Any, weight: str, mask: Tensor, factor: float) -> float:
    """Relative change of the logits when part of a weight is multiplied, at negligible eps."""
    plain = copy.deepcopy(model).double().eval()
    for module in plain.modules():
        for attribute in ("eps", "variance_epsilon"):
            if hasattr(module, attribute):
                setattr(module, attribute, 1e-30)
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        scaled.get_parameter(weight)[mask] *= factor
        before, after = plain(**inputs).logits, scaled(**inputs).logits
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", cases(["qwen3", "olmo2", "gemma3"]))
def test_scaling_a_found_group_leaves_the_logits_alone(name: str) -> None:
    """Brute force, independent of gradients and of the graph."""
    model, inputs = build(name)
    for finding in mn.diagnose(model, inputs).invariant:
        assert finding.partition is not None
        mask = finding.partition.group_ids() == finding.partition.n_groups - 1
        assert output_change(model, inputs, finding.name, mask, 3.7) <= BRUTE_FORCE_TOLERANCE


@pytest.mark.parametrize(("name", "leaf"), [("qwen3", "q_proj"), ("olmo2", "k_proj"), ("gemma3", "up_proj")])
def test_a_single_row_of_a_joint_group_is_noticed(name: str, leaf: str) -> None:
    """The sabotage twin of the test above: one row of a group by itself."""
    model, inputs = build(name)
    weight = next(n for n, _ in model.named_parameters() if leaf in n)
    row = torch.zeros_like(model.get_parameter(weight), dtype=torch.bool)
    row[0] = True
    with pytest.raises(AssertionError):
        assert output_change(model, inputs, weight, row, 3.7) <= BRUTE_FORCE_TOLERANCE


def largest_certificate(name: str) -> float:
    return max(w.certificate.value or 0.0 for w in mn.diagnose(*build(name)).weights if w.partition is not None)


@pytest.mark.parametrize("name", cases(["qwen3", "olmo2", "gemma3"]))
def test_norms_that_cast_to_float32_do_not_blunt_the_certificate(name: str) -> None:
    assert largest_certificate(name) <= SHARP


def test_a_cast_that_is_let_through_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin of the test above."""
    monkeypatch.setattr(certificate_module, "in_float64", contextlib.nullcontext)
    with pytest.raises(AssertionError):
        assert largest_certificate("gemma3") <= SHARP


FORMS = {
    "a tensor": lambda ids: ids,
    "positional, with a mask": lambda ids: ((ids,), {"attention_mask": torch.ones_like(ids)}),
    "a tuple with a cache as the output": lambda ids: {"input_ids": ids, "return_dict": False, "use_cache": True},
    "with labels": lambda ids: {"input_ids": ids, "labels": ids},
}


@pytest.mark.parametrize("form", cases(FORMS))
def test_inputs_and_outputs_of_every_form_give_the_same_findings(form: str) -> None:
    model, inputs = build("gemma3")
    report = mn.diagnose(model, FORMS[form](inputs["input_ids"]))
    assert {w.name: w.status == "invariant" for w in report.weights} == {
        w.name: expected_groups("gemma3", w.name) is not None for w in report.weights
    }
    assert model.config.use_cache is True


def test_a_cache_of_keys_and_values_is_no_output() -> None:
    model, inputs = build("qwen3")
    result = model(**inputs, use_cache=True)
    assert result.past_key_values is not None
    assert [tuple(t.shape) for t in output_tensors(result)] == [(3, 9, 64)]


@pytest.mark.slow
def test_the_experts_of_a_mixture_are_analysed_in_float64() -> None:
    """The product of grouped matrices has no float64; {embedding, o_proj, down_proj of the experts} are joint."""
    model, inputs = build("mixtral")
    report = mn.diagnose(model, inputs)
    assert model.config._experts_implementation == "grouped_mm"
    joint = {m.parameter for f in report.families if f.kind == "scale" and f.absorbed for m in f.members}
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.experts.down_proj"} <= joint
    routers = [w for w in report.weights if w.name.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    assert all("softmax" in str(w.broken_by) for w in routers)
    assert {w.certificate.verdict for w in report.weights} == {"not invariant"}


@pytest.mark.slow
def test_the_columns_of_a_tied_embedding_undo_no_scale() -> None:
    """The embedding would see them change; the certificate refuted such families."""
    report = mn.diagnose(*build("llama, tied"))
    assert {f.certificate.verdict for f in report.families} == {"invariant"}
    members = [m for f in report.families for m in f.members if m.parameter == "model.embed_tokens.weight"]
    assert [m.part for m in members] == ["rows"]


# A new process inherits the peak that `resource` tells from the one that starts it; VmHWM is its own.
PEAK = """
from pathlib import Path
print(*[line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")])
"""
BILLION = """
import sys
import torch
import manifold_nets as mn
mn.sources.import_torchvision()
import transformers
config = transformers.LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                                  num_attention_heads=32, num_key_value_heads=4)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
report = mn.diagnose(model, torch.randint(0, 32000, (2, 16)))
joint = max(report.families, key=lambda family: len(family.parameters))
print(sum(p.numel() for p in model.parameters()), len(report.weights), joint.kind, len(joint.parameters),
      sum(w.certificate.verdict == "no evidence" for w in report.weights))
"""


def printed_and_peak(script: str, folder: Path) -> tuple[list[str], int]:
    """What a script printed in a process of its own, and the most memory that this process held, in bytes."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("this system does not tell the peak of a process's memory")
    command = [sys.executable, "-W", "ignore", "-c", script + PEAK]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    *printed, kibibytes = done.stdout.split()
    return printed, int(kibibytes) * 2**10


@pytest.mark.slow
def test_a_billion_parameters_on_the_meta_device(tmp_path: Path) -> None:
    """{embedding, all o_proj, all down_proj} are one joint group; process and imports stay within 2 GiB."""
    example("networks", "transformers", "torchvision")
    printed, peak = printed_and_peak(BILLION, tmp_path)
    parameters, weights, kind, joined, silent = printed
    assert int(parameters) > 1e9
    assert weights == silent
    assert (kind, int(joined)) == ("scale", 1 + 2 * 22)
    assert peak < 2 * 2**30


def test_memory_that_is_given_back_counts_in_the_peak(tmp_path: Path) -> None:
    """The sabotage twin of the test above, at a small size."""
    size = 2**27
    assert printed_and_peak("", tmp_path)[1] < size
    with pytest.raises(AssertionError):
        assert printed_and_peak(f"b'1' * {size}", tmp_path)[1] < size
