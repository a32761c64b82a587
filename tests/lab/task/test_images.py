"""The user's own images: class folders, tables, the hub's layout; what is noted and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from batchtrim.lab.task import data, images, listing
from batchtrim.lab.task.images import ImageOptions, load

Draw = Callable[..., Path]


def image(value: int, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BATCHTRIM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def tree(root: Path, counts: dict[str, int], first: int = 0, **how: Any) -> Path:
    """``counts[NAME]`` images in ``root/NAME``, no two alike."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image(first + 1000 * number + i, **how).save(root / name / f"clip{i // 4}_{i:03}.png")
    return root


def mistake(*arguments: Any, **options: Any) -> str:
    with pytest.raises((ValueError, OSError, TypeError)) as caught:
        load(*arguments, ImageOptions(**options))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_train_and_test_folders(tmp_path: Path) -> None:
    tree(tmp_path / "mine" / "train", {"cat": 5, "dog": 7})
    tree(tmp_path / "mine" / "test", {"cat": 2, "dog": 3}, first=500)
    found = load("mine", ImageOptions())
    assert found.class_names == ("cat", "dog")
    assert found.train_images.shape == (12, 3, 12, 12)
    assert found.train_labels.tolist() == [0] * 5 + [1] * 7
    assert found.test_labels.tolist() == [0] * 2 + [1] * 3
    assert found.notes == ()
    expected = np.asarray(Image.open("mine/test/dog/clip0_002.png")).transpose(2, 0, 1)
    assert np.array_equal(found.test_images[-1].numpy(), expected)


def test_mean_and_spread_are_those_of_the_training_images(tmp_path: Path) -> None:
    tree(tmp_path / "mine" / "train", {"a": 3, "b": 4})
    tree(tmp_path / "mine" / "test", {"a": 1, "b": 1}, first=500)
    found = load("mine", ImageOptions())
    pixels = found.train_images.double()
    assert found.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert found.std == pytest.approx(pixels.std((0, 2, 3), unbiased=False).tolist())


def test_one_tree_is_split_by_class_and_seed(tmp_path: Path) -> None:
    tree(tmp_path / "mine", {"a": 20, "b": 10, "c": 1})
    found = load("mine", ImageOptions(test_split=0.2))
    assert torch.bincount(found.test_labels).tolist() == [4, 2]
    assert torch.bincount(found.train_labels).tolist() == [16, 8, 1]
    assert any("6 of 31 images set aside for testing" in note for note in found.notes)
    assert any("no images to test on of c" in note for note in found.notes)
    again = load("mine", ImageOptions(test_split=0.2))
    assert torch.equal(found.test_images, again.test_images)
    other = load("mine", ImageOptions(test_split=0.2, split_seed=1))
    assert not torch.equal(found.test_images, other.test_images)


def test_groups_stay_on_one_side(tmp_path: Path) -> None:
    tree(tmp_path / "mine", {"a": 40, "b": 40})
    find = listing.find_images("mine", group=r"(\w+)/clip(\d+)_")
    labels = np.asarray([0] * 40 + [1] * 40)
    train, test = images._sides(find, labels, ImageOptions(test_split=0.25))
    groups = np.asarray(find.groups)
    assert len(set(groups)) == 20
    assert not set(groups[train]) & set(groups[test])
    assert np.bincount(labels[test]).tolist() == [8, 8] or np.bincount(labels[test]).tolist() == [12, 12]
    assert "in 20 groups that stay whole" in " ".join(find.notes)


def test_sizes_and_modes_are_brought_to_one(tmp_path: Path) -> None:
    tree(tmp_path / "mine", {"a": 6}, size=(40, 20))
    tree(tmp_path / "mine" / ".." / "mine2", {"b": 6}, size=(10, 30))
    (tmp_path / "mine2" / "b").rename(tmp_path / "mine" / "b")
    found = load("mine", ImageOptions(test_split=0.3, image_size=16))
    assert found.shape == (3, 16, 16)
    assert any("images of 10 x 30 to 40 x 20 pixels resized to 16 x 16, centre-cropped" in n for n in found.notes)
    found = load("mine", ImageOptions(test_split=0.3))
    assert found.shape == (3, 64, 64)
    assert any("--image-size sets another size" in note for note in found.notes)


def one_each(folder: Path, save: Callable[[Path], None], name: str = "odd.png", grey: bool = False) -> torch.Tensor:
    """The pixels that an odd image gets, as the only one of its class to train on, beside black and white ones."""
    for value, place in ((0, "train/plain"), (255, "test/plain"), (255, "train/plain")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.new("L" if grey else "RGB", (4, 4), value if grey else (value,) * 3).save(folder / place / f"{value}.png")
    (folder / "train" / "odd").mkdir(parents=True)
    save(folder / "train" / "odd" / name)
    found = load(str(folder), ImageOptions())
    return found.train_images[found.train_labels == found.class_names.index("odd")][0]


def test_16_bits_keep_their_upper_8(tmp_path: Path) -> None:
    deep = np.full((4, 4), 0x7FFF, dtype=np.uint16)
    pixels = one_each(tmp_path / "mine", lambda path: Image.fromarray(deep).save(path), grey=True)
    assert pixels.unique().tolist() == [0x7F]


def test_images_are_decoded_without_what_windows_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.pwrite", raising=False)
    tree(tmp_path / "mine" / "train", {"a": 70, "b": 70})
    tree(tmp_path / "mine" / "test", {"a": 1}, first=500)
    found = load("mine", ImageOptions())
    order = sorted(range(70), key=lambda i: f"clip{i // 4}_{i:03}")
    drawn = [image(value + i) for value in (0, 1000) for i in order]
    assert np.array_equal(found.train_images, np.stack([np.array(each).transpose(2, 0, 1) for each in drawn]))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    pixels = one_each(
        tmp_path / "mine", lambda path: Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(path, quality=100), "odd.jpg"
    )
    red, green, blue = (channel.float().mean().item() for channel in pixels)
    assert red > 200
    assert green < 60
    assert blue < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(tmp_path: Path, mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))

    def save(path: Path) -> None:
        if mode == "P":
            Image.new("P", (4, 4), 0).save(path, transparency=0)
        else:
            clear.convert(mode).save(path)

    assert one_each(tmp_path / "mine", save).unique().tolist() == [255]


def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    def save(path: Path) -> None:
        photo = Image.new("RGB", (4, 4), "black")
        photo.paste("white", (0, 0, 4, 2))  # the upper half
        exif = photo.getexif()
        exif[0x0112] = 6  # turn right by 90 degrees
        photo.save(path, exif=exif)

    pixels = one_each(tmp_path / "mine", save)
    assert pixels[0, :, 3].min() == 255
    assert pixels[0, :, 0].max() == 0


def test_non_ascii_names_and_hidden_files(tmp_path: Path) -> None:
    root = tree(tmp_path / "mine", {"Äpfel 🍎": 5, "梨": 5})
    (root / ".DS_Store").write_text("x")
    (root / "梨" / ".thumb.png").write_text("x")
    (root / "梨" / "notes.txt").write_text("x")
    (root / "empty").mkdir()
    found = load("mine", ImageOptions(test_split=0.4))
    assert found.class_names == ("Äpfel 🍎", "梨")
    assert any("1 file left out that is no image: notes.txt" in note for note in found.notes)
    assert any("class folder without images left out: empty" in note for note in found.notes)


def test_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    tree(tmp_path / "mine", {"bad\udcff": 2, "b": 2})
    assert "expected names of files and folders in UTF-8, got b'bad\\xff/" in mistake("mine", test_split=0.5)


def test_ten_thousand_classes(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(10_000), 2)
    train, test = images.split_rows(labels, 0.5)
    assert len(train) == len(test) == 10_000
    assert np.array_equal(labels[train], np.arange(10_000))


def test_leakage_is_counted_and_noted(tmp_path: Path) -> None:
    tree(tmp_path / "mine" / "train", {"a": 5, "b": 5})
    tree(tmp_path / "mine" / "test", {"a": 3, "b": 3}, first=500)
    image(2).save(tmp_path / "mine" / "test" / "b" / "renamed.bmp")
    found = load("mine", ImageOptions())
    (note,) = found.notes
    assert note.startswith("mine: 1 of 7 images to test on are in the training split too")
    assert "test/b/renamed.bmp and train/a/clip0_002.png" in note


def test_broken_images_are_named_and_skipped_only_if_asked(tmp_path: Path) -> None:
    root = tree(tmp_path / "mine", {"a": 10, "b": 10})
    (root / "a" / "text.png").write_text("no image")
    (root / "a" / "void.jpg").write_bytes(b"")
    whole = (root / "b" / "clip0_001.png").read_bytes()
    (root / "b" / "clip0_001.png").write_bytes(whole[: len(whole) // 2])
    said = mistake("mine", test_split=0.2)
    assert "got 3 that cannot" in said
    assert "a/text.png: its 8 bytes are no image that can be read" in said
    assert "a/void.jpg: it is empty" in said
    assert "--skip-broken" in said
    found = load("mine", ImageOptions(test_split=0.2, skip_broken=True))
    assert len(found.train_labels) + len(found.test_labels) == 19
    assert any("3 broken images left out" in n and "clip0_001.png: it cannot be decoded" in n for n in found.notes)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    good = [name for name in names if name not in ("a/text.png", "b/clip0_001.png")]
    pixels = {np.asarray(Image.open(root / name)).transpose(2, 0, 1).tobytes() for name in good}
    assert {each.numpy().tobytes() for each in [*found.train_images, *found.test_images]} == pixels
    for name, label in ((name, found.class_names.index(name[0])) for name in good):
        wanted = torch.from_numpy(np.asarray(Image.open(root / name)).transpose(2, 0, 1).copy())
        side = [(found.train_images, found.train_labels), (found.test_images, found.test_labels)]
        hit = [lab[i].item() for img, lab in side for i in range(len(lab)) if torch.equal(img[i], wanted)]
        assert hit == [label]


def test_animated_and_floating_point_images_are_broken(tmp_path: Path) -> None:
    root = tree(tmp_path / "mine", {"a": 4, "b": 4})
    frames = [image(1), image(2)]
    frames[0].save(root / "a" / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(root / "b" / "depth.tiff")
    said = mistake("mine", test_split=0.3)
    assert "moving.gif: it is animated, or has pages: 2 frames" in said
    assert "depth.tiff: its pixels are floating point" in said


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda root: tree(root, {"only": 5}), {"test_split": 0.2}, "at least two classes in mine, got 1: only"),
        (lambda root: root.mkdir(), {"test_split": 0.2}, "images in class folders, as in mine/CLASS/image.png"),
        (lambda root: tree(root, {"a": 3, "b": 3}), {}, "Set some aside: --test-split 0.2"),
        (lambda root: tree(root / "train", {"a": 3, "b": 3}), {}, "expected a folder 'test' (or val"),
        (lambda root: tree(root, {"a": 3, "b": 3}), {"test_split": 0.2, "group": "frame("}, "expected `group` to be a"),
        (lambda root: tree(root, {"a": 3, "b": 3}), {"test_split": 0.2, "group": "frame"}, "to match every file name"),
        (lambda root: tree(root, {"a": 3, "b": 3}), {"test_split": 0.5, "group": "clip"}, "leaves images on both"),
        (lambda root: tree(root, {"a": 3, "b": 3}), {"test_split": 0.5, "label_column": "x"},
         "expected no `label_column` with the folder"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_used(
    make: Callable[[Path], object], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    make(tmp_path / "mine")
    assert says in mistake("mine", **options)


def test_splits_that_do_not_fit(tmp_path: Path) -> None:
    tree(tmp_path / "mine" / "train", {"a": 3, "b": 3})
    tree(tmp_path / "mine" / "test", {"a": 1, "c": 1}, first=500)
    assert "among those to train on in mine, got c to test on only" in mistake("mine")
    assert "expected no `test_split`, since mine has a test split" in mistake("mine", test_split=0.2)
    assert "expected no `group`, since mine is split already" in mistake("mine", group="clip")
    assert "which does not exist" in mistake("no/such/folder/at/all")
    (tmp_path / "file.txt").write_text("x")
    assert "a file of another kind" in mistake("file.txt")
    image(1).save(tmp_path / "loose.png")
    (tmp_path / "flat").mkdir()
    image(1).save(tmp_path / "flat" / "loose.png")
    assert "Images lie in flat itself, in no class: 1." in mistake("flat", test_split=0.2)
    (tmp_path / "flat" / "a table.parquet").touch()
    assert "To use one table: --dataset 'flat/a table.parquet'" in mistake("flat", test_split=0.2)


def test_val_replaces_test_and_is_noted(tmp_path: Path) -> None:
    tree(tmp_path / "mine" / "train", {"a": 3, "b": 3})
    tree(tmp_path / "mine" / "val", {"a": 1, "b": 1}, first=500)
    (tmp_path / "mine" / "extra").mkdir()
    assert load("mine", ImageOptions()).notes == ("mine: 'val' is tested on", "mine: left out: extra")


def test_csv_with_names_and_splits(tmp_path: Path) -> None:
    tree(tmp_path / "pixels", {"a": 6, "b": 6})
    files = sorted((tmp_path / "pixels").rglob("*.png"))
    lines = [f"pixels/{path.parent.name}/{path.name},{path.parent.name},{'val' if i % 3 == 2 else 'train'}"
             for i, path in enumerate(files)]  # fmt: skip
    (tmp_path / "mine.csv").write_text("\n".join(["file,label,split", *lines]))
    found = load("mine.csv", ImageOptions())
    assert found.class_names == ("a", "b")
    assert len(found.test_labels) == 4
    (tmp_path / "other.csv").write_text("\n".join(["photo,kind,split", *lines]))
    assert "expected one image column in other.csv, got photo, kind, split. Name it with --image-column" in mistake(
        "other.csv"
    )
    found = load("other.csv", ImageOptions(image_column="photo", label_column="kind"))
    assert len(found.train_labels) == 8
    assert "expected `label` column 'nope'" in mistake("other.csv", image_column="photo", label_column="nope")
    (tmp_path / "gone.csv").write_text("file,label,split\nnowhere.png,a,train\n" + "\n".join(lines))
    assert "gone.csv row 0: there is no such file" in mistake("gone.csv")


def test_csv_groups_by_column_and_missing_labels(tmp_path: Path) -> None:
    tree(tmp_path / "pixels", {"a": 8, "b": 8})
    files = sorted((tmp_path / "pixels").rglob("*.png"))
    rows = [f"{path},{int(path.parent.name == 'a')},patient{i // 2}" for i, path in enumerate(files)]
    (tmp_path / "mine.csv").write_text("\n".join(["image,label,patient", *rows]))
    found = load("mine.csv", ImageOptions(test_split=0.25, group="patient"))
    assert found.class_names == ("0", "1")
    assert any("in 8 groups that stay whole" in note for note in found.notes)
    assert "expected `group` column 'nurse'" in mistake("mine.csv", test_split=0.25, group="nurse")
    (tmp_path / "gap.csv").write_text("\n".join(["image,label,patient", *rows, f"{files[0]},,p"]))
    assert "expected a label in every row of gap.csv, got none in row 16" in mistake("gap.csv", test_split=0.2)
    (tmp_path / "age.csv").write_text("\n".join(["image,label,patient", f"{files[0]},1.5,p", *rows]))
    assert "expected classes in column 'label' of age.csv, got 1.5" in mistake("age.csv", test_split=0.2)
    (tmp_path / "none.csv").write_text("image,label\n")
    assert "got a table without rows" in mistake("none.csv", test_split=0.2)


def hub_file(path: Path, count: int, first: int = 0, names: list[str] | None = None) -> None:
    """A Parquet file in the hub's layout, class names in its metadata."""
    import pyarrow
    import pyarrow.parquet

    cells = []
    for i in range(count):
        out = io.BytesIO()
        image(first + i, (8 + i % 3, 9)).save(out, "PNG")
        cells.append({"bytes": out.getvalue(), "path": None})
    table = pyarrow.table({"image": cells, "label": pyarrow.array([i % 2 for i in range(count)], pyarrow.int64())})
    features = {"image": {"_type": "Image"}, "label": {"names": names or ["no", "yes"], "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)


def test_the_hubs_layout_in_a_folder_and_under_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_file(tmp_path / "hub" / "who" / "what" / "data" / "train-00000-of-00001.parquet", 300)
    hub_file(tmp_path / "hub" / "who" / "what" / "data" / "validation-00000-of-00001.parquet", 20, first=1000)
    found = load(str(tmp_path / "hub" / "who" / "what"), ImageOptions(image_size=8))
    assert (len(found.train_labels), len(found.test_labels)) == (300, 20)
    assert found.class_names == ("no", "yes")
    by_name = load("who/what", ImageOptions(image_size=8), data_dir=tmp_path / "hub")
    assert torch.equal(by_name.train_images, found.train_images)
    monkeypatch.setenv("BATCHTRIM_DATA", str(tmp_path / "hub"))
    assert "with the hub's files of 'who/else:large', got nothing there" in mistake("who/else:large")


def test_what_the_hubs_library_loads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: make test brings it")
    hub_file(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", 40)
    hub_file(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", 10, first=1000)
    splits = datasets.load_dataset(str(tmp_path / "hub"), cache_dir=str(tmp_path / "downloads"))
    found = listing.from_splits(splits, "who/what", {"image": None, "label": None, "group": None})
    assert found.split == ["train"] * 40 + ["test"] * 10
    assert found.labels[:3] == [0, 1, 0]
    sources = [each for _, chunk in found.chunks() for each in chunk]
    assert np.asarray(Image.open(io.BytesIO(sources[1]))).shape == (9, 9, 3)  # type: ignore[arg-type]


def test_the_cache_is_used_and_made_again_when_a_file_changes(tmp_path: Path, cache: Path) -> None:
    root = tree(tmp_path / "mine", {"a": 5, "b": 5})
    first = load("mine", ImageOptions(test_split=0.2))
    (folder,) = (cache / "images").iterdir()
    stamp = (folder / "pixels.npy").stat().st_mtime_ns
    load("mine", ImageOptions(test_split=0.2))
    assert (folder / "pixels.npy").stat().st_mtime_ns == stamp
    image(77_777).save(root / "a" / "clip0_000.png")
    second = load("mine", ImageOptions(test_split=0.2))
    assert len(list((cache / "images").iterdir())) == 2
    together = [torch.cat([each.train_images, each.test_images]).double().sum() for each in (first, second)]
    assert together[0] != together[1]
    for each in (cache / "images").iterdir():
        (each / "pixels.npy").write_bytes(b"damaged")
    assert "got a damaged cache" in mistake("mine", test_split=0.2)


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "mine", {"a": 5, "b": 5})
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("BATCHTRIM_CACHE", str(tmp_path / "file"))
    assert "Set BATCHTRIM_CACHE to a writable folder with enough space" in mistake("mine", test_split=0.2)


def test_pixels_stay_on_disk(tmp_path: Path) -> None:
    tree(tmp_path / "mine", {"a": 5, "b": 5})
    found = load("mine", ImageOptions(test_split=0.2))
    assert isinstance(found, data.ImageData)
    assert found.train_images.untyped_storage().data_ptr() == found.test_images.untyped_storage().data_ptr()
