"""Grids: what a file or a mapping of settings expands to, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchtrim.lab import files
from batchtrim.lab.execute import grid
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.environment import environment
from batchtrim.lab.task import own_models

ROOT = Path(__file__).parents[3]
TINY = {"methods": ["full", "trim"], "seeds": 2, "epochs": 2, "train_size": 200, "batch_size": 64}


def test_lists_are_axes_and_seeds_vary_slowest() -> None:
    configs = grid.expand({**TINY, "keep_end": [0.2, 0.5]})
    assert [(config.method, config.keep_end, config.seed) for config in configs] == [
        ("full", None, 0), ("trim", 0.2, 0), ("trim", 0.5, 0), ("full", None, 1), ("trim", 0.2, 1), ("trim", 0.5, 1),
    ]  # fmt: skip


def test_parameters_are_axes_too() -> None:
    configs = grid.expand(
        {"methods": ["small_loss", "full"], "seeds": [7], "params": {"small_loss": {"noise_rate": [0.1, 0.2]}}}
    )
    assert [config.method_params.get("noise_rate") for config in configs] == [0.1, 0.2, None]
    assert {config.seed for config in configs} == {7}


def test_one_folder_and_one_network_are_one_experiment_in_any_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`photos/`, as a shell completes it, and `photos` were two; all runs were repeated."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "digits", "a/b"):
        Path(folder).mkdir(parents=True)
    Path("net.py").write_text("def build(shape, classes): ...")

    monkeypatch.setenv("HOME", str(tmp_path))

    def names(dataset: str, model: str = "mlp", test_split: float | None = 0.2) -> tuple[str, str]:
        (config,) = grid.expand({"dataset": dataset, "test_split": test_split, "model": model, "seeds": 1})
        return config.dataset, config.model

    there = str(tmp_path / "photos"), f"{tmp_path / 'net.py'}:build"
    for spelling in ("photos", "photos/", "./photos", "photos/.", "a/../photos", "~/photos", there[0]):
        for network in ("net.py:build", "./net.py:build", "a/../net.py:build", "~/net.py:build", there[1]):
            assert names(spelling, network) == there
    monkeypatch.chdir("a")
    assert names("../photos", "../net.py:build") == there
    assert names("b")[0] == str(tmp_path / "a" / "b")
    assert names("../digits/")[0] == str(tmp_path / "digits")
    assert names("digits", test_split=None)[0] == "digits"  # the lab's own
    assert names("owner/name")[0] == "owner/name"  # on the hub
    assert names("photos.csv")[0] == "photos.csv"  # missing: the message says so


def test_an_architecture_in_a_folder_is_one_in_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vit").mkdir()
    Path("vit/config.json").write_text('{"model_type": "vit"}')
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in ("vit", "vit/", "./vit", "~/vit", f"{tmp_path}/vit"):
        assert own_models.one_spelling(f"hf:{spelling}:hidden_size=8") == f"hf:{tmp_path / 'vit'}:hidden_size=8"
    assert own_models.one_spelling("hf:swin:depths=[2, 2]") == "hf:swin:depths=[2, 2]"


def test_an_architecture_in_a_folder_has_the_version_of_its_configuration(tmp_path: Path) -> None:
    """Runs were told apart by the folder's path alone: moved, or on another machine, all were repeated."""

    def source() -> str:
        return environment(RunConfig(model=f"hf:{tmp_path}/vit:hidden_size=8"))["source"]

    (tmp_path / "vit").mkdir()
    (tmp_path / "vit/config.json").write_text('{"model_type": "vit", "num_hidden_layers": 2}')
    before = source()
    (tmp_path / "vit/config.json").write_text('{"num_hidden_layers": 2,\n"model_type": "vit"}')
    assert source() == before
    (tmp_path / "vit/config.json").write_text('{"num_hidden_layers": 3, "model_type": "vit"}')
    assert source() != before
    assert "source" not in environment(RunConfig(model="hf:vit"))


def test_runs_are_told_apart_by_name_and_contents_wherever_the_files_lie() -> None:
    def key(**settings: str) -> str:
        return RunConfig.from_dict(settings).key

    mine = {"data_version": "0123456789ab", "model": "/home/me/net.py:build"}
    assert key(dataset="/home/me/photos", **mine) == key(dataset="/disk/photos", **mine | {"model": "net.py:build"})
    assert key(dataset="/home/me/photos", **mine) != key(dataset="/home/me/images", **mine)
    assert key(dataset="/home/me/photos") != key(dataset="/disk/photos")  # not read yet
    assert key(model="hf:/a/vit:patch_size=4") == key(model="hf:/b/vit:patch_size=4") != key(model="hf:/a/vit")
    assert key(model="hf:/a/vit") != key(model="hf:vit")  # the architecture of that name
    configs = [RunConfig(dataset=f"/{place}/photos", data_version="0123456789ab") for place in "ab"]
    assert len(grid.cells(configs)) == 1


def test_an_empty_data_set_is_not_the_current_folder() -> None:
    """--dataset "$UNSET" read the folder that the command was typed in."""
    for empty in ("", " "):
        with pytest.raises(ValueError, match="expected the name of a data set, or the path of one, got nothing"):
            grid.expand({"dataset": empty, "test_split": 0.2, "seeds": 1})


def test_a_precision_that_a_cpu_lacks_is_refused() -> None:
    """Lightning ran bf16-mixed in its place, and the run was recorded as 16-mixed."""
    with pytest.raises(ValueError, match=r"on a CPU, got '16-mixed'.* Pass bf16-mixed"):
        RunConfig(precision="16-mixed", device="cpu").resolved()
    assert RunConfig(precision="bf16-mixed", device="cpu").resolved().precision == "bf16-mixed"


def test_networks_in_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.py").write_text("def build(shape, classes): ...")
    models = [f"{tmp_path}/{folder}/net.py:build" for folder in "ab"]
    with pytest.raises(ValueError, match=r"files of different names, got .*a/net.py:build and .*b/net.py:build"):
        grid.expand({"model": models, "seeds": 1})
    assert len(grid.expand({"model": models[:1] * 2, "seeds": 1})) == 1


def test_parts_of_a_grid_add_to_what_is_common() -> None:
    configs = grid.expand({"seeds": 1, "epochs": 3, "grid": [{"model": "mlp"}, {"model": "cnn", "epochs": 5}]})
    assert [(config.model, config.epochs) for config in configs] == [("mlp", 3), ("cnn", 5)]


def test_a_part_goes_before_what_is_common_under_either_name() -> None:
    """A file without `methods` was refused for giving both: the other was the command's default."""
    configs = grid.expand({"methods": ["full", "trim"], "seeds": 1, "grid": [{"method": "random"}, {"seed": 3}]})
    assert [(config.method, config.seed) for config in configs] == [("random", 0), ("full", 3), ("trim", 3)]


def test_common_parameters_are_for_the_parts_that_run_their_method() -> None:
    common = {"seeds": 1, "params": {"small_loss": {"noise_rate": 0.1, "ramp_epochs": 3}}}
    parts = [{"method": "full"}, {"method": "small_loss"}]
    own = {"method": "small_loss", "params": {"small_loss": {"noise_rate": 0.4}}}
    configs = grid.expand({**common, "grid": [*parts, own]})
    assert [(config.method, config.method_params.get("noise_rate")) for config in configs] == [
        ("full", None), ("small_loss", 0.1), ("small_loss", 0.4),
    ]  # fmt: skip
    assert [config.method_params["ramp_epochs"] for config in configs[1:]] == [3, 3]
    for wrong in ({**common, "grid": [{"method": "full"}]}, {"seeds": 1, "grid": [{**own, "method": "full"}]}):
        with pytest.raises(ValueError, match=r"methods that are run \(full\), got \[params\.small_loss\]"):
            grid.expand(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimiser": "adam"}, "Did you mean 'optimizer'"),
        ({"methods": ["full", "trin"]}, "Did you mean 'trim'"),
        ({"methods": []}, "at least one value"),
        ({"methods": ["full"], "method": "trim"}, "either `methods` or `method`"),
        ({"methods": ["full"], "params": {"ohem": {"threshold": 1.0}}}, r"got \[params\.ohem\]"),
        ({"params": {"full": 3}}, "`params` to be tables"),
        ({"grid": {"model": "mlp"}}, "`grid` to be tables"),
        ({"method_params": {"beta": 2}}, "got `method_params`"),
        ({"seeds": 0}, "`seeds` to be at least 1"),
        ({"dataset": {"name": "digits"}}, "`dataset` to be a value or a list of values, got {'name': 'digits'}"),
        ({"keep_end": [[0.1]]}, r"`keep_end` to be a value or a list of values, got \[0.1\]"),
        ({"methods": ["small_loss"], "params": {"small_loss": {"noise_rate": {"a": 1}}}}, "`noise_rate` to be a value"),
    ],
)
def test_wrong_grids_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        grid.expand(settings)


GRIDS = [
    path
    for path in sorted([*ROOT.glob("examples/grids/*.toml"), *ROOT.glob("records/*/config.toml")])
    if "batchtrim compare" in path.read_text() or "batchtrim sweep" in path.read_text()  # as its first lines say
]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_grids_of_examples_and_records_are_right(path: Path) -> None:
    configs = grid.expand(files.load_toml(path))
    assert {"full", "random"} <= {config.method for config in configs}
    assert len({config.seed for config in configs}) >= (3 if path.name == "config.toml" else 5)


def test_a_grid_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text("epochs = = 3")
    with pytest.raises(ValueError, match="line 1"):
        files.load_toml(tmp_path / "grid.toml")
    with pytest.raises(FileNotFoundError, match="got nothing there"):
        files.load_toml(tmp_path / "other.toml")
