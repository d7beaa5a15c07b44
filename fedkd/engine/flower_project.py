"""Somebody's Flower app on disk, read as ``flwr run`` reads it; nothing of it is changed.

``pyproject.toml`` names the two apps and the run config. Its modules are imported from its folder
while it runs, and forgotten afterwards, so that two apps whose modules have equal names can follow
one another in a process.
"""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedkd.engine.simulate import flattened
from fedkd.errors import ConfigError, nearest

FILE = "pyproject.toml"
SIDES = ("serverapp", "clientapp")
REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
PAIR = re.compile(r"""\s*([^\s=]+)=("[^"]*"|'[^']*'|[^\s'"]\S*)(?=\s|$)""")
Config = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class FlowerProject:
    """What ``pyproject.toml`` says of an app.

    ``apps`` are ``module:attribute`` by side; ``config`` is flat, with dotted keys; ``nodes`` is
    the size that a federation in the file has, as Flower wrote it there until 1.31, else None.
    """

    folder: Path
    name: str
    version: str
    apps: Mapping[str, str]
    config: Config = field(default_factory=dict)
    nodes: int | None = None

    @contextmanager
    def imported(self) -> Iterator[tuple[ServerApp, ClientApp]]:
        """Import both apps; their modules are there until the end of the context.

        Raises:
            ConfigError: a module or what it needs is missing, or an attribute is no such app.
        """
        known, path = dict(sys.modules), list(sys.path)
        sys.path.insert(0, str(self.folder))
        # Only what lies in the folder: an app may also be a module that is installed.
        tops = {reference.split(":")[0].split(".")[0] for reference in self.apps.values()}
        tops = {t for t in tops if any((self.folder / name).exists() for name in (t, f"{t}.py"))}
        for name in [n for n in known if n.split(".")[0] in tops]:
            del sys.modules[name]
        importlib.invalidate_caches()
        try:
            server = _attribute(self, "serverapp", ServerApp)
            client = _attribute(self, "clientapp", ClientApp)
            yield server, client
        finally:
            sys.path[:] = path
            for name, module in list(sys.modules.items()):
                if name not in known and _below(module, self.folder):
                    del sys.modules[name]
            sys.modules.update({n: m for n, m in known.items() if n.split(".")[0] in tops})

    def configured(self, given: Sequence[str]) -> Config:
        """Return the run config with what the command line says in place of what the file says.

        Args:
            given: ``"key=value key2='text'"``, each value as in TOML, or names of TOML files.

        Raises:
            ConfigError: a key that the app does not have, or a value of another type.
        """
        found = dict(self.config)
        for text in given:
            for key, value in _overrides(text).items():
                if key not in found:
                    raise ConfigError(
                        f"--run-config {key}: {self.folder / FILE} has no such key in "
                        f"[tool.flwr.app.config]; it has: {', '.join(sorted(found)) or 'none'}"
                        f"{nearest(key, found)}"
                    )
                found[key] = _like(key, value, found[key])
        return found


def read_project(folder: Path) -> FlowerProject:
    """Return the Flower app in a folder.

    Raises:
        ConfigError: there is none, or its file does not say what Flower asks for.
    """
    file = folder / FILE
    if not file.is_file():
        raise ConfigError(
            f"{folder} has no {FILE}: give the folder of a Flower app, whose {FILE} has "
            "[tool.flwr.app.components]"
        )
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    if "flower" in table:
        raise ConfigError(
            f"{file} has [flower.components], as Flower wrote it in 2024: call the table "
            "[tool.flwr.app.components] and the one of its config [tool.flwr.app.config]"
        )
    app = _table(_table(_table(table, "tool"), "flwr"), "app")
    components = _table(app, "components")
    apps = {}
    for side in SIDES:
        reference = components.get(side)
        if not isinstance(reference, str) or not REFERENCE.fullmatch(reference):
            said = f"{side} = {reference!r}" if side in components else f"no {side}"
            raise ConfigError(
                f"{file}: [tool.flwr.app.components] has {said}; expected "
                f'{side} = "package.module:app"'
            )
        apps[side] = reference
    project = _table(table, "project")
    try:
        config = flattened(_table(app, "config"))
    except ConfigError as error:
        raise ConfigError(f"{file}, [tool.flwr.app.config]: {error}") from None
    return FlowerProject(
        folder=folder.resolve(),
        name=str(project.get("name", folder.resolve().name)),
        version=str(project.get("version", "0")),
        apps=apps,
        config=config,
        nodes=_nodes(_table(_table(table, "tool"), "flwr")),
    )


def _table(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = table.get(name, {})
    return found if isinstance(found, Mapping) else {}


def _nodes(flower: Mapping[str, Any]) -> int | None:
    """Return the number of nodes of the federation that is the default, or of the only one."""
    federations = _table(flower, "federations")
    sizes = {
        name: _table(value, "options").get("num-supernodes")
        for name, value in federations.items()
        if isinstance(value, Mapping)
    }
    chosen = federations.get("default")
    found = sizes.get(chosen) if isinstance(chosen, str) else None
    if found is None and len(sizes) == 1:
        found = next(iter(sizes.values()))
    return found if isinstance(found, int) and found > 0 else None


def _attribute(project: FlowerProject, side: str, kind: type[Any]) -> Any:
    reference = project.apps[side]
    module_name, attribute = reference.split(":")
    where = f"{project.folder / FILE}: {side} = {reference!r}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        own = error.name is not None and module_name.startswith(error.name)
        fix = (
            f"there is no module {error.name!r} below {project.folder}"
            if own
            else f"it needs {error.name!r}, which is not installed here; install what its "
            "[project] dependencies ask for"
        )
        raise ConfigError(f"{where}: {fix}") from error
    if not hasattr(module, attribute):
        names = [n for n, v in vars(module).items() if isinstance(v, kind)]
        raise ConfigError(
            f"{where}: {module_name} has no {attribute!r}; "
            f"{kind.__name__}s in it: {', '.join(names) or 'none'}"
        )
    found = getattr(module, attribute)
    if not isinstance(found, kind):
        raise ConfigError(f"{where} is a {type(found).__name__}, not a {kind.__name__}")
    return found


def _below(module: object, folder: Path) -> bool:
    """Return whether a module was loaded from a folder."""
    file = getattr(module, "__file__", None)
    places = [file] if file else list(getattr(module, "__path__", []))
    return any(Path(place).resolve().is_relative_to(folder) for place in places)


def _overrides(text: str) -> Config:
    """Read ``key=value`` pairs, or a TOML file of them."""
    if text.endswith(".toml"):
        try:
            return flattened(tomllib.loads(Path(text).read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"--run-config {text}: cannot be read: {error}") from None
    found: Config = {}
    place = 0
    while place < len(text.rstrip()):
        pair = PAIR.match(text, place)
        if pair is None:
            raise ConfigError(
                f"--run-config {text[place:].strip()!r}: expected key=value, a text in quotes, as "
                "in \"num-server-rounds=3 model='cnn'\""
            )
        place = pair.end()
        key, value = pair.groups()
        found[key] = _value(key, value)
    return found


def _value(key: str, text: str) -> bool | int | float | str:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # As Flower has it, and a shell takes quotes away: what is nothing else is a text.
        value = text
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(
            f"--run-config {key}={text}: Flower allows bool, int, float and str, not "
            f"{type(value).__name__}"
        )
    return value


def _like(key: str, value: bool | int | float | str, old: Any) -> bool | int | float | str:
    """Return a value where the file has one like it; numbers are alike, and true is none."""
    numbers = [type(v) in (int, float) for v in (value, old)]
    if all(numbers):
        return float(value) if isinstance(old, float) else value
    if type(value) is type(old):
        return value
    raise ConfigError(
        f"--run-config {key}={value!r} is a {type(value).__name__}; {key} = {old!r} in the file is "
        f"a {type(old).__name__}"
    )
