"""Options of the command line, derived from the definitions of settings, and the parsing of typed values.

Each option's help ends with its true default for that command, in brackets.
"""

from __future__ import annotations

import collections
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from batchtrim.lab import files, grid_file
from batchtrim.lab.run.config import SETTINGS
from batchtrim.lab.run.settings import Setting

METAVARS: Mapping[type, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}
Table = dict[str, tuple[Any, Any]]
"""Parameters of a command: name, annotation, default."""


def option(kind: Any, help: str, *names: str, default: Any = None, **more: Any) -> tuple[Any, Any]:
    """Return an option's annotation and default; its type is named the same in every release of typer."""
    plain = next((each for each in METAVARS if kind in (each, each | None)), None)
    more = {"metavar": METAVARS[plain], **more} if plain else more
    if plain is int or plain is float:
        more = {"parser": _parser(_number, plain), **more}
    elif plain is Path:
        more = {"parser": _parser(_path, "folder" if more["metavar"] == METAVARS[Path] else "file"), **more}
    return Annotated[kind, typer.Option(*names, help=help, show_default=False, **more)], default


def _argument(help: str, kind: Any = Path, default: Any = inspect.Parameter.empty, metavar: str = "FOLDER") -> Any:
    parser = _parser(_path, "folder" if metavar == "FOLDER" else "file")
    return Annotated[kind, typer.Argument(help=help, metavar=metavar, show_default=False, parser=parser)], default


def _parser(parse: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[str], Any]:
    """Return a function of the text alone. It has a name, which typer 0.16 reads; a partial has none."""
    parser: Any = functools.partial(parse, *args, **kwargs)
    parser.__name__ = parse.__name__
    return parser


def _number(kind: type[int] | type[float], text: str | float, setting: str = "") -> float:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        hint = _meant(kind, str(text)) or _several(setting, str(text))
        raise typer.BadParameter(f"expected {what}, got {text!r}.{hint}") from None


def _several(setting: str, text: str) -> str:
    """Return a hint where several values of a setting can be given, for comma-separated ones; "" for other text."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 2 or setting not in SETTINGS:
        return ""
    kind = SETTINGS[setting].kind
    try:
        values = [f'"{part}"' if kind is str else f"{kind(part):{'d' if kind is int else 'g'}}" for part in parts]
    except ValueError:
        return ""
    if setting == "seed":
        return f" For several: batchtrim compare --seeds {','.join(values)}."
    return f" Several are a list in a TOML file (batchtrim compare FILE.toml): {setting} = [{', '.join(values)}]."


def _meant(kind: Callable[[str], Any], text: str) -> str:
    """Return a hint that names the intended number, for text with a percent sign, decimal comma or other minus."""
    plainer = text.strip().replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-").replace(",", ".")
    try:
        value = float(plainer.removesuffix("%").strip()) / (100 if plainer.endswith("%") else 1)
        meant = kind(f"{value:.12g}")
    except ValueError:
        return ""
    return f" Did you mean {meant}?"


def _path(what: str, text: str | Path) -> Path:
    """Return the path of that name, with ``~`` expanded: shells do not expand it after ``--out=``.

    An empty name usually comes from an unset shell variable.
    """
    if not str(text).strip():
        raise typer.BadParameter(f"expected the name of a {what}, got nothing.")
    return files.expanded(text)


class Once(TyperCommand):
    """A command that refuses a list given twice, of which the last would win without a word.

    Of other options the last one counts, as elsewhere: a shell's alias may hold the first.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = [] if ctx.resilient_parsing else self.make_parser(ctx).parse_args(args=list(args))[2]
        for param, count in collections.Counter(given).items():
            if count > 1 and "comma-separated" in (getattr(param, "help", None) or ""):
                name = param.opts[0]
                raise typer.BadParameter(f"expected {name} once, got it {count} times. Separate its values by commas.")
        return super().parse_args(ctx, args)


def check_targets(**folders: Path | None) -> None:
    """Check the folders to write to."""
    for name, folder in folders.items():
        if folder is not None and folder.is_file():
            raise ValueError(f"expected `{name}` to be a folder, got the file {folder}.")


MANY: Table = {
    "grid": _argument("TOML file with settings; options override it", Path | None, None, "GRID.toml"),
    "methods": option(str | None, "methods, comma-separated; `batchtrim methods` lists them"),
    "seeds": option(str | None, "how many seeds, or which, comma-separated"),
}
ONE: Table = {
    "method": option(str | None, "method; `batchtrim methods` lists them"),
    "seed": option(int | None, "random seed"),
}
PLACE: Table = {
    "out": option(Path | None, "folder for runs.jsonl and the report [under runs/]"),
    "data_dir": option(Path | None, "folder with NAME/{train,test}-*.parquet [BATCHTRIM_DATA, else the hub]"),
    "checkpoint_seconds": option(float | None, "minimum seconds between checkpoints of a run [60]"),
    "tensorboard": option(bool, "write TensorBoard events as well", "--tensorboard", default=False),
    "keep_log": option(bool, "record which samples are kept, for `batchtrim show`", "--keep-log", default=False),
}
TASK: Table = {
    "task": option(
        str | None,
        "your own training function, instead of data set and network: my_task.py:train",
        metavar="FILE.py:FUNCTION",
    ),
    "metric": option(str | None, "metric that your function returns, to compare methods by [error]"),
    "higher_is_better": option(bool, "a higher metric is better [by its name]", "--higher-is-better", default=False),
    "lower_is_better": option(bool, "a lower metric is better [by its name]", "--lower-is-better", default=False),
}
SCALE: Table = {
    "workers": option(int | None, "processes on this machine [one per core, up to 8]"),
    "ray": option(str | None, "send the runs to a Ray cluster: auto, or its address", metavar="ADDRESS"),
    "retries": option(int, "times to retry a run whose worker died [2]", default=2),
}
TALK: Table = {
    "as_json": option(bool, "print only the result, as JSON, on standard output", "--json", default=False),
    "quiet": option(bool, "no progress on standard error", "--quiet", "-q", default=False),
    "debug": option(bool, "show the traceback of an error", "--debug", default=False),
}


DEBUG: Table = {"debug": TALK["debug"]}
REPORT: Table = {
    "folder": _argument("folder with runs.jsonl", Path | None, None),
    "csv": option(Path | None, "results of another program: columns method, seed, a metric, time", metavar="FILE.csv"),
    "metric": option(str | None, "column to compare by [the only other column]", metavar="COLUMN"),
    **{name: TASK[name] for name in ("higher_is_better", "lower_is_better")},
    "out": option(Path | None, "folder for the report [the same folder]"),
    "baseline": option(str, "method the others are compared with [full]", default="full", metavar="METHOD"),
    "figures": option(Path | None, "folder to write the charts to, as SVG and PNG"),
    "as_json": option(bool, "print the numbers as JSON and write nothing", "--json", default=False),
    **DEBUG,
}
CLAIMS: Table = {
    "folder": _argument("folder of records, each a folder with claims.toml and runs.jsonl"),
    "out": option(Path | None, "Markdown page to write [printed]", metavar="PAGE.md"),
    "table": option(Path | None, "page to write a short table into", metavar="PAGE.md"),
    **DEBUG,
}
SHOW: Table = {
    "run": _argument("folder of runs made with --keep-log"),
    "key": option(str | None, "key of the run, as in runs.jsonl"),
    "method": option(str | None, "method of the run [trim, else any but full]", metavar="METHOD"),
    "seed": option(int | None, "seed of the run [the lowest]"),
    "out": option(Path | None, "page [keep/KEY.html in the folder]", metavar="PAGE.html"),
    "data_dir": option(Path | None, "folder with NAME/{train,test}-*.parquet [where the runs found them]"),
    **DEBUG,
}
METHODS_LISTED: Table = {"as_json": option(bool, "print as JSON", "--json", default=False)}


def _setting_option(setting: Setting) -> tuple[Any, Any]:
    help = setting.help
    if setting.own:  # too many to list here: errors list them all
        names = list(setting.choices or ("",))
        help += f": {names[0]} .. {names[-1]}, {setting.own}"
    elif setting.choices is not None:
        help += f": {_listed(setting.choices)}"
    return option((str if setting.many else setting.kind) | None, help, *_flag(setting))


def _flag(setting: Setting) -> tuple[str, ...]:
    """Return the option of a yes-or-no setting that has no ``--no-`` form."""
    return (f"--{setting.name.replace('_', '-')}",) if setting.kind is bool else ()


def _listed(names: Iterable[str]) -> str:
    """Return names on one line, with ``resnet8 .. resnet34`` for a family of more than three."""
    names = list(names)
    family = [name for name in names if name.rstrip("0123456789") == names[-1].rstrip("0123456789")]
    if len(family) > 3:
        return ", ".join([name for name in names if name not in family] + [f"{family[0]} .. {family[-1]}"])
    return ", ".join(names)


_CONFIG: Table = {name: _setting_option(each) for name, each in SETTINGS.items() if each.help}
_PARAM: Table = {"param": option(list[str] | None, "method parameter, such as small_loss.noise_rate=0.1; repeatable",
                          metavar="METHOD.NAME=VALUE")}  # fmt: skip
_ONE_WORD = [each.name for each in SETTINGS.values() if each.choices and not each.many] + ["label_noise"]
_WAYS = ("higher_is_better", "lower_is_better")
NAMES = (*(name for name in {**MANY, **ONE, **TASK, **_CONFIG} if name not in ("grid", *_WAYS)), *_PARAM)
"""Every option that is a setting of the runs."""


def settings_table(presets: Mapping[str, Any], only: Table) -> Table:
    """Return ``only`` and an option per setting; help shows the command's preset, else the setting's default.

    Args:
        presets: the command's own defaults.
    """
    table = {}
    for name, (kind, default) in {**only, **_CONFIG}.items():
        help = kind.__metadata__[0].help
        if only is MANY and name in SETTINGS and SETTINGS[name].many:
            help += "; comma-separated"
        said = _default(name, presets)
        setting = SETTINGS.get(name)
        more = {}
        if setting is not None and setting.kind in (int, float) and not setting.many:
            more["parser"] = _parser(_number, setting.kind, setting=name)
        if said or more:
            help += f" [{said}]" if said else ""
            kind, default = option(kind.__origin__, help, *(_flag(setting) if setting else ()), default=default, **more)
        table[name] = kind, default
    return {**table, **TASK, **_PARAM}


def _default(name: str, presets: Mapping[str, Any]) -> str:
    if name in presets:
        values = presets[name]
        return ",".join(map(str, values)) if isinstance(values, list) else str(values)
    setting = SETTINGS.get(name)
    return (setting.default_help or str(setting.default)) if setting else ""


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the TOML file, if there is one, overridden by options in each part of its grid."""
    elsewhere = {each for name in {**PLACE, **SCALE, **TALK} for each in (name, name.removeprefix("as_"))}
    settings = grid_file.read(given["grid"], given.get("methods"), elsewhere) if given.get("grid") else {}
    options = {name: given[name] for name in NAMES if given.get(name) is not None}
    for name, text in list(options.items()):
        if name in _CONFIG and SETTINGS[name].many:
            whole = name == "dataset" and text and files.expanded(text).exists()  # a path may contain a comma
            options[name] = [text] if whole else _list(name, text, SETTINGS[name].kind)
        elif name in _CONFIG and name in _ONE_WORD and "," in text:
            choices = f" of {', '.join(SETTINGS[name].choices or ())}" if SETTINGS[name].choices else ""
            raise ValueError(f"expected one `{name}`{choices}, got {text!r}.{_several(name, text)}")
    if "methods" in options:
        options["methods"] = _list("methods", options["methods"], str)
    if "seeds" in options:
        text = options["seeds"]
        seeds = _list("seeds", text, int)
        options["seeds"] = seeds if "," in text or not seeds else seeds[0]
    way = direction(**{name: given.get(name) or False for name in _WAYS})
    if way is not None:
        options["higher_is_better"] = way
    if params := options.pop("param", []):
        options["params"] = _params(params)
    return grid_file.overridden_everywhere(settings, options)


def direction(higher_is_better: bool, lower_is_better: bool) -> bool | None:
    """Return True if a higher metric is better, from the two flags; None if neither is given."""
    if higher_is_better and lower_is_better:
        raise ValueError("expected --higher-is-better or --lower-is-better, got both.")
    return higher_is_better if higher_is_better or lower_is_better else None


def refuse_without_task(settings: Mapping[str, Any]) -> None:
    """Refuse options that only apply to the user's own training function."""
    given = next((name for name in ("metric", "higher_is_better") if name in settings), None)
    if given is not None:
        raise ValueError(
            f"expected `{given}` beside --task, got {settings[given]!r}. The lab's own loop measures the test error."
        )


def refuse_with_task(given: Mapping[str, Any]) -> None:
    """Refuse settings that the user's own training function decides."""
    if given.get("keep_log"):
        raise ValueError("expected no --keep-log with --task, got one. The function keeps its log: run.keep_log(n).")
    if given.get("data_dir"):
        raise ValueError(
            f"expected no --data-dir with --task, got {str(given['data_dir'])!r}. The function reads its data itself."
        )
    if given.get("checkpoint_seconds") is not None:
        raise ValueError("expected no --checkpoint-seconds with --task, got one. The function saves its own: run.out.")
    from batchtrim.lab.run.ranks import Ranks

    if Ranks.from_environment().world > 1:
        raise ValueError("expected --task in one process, got it under torchrun. Start processes in the function.")


def check_data_dir(folder: Path | None, datasets: Iterable[str] = ()) -> None:
    """Refuse a folder of data that is missing, if no data set is looked for there, which names more than the folder."""
    if folder is not None and not folder.is_dir() and all(name == "digits" or Path(name).exists() for name in datasets):
        raise FileNotFoundError(f"expected --data-dir to name an existing folder, got {files.shown(folder)}.")


def check_one_run(settings: Mapping[str, Any]) -> None:
    """Refuse several values for a setting."""
    for name, value in settings.items():
        if (isinstance(value, list) and len(value) > 1) or (name == "method" and "," in str(value)):
            raise ValueError(f"expected one run, got several values of `{name}`. `batchtrim compare` does many.")


_COMMA = re.compile(r",(?![^\[]*\])")  # a comma that is not inside brackets


def _list(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    parts = [part.strip() for part in _COMMA.split(text) if part.strip()]
    names = [each for part in parts for each in re.split(r"[\s;|]+", part) if each]
    if len(names) > len(parts) and not (name in SETTINGS and SETTINGS[name].own):  # a path may contain a space
        raise ValueError(f"expected `{name}` to be separated by commas, got {text!r}. Did you mean {','.join(names)}?")
    try:
        return [kind(part) for part in parts]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        hint = _meant(kind, text) or (_range_meant(text) if kind is int else "")
        raise ValueError(f"expected `{name}` to be {what}, comma-separated, got {text!r}.{hint}") from None


def _range_meant(text: str) -> str:
    """Return a hint that lists the numbers in a range such as 0-4 or 0..4."""
    ends = re.fullmatch(r"\s*(\d{1,6})\s*(?:-|\.\.\.?|to)\s*(\d{1,6})\s*", text)
    if ends is None or not 0 < int(ends[2]) - int(ends[1]) < 20:
        return ""
    return f" Did you mean {','.join(map(str, range(int(ends[1]), int(ends[2]) + 1)))}?"


def _params(texts: Iterable[str]) -> dict[str, Any]:
    """Parse ``method.name=value`` into tables; several comma-separated values are an axis."""
    from batchtrim.lab.methods.table import METHODS

    tables: dict[str, dict[str, Any]] = {}
    given: dict[str, str] = {}
    for text in texts:
        place, equals, value = text.partition("=")
        if place in given:
            raise ValueError(
                f"expected each parameter once, got {place} twice. Several values are comma-separated: "
                f"{place}={given[place]},{value}"
            )
        given[place] = value
        method, dot, name = place.partition(".")
        if not (equals and dot and value):
            raise ValueError(
                f"expected `param` to look like small_loss.noise_rate=0.1, got {text!r}.{_hint(place, value)}"
            )
        if method in METHODS and name not in METHODS[method].params and _hint(name, value):
            raise ValueError(f"expected `param` to be a parameter of '{method}', got {text!r}.{_hint(name, value)}")
        values = [_as_number(part) for part in value.split(",")]
        tables.setdefault(method, {})[name] = values if len(values) > 1 else values[0]
    return tables


def _hint(name: str, value: str) -> str:
    """Return a hint that a name is an option, not a parameter, with a space before it; "" if it is neither."""
    return f" It is an option: --{name.replace('_', '-')} {value}".rstrip() if name in _CONFIG else ""


def _as_number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
