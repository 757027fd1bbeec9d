"""Files and folders on disk: the one place that writes beside, renames, marks, hashes and locks. Loads no torch."""

from trainer.files.aside import move_aside
from trainer.files.atomic import (
    PARTIAL,
    cache_root,
    commit_folder,
    explain_full_disk,
    new_file_mode,
    partial_folder,
    partial_path,
    sync,
    sync_folder,
    warn_if_others_may_write,
    write_atomically,
)
from trainer.files.locks import (
    OWNER_FILE,
    SILENT_SECONDS,
    describe_owner,
    find_owner,
    is_alive_elsewhere,
    lock,
    read_owner,
    remove_stale_partials,
    run_lock_path,
    try_lock,
)
from trainer.files.manifest import file_manifest, find_change, find_damage, sha256
from trainer.files.parse import parse_json, read_json_lines

__all__ = [
    "OWNER_FILE",
    "PARTIAL",
    "SILENT_SECONDS",
    "cache_root",
    "commit_folder",
    "describe_owner",
    "explain_full_disk",
    "file_manifest",
    "find_change",
    "find_damage",
    "find_owner",
    "is_alive_elsewhere",
    "lock",
    "move_aside",
    "new_file_mode",
    "parse_json",
    "partial_folder",
    "partial_path",
    "read_json_lines",
    "read_owner",
    "remove_stale_partials",
    "run_lock_path",
    "sha256",
    "sync",
    "sync_folder",
    "try_lock",
    "warn_if_others_may_write",
    "write_atomically",
]
