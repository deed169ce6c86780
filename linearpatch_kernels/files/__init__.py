"""Files: what is ours to replace, how a file or a directory appears whole or not at all, seals, and suspicious reading.

The rule, decided in `owned` and nowhere else: we remove or replace only files that our own marker lists and that are
still as we wrote them. Anything else at a place where a run would write, and any input of the run there, is refused
before work. Niceties of a file system (locks, modes, flushing a directory, an atomic exchange) never decide: where they
are missing, the work is done without them.
"""

from linearpatch_kernels.files.directories import check_output, check_room, save_files, written_whole
from linearpatch_kernels.files.entries import Entries
from linearpatch_kernels.files.owned import (
    MARKER,
    RECORDS,
    check_file,
    check_work_directory,
    claim_work_directory,
    expanded,
    foreign_files,
    is_ours,
    left_by_us,
    lies_in,
    record,
    remove_work_directory,
)
from linearpatch_kernels.files.reading import finite, json_text, read_json, reading, refuse_mixture, said
from linearpatch_kernels.files.sealed import KEY, is_sealed, read_seal, write_sealed
from linearpatch_kernels.files.whole import (
    appearing,
    append_line,
    final_name,
    remove_unfinished,
    working_alone,
    write_whole,
)

__all__ = [
    "KEY",
    "MARKER",
    "RECORDS",
    "Entries",
    "appearing",
    "append_line",
    "check_file",
    "check_output",
    "check_room",
    "check_work_directory",
    "claim_work_directory",
    "expanded",
    "final_name",
    "finite",
    "foreign_files",
    "is_ours",
    "is_sealed",
    "json_text",
    "left_by_us",
    "lies_in",
    "read_json",
    "read_seal",
    "reading",
    "record",
    "refuse_mixture",
    "remove_unfinished",
    "remove_work_directory",
    "said",
    "save_files",
    "working_alone",
    "write_sealed",
    "write_whole",
    "written_whole",
]
