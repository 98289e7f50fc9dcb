"""Lightning, Accelerate and transformers, interrupted and resumed from their own checkpoints: the same bits."""

import copy
import warnings

import pytest
import torch
from helpers.example_modules import example
from helpers.training_cases import check_same_path
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import get_ema_avg_fn

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


def made(run, model):
    """Lightning's module of a converted model, with an optimizer and a scheduler."""
    return run.Digits(model, *run.make(mn.revert(model), model))


def test_lightning_resumes(tmp_path):
    run = example("train_with_lightning", "lightning", "sklearn")
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False, "default_root_dir": tmp_path}
    whole, parts, other = (digits()[0] for _ in range(3))
    run.lightning.Trainer(max_epochs=run.EPOCHS, **options).fit(made(run, whole), run.loader())
    first = run.lightning.Trainer(max_epochs=1, **options)
    first.fit(made(run, parts), run.loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    second = run.lightning.Trainer(max_epochs=run.EPOCHS, **options)
    second.fit(made(run, other), run.loader(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
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
        return accelerator, *accelerator.prepare(model, *accelerate.make(mn.revert(model), model)), images

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
        return run.Trainer(
            model=model,
            args=arguments,
            train_dataset=run.Source(),
            optimizers=(run.make(mn.revert(model), model), None),
        )

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
        trainer.fit(made(run, model), run.loader())
    assert max(mn.project(model).values()) > 1e-4
    optimizer, _ = run.make(mn.revert(plain), plain)
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
            trainer.fit(made(run, model), run.loader())
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


# ---- plain checkpoints that go on converted --------------------------------------------------------------------------


def check_goes_on(found, expected, fresh):
    """The logits of a run that went on converted are those of the plain run, up to eps and rounding.

    Without the state of the plain optimizer they are not.
    """

    def off(logits):
        return float((logits - expected).norm() / expected.norm())

    assert off(found) < 0.02
    assert off(fresh) > 3 * off(found)


def test_a_plain_checkpoint_of_lightning_goes_on_converted(tmp_path):
    run = example("train_with_lightning", "lightning", "sklearn")
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False, "default_root_dir": tmp_path}

    def plain_run():
        torch.manual_seed(0)
        model = example("digits", "sklearn").network().train()
        sgd = torch.optim.SGD(mn.param_groups(model, weight_decay=5e-4), lr=0.05, momentum=0.9)
        return model, sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, run.EPOCHS)

    def logits(model):
        return model.train()(digits()[1].x[:200]).detach()

    plain = plain_run()
    run.lightning.Trainer(max_epochs=run.EPOCHS, **options).fit(run.Digits(*plain), run.loader())
    begun = plain_run()
    first = run.lightning.Trainer(max_epochs=1, **options)
    first.fit(run.Digits(*begun), run.loader())
    first.save_checkpoint(tmp_path / "one.ckpt")

    checkpoint, results = torch.load(tmp_path / "one.ckpt", weights_only=False), []
    for with_state in (True, False):
        model, sgd, schedule = plain_run()
        model.load_state_dict({k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()})
        if with_state:
            sgd.load_state_dict(checkpoint["optimizer_states"][0])
            schedule.load_state_dict(checkpoint["lr_schedulers"][0])
        converted = mn.convert(model, digits()[1].x[:50])
        optimizer = mn.optim.from_torch(sgd, model, converted, scheduler=schedule)
        rest = run.lightning.Trainer(max_epochs=run.EPOCHS - 1, **options)
        rest.fit(run.Digits(converted, optimizer, schedule), run.loader())
        results.append(logits(converted))
    check_goes_on(results[0], logits(plain[0]), results[1])


def test_a_plain_checkpoint_of_accelerate_goes_on_converted(tmp_path):
    accelerate = example("train_with_accelerate", "accelerate", "sklearn")
    images = digits()[1]

    def plain_run():
        torch.manual_seed(0)
        model = example("digits", "sklearn").network().train()
        adam = torch.optim.AdamW(mn.param_groups(model, weight_decay=5e-2), lr=0.01)
        accelerator = accelerate.Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, 20))

    def go_on(accelerator, model, optimizer, schedule, steps):
        for step in steps:
            rows = slice(50 * step, 50 * step + 50)
            accelerator.backward(cross_entropy(model(images.x[rows]), images.y[rows]))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return model(images.x[:200]).detach()

    expected = go_on(*plain_run(), range(20))
    begun = plain_run()
    go_on(*begun, range(8))
    begun[0].save_state(str(tmp_path / "state"))
    results = []
    for with_state in (True, False):
        accelerator, model, optimizer, schedule = plain_run()
        if with_state:
            accelerator.load_state(str(tmp_path / "state"))
        else:
            model.load_state_dict(begun[1].state_dict())
        plain = accelerator.unwrap_model(model)
        converted = mn.convert(plain, images.x[:50])
        new = mn.optim.from_torch(optimizer.optimizer, plain, converted, scheduler=schedule.scheduler)
        other = accelerate.Accelerator(cpu=True)
        results.append(go_on(other, *other.prepare(converted, new, schedule.scheduler), range(8, 20)))
    check_goes_on(results[0], expected, results[1])


def test_a_plain_checkpoint_of_transformers_goes_on_converted(tmp_path):
    run = example("train_with_transformers", "transformers")
    from safetensors.torch import load_file

    options = {"per_device_train_batch_size": run.BATCH, "learning_rate": 5e-3, "weight_decay": 0.1, "use_cpu": True,
               "train_sampling_strategy": "sequential", "report_to": [], "logging_strategy": "no",
               "disable_tqdm": True}  # fmt: skip
    steps, half = 12, 6

    class Rest(run.Source):
        """What is left of the data after the first half."""

        def __init__(self):
            super().__init__()
            self.pieces = self.pieces[half * run.BATCH :]

    def trainer(model, total, data, **more):
        arguments = run.TrainingArguments(output_dir=str(tmp_path), max_steps=total, **options, **more.pop("how"))
        return run.Trainer(model=model, args=arguments, train_dataset=data, **more)

    def logits(model):
        return model.eval()(input_ids=run.Source().pieces[:16]).logits.detach()

    whole = run.language_model()
    trainer(whole, steps, run.Source(), how={"save_strategy": "steps", "save_steps": half}).train()
    folder, results = tmp_path / f"checkpoint-{half}", []
    for with_state in (True, False):
        model = type(whole).from_pretrained(folder)
        assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])
        first = trainer(model, steps, run.Source(), how={"save_strategy": "no"})
        first.create_optimizer_and_scheduler(steps)
        if with_state:
            first.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
            first.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        converted = run.convert(model)
        optimizer = mn.optim.from_torch(first.optimizer, model, converted, scheduler=first.lr_scheduler)
        rest = trainer(
            converted, steps - half, Rest(), how={"save_strategy": "no"}, optimizers=(optimizer, first.lr_scheduler)
        )
        rest.train()
        results.append(logits(converted))
    check_goes_on(results[0], logits(whole), results[1])
    # A plain model again in the trainer's own format, and converted once more on the same spheres.
    converted.save_pretrained(tmp_path / "saved")
    again = run.convert(type(whole).from_pretrained(tmp_path / "saved"))
    assert all(torch.equal(a, b) for a, b in zip(converted.parameters(), again.parameters(), strict=True))
    deviations = [w.manifold.deviations(w.parameter.detach()).max() for w in mn.constraints.constrained_weights(again)]
    assert len(deviations) == 4
    assert float(max(deviations)) < 4 * torch.finfo(torch.float32).eps
