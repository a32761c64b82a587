"""An engine: one forward of the batch, backward on the kept rows. Try it on your model before you trust it."""

import torch
from torch import nn
from torch.utils.data import DataLoader

import batchtrim
from _data import digits
from batchtrim.testing import check_engine


def main(epochs: int = 10, rows: int | None = None) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(4, 64), nn.ReLU(),
        nn.Dropout(0.1), nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip
    data = digits(rows=rows)
    report = check_engine(model, data[:64], nn.CrossEntropyLoss(), engine="shared", keep=0.4)  # prints its findings
    assert report.ok

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    trim = batchtrim.Trimmer(batchtrim.linear(1.0, 0.2), total=epochs)  # +
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), trim, engine="shared")  # +
    for epoch in range(epochs):
        right = seen = 0
        for x, y in DataLoader(data, 64, shuffle=True):
            loss = step(x, y)  # was: F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            right += (step.last.outputs.argmax(1) == y).sum().item()  # the whole batch's outputs, for metrics
            seen += len(y)
        print(f"epoch {epoch}: keeping {trim.keep:.2f}, training accuracy {right / seen:.3f}")
        trim.step()  # +

    model.eval()
    x, y = digits(train=False).tensors
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
