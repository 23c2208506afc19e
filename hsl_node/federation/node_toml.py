"""This site's settings: node.toml. Nothing in it is shared with the other hospitals."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from hsl_node.federation.strings import Address, Frozen, Listen, PeerName
from hsl_node.federation.toml_file import read_toml
from hsl_node.host.files import require_initialised
from hsl_node.host.layout import Layout


class DataConfig(Frozen):
    """Where this hospital's images are. Read in place, never written to."""

    path: Path | None = None  # folder with a folder per class | table .csv | .npz | None: not set yet
    filter: dict[str, str] = Field(default_factory=dict)  # rows of a table to use: column -> value, or pattern of * ?
    columns: dict[str, str] = Field(default_factory=dict)  # path, label, patient, site, split -> the table's own name
    labels: dict[str, str] = Field(default_factory=dict)  # the source's own label -> class of the plan
    exclude: tuple[str, ...] = ()  # file names to leave out, or patterns of * ? []
    window_center: float | None = None  # DICOM, where the file's own window is unwanted
    window_width: float | None = Field(None, gt=0)


class TrainConfig(Frozen):
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    gpus: int = Field(1, ge=1, le=16)  # that compute each batch together, from `device` on
    threads: int = Field(0, ge=0, le=1024)  # 0: all cores; fixed for a whole run, since results depend on it
    micro_batch: int = Field(0, ge=0, le=4096)  # images computed with at once; 0: the plan's batch; less memory, slower
    backbone_weights: Path | None = None  # local file whose sha256 the plan names
    generator: Path | None = None  # likewise, of fedktl


class InboxConfig(Frozen):
    kind: Literal["embedded", "directory"] = "embedded"
    directory: Path | None = None  # kind = "directory": the folder that holds a home folder per sender
    quota_mib: int = Field(4096, ge=64)  # per peer

    @property
    def quota_set(self) -> int | None:
        """What node.toml says; None: nothing, and the quota follows from the plan's model (`quota_bytes`)."""
        return self.quota_mib if "quota_mib" in self.model_fields_set else None

    @model_validator(mode="after")
    def _consistent(self) -> InboxConfig:
        if self.kind == "directory" and self.directory is None:
            raise ValueError('inbox.directory: needed where kind = "directory"')
        return self


class NodeConfig(Frozen):
    """node.toml: what is private to this site."""

    name: PeerName
    address: Address
    listen: Listen = "[::]:8922"
    anchor: Path | None = None  # default: anchor.safetensors in the state directory
    client: Literal["asyncssh", "paramiko"] = "asyncssh"
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    inbox: InboxConfig = InboxConfig()


def load_node(state: Path) -> NodeConfig:
    """Raises: NotInitialised, ConfigError."""
    require_initialised(state)
    return read_toml(Layout(state).node_toml, NodeConfig)
