"""Tables with files in their cells, as Hugging Face's datasets write them, and one-line errors."""

import io
import json
import tarfile

import pyarrow
import pytest
from PIL import Image

from mitrain.core.errors import DataError

COLOURS = ("red", "green", "blue", "white")


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def embedded(lacking: tuple[int, ...] = ()) -> pyarrow.Array:
    """A picture of each colour, as Hugging Face's Image keeps it."""
    cells = [None if i in lacking else {"bytes": png(c), "path": None} for i, c in enumerate(COLOURS)]
    return pyarrow.array(cells, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))


def described(table: pyarrow.Table, **features: dict) -> pyarrow.Table:
    """The table with the features that Hugging Face's datasets write into it."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def saved(folder, table: pyarrow.Table, files: int = 2) -> None:
    """As ``save_to_disk`` writes a data set."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{files:05}.arrow" for n in range(files)]
    rows = table.num_rows // files
    for n, name in enumerate(names):
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as out:
            out.write_table(table.slice(n * rows, rows))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def refused(read, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        read()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def shard(path, members, **info) -> str:
    """An archive of (name, bytes); ``info``: what else the last member's header says."""
    with tarfile.open(path, "w") as archive:
        for n, (name, content) in enumerate(members):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in info.items() if n == len(members) - 1 else ():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))
    return path.name
