"""The data sets of both papers' evaluations: what each is, where it is expected, and the pages it comes from.

Nothing is downloaded. Sizes are those of the official splits; where the paper's table says otherwise, the note does.
Sources: arXiv 2103.00020, Table 9 and appendix A; arXiv 2209.15162, section 4; the data sets' own pages.
"""

import os
from dataclasses import dataclass
from typing import Any

from limber_jax.config import Evaluation, Source
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Runner

PREPARED = "prepared by TFDS"
CLASSES = "a folder a class"


@dataclass(frozen=True)
class DataSet:
  """A data set that something is measured on."""

  name: str                # as the papers write it
  source: Source           # of what is evaluated; its path is where the data are expected
  sizes: tuple[int, int, int]  # examples to train on, to validate on, to test on; 0 where there is no such split
  page: str                # where it comes from
  licence: str             # the page that says what may be done with it; that of the data set where there is no other
  classes: int = 0         # 0: of no classes
  metric: str = ""         # a metric of evaluation "zeroshot"
  tfds: str = ""           # the builder that prepares it
  layout: str = CLASSES    # what lies at source.path, where no builder prepares it
  train: str = ""          # what linear probes learn from, and choose their λ on: values of source.split
  validation: str = ""     # "" = a part of `train`
  note: str = ""           # of the protocol


def _tfds(builder: str, split: str, *, train: str = "train", label_key: str = "", **fields: str) -> dict[str, Any]:
  """Returns fields of a DataSet that TFDS prepares."""
  source = Source(name="tfds", path=f"data/tfds/{builder}", split=split, label_key=label_key)
  return {"source": source, "tfds": builder, "layout": PREPARED, "train": train, **fields}


def _folder(path: str, split: str = "", **fields: str) -> Source:
  return Source(name="folder", path=f"data/{path}", split=split, **fields)


ROBUST = "https://modestyachts.github.io/robust-vid/"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
COCO_TERMS = "https://cocodataset.org/#termsofuse"
IMAGENET_TERMS = "https://image-net.org/download.php"
FRAMES = "the middle frame of every video, as JPEG under the video's name"

# The paper's 27, in the order of its Table 9. The keys are the names of the lists of classes and templates too.
CLIP = {
  "food101": DataSet(
    "Food101", sizes=(75_750, 0, 25_250), classes=101, metric="top1",
    page="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    licence="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/", **_tfds("food101", "validation")),
  "cifar10": DataSet(
    "CIFAR10", sizes=(50_000, 0, 10_000), classes=10, metric="top1", page="https://www.cs.toronto.edu/~kriz/cifar.html",
    licence="https://www.cs.toronto.edu/~kriz/cifar.html", **_tfds("cifar10", "test")),
  "cifar100": DataSet(
    "CIFAR100", sizes=(50_000, 0, 10_000), classes=100, metric="top1",
    page="https://www.cs.toronto.edu/~kriz/cifar.html", licence="https://www.cs.toronto.edu/~kriz/cifar.html",
    **_tfds("cifar100", "test", label_key="label")),
  "birdsnap": DataSet(
    "Birdsnap", _folder("birdsnap", "test_images.txt", images="images"), (47_386, 0, 2_443), "https://thomasberg.org/",
    "https://thomasberg.org/", 500, "top1", layout="test_images.txt and images/<species>/*.jpg",
    note="the paper could still fetch 42,283 and 2,149 of the images"),
  "sun397": DataSet(
    "SUN397", sizes=(19_850, 0, 19_850), classes=397, metric="top1",
    page="https://vision.princeton.edu/projects/2010/SUN/", licence="https://vision.princeton.edu/projects/2010/SUN/",
    note="the first of its ten partitions", **_tfds("sun397/standard-part1-120k", "test")),
  "stanford_cars": DataSet(
    "Stanford Cars", sizes=(8_144, 0, 8_041), classes=196, metric="top1",
    page="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    licence="https://ai.stanford.edu/~jkrause/cars/car_dataset.html", **_tfds("cars196", "test")),
  "fgvc_aircraft": DataSet(
    "FGVC Aircraft", _folder("fgvc-aircraft-2013b/data", "images_variant_test.txt", images="images"),
    (3_334, 3_333, 3_333), "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/", 100, "mean_per_class",
    layout="images_variant_test.txt and images/*.jpg", train="images_variant_train.txt",
    validation="images_variant_val.txt"),
  "voc2007": DataSet(
    "VOC2007", sizes=(2_501, 2_510, 4_952), classes=20, metric="map11",
    page="http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    licence="http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    note="several classes an image; a class of which an image has difficult objects only does not count there",
    **_tfds("voc/2007", "test", validation="validation")),
  "dtd": DataSet(
    "DTD", sizes=(1_880, 1_880, 1_880), classes=47, metric="top1", page="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    licence="https://www.robots.ox.ac.uk/~vgg/data/dtd/", note="the first of its ten partitions",
    **_tfds("dtd", "test", validation="validation")),
  "oxford_pets": DataSet(
    "Oxford Pets", sizes=(3_680, 0, 3_669), classes=37, metric="mean_per_class",
    page="https://www.robots.ox.ac.uk/~vgg/data/pets/", licence="https://www.robots.ox.ac.uk/~vgg/data/pets/",
    **_tfds("oxford_iiit_pet", "test", label_key="label")),
  "caltech101": DataSet(
    "Caltech101", sizes=(3_059, 0, 6_085), classes=102, metric="mean_per_class",
    page="https://data.caltech.edu/records/mzrjq-6wc02", licence="https://data.caltech.edu/records/mzrjq-6wc02",
    note="with the class of backgrounds; its whole faces and its cropped ones are two classes",
    **_tfds("caltech101", "test")),
  "flowers102": DataSet(
    "Flowers102", sizes=(1_020, 1_020, 6_149), classes=102, metric="mean_per_class",
    page="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    licence="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    **_tfds("oxford_flowers102", "test", validation="validation")),
  "mnist": DataSet(
    "MNIST", sizes=(60_000, 0, 10_000), classes=10, metric="top1", page="http://yann.lecun.com/exdb/mnist/",
    licence="http://yann.lecun.com/exdb/mnist/", **_tfds("mnist", "test")),
  "fer2013": DataSet(
    "FER2013", _folder("fer2013", "test"), (28_709, 3_589, 3_589),
    "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge",
    "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge/rules",
    7, "top1", layout="test/<angry, disgust, fear, happy, sad, surprise, neutral>/*.png", train="train",
    note="the paper counts 32,140 and 3,574; some classes have several names"),
  "stl10": DataSet(
    "STL10", sizes=(5_000, 0, 8_000), classes=10, metric="top1", page="https://cs.stanford.edu/~acoates/stl10/",
    licence="https://cs.stanford.edu/~acoates/stl10/",
    note="its ten folds are of the training set, 1,000 each: probes average over them, zero-shot has one test set",
    **_tfds("stl10", "test")),
  "eurosat": DataSet(
    "EuroSAT", sizes=(10_000, 5_000, 5_000), classes=10, metric="top1", page="https://github.com/phelber/EuroSAT",
    licence="https://github.com/phelber/EuroSAT",
    note="no official split of its 27,000; parts of the order that TFDS shuffles it into, in the paper's sizes",
    **_tfds("eurosat/rgb", "train[15000:20000]", train="train[:10000]", validation="train[10000:15000]")),
  "resisc45": DataSet(
    "RESISC45", sizes=(3_150, 3_150, 25_200), classes=45, metric="top1",
    page="https://gcheng-nwpu.github.io/#Datasets", licence="https://gcheng-nwpu.github.io/#Datasets",
    note="no official split of its 31,500; parts of the order that TFDS shuffles it into, in the paper's sizes",
    **_tfds("resisc45", "train[6300:]", train="train[:3150]", validation="train[3150:6300]")),
  "gtsrb": DataSet(
    "GTSRB", _folder("gtsrb", "GT-final_test.csv", images="Final_Test/Images", label_key="ClassId"),
    (39_209, 0, 12_630), "https://benchmark.ini.rub.de/gtsrb_dataset.html",
    "https://benchmark.ini.rub.de/gtsrb_dataset.html", 43, "top1",
    layout="GT-final_test.csv, Final_Test/Images/*.ppm and Final_Training/Images/<class>/*.ppm",
    train="Final_Training/Images", note="the paper trains probes on the 26,640 images of the first round"),
  "kitti_distance": DataSet(
    "KITTI distance", sizes=(6_347, 423, 711), classes=4, metric="top1",
    page="https://www.cvlibs.net/datasets/kitti/", licence="https://www.cvlibs.net/datasets/kitti/",
    note="how far the nearest car, van or truck is: up to 8 m, up to 20 m, further, none; as VTAB has it",
    **_tfds("kitti", "test", label_key="distance", validation="validation")),
  "country211": DataSet(
    "Country211", _folder("country211", "test"), (31_650, 10_550, 21_100),
    "https://github.com/openai/CLIP/blob/main/data/country211.md",
    "https://github.com/openai/CLIP/blob/main/data/country211.md", 211, "top1",
    layout="test/<ISO code>/*.jpg, and train and valid", train="train", validation="valid",
    note="150, 50 and 100 images a country to train, validate and test"),
  "patch_camelyon": DataSet(
    "PatchCamelyon", sizes=(262_144, 32_768, 32_768), classes=2, metric="top1", page="https://github.com/basveeling/pcam",
    licence="https://github.com/basveeling/pcam", **_tfds("patch_camelyon", "test", validation="validation")),
  "ucf101": DataSet(
    "UCF101", _folder("ucf101", "testlist01.txt,testlist02.txt,testlist03.txt", images="frames",
                      label_key="folder"), (9_537, 0, 3_783),
    "https://www.crcv.ucf.edu/data/UCF101.php", "https://www.crcv.ucf.edu/data/UCF101.php", 101, "top1",
    layout=f"testlist01.txt to testlist03.txt and frames/<class>/*.jpg: {FRAMES}", train="trainlist01.txt",
    note="the mean over its three splits, of which sizes are the first's; the middle frame of a video"),
  "kinetics700": DataSet(
    "Kinetics700", _folder("kinetics700", "test"), (494_801, 0, 31_669),
    "https://github.com/cvdfoundation/kinetics-dataset", "https://github.com/cvdfoundation/kinetics-dataset", 700,
    "mean_top1_top5", layout=f"test/<class>/*.jpg: {FRAMES}", train="train",
    note="the middle frame of a video; sizes are those the paper could fetch"),
  "clevr_counts": DataSet(
    "CLEVR counts", sizes=(2_000, 0, 500), classes=8, metric="top1", page="https://cs.stanford.edu/people/jcjohns/clevr/",
    licence="https://cs.stanford.edu/people/jcjohns/clevr/",
    note="how many objects there are, 3 to 10; 2,500 random images: the first as TFDS shuffles them",
    **_tfds("clevr", "train[2000:2500]", label_key="count", train="train[:2000]")),
  "hateful_memes": DataSet(
    "Hateful Memes", _folder("hateful_memes", "dev.jsonl"), (8_500, 0, 500), "https://hatefulmemeschallenge.com",
    "https://hatefulmemeschallenge.com", 2, "roc_auc", layout="dev.jsonl, train.jsonl and img/*.png",
    train="train.jsonl", note="the development set, as the labels of the test set are not public"),
  "rendered_sst2": DataSet(
    "Rendered SST2", _folder("rendered-sst2", "test"), (6_920, 872, 1_821),
    "https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md",
    "https://nlp.stanford.edu/sentiment/treebank.html", 2, "top1",
    layout="test/<negative, positive>/*.png, and train and valid", train="train", validation="valid",
    note="sentences as black text on white of 448 × 448 pixels"),
  "imagenet": DataSet(
    "ImageNet", sizes=(1_281_167, 0, 50_000), classes=1000, metric="top1", page="https://image-net.org",
    licence=IMAGENET_TERMS, **_tfds("imagenet2012", "validation")),
}

SETS = CLIP | {
  "imagenet_v2": DataSet(
    "ImageNetV2", _folder("imagenetv2-matched-frequency-format-val"), (0, 0, 10_000),
    "https://github.com/modestyachts/ImageNetV2", "https://github.com/modestyachts/ImageNetV2", 1000,
    layout="a folder a class, 0 to 999", note="matched frequency"),
  "imagenet_a": DataSet(
    "ImageNet-A", _folder("imagenet-a"), (0, 0, 7_500), "https://github.com/hendrycks/natural-adv-examples",
    "https://github.com/hendrycks/natural-adv-examples/blob/master/LICENSE", 200, layout="a folder a WordNet id"),
  "imagenet_r": DataSet(
    "ImageNet-R", _folder("imagenet-r"), (0, 0, 30_000), "https://github.com/hendrycks/imagenet-r",
    "https://github.com/hendrycks/imagenet-r/blob/master/LICENSE", 200, layout="a folder a WordNet id"),
  "imagenet_sketch": DataSet(
    "ImageNet Sketch", _folder("imagenet-sketch"), (0, 0, 50_889), "https://github.com/HaohanWang/ImageNet-Sketch",
    "https://github.com/HaohanWang/ImageNet-Sketch/blob/master/LICENSE", 1000, layout="a folder a WordNet id"),
  "objectnet": DataSet(
    "ObjectNet", _folder("objectnet-1.0/images"), (0, 0, 50_273), "https://objectnet.dev",
    "https://objectnet.dev/download.html", 113, layout="a folder a class",
    note="of its 313 classes the 113 that ImageNet has, 18,574 images; nothing may be trained on it"),
  "imagenet_vid_robust": DataSet(
    "ImageNet-Vid", Source(name="frames", path="data/imagenet-vid-robust"), (0, 0, 1_109), ROBUST, IMAGENET_TERMS, 30,
    layout="labels.json, pmsets.json and the frames that they name", note="neighbourhoods of up to 21 frames"),
  "ytbb_robust": DataSet(
    "YouTube-BB", Source(name="frames", path="data/ytbb-robust"), (0, 0, 2_467), ROBUST,
    "https://research.google.com/youtube-bb/", 24,
    layout="anchor_labels.json, pmk_labels.json, ytbb_robustness_test_anchors_full.csv and the frames that they name",
    note="neighbourhoods of up to 21 frames"),
  "coco": DataSet(
    "COCO", Source(name="coco", path="data/coco/dataset_coco.json", split="test"), (113_287, 5_000, 5_000),
    "https://cocodataset.org/#download", COCO_TERMS,
    layout=f"Karpathy's dataset_coco.json ({KARPATHY}) beside train2014/ and val2014/", train="train+restval",
    validation="val", note="five captions an image; Karpathy's splits"),
  "nocaps": DataSet(
    "NoCaps", Source(name="coco", path="data/nocaps/nocaps_val_4500_captions.json", split=""), (0, 4_500, 10_600),
    "https://nocaps.org/download", "https://nocaps.org/",
    layout="nocaps_val_4500_captions.json and images/*.jpg, which are of Open Images",
    note="ten captions an image; the validation split, as the references of the test split are not public"),
  "vqa2": DataSet(
    "VQA2", Source(name="vqa", path="data/vqa2", split="val2014", images="data/coco"), (443_757, 214_354, 447_793),
    "https://visualqa.org/download.html", "https://visualqa.org/terms.html",
    layout="v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json; images of COCO",
    train="train2014", note="questions; examples of few shots are drawn from train2014"),
  "flickr30k": DataSet(
    "Flickr30k", Source(name="coco", path="data/flickr30k/dataset_flickr30k.json", split="test"),
    (29_000, 1_014, 1_000), "https://shannon.cs.illinois.edu/DenotationGraph/",
    "https://shannon.cs.illinois.edu/DenotationGraph/",
    layout=f"Karpathy's dataset_flickr30k.json ({KARPATHY}) and flickr30k-images/*.jpg", train="train",
    validation="val", note="five captions an image; Karpathy's splits"),
  "awa2": DataSet(
    "AWA2", Source(name="awa2", path="data/Animals_with_Attributes2", split="all"), (0, 0, 37_322),
    "https://cvml.ista.ac.at/AwA2/", "https://cvml.ista.ac.at/AwA2/", 50,
    layout="classes.txt, predicates.txt, predicate-matrix-binary.txt and JPEGImages/<animal>/*.jpg",
    note="85 attributes of each animal"),
  "cc3m": DataSet(
    "CC3M", Source(name="captions", path="data/cc3m/train.tsv"), (3_318_333, 15_840, 0),
    "https://ai.google.com/research/ConceptualCaptions/download",
    "https://github.com/google-research-datasets/conceptual-captions/blob/master/LICENSE",
    layout="a table of captions and paths of images that img2dataset has fetched",
    note="what LiMBeR trains on; a part of its addresses is dead"),
}


def of(source: Source) -> DataSet | None:
  """Returns the data set that a source stands for: the one whose expected path its own ends with."""
  path = os.path.normpath(source.path).replace(os.sep, "/")
  for s in SETS.values():
    tail = s.source.path.removeprefix("data/")
    if s.source.name == source.name and f"/{path}".endswith(f"/{tail}"):
      return s
  return None


def open_runner(config: Evaluation, context: Context) -> Runner:
  """Returns Runner(config, context); raises UserError, and of data that are missing it says where they come from."""
  try:
    return Runner(config, context)
  except UserError as error:
    s = of(config.source)
    if s is None or os.path.exists(config.source.path):
      raise
    raise UserError(f"{config.source.path}: no such file or directory; {expected(s, config.source.path)}") from error


def expected(s: DataSet, path: str) -> str:
  """Returns what of a data set is expected at `path`, and the page it comes from, in one line."""
  wanted = s.layout
  if s.tfds:
    root = os.path.normpath(path).removesuffix(s.tfds)
    wanted = (f"what python -c \"import tensorflow_datasets as tfds; tfds.builder({s.tfds!r}, "
              f"file_format='array_record', data_dir={root!r}).download_and_prepare()\" makes there")
  return f"{s.name} is expected there: {wanted}; see {s.page}"


def markdown() -> str:
  """Returns the table of all data sets that stands in docs/datasets.md, in Markdown."""
  rows = [["data set", "expected at", "layout", "classes", "train / validation / test", "metric", "page, licence"]]
  rows.append(["---"] * len(rows[0]))
  for key, s in SETS.items():
    layout = f"TFDS `{s.tfds}`" if s.tfds else s.layout.replace("<", "&lt;")
    pages = f"[page]({s.page})" if s.page == s.licence else f"[page]({s.page}), [licence]({s.licence})"
    rows.append([f"{s.name} (`{key}`)", f"`{s.source.path}`", layout + (f"; {s.note}" if s.note else ""),
                 f"{s.classes:,}" if s.classes else "", " / ".join(f"{n:,}" if n else "–" for n in s.sizes),
                 f"`{s.metric}`" if s.metric else "", pages])
  return "".join(f"| {' | '.join(row)} |\n" for row in rows)
