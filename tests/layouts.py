"""The same records in the layouts that users have, written to disk for the tests.

Records are {"key", "image": encoded bytes, "text"} and, where a layout can hold them, "texts" and "label". Tars and
Parquet are as img2dataset writes them, down to the entries of its .json; the Arrow files are what the library
`datasets` saves.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from limber_jax.config import Source
from limber_jax.data.sources.digits import Digits

Records = Sequence[dict[str, Any]]


def digits(count: int, split: str = "train") -> list[dict[str, Any]]:
  """Returns digits as PNG files, with the captions of the source "digits"."""
  source, out = Digits(Source(split=split)), []
  for i in range(count):
    record, file = source[i], io.BytesIO()
    Image.fromarray(record["image"]).save(file, "PNG")
    out.append({"key": f"{i:09d}", "image": file.getvalue(), "text": record["text"], "label": record["label"]})
  return out


def jpeg(width: int, height: int, seed: int = 0, format: str = "JPEG", **options: Any) -> bytes:
  """Returns an image file of smooth random colours."""
  small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, format, **options)
  return file.getvalue()


def _parts(records: Records, per_shard: int) -> list[Records]:
  return [records[i : i + per_shard] for i in range(0, len(records), per_shard)]


def _meta(record: dict[str, Any]) -> dict[str, Any]:
  """Returns what img2dataset says of an image that it downloaded."""
  return {"caption": record["text"], "url": f"https://example.com/{record['key']}", "key": record["key"],
          "status": "success", "error_message": None, "width": 32, "height": 32, "original_width": 32,
          "original_height": 32, "exif": "{}", "sha256": "0" * 64}


def write_webdataset(folder: Path, records: Records, per_shard: int = 10_000, suffix: str = "jpg") -> Path:
  """Writes 00000.tar … with KEY.jpg, KEY.txt and KEY.json of each record, as img2dataset does by webdataset."""
  folder.mkdir(parents=True, exist_ok=True)
  for number, part in enumerate(_parts(records, per_shard)):
    with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
      for record in part:
        for name, data in ((suffix, record["image"]), ("txt", record["text"].encode()),
                           ("json", json.dumps(_meta(record), indent=4).encode())):
          member = tarfile.TarInfo(f"{record['key']}.{name}")
          member.size, member.uname, member.gname, member.mode = len(data), "bigdata", "bigdata", 0o444
          tar.addfile(member, io.BytesIO(data))
  return folder


def write_img2dataset_parquet(folder: Path, records: Records, per_shard: int = 10_000, failed: int = 0) -> Path:
  """Writes 00000.parquet … with the images in the column "jpg"; the last `failed` rows of each were not downloaded."""
  folder.mkdir(parents=True, exist_ok=True)
  for number, part in enumerate(_parts(records, per_shard)):
    rows = [{**_meta(r), "jpg": r["image"]} for r in part]
    rows += [{**rows[0], "key": f"x{i}", "status": "failed_to_download", "error_message": "HTTP Error 404", "jpg": None}
             for i in range(failed)]
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:05d}.parquet", row_group_size=100)
  return folder


def hub_table(records: Records, classes: Sequence[str] = ()) -> pa.Table:
  """Returns records as `datasets` has them: {"bytes", "path"}, a caption (or list of them), and a named class."""
  features: dict[str, Any] = {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}
  columns = {
    "image": pa.array([{"bytes": r["image"], "path": f"{r['key']}.png"} for r in records],
                      pa.struct({"bytes": pa.binary(), "path": pa.string()})),
    "caption": pa.array([list(r["texts"]) if "texts" in r else r["text"] for r in records])}
  if classes:
    features["label"] = {"names": list(classes), "_type": "ClassLabel"}
    columns["label"] = pa.array([r["label"] for r in records], pa.int64())
  info = json.dumps({"info": {"features": features}})
  return pa.table(columns).replace_schema_metadata({"huggingface": info})


def write_hub_parquet(folder: Path, splits: dict[str, Records], shards: int = 1, **options: Any) -> Path:
  """Writes data/train-00000-of-00001.parquet …, as the hub keeps data sets."""
  (folder / "data").mkdir(parents=True)
  for split, records in splits.items():
    for number in range(shards):
      table = hub_table(records[number::shards], **options)
      pq.write_table(table, folder / "data" / f"{split}-{number:05d}-of-{shards:05d}.parquet", row_group_size=100)
  return folder


def write_saved(folder: Path, records: Records, split: str | None = "train", shards: int = 1, batch: int = 1000,
                **options: Any) -> Path:
  """Writes what Dataset.save_to_disk does."""
  folder.mkdir(parents=True)
  files, size = [], -(-len(records) // shards)
  for number in range(shards):
    files.append({"filename": f"data-{number:05d}-of-{shards:05d}.arrow"})
    table = hub_table(records[number * size : (number + 1) * size], **options)
    with pa.OSFile(str(folder / files[-1]["filename"]), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
      writer.write_table(table, max_chunksize=batch)
  state = {"_data_files": files, "_fingerprint": "0123456789abcdef", "_format_columns": None, "_format_kwargs": {},
           "_format_type": None, "_output_all_columns": False, "_split": split}
  (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
  (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "", "features": {}}))
  return folder


def write_saved_splits(folder: Path, splits: dict[str, Records], **options: Any) -> Path:
  """Writes what DatasetDict.save_to_disk does."""
  for split, records in splits.items():
    write_saved(folder / split, records, split, **options)
  (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
  return folder


def write_tsv(folder: Path, records: Records) -> Path:
  """Writes a table of Conceptual Captions, caption and path, with the images beside it, and returns its path."""
  folder.mkdir(parents=True, exist_ok=True)
  for record in records:
    (folder / f"{record['key']}.png").write_bytes(record["image"])
  (folder / "train.tsv").write_text("".join(f"{r['text']}\t{r['key']}.png\n" for r in records))
  return folder / "train.tsv"


def write_jsonl(folder: Path, records: Records) -> Path:
  """Writes lines of {"image", "caption"}, with the images beside them, and returns the path of the file."""
  write_tsv(folder, records)
  rows = [{"image": f"{r['key']}.png", "caption": list(r["texts"]) if "texts" in r else r["text"]} for r in records]
  (folder / "train.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
  return folder / "train.jsonl"
