"""A training script as many people have one: average of the weights, autocast, clipping, cosine schedule, and resume.

`mid_run_plain.py` is the plain script, and `mid_run_converted.py` the same script converted in mid-run. Compare them:

    python examples/mid_run_plain.py --checkpoint run.pt --until 3
    python examples/mid_run_converted.py --checkpoint run.pt --until 5    # goes on where the plain run was
    python examples/mid_run_converted.py --checkpoint run.pt              # and where the converted run was
    diff examples/mid_run_plain.py examples/mid_run_converted.py
"""

import argparse
from pathlib import Path

import torch
from digits import evaluate, load_digits, network
from torch.nn.functional import cross_entropy
from torch.optim import swa_utils

import manifold_nets as mn

EPOCHS, BATCH = 8, 50


def main() -> None:
    """Train from the checkpoint, or from the start where there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="file to resume from and to write after each epoch")
    parser.add_argument("--until", type=int, default=EPOCHS, help="stop after this epoch")
    options = parser.parse_args()
    torch.manual_seed(0)
    images, model = load_digits(), network()
    x, y = images["train"].x, images["train"].y
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    checkpoint = {}
    if options.checkpoint and options.checkpoint.exists():
        checkpoint = torch.load(options.checkpoint)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
    moving = swa_utils.get_ema_multi_avg_fn(0.95)
    plain, model = model, mn.convert(model, x[:BATCH])
    optimizer = mn.optim.from_torch(optimizer, plain, model, scheduler=scheduler)
    average = mn.optim.AveragedModel(model, multi_avg_fn=moving, use_buffers=True)
    if checkpoint:
        average.load_state_dict(checkpoint["average"])

    for epoch in range(checkpoint.get("epoch", 0), options.until):
        model.train()
        for rows in torch.randperm(len(y), generator=torch.Generator().manual_seed(epoch)).split(BATCH):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            mn.optim.clip_plain_grad_norm_(optimizer, max_norm=1.0)
            optimizer.step()
            average.update_parameters(model)
        scheduler.step()
        validation, _ = evaluate(model, images["validation"])
        of_average, error = evaluate(average.module, images["validation"])
        print(f"epoch {epoch + 1}: loss {validation:.4f}, of the average {of_average:.4f}, its error {error:.1%}")
        if options.checkpoint:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "average": average}
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"epoch": epoch + 1, **states}, options.checkpoint)


if __name__ == "__main__":
    main()
