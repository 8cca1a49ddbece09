"""The config.json of a dsjax checkpoint: a ModelConfig, and what it was converted from."""

import dataclasses
import enum
import json
from dataclasses import dataclass
from typing import Any

from etils import epath

from dsjax import config as architecture
from dsjax.config import ModelConfig
from dsjax.errors import UserError

FORMAT, VERSION = "dsjax", 1


@dataclass(frozen=True, kw_only=True)
class Description:
    """What config.json holds.

    dtype: that of most weights. published: the config.json this was converted from, so
    that an export can give it back; None for a model that was made here.
    """

    config: ModelConfig
    dtype: str
    published: dict[str, Any] | None = None


def write(directory: epath.Path, description: Description) -> None:
    """Writes `directory`/config.json."""
    values = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": description.dtype,
        "model": encode(description.config),
        "published": description.published,
    }
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def read_json(file: epath.Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file is missing or no JSON object."""
    if not file.exists():
        raise UserError(f"{file.parent}: no {file.name}: not a checkpoint directory")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a JSON object")
    return values


def is_ours(values: dict[str, Any]) -> bool:
    """Whether a config.json is a dsjax checkpoint's (and not a published one's)."""
    return values.get("format") == FORMAT


def parse(values: dict[str, Any]) -> Description:
    """The inverse of `write`. Raises UserError for a newer version or a broken record."""
    if values.get("version") != VERSION:
        raise UserError(
            f"checkpoint format version {values.get('version')}: this dsjax reads {VERSION}"
        )
    try:
        config = decode(values["model"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"config.json: unreadable model record ({error!r})") from None
    return Description(
        config=config, dtype=values["dtype"], published=values.get("published")
    )


def encode(value: Any) -> Any:
    """A config record as JSON: dataclasses carry their class name, enums their value."""
    match value:
        case enum.Enum():
            return {"class": type(value).__name__, "value": value.value}
        case tuple():
            return [encode(item) for item in value]
        case None | str() | int() | float():
            return value
    fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"class": type(value).__name__, **fields}


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    match value:
        case {"class": name, **fields}:
            kind = getattr(architecture, name)
            if issubclass(kind, enum.Enum):
                return kind(fields["value"])
            return kind(**{key: decode(item) for key, item in fields.items()})
        case list():
            return tuple(decode(item) for item in value)
    return value
