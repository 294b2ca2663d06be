"""Where the store is. A setting of the process, since every part of it opens the same store."""

from typing import Annotated

from pydantic import Field, SecretStr

from server.shared.settings_base import SettingsBase


class StoreSettings(SettingsBase):
    """What `Store.open` reads, and the settings of server and learner have, too."""

    store_url: Annotated[
        SecretStr,
        Field(
            description="A PostgreSQL database, `postgresql://user@host/name`, in place of SQLite in the data "
            "directory: for several servers. Not as a flag, since it may have a password."
        ),
    ] = SecretStr("")
