"""Train on the hardest pixels. Ignored pixels count neither in the ranking nor in the number kept."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import batchtrim
from _data import digits

IGNORED = 255


def ink(train: bool = True) -> TensorDataset:
    """Return noisy digits (N, 1, 8, 8), and their masks (N, 8, 8): ink 1, paper 0, the outer pixels ignored."""
    clean = digits(train).tensors[0].view(-1, 1, 8, 8)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(int(train)))
    mask = (clean.squeeze(1) > 0.5).long()
    border = torch.ones(8, 8, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return TensorDataset(clean + 0.4 * noise, mask.masked_fill(border, IGNORED))


def overlap(logits: Tensor, mask: Tensor) -> float:
    """Return the intersection over union of the ink, among the pixels that count."""
    counts = mask != IGNORED
    found, there = (logits.argmax(1) == 1) & counts, (mask == 1) & counts
    return ((found & there).sum() / (found | there).sum()).item()


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = batchtrim.per_sample(nn.CrossEntropyLoss(ignore_index=IGNORED), unit="element")  # +
    trim = batchtrim.Trimmer(batchtrim.linear(1.0, 0.25), total=epochs, unit="element")  # + pixels, not images
    for _ in range(epochs):
        for x, y in DataLoader(ink(), 64, shuffle=True):
            loss = trim(criterion(model(x), y))  # was: F.cross_entropy(model(x), y, ignore_index=IGNORED)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trim.step()  # +

    x, y = ink(train=False).tensors
    found = overlap(model(x), y)
    print(f"{trim}: overlap of the ink {found:.3f}")
    return found


if __name__ == "__main__":
    main()
