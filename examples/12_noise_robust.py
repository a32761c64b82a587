"""Wrong labels concentrate among the hardest samples: leave these out, and list the most suspect labels."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchtrim
from _data import digits
from batchtrim.keeplog import NoiseAmplified
from batchtrim.selection import Rule

WRONG = 0.2


def train(x: Tensor, y: Tensor, select: Rule, epochs: int) -> tuple[nn.Module, batchtrim.KeepLog]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    log = batchtrim.KeepLog(len(x), classes=10)
    trim = batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs, select=select)  # select: the only difference
    for _ in range(epochs):
        for ids in torch.randperm(len(x)).split(64):
            outputs = model(x[ids])
            losses = F.cross_entropy(outputs, y[ids], reduction="none")
            trim(losses).backward()
            log.record(trim.last, ids=ids, outputs=outputs, labels=y[ids])
            optimizer.step()
            optimizer.zero_grad()
        trim.step()
        log.end_epoch()
    return model, log


def main(epochs: int = 20) -> float:
    x, true = digits().tensors
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(true), generator=generator) < WRONG
    given = torch.where(wrong, (true + torch.randint(1, 10, true.shape, generator=generator)) % 10, true)
    x_test, y_test = digits(train=False).tensors

    reached = []
    for select in (batchtrim.hardest(), batchtrim.between(skip=WRONG)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NoiseAmplified)
            model, log = train(x, given, select, epochs)
        kept = log.table()["kept"]
        part = (kept[wrong].sum() / kept.sum()).item()
        reached.append((model(x_test).argmax(1) == y_test).float().mean().item())
        print(f"{select}: test accuracy {reached[-1]:.3f}, wrong labels {part:.0%} of the kept, {WRONG:.0%} of all")
        for warning in caught:
            print(f"  {warning.category.__name__}: {warning.message}")
        # A label's score is its keep rate times its mean loss, and between() seldom keeps those it leaves out:
        # look for wrong labels in the run that keeps the hardest.
        ids, _ = batchtrim.suspects(log, top=int(wrong.sum()))
        print(f"  of the {len(ids)} most suspect labels {wrong[ids].float().mean():.0%} are wrong")
    return reached[1] - reached[0]


if __name__ == "__main__":
    main()
