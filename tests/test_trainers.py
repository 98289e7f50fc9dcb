"""Lightning, Accelerate and transformers, interrupted and resumed from their own checkpoints: the same bits."""

import copy
import warnings

import pytest
import torch
from example_modules import example
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_avg_fn
from training_cases import check_same_path

import manifold_nets as mn
from manifold_nets.errors import OffManifoldError

# Libraries in the making warn about each other; what is compared here is numbers.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def digits():
    module = example("digits", "sklearn")
    torch.manual_seed(0)
    images = module.load_digits()["train"]
    return mn.convert(module.network(), images.x[:50]).train(), images


def test_lightning_resumes(tmp_path):
    run = example("train_with_lightning", "lightning", "sklearn")
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False, "default_root_dir": tmp_path}
    whole, parts, other = (digits()[0] for _ in range(3))
    run.lightning.Trainer(max_epochs=run.EPOCHS, **options).fit(run.Digits(whole), run.loader())
    first = run.lightning.Trainer(max_epochs=1, **options)
    first.fit(run.Digits(parts), run.loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    second = run.lightning.Trainer(max_epochs=run.EPOCHS, **options)
    second.fit(run.Digits(other), run.loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    check_same_path([weights(other)], [weights(whole)])
    with pytest.raises(AssertionError, match="off by"):
        check_same_path([weights(parts)], [weights(whole)])


def test_accelerate_resumes(tmp_path):
    accelerate = example("train_with_accelerate", "accelerate", "sklearn")

    def go_on(accelerator, model, optimizer, schedule, images, steps):
        for step in steps:
            rows = slice(50 * step, 50 * step + 50)
            accelerator.backward(cross_entropy(model(images.x[rows]), images.y[rows]))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return weights(model)

    def start():
        model, images = digits()
        accelerator = accelerate.Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, *accelerate.make(model)), images

    expected = go_on(*start(), range(10))
    begun = start()
    go_on(*begun, range(4))
    begun[0].save_state(str(tmp_path / "state"))
    resumed = start()
    resumed[0].load_state(str(tmp_path / "state"))
    check_same_path([go_on(*resumed, range(4, 10))], [expected])
    with pytest.raises(AssertionError, match="off by"):
        check_same_path([go_on(*start(), range(4, 10))], [expected])


def test_transformers_trainer_resumes(tmp_path):
    run = example("train_with_transformers", "transformers")

    def trainer(model, **changes):
        arguments = run.TrainingArguments(
            output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=run.BATCH, learning_rate=5e-3,
            train_sampling_strategy="sequential", use_cpu=True, report_to=[], logging_strategy="no",
            disable_tqdm=True, **changes,
        )  # fmt: skip
        return run.Trainer(model=model, args=arguments, train_dataset=run.Source(), optimizers=(run.make(model), None))

    whole, other = (run.convert(run.language_model()) for _ in range(2))
    trainer(whole, save_strategy="steps", save_steps=5).train()
    trainer(other, save_strategy="no").train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    check_same_path([weights(other)], [weights(whole)])
    assert max(mn.project(other).values()) < 4 * torch.finfo(torch.float32).eps
    assert len(mn.project(other)) == 4


def test_lightnings_average_warns_and_is_ours_once_it_is_projected(tmp_path):
    run = example("train_with_lightning", "lightning", "sklearn")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    (model, _), (plain, _) = digits(), digits()
    averaged = mn.optim.AveragedModel(plain, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = run.lightning.Trainer(
        max_epochs=1, callbacks=[EMAWeightAveraging(decay=0.9)], enable_checkpointing=False,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"model\.0\.weight.*manifold_nets\.project"):
        trainer.fit(run.Digits(model), run.loader())
    assert max(mn.project(model).values()) > 1e-4
    optimizer, _ = run.make(plain)
    for x, y in run.loader():
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()
        averaged.update_parameters(plain)
    check_same_path([weights(model)], [weights(averaged.module)], torch.finfo(torch.float32).eps)


def test_lightnings_stochastic_average_warns_where_a_step_would_change_the_function(tmp_path):
    run = example("train_with_lightning", "lightning", "sklearn")
    from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging

    class Projection(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.current_epoch == 4:
                projected.append(mn.project(module))

    projected = []
    for project in (False, True):
        model, _ = digits()
        averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
        trainer = run.lightning.Trainer(
            max_epochs=4, callbacks=[averaging, *([Projection()] if project else [])], accelerator="cpu",
            logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # In the pass that is to find running statistics only, Lightning takes a step at the end.
            trainer.fit(run.Digits(model), run.loader())
        found = [w for w in caught if "moved it off its spheres" in str(w.message)]
        assert bool(found) != project
    assert max(projected[0].values()) > 0.01


@pytest.mark.parametrize("kind", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_timms_averages_are_refused_until_they_are_projected(kind, tmp_path):
    example("networks", "timm", "torchvision")
    import timm.utils

    model, images = digits()
    average = getattr(timm.utils, kind)(model, decay=0.5)
    optimizer = mn.optim.RiemannianSGD(mn.param_groups(model), lr=0.1)
    for step in range(5):
        rows = slice(50 * step, 50 * step + 50)
        cross_entropy(model(images.x[rows]), images.y[rows]).backward()
        optimizer.step()
        average.update(model)
    averaged = average.ema if kind == "ModelEma" else average.module
    with pytest.raises(OffManifoldError, match=r"manifold_nets\.project\(model\)"):
        mn.save(averaged, tmp_path / "net.safetensors")
    # Into the converted network, as its user may do at the end.
    target = mn.convert(example("digits", "sklearn").network(), images.x[:50])
    target.load_state_dict(averaged.state_dict())
    before = copy.deepcopy(averaged)
    mn.project(averaged)
    mn.save(averaged, tmp_path / "net.safetensors")
    for other in (averaged, target):
        assert mn.verify(before, other, images.x[:50]).eval_difference <= 1e-5
