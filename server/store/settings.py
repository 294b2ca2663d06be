"""Where the store and the shared versions are. Settings of the process, since every part of it uses the same."""

from typing import Annotated

from pydantic import Field, SecretStr

from server.shared.settings_base import SettingsBase


class StoreSettings(SettingsBase):
    """What `Store.open` and `server.store.files.sharing` read, and the settings of server and learner have, too."""

    store_url: Annotated[
        SecretStr,
        Field(
            description="A PostgreSQL database, `postgresql://user@host/name`, in place of SQLite in the data "
            "directory: for several servers. Not as a flag, since it may have a password."
        ),
    ] = SecretStr("")
    policy_url: Annotated[
        str,
        Field(
            description="Where servers and learners share versions: `s3://bucket/prefix`, with AWS_* variables, or "
            "`file:///mnt/prefloop`. Each keeps a verified copy in its data directory."
        ),
    ] = ""
