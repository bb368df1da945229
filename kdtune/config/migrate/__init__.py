"""Turn a torchtune config into one of kdtune: `kdtune migrate`."""

from kdtune.config.migrate.draft import Note
from kdtune.config.migrate.torchtune_file import Migrated, migrate, migration_advice

__all__ = ["Migrated", "Note", "migrate", "migration_advice"]
