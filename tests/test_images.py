"""Image files as people have them: every mode as PIL converts it, 16 bits scaled, further formats, EXIF orientation."""

import collections
import io
import json
import struct
import subprocess
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from limber_jax import registry
from limber_jax.config import Data, Source
from limber_jax.data import bounds, images, transforms
from limber_jax.data.images import ImageOptions
from limber_jax.data.packing import pack
from limber_jax.data.pipeline import data_fingerprint
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.data.transforms import Decode, ResizeCrop, decode
from limber_jax.errors import UserError
from limber_jax.inference.images import find
from limber_jax.training.setup import feature_specs, make_context
from tests import layouts
from tests.runs import tiny, tiny_limber

ALL = ImageOptions(images.MORE)


def saved(image, format="PNG", **options):
  out = io.BytesIO()
  image.save(out, format, **options)
  return out.getvalue()


def pil(data):
  with Image.open(io.BytesIO(data)) as image, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of palettes whose transparency is dropped
    return np.asarray(image.convert("RGB"))


def colours(width=20, height=12, seed=0):
  small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def png16(pixels):
  """Returns a PNG of uint16 [h, w] or [h, w, 3], written by hand: PIL writes no colours of 16 bits."""
  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
  head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("top", [65535, 4095, 255])
def test_grey_of_16_bits_is_scaled_as_pil_scales_the_same_picture_in_colours_of_16_bits(top):
  ramp = np.tile(np.linspace(0, top, 256).astype(np.uint16), (8, 1))
  found = decode(png16(ramp))
  np.testing.assert_array_equal(found, pil(png16(np.repeat(ramp[..., None], 3, axis=2))))
  np.testing.assert_array_equal(found, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2))
  assert len(np.unique(found)) == {65535: 256, 4095: 16, 255: 1}[top]
  for mode in ("I;16", "I;16B"):
    tiff = saved(Image.frombytes(mode, (256, 8), ramp.astype(">u2" if mode[-1] == "B" else "<u2").tobytes()), "TIFF")
    np.testing.assert_array_equal(decode(tiff, ALL), found)


@pytest.mark.parametrize(("mode", "kind"), [("I", "whole numbers of 32 bits"), ("F", "floating-point numbers")])
def test_pixels_of_32_bits_are_refused_by_name(mode, kind):
  with pytest.raises(UserError, match=f"mode '{mode}': its pixels are {kind}, and nothing says which is white"):
    decode(saved(Image.new(mode, (4, 4)), "TIFF"), ALL)


def transparent(mode):
  image = colours().convert("RGBA")
  image.putalpha(Image.linear_gradient("L").resize(image.size))
  return image.convert(mode)


EVERY = {
  "1": lambda: saved(colours().convert("1")), "L": lambda: saved(colours().convert("L")),
  "LA": lambda: saved(transparent("LA")), "RGBA": lambda: saved(transparent("RGBA")),
  "P": lambda: saved(colours().convert("P")),
  "P, one colour clear": lambda: saved(colours().convert("P"), transparency=3),
  "P, alpha a colour": lambda: saved(colours().convert("P"), transparency=bytes(range(256))),
  "L, one grey clear": lambda: saved(colours().convert("L"), transparency=7),
  "RGB, one colour clear": lambda: saved(colours(), transparency=(1, 2, 3)),
  "palette of transparent colours": lambda: saved(transparent("RGBA").quantize(16)),
  "RGB of 16 bits": lambda: png16(np.random.default_rng(0).integers(0, 65536, (5, 7, 3), np.uint16)),
  "CMYK": lambda: saved(colours().convert("CMYK"), "JPEG", quality=95),
  "JPEG in grey": lambda: saved(colours().convert("L"), "JPEG"),
  "WebP with alpha": lambda: saved(transparent("RGBA"), "WEBP"),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_other_mode_is_what_pil_makes_of_it(name):
  np.testing.assert_array_equal(decode(EVERY[name]()), pil(EVERY[name]()))


@pytest.mark.parametrize("name", images.MORE)
def test_a_further_format_is_read_where_it_is_asked_for_and_named_where_not(name):
  more = {"save_all": True, "append_images": [colours(seed=1)]} if name in ("gif", "tiff", "avif") else {}
  data = saved(colours(), name.upper(), **more)
  np.testing.assert_array_equal(decode(data, ImageOptions((name,))), pil(data))  # the first frame
  with pytest.raises(UserError, match=rf"not one of JPEG, PNG, WEBP; it is a {name.upper()}, .*--formats={name}$"):
    decode(data)


def test_a_format_that_is_none_is_reported():
  with pytest.raises(UserError, match=r"no format 'tif'; did you mean 'tiff'\?"):
    ImageOptions(("tif",))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's own, when it opens the file
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_as_pil_turns_them_where_it_is_asked_for(format):
  turned = 0
  for orientation in range(10):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(colours(), format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
      wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode(data, ImageOptions(exif=True)), wanted)
    np.testing.assert_array_equal(decode(data), pil(data))
    turned += not np.array_equal(wanted, pil(data))
  assert turned == 7
  for exif in (b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"", b"xx"):
    broken = saved(colours(), "JPEG", exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(decode(broken, ImageOptions(exif=True)), decode(broken))


def decoders(transform):
  return [step for step in transform.steps if isinstance(step, Decode)] if hasattr(transform, "steps") else []


def made(config):
  """Returns what `train.setup` does, without weights."""
  task = registry.lookup("task", registry.TASKS, config.task).from_config(config)
  return types.SimpleNamespace(config=config, task=task, tokenizer=ByteTokenizer(), mesh=None,
                               digests=collections.defaultdict(str))


def test_the_settings_reach_what_is_trained_on_and_evaluated_and_cached(tmp_path):
  wanted = ImageOptions(("gif",), True)
  for config in (tiny(), tiny_limber()):
    config.data.crop, s = "encoder" if config.task == "captioning" else "random", made(config)
    assert config.task == "contrastive" or all("images" not in what for what in feature_specs(s).values())
    config.data.formats, config.data.exif = ("gif",), True
    assert [d.options for d in decoders(make_context(s, str(tmp_path)).transform)] == [wanted]
    trained = transforms.with_options(s.task.transform(s.tokenizer, config.data, train=True), wanted)
    assert [d.options for d in decoders(trained)] == [wanted]
  assert all(what["images"] == {"formats": ["gif"], "exif": True} for what in feature_specs(s).values())


def test_the_data_fingerprint_knows_them_and_is_what_it_was_without():
  source, words = Source().open(), ByteTokenizer()
  found = [data_fingerprint(source, words, data, 8, 0) for data in (
    Data(), Data(exif=True), Data(formats=("gif",)), Data(formats=("gif", "bmp")))]
  assert found[0][:16] == "72194544d6fb6bb4" and len(set(found)) == 4  # as of 81b353f


def test_options_change_nothing_of_a_fast_decoding():
  chain = transforms.Compose((Decode(64), ResizeCrop(8, "center")))
  assert transforms.with_options(chain, ImageOptions(exif=True)).steps[0] == Decode(64, ImageOptions(exif=True))


def test_packed_images_are_upright_and_of_the_default_formats(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  files = {"a": saved(colours(), "GIF"), "b": saved(colours(), "JPEG", exif=exif), "c": saved(colours(), "JPEG"),
           "d": saved(colours(), "BMP")}
  path = layouts.write_tsv(tmp_path / "t", [{"key": k, "image": v, "text": k} for k, v in files.items()])
  options = ImageOptions(("gif", "bmp"), True)
  pack(Source("captions", str(path)), str(tmp_path / "out"), images=options, log=lambda _: None)
  source = Source("packed", str(tmp_path / "out")).open()
  assert [images.sniff(source[i]["image"])[0] for i in range(4)] == ["PNG", "JPEG", "JPEG", "PNG"]
  np.testing.assert_array_equal(decode(source[0]["image"]), pil(files["a"]))
  assert source[2]["image"] == files["c"] and decode(source[1]["image"]).shape == (20, 12, 3)
  assert images.sniff(source[1]["image"])[1] is None
  assert np.abs(decode(source[1]["image"]).astype(int) - decode(files["b"], options)).mean() < 8  # encoded again


@pytest.mark.process
def test_folders_and_the_inspecting_command_know_the_formats(tmp_path):
  for name, format in (("a.png", "PNG"), ("b.gif", "GIF"), ("c.avif", "AVIF")):
    colours().save(tmp_path / name, format)
  assert [p[-5:] for p in find([str(tmp_path)], ImageOptions(("avif",)))] == ["a.png", "b.gif", ".avif"]
  assert len(find([str(tmp_path)])) == 3  # the GIF and the AVIF are named as what they are, as everywhere
  (tmp_path / "t.tsv").write_text("filepath\ttitle\na.png\tx\nb.gif\ty\n")
  command = [sys.executable, "-m", "limber_jax.inspect", str(tmp_path / "t.tsv"), "--json", "--out="]
  told = [json.loads(subprocess.run([*command, *more], capture_output=True, text=True, check=False).stdout)
          for more in ((), ("--formats=GIF",))]
  assert [t["unreadable"] for t in told] == [1, 0] and told[1]["formats"] == {"PNG": 1, "GIF": 1}


def scans(width, height, more, image=None):
  """Returns a progressive JPEG whose last scan, with its table, is repeated `more` times."""
  data = saved(image or colours(width, height), "JPEG", progressive=True)
  last = data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda"))
  return data[:-2] + data[last:-2] * more + data[-2:]


def test_a_jpeg_is_read_up_to_a_number_of_scans_and_named_from_there_on():
  most = scans(40, 30, bounds.MAX_SCANS - 10)  # libjpeg writes ten
  np.testing.assert_array_equal(decode(most), pil(most))
  with pytest.raises(UserError, match="JPEG file of more than 100 scans over 1,200 pixels; at most 100 scans"):
    decode(scans(40, 30, bounds.MAX_SCANS - 9))
  large = scans(6000, 5000, 24)  # 34 scans over 30 megapixels
  start = bounds.check_parts(large)
  with pytest.raises(UserError, match="JPEG file of more than 33 scans over 30,000,000 pixels"):
    bounds.check_scans(large, start, 30_000_000)
  bounds.check_scans(large, start, 29_000_000)


def test_what_looks_like_a_scan_is_none():
  whole = saved(colours(), "JPEG", progressive=True)
  inner = whole.index(b"\xff\xc4", whole.index(b"\xff\xda"))  # a table between two scans
  for comment in (b"\xff\xda" * 400, b"\xff\xd9" + b"\xff\xda" * 400):
    segment = b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment
    np.testing.assert_array_equal(decode(whole[:inner] + segment + whole[inner:]), pil(whole))
    hidden = scans(20, 12, 200)
    with pytest.raises(UserError, match="more than 100 scans"):
      decode(hidden[:inner] + segment + hidden[inner:])
  np.testing.assert_array_equal(decode(whole + b"\xff\xda" * 400), pil(whole))  # behind its end, as of several images
  gray = saved(colours().convert("L"), "JPEG")
  np.testing.assert_array_equal(decode(gray + b"\xff\xda" * 400), pil(gray))


def chunk(name, data=b""):
  return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


N = bounds.MAX_PARTS
JPEG, PNG, GIF = (saved(colours(), format) for format in ("JPEG", "PNG", "GIF"))
TABLE = 13 + 3 * (2 << (GIF[10] & 7))  # where a GIF's blocks begin
FLOODS = {
  "JPEG segments": (JPEG[:2], b"\xff\xfe\0\2", JPEG[2:]), "JPEG padding": (JPEG[:2], b"\xff", JPEG[2:]),
  "JPEG of nothing": (JPEG[:2] + b"\xff\xfe\0\2", b"a", JPEG[2:]), "JPEG of stuffing": (JPEG[:2], b"\xff\0", JPEG[2:]),
  "PNG chunks": (PNG[:33], chunk(b"tEXt", b"a\0b"), PNG[33:]), "PNG of no pixels": (PNG[:33], chunk(b"IDAT"), PNG[33:]),
  "GIF comment": (GIF[:TABLE] + b"\x21\xfe", b"\1a", b"\0" + GIF[TABLE:]),
  "GIF of nothing": (GIF[:TABLE], b"a", GIF[TABLE:]),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_parts_is_refused_before_the_file_is_opened_and_a_few_are_none(name):
  begin, part, end = FLOODS[name]
  with pytest.raises(UserError, match=rf"^{name[:4].strip()} file of more than 100,000 .* is not opened$"):
    decode(begin + part * (N + 10) + end, ALL)
  few = begin + part * 20 + end
  np.testing.assert_array_equal(decode(few, ALL), pil(few))


def test_a_tiff_of_too_many_strips_is_refused(monkeypatch):
  entries = [(256, 1, 2), (257, 1, 40), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, 40, 122), (277, 1, 1), (278, 1, 1),
             (279, 40, 282)]  # tag, count, value or place
  head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", t, 4, *x) for t, *x in entries)
  data = head + struct.pack("<I40I40I", 0, *[8] * 40, *[2] * 40)
  assert decode(data, ALL).shape == (40, 2, 3)
  monkeypatch.setattr(bounds, "MAX_PARTS", 39)
  with pytest.raises(UserError, match="TIFF file of 40 strips; at most 39"):
    decode(data, ALL)
