"""Data sets: Parquet in the hub's layout, the cache, conditions, augmentation; made-up images and real ones."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from batchtrim.lab.task import augment, conditions, data, hub


def write_split(folder: Path, split: str, labels: list[int], files: int = 1, encoded: bytes | None = None) -> None:
    """Parquet files like the hub's: grey images saved as RGB, pixel (0, 0) holding the row number."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, label in enumerate(labels):
        pixels = np.full((28, 28, 3), label * 20, dtype=np.uint8)
        pixels[0, 0] = number
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"image": {"bytes": encoded or buffer.getvalue(), "path": None}, "label": label})
    for part, some in enumerate(np.array_split(np.arange(len(rows)), files)):
        table = pa.Table.from_pylist([rows[i] for i in some])
        pq.write_table(table, folder / f"{split}-{part:05d}-of-{files:05d}.parquet")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DIR/fashion_mnist with 10 test rows and 20 train rows in two files; the cache stands beside it."""
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BATCHTRIM_DATA", raising=False)
    write_split(tmp_path / "fashion_mnist", "train", [i % 10 for i in range(20)], files=2)
    write_split(tmp_path / "fashion_mnist", "test", list(range(10)))
    return tmp_path


def test_parquet_files_are_read_in_order_and_as_grey(folder: Path) -> None:
    images = data.load("fashion_mnist", folder)
    assert images.train_images.shape == (20, 1, 28, 28)
    assert images.train_images.dtype == torch.uint8
    assert images.train_images[:, 0, 0, 0].tolist() == list(range(20))
    assert images.train_labels.tolist() == [i % 10 for i in range(20)]
    assert images.shape == (1, 28, 28)
    assert len(images.test_labels) == 10


def test_the_environment_names_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHTRIM_DATA", str(folder))
    assert len(data.load("fashion_mnist").train_labels) == 20


def test_moments_equal_numpy(folder: Path) -> None:
    images = data.load("fashion_mnist", folder)
    pixels = images.train_images.double().numpy()
    assert images.mean[0] == pytest.approx(pixels.mean())
    assert images.std[0] == pytest.approx(pixels.std())


def test_images_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.load("fashion_mnist", folder)
    monkeypatch.setattr(data, "_decode", lambda *_: pytest.fail("decoded again"))
    assert data.load("fashion_mnist", folder).train_images.equal(first.train_images)


def test_a_changed_file_is_decoded_again(folder: Path) -> None:
    data.load("fashion_mnist", folder)
    write_split(folder / "fashion_mnist", "test", [3] * 10)
    assert data.load("fashion_mnist", folder).test_labels.tolist() == [3] * 10


def test_a_damaged_cache_entry_is_rebuilt(folder: Path) -> None:
    data.load("fashion_mnist", folder)
    for path in (folder / "cache").glob("*-images.npy"):
        path.write_bytes(b"nonsense")
    assert data.load("fashion_mnist", folder).train_images[3, 0, 0, 0] == 3


def test_a_typo_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"got 'fashon_mnist'\. Did you mean 'fashion_mnist'\?"):
        data.load("fashon_mnist")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(data.PassDataDir, match=r"cifar10/train-\*\.parquet, got no such folder"):
        data.load("cifar10", tmp_path)


def test_traffic_signs_come_from_a_folder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's copies are split otherwise, by image instead of by track."""
    monkeypatch.delenv("BATCHTRIM_DATA", raising=False)
    with pytest.raises(data.PassDataDir, match=r"a folder with gtsrb/.*pass --data-dir DIR, or set BATCHTRIM_DATA"):
        data.load("gtsrb")


def test_a_missing_part_is_named(folder: Path) -> None:
    (folder / "fashion_mnist" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(data.PassDataDir, match=r"got 1\. Missing: train-00000-of-00002\.parquet"):
        data.load("fashion_mnist", folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "fashion_mnist" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(data.ReplaceFile, match=r"train-00001-of-00002\.parquet to be a whole Parquet file"):
        data.load("fashion_mnist", folder)


def test_bytes_that_are_not_an_image_are_named(folder: Path) -> None:
    write_split(folder / "fashion_mnist", "test", [0, 1], encoded=b"no image")
    with pytest.raises(data.ReplaceFile, match=r"an image in row 0 of .*test-00000-of-00001\.parquet"):
        data.load("fashion_mnist", folder)


def test_labels_out_of_range_are_named(folder: Path) -> None:
    write_split(folder / "fashion_mnist", "test", [0, 10, 10])
    with pytest.raises(ValueError, match=r"in \[0, 10\), got 10 in row 1 of .*parquet \(2 such rows\)"):
        data.load("fashion_mnist", folder)


def test_a_missing_column_is_named(folder: Path) -> None:
    path = folder / "fashion_mnist" / "test-00000-of-00001.parquet"
    pq.write_table(pa.table({"picture": [1], "label": [0]}), path)
    with pytest.raises(ValueError, match="a column 'image', got picture, label"):
        data.load("fashion_mnist", folder)


def test_without_the_hub_the_error_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    def offline(*_: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.delenv("BATCHTRIM_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(hub, "_answers", lambda: True)  # as where the connection breaks later
    with pytest.raises(data.PassDataDir, match=r"no route to the hub.*--data-dir DIR .* DIR/svhn/"):
        data.load("svhn", cache_dir=tmp_path)


def test_the_hub_gives_what_the_folder_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from_folder = data.load("fashion_mnist", folder)
    files = {
        split: sorted(str(path) for path in (folder / "fashion_mnist").glob(f"{split}-*")) for split in data.SPLITS
    }
    asked = []
    read = datasets.load_dataset

    def hub(name: str, config: str | None) -> object:
        asked.append((name, config))
        return read("parquet", data_files=files, cache_dir=str(folder / "hub"))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    from_hub = data.load("fashion_mnist")
    assert asked[0] == ("zalando-datasets/fashion_mnist", None)
    assert from_hub.train_images.equal(from_folder.train_images)
    assert from_hub.test_labels.equal(from_folder.test_labels)


def test_digits_are_split_by_class() -> None:
    digits = data.load("digits")
    assert len(digits.train_labels) == 1201
    assert len(digits.test_labels) == 596
    for label in range(10):
        train, test = ((labels == label).sum().item() for labels in (digits.train_labels, digits.test_labels))
        assert train == pytest.approx(2 * test, abs=2)
    assert data.load("digits").train_images.equal(digits.train_images)


@pytest.mark.parametrize(
    ("name", "shape", "mean", "std"),
    [
        ("fashion_mnist", (60000, 1, 28, 28), [0.2860], [0.3530]),
        ("cifar10", (50000, 3, 32, 32), [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
@pytest.mark.slow
def test_real_data_has_the_published_moments(
    data_dir: Path, name: str, shape: tuple[int, ...], mean: list[float], std: list[float]
) -> None:
    images = data.load(name, data_dir)
    assert images.train_images.shape == shape
    assert [value / 255 for value in images.mean] == pytest.approx(mean, abs=1e-4)
    assert [value / 255 for value in images.std] == pytest.approx(std, abs=1e-4)


@pytest.mark.slow
def test_human_labels_are_as_wrong_as_published(data_dir: Path) -> None:
    clean = data.load("cifar10", data_dir)
    for which, rate in (("aggre", 0.0903), ("worse", 0.4021)):
        noisy = conditions.apply(clean, label_noise=f"human:{which}", data_dir=data_dir)
        wrong = (noisy.train_labels != clean.train_labels).float().mean().item()
        assert wrong == pytest.approx(rate, abs=5e-4)


def test_human_labels_of_another_order_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar10n").mkdir()
    table = pa.table({"clean_label": [1, 0], "aggre_label": [1, 1]})
    pq.write_table(table, tmp_path / "cifar10n" / "train_labels.parquet")
    pixels, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1])
    images = data.ImageData("cifar10", 10, pixels, labels, pixels, labels, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match="row by row, got others"):
        conditions.apply(images, label_noise="human:aggre", data_dir=tmp_path)
    digits = data.load("digits")
    with pytest.raises(ValueError, match="CIFAR-10N"):
        conditions.apply(digits, label_noise="human:aggre", data_dir=tmp_path)


def test_symmetric_noise_has_its_rate_and_spreads_over_all_other_classes() -> None:
    digits = data.load("digits")
    noisy = conditions.apply(digits, label_noise="symmetric:0.4", seed=3)
    wrong = noisy.train_labels != digits.train_labels
    assert wrong.float().mean().item() == pytest.approx(0.4, abs=0.02)
    shift = (noisy.train_labels - digits.train_labels)[wrong] % 10
    assert sorted(shift.unique().tolist()) == list(range(1, 10))
    assert noisy.test_labels is digits.test_labels
    assert noisy.train_labels.equal(conditions.apply(digits, label_noise="symmetric:0.4", seed=3).train_labels)
    assert not noisy.train_labels.equal(conditions.apply(digits, label_noise="symmetric:0.4", seed=4).train_labels)


def test_asymmetric_noise_moves_a_label_to_the_next_class() -> None:
    digits = data.load("digits")
    noisy = conditions.apply(digits, label_noise="asymmetric:0.3")
    shift = (noisy.train_labels - digits.train_labels) % 10
    assert shift.unique().tolist() == [0, 1]
    assert shift.float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_imbalance_falls_exponentially() -> None:
    digits = data.load("digits")
    counts = torch.bincount(conditions.apply(digits, imbalance=10.0).train_labels, minlength=10)
    full = torch.bincount(digits.train_labels, minlength=10)
    wanted = [round(int(full[label]) * 10 ** (-label / 9)) for label in range(10)]
    assert counts.tolist() == wanted
    with pytest.raises(ValueError, match=r"leaves every class an image, got 1e\+09, which leaves none of the 1\d\d of"):
        conditions.apply(digits, imbalance=1e9)  # each class kept one, whatever was asked for


def test_train_size_keeps_the_share_of_each_class() -> None:
    small = conditions.apply(data.load("digits"), train_size=100)
    counts = torch.bincount(small.train_labels, minlength=10)
    assert counts.sum() == 100
    assert set(counts.tolist()) <= {9, 10, 11}
    with pytest.raises(ValueError, match=r"at most 1201, got 5000"):
        conditions.apply(data.load("digits"), train_size=5000)


@pytest.mark.parametrize("text", ["symetric:0.2", "symmetric", "symmetric:1", "symmetric:x", "human:some", "none:0.1"])
def test_an_unknown_kind_of_noise_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        conditions.parse_label_noise(text)


def numbered_images(count: int = 6, side: int = 16) -> torch.Tensor:
    return torch.arange(count * 3 * side * side).view(count, 3, side, side).remainder(251).to(torch.uint8)


def test_a_plain_batch_is_the_normalised_image() -> None:
    images = numbered_images()
    batches = augment.Batches(images, (10.0, 20.0, 30.0), (2.0, 4.0, 5.0))
    rows = torch.tensor([4, 1])
    wanted = (images[rows].double() - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor([2.0, 4, 5]).view(
        3, 1, 1
    )
    torch.testing.assert_close(batches(rows).double(), wanted, rtol=1e-6, atol=1e-6)


def test_each_image_has_a_crop_and_a_flip_of_its_own() -> None:
    """Against a slow oracle: every augmented image is one of the 2 x 5 x 5 cuts of its padded original."""
    images = numbered_images(side=16)  # margin 2
    batches = augment.Batches(images, (0.0,) * 3, (1.0,) * 3, "crop+flip", seed=1)
    padded = torch.nn.functional.pad(images, [2] * 4)
    seen, within = set(), set()
    for _ in range(40):
        batch = []
        for row, image in zip(range(6), batches(torch.arange(6)), strict=True):
            found = [
                (y, x, flip)
                for y in range(5)
                for x in range(5)
                for flip, turned in ((0, image), (1, image.flip(2)))
                if padded[row, :, y : y + 16, x : x + 16].float().equal(turned)
            ]
            assert found
            batch.append(found[0])
        seen.update(batch)
        within.add(len(set(batch)))
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(5))
    assert {flip for *_, flip in seen} == {0, 1}
    assert min(within) > 1  # not one draw for the whole batch


def test_augmentation_continues_from_its_state() -> None:
    batches = augment.Batches(numbered_images(), (0.0,) * 3, (1.0,) * 3, "crop+flip", seed=5)
    batches(torch.arange(6))
    state = batches.state_dict()
    wanted = batches(torch.arange(6))
    assert not batches(torch.arange(6)).equal(wanted)
    batches.load_state_dict(state)
    assert batches(torch.arange(6)).equal(wanted)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_reported(folder: Path) -> None:
    (folder / "cache").mkdir()
    (folder / "cache").chmod(0o500)
    with pytest.raises(OSError, match="Set BATCHTRIM_CACHE"):
        data.load("fashion_mnist", folder)
